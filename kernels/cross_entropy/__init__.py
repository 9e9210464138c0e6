"""The language model's loss without its logits: head product and cross-entropy at selected rows, by chunks.

    loss = cross_entropy(hidden[rows] @ weight.T, targets)

`reference.py` says the same. A chunk's log-sum-exp is known as soon as its logits are, so the forward turns them into
their gradient in place and takes the products with it; the backward only scales. `T` tokens, `N` selected rows, `E`
hidden size, `V` vocabulary. The head's gradient is computed only where it trains.
"""

from typing import Literal

import torch
from torch import Tensor

from ..checks import describe, require
from ..chunks import accumulate

# logits held at a time: a GPU wants few large products, a CPU has caches
LOGITS_BYTES = {"cuda": 512 * 2**20, "cpu": 16 * 2**20}
# float16 probabilities of a large vocabulary would be subnormal
FLOAT16_GRADIENT_SCALE = 2.0**10


@torch.library.custom_op("bivec::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, needs_hidden: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the rows' losses, float32, and its gradients, empty unless needed.

    By the selected rows (N, E) in their dtype, times `_gradient_scale`, and by the head (V, E) in float32.
    """
    num_rows, vocab_size = targets.shape[0], weight.shape[0]
    loss, grad_rows, grad_weight = _outputs(hidden, weight, targets, needs_hidden, needs_weight)
    grad_weight.zero_()
    losses = loss.new_empty(num_rows)
    scale = _gradient_scale(hidden.dtype)
    budget = LOGITS_BYTES["cuda" if hidden.is_cuda else "cpu"]
    step = min(num_rows, max(budget // (hidden.element_size() * vocab_size) // 64, 1) * 64)
    logits_buffer = hidden.new_empty((step, vocab_size))
    for start in range(0, num_rows, step):
        chunk = slice(start, start + step)
        inputs = hidden[chunk] if rows is None else hidden.index_select(0, rows[chunk])
        logits = logits_buffer[: inputs.shape[0]]
        torch.mm(inputs, weight.T, out=logits)
        with torch.cuda.device_of(hidden):
            _differentiate(logits, targets[chunk], losses[chunk], scale, needs_hidden or needs_weight)
        if needs_hidden:
            torch.mm(logits, weight, out=grad_rows[chunk])
        if needs_weight:
            accumulate(grad_weight, logits.T, inputs)
    return losses.sum(), grad_rows, grad_weight.div_(scale)


def _outputs(hidden, weight, targets, needs_hidden, needs_weight) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, (vocab_size, size) = targets.shape[0], weight.shape
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty((num_rows if needs_hidden else 0, size)),
        hidden.new_empty((vocab_size if needs_weight else 0, size), dtype=torch.float32),
    )


_linear_cross_entropy.register_fake(
    lambda hidden, weight, targets, rows, needs_hidden, needs_weight: _outputs(
        hidden, weight, targets, needs_hidden, needs_weight
    )
)


def _save_for_backward(ctx, inputs, output):
    hidden, weight, _, rows, *ctx.needs = inputs
    _, *gradients = output
    ctx.save_for_backward(*gradients, rows)
    ctx.mark_non_differentiable(*gradients)
    ctx.hidden_shape, ctx.weight_dtype = hidden.shape, weight.dtype


def _backward(ctx, upstream, *_):
    grad_rows, grad_weight, rows = ctx.saved_tensors
    needs_hidden, needs_weight = ctx.needs
    grad_hidden = None
    # two dimensions, because a scalar would first be rounded to the gradients' dtype
    upstream = upstream.reshape(1, 1)
    if needs_hidden:
        dtype = grad_rows.dtype
        grad_hidden = (grad_rows * (upstream / _gradient_scale(dtype))).to(dtype)
        if rows is not None:
            grad_hidden = grad_hidden.new_zeros(ctx.hidden_shape).index_add_(0, rows, grad_hidden)
    grad_weight = (grad_weight * upstream).to(ctx.weight_dtype) if needs_weight else None
    return grad_hidden, grad_weight, None, None, None, None


_linear_cross_entropy.register_autograd(_backward, setup_context=_save_for_backward)


def _gradient_scale(dtype: torch.dtype) -> float:
    return FLOAT16_GRADIENT_SCALE if dtype == torch.float16 else 1.0


def _differentiate(logits: Tensor, targets: Tensor, losses: Tensor, scale: float, needs_gradient: bool) -> None:
    """Each row's loss into `losses`, and `scale` times its gradient over its `logits` where needed."""
    if logits.is_cuda:
        from .kernel import differentiate_rows  # triton is there on Linux only

        differentiate_rows(logits, targets, losses, scale, needs_gradient)
    else:
        _eager_rows(logits, targets, losses, scale, needs_gradient)


def _eager_rows(logits: Tensor, targets: Tensor, losses: Tensor, scale: float, needs_gradient: bool) -> None:
    scores = logits.float()
    torch.ops.aten._log_softmax.out(scores, 1, False, out=scores)
    torch.neg(scores.gather(1, targets[:, None])[:, 0], out=losses)
    if needs_gradient:
        scores.exp_().scatter_add_(1, targets[:, None], scores.new_full((1, 1), -1.0).expand(len(scores), 1))
        torch.mul(scores, scale, out=logits)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    rows: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
) -> Tensor:
    """Cross-entropy of `hidden[rows] @ weight.T` against `targets`; (T, E), (V, E), (N,) -> float32 scalar.

    hidden, weight   bfloat16, float16 or float32, both of one dtype, in which logits are held as they are by eager
                     models; the softmax is computed in float32
    targets          int64 (N,), from 0 to V - 1
    rows             int64 (N,), the row of `hidden` that predicts each target; default all rows in order
    reduction        over the N targets

    Differentiable, once, in hidden and weight. Holds a chunk of logits, never (N, V). Raises ValueError for arguments
    that break these rules, and for no target at all, whose mean is undefined. What is inside of `targets` and `rows` is
    checked on the CPU; on CUDA, without waiting for the device, a device-side assertion guards them.
    """
    _check(hidden, weight, targets, rows)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
    records = torch.is_grad_enabled()
    loss, *_ = _linear_cross_entropy(
        hidden, weight, targets, rows, records and hidden.requires_grad, records and weight.requires_grad
    )
    return loss / targets.shape[0] if reduction == "mean" else loss


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None) -> None:
    if hidden.dim() != 2 or hidden.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"hidden must be bfloat16, float16 or float32 (T, E), got {describe(hidden)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[1] or weight.dtype != hidden.dtype:
        raise ValueError(f"weight must be {hidden.dtype} (V, {hidden.shape[1]}) like hidden, got {describe(weight)}")
    num_rows = hidden.shape[0] if rows is None else rows.shape[0] if rows.dim() == 1 else None
    if rows is not None and (rows.dtype != torch.int64 or num_rows is None):
        raise ValueError(f"rows must be int64 of shape (N,), got {describe(rows)}")
    if targets.dtype != torch.int64 or targets.shape != (num_rows,):
        raise ValueError(f"targets must be int64 of shape ({num_rows},), got {describe(targets)}")
    if num_rows == 0:
        raise ValueError("targets must hold at least one target, got none")
    for name, tensor in (("weight", weight), ("targets", targets), ("rows", rows)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
    for name, indices, size in (("targets", targets, weight.shape[0]), ("rows", rows, hidden.shape[0])):
        if indices is not None:
            require(((indices >= 0) & (indices < size)).all(), f"{name} must be from 0 to {size - 1}, got one outside")
