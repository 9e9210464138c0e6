"""The pass of pooling that touches every token: each sequence's weighted sum of (RMS-normalised) hidden states.

    sums[s] = sum over pooled tokens t of weight[t] * hidden[t] * rsqrt(mean(hidden[t] ** 2) + eps)

`T` packed tokens, `S` sequences, `E` hidden size. Hidden states are read once, forward and backward, and the gradient
is written once. A sequence is summed in parts of PART tokens from its own start, and the parts in order, so nothing
depends on what stands beside it. The grid is fixed by the slab: `S + T // PART + 1` parts are enough for any lengths.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, find_sequence, narrow

PART = 64
MEAN, WEIGHTED_MEAN, LAST, FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
MODES = ("mean", "weighted_mean", "last", "first")  # a mode's place is its number above


@triton.jit
def _pooled_rows(start, end, MODE: tl.constexpr):
    """The rows from `start` up to `end` that have a weight."""
    first = start
    last = end
    if MODE == LAST:
        first = end - 1
    if MODE == FIRST:
        last = tl.minimum(start + 1, end)
    return tl.maximum(first, start), last


@triton.jit
def _row_weights(row, start, end, MODE: tl.constexpr):
    """Weight of each row, of those between `_pooled_rows`; they sum to one."""
    count = (end - start).to(tl.float32)
    if MODE == MEAN:
        return (row >= 0).to(tl.float32) / count
    elif MODE == WEIGHTED_MEAN:
        return (row - start + 1).to(tl.float32) * 2.0 / (count * (count + 1.0))
    else:
        return (row >= 0).to(tl.float32)


@triton.jit
def _locate_part(cu_seqlens_ptr, pool_starts_ptr, parts_before_ptr, num_sequences, part, PART_ROWS: tl.constexpr):
    """The sequence of a part, its pooled rows' bounds and the part's own: (sequence, start, end, first, last)."""
    sequence = find_sequence(parts_before_ptr, num_sequences, part, 128)
    begin = tl.load(cu_seqlens_ptr + sequence)
    end = tl.load(cu_seqlens_ptr + sequence + 1)
    start = begin + tl.load(pool_starts_ptr + sequence)
    first = begin + (part - tl.load(parts_before_ptr + sequence)) * PART_ROWS
    return sequence, start, end, first, tl.minimum(first + PART_ROWS, end)


@triton.jit(do_not_specialize=["num_sequences"])
def _pool_parts_kernel(
    hidden_ptr,
    partials_ptr,
    cu_seqlens_ptr,
    pool_starts_ptr,
    parts_before_ptr,
    num_sequences,
    stride_t,
    eps,
    MODE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    PART_ROWS: tl.constexpr,
):
    part = tl.program_id(0)
    if part >= tl.load(parts_before_ptr + num_sequences):
        return
    _, start, end, first, last = _locate_part(
        cu_seqlens_ptr, pool_starts_ptr, parts_before_ptr, num_sequences, part, PART_ROWS
    )
    pooled_first, pooled_last = _pooled_rows(start, end, MODE)
    first = tl.maximum(first, pooled_first)
    last = tl.minimum(last, pooled_last)
    offs_e = tl.arange(0, BLOCK_E)
    total = tl.zeros([BLOCK_E], tl.float32)
    for begin in tl.range(first, last, ROWS):
        row = begin + tl.arange(0, ROWS)
        mask = (row < last)[:, None] & (offs_e < SIZE)[None, :]
        rows = tl.load(hidden_ptr + row.to(tl.int64)[:, None] * stride_t + offs_e[None, :], mask=mask, other=0.0)
        rows = rows.to(tl.float32)  # [ROWS, BLOCK_E]
        weight = _row_weights(row, start, end, MODE)
        if HAS_NORM:
            weight *= tl.rsqrt(tl.sum(rows * rows, axis=1) / SIZE + eps)
        total += tl.sum(rows * weight[:, None], axis=0)
    tl.store(partials_ptr + part.to(tl.int64) * SIZE + offs_e, total, mask=offs_e < SIZE)


@triton.jit
def _pool_combine_kernel(partials_ptr, sums_ptr, parts_before_ptr, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Add a sequence's parts in order; an empty sequence has none and gets zeros."""
    sequence = tl.program_id(0)
    offs_e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    first = tl.load(parts_before_ptr + sequence)
    partials_ptrs = partials_ptr + first.to(tl.int64) * SIZE + offs_e
    total = tl.zeros([BLOCK_E], tl.float32)
    for _ in tl.range(first, tl.load(parts_before_ptr + sequence + 1)):
        total += tl.load(partials_ptrs, mask=offs_e < SIZE, other=0.0)
        partials_ptrs += SIZE
    tl.store(sums_ptr + sequence.to(tl.int64) * SIZE + offs_e, total, mask=offs_e < SIZE)


@triton.jit(do_not_specialize=["num_tokens", "num_sequences"])
def _pool_bwd_kernel(
    hidden_ptr,
    grad_sums_ptr,
    grad_hidden_ptr,
    cu_seqlens_ptr,
    pool_starts_ptr,
    parts_before_ptr,
    num_tokens,
    num_sequences,
    stride_t,
    eps,
    MODE: tl.constexpr,
    HAS_NORM: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    part = tl.program_id(0)
    offs_e = tl.arange(0, BLOCK_E)
    num_parts = tl.load(parts_before_ptr + num_sequences)
    if part >= num_parts:
        # parts left over zero the slab's tail between them
        tail = tl.load(cu_seqlens_ptr + num_sequences)
        for begin in tl.range(tail + (part - num_parts) * ROWS, num_tokens, (tl.num_programs(0) - num_parts) * ROWS):
            row = begin + tl.arange(0, ROWS)
            pointers = grad_hidden_ptr + row.to(tl.int64)[:, None] * SIZE + offs_e[None, :]
            zeros = tl.zeros([ROWS, BLOCK_E], grad_hidden_ptr.dtype.element_ty)
            tl.store(pointers, zeros, mask=(row < num_tokens)[:, None] & (offs_e < SIZE)[None, :])
        return
    sequence, start, end, first, last = _locate_part(
        cu_seqlens_ptr, pool_starts_ptr, parts_before_ptr, num_sequences, part, PART_ROWS
    )
    pooled_first, pooled_last = _pooled_rows(start, end, MODE)
    grad = tl.load(grad_sums_ptr + sequence.to(tl.int64) * SIZE + offs_e, mask=offs_e < SIZE, other=0.0)
    for begin in tl.range(first, last, ROWS):
        row = begin + tl.arange(0, ROWS)
        pooled = (row >= pooled_first) & (row < pooled_last)
        inside = (row < last)[:, None] & (offs_e < SIZE)[None, :]
        offsets = row.to(tl.int64)[:, None]
        weight = tl.where(pooled, _row_weights(row, start, end, MODE), 0.0)
        grad_rows = weight[:, None] * grad[None, :]  # [ROWS, BLOCK_E]
        if HAS_NORM:
            rows = tl.load(hidden_ptr + offsets * stride_t + offs_e[None, :], mask=inside & pooled[:, None], other=0.0)
            rows = rows.to(tl.float32)
            scale = tl.rsqrt(tl.sum(rows * rows, axis=1) / SIZE + eps)
            # d(x r) = r g - x r^3 (x . g) / E
            along = tl.sum(rows * grad_rows, axis=1) * scale * scale / SIZE
            grad_rows = scale[:, None] * (grad_rows - rows * along[:, None])
        tl.store(
            grad_hidden_ptr + offsets * SIZE + offs_e[None, :],
            narrow(grad_rows, grad_hidden_ptr.dtype.element_ty, UPCAST),
            mask=inside,
        )


def _parts_before(cu_seqlens: Tensor) -> Tensor:
    """Number of parts before each sequence, int32 (S + 1,)."""
    parts = (cu_seqlens.diff() + PART - 1) // PART
    return torch.nn.functional.pad(parts.cumsum(0, dtype=torch.int32), (1, 0))


def _tile(size: int) -> dict[str, int]:
    """Rows at once such that a tile is a few thousand elements, from the hidden size alone."""
    block = triton.next_power_of_2(size)
    return {
        "SIZE": size,
        "BLOCK_E": block,
        "ROWS": max(1, min(16, 8192 // block)),
        "num_warps": 8 if block > 1024 else 4,
    }


@torch.library.custom_op("bivec::pool_sums", mutates_args=())
def pool_sums(hidden: Tensor, cu_seqlens: Tensor, pool_starts: Tensor, mode: int, norm_eps: float | None) -> Tensor:
    """Each sequence's weighted sum, float32 (S, E), of `hidden` (T, E); `norm_eps=None` leaves RMSNorm out.

    `mode` is a place in `MODES`. A sequence without a pooled token gets zeros.
    """
    num_tokens, size = hidden.shape
    num_sequences = cu_seqlens.shape[0] - 1
    sums = torch.empty((num_sequences, size), dtype=torch.float32, device=hidden.device)
    if num_sequences == 0:
        return sums
    parts_before = _parts_before(cu_seqlens)
    num_parts = num_sequences + num_tokens // PART + 1
    partials = torch.empty((num_parts, size), dtype=torch.float32, device=hidden.device)
    with torch.cuda.device_of(hidden):
        _pool_parts_kernel[(num_parts,)](
            hidden_ptr=hidden,
            partials_ptr=partials,
            cu_seqlens_ptr=cu_seqlens,
            pool_starts_ptr=pool_starts,
            parts_before_ptr=parts_before,
            num_sequences=num_sequences,
            stride_t=hidden.stride(0),
            eps=norm_eps or 0.0,
            MODE=mode,
            HAS_NORM=norm_eps is not None,
            PART_ROWS=PART,
            **_tile(size),
        )
        _pool_combine_kernel[(num_sequences, triton.cdiv(size, 256))](
            partials_ptr=partials,
            sums_ptr=sums,
            parts_before_ptr=parts_before,
            SIZE=size,
            BLOCK_E=256,
            num_warps=2,
        )
    return sums


@pool_sums.register_fake
def _(hidden, cu_seqlens, pool_starts, mode, norm_eps):
    return hidden.new_empty((cu_seqlens.shape[0] - 1, hidden.shape[1]), dtype=torch.float32)


@torch.library.custom_op("bivec::pool_sums_backward", mutates_args=())
def pool_sums_backward(
    grad_sums: Tensor, hidden: Tensor, cu_seqlens: Tensor, pool_starts: Tensor, mode: int, norm_eps: float | None
) -> Tensor:
    num_tokens, size = hidden.shape
    grad_hidden = torch.empty((num_tokens, size), dtype=hidden.dtype, device=hidden.device)
    num_sequences = cu_seqlens.shape[0] - 1
    if num_sequences == 0 or num_tokens == 0:
        return grad_hidden.zero_()
    with torch.cuda.device_of(hidden):
        _pool_bwd_kernel[(num_sequences + num_tokens // PART + 1,)](
            hidden_ptr=hidden,
            grad_sums_ptr=grad_sums.contiguous(),
            grad_hidden_ptr=grad_hidden,
            cu_seqlens_ptr=cu_seqlens,
            pool_starts_ptr=pool_starts,
            parts_before_ptr=_parts_before(cu_seqlens),
            num_tokens=num_tokens,
            num_sequences=num_sequences,
            stride_t=hidden.stride(0),
            eps=norm_eps or 0.0,
            MODE=mode,
            HAS_NORM=norm_eps is not None,
            PART_ROWS=PART,
            UPCAST=INTERPRETED and hidden.dtype == torch.bfloat16,
            **_tile(size),
        )
    return grad_hidden


@pool_sums_backward.register_fake
def _(grad_sums, hidden, *_):
    return hidden.new_empty(hidden.shape)


def _save_for_backward(ctx, inputs, output):
    hidden, cu_seqlens, pool_starts, ctx.mode, ctx.norm_eps = inputs
    ctx.save_for_backward(hidden, cu_seqlens, pool_starts)


def _backward(ctx, grad_sums):
    return pool_sums_backward(grad_sums, *ctx.saved_tensors, ctx.mode, ctx.norm_eps), None, None, None, None


pool_sums.register_autograd(_backward, setup_context=_save_for_backward)
