"""Attention over packed sequences, backward, for sequences that span tiles; short ones are in short.py.

`T` packed tokens, `S` sequences, `H` query heads, `G` key/value heads, `D` head dimension. With P = softmax(S), `dV =
Pᵀ dO`, `dS = P ∘ (dO Vᵀ - delta)` where `delta = rowsum(dO ∘ O)`, `dQ = dS K` and `dK = dSᵀ Q` (FlashAttention-2, Dao,
2023). Two kernels recompute P from the saved log-sum-exp: one owns queries and writes dQ and delta, one owns keys and
writes dK and dV over all query heads of their group. Nothing is added atomically, so the result is the same every
time. The second computes Sᵀ = K Qᵀ as such, from operands in memory: Triton 3.4 to 3.7.0 multiplies a transposed
matrix product wrongly on Hopper.
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
def _attention_bwd_dq_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    grad_out_ptr,
    grad_q_ptr,
    lse_ptr,
    delta_ptr,
    tile_list_ptr,
    num_tokens,
    num_heads,
    softmax_scale,
    softmax_scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_dot,
    stride_doh,
    stride_dqt,
    stride_dqh,
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
    grad_q_ptr += head.to(tl.int64) * stride_dqh
    if sequence < 0:
        zero_rows(grad_q_ptr, stride_dqt, start, length, start_m, BLOCK_M, HEAD_DIM, BLOCK_D)
        return
    if length <= SHORT or start_m >= length:
        return

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    seed = load_seed(seeds_ptr, sequence, HAS_DROPOUT, HAS_FUTURE)
    shown = load_probability(future_p, FUTURE_ON_DEVICE)
    first_row = start.to(tl.int64)
    kv_head = (head // GROUP_SIZE).to(tl.int64)
    q_ptr += head.to(tl.int64) * stride_qh + (first_row + start_m) * stride_qt
    out_ptr += head.to(tl.int64) * stride_oh + (first_row + start_m) * stride_ot
    grad_out_ptr += head.to(tl.int64) * stride_doh + (first_row + start_m) * stride_dot
    row_stats = head.to(tl.int64) * num_tokens + first_row
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh

    rows = tl.arange(0, BLOCK_M)[:, None]
    num_rows = length - start_m
    q = load_rows(q_ptr + rows * stride_qt + offs_d[None, :], num_rows, BLOCK_M, HEAD_DIM, BLOCK_D)
    out = load_rows(out_ptr + rows * stride_ot + offs_d[None, :], num_rows, BLOCK_M, HEAD_DIM, BLOCK_D)
    grad_out = load_rows(grad_out_ptr + rows * stride_dot + offs_d[None, :], num_rows, BLOCK_M, HEAD_DIM, BLOCK_D)
    lse = tl.load(lse_ptr + row_stats + offs_m, mask=offs_m < length, other=0.0)  # [BLOCK_M]
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), axis=1)  # [BLOCK_M]
    tl.store(delta_ptr + row_stats + offs_m, delta, mask=offs_m < length)

    begin_n, end_n, full_begin, full_end = visible_range(
        start_m, length, window_left, window_right, BLOCK_M, BLOCK_N, HAS_WINDOW, HAS_FUTURE, False
    )
    num_full = full_end - full_begin
    k_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_kt + offs_d[None, :]  # [BLOCK_N, BLOCK_D]
    v_offsets = tl.arange(0, BLOCK_N)[:, None] * stride_vt + offs_d[None, :]
    heads = tl.zeros([BLOCK_M], tl.int32) + head
    keep_scale = 1.0 / (1.0 - dropout_p)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
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
            v = load_rows(v_ptrs, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
            scores = matmul(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
            probabilities = tl.exp2(tl.fma(scores, softmax_scale_log2, -lse[:, None]))  # [BLOCK_M, BLOCK_N]
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
                probabilities = tl.where(visible, probabilities, 0.0)
            grad_p = matmul(grad_out, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
            if HAS_DROPOUT:
                grad_p = drop_tile(grad_p * keep_scale, offs_m, heads, start_n, seed, dropout_p, BLOCK_N, False)
            grad_s = probabilities * (grad_p - delta[:, None])
            grad_q = matmul(narrow(grad_s, k.dtype, UPCAST), k, grad_q, UPCAST)
            k_ptrs += BLOCK_N * stride_kt
            v_ptrs += BLOCK_N * stride_vt

    grad_q_ptr += (first_row + start_m) * stride_dqt
    grad_q_ptrs = grad_q_ptr + rows * stride_dqt + offs_d[None, :]
    store_rows(grad_q_ptrs, grad_q * softmax_scale, num_rows, BLOCK_M, HEAD_DIM, BLOCK_D, UPCAST)


@triton.jit(do_not_specialize=["num_tokens", "num_heads", "window_left", "window_right"])
def _attention_bwd_dkv_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    grad_k_ptr,
    grad_v_ptr,
    lse_ptr,
    delta_ptr,
    tile_list_ptr,
    num_tokens,
    num_heads,
    softmax_scale,
    softmax_scale_log2,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_dot,
    stride_doh,
    stride_dkt,
    stride_dkh,
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
    kv_head, sequence, start, length, start_n = load_tile(tile_list_ptr, num_heads, BLOCK_N, TILE_ROWS)
    grad_head = kv_head.to(tl.int64) * stride_dkh
    if sequence < 0:
        zero_rows(grad_k_ptr + grad_head, stride_dkt, start, length, start_n, BLOCK_N, HEAD_DIM, BLOCK_D)
        zero_rows(grad_v_ptr + grad_head, stride_dkt, start, length, start_n, BLOCK_N, HEAD_DIM, BLOCK_D)
        return
    if length <= SHORT or start_n >= length:
        return

    offs_d = tl.arange(0, BLOCK_D)
    seed = load_seed(seeds_ptr, sequence, HAS_DROPOUT, HAS_FUTURE)
    shown = load_probability(future_p, FUTURE_ON_DEVICE)
    first_row = start.to(tl.int64)
    k_ptr += kv_head.to(tl.int64) * stride_kh + (first_row + start_n) * stride_kt
    v_ptr += kv_head.to(tl.int64) * stride_vh + (first_row + start_n) * stride_vt
    keys = tl.arange(0, BLOCK_N)[:, None]
    num_keys = length - start_n
    k = load_rows(k_ptr + keys * stride_kt + offs_d[None, :], num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)
    v = load_rows(v_ptr + keys * stride_vt + offs_d[None, :], num_keys, BLOCK_N, HEAD_DIM, BLOCK_D)

    begin_m, end_m, full_begin, full_end = visible_range(
        start_n, length, window_right, window_left, BLOCK_N, BLOCK_M, HAS_WINDOW, HAS_FUTURE, True
    )
    num_full = (full_end - full_begin) // BLOCK_M
    num_masked = tl.cdiv(end_m - begin_m, BLOCK_M) - num_full
    q_offsets = tl.arange(0, BLOCK_M)[:, None] * stride_qt + offs_d[None, :]  # [BLOCK_M, BLOCK_D]
    do_offsets = tl.arange(0, BLOCK_M)[:, None] * stride_dot + offs_d[None, :]
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    keep_scale = 1.0 / (1.0 - dropout_p)
    q_ptr += (kv_head * GROUP_SIZE).to(tl.int64) * stride_qh
    grad_out_ptr += (kv_head * GROUP_SIZE).to(tl.int64) * stride_doh
    first_stats = (kv_head * GROUP_SIZE).to(tl.int64) * num_tokens + first_row
    # queries that see every key here, and the others, with a mask; beyond the sequence they are zero and add nothing
    # registers of what runs second are held through the first: without a window the ragged end goes first
    first: tl.constexpr = 0 if HAS_WINDOW or HAS_FUTURE else 1
    for masked in tl.static_range(first, 2 - 3 * first, 1 - 2 * first):
        q_tile_ptr = q_ptr + (first_row + full_begin) * stride_qt
        do_tile_ptr = grad_out_ptr + (first_row + full_begin) * stride_dot
        stats = first_stats + full_begin
        # the heads of a group follow each other on the same queries, so that one loop runs without a break
        for step in tl.range(0, GROUP_SIZE * (num_masked if masked else num_full)):
            head_in_group = step % GROUP_SIZE
            start_m = step // GROUP_SIZE * BLOCK_M
            if masked:
                start_m += begin_m
                start_m += tl.where(start_m >= full_begin, num_full * BLOCK_M, 0)
                head_offset = head_in_group.to(tl.int64)
                q_tile_ptr = q_ptr + head_offset * stride_qh + (first_row + start_m) * stride_qt
                do_tile_ptr = grad_out_ptr + head_offset * stride_doh + (first_row + start_m) * stride_dot
                stats = first_stats + head_offset * num_tokens + start_m
            else:
                start_m += full_begin
            num_rows = length - start_m if masked else BLOCK_M
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q = load_rows(q_tile_ptr + q_offsets, num_rows, BLOCK_M, HEAD_DIM, BLOCK_D)  # [BLOCK_M, BLOCK_D]
            grad_out = load_rows(do_tile_ptr + do_offsets, num_rows, BLOCK_M, HEAD_DIM, BLOCK_D)
            grad_p_t = matmul(v, tl.trans(grad_out), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
            scores_t = matmul(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
            lse = tl.load(
                lse_ptr + stats + tl.arange(0, BLOCK_M), mask=offs_m < length if masked else None
            )  # [BLOCK_M]
            probabilities_t = tl.exp2(tl.fma(scores_t, softmax_scale_log2, (lse * -1.0)[None, :]))  # [BLOCK_N, BLOCK_M]
            if masked and (HAS_WINDOW or HAS_FUTURE):
                visible = visible_tile(
                    offs_m,
                    start_n,
                    length,
                    seed,
                    window_left,
                    window_right,
                    shown,
                    BLOCK_N,
                    True,
                    HAS_WINDOW,
                    HAS_FUTURE,
                )
                probabilities_t = tl.where(visible, probabilities_t, 0.0)
            kept_t = probabilities_t
            if HAS_DROPOUT:
                heads = tl.zeros([BLOCK_M], tl.int32) + kv_head * GROUP_SIZE + head_in_group
                kept_t = drop_tile(kept_t, offs_m, heads, start_n, seed, dropout_p, BLOCK_N, True)
                # one draw serves both: a probability is zero only where it was dropped or invisible
                grad_p_t = tl.where(kept_t == 0.0, 0.0, grad_p_t * keep_scale)
            delta = tl.load(delta_ptr + stats + tl.arange(0, BLOCK_M), mask=offs_m < length if masked else None)
            grad_s_t = probabilities_t * (grad_p_t - delta[None, :])
            grad_v = matmul(narrow(kept_t, q.dtype, UPCAST), grad_out, grad_v, UPCAST)
            grad_k = matmul(narrow(grad_s_t, q.dtype, UPCAST), q, grad_k, UPCAST)
            is_last = head_in_group == GROUP_SIZE - 1
            q_tile_ptr += tl.where(is_last, BLOCK_M * stride_qt - (GROUP_SIZE - 1) * stride_qh, stride_qh)
            do_tile_ptr += tl.where(is_last, BLOCK_M * stride_dot - (GROUP_SIZE - 1) * stride_doh, stride_doh)
            stats += tl.where(is_last, BLOCK_M - (GROUP_SIZE - 1) * num_tokens, num_tokens)

    if HAS_DROPOUT:
        grad_v = grad_v * keep_scale
    offsets = (
        kv_head.to(tl.int64) * stride_dkh + (first_row + start_n) * stride_dkt + keys * stride_dkt + offs_d[None, :]
    )
    store_rows(grad_k_ptr + offsets, grad_k * softmax_scale, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D, UPCAST)
    store_rows(grad_v_ptr + offsets, grad_v, num_keys, BLOCK_N, HEAD_DIM, BLOCK_D, UPCAST)


def attention_backward_long(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    delta: Tensor,
    num_sequences: int,
    tile_list: Tensor,
    softmax_scale: float,
    mask: AttentionMask,
    tiles: AttentionTiles,
) -> None:
    """Write the gradients of sequences above `tiles.short` tokens and of the unused tail; `delta` (H, T) is scratch."""
    num_tokens = q.shape[0]
    shared = dict(
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        grad_out_ptr=grad_out,
        lse_ptr=lse,
        delta_ptr=delta,
        num_tokens=num_tokens,
        softmax_scale=softmax_scale,
        softmax_scale_log2=softmax_scale * LOG2_E,
        stride_qt=q.stride(0),
        stride_qh=q.stride(1),
        stride_kt=k.stride(0),
        stride_kh=k.stride(1),
        stride_vt=v.stride(0),
        stride_vh=v.stride(1),
        stride_dot=grad_out.stride(0),
        stride_doh=grad_out.stride(1),
        **mask.arguments(),
        **tiles.shape_arguments(q, k),
    )
    tile = tiles.backward_dq
    grid, work = over_tiles(tile_list, num_tokens, num_sequences, tiles.short, q.shape[1], tile.block_m)
    _attention_bwd_dq_kernel[grid](
        **work,
        **shared,
        out_ptr=out,
        grad_q_ptr=grad_q,
        stride_ot=out.stride(0),
        stride_oh=out.stride(1),
        stride_dqt=grad_q.stride(0),
        stride_dqh=grad_q.stride(1),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    tile = tiles.backward_dkv
    grid, work = over_tiles(tile_list, num_tokens, num_sequences, tiles.short, k.shape[1], tile.block_n)
    _attention_bwd_dkv_kernel[grid](
        **work,
        **shared,
        grad_k_ptr=grad_k,
        grad_v_ptr=grad_v,
        stride_dkt=grad_k.stride(0),
        stride_dkh=grad_k.stride(1),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
