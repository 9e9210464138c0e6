"""SwiGLU on the GPU: one kernel each way, a row or a part of it to a program, float32 inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, narrow
from ..room import empty_with_room

MAX_BLOCK = 4096  # elements of a program, of one row


@triton.jit
def _load(ptr, row, stride, columns, SIZE: tl.constexpr):
    return tl.load(ptr + row * stride + columns, mask=columns < SIZE, other=0.0).to(tl.float32)


@triton.jit
def _swiglu_fwd_kernel(
    gate_ptr,
    up_ptr,
    out_ptr,
    stride_gate,
    stride_up,
    stride_out,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = _load(gate_ptr, row, stride_gate, columns, SIZE)
    up = _load(up_ptr, row, stride_up, columns, SIZE)
    out = narrow(gate * tl.sigmoid(gate) * up, out_ptr.dtype.element_ty, UPCAST)
    tl.store(out_ptr + row * stride_out + columns, out, mask=columns < SIZE)


@triton.jit
def _swiglu_bwd_kernel(
    grad_ptr,
    gate_ptr,
    up_ptr,
    grad_gate_ptr,
    grad_up_ptr,
    stride_grad,
    stride_gate,
    stride_up,
    stride_out,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    grad = _load(grad_ptr, row, stride_grad, columns, SIZE)
    gate = _load(gate_ptr, row, stride_gate, columns, SIZE)
    up = _load(up_ptr, row, stride_up, columns, SIZE)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype = grad_gate_ptr.dtype.element_ty
    offsets = row * stride_out + columns
    tl.store(grad_up_ptr + offsets, narrow(grad * silu, dtype, UPCAST), mask=columns < SIZE)
    # silu' = s + x s (1 - s)
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + offsets, narrow(grad_gate, dtype, UPCAST), mask=columns < SIZE)


def _rows(tensor: Tensor) -> Tensor:
    """(rows, size), contiguous in the last dimension."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _tile(size: int, dtype: torch.dtype) -> dict:
    return {
        "SIZE": size,
        "BLOCK": min(MAX_BLOCK, triton.next_power_of_2(size)),
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "num_warps": 8,
    }


@torch.library.custom_op("bivec::swiglu", mutates_args=())
def swiglu_forward(gate: Tensor, up: Tensor, room: int = 0) -> Tensor:
    """The result's rows have `room` columns of memory behind each."""
    out = empty_with_room(gate, gate.shape, room)
    if out.numel():
        gate, up, rows = _rows(gate), _rows(up), _rows(out)
        tile = _tile(gate.shape[1], gate.dtype)
        with torch.cuda.device_of(gate):
            _swiglu_fwd_kernel[(len(gate), triton.cdiv(tile["SIZE"], tile["BLOCK"]))](
                gate_ptr=gate,
                up_ptr=up,
                out_ptr=rows,
                stride_gate=gate.stride(0),
                stride_up=up.stride(0),
                stride_out=rows.stride(0),
                **tile,
            )
    return out


@swiglu_forward.register_fake
def _(gate, up, room=0):
    return empty_with_room(gate, gate.shape, room)


@torch.library.custom_op("bivec::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> Tensor:
    """Gradients of gate and up, side by side (rows, 2, size): a product with the weights of both is one."""
    grad, gate, up = _rows(grad), _rows(gate), _rows(up)
    both = _gradients(gate)
    if both.numel():
        tile = _tile(gate.shape[1], gate.dtype)
        with torch.cuda.device_of(gate):
            _swiglu_bwd_kernel[(len(gate), triton.cdiv(tile["SIZE"], tile["BLOCK"]))](
                grad_ptr=grad,
                gate_ptr=gate,
                up_ptr=up,
                grad_gate_ptr=both,
                grad_up_ptr=both[:, 1],
                stride_grad=grad.stride(0),
                stride_gate=gate.stride(0),
                stride_up=up.stride(0),
                stride_out=both.stride(0),
                **tile,
            )
    return both


def _gradients(gate: Tensor) -> Tensor:
    return gate.new_empty((gate.numel() // max(gate.shape[-1], 1), 2, gate.shape[-1]))


@swiglu_backward.register_fake
def _(grad, gate, up):
    return _gradients(gate)
