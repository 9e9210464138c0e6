"""The embedding benchmark: agreement before speed, a peer that is really bidirectional, and honest ceilings."""

import gzip
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bivec.benchmarks import embed
from bivec.benchmarks.shapes import SHAPES, linear_rates, write_checkpoint
from bivec.benchmarks.texts import real_mix, synthetic_mix, token_counts
from bivec.benchmarks.timing import Timing

CPU = torch.device("cpu")
QUICK = ["--quick", "--device", "cpu", "--synthetic"]


@pytest.fixture
def cheap_ceilings(monkeypatch):
    """The ceilings have tests of their own; here any will do."""
    monkeypatch.setattr(embed, "linear_rates", lambda *_: {"best": 1e12})
    monkeypatch.setattr(embed, "describe_machine", lambda _: {"cpu": "any"})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(SHAPES["quick"], folder, synthetic_mix(24))
    return folder


def result(capsys) -> dict:
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def rows_of(document: dict, who: str) -> list[dict]:
    return [row for row in document["rows"] if row["name"].startswith(who)]


def test_quick_run_compares_agreeing_vectors(capsys, tmp_path, cheap_ceilings):
    pytest.importorskip("sentence_transformers")
    assert embed.main([*QUICK, "--output", str(tmp_path / "r.json")]) == 0
    document = result(capsys)
    assert document == json.loads((tmp_path / "r.json").read_text())
    peers = rows_of(document, "sentence-transformers")
    swept = sorted(document["sweep"], key=lambda row: row["median_s"])
    assert {row["name"] for row in peers} == {embed.DEFAULT, *(row["name"] for row in swept[:2])}
    assert document["best_peer"] == min(peers, key=lambda row: row["median_s"])["name"]
    assert document["causal_control_cosine"] < 0.9
    for row in rows_of(document, "bivec"):
        assert row["skipped"] is None
        assert row["least_cosine"] >= embed.LEAST_COSINE[row["dtype"]]
        assert row["tokens_per_s"] == pytest.approx(document["tokens"]["total"] / row["median_s"])
        assert row["speedup_over_default"]["median"] > 0
        assert row["speedup_over_best"]["median"] > 0
        assert row["latency_over_peer"]["median"] > 0


def test_without_the_peer_its_rows_are_skipped_and_no_speed_up_is_reported(capsys, monkeypatch, cheap_ceilings):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    assert embed.main(QUICK) == 0
    document = result(capsys)
    peers = rows_of(document, "sentence-transformers") + document["sweep"]
    assert len(peers) == 1 + 6
    assert all("sentence_transformers" in row["skipped"] and row["median_s"] is None for row in peers)
    for row in rows_of(document, "bivec"):
        assert row["skipped"] is None
        assert row["tokens_per_s"] > 0
        assert "did not run" in row["refused"]
        assert "speedup_over_default" not in row
    assert 0.3 < sum(part["share"] for part in document["breakdown_of_bivec"]["parts"]) <= 1.000001


def test_no_speed_up_is_reported_for_vectors_that_disagree(capsys, monkeypatch, cheap_ceilings):
    pytest.importorskip("sentence_transformers")
    load = embed.load_bivec

    def wrong_for_one_text(*arguments):
        right = load(*arguments)

        def encode(texts):
            vectors = right.encode(texts).copy()
            vectors[-1] = vectors[0]
            return vectors

        return embed.Contender(right.name, right.dtype, encode)

    monkeypatch.setattr(embed, "load_bivec", wrong_for_one_text)
    assert embed.main(QUICK) == 1
    for row in rows_of(result(capsys), "bivec"):
        assert "vectors disagree" in row["refused"]
        assert "speedup_over_default" not in row


def test_a_blind_check_refuses_too():
    vectors = {embed.DEFAULT: np.random.default_rng(0).normal(size=(5, 8)), "bivec": None}
    vectors["bivec"] = vectors[embed.DEFAULT]
    entrant = embed.Contender("bivec", "float32", lambda texts: np.empty(0))
    assert embed.agreement(entrant, vectors, control=0.5)["refused"] is None
    assert "blind" in embed.agreement(entrant, vectors, control=1.0)["refused"]
    vectors["bivec"] = np.full((5, 8), np.nan)
    assert "disagree" in embed.agreement(entrant, vectors, control=0.5)["refused"]


def test_the_peer_is_bidirectional_and_the_check_would_notice_if_not(checkpoint):
    pytest.importorskip("sentence_transformers")
    model = embed.load_sentence_transformer(str(checkpoint), "float32", "sdpa", CPU, 512)
    assert embed.sees_future(model)
    model[0].auto_model.config.is_causal = True
    assert not embed.sees_future(model)


def test_the_latency_text_has_twelve_tokens(checkpoint):
    from transformers import AutoTokenizer

    texts = synthetic_mix(24)
    lengths, short = embed.describe_texts(str(checkpoint), texts, 512)
    ids = AutoTokenizer.from_pretrained(checkpoint)(texts)["input_ids"]
    assert lengths["total"] == sum(map(len, ids))
    assert len(AutoTokenizer.from_pretrained(checkpoint)(short)["input_ids"]) == 12


def test_share_is_of_the_linears_own_rate():
    lengths = {"texts": 10, "total": 500}
    speeds = embed.throughput(Timing("a", [2.0, 1.0, 4.0]), lengths, flops_per_token=100, linear_rate=50_000.0)
    assert speeds == {"texts_per_s": 5.0, "tokens_per_s": 250.0, "share_of_linears": 0.5}
    assert embed.throughput(Timing("a", skipped="absent"), lengths, 100, 50_000.0) == {}


def test_flops_are_those_of_the_checkpoint_s_linears(checkpoint):
    from safetensors.torch import load_file

    tensors = load_file(checkpoint / "model.safetensors")
    linears = [tensor for name, tensor in tensors.items() if "proj" in name]
    assert SHAPES["quick"].flops_per_token == 2 * sum(tensor.numel() for tensor in linears)
    assert all(tensor.dtype == torch.bfloat16 for tensor in linears)
    assert torch.cat([tensor.flatten() for tensor in linears]).float().std() == pytest.approx(0.02, rel=0.02)
    # SmolLM-135M is 134.5 million parameters, 28.3 of them embeddings of its 49,152 tokens
    assert SHAPES["135M"].flops_per_token / 2 == pytest.approx(134.5e6 - 49152 * 576, rel=0.01)


def test_a_checkpoint_is_the_same_every_time(checkpoint, tmp_path):
    write_checkpoint(SHAPES["quick"], tmp_path, synthetic_mix(24))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (checkpoint / name).read_bytes()


def test_a_given_tokenizer_is_used_unchanged(checkpoint, tmp_path):
    from transformers import AutoTokenizer

    packed = tmp_path / "tokenizer.json.gz"
    packed.write_bytes(gzip.compress((checkpoint / "tokenizer.json").read_bytes()))
    write_checkpoint(SHAPES["quick"], tmp_path / "model", ["other texts"], tokenizer=packed)
    text = synthetic_mix(1)[0]
    given, used = (
        AutoTokenizer.from_pretrained(folder)(text)["input_ids"] for folder in (checkpoint, tmp_path / "model")
    )
    assert given == used
    assert len(used) > 1


def test_linear_rates_name_the_best_way():
    rates = linear_rates(SHAPES["quick"], torch.float32, CPU, rounds=2)
    ways = {name: rate for name, rate in rates.items() if name != "best"}
    assert set(ways) == {f"{way}, {rows} rows" for way in ("plain", "prepacked") for rows in (256, 1024)}
    measured = [rate for rate in ways.values() if isinstance(rate, float)]
    assert rates["best"] == max(measured)
    assert 1e8 < rates["best"] < 1e14


def test_real_mix_keeps_to_its_proportions(tmp_path):
    articles = [[f"Article {a} sentence {s} has quite a few words in it." for s in range(60)] for a in range(4)]
    short = [f"Short {i}." for i in range(50)]
    for name, text in {"wiki": "\n\n".join(map("\n".join, articles)), "tatoeba": "\n".join(short)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    texts = real_mix(40, tmp_path)
    assert texts == real_mix(40, tmp_path)
    paragraphs = [text for text in texts if text.count("Article") > 1]
    assert (len(paragraphs), sum(text in short for text in texts)) == (10, 10)
    assert all(250 <= len(text) <= 1000 for text in paragraphs)
    # consecutive sentences of one article
    places = [int(number) for number in re.findall(r"sentence (\d+)", paragraphs[0])]
    assert places == list(range(places[0], places[0] + len(places)))
    with pytest.raises(FileNotFoundError, match="--synthetic"):
        real_mix(4, tmp_path / "absent")


def test_synthetic_mix_is_deterministic_and_ragged(checkpoint):
    from transformers import AutoTokenizer

    texts = synthetic_mix(200)
    assert texts == synthetic_mix(200)
    assert texts != synthetic_mix(200, seed=1)
    counts, facts = token_counts(texts, AutoTokenizer.from_pretrained(checkpoint), max_length=128)
    assert facts["p90"] > 4 * facts["p10"]
    assert facts["max"] == counts.max() == 128  # paragraphs are cut there
    assert facts["total"] == counts.sum()
