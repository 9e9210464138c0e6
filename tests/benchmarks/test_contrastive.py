"""The contrastive benchmark on small shapes: every peer runs or says why not, and agrees with float64."""

import importlib.util
import json

import torch

from bivec.benchmarks import contrastive
from bivec.benchmarks.contrastive_peers import PEERS, Contrastive, _TiledLogSumExp


def test_quick_run_measures_every_peer(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(contrastive, "describe_machine", lambda *_, **__: {"matmul_tflops": {"float32": 1.0}})
    assert contrastive.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "r.json")]) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "r.json").read_text())
    rows = document["rows"]
    assert [row["name"] for row in rows] == [*PEERS] * 2
    for row in rows:
        if row["name"] == "Liger fused linear cross-entropy":
            assert row["skipped"] == "Liger's kernels need a GPU"
        elif row["skipped"]:
            optional = row["skipped"] == "package sentence-transformers (6) is not installed"
            assert optional or row["name"] in ("torch linear_cross_entropy", "eager, torch.compile"), row["skipped"]
        else:
            assert row["tflops"] > 0
            assert row["error"] < 1e-5, row["name"]
            assert row["eager_error"] < 1e-5
    assert {row["num_keys"] for row in rows} == {96, 260}


def test_peers_that_hold_all_scores_say_when_they_do_not_fit():
    case = Contrastive(2**16, 1, torch.float32)
    rows = torch.empty(1, 1)
    names = ["eager", "eager, torch.compile"]
    if importlib.util.find_spec("sentence_transformers") is not None:
        names.append("MultipleNegativesRankingLoss")
    for name in names:
        assert PEERS[name](case, rows, rows) == "its scores would take 128 GiB"


def test_tiles_need_not_divide():
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(count, 8, generator=generator, requires_grad=True) for count in (7, 11))
    upstream = torch.randn(7, generator=generator)
    truth = (queries @ keys.T).logsumexp(1)
    tiled = _TiledLogSumExp.apply(queries, keys, 3)
    torch.testing.assert_close(tiled, truth)
    expected = torch.autograd.grad(truth, (queries, keys), upstream)
    for ours, true in zip(torch.autograd.grad(tiled, (queries, keys), upstream), expected, strict=True):
        torch.testing.assert_close(ours, true)


def test_cases_are_written_as_queries_and_negatives():
    assert contrastive.queries_and_negatives("4096:1") == (4096, 1)
    assert Contrastive(*contrastive.queries_and_negatives("4096:1"), torch.float32).num_keys == 8192
