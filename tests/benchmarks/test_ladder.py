"""The ladder of training runs on a tiny model: rungs stand on each other, are trained and scored once, and compared."""

import json
import random
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bivec.benchmarks import ladder, ladder_evaluation, ladder_scores
from bivec.evaluation.report import Report, Score, statistic_of
from bivec.evaluation.statistics import bootstrap, mean_of_sets, paired_difference, ratio

RECIPE = "stage: {}\nmax_steps: 2\nbatch_size: 4\nmax_length: 32\neval_steps: 2\nlora_r: 2\nlearning_rate: 0.05\n"
LADDER = (
    "mntp: {recipe: mntp.yaml, data: texts, mask_schedule: causal}\n"
    "supervised: {after: mntp, recipe: supervised.yaml, data: pairs, dims: [8, 16]}\n"
)
ALONE = "supervised-alone: {recipe: supervised.yaml, data: pairs, dims: [8, 16]}\n"
WORDS = ("quick", "brown", "fox", "lazy", "dog", "packed", "batch", "holds", "many", "sequences", "side", "token")
INTERVAL = ("value", "low", "high")
UNTRAINED = ("untrained-causal", "untrained-bidirectional")
TFIDF_AND_MORE = ("tfidf-words", "tfidf-characters", "token average")


def write_inputs(folder: Path, sentence: Callable[[], str], rungs: str, datasets: Sequence[str]) -> None:
    """Recipes, a ladder of them and all that it reads."""
    for stage, more in (("mntp", "block_size: 0\n"), ("supervised", "")):
        (folder / f"{stage}.yaml").write_text(RECIPE.format(stage) + f"dtype: float32\n{more}")
    (folder / "ladder.yaml").write_text(rungs)
    (folder / "texts.txt").write_text("".join(f"{sentence()}\n\n" for _ in range(30)))
    pairs = "".join(f"{sentence()},{sentence()} {n}\n" for n in range(20))
    (folder / "pairs.csv").write_text(f"sent0,sent1\n{pairs}")
    (folder / "similar").mkdir()
    for name in datasets:
        rows = "".join(f"{sentence()},{sentence()},{n % 6}\n" for n in range(40))
        (folder / "similar" / f"{name}-dev.csv").write_text(rows)


def climb_in(folder: Path, model: Path, options: Sequence[str]) -> dict:
    """The document of one call."""
    given = ["--model", model, "--runs", folder / "runs", "--output", folder / "ladder.json"]
    given += ["--data", f"texts={folder / 'texts.txt'}", f"pairs={folder / 'pairs.csv'}"]
    given += ["--evaluate", f"sts={folder / 'similar'}", "--report", folder / "tables.md"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "describe_machine", lambda _: {})
        patch.setattr(ladder, "HELD_OUT", 10)
        assert ladder.main([str(part) for part in (folder / "ladder.yaml", *given, *options)]) == 0
    return json.loads((folder / "ladder.json").read_text())


@pytest.fixture(scope="module")
def climbed(tmp_path_factory, tiny_llama_folder):
    """A folder in which a ladder was climbed with two seeds, the document, and how to climb again."""
    folder = tmp_path_factory.mktemp("ladder")
    chance = random.Random(0)
    write_inputs(folder, lambda: " ".join(chance.choices(WORDS, k=8)), LADDER + ALONE, ("one", "two"))

    def climb() -> dict:
        return climb_in(folder, tiny_llama_folder, ["--seeds", "3", "4"])

    return folder, climb(), climb


@pytest.fixture
def folder(tmp_path, sentence):
    write_inputs(tmp_path, sentence, LADDER, ("one",))
    return tmp_path


@pytest.fixture
def climb(folder, tiny_llama_folder):
    return lambda *options: climb_in(folder, tiny_llama_folder, ["--seeds", "3", *options])


@pytest.fixture
def scored(monkeypatch):
    """The rungs that are scored."""
    found = []
    evaluate = ladder_evaluation.evaluate

    def counting(settings):
        found.append(Path(settings.output).parent.name)
        return evaluate(settings)

    monkeypatch.setattr(ladder_evaluation, "evaluate", counting)
    return found


def row_of(document: dict, rung: str, dataset: str, metric: str = "spearman", system: str = "model") -> dict:
    wanted = (rung, dataset, metric, system)
    (row,) = (row for row in document["rows"] if (row["rung"], row["dataset"], row["metric"], row["system"]) == wanted)
    return row


def score_of(folder: Path, rung: str, metric: str) -> Score:
    report = Report.read(folder / "runs" / "results" / "dev" / rung / "sts-similar.json")
    (score,) = (
        score for score in report.scores if (score.dataset, score.metric, score.system) == ("one", metric, "model")
    )
    return score


def difference_of(first: Score, second: Score) -> Sequence[float]:
    statistics = [statistic_of(score.metric, score.items) for score in (first, second)]
    return paired_difference(*(found.statistic for found in statistics), statistics[0].num_items)[:3]


def estimate_of(found: dict) -> Any:
    return pytest.approx([found[name] for name in INTERVAL], abs=1e-6)


def test_every_rung_is_trained(climbed):
    folder, document, _ = climbed
    rungs = ["mntp", "supervised", "supervised-alone"]
    assert list(dict.fromkeys(row["rung"] for row in document["rows"])) == [*UNTRAINED, *rungs]
    assert document["rungs"]["supervised"]["after"] == "mntp"
    losses = document["held_out_losses"]
    assert losses.keys() == {"3", "4"}
    assert all(its_losses["mntp"]["before"] != its_losses["mntp"]["after"] for its_losses in losses.values())
    settings = json.loads((folder / "runs" / "seed-4" / "supervised" / "log.jsonl").read_text().splitlines()[0])
    assert settings["settings"]["dims"] == [8, 16]
    assert settings["settings"]["model"].endswith("seed-4/mntp")
    held_out = (folder / "runs" / "held-out.txt").read_text().splitlines()
    training = (folder / "runs" / "training.txt").read_text().splitlines()
    assert training + held_out == (folder / "texts.txt").read_text().split("\n\n")[:-1]


def test_what_is_trained_and_scored_is_not_again(climbed, scored, capsys):
    folder, document, climb = climbed
    shutil.rmtree(folder / "runs" / "seed-3" / "mntp" / "checkpoints")
    assert climb() == document
    assert not scored
    entries = document["evaluations"]
    assert len(entries) == 8
    page = (folder / "tables.md").read_text()
    assert all(f"| {rung} |" in page for rung in (*UNTRAINED, "mntp", "supervised", "supervised-alone"))
    assert f"{row_of(document, 'supervised', 'one')['value']:.3f}"[1:] in page
    assert all(entry["seconds"] > 0 for entry in entries)
    logs = list(folder.glob("runs/seed-*/*/log.jsonl"))
    assert len(logs) == 6
    assert all(json.loads(line)["step"] <= 2 for path in logs for line in path.open())

    # the table that is printed
    lines = capsys.readouterr().out.splitlines()
    header, *table = (re.split("  +", line) for line in lines[lines.index("mean of 2: spearman; n = 80") + 1 :])
    assert header[-1] == "sign in all seeds"
    assert [line[0] for line in table] == [*UNTRAINED, "mntp", "supervised", "supervised-alone", *TFIDF_AND_MORE]
    row = row_of(document, "supervised", "mean of 2")
    difference = row["over"]["mntp"]
    sign = "the same" if difference["same_sign"] else "not the same"
    values = [f"{found['value']:{form}}" for found, form in ((row, ".4f"), (difference, "+.4f"))]
    assert [table[3][place] for place in (1, 3, 5, 6)] == [*values, "mntp", sign]


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_figures_and_differences_are_those_of_the_reports(climbed, metric):
    folder, document, _ = climbed
    row = row_of(document, "supervised", "one", metric)
    seeds = {seed: score_of(folder, f"seed-{seed}/supervised", metric) for seed in ("3", "4")}
    for seed, score in seeds.items():
        assert [score.value, score.low, score.high] == estimate_of(row["seeds"][seed])
    assert row["value"] == pytest.approx((seeds["3"].value + seeds["4"].value) / 2, abs=1e-6)
    assert row["low"] < row["value"] < row["high"]
    assert (row["split"], row["n"], row["layer"], row["read_out"], row["probe"]) == ("dev", 40, None, None, None)

    assert row["over"].keys() == {*UNTRAINED, "mntp", "supervised-alone", *TFIDF_AND_MORE}
    for seed, score in seeds.items():
        others = {name: score_of(folder, name, metric) for name in UNTRAINED}
        others |= {name: score_of(folder, f"seed-{seed}/{name}", metric) for name in ("mntp", "supervised-alone")}
        for name, other in others.items():
            assert row["over"][name]["seeds"][seed] == pytest.approx(difference_of(other, score)[0], abs=1e-6)

    found = row_of(document, "untrained-bidirectional", "one", metric)
    causal, score = (score_of(folder, name, metric) for name in UNTRAINED)
    assert [score.value, score.low, score.high] == estimate_of(found)
    assert difference_of(causal, score) == estimate_of(found["over"]["untrained-causal"])


def test_a_difference_over_seeds_is_the_mean_and_says_whether_their_signs_agree(climbed):
    _, document, _ = climbed
    agreements = []
    for row in document["rows"]:
        for difference in row.get("over", {}).values() if "seeds" in row else ():
            one, other = (difference["seeds"][seed] for seed in ("3", "4"))
            assert difference["value"] == pytest.approx((one + other) / 2, abs=2e-6)
            assert difference["low"] <= difference["value"] <= difference["high"]
            agreements.append(difference["same_sign"])
            assert agreements[-1] == (one * other > 0 or one == other == 0)
    assert set(agreements) == {True, False}


def test_a_mean_over_data_sets_and_the_controls_are_rows(climbed):
    _, document, _ = climbed
    *sets, mean = (row_of(document, "mntp", name) for name in ("one", "two", "mean of 2"))
    assert mean["n"] == 80
    for over in (lambda row: row, lambda row: row["over"]["untrained-causal"], lambda row: row["seeds"]["4"]):
        one, two, both = (over(row) for row in (*sets, mean))
        assert both["value"] == pytest.approx((one["value"] + two["value"]) / 2, abs=2e-6)
        assert both["high"] - both["low"] < max(row["high"] - row["low"] for row in (one, two))
    # they are the same beside every rung, whose adapter leaves the embeddings alone
    controls = {(row["rung"], row["system"]) for row in document["rows"] if row["system"] != "model"}
    assert controls == {("untrained-bidirectional", system) for system in TFIDF_AND_MORE}


def test_a_mean_that_the_report_has_not_and_the_figures_that_are_printed():
    chance = np.random.default_rng(0)
    scores = [
        Score.of_items(name, "dev", system, metric, {"share": chance.random(count)}, layer=layer, read_out=read_out)
        for name, count in (("one", 30), ("two", 50))
        for metric in ("token accuracy", "span F1")
        for system, layer, read_out in [
            *(("model", layer, read_out) for layer in (0, 2) for read_out in ("token", "previous")),
            ("shuffled labels", 2, "token"),
            ("most frequent tag", None, None),
        ]
    ]
    figures = ladder_scores.Figures(Report("ner", {}, {}, {}, scores))
    causal, bidirectional = UNTRAINED
    rows = list(ladder_scores.rows({name: {None: figures} for name in UNTRAINED}, {causal: [], bidirectional: []}))
    (mean,) = (
        row
        for row in rows
        if (row["rung"], row["dataset"], row["metric"], row["system"])
        == (bidirectional, "mean of 2", "span F1", "model")
        and (row["layer"], row["read_out"]) == (2, "token")
    )
    parts = [score for score in scores if score.key[2:6] == ("model", "span F1", 2, "token")]
    drawn = [bootstrap([ratio(part.items["share"])], part.n, seed=place) for place, part in enumerate(parts)]
    assert mean_of_sets([found for (found,) in drawn]).estimate() == estimate_of(mean)
    assert mean["n"] == 80
    assert mean["over"].keys() == {"shuffled labels", "most frequent tag"}
    assert all(
        ("over" in row and bool(row["over"])) == (row["system"] == "model" and row["layer"] == 2) for row in rows
    )
    heads = [line for line in ladder_scores.table(rows, {}) if "n = " in line]
    assert heads == [f"\nmean of 2: span F1, {read_out}; n = 80" for read_out in ("token", "previous")]


def test_what_has_changed_is_scored_again(climb, folder, scored):
    climb()
    scored.clear()
    (folder / "ladder.yaml").write_text(LADDER.replace("[8, 16]", "[8]"))
    shutil.rmtree(folder / "runs" / "seed-3" / "supervised")
    climb()
    assert scored == ["supervised"]
    with (folder / "similar" / "one-dev.csv").open("a") as file:
        file.write("one more,one more,5\n")
    scored.clear()
    document = climb()
    assert scored == [*UNTRAINED, "mntp", "supervised"]
    assert row_of(document, "mntp", "one")["n"] == 41
    (folder / "ladder.yaml").write_text(LADDER.replace("[8, 16]", "[8]").replace("causal", "bidirectional"))
    shutil.rmtree(folder / "runs" / "seed-3" / "mntp")
    with pytest.raises(ValueError, match="was trained with other files of the model"):
        climb()


def test_some_rungs_alone(climb, folder, scored):
    document = climb("--rungs", "supervised")
    assert sorted(path.name for path in (folder / "runs" / "seed-3").iterdir()) == ["mntp", "supervised"]
    assert scored == [*UNTRAINED, "supervised"]
    assert row_of(document, "supervised", "one")["over"].keys() == {*UNTRAINED, *TFIDF_AND_MORE}
    with pytest.raises(ValueError, match="--rungs must be of the ladder's, got simcse"):
        climb("--rungs", "simcse")


def test_scoring_that_was_interrupted_goes_on(climb, scored, monkeypatch):
    evaluate = ladder_evaluation.evaluate
    monkeypatch.setattr(
        ladder_evaluation, "evaluate", lambda settings: 1 / 0 if len(scored) == 3 else evaluate(settings)
    )
    with pytest.raises(ZeroDivisionError):
        climb()
    monkeypatch.setattr(ladder_evaluation, "evaluate", evaluate)
    climb()
    assert scored == [*UNTRAINED, "mntp", "supervised"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- mntp", "ladder.yaml must be a mapping of rungs"),
        ("mntp: {data: texts}", "mntp needs a recipe and data"),
        ("mntp: {recipe: mntp.yaml}", "mntp needs a recipe and data"),
        ("mntp: {recipe: mntp.yaml, data: texts, after: base}", "mntp comes after 'base', which is not above it"),
    ],
)
def test_a_malformed_ladder(folder, content, message):
    (folder / "ladder.yaml").write_text(content)
    with pytest.raises(ValueError, match=message):
        ladder.read_ladder(folder / "ladder.yaml")


def test_what_cannot_be_climbed_is_said_before_anything_is_done(climb, folder, capsys):
    with pytest.raises(ValueError, match="mntp learns from texts: give --data texts=FILE"):
        climb("--data", f"pairs={folder / 'pairs.csv'}")
    with pytest.raises(ValueError, match=r"--evaluate similarity=.*: the task must be one of sts, classification"):
        climb("--evaluate", f"similarity={folder / 'similar'}")
    with pytest.raises(ValueError, match="--evaluate has 2 data folders of one name: sts=similar"):
        climb("--evaluate", f"sts={folder / 'similar'}", f"sts={folder / 'similar'}")
    with pytest.raises(FileNotFoundError, match="no scored pairs"):
        climb("--evaluate", f"sts={folder}")
    with pytest.raises(ValueError, match=r"tables.txt: the output must be named .md or .html"):
        climb("--report", "tables.txt")
    with pytest.raises(SystemExit):
        climb("--data", "pairs.csv")
    assert "must be NAME=FILE, got 'pairs.csv'" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_the_recipes_ladders_can_be_read():
    recipes = Path(ladder.__file__).resolve().parents[1] / "recipes"
    found = {path.parent.name: ladder.read_ladder(path) for path in recipes.glob("*/ladder.yaml")}
    assert [rung.stage for rung in found["stories260k"]][:3] == ["mntp", "mntp", "simcse"]
    assert {rung.data for rung in found["tiny"]} == {"texts", "crops", "pairs"}
