"""RMSNorm with a residual on the GPU: a program holds whole rows, reads each once and writes each once.

The weight's gradient is summed over each program's rows in order and then over the programs, so a second run gives the
same bits. `T` rows, `E` the normalised dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, narrow
from ..room import empty_with_room

MAX_PROGRAMS = 1024  # partial sums of the weight's gradient


@triton.jit(do_not_specialize=["num_rows"])
def _norm_fwd_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    total_ptr,
    normed_ptr,
    rstd_ptr,
    num_rows,
    stride_x,
    stride_residual,
    stride_normed,
    eps,
    HAS_RESIDUAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_e = tl.arange(0, BLOCK_E)
    inside = (row < num_rows)[:, None] & (offs_e < SIZE)[None, :]
    offsets = row.to(tl.int64)[:, None]
    columns = offs_e[None, :]
    x = tl.load(x_ptr + offsets * stride_x + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_E]
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + offsets * stride_residual + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(x, total_ptr.dtype.element_ty, UPCAST)
        tl.store(total_ptr + offsets * SIZE + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)
    tl.store(rstd_ptr + row, rstd, mask=row < num_rows)
    weight = tl.load(weight_ptr + offs_e, mask=offs_e < SIZE, other=0.0).to(tl.float32)
    normed = narrow(x * rstd[:, None] * weight[None, :], normed_ptr.dtype.element_ty, UPCAST)
    tl.store(normed_ptr + offsets * stride_normed + columns, normed, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _norm_bwd_kernel(
    grad_normed_ptr,
    grad_total_ptr,
    total_ptr,
    weight_ptr,
    rstd_ptr,
    grad_x_ptr,
    partials_ptr,
    num_rows,
    stride_grad_normed,
    stride_grad_total,
    stride_total,
    HAS_GRAD_TOTAL: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    offs_e = tl.arange(0, BLOCK_E)
    columns = offs_e[None, :]
    weight = tl.load(weight_ptr + offs_e, mask=offs_e < SIZE, other=0.0).to(tl.float32)
    grad_weight = tl.zeros([BLOCK_E], tl.float32)
    for begin in tl.range(tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS):
        row = begin + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (offs_e < SIZE)[None, :]
        offsets = row.to(tl.int64)[:, None]
        x = tl.load(total_ptr + offsets * stride_total + columns, mask=inside, other=0.0).to(tl.float32)
        grad = tl.load(grad_normed_ptr + offsets * stride_grad_normed + columns, mask=inside, other=0.0)
        grad = grad.to(tl.float32)  # [ROWS, BLOCK_E]
        rstd = tl.load(rstd_ptr + row, mask=row < num_rows, other=0.0)
        x *= rstd[:, None]
        if NEEDS_WEIGHT:
            grad_weight += tl.sum(grad * x, axis=0)
        grad *= weight[None, :]
        # d(x r) = r (g - y (y . g) / E) for the normalised row y = x r
        along = tl.sum(x * grad, axis=1) / SIZE
        grad = rstd[:, None] * (grad - x * along[:, None])
        if HAS_GRAD_TOTAL:
            grad += tl.load(grad_total_ptr + offsets * stride_grad_total + columns, mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(grad_x_ptr + offsets * SIZE + columns, narrow(grad, grad_x_ptr.dtype.element_ty, UPCAST), mask=inside)
    if NEEDS_WEIGHT:
        tl.store(partials_ptr + tl.program_id(0) * SIZE + offs_e, grad_weight, mask=offs_e < SIZE)


def _tile(size: int, dtype: torch.dtype, elements: int) -> dict:
    """Rows at once that hold about `elements`, such that nothing spills, from the size alone."""
    block = triton.next_power_of_2(size)
    return {
        "SIZE": size,
        "BLOCK_E": block,
        "ROWS": max(1, min(32, elements // block)),
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "num_warps": 16 if block > 4096 else 8 if block > 2048 else 4,
    }


def _contiguous_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.library.custom_op("bivec::rms_norm", mutates_args=())
def norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, room: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum (T, E), empty without a residual; the normed rows (T, E) with `room` columns of memory behind each;
    float32 1 / rms (T, 1)."""
    num_rows, size = x.shape
    total, normed, rstd = _forward_outputs(x, residual, room)
    if x.numel() == 0:
        return total, normed, rstd
    x = _contiguous_rows(x)
    added = x if residual is None else _contiguous_rows(residual)
    tile = _tile(size, x.dtype, 4096)
    with torch.cuda.device_of(x):
        _norm_fwd_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
            x_ptr=x,
            residual_ptr=added,
            weight_ptr=weight.contiguous(),
            total_ptr=total,
            normed_ptr=normed,
            rstd_ptr=rstd,
            num_rows=num_rows,
            stride_x=x.stride(0),
            stride_residual=added.stride(0),
            stride_normed=normed.stride(0),
            eps=eps,
            HAS_RESIDUAL=residual is not None,
            **tile,
        )
    return total, normed, rstd


def _forward_outputs(x: Tensor, residual: Tensor | None, room: int) -> tuple[Tensor, Tensor, Tensor]:
    total = x.new_empty(0 if residual is None else x.shape)
    return total, empty_with_room(x, x.shape, room), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@norm_forward.register_fake
def _(x, residual, weight, eps, room=0):
    return _forward_outputs(x, residual, room)


@torch.library.custom_op("bivec::rms_norm_backward", mutates_args=())
def norm_backward(
    grad_normed: Tensor, grad_total: Tensor | None, total: Tensor, weight: Tensor, rstd: Tensor, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of the sum (T, E), and of the weight (E,) in float32, empty unless needed."""
    num_rows, size = total.shape
    grad_x, grad_weight = _backward_outputs(total, needs_weight)
    if total.numel() == 0:
        return grad_x, grad_weight.zero_()
    total, grad_normed = _contiguous_rows(total), _contiguous_rows(grad_normed)
    added = total if grad_total is None else _contiguous_rows(grad_total)
    tile = _tile(size, total.dtype, 2048)
    num_programs = min(triton.cdiv(num_rows, tile["ROWS"]), MAX_PROGRAMS)
    partials = total.new_empty((num_programs if needs_weight else 0, size), dtype=torch.float32)
    with torch.cuda.device_of(total):
        _norm_bwd_kernel[(num_programs,)](
            grad_normed_ptr=grad_normed,
            grad_total_ptr=added,
            total_ptr=total,
            weight_ptr=weight.contiguous(),
            rstd_ptr=rstd,
            grad_x_ptr=grad_x,
            partials_ptr=partials,
            num_rows=num_rows,
            stride_grad_normed=grad_normed.stride(0),
            stride_grad_total=added.stride(0),
            stride_total=total.stride(0),
            HAS_GRAD_TOTAL=grad_total is not None,
            NEEDS_WEIGHT=needs_weight,
            **tile,
        )
    return grad_x, partials.sum(0) if needs_weight else grad_weight


def _backward_outputs(total: Tensor, needs_weight: bool) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), total.new_empty(total.shape[1] if needs_weight else 0, dtype=torch.float32)


@norm_backward.register_fake
def _(grad_normed, grad_total, total, weight, rstd, needs_weight):
    return _backward_outputs(total, needs_weight)
