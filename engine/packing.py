"""Texts' tokens into packed batches of limited size, and the original order back.

Shapes: T packed tokens, S sequences.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np
import torch

SLAB_SEQUENCES = 1024  # at most, in a slab


@dataclass(frozen=True)
class PackedBatch:
    """A concatenation of sequences; there is no padded layout anywhere in the engine.

    Attributes:
        input_ids: int64 `(T,)`.
        positions: int64 `(T,)`, each token's place in its own sequence.
        cu_seqlens: int32 `(S + 1,)`, bounds: sequence `i` is `input_ids[cu_seqlens[i]:cu_seqlens[i + 1]]`.
        seqlens: the same lengths on the host, so that nothing has to wait for the device.
        pool_starts: int32 `(S,)`, the first token of each sequence that is pooled (after its instruction).
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    seqlens: tuple[int, ...]
    pool_starts: torch.Tensor

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @property
    def max_seqlen(self) -> int:
        return max(self.seqlens, default=0)

    @cached_property
    def equal_length_runs(self) -> tuple[tuple[int, int, int], ...]:
        """Neighbouring sequences of one length: `(first token, number of sequences, length)`, empty ones left out."""
        runs: list[tuple[int, int, int]] = []
        start = 0
        for length in self.seqlens:
            if runs and runs[-1][2] == length and length:
                first, count, _ = runs[-1]
                runs[-1] = (first, count + 1, length)
            elif length:
                runs.append((start, 1, length))
            start += length
        return tuple(runs)

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        pool_starts: Sequence[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> "PackedBatch":
        """Pack token-id sequences in the order given; `pool_starts` defaults to 0, every token.

        Nothing waits for a CUDA device, and torch does not compute: a thread of its own may pack.
        """
        seqlens = tuple(map(len, sequences))
        lengths = np.array(seqlens, dtype=np.int64)
        cu_seqlens = np.concatenate([[0], lengths.cumsum()])
        input_ids = np.fromiter(chain.from_iterable(sequences), np.int64, count=int(cu_seqlens[-1]))
        positions = np.arange(len(input_ids)) - np.repeat(cu_seqlens[:-1], lengths)
        starts = np.array(pool_starts if pool_starts is not None else [0] * len(seqlens), dtype=np.int32)
        if len(starts) != len(seqlens):
            raise ValueError(f"pool_starts must hold one entry a sequence ({len(seqlens)}), got {len(starts)}")
        arrays = (input_ids, positions, cu_seqlens.astype(np.int32), starts)
        ids, places, bounds, pooled = (on_device(array, device) for array in arrays)
        return cls(ids, places, bounds, seqlens, pooled)


def on_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """The array as a tensor there: on the CPU the same memory, to a CUDA device a copy for which nothing waits."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    # its allocator gives the pinned memory to nobody else before the copy, on this stream, is done
    return tensor.pin_memory().to(device, non_blocking=True)


def pack(lengths: Sequence[int], max_tokens: int, max_sequences: int) -> Iterator[list[int]]:
    """Divide sequences into slabs of at most `max_tokens` tokens and `max_sequences` sequences, best fit decreasing.

    Longest first, each sequence goes into the slab with the least room that still takes it. Within a slab the
    indices stand in decreasing order of length, so equal lengths are neighbours.

    Args:
        lengths: tokens of each sequence, at least 1.
    Yields:
        lists of indices into `lengths`; each index is in exactly one list.
    Raises:
        ValueError: a sequence is empty or longer than a slab.
    """
    if lengths and (min(lengths) < 1 or max(lengths) > max_tokens):
        raise ValueError(f"lengths must be from 1 to {max_tokens}, got {min(lengths)} to {max(lengths)}")
    slabs: list[list[int]] = []
    open_slabs: list[tuple[int, int]] = []  # (room in tokens, slab), sorted
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        place = bisect_left(open_slabs, (length, -1))
        if place < len(open_slabs):
            room, slab = open_slabs.pop(place)
        else:
            room, slab = max_tokens, len(slabs)
            slabs.append([])
        slabs[slab].append(index)
        if room > length and len(slabs[slab]) < max_sequences:
            insort(open_slabs, (room - length, slab))
    yield from slabs
