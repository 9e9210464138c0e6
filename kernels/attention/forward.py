"""Attention over packed sequences, forward: softmax(q kᵀ · scale + mask) v within each sequence, never stored whole.

`T` packed tokens, `S` sequences, `H` query heads, `G` key/value heads, `D` head dimension. The softmax runs tile by
tile with a running maximum (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022), in base 2 because the
hardware's exponential is. A program takes BLOCK_M queries of one head of a long sequence; short sequences are in
short.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ragged import load_rows, matmul, narrow, store_rows
from .masks import AttentionMask, drop_tile, load_probability, load_seed, visible_range, visible_tile
from .tile_list import load_tile, over_tiles, zero_rows
from .tiles import AttentionTiles

LOG2_E = 1.4426950408889634


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "window_left", "window_right"])
def _attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    tile_list_ptr,
    num_tokens,
    num_heads,
    softmax_scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    seeds_ptr,
    window_left,
    window_right,
    dropout_p,
    future_p,
    HAS_WINDOW: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HAS_FUTURE: tl.constexpr,
    FUTURE_ON_DEVICE: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SHORT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NEGATIVE_SCALE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    head, sequence, start, length, start_m = load_tile(tile_list_ptr, num_heads, BLOCK_M, TILE_ROWS)
    out_ptr += head.to(tl.int64) * stride_oh
    lse_ptr += head.to(tl.int64) * num_tokens
    offs_m = start_m + tl.arange(0, BLOCK_M)
    if sequence < 0:
        zero_rows(out_ptr, stride_ot, start, length, start_m, BLOCK_M, HEAD_DIM, BLOCK_D)
        tl.store(lse_ptr + start + offs_m, tl.zeros([BLOCK_M], tl.float32), mask=offs_m < length)
        return
    if length <= SHORT or start_m >= length:
        return

    offs_d = tl.arange(0, BLOCK_D)
    seed = load_seed(seeds_ptr, sequence, HAS_DROPOUT, HAS_FUTURE)
    shown = load_probability(future_p, FUTURE_ON_DEVICE)
    first_row = start.to(tl.int64)
    kv_head = (head // GROUP_SIZE).to(tl.int64)
    q_ptr += head.to(tl.int64) * stride_qh + (first_row + start_m) * stride_qt
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    k_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_kt + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    v_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_vt + offs_d[None, :]

    begin_n, end_n, full_begin, full_end = visible_range(
        start_m, length, window_left, window_right, BLOCK_M, BLOCK_N, HAS_WINDOW, HAS_FUTURE, False
    )
    num_full = full_end - full_begin
    q_ptrs = q_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_qt + offs_d[None, :]
    q = load_rows(q_ptrs, length - start_m, BLOCK_M, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    # first the keys that every query sees, then those on both sides of them, with a mask
    for masked in tl.static_range(2):
        k_ptrs = k_ptr + (first_row + full_begin) * stride_kt + k_offsets
        v_ptrs = v_ptr + (first_row + full_begin) * stride_vt + v_offsets
        for block_n in tl.range(begin_n if masked else full_begin, end_n - num_full if masked else full_end, BLOCK_N):
            start_n = block_n
            num_keys = BLOCK_N
            if masked:
                start_n += tl.where(block_n >= full_begin, num_full, 0)
                num_keys = length - start_n
                k_ptrs = k_ptr + (first_row + start_n) * stride_kt + k_offsets
                v_ptrs = v_ptr + (first_row + start_n) * stride_vt + v_offsets
            k = load_rows(k_ptrs, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            scores = matmul(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
            if NEGATIVE_SCALE:
                scores = -scores
            if masked:
                visible = visible_tile(
                    offs_m,
                    start_n,
                    length,
                    seed,
                    window_left,
                    window_right,
                    shown,
                    BLOCK_N,
                    False,
                    HAS_WINDOW,
                    HAS_FUTURE,
                )
                scores = tl.where(visible, scores, float("-inf"))
            # the maximum is of the plain products; the scale is multiplied in under the exponential
            tile_max = tl.maximum(row_max, tl.max(scores, axis=1))
            offset = tile_max * softmax_scale_log2
            if masked and (HAS_WINDOW or HAS_FUTURE):  # a row that has not seen a key yet must not compute -inf - -inf
                offset = tl.where(tile_max == float("-inf"), 0.0, offset)
            probabilities = tl.exp2(tl.fma(scores, softmax_scale_log2, -offset[:, None]))  # [BLOCK_M, BLOCK_N]
            correction = tl.exp2(tl.fma(row_max, softmax_scale_log2, -offset))
            row_sum = row_sum * correction + tl.sum(probabilities, axis=1)
            if HAS_DROPOUT:
                heads = tl.zeros([BLOCK_M], tl.int32) + head
                probabilities = drop_tile(probabilities, offs_m, heads, start_n, seed, dropout_p, BLOCK_N, False)
            v = load_rows(v_ptrs, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            accumulator = matmul(narrow(probabilities, v.dtype, UPCAST), v, accumulator * correction[:, None], UPCAST)
            row_max = tile_max
            k_ptrs += BLOCK_N * stride_kt
            v_ptrs += BLOCK_N * stride_vt

    normalizer = 1.0 / (row_sum * (1.0 - dropout_p) if HAS_DROPOUT else row_sum)
    out_ptr += (first_row + start_m) * stride_ot
    out_ptrs = out_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_ot + offs_d[None, :]
    store_rows(out_ptrs, accumulator * normalizer[:, None], length - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, UPCAST)
    tl.store(lse_ptr + first_row + offs_m, row_max * softmax_scale_log2 + tl.log2(row_sum), mask=offs_m < length)


def scale_arguments(softmax_scale: float) -> dict:
    """The scale, base 2, of kernels that take a maximum before it: its sign apart, and not zero times -inf."""
    return {
        "softmax_scale_log2": max(abs(softmax_scale) * LOG2_E, 2.0**-126),  # the smallest normal float32
        "NEGATIVE_SCALE": softmax_scale < 0,
    }


def attention_forward_long(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    num_sequences: int,
    tile_list: Tensor,
    softmax_scale: float,
    mask: AttentionMask,
    tiles: AttentionTiles,
) -> None:
    """Write `out` (T, H, D) and `lse` (H, T), base 2, of sequences above `tiles.short` tokens and of the tail."""
    num_tokens = q.shape[0]
    tile = tiles.forward
    grid, work = over_tiles(tile_list, num_tokens, num_sequences, tiles.short, q.shape[1], tile.block_m)
    _attention_fwd_kernel[grid](
        **work,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        num_tokens=num_tokens,
        **scale_arguments(softmax_scale),
        stride_qt=q.stride(0),
        stride_qh=q.stride(1),
        stride_kt=k.stride(0),
        stride_kh=k.stride(1),
        stride_vt=v.stride(0),
        stride_vh=v.stride(1),
        stride_ot=out.stride(0),
        stride_oh=out.stride(1),
        **mask.arguments(),
        **tiles.shape_arguments(q, k),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
