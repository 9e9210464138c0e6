"""Captured passes, with a stand-in for the capture: what one batch leaves behind must not reach the next.

What CUDA would do is written down by stand-ins too: which stream waits for what, and what a failed capture leaves.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bivec import Encoder
from bivec.engine import graphs
from bivec.engine.graphs import CapturedPasses
from bivec.engine.layers import LAYERS, CudaLayer
from bivec.engine.model import LlamaModel
from bivec.engine.packing import PackedBatch
from bivec.engine.runner import Runner
from bivec.engine.weights import load_model

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
BATCHES = [
    [list(range(5, 40)), [7], list(range(60, 72))],
    [[3, 4]],
    [[9] * 50, [8] * 14],
    [list(range(5, 40)), [7], list(range(60, 72))],
    [[5, 6], [7]],
]


class Captures:
    """Like a graph: what was captured runs again on the same memory, inputs and output alike."""

    def __init__(self):
        self.captured = 0
        self.replayed = 0

    def __call__(self, run):
        self.captured += 1
        output = run()

        def replay():
            self.replayed += 1
            output.copy_(run())

        return replay, output

    def in_order(self):
        return contextlib.nullcontext()

    def forget(self):
        self.captured = 0


@pytest.fixture
def runner(tiny_llama_folder, monkeypatch):
    monkeypatch.setitem(LAYERS, "cpu", CudaLayer)
    monkeypatch.setattr(graphs, "SLAB_SEQUENCES", 6)  # each takes the interpreter time
    return Runner(load_model(LlamaModel, tiny_llama_folder, torch.float32).eval(), "triton")


def test_each_batch_gets_the_bits_of_its_own_pass(runner):
    captures = Captures()
    expected = [runner(PackedBatch.from_sequences(sequences)) for sequences in BATCHES]
    causal = [(-1, 0)] * len(runner.layers)
    expected_causal = runner(PackedBatch.from_sequences(BATCHES[0]), causal)
    runner._captured = CapturedPasses(runner._run, captures)
    found = [runner(PackedBatch.from_sequences(sequences)) for sequences in BATCHES]
    assert all(map(torch.equal, found, expected))
    assert torch.equal(runner(PackedBatch.from_sequences(BATCHES[0]), causal), expected_causal)
    capacities = {runner.cover(sum(map(len, sequences)))[-1].stop for sequences in BATCHES}
    assert captures.captured == len(capacities) + 1
    assert captures.replayed == len(BATCHES) + 1


def test_batches_that_no_graph_holds_run_as_they_are(runner):
    captures = Captures()
    runner._captured = CapturedPasses(runner._run, captures)
    assert runner(PackedBatch.from_sequences([])).shape == (0, 64)
    batch = PackedBatch.from_sequences([[5]] * 7)
    assert torch.equal(runner(batch), runner._run(batch, runner.config.bidirectional_windows))
    assert captures.captured == 0


class Launches(TorchDispatchMode):
    """Names of the operators of torch that write memory, but for those that only make it."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func).split(".")[1])
        return func(*args, **(kwargs or {}))


def test_a_pass_without_free_rows_writes_nothing_that_it_does_not_read(runner):
    sequences = [[5] * 30, [6] * 2]
    batch = PackedBatch.from_sequences(sequences)
    assert runner.cover(batch.num_tokens)[-1].stop == batch.num_tokens
    with Launches() as launches:
        expected = runner(batch)
    assert not {"zeros", "zero_", "new_zeros", "fill_", "copy_", "clone"} & set(launches.names)
    # as it is among others, with rows left over
    assert torch.equal(runner(PackedBatch.from_sequences([*sequences, [7]]))[:32], expected)


class NoCapture(Captures):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def __call__(self, run):
        self.captured += 1
        raise self.error


def test_what_cannot_be_captured_is_launched(runner, caplog):
    captures = NoCapture(torch.AcceleratorError("operation failed"))
    expected = runner(PackedBatch.from_sequences(BATCHES[1]))
    runner._captured = CapturedPasses(runner._run, captures)
    for _ in range(2):
        assert torch.equal(runner(PackedBatch.from_sequences(BATCHES[1])), expected)
    assert captures.captured == 1
    assert caplog.messages == ["a pass of 16 tokens cannot be captured and is launched: operation failed"]
    runner.forget_graphs()
    runner(PackedBatch.from_sequences(BATCHES[1]))
    assert captures.captured == 1


def test_a_capture_without_memory_is_tried_again_when_there_is_some(runner):
    batch = PackedBatch.from_sequences(BATCHES[1])
    expected = runner(batch)
    passes = runner._captured = CapturedPasses(runner._run, NoCapture(torch.OutOfMemoryError("no memory")))
    with pytest.raises(torch.OutOfMemoryError):
        runner(batch)
    passes._capture = Captures()
    assert torch.equal(runner(batch), expected)
    assert passes._capture.captured == 1


class FakeCuda:
    """The part of `torch.cuda` that captures use; `log` says what was done on which stream."""

    def __init__(self):
        self.log = []
        self.current = "caller"
        self.refuses = set()  # operations that raise
        self.underway = []  # pools that the allocator believes are being captured into
        self.pools = 0

    def do(self, name):
        self.log.append((name, self.current))
        if name in self.refuses:
            raise torch.AcceleratorError(f"{name} failed")

    def install(self, monkeypatch):
        cuda = self

        class Stream:
            device_index = 0

            def __init__(self, name="capture"):
                self.name = name

            def wait_stream(self, other):
                cuda.log.append((f"wait for {other.name}", self.name))

            def wait_event(self, event):
                cuda.log.append(("wait for event", self.name))

        class Event:
            def record(self, stream):
                cuda.log.append(("record", stream.name))

        class CUDAGraph:
            def capture_begin(self, pool, capture_error_mode):
                assert capture_error_mode == "thread_local"
                self.pool = pool
                cuda.underway.append(pool)
                cuda.do("begin")

            def capture_end(self):
                cuda.do("end")
                cuda.underway.remove(self.pool)

            def replay(self):
                cuda.do("replay")

        @contextlib.contextmanager
        def stream(given):
            before, cuda.current = cuda.current, given.name
            try:
                yield
            finally:
                cuda.current = before

        def graph_pool_handle():
            cuda.pools += 1
            return cuda.pools

        stand_in = SimpleNamespace(
            Stream=lambda device: Stream(),
            Event=Event,
            CUDAGraph=CUDAGraph,
            stream=stream,
            device=lambda device: contextlib.nullcontext(),
            current_stream=lambda device=None: Stream(cuda.current),
            graph_pool_handle=graph_pool_handle,
            synchronize=lambda device=None: cuda.log.append(("synchronize", cuda.current)),
            empty_cache=lambda: cuda.log.append(("empty cache", cuda.current)),
        )
        monkeypatch.setattr(graphs.torch, "cuda", stand_in)
        end = {"_cuda_endAllocateToPool": cuda.underway.remove, "_cuda_releasePool": lambda pool: None}
        for name, function in end.items():
            monkeypatch.setattr(torch._C, name, lambda device, pool, function=function: function(pool), raising=False)


@pytest.fixture
def cuda(monkeypatch):
    fake = FakeCuda()
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def run_small(cuda):
    """run_small(capacity): what a captured pass of a few tokens does; `run_small.passes` are all of them."""

    def run(batch, windows):
        cuda.do("run")
        return batch.input_ids[:, None]  # the graph's own input: what a replay would compute

    def run_small(capacity):
        batch = PackedBatch.from_sequences([[capacity + 1, 2, 3]])
        cuda.log.clear()
        assert torch.equal(run_small.passes(batch, [(-1, -1)], capacity), batch.input_ids[:, None])
        return list(cuda.log)

    run_small.passes = CapturedPasses(run, graphs.CudaCapture(torch.device("cuda", 0)))
    return run_small


def test_a_pass_runs_before_it_is_captured_and_on_a_stream_of_its_own(cuda, run_small):
    assert run_small(8) == [
        ("wait for event", "caller"),
        ("wait for caller", "capture"),
        ("run", "capture"),
        ("synchronize", "capture"),
        ("empty cache", "capture"),
        ("begin", "capture"),
        ("run", "capture"),
        ("end", "capture"),
        ("wait for capture", "caller"),
        ("replay", "caller"),
        ("record", "caller"),
    ]
    assert ("run", "capture") in run_small(16)
    assert cuda.pools == 1


def test_streams_of_callers_wait_for_each_other(cuda, run_small):
    run_small(8)
    for stream in ("first", "second"):
        cuda.current = stream
        assert run_small(8) == [("wait for event", stream), ("replay", stream), ("record", stream)]


@pytest.mark.parametrize("refused", ["begin", "end"])
def test_a_capture_that_cuda_refuses_leaves_stream_and_allocator_as_they_were(cuda, run_small, refused, caplog):
    cuda.refuses.add(refused)
    assert run_small(8)[-1] == ("run", "caller")
    assert cuda.current == "caller"
    assert cuda.underway == []  # or every `torch.cuda.empty_cache` would fail from here on
    assert cuda.pools == 2
    assert caplog.messages == [f"a pass of 8 tokens cannot be captured and is launched: {refused} failed"]
    cuda.refuses.clear()
    assert ("replay", "caller") in run_small(16)
    assert run_small(8)[-1] == ("run", "caller")
    run_small.passes.forget()
    assert ("replay", "caller") in run_small(8)
    assert cuda.pools == 3


def test_forgotten_graphs_are_done_and_give_back_their_pool(cuda, run_small):
    run_small(8)
    cuda.log.clear()
    run_small.passes.forget()
    assert cuda.log == [("synchronize", "caller")]
    assert cuda.pools == 2
    assert ("begin", "capture") in run_small(8)


def test_warming_up_runs_a_pass_of_every_size_largest_first(tiny_llama_folder, monkeypatch):
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", max_length=30)
    encoder.slabs.tokens = 100
    passes = []

    class Passes:
        def __call__(self, batch, windows):
            passes.append(batch.num_tokens)
            return runner(batch, windows)

        def __getattr__(self, name):
            return getattr(runner, name)

    runner = encoder.runner
    encoder.runner = Passes()
    encoder.warm_up()
    assert passes == []
    monkeypatch.setattr(Encoder, "device", property(lambda encoder: torch.device("cuda", 0)))
    encoder.warm_up()
    assert passes == sorted(passes, reverse=True)
    sizes = [runner.cover(tokens)[-1].stop for tokens in passes]
    assert sizes == sorted({runner.cover(tokens)[-1].stop for tokens in range(1, 101)}, reverse=True)
