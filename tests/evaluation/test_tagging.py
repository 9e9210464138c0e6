"""`bivec evaluate chunking`, `pos` and `ner` from start to end on the tiny model."""

import random

import numpy as np
import pytest
from typer.testing import CliRunner

from bivec import cli
from bivec.evaluation import tagging
from bivec.evaluation.report import Report

NOUNS, VERBS = ["fox", "dog", "batch", "token"], ["holds", "packed", "jumps", "lazy"]


@pytest.fixture
def folder(tmp_path):
    """Sentences of nouns and verbs; an entity is what stands behind a noun."""
    chance = random.Random(0)
    folder = tmp_path / "small"
    folder.mkdir()

    def sentence():
        words = chance.choices([*NOUNS, *VERBS], k=chance.randint(3, 7))
        kinds = ["NN B-NP" if word in NOUNS else "VB O" for word in words]
        entities = ["O", *("B-PER" if word in NOUNS else "O" for word in words)]
        return "".join(f"{word} {kind} {entity}\n" for word, kind, entity in zip(words, kinds, entities, strict=False))

    for split, count in (("train", 150), ("dev", 20), ("test", 40)):
        (folder / f"{split}.txt").write_text("\n".join(sentence() for _ in range(count)))
    return folder


@pytest.fixture
def run(tiny_llama_folder, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tagging, "_LEAST_STEPS", 150)

    def run(task, *options):
        output = tmp_path / "report.json"
        given = [task, "--model", tiny_llama_folder, "--dtype", "float32", "--data", folder, "--output", output]
        found = CliRunner().invoke(cli.app, ["evaluate", *map(str, given), "--overwrite", *options])
        assert found.exit_code == 0, found.output
        return Report.read(output)

    return run


def test_every_system_layer_and_read_out_is_scored(run):
    report = run("chunking", "--seeds", "2")
    assert report.data.keys() == {"small"}
    names = ["token accuracy", "span F1"]
    places = [(layer, read_out) for layer in (0, 3) for read_out in ("token", "previous", "both")]
    expected = {("most frequent tag", name, None, None) for name in names}
    expected |= {("model", name, *place) for name in names for place in places}
    expected |= {("shuffled labels", name, *place) for name in names for place in places if place[0] == 3}
    assert {(score.system, score.metric, score.layer, score.read_out) for score in report.scores} == expected
    for score in report.scores:
        assert score.low <= score.value <= score.high
        seeds = score.details[f"{score.metric} of each seed"]
        assert len(seeds) == (2 if score.system == "model" else 1)
        assert score.value == pytest.approx(np.mean(seeds), abs=1e-12)


def test_states_that_hold_the_label_give_it_and_others_do_not(run):
    """The embeddings know a word, so its part of speech, and whether it is an entity where the one before is read."""
    for task, knowing, ignorant in (("pos", "token", "previous"), ("ner", "previous", "token")):
        report = run(task, "--seeds", "1")
        found = {(score.read_out, score.layer, score.system): score.value for score in reversed(report.scores)}
        assert found[knowing, 0, "model"] == 1
        assert found["both", 0, "model"] == 1
        assert found[ignorant, 0, "model"] < 0.75
        assert (found[None, None, "most frequent tag"] == 1) == (task == "pos")
        for read_out in ("token", "previous", "both"):
            assert found[read_out, 3, "shuffled labels"] < 0.75


def test_sentences_that_are_left_out_are_told(run, folder):
    with (folder / "train.txt").open("a") as file:
        file.write("\n\nfox NN\n")
    report = run("pos", "--seeds", "1", "--read-out", "token", "--on-error", "skip")
    assert report.notes == ["small: malformed sentences are left out, 1 of train"]


def test_the_published_protocol(run):
    report = run("chunking", "--protocol", "llm2vec")
    (found,) = report.scores
    assert (found.system, found.metric, found.probe) == ("model", "token accuracy", "linear, llm2vec")
    assert (found.layer, found.read_out) == (3, "token")
    assert report.settings["protocol"] == "llm2vec"
