"""The encoder that comes with the package: small, whole, loaded without a network, better than counting words."""

import subprocess
import sys

import pytest
from scipy.stats import spearmanr

from bivec import DEFAULT_MODEL, Encoder
from bivec.evaluation import sts

PAIRS = [
    ("A man is playing a guitar.", "Someone plays an instrument."),
    ("The stock market fell sharply today.", "Shares dropped at the exchange."),
    ("Two dogs run through a field of grass.", "Dogs are running outside."),
    ("She was born in a small village in France.", "Her birthplace is a French village."),
]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.from_pretrained(device="cpu")


def test_it_is_small():
    files = [path for path in DEFAULT_MODEL.rglob("*") if path.is_file()]
    assert 5e6 < sum(path.stat().st_size for path in files) <= 10e6
    assert {"config.json", "model.safetensors", "tokenizer.json", "bivec.json", "README.md"} <= {p.name for p in files}


def test_a_paraphrase_is_nearer_than_any_other_sentence(encoder):
    first, second = (encoder.encode([pair[side] for pair in PAIRS]) for side in (0, 1))
    assert encoder.similarity(first, second).argmax(dim=1).tolist() == list(range(len(PAIRS)))


def test_it_needs_no_network():
    program = """
import socket
def refuse(*_): raise AssertionError("a connection was tried")
socket.socket.connect = socket.getaddrinfo = refuse
from bivec import Encoder
assert Encoder.from_pretrained().encode("a text").shape == (448,)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=300).returncode == 0


def test_text_similarity(encoder, shared_data):
    """Above TF-IDF of words, whose correlation is 0.641."""
    (task,) = sts.read_tasks(shared_data / "stsb", "test")
    first, second = encoder.encode(task.pairs.first), encoder.encode(task.pairs.second)
    assert spearmanr(task.pairs.scores, sts.cosines(first, second)).statistic > 0.65
