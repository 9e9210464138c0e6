"""The peers of the embedding benchmark: bidirectional, padding unseen, float32's vectors; a reason where absent."""

import sys

import numpy as np
import pytest

from bivec import Encoder
from bivec.benchmarks import llama_cpp_peer, openvino_peer
from bivec.benchmarks.shapes import SHAPES, write_checkpoint
from bivec.benchmarks.texts import synthetic_mix

TEXTS = synthetic_mix(9)
CALIBRATION = synthetic_mix(8, seed=1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(SHAPES["quick"], folder, synthetic_mix(24))
    return str(folder)


@pytest.fixture(scope="module")
def expected(checkpoint) -> np.ndarray:
    return Encoder.from_pretrained(checkpoint, dtype="float32", device="cpu", max_length=64).encode(TEXTS)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(
    ("package", "contenders"),
    [
        ("openvino", lambda folder: openvino_peer.openvino(folder, 64, CALIBRATION)),
        ("llama_cpp", lambda folder: llama_cpp_peer.llama_cpp(folder, 64)),
    ],
)
def test_a_peer_that_is_not_installed_is_named_with_the_reason(package, contenders, monkeypatch, checkpoint):
    monkeypatch.setitem(sys.modules, package, None)
    found = contenders(checkpoint)
    assert len({contender.name for contender in found}) == len(found) > 3
    assert all(package in contender.encode for contender in found)


def test_without_nncf_only_eight_bits_are_missing(monkeypatch, checkpoint):
    pytest.importorskip("openvino", reason="openvino is of the bench extra")
    monkeypatch.setitem(sys.modules, "nncf", None)
    openvino_peer.quantized.cache_clear()
    for contender in openvino_peer.openvino(checkpoint, 64, CALIBRATION):
        if contender.products == "int8":
            assert isinstance(contender.encode, str)
        if contender.dtype == "float32":
            assert callable(contender.encode)


def test_openvino_gives_float32_s_vectors_in_any_batch(checkpoint, expected):
    pytest.importorskip("openvino", reason="openvino is of the bench extra")
    for contender in openvino_peer.openvino(checkpoint, 64, ()):
        if contender.dtype == "float32":
            np.testing.assert_allclose(contender.encode(TEXTS), expected, rtol=1e-3, atol=1e-4)
        if contender.products == "int8":
            assert "calibrate" in contender.encode or "bfloat16" in contender.encode


def test_nncf_s_eight_bits_are_near_float32_and_not_the_same(checkpoint, expected):
    pytest.importorskip("openvino", reason="openvino is of the bench extra")
    pytest.importorskip("nncf", reason="nncf is of the bench extra")
    contenders = openvino_peer.openvino(checkpoint, 64, CALIBRATION)
    vectors = next(contender for contender in contenders if contender.dtype == "int8+float32").encode(TEXTS)
    found = cosines(vectors, expected)
    assert 0.8 < found.min() < 0.99999


def test_llama_cpp_in_eight_bits_is_near_float32_alone_and_in_batches(checkpoint):
    pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    long = Encoder.from_pretrained(checkpoint, dtype="float32", device="cpu", max_length=512).encode(TEXTS)
    for contender in llama_cpp_peer.llama_cpp(checkpoint, 512)[:2]:
        assert cosines(contender.encode(TEXTS), long).min() > 0.99


def test_padding_is_zeros_that_the_mask_hides():
    batch = openvino_peer.padded([[5, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert all(part.dtype == np.int64 for part in batch.values())


def test_bfloat16_is_not_asked_of_a_limited_onednn(monkeypatch, checkpoint):
    pytest.importorskip("openvino", reason="openvino is of the bench extra")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX512_CORE")
    reasons = [
        contender.encode for contender in openvino_peer.openvino(checkpoint, 64, ()) if contender.dtype == "bfloat16"
    ]
    assert all("bfloat16" in reason for reason in reasons)
