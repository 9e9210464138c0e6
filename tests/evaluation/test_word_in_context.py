"""Word-in-Context: its files, what probes see of a pair, the best threshold, and figures of states that are known."""

import numpy as np
import pytest
import torch

from bivec import Encoder
from bivec.evaluation import word_in_context
from bivec.evaluation.probes import DEVELOPMENT, TEST, TRAIN
from bivec.evaluation.states import WordStates
from bivec.evaluation.tasks import EvaluateSettings
from bivec.evaluation.word_in_context import by_threshold, features, read_task, read_units

ROWS = ["Defeat\tN\t4-2\tIt was a narrow defeat .\tThe army's defeats .", "groom\tV\t0-1\tGroom  it .\tShe grooms it ."]


def write(folder, rows, labels):
    folder.mkdir(exist_ok=True)
    (folder / "test.data.txt").write_text("".join(f"{row}\n" for row in rows), errors="surrogateescape")
    (folder / "test.gold.txt").write_text("".join(f"{label}\n" for label in labels))
    return folder


def test_both_words_are_found(tmp_path):
    task = read_task(write(tmp_path, ROWS, "TF"))
    assert task.types.tolist() == ["defeat", "groom"]
    assert task.targets.tolist() == [[1, 0]]
    words = [text[slice(*span)] for text, (span,) in zip(task.texts, task.spans, strict=True)]
    assert words == ["defeat", "Groom", "defeats", "grooms"]


@pytest.mark.parametrize(
    ("row", "label", "message"),
    [
        ("a\tN\t0-0\tOne .", "T", r"test\.data\.txt:3: 5 fields between tabs are needed .*, got 4"),
        ("a\tN\t0\tOne .\tTwo .", "T", r"test\.data\.txt:3: the words' places must be two numbers, as 4-4, got '0'"),
        ("a\tN\t0-2\tOne .\tTwo .", "T", r"test\.data\.txt:3: a word's place must be below 2, .*, got 2"),
        (" \tN\t0-0\tOne .\tTwo .", "T", r"test\.data\.txt:3: the lemma is empty"),
        ("\udcff\tN\t0-0\tOne .\tTwo .", "T", r"test\.data\.txt:3: invalid UTF-8"),
        ("a\tN\t0-0\tOne .\tTwo .", "1", r"test\.gold\.txt:3: the label must be T or F, got '1'"),
    ],
)
def test_a_malformed_row_is_named_or_left_out(tmp_path, row, label, message):
    write(tmp_path, [*ROWS, row], ["T", "F", label])
    with pytest.raises(ValueError, match=message):
        read_task(tmp_path)
    task = read_task(tmp_path, "skip")
    assert (len(task.types), len(task.texts), task.counts) == (2, 4, {"bad rows left out": 1})


def test_files_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"test\.gold\.txt must have a line for each of .*'s 2, got 1"):
        read_task(write(tmp_path / "a", ROWS, "T"))
    (tmp_path / "a" / "test.gold.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"a must hold test\.data\.txt and test\.gold\.txt, and has no test\.g"):
        read_task(tmp_path / "a")


def test_the_folder_within_a_folder_is_found(tmp_path):
    settings = EvaluateSettings("probing", str(tmp_path), "")
    assert read_units(settings) == []
    rows = [f"w{place}\tN\t0-1\tOne .\tTwo two ." for place in range(12)]
    write(tmp_path / "inner", rows, "TF" * 6)
    assert [unit.name for unit in read_units(settings)] == ["word_in_context"]
    write(tmp_path, rows, "TF" * 6)
    with pytest.raises(ValueError, match=r"and .*inner both hold test\.data\.txt: name the folder of one"):
        read_units(settings)


def test_what_a_probe_sees():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(6, 4)).astype(np.float32)
    states = WordStates(
        (0,), np.ones(6, bool), np.ones(6, bool), torch.from_numpy(vectors)[None, :, None].expand(-1, -1, 2, -1)
    )
    u, v = vectors[[0, 1, 1]], vectors[[3, 4, 5]]
    found = {
        name: features(states, np.array([[0, 1, 1], [3, 4, 5]]), 0, "token", name) for name in word_in_context.FEATURES
    }
    expected = (u * v).sum(1) / np.linalg.norm(u, axis=1) / np.linalg.norm(v, axis=1)
    np.testing.assert_allclose(found["cosine"], expected[:, None], rtol=1e-5)
    np.testing.assert_array_equal(found["difference"], np.abs(u - v))
    np.testing.assert_array_equal(found["concatenated"], np.hstack([u, v]))


def test_the_threshold_is_the_best_of_all_on_the_rows_that_are_known():
    generator = np.random.default_rng(1)
    similarities = generator.normal(size=80).round(1)  # with ties
    gold = (similarities + generator.normal(size=80) > 0).astype(int)
    roles = np.stack([generator.choice([TRAIN, DEVELOPMENT, TEST], 80) for _ in range(4)])
    answers = by_threshold(similarities, gold, roles)
    for its_roles, its_answers in zip(roles, answers, strict=True):
        known = its_roles != TEST
        all_bounds = [-np.inf, *np.unique(similarities)]
        best = max(((similarities > bound) == gold)[known].mean() for bound in all_bounds)
        assert (its_answers == gold)[known].mean() == best
        assert its_answers[similarities.argmax()] == 1 or its_answers.sum() == 0
    flipped = np.where(roles == TEST, 1 - gold, gold)
    for place in range(4):  # what the test rows are called changes nothing
        np.testing.assert_array_equal(by_threshold(similarities, flipped[place], roles[[place]]), answers[[place]])


@pytest.fixture
def score(tiny_llama_folder, tmp_path, monkeypatch):
    """score(knows, ...): figures of 240 pairs of 120 lemmas; states tell in context whether a pair is T, or nothing."""
    generator = np.random.default_rng(2)
    labels = generator.permutation(240) % 2
    rows = [f"w{place // 2}\tN\t1-1\ta w{place}x .\tthe w{place}y ." for place in range(240)]
    folder = write(tmp_path / "data", rows, ["FT"[label] for label in labels])
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")

    def evaluate(knows, **settings):
        def states(encoder, words, layers, sub_tokens="mean", *, progress=""):
            found = generator.normal(size=(len(layers), len(words.texts), 2, 8))
            if knows and words.texts[0].startswith("a "):
                first, second = found[:, :240], found[:, 240:]
                second[:, labels == 1] = first[:, labels == 1] + 0.01 * second[:, labels == 1]
                second[:, labels == 0] = -first[:, labels == 0]
            is_there = np.ones(len(words.texts), dtype=bool)
            return WordStates(tuple(layers), is_there, is_there, torch.from_numpy(found).float())

        monkeypatch.setattr(word_in_context, "word_states", states)
        (unit,) = read_units(EvaluateSettings("probing", str(folder), "", **settings))
        scores = unit.score(encoder).scores
        return {(one.dataset.split()[-1], one.system, one.probe, one.layer, one.read_out): one for one in scores}

    return evaluate


def test_states_that_tell_the_sense_have_1(score):
    found = score(True, seeds=2, read_out="token")
    for probe in ("linear", "mlp", "threshold"):
        assert found["cosine", "model", probe, 3, "token"].value == 1.0
    assert found["difference", "model", "mlp", 3, "token"].value > 0.95
    one = found["cosine", "model", "linear", 3, "token"]
    assert (one.n, one.details["word types"], sum(one.items["under"]), len(one.items["under"])) == (240, 120, 240, 120)
    # every shuffled fold takes one side for T, by chance: all of it right or wrong, but not in all folds
    assert found["cosine", "shuffled labels", "linear", 3, "token"].value < 1
    assert 0.4 < found["cosine", "word alone", "linear", 3, "token"].value < 0.6


def test_random_states_are_at_chance(score):
    found = score(False, seeds=1, read_out="both")
    for feature, probe in (
        ("cosine", "threshold"),
        ("cosine", "mlp"),
        ("difference", "mlp"),
        ("concatenated", "linear"),
    ):
        one = found[feature, "model", probe, 3, "both"]
        assert one.low < 0.5 < one.high, (feature, probe)


def test_the_published_protocol(score):
    found = score(True, seeds=1, protocol="feng2025")
    assert {layer for *_, layer, _ in found} == {None, 3}
    assert {read_out for *_, read_out in found} == {None, "token"}
    assert {(one.split, one.n) for one in found.values()} == {("random fifth", 48)}
    assert found["cosine", "model", "threshold", 3, "token"].value == 1.0


def test_another_protocol_is_refused(score):
    with pytest.raises(ValueError, match="the protocol must be bivec or feng2025, got llm2vec"):
        score(True, protocol="llm2vec")
