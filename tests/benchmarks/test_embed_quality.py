"""STS-B beside a speed: the correlation of the vectors that a contender gives, and what is said where it gives none."""

import numpy as np
import pytest

from bivec.benchmarks.contender import Contender
from bivec.benchmarks.embed_quality import similarity_scores


@pytest.fixture
def data(tmp_path):
    rows = [(angle, 5 - angle) for angle in range(6)]
    lines = [f"at 0,at {angle},{score}" for angle, score in rows]
    (tmp_path / "sts-dev.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def vectors_of(texts: list[str], scale: float = 0.2) -> np.ndarray:
    angles = np.array([float(text.split()[1]) for text in texts]) * scale
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def test_the_correlation_is_of_the_contender_s_own_cosines(data):
    def wrong(texts: list[str]) -> np.ndarray:
        return vectors_of(texts, scale=np.pi / 3.5)  # far angles come back near: their cosines rise again

    def broken(texts: list[str]) -> np.ndarray:
        vectors = vectors_of(texts)
        vectors[texts.index("at 5")] = np.nan
        return vectors

    def failing(texts: list[str]) -> np.ndarray:
        raise RuntimeError("no memory")

    scores = similarity_scores(
        [
            Contender("right", "float32", vectors_of),
            Contender("wrong", "int8", wrong),
            Contender("broken", "int8", broken),
            Contender("failing", "int8", failing),
            Contender("absent", "int8", "not installed"),
        ],
        data,
        reference="right",
    )
    assert scores["right"]["spearman"] == pytest.approx(1)
    assert scores["right"]["least_cosine"] == pytest.approx(1)
    assert scores["wrong"]["spearman"] < 0.99
    assert scores["wrong"]["least_cosine"] < 0.9
    assert scores["broken"]["num_nan"] == 1
    assert scores["broken"]["spearman"] == pytest.approx(1)  # 0 is still the least of the cosines
    first_three = similarity_scores([Contender("wrong", "int8", wrong)], data, "right", num_pairs=3)
    assert first_three["wrong"]["spearman"] == pytest.approx(1)
    assert scores["failing"] == {"skipped": "RuntimeError: no memory"}
    assert scores["absent"] == {"skipped": "not installed"}


def test_without_data_there_are_no_scores(tmp_path):
    assert similarity_scores([Contender("right", "float32", vectors_of)], tmp_path / "absent", "right") == {}
