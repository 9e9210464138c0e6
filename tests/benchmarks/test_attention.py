"""The attention benchmark on small shapes: every peer runs or says why not, and agrees with float64."""

import json

import pytest
import torch

from bivec.benchmarks import attention
from bivec.benchmarks.attention_peers import Attention


def test_scores_of_a_window_are_counted_one_by_one():
    for window in [(-1, -1), (-1, 0), (2, 1), (0, 0)]:
        case = Attention("", (1, 4, 9), 2, 1, 16, torch.float32, window_size=window)
        left, right = (99 if bound < 0 else bound for bound in window)
        expected = sum(-left <= k - q <= right for n in case.lengths for q in range(n) for k in range(n))
        assert case.scores == expected
        assert case.flops("both") == 3.5 * 4 * expected * 2 * 16


def test_quick_run_measures_every_peer(capsys, monkeypatch):
    monkeypatch.setattr(attention, "describe_machine", lambda *_, **__: FACTS)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert attention.main(["--quick", "--device", device, "--rounds", "1"]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = document["rows"]
    assert {row["direction"] for row in rows} == {"forward", "backward", "both"}
    for row in rows:
        assert row["skipped"] or row["tflops"] > 0
        if not row["skipped"] and "dropout" not in row["case"]:
            assert row["error"] < 1e-5, row["name"]
            assert row.get("gradient_error", 0.0) < 1e-5, row["name"]
    ran = {row["name"] for row in rows if not row["skipped"]}
    assert {"bivec", "eager, padded", "SDPA as torch chooses, padded", "flex, document mask"} <= ran
    assert all(row["skipped"] is None for row in rows if row["name"] == "bivec")


FACTS = {"matmul_tflops": {"float32": 1.0}, "copy_gb_per_s": 1.0}


def test_real_lengths_fill_the_tokens_and_never_change():
    lengths = attention.real_lengths(4096)
    assert lengths == attention.real_lengths(4096)
    assert sum(lengths) == pytest.approx(4096, abs=512)
    assert min(lengths) >= 16
    assert max(lengths) <= 512
