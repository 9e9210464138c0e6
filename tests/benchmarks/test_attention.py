"""The attention benchmark on small shapes: every peer runs or says why not, and agrees with float64."""

import json

import pytest
import torch

from bivec.benchmarks import attention
from bivec.benchmarks.attention_peers import EAGER, Attention, flex, peers


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
            assert (row["gradient_error"] or 0.0) < 1e-5, row["name"]
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


def test_who_is_wrong_has_no_speed():
    case = Attention("causal", (5, 9), 2, 1, 16, torch.float32, window_size=(-1, 0))
    known = peers(torch.device("cpu"))

    def sees_all(given: Attention, inputs):
        return known[EAGER](Attention("", given.lengths, 2, 1, 16, torch.float32), inputs)

    entrants = {"bivec": known[EAGER], "sees all": sees_all, "honest": known[EAGER]}
    rows = attention.run_case(case, entrants, torch.device("cpu"), 1, (1.0, 1.0), quick=True)
    assert len(rows) == 9
    for row in rows:
        if row["name"] == "sees all":
            assert row["skipped"].startswith("wrong: error ")
            assert row["median_s"] is None
            assert "tflops" not in row
            assert row["error"] > 0.1
        else:
            assert row["skipped"] is None


def test_flex_never_meets_the_limit_of_compilations():
    limit = torch._dynamo.config.recompile_limit
    for number in range(limit + 1):
        case = Attention("", (3, 4 + number), 2, 1, 16, torch.float32)
        prepared = flex(case, case.inputs(torch.device("cpu")), compiled=True, backend="eager")
        with torch.no_grad():
            prepared.attend(*prepared.inputs[:3])


def test_the_most_telling_cases_come_first_and_have_flex():
    names = [
        case.name
        for case in attention.choose_cases(["long", "short", "mix", "windows", "dropout"], torch.bfloat16, False)
    ]
    assert tuple(names[: len(attention.FIRST)]) == attention.FIRST
    assert len(set(names)) == len(names) == 3 * 15
    assert set(attention.WITH_FLEX) - set(names) == {"mix, causal"}
