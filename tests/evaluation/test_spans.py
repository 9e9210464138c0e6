"""Spans and their F1 as seqeval's default mode has them; token accuracy as scikit-learn's."""

import random

import numpy as np
import pytest

from bivec.evaluation.spans import agreement, spans

# what seqeval 1.2.2 gives: type, first and last word
EXPECTED = [
    ("B-A I-A O B-B", [("A", 0, 1), ("B", 3, 3)]),
    ("I-A I-A O I-A", [("A", 0, 1), ("A", 3, 3)]),
    ("I-A B-A I-A", [("A", 0, 0), ("A", 1, 2)]),
    ("B-A I-B I-B", [("A", 0, 0), ("B", 1, 2)]),
    ("I-A I-B B-B O I-B", [("A", 0, 0), ("B", 1, 1), ("B", 2, 2), ("B", 4, 4)]),
    ("B-A B-A I-A", [("A", 0, 0), ("A", 1, 2)]),
    ("O O O", []),
    ("S-A B-A I-A E-A O E-A", [("A", 0, 0), ("A", 1, 3), ("A", 5, 5)]),
    ("B-A E-A E-A S-A I-A", [("A", 0, 1), ("A", 2, 2), ("A", 3, 3), ("A", 4, 4)]),
    ("S-A E-A", [("A", 0, 0), ("A", 1, 1)]),
    ("B-A S-A I-A", [("A", 0, 0), ("A", 1, 1), ("A", 2, 2)]),
    ("I-A E-A I-A", [("A", 0, 1), ("A", 2, 2)]),
    ("B-A E-B E-B", [("A", 0, 0), ("B", 1, 1), ("B", 2, 2)]),
    ("B-A O I-A E-A E-A", [("A", 0, 0), ("A", 2, 3), ("A", 4, 4)]),
    ("B-creative-work I-creative-work B-creative-work", [("creative-work", 0, 1), ("creative-work", 2, 2)]),
    ("S-A I-B E-B I-B", [("A", 0, 0), ("B", 1, 2), ("B", 3, 3)]),
]
F1 = 0.7273991655076495  # of the random sequences below


@pytest.fixture
def random_sequences():
    """200 sequences of every tag behind every other, and others that agree with them in most places."""
    generator = random.Random(0)
    tags = ["O", "O"] + [f"{prefix}-{kind}" for prefix in "BIES" for kind in "AB"]
    gold = [[generator.choice(tags) for _ in range(generator.randint(1, 9))] for _ in range(200)]
    predicted = [[tag if generator.random() < 0.7 else generator.choice(tags) for tag in tags_] for tags_ in gold]
    return gold, predicted


@pytest.mark.parametrize(("tags", "expected"), EXPECTED, ids=[tags for tags, _ in EXPECTED])
def test_spans_are_seqevals(tags, expected):
    assert spans(tags.split()) == {(kind, first, last + 1) for kind, first, last in expected}


def test_f1_is_seqevals(random_sequences):
    over, under = agreement(*random_sequences)
    assert over.sum() / under.sum() == pytest.approx(F1, abs=1e-15)
    assert len(over) == len(under) == 200


def test_seqeval_itself_agrees(random_sequences):
    metrics = pytest.importorskip("seqeval.metrics", reason="seqeval is not installed")
    over, under = agreement(*random_sequences)
    assert over.sum() / under.sum() == pytest.approx(metrics.f1_score(*random_sequences), abs=1e-15)


def test_no_sentences_have_no_spans():
    over, under = agreement([], [])
    assert over.shape == under.shape == (0,)
    np.testing.assert_array_equal(agreement([["O"]], [["B-A"]]), [[0], [1]])
