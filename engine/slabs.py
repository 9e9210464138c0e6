"""Texts into slabs, each of them one pass of the model: how large they are, and which run at the same time.

No vector depends on any of it. On the CPU several passes run side by side, each with its part of the cores, where there
are enough of them: a product that all cores share waits for the slowest, and what stands between products is too small
to be shared. On CUDA one pass is launched ahead. Where memory cannot hold a slab, smaller ones are made.
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import numpy as np
import torch

from .cores import check_cores
from .packing import SLAB_SEQUENCES, PackedBatch, pack
from .tokens import Tokenized

logger = logging.getLogger(__name__)

_TOKENS = {"cpu": 4096, "cuda": 8192}
_PASSES_A_THREAD = 8  # so that all threads end at about the same time

Slab = TypeVar("Slab")
Result = TypeVar("Result")


class Slabs:
    """Divides texts into slabs for one model.

    Args:
        longest: tokens of a text, which a slab must hold.
        at_once: passes that may run side by side.
        cores_each: of such a pass; default an equal part of all.
        tile: tokens of the fastest pass; slabs are not made smaller for the sake of others.
        release: gives back what memory can be spared, such as captured graphs; called where memory runs out.

    Attributes:
        tokens: what a slab holds at most; it becomes less where memory runs out, and is more than usual only where a
            text is.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        longest: int,
        at_once: int,
        tile: int,
        cores_each: int | None = None,
        release: Callable[[], object] = lambda: None,
    ):
        self.tokens = max(_TOKENS[device.type], longest)
        self._device, self._at_once, self._cores_each, self._tile = device, at_once, cores_each, tile
        self._release = release

    def map(self, run: Callable[[list[int], PackedBatch], Result], texts: Sequence[Tokenized]) -> Iterator[Result]:
        """`run(slab, batch)` of packed batches that hold all texts, in any order; a slab is the texts' places.

        Raises:
            RuntimeError: memory cannot hold the longest text, or this process is a fork that cannot compute.
        """

        def run_slab(slab: list[int]) -> tuple[list[int], Result]:
            chosen = [texts[place] for place in slab]
            starts = [text.pool_start for text in chosen]
            batch = PackedBatch.from_sequences([text.ids for text in chosen], starts, self._device)
            with torch.autocast(self._device.type, enabled=False):  # the caller's, which threads of ours do not have
                return slab, run(slab, batch)

        if self._device.type == "cpu":
            check_cores()
        left = set(range(len(texts)))
        while left:
            slabs = self._divide(texts, sorted(left))
            if self._at_once > 1 and len(slabs) >= 2 * self._at_once:
                results = run_side_by_side(run_slab, slabs, self._at_once, self._cores_each)
            elif self._device.type == "cuda":
                results = run_one_ahead(run_slab, slabs)
            else:
                results = map(run_slab, slabs)
            try:
                for slab, result in results:
                    left.difference_update(slab)
                    yield result
            except torch.OutOfMemoryError as error:
                self._take_less(max(len(texts[place].ids) for place in left), error)

    def _divide(self, texts: Sequence[Tokenized], places: Sequence[int]) -> list[list[int]]:
        lengths = [len(texts[place].ids) for place in places]
        # a model that takes very long texts packs others as any does
        tokens = min(self.tokens, max(_TOKENS[self._device.type], *lengths))
        if self._at_once > 1:
            share = sum(lengths) // (_PASSES_A_THREAD * self._at_once)
            tokens = min(tokens, max(share // self._tile * self._tile, self._tile, *lengths))
        return [[places[index] for index in slab] for slab in pack(lengths, tokens, SLAB_SEQUENCES)]

    def _take_less(self, longest: int, error: torch.OutOfMemoryError) -> None:
        smaller = max(self.tokens // 2, longest)
        self._release()
        if smaller == self.tokens:
            raise RuntimeError(f"out of memory with a text of {longest} tokens: choose a smaller max_length") from error
        logger.warning("out of memory with passes of %d tokens: from here on of %d", self.tokens, smaller)
        self.tokens = smaller
        error.__traceback__ = None  # its frames hold the pass's tensors
        torch.cuda.empty_cache()


def run_one_ahead(run: Callable[[Slab], Result], slabs: Iterable[Slab]) -> Iterator[Result]:
    """`run(slab)` of each slab, one later than it was launched: the host packs a slab while the device computes one."""
    launched: list[Result] = []
    for slab in slabs:
        launched.append(run(slab))
        if len(launched) > 1:
            yield launched.pop(0)
    yield from launched


class OnHost:
    """A tensor on its way to the host: from CUDA it is copied into pinned memory behind what computes it."""

    def __init__(self, tensor: torch.Tensor):
        self._copied = None
        self._tensor = tensor
        if tensor.is_cuda:
            self._tensor = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor.copy_(tensor, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(tensor.device))

    def numpy(self) -> np.ndarray:
        """Waits until it has arrived."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._tensor.numpy()


def run_side_by_side(
    run: Callable[[Slab], Result], slabs: Sequence[Slab], at_once: int, cores_each: int | None = None
) -> Iterator[Result]:
    """`run(slab)` of each slab as they are done, in threads that compute with a few cores each.

    Args:
        slabs: at least one a thread; those that take longest first.
        cores_each: default an equal part of those that torch computes with in this thread.
    """
    all_cores = torch.get_num_threads()
    cores = cores_each or max(all_cores // at_once, 1)
    started = threading.Barrier(at_once + 1)

    def start() -> None:
        torch.get_num_threads()  # the first use sets the thread's number to the process's, which is restored below
        torch.set_num_threads(cores)  # in this thread, and in all that first compute later
        started.wait()

    pool = ThreadPoolExecutor(at_once, "bivec-pass", start)
    try:
        try:
            results = [pool.submit(run, slab) for slab in slabs]
            started.wait()
        except BaseException:
            started.abort()  # threads that wait for one that could not be started
            raise
        torch.set_num_threads(all_cores)  # as it was, for this thread and later ones
        for result in as_completed(results):
            yield result.result()
    finally:
        pool.shutdown(cancel_futures=True)
