"""The run of a GPU's first hour: its order, its budget, how it goes on, and what its processes are given."""

import json
import os
import subprocess

import pytest
import torch

from bivec.benchmarks import gpu
from bivec.benchmarks.cases import DEVICE_LOST
from bivec.benchmarks.gpu import STEPS, Step, environment


class Processes:
    """Stands for processes: each takes some seconds of a clock and leaves a result, or what `outcomes` says."""

    def __init__(self, monkeypatch):
        self.now, self.commands, self.outcomes = 0.0, [], {}
        self.seconds = 30.0
        monkeypatch.setattr(gpu.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(gpu.subprocess, "Popen", self.start)

    def start(self, command, stdout, stderr, env):
        self.commands.append(command)
        processes, name = self, command[2].rpartition(".")[2]

        class Process:
            killed = False

            def wait(self, timeout=None):
                if self.killed:
                    return -9
                finished, status = processes.outcomes.get(name, [(True, 0)])[0]
                if len(processes.outcomes.get(name, [])) > 1:
                    processes.outcomes[name].pop(0)
                if timeout is not None and processes.seconds > timeout:
                    processes.now += timeout
                    raise subprocess.TimeoutExpired(command, timeout)
                processes.now += processes.seconds
                if "--output" in command:
                    with open(command[command.index("--output") + 1], "w") as stream:
                        json.dump({"benchmark": name, "rows": [], "finished": finished}, stream)
                return status

            def kill(self):
                self.killed = True
                processes.seconds = 30.0

        return Process()

    @property
    def names(self) -> list[str]:
        return [command[2].rpartition(".")[2] for command in self.commands]


@pytest.fixture
def processes(monkeypatch):
    return Processes(monkeypatch)


def call(tmp_path, *given: str) -> int:
    return gpu.main(["--output", str(tmp_path / "results"), "--quick", "--device", "cpu", *given])


def test_every_part_runs_in_its_order_and_is_not_run_again(processes, tmp_path, capsys):
    assert call(tmp_path) == 0
    expected = ["smoke", "attention", "contrastive", "fusions", "lora", "pooling", "tiles", "embed", "train"]
    assert processes.names == expected
    assert all("--quick" in command for command in processes.commands)
    out = capsys.readouterr().out
    assert "smoke: done, 30 s, 510 s left" in out
    assert "left for another call" not in out
    assert call(tmp_path) == 0
    assert processes.names == expected


def test_what_the_budget_does_not_hold_is_left_for_the_next_call(processes, tmp_path, capsys):
    assert call(tmp_path, "--budget-seconds", "100") == 0
    assert processes.names == ["smoke", "attention", "contrastive"]
    assert "left for another call" in capsys.readouterr().out
    assert call(tmp_path, "--budget-seconds", "1000") == 0
    assert processes.names[3] == "fusions"
    assert len(processes.names) == 9
    budgets = [float(command[command.index("--budget-seconds") + 1]) for command in processes.commands[:3]]
    assert budgets == [85, 55, 25]  # of what was left, a process's start taken off


def test_who_has_cases_left_comes_again_after_the_others(processes, tmp_path):
    processes.outcomes["attention"] = [(False, 0), (True, 0)]
    assert call(tmp_path) == 0
    assert processes.names[-1] == "attention"
    assert processes.names.count("attention") == 2


def test_a_lost_device_costs_a_process_and_no_more(processes, tmp_path):
    processes.outcomes["smoke"] = [(False, DEVICE_LOST), (True, 0)]
    assert call(tmp_path) == 0
    assert processes.names[:3] == ["smoke", "smoke", "attention"]


def test_a_failure_is_named_and_stops_nobody(processes, tmp_path, capsys):
    processes.outcomes["smoke"] = [(True, 1)]
    assert call(tmp_path) == 1
    assert len(processes.names) == 9
    assert "failed: smoke (exit status 1)" in capsys.readouterr().out


def test_a_process_that_hangs_is_killed_and_the_next_one_runs(processes, tmp_path, capsys):
    processes.seconds = 1e6
    assert call(tmp_path, "--budget-seconds", "400") == 0
    assert "smoke: killed at its time, 158 s" in capsys.readouterr().out  # half more than what it was given
    assert processes.names[1] == "attention"


def test_kernels_are_compiled_first_by_processes_that_share_the_cases(processes, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.os, "sched_getaffinity", lambda _: set(range(3)))
    processes.seconds = 1.0
    assert gpu.main(["--output", str(tmp_path), "--device", "cuda"]) == 0
    first = processes.commands[:3]
    assert processes.names[:4] == ["gpu", "gpu", "gpu", "smoke"]
    assert [command[command.index("--compile") + 1] for command in first] == ["0/3", "1/3", "2/3"]
    steps = first[0][first[0].index("--steps") + 1 : first[0].index("--compile")]
    assert steps == ["smoke", "attention", "contrastive", "fusions", "lora", "pooling"]
    # what a full run measures, and no result of it is on a CPU
    assert [part for part in processes.commands[-1] if part in ("--shape", "8B")] == ["--shape", "8B"]


def test_a_compiling_process_measures_nothing(monkeypatch):
    given = {}

    class Module:
        def __init__(self, name):
            self.name = name

        def main(self, argv):
            given[self.name] = argv
            raise SystemExit(2)  # as argparse has it for an option it does not know

    monkeypatch.setattr(gpu.importlib, "import_module", lambda name, _: Module(name))
    assert gpu.main(["--compile", "1/4", "--steps", "attention", "fusions", "--device", "cuda"]) == 0
    assert list(given) == ["..attention", "..fusions"]
    assert given["..attention"] == ["--device", "cuda", "--rounds", "9", "--rounds", "0", "--share", "1/4"]


def test_what_processes_are_given(monkeypatch):
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF", raising=False)
    attention, embed = (next(step for step in STEPS if step.name == name) for name in ("attention", "embed-1B"))
    assert environment(attention, "cpu")["TRITON_INTERPRET"] == "1"
    assert "TRITON_INTERPRET" not in environment(embed, "cpu")
    assert environment(embed, "cuda")["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "backend:native")
    assert environment(embed, "cuda")["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "backend:native"


def test_without_a_device_the_way_to_try_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main(["--output", str(tmp_path)])
    assert "--quick --device cpu" in capsys.readouterr().err


def test_one_part_for_real(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "STEPS", (Step("fusions", "fusions", seconds=100),))
    assert call(tmp_path) == 0
    result = json.loads((tmp_path / "results" / "fusions.json").read_text())
    assert result["finished"] is True
    assert len(result["rows"]) == 20
    out = capsys.readouterr().out
    assert "fusions: SwiGLU, quick, float32: " in out
    assert out.splitlines()[-1] == (tmp_path / "results" / "findings.txt").read_text().splitlines()[-1]
