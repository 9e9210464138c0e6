"""Attention over packed sequences as batched products in bfloat16, on the CPU, without gradient.

    scores = q @ k.T                                    # of all query heads that share a key head at once
    output = softmax(scores * softmax_scale + hidden) @ v

oneDNN multiplies small bfloat16 matrices several times as fast as torch's fused attention does float32 ones, for the
lengths that texts have: the products are rounded to bfloat16, the softmax is float32. Sequences are padded to the next
of a few lengths, so that there are few calls. Each sequence and key head is a matrix of its own in a batch: its result
depends on its own length alone, never on its company.

`T` packed tokens, `H` query heads, `G` key/value heads, `D` head dimension; a part has `B` sequences of up to `L`
tokens, each padded to `L`, with `h` query heads to a key head.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# tokens of a sequence: torch's attention is as fast on shorter ones, and the scores of longer ones leave the cache
LENGTHS = range(17, 513)
_MAX_TOKENS = 1024  # of a part, padding counted: its heads stay in the cache
_SCORES = 2**18  # at once, unless one matrix has more: they stay in a nearer one
_HIDDEN = -1e30  # not -inf, so that padding that sees nothing stays finite


@dataclass(frozen=True)
class Part:
    """Sequences that are computed together.

    Attributes:
        length: L.
        gather: int64 `(B L,)`, the token at each place; padding repeats the last one.
        padding: float32 `(B G, 1, L)`, what hides keys that are padding; None where there are none.
        tokens: what the part writes of `(T,)`.
        scatter: int64 `(tokens G,)`, the place of each of them, and head, among `(B G L,)`.
    """

    length: int
    gather: Tensor
    padding: Tensor | None
    tokens: slice | Tensor
    scatter: Tensor


def plan_batches(seqlens: Sequence[int], num_groups: int) -> list[Part]:
    """How to compute the sequences whose lengths are in `LENGTHS`, the same for all layers of a pass.

    Args:
        num_groups: G.
    """
    lengths = np.array(seqlens, dtype=np.int64)
    starts = lengths.cumsum() - lengths
    chosen = np.flatnonzero((lengths >= LENGTHS.start) & (lengths < LENGTHS.stop))
    padded = _padded_length(lengths[chosen])
    parts = []
    for length in np.unique(padded).tolist():
        alike = chosen[padded == length]
        at_once = max(_MAX_TOKENS // length, 1)
        for first in range(0, len(alike), at_once):
            some = alike[first : first + at_once]
            parts.append(_part(starts[some], lengths[some], length, num_groups))
    return parts


def _part(starts: np.ndarray, lengths: np.ndarray, length: int, num_groups: int) -> Part:
    count, places = len(starts), np.arange(length)
    is_padding = places >= lengths[:, None]  # (B, L)
    rows = starts[:, None] + np.minimum(places, lengths[:, None] - 1)
    tokens = rows[~is_padding]
    by_place = np.arange(count * num_groups * length).reshape(count, num_groups, length).transpose(0, 2, 1)
    padding = None
    if is_padding.any():
        hiding = np.where(is_padding, _HIDDEN, 0.0).astype(np.float32)
        padding = torch.from_numpy(hiding).repeat_interleave(num_groups, 0)[:, None]
    in_order = bool((np.diff(tokens) == 1).all())
    return Part(
        length,
        torch.from_numpy(rows.reshape(-1)),
        padding,
        slice(int(tokens[0]), int(tokens[-1]) + 1) if in_order else torch.from_numpy(tokens),
        torch.from_numpy(by_place[~is_padding].reshape(-1)),
    )


def batched_attention(
    query: Tensor, key: Tensor, value: Tensor, parts: Sequence[Part], window: tuple[int, int], out: Tensor
) -> None:
    """Writes the rows of `out` `(T, H, D)` that are of the parts' sequences.

    Args:
        query: `(T, H, D)`, any float dtype.
        key, value: `(T, G, D)`.
        window: as flash-attention's `window_size`.
    """
    head_dim, num_groups = query.shape[2], key.shape[1]
    by_group = query.unflatten(1, (num_groups, -1)).flatten(2)  # (T, G, h D)
    for part in parts:
        # (B G, L h, D), (B G, L, D)
        queries, keys, values = (
            heads.index_select(0, part.gather)
            .unflatten(0, (-1, part.length))
            .transpose(1, 2)
            .to(torch.bfloat16, memory_format=torch.contiguous_format)
            .reshape(-1, part.length * heads.shape[2] // head_dim, head_dim)
            for heads in (by_group, key, value)
        )
        attended = _attend(queries, keys, values, part, window).view(-1, by_group.shape[2])
        out[part.tokens] = attended.index_select(0, part.scatter).view(-1, *out.shape[1:]).to(out.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, part: Part, window: tuple[int, int]) -> Tensor:
    """`(B G, L h, D)`, a few matrices at a time."""
    num_matrices, num_queries = query.shape[:2]
    at_once = max(_SCORES // (num_queries * part.length), 1)
    # the same memory for each few: what is fresh costs more than what is done there
    shape = (min(at_once, num_matrices), num_queries, part.length)
    products, scores, probabilities = query.new_empty(shape), torch.empty(shape), torch.empty(shape)
    out = query.new_empty(query.shape)
    unseen, softmax_scale = _unseen(part.length, window), query.shape[2] ** -0.5
    for first in range(0, num_matrices, at_once):
        some = slice(first, min(first + at_once, num_matrices))
        count = slice(0, some.stop - first)
        rounded, found = products[count], scores[count]
        torch.bmm(query[some], key[some].mT, out=rounded)
        found.copy_(rounded)
        if part.padding is None:
            found *= softmax_scale
        else:
            torch.add(part.padding[some], found, alpha=softmax_scale, out=found)
        if unseen is not None:
            found.unflatten(1, (part.length, -1)).masked_fill_(unseen[:, None, :], _HIDDEN)
        torch.bmm(rounded.copy_(torch.softmax(found, -1, out=probabilities[count])), value[some], out=out[some])
    return out


def _padded_length(lengths: np.ndarray) -> np.ndarray:
    step = np.where(lengths <= 128, 16, 32)
    return -(-lengths // step) * step


def _unseen(length: int, window: tuple[int, int]) -> Tensor | None:
    """Bool `(L, L)`, true where the query (row) does not see the key; None where each sees all."""
    left, right = (length if side < 0 else side for side in window)
    if min(left, right) >= length - 1:
        return None
    places = torch.arange(length)
    ahead = places[None, :] - places[:, None]  # key minus query
    return (ahead > right) | (ahead < -left)
