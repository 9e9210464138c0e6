"""The job benchmark on small shapes: every way runs, and the costs that it takes apart are those of the job."""

import json
import time

import pytest
import torch

from bivec.benchmarks import job
from bivec.engine.runner import Runner
from bivec.serving.folder import ShardOutput


def test_quick_run(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(job, "describe_machine", lambda _: {})
    given = ["--quick", "--device", "cpu", "--num-texts", "9", "--rounds", "1"]
    assert job.main([*given, "--output", str(tmp_path / "r.json")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "r.json").read_text())
    ours, *peers = document["rows"]
    assert ours["tokens_per_s"] == pytest.approx(document["tokens"]["total"] / ours["median_s"])
    assert ours["share_of_linears"] > 0
    for row in peers:
        assert row["skipped"] or row["bivec_speedup"]["median"] > 0
    assert 0 < document["durable_share"] < 1
    assert 0 <= document["unused_rows"] < 16 / 9 / 2  # less than a small tile a pass, of texts of two tokens or more


def test_costs(monkeypatch):
    monkeypatch.setattr(ShardOutput, "end_shard", lambda self, num_tokens, num_cut: time.sleep(0.05))
    monkeypatch.setattr(Runner, "__call__", lambda self, batch, windows: batch.num_tokens)
    runner, batch = object.__new__(Runner), type("Batch", (), {"num_tokens": 530})()
    runner.device, runner.tiles = torch.device("cpu"), (16, 64, 512)
    costs = job.Costs()
    with costs.counted():
        object.__new__(ShardOutput).end_shard(1, 0)
        assert runner(batch, None) == 530
    seconds = costs.durable_seconds
    assert seconds >= 0.05
    assert (costs.num_tokens, costs.num_rows) == (530, 512 + 2 * 16)
    object.__new__(ShardOutput).end_shard(1, 0)
    assert costs.durable_seconds == seconds
