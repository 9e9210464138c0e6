"""The committed table of tiles: every configuration has a row, and each row keeps the kernels' rules."""

import itertools

import pytest
import torch

from bivec.kernels.attention import tiles
from bivec.kernels.attention.masks import AttentionMask
from bivec.kernels.attention.tiles import load_table, padded_head_dim, tiles_for, write_table

LIST_ROWS = 128  # what a row of the tile list holds on a GPU
MASKS = {
    "plain": AttentionMask(-1, -1, 0.0, 1.0, None, None),
    "window": AttentionMask(-1, 0, 0.0, 1.0, None, None),
    "random": AttentionMask(5, 5, 0.1, 1.0, None, None),
}


@pytest.mark.parametrize("name", load_table())
def test_a_row_keeps_the_rules_of_the_kernels(name):
    row = load_table()[name]
    for tile in row[1:]:
        for number in tile:
            assert number & (number - 1) == 0 or number == tile.num_stages, name  # a power of two
        assert min(tile.block_m, tile.block_n) >= 16
    for block in (row.forward.block_m, row.backward_dq.block_m, row.backward_dkv.block_n):
        assert LIST_ROWS % block == 0
    for tile in (row.short_forward, row.short_backward):
        assert tile.block_n >= row.short, "a short sequence's keys are one block"


def test_every_device_dtype_head_dimension_and_mask_has_a_row():
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for major, dtype, head_dim, mask in itertools.product(range(7, 14), dtypes, range(16, 257), MASKS.values()):
        tiles_for(padded_head_dim(head_dim), dtype, (major, 0), mask)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((7, 5), 80), ((8, 0), 80), ((8, 9), 86), ((9, 0), 90), ((10, 3), 100), ((12, 1), 120)],
)
def test_a_device_takes_the_newest_architecture_that_is_not_newer(capability, architecture):
    for kind, mask in MASKS.items():
        row = tiles_for(32, torch.float16, capability, mask)
        assert row is load_table()[f"sm_{architecture} 16-bit D64 {kind}"]


def test_the_file_has_the_layout_that_is_written(tmp_path):
    write_table(load_table(), tmp_path / "tiles.json")
    assert (tmp_path / "tiles.json").read_text() == tiles.TABLE.read_text()
