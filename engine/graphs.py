"""Passes captured as CUDA graphs: hundreds of launches become one, which the host has done before the device is.

A graph works on the memory it was captured with. So each has a capacity of tokens and sequences, a batch is copied into
its inputs, what is left of them are empty sequences, and what it computed is copied out before the next one runs,
whatever stream the next caller has.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from .config import Window
from .packing import SLAB_SEQUENCES, PackedBatch

logger = logging.getLogger(__name__)

Run = Callable[[PackedBatch, Sequence[Window]], torch.Tensor]


class Capture(Protocol):
    """How passes are captured: `CudaCapture`, or a stand-in."""

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        """What runs `run` again, and its output, a tensor that is written each time."""

    def in_order(self):
        """A context: the device does what is begun within after all that was begun within before."""

    def forget(self) -> None:
        """Nothing that was captured will run again: its memory may go."""


class CapturedPasses:
    """Runs batches through `run(batch, windows)`, captured once for each capacity and windows that are met.

    `run` must compute a token's row from its own sequence alone, read no length back to the host, and not depend on
    `seqlens`, of which a captured batch has none to tell. What cannot be captured is launched, with the same bits.
    """

    def __init__(self, run: Run, capture: Capture):
        self._run, self._capture = run, capture
        self._passes: dict[tuple, _CapturedPass | None] = {}
        self._lock = threading.Lock()  # passes share their inputs and their memory

    def __call__(self, batch: PackedBatch, windows: Sequence[Window], capacity: int) -> torch.Tensor:
        """The rows of the batch, `(T, E)`.

        Args:
            capacity: tokens of the graph, at least T.
        Raises:
            torch.OutOfMemoryError: there is no memory for the pass, or for its graph beside those that there are.
        """
        if len(batch.seqlens) <= SLAB_SEQUENCES:
            with self._lock, self._capture.in_order():
                captured = self._captured(batch, windows, capacity)
                if captured is not None:
                    return captured(batch)
        return self._run(batch, windows)

    def forget(self) -> None:
        """Drop all graphs, and with them the memory that they keep; passes that are run again are captured again."""
        with self._lock:
            self._capture.forget()
            self._passes.clear()

    def _captured(self, batch: PackedBatch, windows: Sequence[Window], capacity: int) -> "_CapturedPass | None":
        key = (capacity, *windows)
        if key not in self._passes:
            try:
                self._passes[key] = _CapturedPass(self._run, self._capture, windows, capacity, batch.input_ids.device)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:  # of what memory ran out too: CUDA may only say that the capture is invalid
                logger.warning("a pass of %d tokens cannot be captured and is launched: %s", capacity, error)
                self._passes[key] = None
        return self._passes[key]


class _CapturedPass:
    def __init__(
        self, run: Run, capture: Capture, windows: Sequence[Window], num_tokens: int, device: torch.device
    ) -> None:
        input_ids, positions = torch.zeros(2, num_tokens, dtype=torch.int64, device=device)
        cu_seqlens, pool_starts = torch.zeros(2, SLAB_SEQUENCES + 1, dtype=torch.int32, device=device)
        self._batch = PackedBatch(input_ids, positions, cu_seqlens, seqlens=(), pool_starts=pool_starts[1:])
        self._replay, self._output = capture(lambda: run(self._batch, windows))

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        num_tokens, num_bounds = batch.num_tokens, len(batch.seqlens) + 1
        self._batch.input_ids[:num_tokens].copy_(batch.input_ids)
        self._batch.positions[:num_tokens].copy_(batch.positions)
        self._batch.cu_seqlens[:num_bounds].copy_(batch.cu_seqlens)
        self._batch.cu_seqlens[num_bounds:].fill_(num_tokens)
        self._replay()
        return self._output[:num_tokens].clone()


class CudaCapture:
    """Captures on a device into one pool of memory: graphs that never run at the same time may share it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # graphs share what was captured on one stream
        self._done = torch.cuda.Event()

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()  # compiles kernels and lets libraries take their memory, which a capture may not
                graph = torch.cuda.CUDAGraph()
                output = self._capture(graph, run)
            torch.cuda.current_stream().wait_stream(self._stream)
        return graph.replay, output

    def _capture(self, graph: torch.cuda.CUDAGraph, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `torch.cuda.graph` does, whose end leaves torch's allocator unusable where CUDA ends no capture."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # what the first run took, for the graph
        ended = False
        try:
            # other threads may use the device meanwhile
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                return run()
            finally:
                graph.capture_end()
                ended = True
        except BaseException:
            if not ended:
                torch._C._cuda_endAllocateToPool(self._stream.device_index, self._pool)
                torch._C._cuda_releasePool(self._stream.device_index, self._pool)
            self._pool = torch.cuda.graph_pool_handle()  # one whose last graph is gone cannot be used again
            raise

    @contextmanager
    def in_order(self) -> Iterator[None]:
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(self._done)
        try:
            yield
        finally:
            self._done.record(stream)

    def forget(self) -> None:
        torch.cuda.synchronize(self._device)
        self._pool = torch.cuda.graph_pool_handle()
