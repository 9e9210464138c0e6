"""Passes captured as CUDA graphs: hundreds of launches become one, which the host has done before the device is.

A graph works on the memory it was captured with. So each has a capacity of tokens and sequences, a batch is copied into
its inputs, what is left of them are empty sequences, and what it computed is copied out before the next one runs.
"""

import threading
from collections.abc import Callable, Sequence

import torch

from .config import Window
from .packing import SLAB_SEQUENCES, PackedBatch

Run = Callable[[PackedBatch, Sequence[Window]], torch.Tensor]
# of a function without arguments whose output is a tensor: what runs it again, and that tensor, written each time
Capture = Callable[[Callable[[], torch.Tensor]], tuple[Callable[[], object], torch.Tensor]]


class CapturedPasses:
    """Runs batches through `run(batch, windows)`, captured once for each capacity and windows that are met.

    `run` must compute a token's row from its own sequence alone, read no length back to the host, and not depend on
    `seqlens`, of which a captured batch has none to tell.
    """

    def __init__(self, run: Run, capture: Capture):
        self._run, self._capture = run, capture
        self._passes: dict[tuple, _CapturedPass] = {}
        self._lock = threading.Lock()  # passes share their inputs, and what is done on the device follows the calls

    def __call__(self, batch: PackedBatch, windows: Sequence[Window], capacity: int) -> torch.Tensor:
        """The rows of the batch, `(T, E)`.

        Args:
            capacity: tokens of the graph, at least T.
        """
        if len(batch.seqlens) > SLAB_SEQUENCES:
            return self._run(batch, windows)
        key = (capacity, *windows)
        with self._lock:
            if key not in self._passes:
                self._passes[key] = _CapturedPass(self._run, self._capture, windows, capacity, batch.input_ids.device)
            return self._passes[key](batch)


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

    def __call__(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], object], torch.Tensor]:
        with torch.cuda.device(self._device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                run()  # compiles kernels and lets libraries take their memory, which a capture may not
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # other threads may use the device meanwhile
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                output = run()
        return graph.replay, output
