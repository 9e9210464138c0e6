"""Captured passes, with a stand-in for the capture: what one batch leaves behind must not reach the next."""

import pytest
import torch

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
