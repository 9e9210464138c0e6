"""Rotary embedding on the GPU: a program turns all query and key heads of a few tokens, so angles are read once.

`T` packed tokens, `H` query heads, `G` key heads, `D` head dimension.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, narrow


@triton.jit
def _turn_heads(
    heads_ptr,
    out_ptr,
    tokens,
    num_tokens,
    stride_t,
    stride_h,
    cos,
    sin,
    NUM_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    inside = (tokens < num_tokens)[:, None] & (offs_d < HALF)[None, :]
    offsets = tokens.to(tl.int64)[:, None]
    for head in tl.range(0, NUM_HEADS):
        ptrs = heads_ptr + offsets * stride_t + head * stride_h + offs_d[None, :]
        first = tl.load(ptrs, mask=inside, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
        second = tl.load(ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
        ptrs = out_ptr + (offsets * NUM_HEADS + head) * (2 * HALF) + offs_d[None, :]
        dtype = out_ptr.dtype.element_ty
        tl.store(ptrs, narrow(first * cos - second * sin, dtype, UPCAST), mask=inside)
        tl.store(ptrs + HALF, narrow(second * cos + first * sin, dtype, UPCAST), mask=inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _rotary_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    num_tokens,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    NUM_QUERY_HEADS: tl.constexpr,
    NUM_KEY_HEADS: tl.constexpr,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tokens = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    offs_d = tl.arange(0, BLOCK_D)
    inside = (tokens < num_tokens)[:, None] & (offs_d < HALF)[None, :]
    offsets = tokens.to(tl.int64)[:, None] * HALF + offs_d[None, :]
    cos = tl.load(cos_ptr + offsets, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + offsets, mask=inside, other=0.0)
    if INVERSE:
        sin = -sin
    _turn_heads(
        query_ptr,
        query_out_ptr,
        tokens,
        num_tokens,
        stride_qt,
        stride_qh,
        cos,
        sin,
        NUM_QUERY_HEADS,
        HALF,
        BLOCK_D,
        UPCAST,
    )
    _turn_heads(
        key_ptr, key_out_ptr, tokens, num_tokens, stride_kt, stride_kh, cos, sin, NUM_KEY_HEADS, HALF, BLOCK_D, UPCAST
    )


@torch.library.custom_op("bivec::rotary", mutates_args=())
def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles, by the opposite ones where `inverse`."""
    num_tokens, num_heads, head_dim = query.shape
    outputs = query.new_empty(query.shape), key.new_empty(key.shape)
    if num_tokens == 0 or head_dim == 0:
        return outputs
    query, key = (heads if heads.stride(2) == 1 else heads.contiguous() for heads in (query, key))
    block_d = triton.next_power_of_2(head_dim // 2)
    num_rows = max(1, 512 // block_d)
    with torch.cuda.device_of(query):
        _rotary_kernel[(triton.cdiv(num_tokens, num_rows),)](
            query_ptr=query,
            key_ptr=key,
            cos_ptr=cos.contiguous(),
            sin_ptr=sin.contiguous(),
            query_out_ptr=outputs[0],
            key_out_ptr=outputs[1],
            num_tokens=num_tokens,
            stride_qt=query.stride(0),
            stride_qh=query.stride(1),
            stride_kt=key.stride(0),
            stride_kh=key.stride(1),
            NUM_QUERY_HEADS=num_heads,
            NUM_KEY_HEADS=key.shape[1],
            INVERSE=inverse,
            HALF=head_dim // 2,
            BLOCK_D=block_d,
            ROWS=num_rows,
            UPCAST=INTERPRETED and query.dtype == torch.bfloat16,
            num_warps=4,
        )
    return outputs


@rotate.register_fake
def _(query, key, cos, sin, inverse):
    return query.new_empty(query.shape), key.new_empty(key.shape)
