"""Pooling on the CPU: the sums of `sums.py` by chunks that stay in the cache, in eager PyTorch.

    sums[s] = sum over pooled tokens t of weight[t] * hidden[t] * rsqrt(mean(hidden[t] ** 2) + eps)

`T` packed tokens, `S` sequences, `E` hidden size, `P` parts. A sequence is summed in parts of PART tokens from its
first pooled one, and the parts in order, so nothing depends on what stands beside it. A weighted sum of rows, without
a temporary matrix and in order, is what `embedding_bag` computes. The backward needs the hidden states alone and writes
their gradient once.
"""

import itertools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding_bag, pad

PART = 64
CHUNK_ELEMENTS = 2**19  # about as many float32 numbers, 2 MiB, at a time


def pool_sums_cpu(hidden: Tensor, cu_seqlens: Tensor, pool_starts: Tensor, mode: str, norm_eps: float | None) -> Tensor:
    """Each sequence's weighted sum, float32 (S, E), of `hidden` (T, E); `norm_eps=None` leaves RMSNorm out.

    Raises ValueError for a sequence without a pooled token.
    """
    bounds = cu_seqlens.long()
    starts, ends = bounds[:-1] + pool_starts, bounds[1:]
    if bool((starts >= ends).any()):
        empty = int((starts >= ends).nonzero()[0])
        raise ValueError(f"every sequence must have a token to pool, sequence {empty} has none")
    if mode == "last":
        starts = ends - 1
    elif mode == "first":
        ends = starts + 1
    return _PoolSums.apply(hidden, starts, ends, mode == "weighted_mean", norm_eps)


class _PoolSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, starts: Tensor, ends: Tensor, weighted: bool, norm_eps: float | None) -> Tensor:
        ctx.save_for_backward(hidden, starts, ends)
        ctx.weighted, ctx.norm_eps = weighted, norm_eps
        tokens, _, weights = _pooled_tokens(starts, ends, weighted)
        parts_before = _before((ends - starts + PART - 1) // PART)
        sequence = torch.repeat_interleave(parts_before.diff())  # of each part
        part_bounds = _before(ends - starts)[sequence] + PART * (torch.arange(len(sequence)) - parts_before[sequence])
        part_bounds = pad(part_bounds, (0, 1), value=len(tokens))

        partials = hidden.new_empty((len(sequence), hidden.shape[1]), dtype=torch.float32)  # (P, E)
        step = _chunk_rows(hidden)
        cuts = torch.searchsorted(part_bounds, torch.arange(0, len(tokens) + step, step)).clamp_(max=len(sequence))
        for first, last in itertools.pairwise(cuts.unique().tolist()):
            begin, end = part_bounds[first], part_bounds[last]
            rows, weight = _rows(hidden, tokens[begin:end]), weights[begin:end]
            if norm_eps is not None:
                weight = weight * _inverse_rms(rows, norm_eps)
            partials[first:last] = embedding_bag(
                torch.arange(len(rows)), rows, part_bounds[first:last] - begin, mode="sum", per_sample_weights=weight
            )
        return embedding_bag(torch.arange(len(sequence)), partials, parts_before[:-1], mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_sums: Tensor):
        hidden, starts, ends = ctx.saved_tensors
        tokens, sequence, weights = _pooled_tokens(starts, ends, ctx.weighted)
        all_pooled = len(tokens) == len(hidden)
        grad_hidden = torch.empty(hidden.shape, dtype=hidden.dtype) if all_pooled else torch.zeros_like(hidden)
        step = _chunk_rows(hidden)
        for begin in range(0, len(tokens), step):
            chunk = slice(begin, begin + step)
            grad_rows, weight = grad_sums.index_select(0, sequence[chunk]), weights[chunk]
            if ctx.norm_eps is not None:
                rows = _rows(hidden, tokens[chunk])
                scale = _inverse_rms(rows, ctx.norm_eps)
                # d(x r) = r g - x r^3 (x . g) / E
                along = (rows * grad_rows).sum(1) * scale.square() / hidden.shape[1]
                grad_rows.addcmul_(rows, along[:, None], value=-1)
                weight = weight * scale
            grad_rows.mul_(weight[:, None])
            run = _run(tokens[chunk])
            grad_hidden[tokens[chunk] if run is None else run] = grad_rows.to(hidden.dtype)
        return grad_hidden, None, None, None, None


def _pooled_tokens(starts: Tensor, ends: Tensor, weighted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The place, sequence and weight of every pooled token, in order; a sequence's weights sum to one."""
    counts = ends - starts
    sequence = torch.repeat_interleave(counts)
    place = torch.arange(len(sequence)) - _before(counts)[sequence]
    counts = counts.float()
    if weighted:
        return starts[sequence] + place, sequence, (place + 1) * (2 / (counts * (counts + 1)))[sequence]
    return starts[sequence] + place, sequence, counts.reciprocal()[sequence]


def _before(counts: Tensor) -> Tensor:
    """(n,) -> (n + 1,), the sums of what stands before each, and of all."""
    return pad(counts.cumsum(0), (1, 0))


def _chunk_rows(hidden: Tensor) -> int:
    return max(1, CHUNK_ELEMENTS // hidden.shape[1])


def _run(tokens: Tensor) -> slice | None:
    """`tokens`, ascending, as a slice where nothing is left out between them."""
    first, last = int(tokens[0]), int(tokens[-1])
    return slice(first, last + 1) if last + 1 - first == len(tokens) else None


def _rows(hidden: Tensor, tokens: Tensor) -> Tensor:
    """Rows in float32, not copied where they are and stand together."""
    run = _run(tokens)
    return hidden[tokens if run is None else run].float().contiguous()


def _inverse_rms(rows: Tensor, eps: float) -> Tensor:
    return torch.linalg.vector_norm(rows, dim=1).square_().div_(rows.shape[1]).add_(eps).rsqrt_()
