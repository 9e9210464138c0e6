"""LoRA linears for training: a frozen base product and its adapters in one autograd function that keeps only its input.

    y = x @ weight.T + bias + scaling * (dropout(x) @ lora_a.T) @ lora_b.T

`lora_linears` does it for linears that share their input (q/k/v, gate/up): their A's are one stacked product, forward
and backward. No gradient is computed for a frozen weight; x Aᵀ and the dropout mask are computed again in the backward.
`reference.py` says the same in eager PyTorch. `T` packed tokens, `r` a rank, `R` the sum of the ranks of a call. This
is the CPU's form; on a GPU, where passes over memory count, `stack.py` makes one product of a linear and its adapters.

The mask is Philox 4x64-10 (Salmon et al., 2011), numpy's stream for the key `seed`: sixteen bits an element in memory
order, little end first; `kernels.py` draws the same bits on a GPU. An element is dropped when its bits are below
`round(dropout_p * 2**16)`, and what is kept is scaled by the exact reciprocal of the chance of being kept.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import describe

if TYPE_CHECKING:
    from .stack import LoraStack

LANES = 2**16  # values of an element's random bits
CHUNK = 2**17  # elements whose random bits stay in the cache
UNIT = 8  # columns that a rank is rounded up to on a GPU: 16 bytes in 16 bits
LINE = 64  # columns whose rows begin where a line of memory does, 128 bytes in 16 bits


class LoraLinear(NamedTuple):
    """A frozen linear and its adapters."""

    weight: Tensor  # (out, in)
    bias: Tensor | None = None  # (out,)
    lora_a: Tensor | None = None  # (r, in), the adapter in training; None without one
    lora_b: Tensor | None = None  # (out, r)
    scaling: float = 1.0
    frozen: Sequence[tuple[Tensor, Tensor, float]] = ()  # (a, b, scaling) of earlier stages: no dropout, no gradient


class _Block(NamedTuple):
    """One adapter's place in the stacked products."""

    linear: int
    columns: slice
    scale: float


class _LoraLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, num_linears: int, blocks, num_trained: int, threshold: int, seed: int, *tensors):
        """`tensors`: the linears' weights, their biases, the A's of `blocks`, their B's; trained blocks come first."""
        weights, biases, lora_a, lora_b = _split(tensors, num_linears, len(blocks))
        ctx.save_for_backward(x, *tensors)
        ctx.arguments = num_linears, blocks, num_trained, threshold, seed
        outputs = [torch.nn.functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)]
        if blocks:
            dropped = _drop(x, _keep(x, threshold, seed)) if threshold else x
            low = _low_rank(x, dropped, _stack(lora_a, x), blocks, num_trained)
            for block, b in zip(blocks, lora_b, strict=True):
                # (r, out) in memory order: a third faster than the transposed view on CPU
                outputs[block.linear].addmm_(low[:, block.columns], _scaled(b, block, x).T.contiguous())
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        num_linears, blocks, num_trained, threshold, seed = ctx.arguments
        x, *tensors = ctx.saved_tensors
        weights, _, lora_a, lora_b = _split(tensors, num_linears, len(blocks))
        needs = _split(ctx.needs_input_grad[6:], num_linears, len(blocks))
        grad_a: list[Tensor | None] = [None] * len(blocks)
        grad_b: list[Tensor | None] = [None] * len(blocks)
        trained = _columns(blocks[:num_trained])
        needs_a, needs_b = any(needs[2]), any(needs[3])
        keep = _keep(x, threshold, seed) if threshold else None
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad_outputs[0] @ weights[0]
            for grad, weight in zip(grad_outputs[1:], weights[1:], strict=True):
                grad_x.addmm_(grad, weight)
        if blocks and (grad_x is not None or needs_a):
            stacked = _stack(lora_a, x)
            pairs = zip(blocks, lora_b, strict=True)
            parts = [grad_outputs[block.linear] @ _scaled(b, block, x) for block, b in pairs]
            grad_low = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)  # (T, R)
            if grad_x is not None and keep is not None:
                grad_x.addmm_(grad_low[:, trained.stop :], stacked[trained.stop :])
                grad_x += _drop(grad_low[:, trained] @ stacked[trained], keep)
            elif grad_x is not None:
                grad_x.addmm_(grad_low, stacked)
        if needs_a or needs_b:
            dropped = x if keep is None else _drop(x, keep)
            if needs_a:
                stacked_grad = grad_low[:, trained].T @ dropped
            if needs_b:
                low = dropped @ _stack(lora_a[:num_trained], x).T
            for place, (block, a, b) in enumerate(zip(blocks, lora_a, lora_b, strict=True)):
                if needs[2][place]:
                    grad_a[place] = stacked_grad[block.columns].to(a.dtype)
                if needs[3][place]:
                    # a scaled product (alpha) is five times slower in bfloat16 on CPU
                    product = grad_outputs[block.linear].T @ low[:, block.columns]
                    grad_b[place] = product.to(b.dtype).mul_(block.scale)
        return grad_x, None, None, None, None, None, *[None] * (2 * num_linears), *grad_a, *grad_b


def _split(items: Sequence, num_linears: int, num_blocks: int) -> tuple:
    a = 2 * num_linears
    return items[:num_linears], items[num_linears:a], items[a : a + num_blocks], items[a + num_blocks :]


def _columns(blocks: Sequence[_Block]) -> slice:
    return slice(0, blocks[-1].columns.stop if blocks else 0)


def _stack(matrices: Sequence[Tensor], x: Tensor) -> Tensor:
    """(R, in) in x's dtype."""
    return (matrices[0] if len(matrices) == 1 else torch.cat(tuple(matrices))).to(x.dtype)


def _scaled(b: Tensor, block: _Block, x: Tensor) -> Tensor:
    """(out, r) times the block's scale, in x's dtype."""
    return (b * block.scale).to(x.dtype)


def _low_rank(x: Tensor, dropped: Tensor, stacked: Tensor, blocks: Sequence[_Block], num_trained: int) -> Tensor:
    """(T, R): the trained blocks see the dropped input, the frozen ones the input itself."""
    if dropped is x or num_trained == len(blocks):
        return dropped @ stacked.T
    stop = _columns(blocks[:num_trained]).stop
    return torch.cat((dropped @ stacked[:stop].T, x @ stacked[stop:].T), dim=1)


def _keep(x: Tensor, threshold: int, seed: int) -> Tensor:
    """Which elements of x stay, bool (T, in)."""
    keep = np.empty(x.numel(), dtype=np.bool_)
    random = np.random.Philox(key=seed)
    for start in range(0, keep.size, CHUNK):
        part = keep[start : start + CHUNK]
        bits = random.random_raw(-(-part.size // 4)).astype("<u8", copy=False).view("<u2")
        np.greater_equal(bits[: part.size], threshold, out=part)
    return torch.from_numpy(keep).view(x.shape)


def _drop(x: Tensor, keep: Tensor) -> Tensor:
    """x with its dropped elements zero, the others as they are: the scale is in the blocks'."""
    return torch.where(keep, x, x.new_zeros(()))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """x Wᵀ + bias + scaling · (drop(x) Aᵀ) Bᵀ; (T, in) -> (T, out). `lora_linears` of one linear."""
    return lora_linears(x, [(weight, bias, lora_a, lora_b, scaling)], dropout_p=dropout_p, seed=seed)[0]


def padded_rank(rank: int) -> int:
    return -(-rank // UNIT) * UNIT


def room_behind(size: int, ranks: Sequence[int]) -> int:
    """Columns of memory behind an input of `size` with which a GPU takes linears and adapters of these ranks as one.

    The `room` of `lora_linears`, and of what computes its input.
    """
    return -(-(size + sum(map(padded_rank, ranks))) // LINE) * LINE - size if ranks else 0


def lora_linears(
    x: Tensor,
    linears: Sequence[LoraLinear | tuple],
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
    stack: "LoraStack | None" = None,
    room: int = 0,
) -> tuple[Tensor, ...]:
    """The outputs `(T, out)` of linears that share the input `x` `(T, in)`, with one product for all their A's.

    linears          `(weight, bias, lora_a, lora_b, scaling)` each, or `LoraLinear`; weight and bias are frozen and of
                     x's dtype, lora_a and lora_b of any (they are multiplied in x's)
    dropout_p        in [0, 1), a multiple of 2 ** -16 by rounding: elements of x that the adapters in training do not
                     see. The linears of a call share the mask
    seed             an integer in [0, 2 ** 64), needed with dropout: a seed gives the same mask on any run
    stack            for a GPU, a `stack.LoraStack` that `holds` these linears and spares copying their weights in
                     each call; it takes over adapters that have changed
    room             for a GPU, how many columns that follow each row of x in memory are free to be written to: x is a
                     part `buffer[:, :in]` of a buffer that has them. With `room_behind` of them nothing is added to
                     outputs in passes of its own

    Differentiable, once, in x and each lora_a and lora_b. Raises ValueError for arguments that break these rules.
    """
    layers = [LoraLinear(*linear) for linear in linears]
    _check(x, layers)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    threshold = min(round(dropout_p * LANES), LANES - 1)
    if threshold and (not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise ValueError(f"seed must be an integer in [0, 2 ** 64) with dropout_p above 0, got {seed!r}")
    kept = 1.0 - threshold / LANES
    if x.is_cuda or stack is not None:
        from .stack import stacked_lora_linears  # needs triton

        return stacked_lora_linears(
            x, layers, stack, dropout_threshold=threshold, seed=seed, kept_scale=1.0 / kept, room=room
        )
    adapters = [
        (place, linear.lora_a, linear.lora_b, linear.scaling / kept)
        for place, linear in enumerate(layers)
        if linear.lora_a is not None
    ]
    num_trained = len(adapters)
    adapters += [(place, *adapter) for place, linear in enumerate(layers) for adapter in linear.frozen]
    blocks, start = [], 0
    for place, a, _, scale in adapters:
        blocks.append(_Block(place, slice(start, start + a.shape[0]), float(scale)))
        start += a.shape[0]
    with torch.autocast(x.device.type, enabled=False):
        return _LoraLinears.apply(
            x,
            len(layers),
            blocks,
            num_trained,
            threshold if num_trained else 0,
            seed,
            *(linear.weight for linear in layers),
            *(linear.bias for linear in layers),
            *(a for _, a, _, _ in adapters),
            *(b for _, _, b, _ in adapters),
        )


def _check(x: Tensor, linears: Sequence[LoraLinear]) -> None:
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (T, in), got {describe(x)}")
    if not linears:
        raise ValueError("linears must hold at least one linear, got none")
    for weight, bias, lora_a, lora_b, scaling, frozen in linears:
        if weight.dim() != 2 or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
            raise ValueError(f"weight must be (out, {x.shape[1]}) in x's dtype {x.dtype}, got {describe(weight)}")
        if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
            raise ValueError(f"bias must be ({weight.shape[0]},) in x's dtype {x.dtype}, got {describe(bias)}")
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{name} must be frozen (requires_grad False): no gradient is computed for it")
        if (lora_a is None) != (lora_b is None):
            raise ValueError("lora_a and lora_b must be given together")
        if lora_a is not None and lora_b is not None:
            _check_adapter(x, weight, lora_a, lora_b, scaling, "")
        for a, b, scale in frozen:
            _check_adapter(x, weight, a, b, scale, "frozen ")
            if a.requires_grad or b.requires_grad:
                raise ValueError("a frozen adapter must not require a gradient")
        for tensor in (weight, bias, lora_a, lora_b, *(t for a, b, _ in frozen for t in (a, b))):
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"weights and adapters must be on x's device {x.device}, got {tensor.device}")


def _check_adapter(x: Tensor, weight: Tensor, a: Tensor, b: Tensor, scaling: float, kind: str) -> None:
    if a.dim() != 2 or a.shape[0] == 0 or a.shape[1] != x.shape[1] or not a.is_floating_point():
        raise ValueError(f"{kind}lora_a must be floating point (r, {x.shape[1]}) with r above 0, got {describe(a)}")
    if b.shape != (weight.shape[0], a.shape[0]) or not b.is_floating_point():
        raise ValueError(f"{kind}lora_b must be floating point {(weight.shape[0], a.shape[0])}, got {describe(b)}")
    if not math.isfinite(scaling):
        raise ValueError(f"{kind}scaling must be finite, got {scaling}")
