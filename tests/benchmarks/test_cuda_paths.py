"""No way through CUDA makes its host wait where it need not, and what runs most often launches no more than it did.

Everything runs in a process of its own, because there the kernels are not interpreted.
"""

import json
import os
import subprocess
import sys

import pytest
import torch

from bivec.benchmarks.counts import MEASURES, TABLE
from bivec.benchmarks.cuda_paths import PATHS

# vectors that arrive, and the figures of the step before
ALLOWED = {("sync", "Event.synchronize", "engine/slabs.py", "numpy")}
QUICK = [
    "embedding 8,192 tokens, 1B",
    "embedding 8,192 tokens, 1B, float8",
    "contrastive loss of 512",
    "contrastive loss of 8,192, symmetric",
]


PROGRAM = """
import collections, contextlib, json, logging, sys
from unittest import mock
import torch
from bivec.benchmarks.counts import MEASURES, count
from bivec.benchmarks.cuda_paths import PATHS
from bivec.benchmarks.fake_cuda import FakeCuda
from bivec.engine.runner import Runner
from bivec.training.optimizer import Optimizer

logging.getLogger("bivec").setLevel(logging.ERROR)

def waiting_runner():
    through = Runner._through
    def waiting(self, layers, batch, windows):
        batch.cu_seqlens[-1].item()
        return through(self, layers, batch, windows)
    return mock.patch.object(Runner, "_through", waiting)

def waiting_optimizer():
    step = Optimizer.step
    return mock.patch.object(Optimizer, "step", lambda self: torch.full((), float(step(self)), device="cuda"))

def pageable():
    return mock.patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor)

def run(path, mutation=contextlib.nullcontext):
    with FakeCuda() as fake, mutation():
        section = PATHS[path](fake)
    hazards = collections.Counter(map(tuple, section.hazards))
    return {"hazards": [[*hazard, times] for hazard, times in hazards.items()],
            "kernels": section.counts.kernels, "replays": section.counts.replays}

asked = json.loads(sys.argv[1])
print(json.dumps({
    "paths": {path: run(path) for path in PATHS},
    "mutants": {name: run(path, globals()[mutation]) for name, (path, mutation) in asked["mutants"].items()},
    "counts": count([name for name in MEASURES if name in asked["measures"]]),
}))
"""
MUTANTS = {
    "an item in the runner": ("launched pass, llama-1B, short", "waiting_runner", "sync"),
    "an item in the capture": ("captured pass", "waiting_runner", "in a capture"),
    "a number of the optimizer's": ("training, simcse", "waiting_optimizer", "sync"),
    "pageable texts": ("encoding", "pageable", "pageable copy"),
    "a pageable step": ("training, supervised", "pageable", "pageable copy"),
}


@pytest.fixture(scope="module")
def found() -> dict:
    """What all paths, the mutants and the quick measures come to."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    mutants = {name: (path, mutation) for name, (path, mutation, _) in MUTANTS.items()}
    asked = json.dumps({"mutants": mutants, "measures": QUICK})
    result = subprocess.run([sys.executable, "-c", PROGRAM, asked], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads(result.stdout.splitlines()[-1])


def not_allowed(hazards: list) -> list:
    found = []
    for kind, operator, place, times in hazards:
        file, _, function = place.partition(":")
        if (kind, operator, file, function.partition(" ")[2]) not in ALLOWED:
            found.append(f"{kind}: {operator} at {place}, {times} times")
    return found


@pytest.mark.parametrize("name", PATHS)
def test_the_host_waits_for_nothing_but_results(found, name):
    path = found["paths"][name]
    assert not_allowed(path["hazards"]) == []
    assert path["kernels"] + path["replays"] > 0
    if name.startswith("training"):
        assert sum(times for *_, times in path["hazards"]) == 2  # steps


@pytest.mark.parametrize("name", ["captured pass", "captured float8 pass"])
def test_a_captured_pass_is_launched_as_one(found, name):
    path = found["paths"][name]
    assert (path["kernels"], path["replays"]) == (0, 1)


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(found, name):
    lines = not_allowed(found["mutants"][name]["hazards"])
    assert {line.partition(":")[0] for line in lines} == {MUTANTS[name][2]}


def test_no_more_is_launched_or_moved_than_the_table_says(found):
    table = json.loads(TABLE.read_text())
    if table["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        pytest.skip(f"the table was counted with torch {table['torch']}, whose operators may be other ones")
    assert len(found["counts"]) >= len(QUICK)
    for name, row in found["counts"].items():
        for figure in ("launches", "bytes", "waits"):
            assert row[figure] <= table["counts"][name]["now"][figure], f"{name}: {figure}"


def test_the_table_has_every_measure_before_and_now():
    counts = json.loads(TABLE.read_text())["counts"]
    assert {name.partition(": ")[0] for name in counts} == set(MEASURES)
    for name, rows in counts.items():
        assert set(rows) == ({"now"} if "float8" in name else {"before", "now"}), name  # before, there was none


def test_a_layer_in_float8_moves_less_and_launches_one_more():
    """The last sum, which a product in bfloat16 does itself; rows that are multiplied take half the bytes."""
    counts = json.loads(TABLE.read_text())["counts"]
    bfloat16, float8 = (counts[f"embedding 8,192 tokens, 1B{part}: a layer"]["now"] for part in ("", ", float8"))
    assert float8["launches"] == bfloat16["launches"] + 1
    assert float8["bytes"] < 0.91 * bfloat16["bytes"]
