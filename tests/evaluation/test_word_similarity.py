"""`bivec evaluate words`: its correlations against scipy, chance, a model that is right, and what its controls are."""

import json

import numpy as np
import pytest
import scipy.stats
import torch
from typer.testing import CliRunner

from bivec import Encoder, cli
from bivec.evaluation import word_similarity
from bivec.evaluation.report import Report
from bivec.evaluation.states import Words, WordStates, word_states
from bivec.evaluation.sts import cosines

NUM_PAIRS = 60


@pytest.fixture
def run(tiny_llama_folder, tmp_path):
    """Scores a folder on the tiny model; returns what is printed, and scores by system, metric, layer, read-out."""

    def evaluate(folder, *options):
        output = tmp_path / "report.json"
        given = ["words", "--model", tiny_llama_folder, "--dtype", "float32", "--data", folder, "--output", output]
        found = CliRunner().invoke(cli.app, ["evaluate", *map(str, given), "--overwrite", *options])
        assert found.exit_code == 0, found.output
        scores = Report.read(output).scores
        by_key = {(score.system, score.metric, score.layer, score.read_out): score for score in scores}
        assert len(by_key) * len(list(folder.iterdir())) == len(scores)
        return found.stdout, by_key

    return evaluate


@pytest.fixture
def folder(tmp_path):
    """Pairs with random scores; half of the first words stand in two of them."""
    generator = np.random.default_rng(0)
    folder = tmp_path / "pairs"
    folder.mkdir()
    gold = np.round(generator.uniform(0, 10, NUM_PAIRS), 1)
    rows = [f"first{place % 40} second{place} {score}\n" for place, score in enumerate(gold)]
    (folder / "random.txt").write_text("".join(rows))
    return folder


@pytest.fixture
def replace_states(monkeypatch):
    """replace_states(vector): states are `vector(word, layer, place)`, 0 the token's place and 1 the one before."""

    def replace(vector):
        def states(encoder, words, layers, sub_tokens="mean", *, progress=""):
            spans = [span for its_spans in words.spans for span in its_spans]
            texts = [text for text, its_spans in zip(*words, strict=True) for _ in its_spans]
            words = [text[slice(*span)] for text, span in zip(texts, spans, strict=True)]
            found = [[[vector(word, layer, place) for place in (0, 1)] for word in words] for layer in layers]
            is_there = np.ones(len(spans), dtype=bool)
            return WordStates(tuple(layers), is_there, is_there, torch.tensor(np.array(found)).float())

        monkeypatch.setattr(word_similarity, "word_states", states)

    return replace


@pytest.fixture
def random_states(replace_states):
    """A vector a word, layer and place, the same each time."""
    known: dict = {}
    generator = np.random.default_rng(1)
    replace_states(lambda *key: known.setdefault(key, generator.normal(size=16).astype(np.float32)))
    return known


def test_correlations_are_scipys_and_random_vectors_are_at_chance(run, folder, random_states):
    _, scores = run(folder)
    rows = [line.split() for line in (folder / "random.txt").read_text().splitlines()]
    gold = [float(score) for *_, score in rows]
    for layer in (0, 3):
        for read_out, places in (("token", [0]), ("previous", [1]), ("both", [0, 1])):
            first, second = (
                np.array([np.concatenate([random_states[row[side], layer, place] for place in places]) for row in rows])
                for side in (0, 1)
            )
            similarities = [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in zip(first, second, strict=True)]
            for metric, known in (("spearman", scipy.stats.spearmanr), ("pearson", scipy.stats.pearsonr)):
                score = scores["model", metric, layer, read_out]
                assert score.value == pytest.approx(known(gold, similarities).statistic, abs=1e-6)
                assert score.low < 0 < score.high
                assert score.n == NUM_PAIRS
    assert len(scores) == 2 * (2 * 3 + 2)
    average, layer_0 = scores["token average", "spearman", None, None], scores["model", "spearman", 0, "token"]
    assert average.items == layer_0.items


def test_a_model_that_orders_the_pairs_has_1(run, tmp_path, replace_states):
    folder = tmp_path / "pairs"
    folder.mkdir()
    angles = np.random.default_rng(2).permutation(np.linspace(0.1, 3.0, 30))
    rows = [f"left{place} right{place} {np.cos(angle)}\n" for place, angle in enumerate(angles)]
    (folder / "known.txt").write_text("".join(rows))

    def vector(word, layer, place):
        angle = angles[int(word.removeprefix("right"))] if word.startswith("right") else 0.0
        return (np.cos(angle), np.sin(angle)) if layer == 3 and place == 0 else (1.0, len(word))

    replace_states(vector)
    _, scores = run(folder)
    for metric in ("spearman", "pearson"):
        score = scores["model", metric, 3, "token"]
        assert (score.value, score.low, score.high) == pytest.approx((1.0, 1.0, 1.0))
    assert abs(scores["model", "spearman", 0, "token"].value) < 0.9


def test_pairs_of_one_first_word_are_resampled_together(run, tmp_path, random_states):
    """Where each of 12 first words stands in ten like pairs there are 12 observations, not 120."""
    generator = np.random.default_rng(3)
    folder = tmp_path / "pairs"
    folder.mkdir()
    angle = np.linspace(0.1, 3.0, 12)
    for name, first in (("repeated", lambda place: f"w{place % 12}"), ("single", lambda place: f"w{place}")):
        rows = []
        for place in range(120):
            turn = angle[place % 12] + generator.normal(scale=0.01)
            random_states.update({(f"x{place}", 3, 0): (np.cos(turn), np.sin(turn)) + (0.0,) * 14})
            random_states.update({(first(place), 3, 0): (1.0,) + (0.0,) * 15})
            gold = (place % 12 * 5) % 12 + place / 1000
            rows.append(f"{first(place)} x{place} {gold}\n")
        (folder / "a.txt").write_text("".join(rows))
        printed, scores = run(folder, "--read-out", "token")
        score = scores["model", "spearman", 3, "token"]
        if name == "repeated":
            assert len(set(score.items["cluster"])) == 12
            assert "first words that are resampled, as words repeat 12" in printed
            width = score.high - score.low
        else:
            assert "cluster" not in score.items
            assert "resampled" not in printed
            assert width > 2 * (score.high - score.low)


def test_one_token_alone_has_one_vector_before_it_under_a_causal_mask(run, tmp_path):
    """A letter is one token: before it is BOS, which sees nothing else."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    (folder / "single.txt").write_text("o x 1\nd f 2\nf o 3\nx d 4\nx f 2.5\n")
    (folder / "mixed.txt").write_text("o x 1\nd f 2\nf o 3\nx d 4\nxo f 2.5\n")
    printed, _ = run(folder, "--window", "causal", "--layers", "all")
    report = json.loads((tmp_path / "report.json").read_text())
    undefined = [score["value"] for score in report["scores"] if is_previous(score, "single")]
    assert undefined == [None] * 8  # two metrics in the embeddings and three layers
    defined = [score["value"] for score in report["scores"] if is_previous(score, "mixed")]
    assert None not in defined
    assert "single, model, previous, layer 3: all pairs have one and the same cosine" in printed
    assert "mixed, model, previous, layer 3: 4 of 5 pairs have one and the same cosine" in printed
    assert "mixed: pairs 5, pairs with a word of several tokens 1\n" in printed


def is_previous(score, dataset):
    return (score["dataset"], score["system"], score["read_out"]) == (dataset, "model", "previous")


def test_words_in_context_beside_the_words_alone(run, tmp_path, tiny_llama_folder):
    generator = np.random.default_rng(4)
    folder = tmp_path / "context"
    folder.mkdir()
    words = ["fox", "dog", "batch", "token", "lazy"]
    rows, texts = [], ([], [])
    for place in range(25):
        pair = generator.choice(words, 2)
        contexts = []
        for side, word in enumerate(pair):
            around = list(generator.choice(words, 6))
            contexts.append(" ".join([*around[:3], f"<b> {word} </b>", *around[3:]]))
            texts[side].append((" ".join([*around[:3], word, *around[3:]]), len(" ".join(around[:3])) + 1, len(word)))
        ratings = [str(generator.integers(0, 10)) for _ in range(11)]
        rows.append("\t".join([str(place), pair[0], "n", pair[1], "n", *contexts, *ratings]) + "\n")
    (folder / "ratings.txt").write_text("".join(rows))
    printed, scores = run(folder, "--sub-tokens", "last")

    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    sides = []
    for side in texts:
        found = Words([text for text, *_ in side], [[(begin, begin + size)] for _, begin, size in side])
        sides.append(word_states(encoder, found, (3,), "last").vectors(3, "both").numpy())
    score = scores["model", "spearman", 3, "both"]
    np.testing.assert_allclose(score.items["similarity"], cosines(*sides), atol=1e-6)
    alone = scores["word alone", "spearman", 3, "both"]
    assert alone.lead.value == pytest.approx(score.value - alone.value)
    assert alone.lead.low < alone.lead.value < alone.lead.high
    assert score.lead is None
    spelling = scores["tfidf-characters", "spearman", None, None]
    assert spelling.lead.value == pytest.approx(scores["model", "spearman", 3, "token"].value - spelling.value)
    assert "token average" not in {system for system, *_ in scores}
    assert "pairs of one word with itself" in printed


def test_long_contexts_keep_their_word(run, tmp_path):
    folder = tmp_path / "context"
    folder.mkdir()
    long = " ".join(["side"] * 300)
    row = "\t".join(["1", "fox", "n", "dog", "n", f"{long} <b>fox</b>", f"<b>dog</b> {long}", *["1"] * 11])
    (folder / "ratings.txt").write_text(f"{row}\n{row.replace('fox', 'lazy')}\n")
    printed, scores = run(folder, "--max-length", "32")
    assert "contexts cut to the words around 4" in printed
    details = scores["model", "spearman", 0, "token"].details
    assert details["pairs with a word of no token"] == 0
    assert len(set(scores["model", "spearman", 3, "token"].items["similarity"])) == 2


@pytest.mark.filterwarnings("ignore:1 bad rows of")
@pytest.mark.parametrize(("on_error", "code"), [("fail", 1), ("skip", 0)])
def test_bad_rows(folder, tiny_llama_folder, on_error, code):
    with (folder / "random.txt").open("a") as file:
        file.write("one two\n")
    given = ["words", "--model", str(tiny_llama_folder), "--data", str(folder), "--on-error", on_error]
    found = CliRunner().invoke(cli.app, ["evaluate", *given])
    assert found.exit_code == code, found.output
    if on_error == "fail":
        assert "random.txt:61: 3 fields are needed (word, word, score;" in found.stderr
    else:
        assert "bad rows left out 1" in found.stdout
