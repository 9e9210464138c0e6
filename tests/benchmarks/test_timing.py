"""The harness itself: the order in which it runs things, its statistics, and that nothing is hidden."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from bivec.benchmarks import machine, timing
from bivec.benchmarks.machine import copy_rate, describe_machine, matmul_rate, other_cpu_seconds
from bivec.benchmarks.timing import Timing, argument_parser, cuda_graph, measure, ratio, report, table


class Clock:
    """A clock that only the variants move, so that every duration is known."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def variant(self, durations):
        remaining = iter(durations)

        def run():
            self.now += next(remaining)

        return run


def recorded(calls: list[str], name: str):
    return lambda: calls.append(name)


def test_rounds_are_interleaved_after_every_variant_is_warm():
    calls: list[str] = []
    measure({name: recorded(calls, name) for name in "ABC"}, rounds=3, warmup=2)
    assert "".join(calls) == "AABBCC" + "ABC" * 3


def test_reverse_turns_every_second_round():
    calls: list[str] = []
    measure({name: recorded(calls, name) for name in "ABC"}, rounds=3, warmup=1, reverse=True)
    assert "".join(calls) == "ABC" + "ABC" + "CBA" + "ABC"


def test_statistics_are_of_the_rounds_and_not_of_the_warm_up():
    clock = Clock()
    seconds = [100.0, 100.0, 5.0, 1.0, 2.0, 4.0, 3.0]  # the first two are the warm-up
    timing = measure({"a": clock.variant(seconds)}, rounds=5, warmup=2, clock=clock)["a"]
    assert timing.seconds == [5.0, 1.0, 2.0, 4.0, 3.0]
    row = timing.row()
    assert (row["min_s"], row["q25_s"], row["median_s"], row["q75_s"], row["rounds"]) == (1.0, 2.0, 3.0, 4.0, 5)


def test_calls_repeat_a_variant_and_give_the_time_of_one():
    clock = Clock()
    timing = measure({"a": clock.variant([9.0, *[0.5] * 8])}, rounds=2, warmup=1, calls=4, clock=clock)["a"]
    assert timing.seconds == [0.5, 0.5]


def test_ratio_compares_within_a_round():
    # the machine runs at half speed in the second round: the ratio must not see it
    ours, peer = Timing("ours", [1.0, 2.0, 1.0]), Timing("peer", [3.0, 6.0, 3.0])
    assert ratio(peer, ours) == {"q25": 3.0, "median": 3.0, "q75": 3.0}
    assert ratio(peer, Timing("absent", skipped="not installed")) is None


def test_a_variant_that_raises_is_recorded_and_stops_no_other():
    clock = Clock()

    def fails_when_warm():
        raise ImportError("no module named peer")

    later = iter([None, None, ValueError("out of luck")])

    def fails_in_the_second_round():
        clock.now += 1
        if error := next(later):
            raise error

    timings = measure(
        {
            "absent": "flash-attn is not installed",
            "warm": fails_when_warm,
            "late": fails_in_the_second_round,
            "good": clock.variant([2.0] * 4),
        },
        rounds=3,
        warmup=1,
        clock=clock,
    )
    assert timings["absent"].skipped == "flash-attn is not installed"
    assert timings["warm"].skipped == "ImportError: no module named peer"
    assert timings["late"].skipped == "ValueError: out of luck"
    assert timings["late"].seconds == []  # half a measurement is none
    assert timings["good"].seconds == [2.0] * 3
    assert math.isnan(timings["warm"].median)


def test_on_cuda_the_device_is_kept_busy_until_everything_is_launched(monkeypatch):
    order: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool):
            assert enable_timing

        def record(self):
            order.append("event")

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end) -> float:
            return 3.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(
        torch.cuda, "_sleep", lambda cycles: order.append(f"busy {cycles / timing.CYCLES_PER_SECOND:g}")
    )
    cuda = torch.device("cuda")
    assert timing._seconds(lambda: order.append("call"), cuda, 2, None, host_seconds=0.004) == 1.5e-3
    assert order == ["busy 0.008", "event", "call", "call", "event", "wait"]
    order.clear()
    timing._seconds(lambda: None, cuda, 1, None)
    timing._seconds(lambda: None, cuda, 1, None, host_seconds=9.0)
    assert [step for step in order if "busy" in step] == ["busy 0.001", "busy 0.02"]


def test_without_rounds_variants_are_warmed_up_and_not_timed():
    calls: list[str] = []
    found = measure({"a": recorded(calls, "a"), "gone": "is not installed"}, rounds=0, warmup=1)
    assert calls == ["a"]
    assert (found["a"].seconds, found["a"].skipped) == ([], None)
    assert ratio(found["a"], found["a"]) is None


def test_an_interrupt_is_not_swallowed():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure({"a": interrupted})


def test_senseless_settings_are_refused():
    with pytest.raises(ValueError, match="warmup and calls"):
        measure({}, warmup=0)
    with pytest.raises(ValueError, match="flush_cache needs calls=1"):
        measure({}, flush_cache=True, calls=2)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from Linux's /proc")
def test_peak_memory_is_what_the_call_takes():
    def takes(megabytes: int):
        return lambda: torch.ones(megabytes * 2**20, dtype=torch.int8)

    timings = measure({"large": takes(300), "small": takes(1)}, rounds=1)
    if timings["large"].peak_growth_bytes is None:
        pytest.skip("/proc/self/clear_refs cannot be written here")
    # the peak of the large call must neither miss its memory nor stick to the small one that follows
    assert 290 < timings["large"].peak_growth_bytes / 2**20 < 330
    assert timings["small"].peak_growth_bytes / 2**20 < 30


def test_report_ends_with_one_json_document(capsys, tmp_path: Path):
    timings = measure({"fast": lambda: None, "gone": "peer is not\ninstalled"}, rounds=2)
    rows = [timing.row() | {"share": np.float32(0.5), "error": float("nan")} for timing in timings.values()]
    report("example", rows, machine={"cpu": "any"}, output=tmp_path / "r.json", lengths={"p50": 12}, path=tmp_path)
    captured = capsys.readouterr()
    last = captured.out.splitlines()[-1]
    document = json.loads(last, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert document == json.loads((tmp_path / "r.json").read_text())
    assert (document["benchmark"], document["lengths"]["p50"], document["path"]) == ("example", 12, str(tmp_path))
    fast, gone = document["rows"]
    assert (fast["share"], fast["error"]) == (0.5, None)
    assert (gone["median_s"], gone["skipped"]) == (None, "peer is not\ninstalled")
    assert "peer is not installed" in captured.err


def test_table_is_aligned_and_leaves_out_empty_columns():
    text = table(
        [{"name": "a", "none": None, "speedup": {"q25": 1.0, "median": 2.0}}, {"name": "long", "speedup": None}]
    )
    assert text.splitlines() == ["name  speedup", "a     2", "long"]


def test_machine_names_versions_and_measures_plausible_rates(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.99.0+cu199")
    facts = describe_machine("cpu", dtypes=["float32"])
    assert facts["packages"]["torch"] == "2.99.0+cu199"
    assert facts["cores"] >= 1
    assert facts["utc"].endswith("+00:00")
    assert 1e-3 < facts["matmul_tflops"]["float32"] < 100
    assert 0.5 < facts["copy_gb_per_s"] < 5000
    json.dumps(facts, allow_nan=False)


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")
def test_other_processes_are_told_from_our_own_work():
    before = other_cpu_seconds()
    start = time.process_time()
    while time.process_time() - start < 0.5:
        pass
    alone = other_cpu_seconds() - before
    before = other_cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as neighbour:
        time.sleep(1.5)
        disturbed = other_cpu_seconds() - before
        neighbour.kill()
    assert disturbed > alone + 0.3


def test_a_copy_without_git_is_told_what_it_is(monkeypatch):
    monkeypatch.setattr(machine, "_commit", lambda: None)
    monkeypatch.setenv("BIVEC_COMMIT", "4d3c2b1")
    monkeypatch.setattr(machine, "_best_seconds", lambda *_: 1.0)
    facts = describe_machine("cpu", dtypes=["float32"])
    assert facts["commit"] == "4d3c2b1"
    assert len(facts["source"]) == 16
    monkeypatch.setattr(machine, "_commit", lambda: "abc-dirty")
    assert describe_machine("cpu", dtypes=["float32"])["commit"] == "abc-dirty"


def test_common_options():
    arguments = argument_parser("Times things.").parse_args(["--quick", "--rounds", "3", "--output", "r.json"])
    assert (arguments.quick, arguments.rounds, arguments.output) == (True, 3, Path("r.json"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_events_flush_graph_and_peak():
    x = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    y = torch.empty_like(x)
    variants = {
        "product": lambda: torch.mm(x, x, out=y),
        "graph": cuda_graph(lambda: torch.mm(x, x, out=y)),
        "allocates": lambda: torch.empty(2**28, dtype=torch.int8, device="cuda"),
    }
    timings = measure(variants, device="cuda", flush_cache=True)
    assert all(timing.skipped is None for timing in timings.values())
    # 137 GFLOP: neither faster than any GPU nor as slow as launches that were not waited for would suggest
    assert 2e-5 < timings["product"].median < 1e-1
    assert timings["allocates"].peak_growth_bytes == 2**28
    assert timings["product"].peak_growth_bytes < 2**28
    assert matmul_rate(torch.bfloat16, "cuda") > matmul_rate(torch.float32, "cuda") > 1e12
    assert copy_rate("cuda") > 1e11
