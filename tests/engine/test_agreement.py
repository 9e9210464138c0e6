"""What a dtype costs: cosines with float32 on built-in sentences, with one model in memory at a time."""

import weakref

import numpy as np
import pytest

from bivec import Encoder
from bivec.engine import agreement
from bivec.engine.agreement import SENTENCES, Sample, describe_cosines, describe_with_cost


@pytest.fixture
def load(tiny_llama_folder):
    """`Encoder.from_pretrained` of the tiny model, that notes its calls and wants the earlier encoders gone."""
    loaded, calls = [], []

    def load(**arguments):
        assert not any(encoder() for encoder in loaded)
        encoder = Encoder.from_pretrained(tiny_llama_folder, **arguments)
        loaded.append(weakref.ref(encoder))
        calls.append(arguments)
        return encoder

    load.calls = calls
    return load


def cosines(first, second):
    return (first * second).sum(axis=1) / np.linalg.norm(first, axis=1) / np.linalg.norm(second, axis=1)


def test_cosines_are_of_the_vectors_and_the_models_never_together(load, tiny_llama_folder):
    found = describe_with_cost(load, dtype="bfloat16", attention="sdpa", max_length=40)
    assert [(call["dtype"], call["max_length"]) for call in load.calls] == [("bfloat16", 40), ("float32", 40)]
    ours, theirs = (
        Encoder.from_pretrained(tiny_llama_folder, dtype=dtype, max_length=40).encode(SENTENCES).astype(float)
        for dtype in ("bfloat16", "float32")
    )
    plain, centred = cosines(ours, theirs), cosines(ours - theirs.mean(axis=0), theirs - theirs.mean(axis=0))
    assert plain.min() < 0.99999
    number = f"({len(SENTENCES)} built-in sentences)"
    shown = f"least {plain.min():.4f}, median {np.median(plain):.4f} {number}"
    assert found["backend"]["cosine with float32"] == shown
    assert found["backend"]["the same, centred"] == f"least {centred.min():.4f}, median {np.median(centred):.4f}"


def test_float32_is_compared_with_nothing(load):
    found = describe_with_cost(load, dtype="float32", attention="auto", max_length=None)
    assert len(load.calls) == 1
    assert not [name for part in found.values() for name in part if "cosine" in name]


def test_an_attention_of_half_precision_alone_is_not_asked_of_float32(load):
    def without_flash(attention, **arguments):
        return load(attention="sdpa" if attention == "flash" else attention, **arguments)

    describe_with_cost(without_flash, dtype="bfloat16", attention="flash", max_length=40)
    assert [call["attention"] for call in load.calls] == ["sdpa", "auto"]


def test_no_room_for_float32_is_said(load, monkeypatch):
    monkeypatch.setattr(agreement, "free_memory", lambda device: 2**18)
    found = describe_with_cost(load, dtype="bfloat16", attention="auto", max_length=40)
    assert len(load.calls) == 1
    assert found["backend"]["cosine with float32"] == "not measured: float32 takes up to 0.0 GiB, and 0.0 GiB are free"


def test_what_all_vectors_share_does_not_count_when_centred():
    generator = np.random.default_rng(0)
    exact = generator.normal(size=(24, 16)) + 100.0
    found = exact + generator.normal(size=(24, 16))
    lines = describe_cosines(Sample(found, [None] * 24), Sample(exact, [None] * 24))
    assert lines["cosine with float32"].startswith("least 0.999")
    assert float(lines["the same, centred"].split()[1].rstrip(",")) < 0.8
    centre = exact.mean(axis=0)  # a shift of all vectors counts
    expected = cosines(found + 3.0 - centre, exact - centre)
    np.testing.assert_allclose(agreement.cosines(found + 3.0, exact)[1], expected)


def test_sentences_without_a_vector_are_counted():
    vectors = np.eye(24)
    broken = vectors.copy()
    broken[[3, 5]] = 0.0
    reasons = [None if row not in (3, 5) else "it is not finite" for row in range(24)]
    found = describe_cosines(Sample(broken, reasons), Sample(vectors, [None] * 24))["cosine with float32"]
    assert found == "least 1.0000, median 1.0000 (22 built-in sentences); 2 have no vector: it is not finite"
    found = describe_cosines(Sample(broken, ["it is not finite"] * 24), Sample(vectors, [None] * 24))
    assert found == {"cosine with float32": "not measured; 24 have no vector: it is not finite"}


def test_the_sentences_are_unlike_and_short_and_long():
    assert len(set(SENTENCES)) == len(SENTENCES) == 24
    lengths = [len(sentence) for sentence in SENTENCES]
    assert min(lengths) < 10
    assert max(lengths) > 400
    assert any(ord(character) > 0x400 for sentence in SENTENCES for character in sentence)
