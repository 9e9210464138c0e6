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
    """Visible keys of [start_n, start_n + BLOCK_N) for queries offs_m [M]: [M, BLOCK_N], or [BLOCK_N, M]."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    if TRANSPOSED:
        query = offs_m[None, :]
        key = offs_n[:, None]
    else:
        query = offs_m[:, None]
        key = offs_n[None, :]
    visible = (key < length) & (query >= 0)
    if HAS_WINDOW:
        visible = visible & (key >= query - window_left) & (key <= query + window_right)
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
