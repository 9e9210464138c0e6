"""Rows to float8 on the GPU, alone or as a norm or SwiGLU computes them: a program holds whole rows, in float32.

`T` rows, `E` their size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, narrow

LARGEST = tl.constexpr(448.0)  # of e4m3
LEAST = tl.constexpr(2.0**-100)  # a row's largest magnitude counts as at least this, whose reciprocal is finite


@triton.jit
def _to_e4m3(values, INTERPRETED: tl.constexpr):
    """float32 within the range of e4m3 to it, to nearest even; NaN stays NaN."""
    if INTERPRETED:  # whose own conversion is wrong at powers of two and makes numbers of NaN
        bits = values.to(tl.uint32, bitcast=True)
        sign, bits = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
        magnitude = bits.to(tl.float32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # the last bit of 2^14 in float32 is the step of numbers below 2^-6
        small = (magnitude + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0.015625, small, normal)
        code = tl.where(bits > 0x7F800000, 0x7F, code)
        return (sign | code).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return values.to(tl.float8e4nv)


@triton.jit
def _store_rows(
    values_ptr, scales_ptr, x, row, columns, inside, num_rows, SIZE: tl.constexpr, INTERPRETED: tl.constexpr
):
    """x [ROWS, BLOCK_E], zero in the columns beyond SIZE, as float8 with one scale a row.

    Divisions are IEEE's, so that a row's bits are those of the specification. NaN and infinity are NaN in the values,
    whatever the scale.
    """
    largest = tl.maximum(tl.max(tl.abs(x), axis=1), LEAST)
    tl.store(scales_ptr + row, tl.div_rn(largest, tl.full(largest.shape, LARGEST, tl.float32)), mask=row < num_rows)
    inverse = tl.div_rn(tl.full(largest.shape, LARGEST, tl.float32), largest)
    values = _to_e4m3(x * inverse[:, None], INTERPRETED)
    tl.store(values_ptr + row.to(tl.int64)[:, None] * SIZE + columns, values, mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _quantize_rows_kernel(
    x_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    stride_x,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_E)[None, :]
    inside = (row < num_rows)[:, None] & (columns < SIZE)
    x = tl.load(x_ptr + row.to(tl.int64)[:, None] * stride_x + columns, mask=inside, other=0.0).to(tl.float32)
    _store_rows(values_ptr, scales_ptr, x, row, columns, inside, num_rows, SIZE, INTERPRETED)


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_norm_kernel(
    x_ptr,
    added_ptr,
    weight_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    stride_x,
    stride_added,
    eps,
    HAS_ADDED: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_e = tl.arange(0, BLOCK_E)
    columns = offs_e[None, :]
    inside = (row < num_rows)[:, None] & (columns < SIZE)
    offsets = row.to(tl.int64)[:, None]
    x = tl.load(x_ptr + offsets * stride_x + columns, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_E]
    if HAS_ADDED:
        x += tl.load(added_ptr + offsets * stride_added + columns, mask=inside, other=0.0).to(tl.float32)
        rounded = narrow(x, x_ptr.dtype.element_ty, UPCAST)
        tl.store(x_ptr + offsets * stride_x + columns, rounded, mask=inside)
        x = rounded.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)
    weight = tl.load(weight_ptr + offs_e, mask=offs_e < SIZE, other=0.0).to(tl.float32)
    x = x * rstd[:, None] * weight[None, :]
    _store_rows(values_ptr, scales_ptr, x, row, columns, inside, num_rows, SIZE, INTERPRETED)


@triton.jit(do_not_specialize=["num_rows"])
def _quantized_swiglu_kernel(
    gate_ptr,
    up_ptr,
    values_ptr,
    scales_ptr,
    num_rows,
    stride_gate,
    stride_up,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_E)[None, :]
    inside = (row < num_rows)[:, None] & (columns < SIZE)
    offsets = row.to(tl.int64)[:, None]
    gate = tl.load(gate_ptr + offsets * stride_gate + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets * stride_up + columns, mask=inside, other=0.0).to(tl.float32)
    x = gate * tl.sigmoid(gate) * up  # [ROWS, BLOCK_E]
    _store_rows(values_ptr, scales_ptr, x, row, columns, inside, num_rows, SIZE, INTERPRETED)


def _launch(kernel, x: Tensor, **arguments) -> None:
    """Tiles depend on the size of a row alone: 32 elements a thread, or as many as 32 warps are left with."""
    num_rows, size = x.shape
    block = triton.next_power_of_2(size)
    rows = max(1, min(32, 4096 // block))
    warps = max(4, min(32, block // 1024))
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(num_rows, rows),)](
            **arguments,
            num_rows=num_rows,
            SIZE=size,
            BLOCK_E=block,
            ROWS=rows,
            UPCAST=INTERPRETED and x.dtype == torch.bfloat16,
            INTERPRETED=INTERPRETED,
            num_warps=warps,
        )


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((x.shape[0], 1), dtype=torch.float32)


def _contiguous_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


@torch.library.custom_op("bivec::quantize_rows", mutates_args=())
def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """The rows (T, E) in float8 and their scales, float32 (T, 1)."""
    values, scales = _outputs(x)
    if x.numel():
        x = _contiguous_rows(x)
        _launch(
            _quantize_rows_kernel,
            x,
            x_ptr=x,
            values_ptr=values,
            scales_ptr=scales,
            stride_x=x.stride(0),
        )
    return values, scales


@quantize.register_fake
def _(x):
    return _outputs(x)


@torch.library.custom_op("bivec::quantized_rms_norm", mutates_args=("x",))
def norm(x: Tensor, weight: Tensor, eps: float, added: Tensor | None) -> tuple[Tensor, Tensor]:
    """The normed rows (T, E) in float8 and their scales, float32 (T, 1); `added` first goes into x, in place."""
    values, scales = _outputs(x)
    if x.numel():
        added_rows = x if added is None else _contiguous_rows(added)
        _launch(
            _quantized_norm_kernel,
            x,
            x_ptr=x,
            added_ptr=added_rows,
            weight_ptr=weight.contiguous(),
            values_ptr=values,
            scales_ptr=scales,
            stride_x=x.stride(0),
            stride_added=added_rows.stride(0),
            eps=eps,
            HAS_ADDED=added is not None,
        )
    return values, scales


@norm.register_fake
def _(x, weight, eps, added):
    return _outputs(x)


@torch.library.custom_op("bivec::quantized_swiglu", mutates_args=())
def swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`silu(gate) * up` (T, E) in float8 and the rows' scales, float32 (T, 1)."""
    values, scales = _outputs(gate)
    if gate.numel():
        gate, up = _contiguous_rows(gate), _contiguous_rows(up)
        _launch(
            _quantized_swiglu_kernel,
            gate,
            gate_ptr=gate,
            up_ptr=up,
            values_ptr=values,
            scales_ptr=scales,
            stride_gate=gate.stride(0),
            stride_up=up.stride(0),
        )
    return values, scales


@swiglu.register_fake
def _(gate, up):
    return _outputs(gate)
