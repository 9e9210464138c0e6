"""The pooling benchmark on small shapes: every peer runs or says why not, and agrees with float64."""

import importlib.util
import json

import pytest
import torch

from bivec.benchmarks import pooling
from bivec.benchmarks.pooling import PEERS, Pooling


def test_quick_run_measures_every_peer(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(pooling, "describe_machine", lambda _: {"copy_gb_per_s": 1.0})
    assert pooling.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "r.json")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "r.json").read_text())
    rows = document["rows"]
    assert [row["name"] for row in rows] == [*PEERS] * 4
    assert {(row["direction"], row["norm"]) for row in rows} == {
        (direction, norm) for direction in ("forward", "both") for norm in (False, True)
    }
    has_padded = importlib.util.find_spec("sentence_transformers") is not None
    for row in rows:
        if row["skipped"]:
            optional = row["skipped"] == "package sentence-transformers (6) is not installed"
            assert optional or "torch.compile" in row["name"], row["skipped"]
            continue
        assert row["gb_per_s"] > 0
        assert row["error"] < 1e-5, row["name"]
        assert has_padded or row["padded_error"] is None
        assert not has_padded or row["padded_error"] < 1e-5


def test_bytes_that_must_move():
    case = Pooling("", (3, 5), 10, torch.bfloat16, norm=False)
    assert case.least_bytes("forward") == 8 * 10 * 2 + 2 * 10 * 4
    assert case.least_bytes("both") == 2 * 8 * 10 * 2 + 2 * 2 * 10 * 4
    assert Pooling("", (3, 5), 10, torch.bfloat16, norm=True).least_bytes("both") == pytest.approx(480 + 160)
