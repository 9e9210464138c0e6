"""The order of batches: every row at most once an epoch, a pure function of seed, epoch and step."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.training.batches import BatchOrder

few = settings(max_examples=50, derandomize=True, deadline=None)


def epoch_of(order: BatchOrder, epoch: int) -> list[tuple[int, list[int]]]:
    return [order(step) for step in range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)]


@few
@given(st.integers(1, 7), st.lists(st.integers(0, 30), min_size=1, max_size=4), st.integers(0, 2**63))
def test_an_epoch_takes_whole_batches_of_one_data_set_and_no_row_twice(batch_size, extra, seed):
    sizes = [batch_size + more for more in extra]
    order = BatchOrder(sizes, batch_size, seed)
    assert order.steps_per_epoch == sum(size // batch_size for size in sizes)
    for epoch in (0, 1):
        batches = epoch_of(order, epoch)
        assert all(len(rows) == batch_size for _, rows in batches)
        for dataset, size in enumerate(sizes):
            rows = [row for chosen, batch in batches if chosen == dataset for row in batch]
            assert len(rows) == size // batch_size * batch_size
            assert len(set(rows)) == len(rows)
            assert set(rows) <= set(range(size))


@few
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(0, 5))
def test_a_step_does_not_depend_on_the_steps_asked_before(steps, seed):
    sizes, used = [11, 30, 8], BatchOrder([11, 30, 8], 4, seed)
    for step in steps:
        assert used(step) == BatchOrder(sizes, 4, seed)(step)


def test_epochs_seeds_and_data_sets_are_shuffled_on_their_own():
    order = BatchOrder([100, 100], 10, seed=3)
    first, second = epoch_of(order, 0), epoch_of(order, 1)
    assert first != second
    assert first != epoch_of(BatchOrder([100, 100], 10, seed=4), 0)
    by_set = [[batch for chosen, batch in first if chosen == dataset] for dataset in (0, 1)]
    assert by_set[0] != by_set[1]
    datasets = [dataset for dataset, _ in first]
    assert datasets != sorted(datasets)
    assert datasets != [dataset for dataset, _ in second]
    assert sorted(row for batch in by_set[0] for row in batch) == list(range(100))


def test_the_order_is_the_one_that_earlier_runs_had():
    order = BatchOrder([5, 7], 3, seed=1)
    assert [order(step) for step in range(6)] == [
        (1, [5, 0, 2]),
        (0, [2, 4, 0]),
        (1, [3, 1, 4]),
        (1, [6, 4, 1]),
        (1, [2, 5, 0]),
        (0, [3, 0, 2]),
    ]


def test_all_rows_are_about_as_likely_in_a_first_batch():
    counts = [0] * 40
    for seed in range(400):
        for row in BatchOrder([40], 20, seed)(0)[1]:
            counts[row] += 1
    assert all(140 < count < 260 for count in counts)  # 200 each, standard deviation 10


def test_what_cannot_be_ordered_is_refused():
    with pytest.raises(ValueError, match=r"batch_size must be at most the rows of each data set, got 8: b\.csv has 7"):
        BatchOrder([8, 7], 8, 0, names=["a.csv", "b.csv"])
    with pytest.raises(ValueError, match="got 8: data set 1 has 0"):
        BatchOrder([8, 0], 8, 0)
    with pytest.raises(ValueError, match="sizes must name at least one data set"):
        BatchOrder([], 8, 0)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        BatchOrder([8], 0, 0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        BatchOrder([8], 8, -1)
