"""Attention over packed sequences from batched matrix products, differentiable: what runs where Triton does not.

    scores = q @ k.T * softmax_scale                    # for every sequence and head
    output = dropout(softmax(where(visible, scores, -inf))) @ v

Sequences of similar length are computed together, each as long as the longest, so that the products are few and large;
nothing outside this file sees the padding. The masks are the Triton kernel's, bit by bit. The backward computes the
scores again: only q, k, v and the masks drawn, a byte a score, are kept. 16-bit inputs are multiplied in their own
dtype with a float32 softmax, as in `reference.py`.

`T` packed tokens, `S` sequences, `H` query heads, `G` key/value heads, `D` head dimension; a part has `B` sequences of
up to `L` tokens and `g` of the `G` heads, with `h` query heads.
"""

import itertools
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..philox_numpy import DROPOUT_STREAM, FUTURE_STREAM, draw_at_least
from .arguments import check_chances, check_scale, check_seeds, check_tensors, check_window

HIDDEN = -1e30  # not -inf, so that padding rows that see nothing stay finite
MAX_SCORES = 2**18  # of a part, unless one key/value head has more: float32 scores stay in the cache
MAX_WASTE = 0.15  # the share of padding in a part's scores
FREE_WASTE = 4096  # scores of a head that may be padding in any case: fewer cost less than another part's calls


class Part(NamedTuple):
    """Sequences and heads that are computed together; there are several sequences only with all heads."""

    sequences: Tensor  # int64 (B,)
    lengths: Tensor  # int64 (B,)
    length: int  # L, the longest
    ragged: bool
    kv_heads: range


class Layout(NamedTuple):
    """Where rows (token, head) stand when the parts' `(B, heads, L)` rows are joined."""

    rows: Tensor  # int64, the row at each place; padding repeats its sequence's last token
    padding: Tensor  # int64, the places of padding
    places: Tensor  # int64 (tokens of all sequences x heads,), the place of each row
    slices: tuple[slice, ...]  # each part's places


class Plan(NamedTuple):
    parts: tuple[Part, ...]
    queries: Layout
    keys: Layout


class Masking(NamedTuple):
    window: tuple[int, int]
    dropout_p: float
    future_p: float


class _PaddedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, seeds: Tensor | None, plan: Plan, scale: float, masking: Masking):
        keeps, shown = _draw_masks(q, k, seeds, plan, masking)
        ctx.save_for_backward(q, k, v, *keeps, *shown)
        ctx.arguments = plan, scale, masking
        queries, keys, values = _padded(q, k, v, plan)
        output = torch.empty_like(queries)
        for index, part in enumerate(plan.parts):
            own, others = plan.queries.slices[index], plan.keys.slices[index]
            bias = _bias(part, masking, shown[index], q.device)
            probabilities = _probabilities(part, queries[own], keys[others], bias, scale)
            if (keep := keeps[index]) is not None:
                probabilities *= _dropout_factors(keep, probabilities, masking)
            folded = _fold(part, probabilities).to(q.dtype)
            torch.bmm(folded, _heads(part, values[others]), out=_heads(part, output[own]))
        return _packed(output, plan.queries, q)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out: Tensor):
        plan, scale, masking = ctx.arguments
        q, k, v, *masks = ctx.saved_tensors
        keeps, shown = masks[: len(plan.parts)], masks[len(plan.parts) :]
        queries, keys, values = _padded(q, k, v, plan)
        # zero for padding, which then adds nothing to any gradient
        upstream = _rows(grad_out, plan.queries).index_fill_(0, plan.queries.padding, 0.0)
        grads = [torch.empty_like(tensor) for tensor in (queries, keys, values)]
        for index, part in enumerate(plan.parts):
            own, others = plan.queries.slices[index], plan.keys.slices[index]
            query, grad_output = _heads(part, queries[own]), _heads(part, upstream[own])
            key, value = _heads(part, keys[others]), _heads(part, values[others])
            grad_query, grad_key, grad_value = (
                _heads(part, grad[rows]) for grad, rows in zip(grads, (own, others, others), strict=True)
            )
            bias = _bias(part, masking, shown[index], q.device)
            dropped = probabilities = _probabilities(part, queries[own], keys[others], bias, scale)
            grad = torch.bmm(grad_output, value.mT).to(probabilities.dtype).view_as(probabilities)
            if (keep := keeps[index]) is not None:
                factors = _dropout_factors(keep, probabilities, masking)
                grad *= factors
                dropped = factors.mul_(probabilities)
            torch.bmm(_fold(part, dropped).to(q.dtype).mT, grad_output, out=grad_value)
            # probabilities * (grad - (probabilities * grad).sum(-1, keepdim=True)), in one pass
            grad = torch.ops.aten._softmax_backward_data(grad, probabilities, -1, grad.dtype)
            grad_scores = _fold(part, grad).to(q.dtype)
            torch.bmm(grad_scores, key, out=grad_query)
            torch.bmm(grad_scores.mT, query, out=grad_key)
        grad_q, grad_k, grad_v = grads
        return (
            _packed(grad_q, plan.queries, q).mul_(scale),
            _packed(grad_k, plan.keys, k).mul_(scale),
            _packed(grad_v, plan.keys, v),
            *[None] * 4,
        )


def _draw_masks(
    q: Tensor, k: Tensor, seeds: Tensor | None, plan: Plan, masking: Masking
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """For each part which probabilities stay, bool (B, h, L, L), and which future keys show, bool (B, 1, L, L)."""
    keeps: list[Tensor | None] = []
    shown: list[Tensor | None] = []
    group_size = q.shape[1] // k.shape[1]
    for index, part in enumerate(plan.parts):
        keep = visible = None
        if seeds is not None:
            part_seeds = seeds[part.sequences]
            if masking.dropout_p > 0.0:
                heads = range(part.kv_heads.start * group_size, part.kv_heads.stop * group_size)
                keep = draw_at_least(part_seeds, part.length, heads, DROPOUT_STREAM, masking.dropout_p).to(q.device)
            if masking.future_p < 1.0 and index and plan.parts[index - 1].sequences is part.sequences:
                visible = shown[-1]  # other heads of one sequence
            elif masking.future_p < 1.0:
                visible = ~draw_at_least(part_seeds, part.length, range(1), FUTURE_STREAM, masking.future_p)
                visible = visible.to(q.device)
        keeps.append(keep)
        shown.append(visible)
    return keeps, shown


def _bias(part: Part, masking: Masking, shown: Tensor | None, device: torch.device) -> Tensor:
    """What is added to the scores, float32 and broadcastable to (B, h, L, L): 0 where a query sees a key."""
    left, right = masking.window
    position = torch.arange(part.length, device=device)
    ahead = position[None, :] - position[:, None]  # (L, L), key minus query
    hidden = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
    if part.ragged and right != 0:  # padding is ahead of every token, so a causal window hides it
        hidden = hidden | (position >= part.lengths[:, None])[:, None, None, :]
    if 0 <= left < part.length - 1:
        hidden = hidden | (ahead < -left)
    if 0 <= right < part.length - 1:
        hidden = hidden | (ahead > right)
    if shown is not None:
        hidden = hidden | ((ahead > 0) & ~shown)
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, HIDDEN)


def _probabilities(part: Part, queries: Tensor, keys: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Softmax of the scores, at least float32, (B, h, L, L)."""
    scores = torch.bmm(_heads(part, queries), _heads(part, keys).mT)
    scores = scores.view(len(part.sequences), -1, part.length, part.length)
    in_place = scores if scores.dtype in (torch.float32, torch.float64) else None
    return torch.add(bias, scores, alpha=scale, out=in_place).softmax(-1)


def _dropout_factors(keep: Tensor, probabilities: Tensor, masking: Masking) -> Tensor:
    return keep.to(probabilities.dtype).mul_(1.0 / (1.0 - masking.dropout_p))


def _heads(part: Part, rows: Tensor) -> Tensor:
    """A part's rows as (B g, L, D), with the query heads of a group one below the other."""
    return rows.view(len(part.sequences) * len(part.kv_heads), -1, rows.shape[-1])


def _fold(part: Part, scores: Tensor) -> Tensor:
    """(B, h, L, L) as (B g, L h / g, L)."""
    return scores.view(len(part.sequences) * len(part.kv_heads), -1, part.length)


def _rows(heads: Tensor, layout: Layout) -> Tensor:
    """(T, heads, D) to the rows of all parts."""
    return heads.reshape(-1, heads.shape[2]).index_select(0, layout.rows)


def _padded(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor]:
    return _rows(q, plan.queries), _rows(k, plan.keys), _rows(v, plan.keys)


def _packed(rows: Tensor, layout: Layout, like: Tensor) -> Tensor:
    """`_rows` backward, (T, heads, D): tokens of no sequence are zero."""
    heads = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    flat = heads.view(-1, like.shape[2])
    torch.index_select(rows, 0, layout.places, out=flat[: len(layout.places)])
    flat[len(layout.places) :].zero_()
    return heads


@lru_cache(maxsize=8)  # the layers of a model ask for the same one
def _plan(seqlens: tuple[int, ...], num_heads: int, num_kv_heads: int, device: torch.device) -> Plan:
    group_size = num_heads // num_kv_heads
    parts = []
    for sequences in _similar(seqlens, num_heads):
        lengths = torch.tensor([seqlens[sequence] for sequence in sequences], device=device)
        length = seqlens[sequences[0]]
        ragged = seqlens[sequences[-1]] < length
        step = num_kv_heads
        if len(sequences) == 1:
            step = max(1, min(num_kv_heads, MAX_SCORES // (group_size * length**2)))
        index = torch.tensor(sequences, device=device)
        for first in range(0, num_kv_heads, step):
            kv_heads = range(first, min(first + step, num_kv_heads))
            parts.append(Part(index, lengths, length, ragged, kv_heads))
    starts = torch.tensor([0, *itertools.accumulate(seqlens)], device=device)
    return Plan(tuple(parts), _layout(parts, starts, num_kv_heads, group_size), _layout(parts, starts, num_kv_heads, 1))


def _similar(seqlens: Sequence[int], num_heads: int) -> Iterable[list[int]]:
    """Sequences of similar length, longest first; empty ones are left out."""
    together: list[int] = []
    needed = 0  # scores of one head without padding
    for sequence in sorted(range(len(seqlens)), key=lambda i: -seqlens[i]):
        area = seqlens[sequence] ** 2
        if together:
            padded = (len(together) + 1) * seqlens[together[0]] ** 2
            waste = padded - needed - area
            if padded * num_heads > MAX_SCORES or waste > max(FREE_WASTE, MAX_WASTE * padded):
                yield together
                together, needed = [], 0
        if area:
            together.append(sequence)
            needed += area
    if together:
        yield together


def _layout(parts: Sequence[Part], starts: Tensor, num_kv_heads: int, group_size: int) -> Layout:
    device = starts.device
    num_heads = num_kv_heads * group_size
    rows, real, slices = [starts[:0]], [starts[:0].bool()], []
    start = 0
    for part in parts:
        position = torch.arange(part.length, device=device)
        lengths = part.lengths[:, None]
        token = starts[part.sequences][:, None] + torch.minimum(position, lengths - 1)  # (B, L)
        heads = range(part.kv_heads.start * group_size, part.kv_heads.stop * group_size)
        row = token[:, None, :] * num_heads + torch.arange(heads.start, heads.stop, device=device)[:, None]
        rows.append(row.flatten())
        real.append((position < lengths)[:, None, :].expand(row.shape).flatten())
        slices.append(slice(start, start + row.numel()))
        start += row.numel()
    all_rows, all_real = torch.cat(rows), torch.cat(real)
    places = torch.empty(int(starts[-1]) * num_heads, dtype=torch.int64, device=device)
    real_places = all_real.nonzero().squeeze(1)
    places[all_rows[real_places]] = real_places
    return Layout(all_rows, (~all_real).nonzero().squeeze(1), places, tuple(slices))


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
    future_p: float = 1.0,
    seeds: Tensor | None = None,
) -> Tensor:
    """Attention within each packed sequence; (T, H, D), (T, G, D), (T, G, D) -> (T, H, D).

    Every argument is as in `bivec.kernels.attention.varlen_attention`, whose masks it draws; but any device, floating
    dtype, head dimension and strides will do, `future_p` is a number, and the scores of at least one key/value head of
    a sequence are held at a time, `H / G` matrices of its length squared. On a GPU the lengths are read back.

    Differentiable, once. Raises ValueError for arguments that break these rules.
    """
    check_tensors(q, k, v, cu_seqlens)
    window = check_window(window_size)
    check_chances(dropout_p, future_p)
    random = dropout_p > 0.0 or future_p < 1.0
    check_seeds(seeds, random, cu_seqlens)
    scale = check_scale(softmax_scale, q.shape[2])
    bounds = cu_seqlens.tolist()
    seqlens = tuple(stop - start for start, stop in itertools.pairwise(bounds))
    plan = _plan(seqlens, q.shape[1], k.shape[1], q.device)
    masking = Masking(window, dropout_p, future_p)
    with torch.autocast(q.device.type, enabled=False):
        return _PaddedAttention.apply(q, k, v, seeds if random else None, plan, scale, masking)
