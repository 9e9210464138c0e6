"""A benchmark's cases: written one by one, gone on with after a kill, within a budget and the memory there is."""

import json
import os
import signal
import time

import pytest

from bivec.benchmarks import cases
from bivec.benchmarks.cases import DEVICE_LOST, Case, Results
from bivec.benchmarks.timing import argument_parser

MACHINE = {"cpu": "any", "source": "0123", "utc": "now"}


def parsed(*given):
    return argument_parser("Times things.").parse_args(["--device", "cpu", *map(str, given)])


def measured(name: str, ran: list[str]) -> Case:
    def run() -> list[dict]:
        ran.append(name)
        return [{"case": name, "name": "bivec", "median_s": 1.0}]

    return Case(name, run)


def document(path) -> dict:
    return json.loads(path.read_text())


def test_a_killed_run_goes_on_at_the_case_where_it_was(tmp_path, exit_code):
    output = tmp_path / "r.json"

    def killed() -> list[dict]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    def first_call() -> None:
        Results("b", parsed("--output", output), MACHINE).run([measured("a", []), Case("b", killed), measured("c", [])])

    assert exit_code(first_call) == -signal.SIGKILL
    assert [row["case"] for row in document(output)["rows"]] == ["a"]
    ran: list[str] = []
    assert Results("b", parsed("--output", output), MACHINE).run([measured(name, ran) for name in "abc"]) == 0
    assert ran == ["b", "c"]
    assert [row["case"] for row in document(output)["rows"]] == ["a", "b", "c"]
    assert len(document(output)["earlier_calls"]) == 1


def test_a_case_that_ends_its_process_twice_is_given_up(tmp_path, exit_code):
    output = tmp_path / "r.json"

    def call() -> None:
        crash = Case("crash", lambda: os._exit(7))
        raise SystemExit(Results("b", parsed("--output", output), MACHINE).run([crash, measured("after", [])]))

    assert [exit_code(call) for _ in range(3)] == [7, 7, 0]
    skipped, after = document(output)["rows"]
    assert skipped == {"case": "crash", "name": "all", "skipped": "ended its process 2 times"}
    assert after["case"] == "after"


def test_what_the_budget_does_not_hold_is_left_out_and_named(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(cases.time, "monotonic", lambda: now[0])
    output = tmp_path / "r.json"
    ran: list[str] = []

    def takes(seconds: float, name: str) -> Case:
        def run() -> list[dict]:
            now[0] += seconds
            ran.append(name)
            return [{"case": name}]

        return Case(name, run)

    every = [takes(30, "a"), takes(40, "b"), takes(10, "c"), takes(1, "d"), takes(1, "e")]
    Results("b", parsed("--output", output, "--budget-seconds", 100), MACHINE).run(every)
    # 30 and 40 are gone: another 40 does not fit into what is left
    assert ran == ["a", "b"]
    left_out = document(output)["left_out"]
    assert left_out["c"] == "the budget of 100 s has 30 s left, a case takes 40 s"
    assert list(left_out) == ["c", "d", "e"]
    Results("b", parsed("--output", output, "--budget-seconds", 100), MACHINE).run(every)
    assert ran == ["a", "b", "c", "d", "e"]
    assert document(output)["left_out"] == {}


def test_a_case_that_cannot_fit_or_fails_is_a_row_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "free_bytes", lambda _: 10 * 2**30)
    output = tmp_path / "r.json"

    def out_of_memory() -> list[dict]:
        raise MemoryError("tried to allocate 180 GiB\nand more")

    too_large = Case("large", lambda: pytest.fail("it was begun"), num_bytes=12 * 2**30)
    ran: list[str] = []
    Results("b", parsed("--output", output), MACHINE).run([too_large, Case("oom", out_of_memory), measured("a", ran)])
    large, oom, after = document(output)["rows"]
    assert large["skipped"] == "needs about 12.0 GiB, 10.0 GiB are free"
    assert oom["skipped"] == "MemoryError: tried to allocate 180 GiB"
    assert after["case"] == "a"


def test_a_lost_device_asks_for_another_process(tmp_path, monkeypatch):
    output = tmp_path / "r.json"

    def faults() -> list[dict]:
        monkeypatch.setattr(cases, "_alive", lambda _: False)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    ran: list[str] = []
    every = [Case("faults", faults), measured("a", ran)]
    assert Results("b", parsed("--output", output), MACHINE).run(every) == DEVICE_LOST
    monkeypatch.setattr(cases, "_alive", lambda _: True)
    assert ran == []
    assert Results("b", parsed("--output", output), MACHINE).run(every) == 0
    assert ran == ["a"]
    assert "illegal memory access" in document(output)["rows"][0]["skipped"]


@pytest.mark.parametrize(
    ("name", "given", "machine", "words"),
    [
        ("other", (), {}, "benchmark"),
        ("b", ("--rounds", 3), {}, "asked"),
        ("b", (), {"source": "4567"}, "source"),
        ("b", (), {"device_name": "another"}, "device_name"),
    ],
)
def test_results_of_something_else_are_not_mixed(tmp_path, name, given, machine, words):
    output = tmp_path / "r.json"
    Results("b", parsed("--output", output), MACHINE).run([measured("a", [])])
    before = output.read_bytes()
    with pytest.raises(ValueError, match=f"holds a result of another {words}: give another --output"):
        Results(name, parsed("--output", output, *given), MACHINE | machine)
    assert output.read_bytes() == before


def test_budget_and_share_are_no_other_arguments(tmp_path):
    output = tmp_path / "r.json"
    Results("b", parsed("--output", output), MACHINE).run([])
    Results("b", parsed("--output", output, "--budget-seconds", 5), MACHINE).run([])


def test_a_share_of_the_cases(tmp_path):
    ran: list[str] = []
    Results("b", parsed("--share", "1/3", "--rounds", 0), MACHINE).run([measured(name, ran) for name in "abcdefg"])
    assert ran == ["b", "e"]


def test_a_file_that_is_no_result_is_not_written_over(tmp_path):
    output = tmp_path / "r.json"
    output.write_text('{"benchmark": "b"}')
    with pytest.raises(ValueError, match="must be a result that can go on"):
        Results("b", parsed("--output", output), MACHINE)
    assert output.read_text() == '{"benchmark": "b"}'


def test_facts_of_a_case_stand_in_the_document(tmp_path):
    output = tmp_path / "r.json"
    results = Results("b", parsed("--output", output), MACHINE, shape="1B")

    def run() -> list[dict]:
        results.add(best=float("nan"), when=time.time() > 0)
        return []

    results.run([Case("a", run)])
    found = document(output)
    assert (found["shape"], found["best"], found["when"]) == ("1B", None, True)
