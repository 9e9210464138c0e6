"""Attention over packed sequences, forward: softmax(q kᵀ · scale + mask) v within each sequence, never stored whole.

`T` packed tokens, `S` sequences, `H` query heads, `G` key/value heads, `D` head dimension. The softmax runs tile by
tile with a running maximum (Milakov and Gimelshein, 2018; FlashAttention, Dao et al., 2022), in base 2 because the
hardware's exponential is. A program takes BLOCK_M queries of one head of a long sequence; short sequences are in
attention_short.py.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ragged import load_rows, matmul, narrow, store_rows
from .masks import AttentionMask, drop_tile, load_probability, load_seed, visible_tile
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

    # keys that any query of this tile may see
    begin_n = 0
    end_n = length
    if HAS_WINDOW:
        begin_n = tl.maximum(start_m - window_left, 0) // BLOCK_N * BLOCK_N
        end_n = tl.minimum(length, start_m + BLOCK_M + window_right)
    # without a mask only the last, ragged tile looks at its key numbers
    full_n = begin_n if HAS_WINDOW or HAS_FUTURE else length // BLOCK_N * BLOCK_N

    q_ptrs = q_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_qt + offs_d[None, :]
    q = load_rows(q_ptrs, length - start_m, BLOCK_M, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for masked in tl.static_range(2):
        for start_n in tl.range(full_n if masked else begin_n, end_n if masked else full_n, BLOCK_N):
            num_keys = length - start_n if masked else BLOCK_N
            k_ptrs = k_ptr + (first_row + start_n) * stride_kt + k_offsets
            k = load_rows(k_ptrs, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            scores = matmul(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST) * softmax_scale_log2
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
            tile_max = tl.maximum(row_max, tl.max(scores, axis=1))
            # a row that has not seen a key yet must not compute -inf - -inf
            offset = tl.where(tile_max == float("-inf"), 0.0, tile_max) if HAS_WINDOW or HAS_FUTURE else tile_max
            probabilities = tl.exp2(scores - offset[:, None])  # [BLOCK_M, BLOCK_N]
            correction = tl.exp2(row_max - offset)
            row_sum = row_sum * correction + tl.sum(probabilities, axis=1)
            if HAS_DROPOUT:
                heads = tl.zeros([BLOCK_M], tl.int32) + head
                probabilities = drop_tile(probabilities, offs_m, heads, start_n, seed, dropout_p, BLOCK_N, False)
            v_ptrs = v_ptr + (first_row + start_n) * stride_vt + v_offsets
            v = load_rows(v_ptrs, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
            accumulator = matmul(narrow(probabilities, v.dtype, UPCAST), v, accumulator * correction[:, None], UPCAST)
            row_max = tile_max

    kept = row_sum * (1.0 - dropout_p) if HAS_DROPOUT else row_sum
    out_ptr += (first_row + start_m) * stride_ot
    out_ptrs = out_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_ot + offs_d[None, :]
    store_rows(out_ptrs, accumulator / kept[:, None], length - start_m, BLOCK_M, HEAD_DIM, BLOCK_D, UPCAST)
    tl.store(lse_ptr + first_row + offs_m, row_max + tl.log2(row_sum), mask=offs_m < length)


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
        softmax_scale_log2=softmax_scale * LOG2_E,
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
