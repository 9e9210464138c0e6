"""Attention's kernels as differentiable torch operators; `varlen_attention`, which checks its arguments, calls them."""

import torch
from torch import Tensor

from .backward import attention_backward_long
from .forward import attention_forward_long
from .masks import AttentionMask
from .short import attention_backward_short, attention_forward_short
from .tiles import attention_tiles


@torch.library.custom_op("bivec::varlen_attention", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    tile_list: Tensor,
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
    num_sequences = cu_seqlens.shape[0] - 1
    if num_sequences == 0 or out.numel() == 0:
        return out.zero_(), lse.zero_()
    mask = AttentionMask(window_left, window_right, dropout_p, future_p, future_p_tensor, seeds)
    tiles = attention_tiles(q.shape[2], q.dtype, q.device, mask)
    with torch.cuda.device_of(q):
        attention_forward_long(q, k, v, out, lse, num_sequences, tile_list, softmax_scale, mask, tiles)
        attention_forward_short(q, k, v, out, lse, cu_seqlens, softmax_scale, mask, tiles)
    return out, lse


@attention_forward.register_fake
def _(q, k, v, cu_seqlens, *_):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("bivec::varlen_attention_backward", mutates_args=())
def attention_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    tile_list: Tensor,
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
    num_sequences = cu_seqlens.shape[0] - 1
    if num_sequences == 0 or out.numel() == 0:
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    if grad_out.stride(2) != 1:  # an expanded gradient, as from a sum
        grad_out = grad_out.contiguous()
    mask = AttentionMask(window_left, window_right, dropout_p, future_p, future_p_tensor, seeds)
    tiles = attention_tiles(q.shape[2], q.dtype, q.device, mask)
    delta = torch.empty_like(lse)
    gradients = (grad_q, grad_k, grad_v)
    with torch.cuda.device_of(q):
        attention_backward_long(
            q, k, v, out, lse, grad_out, *gradients, delta, num_sequences, tile_list, softmax_scale, mask, tiles
        )
        attention_backward_short(q, k, v, grad_out, *gradients, cu_seqlens, softmax_scale, mask, tiles)
    return gradients


@attention_backward.register_fake
def _(grad_out, q, k, v, *_):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx, inputs, output):
    q, k, v, cu_seqlens, tile_list, *numbers, future_p_tensor, seeds = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, cu_seqlens, tile_list, future_p_tensor, seeds)
    ctx.numbers = numbers
    ctx.mark_non_differentiable(lse)


def _backward(ctx, grad_out, _):
    q, k, v, out, lse, cu_seqlens, tile_list, future_p_tensor, seeds = ctx.saved_tensors
    inputs = (q, k, v, out, lse, cu_seqlens, tile_list)
    gradients = attention_backward(grad_out, *inputs, *ctx.numbers, future_p_tensor, seeds)
    return *gradients, None, None, None, None, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save_for_backward)
