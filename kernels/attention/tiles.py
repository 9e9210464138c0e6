"""Tile sizes of the attention kernels: from head dimension, dtype, device capability and the kind of mask.

What a sequence's result is, bit by bit, depends on these and on its own length, so no tuner runs and no batch is asked.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..ragged import INTERPRETED
from .masks import AttentionMask


class Tiles(NamedTuple):
    """One kernel's launch: BLOCK_M query rows, BLOCK_N keys, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class AttentionTiles(NamedTuple):
    """Every kernel's tiles. Sequences of at most `short` tokens are computed whole, by one program a key/value head."""

    short: int
    forward: Tiles
    backward_dq: Tiles
    backward_dkv: Tiles
    short_forward: Tiles
    short_backward: Tiles

    def shape_arguments(self, q: Tensor, k: Tensor) -> dict:
        """Keyword arguments that every attention kernel takes for q (T, H, D) and k (T, G, D)."""
        return {
            "GROUP_SIZE": q.shape[1] // k.shape[1],
            "HEAD_DIM": q.shape[2],
            "BLOCK_D": padded_head_dim(q.shape[2]),
            "SHORT": self.short,
            "UPCAST": INTERPRETED and q.dtype == torch.bfloat16,
        }


INTERPRETER = AttentionTiles(
    short=16,
    forward=Tiles(32, 16, 1, 1),
    backward_dq=Tiles(32, 16, 1, 1),
    backward_dkv=Tiles(16, 32, 1, 1),
    short_forward=Tiles(32, 16, 1, 1),
    short_backward=Tiles(32, 16, 1, 1),
)

# by the padded head dimension; chosen by compiling: the widest tiles that keep every value in registers
SIXTEEN_BIT = {
    64: AttentionTiles(
        short=64,
        forward=Tiles(128, 64, 8, 3),
        backward_dq=Tiles(128, 64, 8, 2),
        backward_dkv=Tiles(64, 128, 8, 2),
        short_forward=Tiles(64, 64, 4, 2),
        short_backward=Tiles(64, 64, 4, 1),
    ),
    128: AttentionTiles(
        short=64,
        forward=Tiles(128, 64, 8, 3),
        backward_dq=Tiles(128, 64, 8, 2),
        backward_dkv=Tiles(32, 128, 8, 2),
        short_forward=Tiles(64, 64, 4, 2),
        short_backward=Tiles(64, 64, 8, 1),
    ),
    256: AttentionTiles(
        short=32,
        forward=Tiles(64, 32, 4, 2),
        backward_dq=Tiles(64, 32, 8, 2),
        backward_dkv=Tiles(32, 64, 8, 2),
        short_forward=Tiles(64, 32, 8, 2),
        short_backward=Tiles(32, 32, 8, 1),
    ),
}

# looking at positions, and drawing a mask, take registers that wider tiles do not have
SIXTEEN_BIT_WINDOW = SIXTEEN_BIT | {128: SIXTEEN_BIT[128]._replace(short_backward=Tiles(16, 64, 4, 1))}
SIXTEEN_BIT_RANDOM = SIXTEEN_BIT_WINDOW | {
    64: SIXTEEN_BIT[64]._replace(backward_dkv=Tiles(64, 64, 8, 2), short_backward=Tiles(64, 64, 8, 1)),
    128: SIXTEEN_BIT_WINDOW[128]._replace(backward_dkv=Tiles(32, 64, 8, 2)),
}

# consumer chips (8.6, 8.9, 12.x) have 99 KiB of shared memory to a block instead of 163 or more
SIXTEEN_BIT_SMALL = {
    64: SIXTEEN_BIT_RANDOM[64],
    128: AttentionTiles(
        short=32,
        forward=Tiles(64, 64, 4, 2),
        backward_dq=Tiles(64, 32, 4, 2),
        backward_dkv=Tiles(32, 64, 8, 1),
        short_forward=Tiles(64, 32, 4, 1),
        short_backward=Tiles(32, 32, 4, 1),
    ),
    256: AttentionTiles(
        short=16,
        forward=Tiles(32, 32, 4, 1),
        backward_dq=Tiles(32, 32, 8, 1),
        backward_dkv=Tiles(32, 32, 8, 1),
        short_forward=Tiles(32, 16, 4, 1),
        short_backward=Tiles(32, 16, 8, 1),
    ),
}

# true float32 products run outside the tensor cores, with both operands in registers: small tiles
FLOAT32 = {
    64: AttentionTiles(
        short=32,
        forward=Tiles(64, 32, 8, 2),
        backward_dq=Tiles(64, 32, 8, 2),
        backward_dkv=Tiles(32, 64, 8, 2),
        short_forward=Tiles(32, 32, 4, 1),
        short_backward=Tiles(32, 32, 8, 1),
    ),
    128: AttentionTiles(
        short=32,
        forward=Tiles(32, 32, 8, 2),
        backward_dq=Tiles(32, 32, 8, 2),
        backward_dkv=Tiles(32, 32, 8, 2),
        short_forward=Tiles(32, 32, 8, 1),
        short_backward=Tiles(16, 32, 8, 1),
    ),
    256: AttentionTiles(
        short=16,
        forward=Tiles(32, 16, 8, 1),
        backward_dq=Tiles(16, 16, 8, 1),
        backward_dkv=Tiles(16, 32, 8, 1),
        short_forward=Tiles(16, 16, 8, 1),
        short_backward=Tiles(16, 16, 8, 1),
    ),
}


def attention_tiles(head_dim: int, dtype: torch.dtype, device: torch.device, mask: AttentionMask) -> AttentionTiles:
    if device.type != "cuda":
        return INTERPRETER
    return tiles_for(padded_head_dim(head_dim), dtype, device_capability(device), mask)


def padded_head_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def tiles_for(block_d: int, dtype: torch.dtype, capability: tuple[int, int], mask: AttentionMask) -> AttentionTiles:
    """Tiles for a head dimension padded to `block_d`, a power of two from 16 to 256."""
    if dtype == torch.float32:
        return FLOAT32[max(64, block_d)]
    if capability[0] >= 12 or (capability[0] == 8 and capability[1] > 0):
        return SIXTEEN_BIT_SMALL[max(64, block_d)]
    if mask.random:
        return SIXTEEN_BIT_RANDOM[max(64, block_d)]
    return (SIXTEEN_BIT_WINDOW if mask.windowed else SIXTEEN_BIT)[max(64, block_d)]


@functools.cache
def device_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
