"""SwiGLU on the GPU: one elementwise kernel each way, float32 inside."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, narrow

BLOCK = 4096  # elements of a program


@triton.jit
def _swiglu_fwd_kernel(gate_ptr, up_ptr, out_ptr, numel, BLOCK: tl.constexpr, UPCAST: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + offsets, narrow(out, out_ptr.dtype.element_ty, UPCAST), mask=inside)


@triton.jit
def _swiglu_bwd_kernel(
    grad_ptr, gate_ptr, up_ptr, grad_gate_ptr, grad_up_ptr, numel, BLOCK: tl.constexpr, UPCAST: tl.constexpr
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    grad = tl.load(grad_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    dtype = grad_gate_ptr.dtype.element_ty
    tl.store(grad_up_ptr + offsets, narrow(grad * silu, dtype, UPCAST), mask=inside)
    # silu' = s + x s (1 - s)
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    tl.store(grad_gate_ptr + offsets, narrow(grad_gate, dtype, UPCAST), mask=inside)


@torch.library.custom_op("bivec::swiglu", mutates_args=())
def swiglu_forward(gate: Tensor, up: Tensor) -> Tensor:
    out = gate.new_empty(gate.shape)
    if out.numel():
        with torch.cuda.device_of(gate):
            _swiglu_fwd_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                gate_ptr=gate.contiguous(),
                up_ptr=up.contiguous(),
                out_ptr=out,
                numel=out.numel(),
                BLOCK=BLOCK,
                UPCAST=INTERPRETED and gate.dtype == torch.bfloat16,
                num_warps=8,
            )
    return out


@swiglu_forward.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("bivec::swiglu_backward", mutates_args=())
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    if gate.numel():
        with torch.cuda.device_of(gate):
            _swiglu_bwd_kernel[(triton.cdiv(gate.numel(), BLOCK),)](
                grad_ptr=grad.contiguous(),
                gate_ptr=gate.contiguous(),
                up_ptr=up.contiguous(),
                grad_gate_ptr=grad_gate,
                grad_up_ptr=grad_up,
                numel=gate.numel(),
                BLOCK=BLOCK,
                UPCAST=INTERPRETED and gate.dtype == torch.bfloat16,
                num_warps=8,
            )
    return grad_gate, grad_up


@swiglu_backward.register_fake
def _(grad, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)
