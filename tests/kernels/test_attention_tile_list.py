"""The list of a pass's tiles: the same as a plain one, enough of it for any lengths, one for all layers."""

import itertools
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.kernels.attention import list_tiles, operator, tile_list, varlen_attention

ROWS = tile_list.TILE_ROWS


def plain_list(cu_seqlens, num_tokens):
    """(sequence, its first packed row, its length, the tile's first row in it) of every tile, without the idle ones."""
    bounds = [*cu_seqlens.tolist(), num_tokens]
    parts = [(stop - start, s, start) for s, (start, stop) in enumerate(itertools.pairwise(bounds))]
    length, _, start = parts.pop()
    tail = (length, -1, start)
    parts.sort(key=lambda part: -part[0])  # stable
    return [
        [sequence, start, length, row]
        for length, sequence, start in (tail, *parts)
        for row in reversed(range(0, length, ROWS))
    ]


LENGTHS = st.lists(st.one_of(st.integers(0, 3), st.integers(0, 5 * ROWS), st.just(2 * ROWS)), max_size=150)


@settings(max_examples=20, derandomize=True, deadline=None)
@given(lengths=LENGTHS, tail=st.integers(0, 200))
def test_the_list_is_the_plain_one(lengths, tail):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    num_tokens = sum(lengths) + tail
    listed, expected = list_tiles(cu_seqlens, num_tokens).tolist(), plain_list(cu_seqlens, num_tokens)
    assert listed[: len(expected)] == expected
    assert all(row == [0, 0, 0, 0] for row in listed[len(expected) :])


@pytest.mark.parametrize("lengths", [[1] * 1100, [0] * 700 + [9 * ROWS] + [0] * 700, [3 * ROWS + 1, 2] * 130])
def test_of_many_sequences(device, lengths):
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    expected = plain_list(cu_seqlens, sum(lengths) + ROWS + 1)
    assert list_tiles(cu_seqlens, sum(lengths) + ROWS + 1).tolist()[: len(expected)] == expected


@settings(max_examples=300, derandomize=True, deadline=None)
@given(lengths=LENGTHS, tail=st.integers(0, 200), short=st.integers(0, 3 * ROWS))
def test_no_lengths_have_more_tiles_than_the_grid(lengths, tail, short):
    """Of the tail and the sequences above `short`, which stand at the front."""
    tiles = [-(-length // ROWS) for length in lengths if length > short]
    used = -(-tail // ROWS) + sum(tiles)
    assert used <= tile_list.max_tiles(sum(lengths) + tail, len(lengths), short)


@pytest.mark.parametrize("short", [ROWS // 4, ROWS // 2, ROWS])  # of 50 sequences
def test_the_grid_is_no_larger_than_the_worst_lengths_need(short):
    length = short + 1
    tiles = 50 * -(-length // ROWS)
    assert tile_list.max_tiles(50 * length, 1000, short) <= tiles + 2
    assert tile_list.max_tiles(50 * length, 1, short) <= 2 + 50 * length // ROWS


def test_one_list_serves_layers_and_their_backward(device, gradients):
    """A shared list gives the bits of one made by the call, and neither pass makes another."""
    inputs = [torch.randn(150, heads, 32, device=device) for heads in (4, 2, 2)]
    upstream = torch.randn(150, 4, 32, device=device)
    cu_seqlens = torch.tensor([0, 3, 70, 140], dtype=torch.int32, device=device)
    expected = gradients(varlen_attention, inputs, upstream, cu_seqlens, 70)
    shared = list_tiles(cu_seqlens, 150)
    with mock.patch.object(tile_list, "make_tile_list", None):
        computed = gradients(varlen_attention, inputs, upstream, cu_seqlens, 70, tile_list=shared)
    for ours, theirs in zip(computed, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_sequences_stand_where_the_list_says_and_not_in_its_order(device):
    """Batch invariance holds whatever the order of the tiles: a shuffled list gives the same bits."""
    inputs = [torch.randn(150, heads, 32, device=device) for heads in (4, 2, 2)]
    cu_seqlens = torch.tensor([0, 40, 80, 149], dtype=torch.int32, device=device)
    listed = list_tiles(cu_seqlens, 150)
    tiles = operator.attention_tiles(
        32, torch.float32, torch.device(device), operator.AttentionMask(-1, -1, 0, 1, None, None)
    )
    front = tile_list.max_tiles(150, 3, tiles.short)
    order = torch.cat([torch.randperm(front), torch.arange(front, len(listed))]).to(device)
    expected = varlen_attention(*inputs, cu_seqlens, 70, tile_list=listed)
    assert torch.equal(varlen_attention(*inputs, cu_seqlens, 70, tile_list=listed[order].contiguous()), expected)
