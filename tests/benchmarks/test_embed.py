"""The embedding benchmark: agreement before speed, a peer that is really bidirectional, and honest ceilings."""

import argparse
import gzip
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from bivec.benchmarks import embed, llama_cpp_peer, openvino_peer
from bivec.benchmarks import sentence_transformers_peer as peer
from bivec.benchmarks.contender import LEAST_COSINE, Contender, agreement, throughput
from bivec.benchmarks.shapes import SHAPES, linear_rates, write_checkpoint
from bivec.benchmarks.texts import real_mix, synthetic_mix, token_counts
from bivec.benchmarks.timing import Timing

CPU = torch.device("cpu")
QUICK = ["--quick", "--device", "cpu", "--synthetic"]


@pytest.fixture
def cheap_ceilings(monkeypatch):
    """The ceilings and the other peers have tests of their own; here any will do."""
    monkeypatch.setattr(openvino_peer, "openvino", lambda *_: [])
    monkeypatch.setattr(openvino_peer, "description", lambda *_: {})
    monkeypatch.setattr(llama_cpp_peer, "llama_cpp", lambda *_: [])
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


def our_rows(document: dict) -> list[dict]:
    """bivec's, without eight bits where the processor does not multiply them."""
    rows = rows_of(document, "bivec")
    found = [row for row in rows if not str(row["skipped"]).startswith("ValueError: dtype int8 cannot be used here")]
    assert len(found) >= 2
    return found


def test_quick_run_compares_agreeing_vectors(capsys, tmp_path, cheap_ceilings):
    pytest.importorskip("sentence_transformers")
    assert embed.main([*QUICK, "--output", str(tmp_path / "r.json")]) == 0
    document = result(capsys)
    assert document == json.loads((tmp_path / "r.json").read_text())
    peers = rows_of(document, "sentence-transformers")
    swept = [row for row in document["sweep"] if row["name"].startswith("sentence-transformers")]
    fastest = [
        min((row for row in swept if dtype in row["name"]), key=lambda row: row["median_s"])["name"]
        for dtype in ("float32", "bfloat16")
    ]
    assert {row["name"] for row in peers} == {embed.DEFAULT, *fastest}
    assert document["best_peer"] == min(peers, key=lambda row: row["median_s"])["name"]
    assert document["causal_control_cosine"] < 0.9
    for row in our_rows(document):
        assert row["skipped"] is None
        assert row["median_cosine"] >= row["least_cosine"] >= LEAST_COSINE[row["dtype"].partition("+")[0]]
        assert row["num_nan"] == 0
        assert row["tokens_per_s"] == pytest.approx(document["tokens"]["total"] / row["median_s"])
        assert row["speedup_over_default"]["median"] > 0
        assert row["speedup_over_best"]["median"] > 0
        assert row["latency_over_peer"]["median"] > 0


def test_without_the_peer_its_rows_are_skipped_and_no_speed_up_is_reported(capsys, monkeypatch, cheap_ceilings):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)  # as if it were not installed
    assert embed.main(QUICK) == 0
    document = result(capsys)
    peers = rows_of(document, "sentence-transformers") + document["sweep"]
    assert len(peers) == 7 + 3
    assert all("sentence_transformers" in row["skipped"] and row["median_s"] is None for row in peers)
    for row in our_rows(document):
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
        if isinstance(right.encode, str):
            return right

        def encode(texts):
            vectors = right.encode(texts).copy()
            vectors[-1] = vectors[0]
            return vectors

        return Contender(right.name, right.dtype, encode)

    monkeypatch.setattr(embed, "load_bivec", wrong_for_one_text)
    assert embed.main(QUICK) == 1
    for row in our_rows(result(capsys)):
        assert "vectors disagree" in row["refused"]
        assert "speedup_over_default" not in row


def test_a_blind_check_refuses_too():
    reference = np.random.default_rng(0).normal(size=(5, 8))
    ours = Contender("bivec", "float32", lambda texts: np.empty(0))
    assert agreement(ours, reference, reference, control=0.5)["refused"] is None
    assert "blind" in agreement(ours, reference, reference, control=1.0)["refused"]


def test_vectors_that_are_not_finite_are_counted_and_refuse_ours_alone():
    reference = np.random.default_rng(0).normal(size=(5, 8))
    broken = reference.copy()
    broken[1, 3], broken[4, 0] = np.nan, np.inf
    ours, other = (Contender(name, "int8+float32", lambda texts: np.empty(0)) for name in ("bivec int8", "peer int8"))
    found = agreement(ours, broken, reference, control=0.5)
    assert (found["num_nan"], found["agrees"]) == (2, False)
    assert found["least_cosine"] == pytest.approx(1)
    assert "2 vectors are not finite" in found["refused"]
    found = agreement(other, broken, reference, control=0.5)
    assert (found["num_nan"], found["refused"], found["note"]) == (2, None, "not the same vectors")
    none = agreement(ours, np.full((5, 8), np.nan), reference, control=0.5)
    assert (none["num_nan"], none["least_cosine"], none["agrees"]) == (5, None, False)


@pytest.mark.parametrize(("cosine", "agrees"), [(0.989, False), (0.991, True)])
def test_eight_bits_agree_from_99_hundredths_on(cosine, agrees):
    angle = np.arccos(cosine)
    reference = np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    vectors = reference.copy()
    vectors[2] = [np.sin(angle), np.cos(angle)]
    found = agreement(Contender("bivec int8", "int8+bfloat16", ""), vectors, reference, control=0.5)
    assert found["agrees"] is agrees
    assert found["least_cosine"] == pytest.approx(cosine)
    assert found["median_cosine"] == pytest.approx(1)


def test_the_peer_is_bidirectional_and_the_check_would_notice_if_not(checkpoint):
    pytest.importorskip("sentence_transformers")
    model = peer.load_sentence_transformer(str(checkpoint), "float32", "sdpa", CPU, 512)
    assert peer.sees_future(model)
    model[0].auto_model.config.is_causal = True
    assert not peer.sees_future(model)


def test_the_latency_text_has_twelve_tokens(checkpoint):
    from transformers import AutoTokenizer

    texts = synthetic_mix(24)
    lengths, short = embed.describe_texts(str(checkpoint), texts, 512)
    ids = AutoTokenizer.from_pretrained(checkpoint)(texts)["input_ids"]
    assert lengths["total"] == sum(map(len, ids))
    assert len(AutoTokenizer.from_pretrained(checkpoint)(short)["input_ids"]) == 12


def test_the_fastest_setting_of_each_family_runs_beside_the_defaults(capsys, monkeypatch, cheap_ceilings):
    now = [0.0]
    monkeypatch.setattr(embed, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    def made_up(name: str, dtype: str, seconds: float, off: float = 0.0) -> Contender:
        def encode(texts: list[str]) -> np.ndarray:
            now[0] += seconds
            rows = np.array([np.random.default_rng(len(text)).normal(size=16) for text in texts])
            rows[0, 0] += off
            return rows

        return Contender(name, dtype, encode)

    def peers(folder, device, max_length):
        assert Path(folder, "config.json").is_file()
        return [
            made_up(embed.DEFAULT, "float32", 0.02),
            made_up("sentence-transformers float32, batch 8", "float32", 0.01),
            made_up("other int8, batch 4", "int8+float32", 0.012, off=50),
            made_up("other int8, batch 8", "int8+bfloat16", 0.003, off=50),
            Contender("absent int8, batch 4", "int8", "absent is not installed"),
            Contender("absent int8, batch 8", "int8", "absent is not installed"),
        ]

    monkeypatch.setattr(embed, "sentence_transformers", peers)
    monkeypatch.setattr(embed, "load_sentence_transformer", lambda *_: None)
    monkeypatch.setattr(embed, "causal_control", lambda *_: 0.1)
    monkeypatch.setattr(embed, "breakdown", lambda *_: None)
    monkeypatch.setattr(embed, "load_bivec", lambda folder, choice, *_: made_up(f"bivec {choice}", choice, 0.001))
    monkeypatch.setitem(LEAST_COSINE, "auto", 0.9)
    assert embed.main(QUICK) == 0
    document = result(capsys)
    rows = {row["name"]: row for row in document["rows"]}
    assert list(rows) == [
        embed.DEFAULT,
        "sentence-transformers float32, batch 8",
        "other int8, batch 8",
        "absent int8, batch 4",
        "bivec auto",
        "bivec float32",
        "bivec int8",
    ]
    assert rows["absent int8, batch 4"]["skipped"] == "absent is not installed"
    # its speed stands there, and that its vectors are others
    assert rows["other int8, batch 8"]["note"] == "not the same vectors"
    assert rows["other int8, batch 8"]["speedup_over_best"]["median"] == pytest.approx(10 / 3)
    ours = rows["bivec int8"]
    assert ours["speedup_over other int8"]["median"] == pytest.approx(3)
    assert ours["speedup_over sentence-transformers float32"]["median"] == pytest.approx(10)
    assert ours["speedup_over absent int8"] is None
    assert "speedup_over other int8" not in rows["other int8, batch 8"]


def test_calibration_texts_are_of_the_mix_and_none_of_the_timed_ones(tmp_path):
    parser = argparse.ArgumentParser()
    for option in ("--texts", "--data"):
        parser.add_argument(option, type=Path)
    parser.add_argument("--synthetic", action="store_true")
    texts = embed.choose_texts(None, tmp_path, True, 200)[1]
    others = embed.calibration_texts(parser.parse_args(["--synthetic"]), texts)
    assert len(others) > 100
    assert not set(others) & set(texts)
    (tmp_path / "texts").write_text("".join(f"text {i % 7}\n" for i in range(20)))
    timed = embed.choose_texts(tmp_path / "texts", tmp_path, False, 4)[1]
    others = embed.calibration_texts(parser.parse_args(["--texts", str(tmp_path / "texts")]), timed)
    assert set(others) == {"text 4", "text 5", "text 6"}


def test_share_is_of_the_linears_own_rate():
    lengths = {"texts": 10, "total": 500}
    speeds = throughput(Timing("a", [2.0, 1.0, 4.0]), lengths, flops_per_token=100, linear_rate=50_000.0)
    assert speeds == {"texts_per_s": 5.0, "tokens_per_s": 250.0, "share_of_linears": 0.5}
    assert throughput(Timing("a", skipped="absent"), lengths, 100, 50_000.0) == {}


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


def test_the_rate_of_eight_bit_linears_is_of_packed_ones():
    rates = linear_rates(SHAPES["quick"], torch.int8, CPU, rounds=2)
    assert set(rates) == {"best", "prepacked, 256 rows", "prepacked, 1024 rows"}
    if any(isinstance(rate, str) for rate in rates.values()):
        pytest.skip(f"torch has no eight-bit product here: {rates}")
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
