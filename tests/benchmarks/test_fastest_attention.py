"""The table of the fastest attention, out of results: what it takes of them, and what the engine then chooses."""

import json

import pytest
import torch
from typer.testing import CliRunner

from bivec import cli
from bivec.benchmarks import fastest_attention
from bivec.engine import fastest


def row(case, name, seconds, direction="forward"):
    return {"case": case, "dtype": "bfloat16", "direction": direction, "name": name, "median_s": seconds}


ROWS = [
    row("D64 GQA 4, real mix", "bivec", 9.0, "backward"),
    row("D64 GQA 4, real mix", "bivec", 3e-4),
    row("D64 GQA 4, real mix", "torch varlen", 1e-4),
    row("D64 GQA 4, real mix", "flash-attn varlen", None),
    row("D64 GQA 4, real mix", "eager, padded", 1e-6),
    row("D64 GQA 4, uniform 4096", "bivec", 7.0),
    row("D64 MHA, real mix", "torch varlen", 1e-4),
    row("D128 GQA 4, real mix", "bivec", 2e-4),
]
MACHINE = {"device_name": "Some GPU", "utc": "2026-01-02T03:04:05", "packages": {"torch": "2.11", "triton": "3.6.0"}}


def write(path, **changes):
    path.write_text(json.dumps({"benchmark": "attention", "machine": MACHINE, "rows": ROWS} | changes))
    return str(path)


def test_the_table_holds_the_forward_over_a_real_mix_and_other_gpus(tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"Other GPU": "kept", "Some GPU": "old"}))
    monkeypatch.setattr(fastest_attention, "TABLE", table)
    result, output = write(tmp_path / "attention.json"), tmp_path / "new.json"
    assert fastest_attention.main([result, "--output", str(output)]) == 0
    assert json.loads(output.read_text()) == {
        "Other GPU": "kept",
        "Some GPU": {
            "measured": "2026-01-02, torch 2.11, triton 3.6.0",
            "seconds": {
                "bfloat16 D64 grouped": {"triton": 3e-4, "varlen": 1e-4},
                "bfloat16 D128 grouped": {"triton": 2e-4},
            },
        },
    }
    assert json.loads(table.read_text())["Some GPU"] == "old"
    assert fastest_attention.main([result, "--install"]) == 0
    assert table.read_text() == output.read_text()
    assert fastest.shape_key(torch.bfloat16, 64, 32, 8) in table.read_text()


@pytest.mark.parametrize(
    "changes", [{"benchmark": "lora"}, {"machine": {}}, {"rows": []}, {"rows": ROWS[2:4]}, {"rows": [{}]}]
)
def test_what_is_no_such_result_is_refused_by_name(tmp_path, changes):
    path = write(tmp_path / "r.json", **changes)
    found = CliRunner().invoke(cli.app, ["benchmark", "fastest-attention", path])
    assert found.exit_code == 2
    assert found.output.startswith(f"error: {path}: ")
    assert found.output.count("\n") == 1
