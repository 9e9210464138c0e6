import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.engine.packing import PackedBatch, pack


@settings(deadline=None, derandomize=True, max_examples=60)
@given(lengths=st.lists(st.integers(1, 64), max_size=200), max_sequences=st.integers(1, 50))
def test_every_sequence_is_in_one_slab_within_its_limits(lengths, max_sequences):
    slabs = list(pack(lengths, 64, max_sequences))
    assert sorted(index for slab in slabs for index in slab) == list(range(len(lengths)))
    for slab in slabs:
        chosen = [lengths[index] for index in slab]
        assert sum(chosen) <= 64
        assert 1 <= len(chosen) <= max_sequences
        assert chosen == sorted(chosen, reverse=True)


def test_best_fit_fills_slabs():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 200, (2000,), generator=generator).tolist()
    slabs = list(pack(lengths, 4096, 1024))
    assert sum(lengths) / (4096 * len(slabs)) > 0.97


@pytest.mark.parametrize("lengths", [[0, 3], [65]])
def test_sequences_that_fit_no_slab_are_refused(lengths):
    with pytest.raises(ValueError, match="lengths must be from 1 to 64"):
        list(pack(lengths, 64, 10))


def test_packed_batch_positions_bounds_and_runs():
    batch = PackedBatch.from_sequences([[7, 8, 9], [1, 2, 3], [4], [5], [6, 6]], pool_starts=[1, 0, 0, 0, 1])
    assert batch.input_ids.tolist() == [7, 8, 9, 1, 2, 3, 4, 5, 6, 6]
    assert batch.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 6, 7, 8, 10]
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.equal_length_runs == ((0, 2, 3), (6, 2, 1), (8, 1, 2))
    assert batch.pool_starts.tolist() == [1, 0, 0, 0, 1]
    assert batch.max_seqlen == 3


def test_empty_batch():
    batch = PackedBatch.from_sequences([])
    assert batch.num_tokens == 0
    assert batch.cu_seqlens.tolist() == [0]
    assert batch.equal_length_runs == ()
