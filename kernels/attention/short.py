"""Attention over short sequences: one program computes a whole sequence for one key/value head, forward or backward.

`T` packed tokens, `S` sequences, `H` query heads, `G` key/value heads, `D` head dimension, `L` the sequence's length,
at most BLOCK_N. Keys and values are read once. The rows of a query tile are the `H / G * L` (query head, token) pairs
of the group in order, so that twenty tokens with four heads to a group fill a tile of 64 rows instead of a third of
one. The backward recomputes the softmax from q, k, v alone: below this length its inputs cost more to read than to
multiply.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..ragged import load_rows, matmul, narrow, store_rows
from .forward import scale_arguments
from .masks import AttentionMask, drop_tile, load_probability, load_seed, visible_tile
from .tiles import AttentionTiles


@triton.jit
def _load_pairs(ptr, offs_head, offs_m, in_group, stride_t, stride_h, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of (head, token) pairs, [BLOCK_M, BLOCK_D]; `ptr` is at the group's first head of the first token."""
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + (offs_m * stride_t + offs_head * stride_h)[:, None] + offs_d[None, :]
    return tl.load(ptrs, mask=in_group[:, None] & (offs_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _store_pairs(
    ptr,
    rows,
    offs_head,
    offs_m,
    in_group,
    stride_t,
    stride_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    offs_d = tl.arange(0, BLOCK_D)
    ptrs = ptr + (offs_m * stride_t + offs_head * stride_h)[:, None] + offs_d[None, :]
    tl.store(ptrs, narrow(rows, ptr.dtype.element_ty, UPCAST), mask=in_group[:, None] & (offs_d < HEAD_DIM)[None, :])


@triton.jit(do_not_specialize=["num_tokens", "window_left", "window_right"])
def _attention_short_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    cu_seqlens_ptr,
    num_tokens,
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
    NEGATIVE_SCALE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    if length == 0 or length > SHORT:
        return

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    seed = load_seed(seeds_ptr, sequence, HAS_DROPOUT, HAS_FUTURE)
    shown = load_probability(future_p, FUTURE_ON_DEVICE)
    first_row = start.to(tl.int64)
    first_head = kv_head * GROUP_SIZE
    q_ptr += first_row * stride_qt + first_head * stride_qh
    out_ptr += first_row * stride_ot + first_head * stride_oh
    lse_ptr += first_row + first_head * num_tokens
    k_ptrs = k_ptr + first_row * stride_kt + kv_head * stride_kh + offs_n[:, None] * stride_kt + offs_d[None, :]
    v_ptrs = v_ptr + first_row * stride_vt + kv_head * stride_vh + offs_n[:, None] * stride_vt + offs_d[None, :]
    k = load_rows(k_ptrs, length, BLOCK_N, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptrs, length, BLOCK_N, HEAD_DIM, BLOCK_D)

    for start_row in tl.range(0, GROUP_SIZE * length, BLOCK_M):
        row = start_row + tl.arange(0, BLOCK_M)
        in_group = row < GROUP_SIZE * length
        offs_head = row // length
        offs_m = row - offs_head * length
        q = _load_pairs(q_ptr, offs_head, offs_m, in_group, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
        scores = matmul(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        if NEGATIVE_SCALE:
            scores = -scores
        visible = visible_tile(
            offs_m, 0, length, seed, window_left, window_right, shown, BLOCK_N, False, HAS_WINDOW, HAS_FUTURE
        )
        scores = tl.where(visible, scores, float("-inf"))
        offset = tl.max(scores, axis=1) * softmax_scale_log2  # finite: every query sees itself
        probabilities = tl.exp2(tl.fma(scores, softmax_scale_log2, -offset[:, None]))  # [BLOCK_M, BLOCK_N]
        row_sum = tl.sum(probabilities, axis=1)
        normalizer = 1.0 / row_sum
        if HAS_DROPOUT:
            heads = (first_head + offs_head).to(tl.int32)
            probabilities = drop_tile(probabilities, offs_m, heads, 0, seed, dropout_p, BLOCK_N, False)
            normalizer = normalizer / (1.0 - dropout_p)
        out = matmul(narrow(probabilities, v.dtype, UPCAST), v, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), UPCAST)
        out = out * normalizer[:, None]
        _store_pairs(out_ptr, out, offs_head, offs_m, in_group, stride_ot, stride_oh, HEAD_DIM, BLOCK_D, UPCAST)
        tl.store(lse_ptr + offs_head.to(tl.int64) * num_tokens + offs_m, offset + tl.log2(row_sum), mask=in_group)


@triton.jit(do_not_specialize=["window_left", "window_right"])
def _attention_short_bwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    grad_out_ptr,
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    cu_seqlens_ptr,
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
    stride_dqt,
    stride_dqh,
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
    NEGATIVE_SCALE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    sequence = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    start = tl.load(cu_seqlens_ptr + sequence)
    length = tl.load(cu_seqlens_ptr + sequence + 1) - start
    if length == 0 or length > SHORT:
        return

    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    seed = load_seed(seeds_ptr, sequence, HAS_DROPOUT, HAS_FUTURE)
    shown = load_probability(future_p, FUTURE_ON_DEVICE)
    first_row = start.to(tl.int64)
    first_head = kv_head * GROUP_SIZE
    q_ptr += first_row * stride_qt + first_head * stride_qh
    grad_out_ptr += first_row * stride_dot + first_head * stride_doh
    grad_q_ptr += first_row * stride_dqt + first_head * stride_dqh
    k_ptrs = k_ptr + first_row * stride_kt + kv_head * stride_kh + offs_n[:, None] * stride_kt + offs_d[None, :]
    v_ptrs = v_ptr + first_row * stride_vt + kv_head * stride_vh + offs_n[:, None] * stride_vt + offs_d[None, :]
    k = load_rows(k_ptrs, length, BLOCK_N, HEAD_DIM, BLOCK_D)  # [BLOCK_N, BLOCK_D]
    v = load_rows(v_ptrs, length, BLOCK_N, HEAD_DIM, BLOCK_D)

    keep_scale = 1.0 / (1.0 - dropout_p)
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for start_row in tl.range(0, GROUP_SIZE * length, BLOCK_M):
        row = start_row + tl.arange(0, BLOCK_M)
        in_group = row < GROUP_SIZE * length
        offs_head = row // length
        offs_m = row - offs_head * length
        heads = (first_head + offs_head).to(tl.int32)
        q = _load_pairs(q_ptr, offs_head, offs_m, in_group, stride_qt, stride_qh, HEAD_DIM, BLOCK_D)
        grad_out = _load_pairs(grad_out_ptr, offs_head, offs_m, in_group, stride_dot, stride_doh, HEAD_DIM, BLOCK_D)

        # by rows: the softmax, delta and dQ
        scores = matmul(q, tl.trans(k), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        if NEGATIVE_SCALE:
            scores = -scores
        visible = visible_tile(
            offs_m, 0, length, seed, window_left, window_right, shown, BLOCK_N, False, HAS_WINDOW, HAS_FUTURE
        )
        scores = tl.where(visible, scores, float("-inf"))
        offset = tl.max(scores, axis=1) * softmax_scale_log2  # finite: every query sees itself
        probabilities = tl.exp2(tl.fma(scores, softmax_scale_log2, -offset[:, None]))  # [BLOCK_M, BLOCK_N]
        row_sum = tl.sum(probabilities, axis=1)
        probabilities = probabilities * (1.0 / row_sum)[:, None]
        lse = offset + tl.log2(row_sum)  # [BLOCK_M]
        grad_p = matmul(grad_out, tl.trans(v), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), UPCAST)
        if HAS_DROPOUT:
            grad_p = drop_tile(grad_p * keep_scale, offs_m, heads, 0, seed, dropout_p, BLOCK_N, False)
        delta = tl.sum(probabilities * grad_p, axis=1)  # [BLOCK_M]
        grad_s = probabilities * (grad_p - delta[:, None])
        grad_q = (
            matmul(narrow(grad_s, k.dtype, UPCAST), k, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), UPCAST) * softmax_scale
        )
        _store_pairs(grad_q_ptr, grad_q, offs_head, offs_m, in_group, stride_dqt, stride_dqh, HEAD_DIM, BLOCK_D, UPCAST)

        # by columns: the same again from operands in memory, because a product must not be transposed
        scores_t = matmul(k, tl.trans(q), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
        if NEGATIVE_SCALE:
            scores_t = -scores_t
        probabilities_t = tl.exp2(tl.fma(scores_t, softmax_scale_log2, -lse[None, :]))  # [BLOCK_N, BLOCK_M]
        if HAS_WINDOW or HAS_FUTURE:
            visible = visible_tile(
                offs_m, 0, length, seed, window_left, window_right, shown, BLOCK_N, True, HAS_WINDOW, HAS_FUTURE
            )
            probabilities_t = tl.where(visible, probabilities_t, 0.0)
        kept_t = probabilities_t
        grad_p_t = matmul(v, tl.trans(grad_out), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), UPCAST)
        if HAS_DROPOUT:
            kept_t = drop_tile(kept_t, offs_m, heads, 0, seed, dropout_p, BLOCK_N, True)
            grad_p_t = tl.where(kept_t == 0.0, 0.0, grad_p_t * keep_scale)
        grad_v = matmul(narrow(kept_t, q.dtype, UPCAST), grad_out, grad_v, UPCAST)
        grad_s_t = probabilities_t * (grad_p_t - delta[None, :])
        grad_k = matmul(narrow(grad_s_t, q.dtype, UPCAST), q, grad_k, UPCAST)

    if HAS_DROPOUT:
        grad_v = grad_v * keep_scale
    offsets = first_row * stride_dkt + kv_head * stride_dkh + offs_n[:, None] * stride_dkt + offs_d[None, :]
    store_rows(grad_k_ptr + offsets, grad_k * softmax_scale, length, BLOCK_N, HEAD_DIM, BLOCK_D, UPCAST)
    store_rows(grad_v_ptr + offsets, grad_v, length, BLOCK_N, HEAD_DIM, BLOCK_D, UPCAST)


def attention_forward_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    softmax_scale: float,
    mask: AttentionMask,
    tiles: AttentionTiles,
) -> None:
    """Write the rows of `out` (T, H, D) and `lse` (H, T), base 2, of sequences of at most `tiles.short` tokens."""
    tile = tiles.short_forward
    _attention_short_fwd_kernel[(cu_seqlens.shape[0] - 1, k.shape[1])](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        out_ptr=out,
        lse_ptr=lse,
        cu_seqlens_ptr=cu_seqlens,
        num_tokens=q.shape[0],
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


def attention_backward_short(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad_out: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    cu_seqlens: Tensor,
    softmax_scale: float,
    mask: AttentionMask,
    tiles: AttentionTiles,
) -> None:
    """Write the gradients' rows of sequences of at most `tiles.short` tokens."""
    tile = tiles.short_backward
    _attention_short_bwd_kernel[(cu_seqlens.shape[0] - 1, k.shape[1])](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        grad_out_ptr=grad_out,
        grad_q_ptr=grad_q,
        grad_k_ptr=grad_k,
        grad_v_ptr=grad_v,
        cu_seqlens_ptr=cu_seqlens,
        softmax_scale=softmax_scale,
        **scale_arguments(softmax_scale),
        stride_qt=q.stride(0),
        stride_qh=q.stride(1),
        stride_kt=k.stride(0),
        stride_kh=k.stride(1),
        stride_vt=v.stride(0),
        stride_vh=v.stride(1),
        stride_dot=grad_out.stride(0),
        stride_doh=grad_out.stride(1),
        stride_dqt=grad_q.stride(0),
        stride_dqh=grad_q.stride(1),
        stride_dkt=grad_k.stride(0),
        stride_dkh=grad_k.stride(1),
        **mask.arguments(),
        **tiles.shape_arguments(q, k),
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
