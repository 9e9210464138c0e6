"""Attention over packed sequences as batched products in bfloat16, on the CPU, without gradient.

    scores = q @ k.T                                    # of all query heads that share a key head at once
    output = softmax(scores * softmax_scale + hidden) @ v

oneDNN multiplies small bfloat16 matrices several times as fast as torch's fused attention does float32 ones, for the
lengths that texts have: the products are rounded to bfloat16, the softmax is float32. Sequences are padded to the next
of a few lengths, so that there are few calls. Each sequence and key head is a matrix of its own in a batch: its result
depends on its own length alone, never on its company.

`T` packed tokens, `H` query heads, `G` key/value heads, `D` head dimension; a part has `B` sequences of up to `L`
tokens, each padded to `L`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# tokens of a sequence: torch's attention is as fast on shorter ones, and the scores of longer ones leave the cache
LENGTHS = range(17, 513)
_MAX_TOKENS = 2**12  # of a part, padding counted
_SCORES = 2**16  # at once, unless one matrix has more: they stay in the cache
_HIDDEN = -1e30  # not -inf, so that padding that sees nothing stays finite


@dataclass(frozen=True)
class Part:
    """Sequences that are computed together.

    Attributes:
        gather: int64 `(B G L,)`, the row of `(T G,)` (token, head) at each place; padding repeats the last token.
        padding: float32 `(B G, 1, L)`, what hides keys that are padding; None where there are none.
    """

    length: int
    gather: Tensor
    padding: Tensor | None


@dataclass(frozen=True)
class Plan:
    """What all layers of a pass compute alike.

    Attributes:
        tokens: the sequences' rows of `(T,)`.
        scatter: int64, the place of each of their rows (token, head) among those of all parts, one after another.
    """

    parts: tuple[Part, ...]
    tokens: slice | Tensor
    scatter: Tensor


def plan_batches(seqlens: Sequence[int], num_groups: int) -> Plan | None:
    """How to compute the sequences whose lengths are in `LENGTHS`; None where there are none."""
    lengths = np.array(seqlens, dtype=np.int64)
    starts = lengths.cumsum() - lengths
    chosen = np.flatnonzero((lengths >= LENGTHS.start) & (lengths < LENGTHS.stop))
    if not len(chosen):
        return None
    padded = _padded_length(lengths[chosen])
    groups = np.arange(num_groups)[None, :, None]
    parts, scatter, tokens, offset = [], [], [], 0
    for length in np.unique(padded):
        alike = chosen[padded == length]
        at_once = max(_MAX_TOKENS // length, 1)
        for first in range(0, len(alike), at_once):
            some = alike[first : first + at_once]
            count, own = len(some), lengths[some, None]
            places = np.arange(length)[None]
            rows = starts[some, None] + np.minimum(places, own - 1)  # (B, L)
            gather = rows[:, None, :] * num_groups + groups  # (B, G, L)
            is_padding = places >= own
            padding = None
            if is_padding.any():
                hiding = np.where(is_padding, _HIDDEN, 0.0).astype(np.float32)
                padding = torch.from_numpy(hiding).repeat_interleave(num_groups, 0)[:, None]
            parts.append(Part(int(length), torch.from_numpy(gather.reshape(-1)), padding))
            found = offset + np.arange(count * num_groups * length).reshape(count, num_groups, length)
            scatter.append(found.transpose(0, 2, 1)[~is_padding])  # (tokens of the part, G)
            tokens.append(rows[~is_padding])
            offset += found.size
    all_tokens = np.concatenate(tokens)
    order = np.argsort(all_tokens, kind="stable")
    ordered = all_tokens[order]
    whole = ordered[-1] - ordered[0] + 1 == len(ordered)
    return Plan(
        tuple(parts),
        slice(int(ordered[0]), int(ordered[-1]) + 1) if whole else torch.from_numpy(ordered),
        torch.from_numpy(np.concatenate(scatter)[order].reshape(-1)),
    )


def batched_attention(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: tuple[int, int], out: Tensor
) -> None:
    """Writes the planned sequences' rows of `out` `(T, H, D)`.

    Args:
        query: `(T, H, D)`, any float dtype.
        key, value: `(T, G, D)`.
        window: as flash-attention's `window_size`.
    """
    num_heads, head_dim = query.shape[1:]
    num_groups = key.shape[1]
    shared = num_heads // num_groups
    queries = query.to(torch.bfloat16, memory_format=torch.contiguous_format).view(-1, shared * head_dim)
    keys, values = (
        part.to(torch.bfloat16, memory_format=torch.contiguous_format).view(-1, head_dim) for part in (key, value)
    )
    attended = queries.new_empty(sum(len(part.gather) for part in plan.parts), shared * head_dim)
    start = 0
    for part in plan.parts:
        rows = slice(start, start + len(part.gather))
        start = rows.stop
        query_rows, key_rows, value_rows = (
            heads.index_select(0, part.gather).view(-1, size, head_dim)
            for heads, size in ((queries, part.length * shared), (keys, part.length), (values, part.length))
        )
        unseen = _unseen(part.length, window)
        _attend(query_rows, key_rows, value_rows, part, unseen, out=attended[rows].view(query_rows.shape))
    tokens = out.flatten(1)
    tokens[plan.tokens] = attended.index_select(0, plan.scatter).view(-1, tokens.shape[1]).to(out.dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor, part: Part, unseen: Tensor | None, out: Tensor) -> None:
    """Writes `out` `(B G, L shared, D)`, a few matrices at a time, whose scores stay in the cache."""
    num_matrices, num_queries = query.shape[:2]
    at_once = max(_SCORES // (num_queries * part.length), 1)
    shape = (min(at_once, num_matrices), num_queries, part.length)
    products, scores, probabilities = query.new_empty(shape), torch.empty(shape), torch.empty(shape)
    for first in range(0, num_matrices, at_once):
        some = slice(first, min(first + at_once, num_matrices))
        count = slice(0, some.stop - first)
        rounded, found = products[count], scores[count]
        torch.bmm(query[some], key[some].mT, out=rounded)
        torch.mul(found.copy_(rounded), value.shape[-1] ** -0.5, out=found)
        if part.padding is not None:
            found += part.padding[some]
        if unseen is not None:
            found.unflatten(1, (part.length, -1)).masked_fill_(unseen[:, None, :], _HIDDEN)
        torch.bmm(rounded.copy_(torch.softmax(found, -1, out=probabilities[count])), value[some], out=out[some])


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
