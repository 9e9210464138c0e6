"""Attention over packed sequences as a differentiable torch operator: `varlen_attention`, of any mask a window
describes.

    scores = q @ k.T * softmax_scale                    # for every sequence and head
    output = softmax(where(visible, scores, -inf)) @ v

`reference.py` says the same in eager PyTorch. `T` packed tokens (a slab's capacity), `S` sequences (likewise), `H`
query heads, `G` key/value heads, `D` head dimension. The launch depends on these alone: no length is read back, so a
call can be captured in a CUDA graph, and a sequence's result depends on nothing but itself.
"""

import torch
from torch import Tensor

from .attention_arguments import check_chances, check_scale, check_seeds, check_tensors, check_window
from .attention_backward import attention_backward_long
from .attention_forward import attention_forward_long
from .attention_masks import AttentionMask
from .attention_short import attention_backward_short, attention_forward_short
from .attention_tiles import attention_tiles
from .checks import describe
from .ragged import INTERPRETED


@torch.library.custom_op("bivec::varlen_attention", mutates_args=())
def _attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    dropout_p: float,
    future_p: float,
    future_p_tensor: Tensor | None,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output (T, H, D) and the base-2 log-sum-exp of the scaled scores (H, T)."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)
    if cu_seqlens.shape[0] == 1 or out.numel() == 0:
        return out.zero_(), lse.zero_()
    mask = AttentionMask(window_left, window_right, dropout_p, future_p, future_p_tensor, seeds)
    tiles = attention_tiles(q.shape[2], q.dtype, q.device, mask)
    with torch.cuda.device_of(q):
        attention_forward_long(q, k, v, out, lse, cu_seqlens, softmax_scale, mask, tiles)
        attention_forward_short(q, k, v, out, lse, cu_seqlens, softmax_scale, mask, tiles)
    return out, lse


@_attention_forward.register_fake
def _(q, k, v, cu_seqlens, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("bivec::varlen_attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    window_left: int,
    window_right: int,
    softmax_scale: float,
    dropout_p: float,
    future_p: float,
    future_p_tensor: Tensor | None,
    seeds: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if cu_seqlens.shape[0] == 1 or out.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    if grad_out.stride(2) != 1:  # an expanded gradient, as from a sum
        grad_out = grad_out.contiguous()
    mask = AttentionMask(window_left, window_right, dropout_p, future_p, future_p_tensor, seeds)
    tiles = attention_tiles(q.shape[2], q.dtype, q.device, mask)
    delta = torch.empty_like(lse)
    gradients = (grad_q, grad_k, grad_v)
    with torch.cuda.device_of(q):
        attention_backward_long(q, k, v, out, lse, grad_out, *gradients, delta, cu_seqlens, softmax_scale, mask, tiles)
        attention_backward_short(q, k, v, grad_out, *gradients, cu_seqlens, softmax_scale, mask, tiles)
    return gradients


@_attention_backward.register_fake
def _(grad_out, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens, *numbers, future_p_tensor, seeds = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, future_p_tensor, seeds)
    ctx.numbers = numbers
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad_out, _):
    q, k, v, out, lse, cu_seqlens, future_p_tensor, seeds = ctx.saved_tensors
    gradients = _attention_backward(grad_out, q, k, v, out, lse, cu_seqlens, *ctx.numbers, future_p_tensor, seeds)
    return *gradients, None, None, None, None, None, None, None, None


_attention_forward.register_autograd(_backward, setup_context=_save_for_backward)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    future_p: float | Tensor = 1.0,
    seeds: Tensor | None = None,
) -> Tensor:
    """Attention within each packed sequence; (T, H, D), (T, G, D), (T, G, D) -> (T, H, D).

    q, k, v          bfloat16, float16 or float32 (multiplied as float32, never tf32); G divides H, D is 16 to 256; the
                     last dimension contiguous, the others strided at will: slices of a fused projection need no copy
    cu_seqlens       int32 (S + 1,), from 0 up, on the device. Rows at and beyond `cu_seqlens[-1]` are written as
                     zero, in the output and in every gradient
    max_seqlen       taken for flash-attention's signature; nothing is computed from it
    window_size      a query sees keys from `left` before to `right` after it, -1 for no bound: (-1, -1) is
                     bidirectional, (-1, 0) causal
    softmax_scale    default D ** -0.5
    dropout_p        in [0, 1): probabilities are dropped with this chance, the others scaled by 1 / (1 - dropout_p)
    future_p         in [0, 1]: each key ahead of its query is shown with this chance, the same to all heads. A
                     float32 tensor of one element on the device may stand for it, so that a captured graph can anneal
    seeds            int64 (S,) on the device, needed by the last two: the mask of a sequence is Philox 4x32-10 keyed by
                     its seed, on local positions

    Raises ValueError for arguments that break these rules, and for CPU tensors, which only Triton's interpreter takes
    (TRITON_INTERPRET=1 before triton is imported).
    """
    _check_kernel_limits(q)
    check_tensors(q, k, v, cu_seqlens)
    _check_strides(q, k, v)
    left, right = check_window(window_size)
    if not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be a number of tokens, got {max_seqlen!r}")
    future_p_tensor = None
    if isinstance(future_p, Tensor):
        if future_p.numel() != 1 or future_p.dtype != torch.float32 or future_p.device != q.device:
            raise ValueError(
                f"future_p must be a number or one float32 element on {q.device}, "
                f"got {describe(future_p)} on {future_p.device}"
            )
        future_p, future_p_tensor = 1.0, future_p
    check_chances(dropout_p, future_p)
    random = dropout_p > 0.0 or future_p < 1.0 or future_p_tensor is not None
    check_seeds(seeds, random, cu_seqlens)
    scale = check_scale(softmax_scale, q.shape[2])
    if q.device.type != "cuda" and not (q.device.type == "cpu" and INTERPRETED):
        raise ValueError(
            f"q must be on a CUDA device, got {q.device}; on a CPU use bivec.kernels.reference.varlen_attention or "
            "torch's scaled_dot_product_attention or, to test the kernel, set TRITON_INTERPRET=1 before triton loads"
        )
    out, _ = _attention_forward(
        q,
        k,
        v,
        cu_seqlens,
        left,
        right,
        scale,
        float(dropout_p),
        float(future_p),
        future_p_tensor,
        seeds if random else None,
    )
    return out


def _check_kernel_limits(q: Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q must be bfloat16, float16 or float32, got {describe(q)}")
    if q.dim() == 3 and not 16 <= q.shape[2] <= 256:
        raise ValueError(f"q must have a head dimension of 16 to 256, got {q.shape[2]}")


def _check_strides(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
