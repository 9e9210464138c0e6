"""Which keys a query sees and which probabilities are dropped: the same tiles for the forward and every backward
kernel.

A key is visible to a query when it is in the window, `-left <= key - query <= right`, and, if it lies ahead, when the
annealed mask shows it. Everything is a run-time value; only whether a mask exists at all is compiled in.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..philox import DROPOUT_STREAM, FUTURE_STREAM, uniform_columns, uniform_rows

UNBOUNDED = 1 << 30


class AttentionMask(NamedTuple):
    """The mask's part of a launch. `future_p` in device memory wins over the number, so that a graph can anneal it."""

    window_left: int
    window_right: int
    dropout_p: float
    future_p: float
    future_p_tensor: Tensor | None
    seeds: Tensor | None

    @property
    def windowed(self) -> bool:
        return self.window_left >= 0 or self.window_right >= 0

    @property
    def random(self) -> bool:
        return self.dropout_p > 0.0 or self.future_p < 1.0 or self.future_p_tensor is not None

    def arguments(self) -> dict:
        """Keyword arguments that every attention kernel takes."""
        on_device = self.future_p_tensor is not None
        return {
            "seeds_ptr": self.seeds,
            "window_left": UNBOUNDED if self.window_left < 0 else min(self.window_left, UNBOUNDED),
            "window_right": UNBOUNDED if self.window_right < 0 else min(self.window_right, UNBOUNDED),
            "dropout_p": float(self.dropout_p),
            "future_p": self.future_p_tensor if on_device else float(self.future_p),
            "HAS_WINDOW": self.windowed,
            "HAS_DROPOUT": self.dropout_p > 0.0,
            "HAS_FUTURE": on_device or self.future_p < 1.0,
            "FUTURE_ON_DEVICE": on_device,
        }


@triton.jit
def load_seed(seeds_ptr, sequence, HAS_DROPOUT: tl.constexpr, HAS_FUTURE: tl.constexpr):
    if HAS_DROPOUT or HAS_FUTURE:
        return tl.load(seeds_ptr + sequence)
    else:
        return 0


@triton.jit
def load_probability(probability, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        return tl.load(probability)
    else:
        return probability


@triton.jit
def visible_range(
    start,
    length,
    before,
    after,
    BLOCK: tl.constexpr,
    OTHER_BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_FUTURE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Blocks of OTHER_BLOCK keys for the BLOCK queries from `start`, which see `before` and `after` them: (begin, end,
    full_begin, full_end). Some query sees some of [begin, end); every query sees all of [full_begin, full_end).

    TRANSPOSED: of queries for the BLOCK keys from `start`, with the window's sides exchanged.
    """
    begin = 0
    end = length
    full_begin = 0
    full_end = length // OTHER_BLOCK * OTHER_BLOCK
    if HAS_WINDOW or HAS_FUTURE:
        last = tl.minimum(start + BLOCK, length) - 1
        begin = tl.maximum(start - before, 0) // OTHER_BLOCK * OTHER_BLOCK
        end = tl.minimum(length, last + after + 1)
        if HAS_FUTURE:  # what an annealed mask may hide needs a draw; keys up to the query do not
            if TRANSPOSED:
                before = 0
            else:
                after = 0
        full_begin = tl.cdiv(tl.maximum(last - before, 0), OTHER_BLOCK) * OTHER_BLOCK
        full_end = tl.maximum(tl.minimum(length, start + after + 1) // OTHER_BLOCK * OTHER_BLOCK, full_begin)
    return begin, end, full_begin, full_end


@triton.jit
def visible_tile(
    offs_m,
    start_n,
    length,
    seed,
    window_left,
    window_right,
    future_p,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_FUTURE: tl.constexpr,
):
    """Visible keys of [start_n, start_n + BLOCK_N) for queries offs_m [M]: [M, BLOCK_N], or [BLOCK_N, M].

    TRANSPOSED tiles say nothing of keys and queries beyond the sequence. What depends on keys alone is [1, BLOCK_N].
    """
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        query = offs_m[None, :]
        key = offs_n[:, None]
    else:
        query = offs_m[:, None]
        key = offs_n[None, :]
    visible = key < length
    if HAS_WINDOW:
        # one comparison for both sides: what lies before the first one wraps to a large number
        if TRANSPOSED:
            visible = (query - (key - window_right)).to(tl.uint32) <= (window_left + window_right).to(tl.uint32)
        else:
            first = query - window_left
            last = tl.minimum(query + window_right, length - 1)
            visible = (key - first).to(tl.uint32) <= (last - first).to(tl.uint32)
    if HAS_FUTURE:
        if TRANSPOSED:
            uniform = uniform_columns(seed, offs_m, offs_m * 0, start_n, FUTURE_STREAM, BLOCK_N)
        else:
            uniform = uniform_rows(seed, offs_m, offs_m * 0, start_n, FUTURE_STREAM, BLOCK_N)
        visible = visible & ((key <= query) | (uniform < future_p))
    return visible


@triton.jit
def drop_tile(
    probabilities,
    offs_m,
    head,
    start_n,
    seed,
    dropout_p,
    BLOCK_N: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Zero the dropped entries of a tile for queries offs_m [M] with query heads `head` [M]; not rescaled."""
    if TRANSPOSED:
        uniform = uniform_columns(seed, offs_m, head, start_n, DROPOUT_STREAM, BLOCK_N)
    else:
        uniform = uniform_rows(seed, offs_m, head, start_n, DROPOUT_STREAM, BLOCK_N)
    return tl.where(uniform >= dropout_p, probabilities, 0.0)
