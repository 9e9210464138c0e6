"""SwiGLU, `silu(gate) * up`, that keeps gate and up alone and computes silu again in the backward.

`reference.py` says the same. On CUDA a Triton kernel each way (`kernels.py`), on the CPU a few passes over chunks
in cache, written where the result will stand.

Source: Shazeer, arXiv 2002.05202.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import describe
from ..chunks import CHUNK_ELEMENTS, is_small


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, room: int):
        ctx.save_for_backward(gate, up)
        return _swiglu(gate, up, room)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *_swiglu_backward(grad, *ctx.saved_tensors), None


def _swiglu(gate: Tensor, up: Tensor, room: int) -> Tensor:
    if gate.is_cuda:
        from .kernels import swiglu_forward  # triton is there on Linux only

        return swiglu_forward(gate, up, room)
    return _swiglu_by_chunks(gate, up)


def _swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up."""
    if gate.is_cuda:
        from .kernels import swiglu_backward

        grad_gate, grad_up = swiglu_backward(grad, gate, up).unbind(1)
        return grad_gate.view(gate.shape), grad_up.view(gate.shape)
    return _swiglu_backward_by_chunks(grad, gate, up)


def _swiglu_by_chunks(gate: Tensor, up: Tensor) -> Tensor:
    gated = gate.new_empty(gate.shape)
    parts = (tensor.reshape(-1).split(CHUNK_ELEMENTS) for tensor in (gate, up, gated))
    for gate_part, up_part, out in zip(*parts, strict=True):
        torch.ops.aten.silu.out(gate_part, out=out).mul_(up_part)
    return gated


def _swiglu_backward_by_chunks(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    grad_gate, grad_up = gate.new_empty(gate.shape), gate.new_empty(gate.shape)
    parts = (tensor.reshape(-1).split(CHUNK_ELEMENTS) for tensor in (grad, gate, up, grad_gate, grad_up))
    for grad_part, gate_part, up_part, gate_out, up_out in zip(*parts, strict=True):
        torch.ops.aten.silu.out(gate_part, out=up_out).mul_(grad_part)
        torch.mul(grad_part, up_part, out=gate_out)
        torch.ops.aten.silu_backward.grad_input(gate_out, gate_part, grad_input=gate_out)
    return grad_gate, grad_up


def swiglu(gate: Tensor, up: Tensor, *, room: int = 0) -> Tensor:
    """`silu(gate) * up`, elementwise, in the inputs' dtype.

    On a GPU the result's rows have `room` columns of memory behind them, for what reads them to write to.
    Differentiable, once, in both. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if not gate.is_floating_point():
        raise ValueError(f"gate must be floating point, got {describe(gate)}")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(f"up must be {describe(gate)} on {gate.device} like gate, got {describe(up)} on {up.device}")
    return torch.nn.functional.silu(gate) * up if is_small(gate) else _SwiGLU.apply(gate, up, room)
