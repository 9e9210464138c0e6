"""RMSNorm for training, alone or with the residual sum before it: one pass over memory each way.

    total = x + residual
    normed = total / sqrt(mean(total²) + eps) * weight

`reference.py` says the same. The backward keeps the normalised input and one number a row, and computes the weight's
gradient only where the weight trains. On CUDA a Triton kernel (`kernels.py`), on the CPU chunks of rows in cache: a
fresh matrix for every step would cost more in page faults than its arithmetic.

Source: Zhang and Sennrich, arXiv 1910.07467. `T` rows, `E` the normalised dimension.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import describe
from ..chunks import is_small, row_chunks, rows_to_a_chunk, wide_dtype


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, room: int):
        total, normed, rstd = _norm(x, residual, weight, eps, room)
        ctx.has_residual = residual is not None
        ctx.save_for_backward(total if ctx.has_residual else x, weight, rstd)
        ctx.set_materialize_grads(False)
        return (total, normed) if ctx.has_residual else normed

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        grad_total, grad_normed = grads if ctx.has_residual else (None, *grads)
        if grad_normed is None:  # only the sum was used
            return grad_total, grad_total, None, None, None
        total, weight, rstd = ctx.saved_tensors
        needs_weight = ctx.needs_input_grad[2]
        grad_x, grad_weight = _norm_backward(grad_normed, grad_total, total, weight, rstd, needs_weight)
        grad_residual = grad_x if ctx.has_residual else None
        return grad_x, grad_residual, grad_weight.to(weight.dtype) if needs_weight else None, None, None


def _norm(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (T, E), empty without a residual; the normed rows (T, E); float32 1 / rms (T, 1)."""
    if x.is_cuda:
        from .kernels import norm_forward  # triton is there on Linux only

        return norm_forward(x, residual, weight, eps, room)
    return _norm_by_chunks(x, residual, weight, eps)


def _norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (T, E), and of the weight (E,) in float32, empty unless needed."""
    if total.is_cuda:
        from .kernels import norm_backward

        return norm_backward(grad_normed, grad_total, total, weight, rstd, needs_weight)
    return _norm_backward_by_chunks(grad_normed, grad_total, total, weight, rstd, needs_weight)


def _norm_by_chunks(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    num_rows, size = x.shape
    wide = wide_dtype(x.dtype)
    total = x.new_empty(0 if residual is None else x.shape)
    normed = x.new_empty(x.shape)
    rstd = x.new_empty((num_rows, 1), dtype=wide)
    scratch = _scratch(x, wide)
    weight = weight.to(wide)
    for rows in row_chunks(num_rows, size):
        values = x[rows] if residual is None else torch.add(x[rows], residual[rows], out=total[rows])
        out = normed[rows]
        if scratch is not None:
            values, out = scratch[0, : len(values)].copy_(values), scratch[1, : len(values)]
        torch.square(values, out=out)
        scale = torch.mean(out, dim=-1, keepdim=True, out=rstd[rows]).add_(eps).rsqrt_()
        torch.mul(values, scale, out=out).mul_(weight)
        if scratch is not None:
            normed[rows] = out
    return total, normed, rstd


def _norm_at_once(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The bits of `_norm_by_chunks`, differentiated by autograd."""
    wide = wide_dtype(x.dtype)
    return torch.nn.functional.rms_norm(x.to(wide), x.shape[-1:], weight.to(wide), eps).to(x.dtype)


def _norm_backward_by_chunks(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    num_rows, size = total.shape
    wide = rstd.dtype
    grad_x = total.new_empty(total.shape)
    grad_weight = torch.zeros(size if needs_weight else 0, dtype=wide)
    scratch = _scratch(total, wide)
    weight = weight.to(wide)
    for rows in row_chunks(num_rows, size):
        values, grad, scale, out = total[rows], grad_normed[rows], rstd[rows], grad_x[rows]
        if scratch is not None:
            values, grad = scratch[0, : len(values)].copy_(values), scratch[1, : len(grad)].copy_(grad)
            out = grad
        if needs_weight:
            grad_weight += torch.linalg.vecdot(grad, values * scale, dim=0)
        # d(x r) = r (g - x r² (x . g) / E)
        torch.mul(grad, weight, out=out).mul_(scale)
        along = torch.linalg.vecdot(out, values)[:, None].mul_(scale.square().mul_(-1 / size))
        out.addcmul_(values, along)
        if grad_total is not None:
            out += grad_total[rows]
        if scratch is not None:
            grad_x[rows] = out
    return grad_x, grad_weight


def _scratch(x: Tensor, wide: torch.dtype) -> Tensor | None:
    """Two chunks of x in `wide`; None where x has that dtype already and its chunks serve themselves."""
    return None if x.dtype == wide else x.new_empty((2, rows_to_a_chunk(*x.shape), x.shape[1]), dtype=wide)


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, room: int = 0) -> Tensor:
    """`x / sqrt(mean(x²) + eps) * weight` over the last dimension; (..., E), (E,) -> (..., E).

    Computed in float32 and rounded once to x's dtype; a row's result depends on that row alone. On a GPU the result's
    rows have `room` columns of memory behind them, for what reads them to write to. Differentiable, once, in x and
    weight. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check(x, weight)
    # without a gradient few calls count more than memory: threads that run side by side meet at each
    if is_small(x) or (torch.is_inference_mode_enabled() and not x.is_cuda):
        return _norm_at_once(x, weight, eps)
    return _RMSNorm.apply(x.reshape(-1, x.shape[-1]), None, weight, eps, room).view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, *, room: int = 0) -> tuple[Tensor, Tensor]:
    """`total = x + residual` and `rms_norm(total, weight, eps)`; (..., E), (..., E), (E,) -> two of (..., E).

    The sum has the wider dtype of the two and is rounded to it before it is normalised, as a separate addition would.
    `room` as in `rms_norm`. Differentiable, once, in x, residual and weight. Raises ValueError for shapes, dtypes or
    devices that do not fit.
    """
    _check(x, weight)
    if residual.shape != x.shape or not residual.is_floating_point() or residual.device != x.device:
        raise ValueError(
            f"residual must be floating point {tuple(x.shape)} on {x.device} like x, "
            f"got {describe(residual)} on {residual.device}"
        )
    dtype = torch.promote_types(x.dtype, residual.dtype)  # they differ under autocast
    x, residual = x.to(dtype), residual.to(dtype)
    if is_small(x):
        total = x + residual
        return total, _norm_at_once(total, weight, eps)
    size = x.shape[-1]
    total, normed = _RMSNorm.apply(x.reshape(-1, size), residual.reshape(-1, size), weight, eps, room)
    return total.view(x.shape), normed.view(x.shape)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise ValueError(f"x must be floating point (..., E), got {describe(x)}")
    if weight.shape != x.shape[-1:] or not weight.is_floating_point():
        raise ValueError(f"weight must be floating point of shape ({x.shape[-1]},), got {describe(weight)}")
    if weight.device != x.device:
        raise ValueError(f"weight must be on x's device {x.device}, got {weight.device}")
