"""The suite: which benchmarks it starts, how it goes on after a failure or a kill, and what a report shows."""

import json

import pytest
from typer.testing import CliRunner

from bivec import cli
from bivec.benchmarks import suite


@pytest.fixture
def started(monkeypatch):
    """Commands instead of processes; one that names "lora" fails, the others leave a result."""
    commands = []

    def call(command, **_):
        commands.append(command)
        if "bivec.benchmarks.lora" in command:
            return 1
        with open(command[command.index("--output") + 1], "w") as stream:
            json.dump({"benchmark": "any"}, stream)
        return 0

    monkeypatch.setattr(suite.subprocess, "call", call)
    return commands


def test_all_goes_on_after_a_failure_and_gives_each_its_own_result_to_go_on_with(started, tmp_path, capsys):
    given = ["--output", str(tmp_path / "results"), "--quick", "--tokenizer", "t.json"]
    assert suite.run("all", given) == 1
    names = [name for name in suite.BENCHMARKS if name != "attention"]
    assert [command[2] for command in started] == [f"bivec.benchmarks.{name}" for name in names]
    assert all("--quick" in command and "cpu" in command for command in started)
    assert ["--tokenizer" in command for command in started] == [name in suite._WITH_TEXTS for name in names]
    assert "error: of 7 benchmarks 1 failed: lora" in capsys.readouterr().err
    found = sorted(path.name for path in (tmp_path / "results").iterdir())
    assert found == sorted(f"{name}.json" for name in names if name != "lora")


def test_one_benchmark_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("bivec.benchmarks.pooling.describe_machine", lambda _: {"copy_gb_per_s": 1.0})
    output = tmp_path / "r.json"
    arguments = ["benchmark", "pooling", "--quick", "--device", "cpu", "--rounds", "1", "--output", str(output)]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    assert json.loads(output.read_text())["benchmark"] == "pooling"


def test_a_name_that_is_none():
    found = CliRunner().invoke(cli.app, ["benchmark", "speed"])
    assert found.exit_code == 2
    names = ", ".join((*suite.BENCHMARKS, *suite.OTHERS))
    assert found.output == f"error: NAME must be one of {names}, all, report, got 'speed'\n"
    assert "NAME is attention, contrastive" in CliRunner().invoke(cli.app, ["benchmark", "--help"]).output


def test_a_report_shows_rows_and_machine(tmp_path, capsys):
    machine = {
        "device": "cuda",
        "cpu": "any",
        "utc": "2026-01-02T03:04:05",
        "packages": {"torch": "2.11", "peft": None},
    }
    rows = [{"name": "bivec", "median_s": 0.25}, {"name": "peer", "median_s": 0.5}]
    (tmp_path / "lora.json").write_text(json.dumps({"benchmark": "lora", "machine": machine, "rows": rows}))
    (tmp_path / "sts.json").write_text(json.dumps({"task": "sts"}))
    assert suite.run("report", [str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["## lora", "", "cuda, any, 2026-01-02, torch 2.11"]
    assert [line.split() for line in lines[4:7]] == [["name", "median_s"], ["bivec", "0.25"], ["peer", "0.5"]]
    assert not any("sts" in line for line in lines)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{", "[" * 100_000, '{"benchmark": 1}', '{"benchmark": 1, "machine": {"packages": []}, "rows": []}'],
)
def test_a_result_that_is_none_is_named(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    found = CliRunner().invoke(cli.app, ["benchmark", "report", str(tmp_path / "r.json")])
    assert found.exit_code == 2
    assert found.output.startswith(f"error: {tmp_path}/r.json must be what `bivec benchmark --output` wrote: ")
    assert found.output.count("\n") == 1
