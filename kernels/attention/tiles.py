"""Tile sizes of the attention kernels: from head dimension, dtype, device capability and the kind of mask.

What a sequence's result is, bit by bit, depends on these and on its own length, so no batch is asked and nothing is
tuned while it runs: the table beside this file is committed. Its tiles were chosen by compiling, the widest that keep
every value in registers: looking at positions and drawing a mask take some that wider tiles do not have, true float32
products run outside the tensor cores with both operands in registers, and consumer chips (8.6, 8.9, 12.x) have 99 KiB
of shared memory to a block instead of 163 or more.
"""

import functools
import json
from pathlib import Path
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

TABLE = Path(__file__).with_name("tiles.json")


@functools.cache
def load_table() -> dict[str, AttentionTiles]:
    """`tiles.json`: what tells a configuration from the others, as "sm_90 16-bit D128 window", to its tiles.

    D64 stands for every head dimension up to 64, `window` for causal masks too, and `random` for dropout and annealed
    masks with or without a window.
    """
    table = json.loads(TABLE.read_text())
    return {
        name: AttentionTiles(short=row.pop("short"), **{kernel: Tiles(*tile) for kernel, tile in row.items()})
        for name, row in table.items()
    }


def write_table(table: dict[str, AttentionTiles], path: Path = TABLE) -> None:
    """Write `tiles.json` anew, a row to a line; what runs has the old one until `load_table.cache_clear()`."""
    rows = [f"  {json.dumps(name)}: {json.dumps(tiles._asdict())}" for name, tiles in table.items()]
    path.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def attention_tiles(head_dim: int, dtype: torch.dtype, device: torch.device, mask: AttentionMask) -> AttentionTiles:
    if device.type != "cuda":
        return INTERPRETER
    return tiles_for(padded_head_dim(head_dim), dtype, torch.cuda.get_device_capability(device), mask)


def padded_head_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def tiles_for(block_d: int, dtype: torch.dtype, capability: tuple[int, int], mask: AttentionMask) -> AttentionTiles:
    """Tiles for a head dimension padded to `block_d`, a power of two from 16 to 256."""
    kind = "random" if mask.random else "window" if mask.windowed else "plain"
    return load_table()[row_name(block_d, dtype, capability, kind)]


def row_name(block_d: int, dtype: torch.dtype, capability: tuple[int, int], kind: str) -> str:
    """Which row of the table is a device's, for a kind of mask: plain, window or random."""
    return f"sm_{_listed_architecture(capability)} {dtype.itemsize * 8}-bit D{max(64, block_d)} {kind}"


@functools.cache
def _listed_architecture(capability: tuple[int, int]) -> int:
    """The newest architecture in the table that is not newer than the device."""
    listed = {int(name.split()[0].removeprefix("sm_")) for name in load_table()}
    number = capability[0] * 10 + capability[1]
    return max((known for known in listed if known <= number), default=min(listed))
