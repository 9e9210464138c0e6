"""Which rows make the batch of a step: a pure function of seed, epoch and step, the same on every machine."""

from collections.abc import Callable, Sequence

import numpy as np

Order = Callable[[int], tuple[int, list[int]]]  # a step's data set and rows


def random_words(count: int, *key: int) -> np.ndarray:
    """`count` uniform 64-bit words, uint64, that depend on the integers of `key` (at least 0) and on nothing else.

    Words, not the draws of `numpy.random.Generator`: NumPy promises only of the bit stream that it stays as it is.
    """
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


class BatchOrder:
    """`order(step)` is the data set and the rows of a global step's batch.

    In each epoch the rows of every data set are shuffled and cut into batches, the incomplete last one is dropped, and
    the batches of all sets are shuffled together. Calls may come in any order; an epoch's order is made once and kept
    until a step of another epoch is asked for.

    Args:
        sizes: rows of each data set.
        batch_size: rows of a batch, all from one data set.
        seed: at least 0.
        names: what an error calls the data sets, one each; default their numbers.
    Raises:
        ValueError: a data set has fewer rows than a batch, or an argument is out of range.
    """

    def __init__(self, sizes: Sequence[int], batch_size: int, seed: int, *, names: Sequence[str] | None = None):
        if not sizes:
            raise ValueError("sizes must name at least one data set, got none")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        for dataset, size in enumerate(sizes):
            if size < batch_size:
                name = f"data set {dataset}" if names is None else names[dataset]
                raise ValueError(
                    f"batch_size must be at most the rows of each data set, got {batch_size}: {name} has {size}"
                )
        self._sizes = tuple(sizes)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = -1
        self._rows: list[np.ndarray] = []  # of each data set, in this epoch's order
        self._batches = np.empty((0, 2), dtype=np.int64)  # of this epoch: data set, number of the batch in it
        self.steps_per_epoch = sum(size // batch_size for size in sizes)

    def __call__(self, step: int) -> tuple[int, list[int]]:
        """The data set and the row indices of global step `step`, from 0."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        dataset, batch = self._batches[place].tolist()
        first = batch * self._batch_size
        return dataset, self._rows[dataset][first : first + self._batch_size].tolist()

    def _shuffle(self, epoch: int) -> None:
        self._rows = [_permutation(size, self._seed, epoch, dataset) for dataset, size in enumerate(self._sizes)]
        counts = [size // self._batch_size for size in self._sizes]
        datasets = np.repeat(np.arange(len(counts)), counts)
        batches = np.concatenate([np.arange(count) for count in counts])
        order = _permutation(self.steps_per_epoch, self._seed, epoch, len(counts))
        self._batches = np.stack([datasets, batches], axis=1)[order]
        self._epoch = epoch


def _permutation(size: int, *key: int) -> np.ndarray:
    """Of `range(size)`, by sorting random words: two of a million are equal once in 4e7 permutations."""
    return np.argsort(random_words(size, *key), kind="stable")
