"""The ladder of training runs on a tiny model: rungs stand on each other, are trained once and scored in one table."""

import json
from pathlib import Path

import pytest

from bivec.benchmarks import ladder

RECIPE = "stage: {}\nmax_steps: 2\nbatch_size: 4\nmax_length: 32\neval_steps: 2\nlora_r: 2\ndtype: float32\n"


@pytest.fixture
def folder(tmp_path, sentence):
    """Recipes, a ladder of them and all that it reads."""
    (tmp_path / "mntp.yaml").write_text(RECIPE.format("mntp") + "block_size: 0\n")
    (tmp_path / "supervised.yaml").write_text(RECIPE.format("supervised"))
    (tmp_path / "ladder.yaml").write_text(
        "mntp: {recipe: mntp.yaml, data: texts, mask_schedule: causal}\n"
        "supervised: {after: mntp, recipe: supervised.yaml, data: pairs, dims: [8, 16]}\n"
    )
    (tmp_path / "texts.txt").write_text("".join(f"{sentence()}\n\n" for _ in range(30)))
    (tmp_path / "pairs.csv").write_text(
        "sent0,sent1\n" + "".join(f"{sentence()},{sentence()} {n}\n" for n in range(20))
    )
    scored = "".join(f"{sentence()},{sentence()},{n % 6}\n" for n in range(40))
    (tmp_path / "stsb-dev.csv").write_text(scored)
    for split in ("train", "dev"):
        (tmp_path / f"mood.{split}").write_text("".join(f"{n % 2} {sentence()}\n" for n in range(40)))
    return tmp_path


@pytest.fixture
def climb(folder, tiny_llama_folder, monkeypatch, capsys):
    def climb() -> dict:
        files = {"model": tiny_llama_folder, "sts": folder, "classification": folder, "runs": folder / "runs"}
        given = [str(part) for name, path in files.items() for part in (f"--{name}", path)]
        given += ["--data", f"texts={folder / 'texts.txt'}", f"pairs={folder / 'pairs.csv'}"]
        assert ladder.main([str(folder / "ladder.yaml"), *given, "--seeds", "3", "4"]) == 0
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    monkeypatch.setattr(ladder, "describe_machine", lambda _: {})
    monkeypatch.setattr(ladder, "HELD_OUT", 10)
    return climb


def test_every_rung_is_trained_once_and_scored(climb, folder):
    document = climb()
    rows = document["rows"]
    names = [(row.get("seed"), row["rung"]) for row in rows]
    assert names == [(None, "causal"), (None, "bidirectional")] + [
        (seed, rung) for seed in (3, 4) for rung in ("mntp", "supervised")
    ]
    assert rows[0]["over_causal"] == 0
    for row in rows[2:]:
        assert row["low"] < row["spearman"] < row["high"]
        assert row["over_causal"] == pytest.approx(row["spearman"] - rows[0]["spearman"])
        assert row["over_bidirectional"] == pytest.approx(row["spearman"] - rows[1]["spearman"])
        assert 0.2 < row["mood"] < 0.8
    assert document["held_out_losses"].keys() == {"3", "4"}
    assert all(losses["mntp"]["before"] != losses["mntp"]["after"] for losses in document["held_out_losses"].values())

    settings = json.loads((folder / "runs" / "seed-4" / "supervised" / "log.jsonl").read_text().splitlines()[0])
    assert settings["settings"]["dims"] == [8, 16]
    assert settings["settings"]["model"].endswith("seed-4/mntp")
    held_out = (folder / "runs" / "held-out.txt").read_text().splitlines()
    training = (folder / "runs" / "training.txt").read_text().splitlines()
    assert training + held_out == (folder / "texts.txt").read_text().split("\n\n")[:-1]

    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*/adapter_model.safetensors")}
    assert len(before) == 4
    assert climb()["rows"] == rows
    assert all(json.loads(line)["step"] <= 2 for path in before for line in (path.parent / "log.jsonl").open())


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


def test_data_that_is_not_given(folder, tiny_llama_folder, monkeypatch, capsys):
    given = ["--model", tiny_llama_folder, "--sts", folder, "--runs", folder / "runs", "--data"]
    given = [str(part) for part in (folder / "ladder.yaml", *given)]
    with pytest.raises(ValueError, match="mntp learns from texts: give --data texts=FILE"):
        ladder.main([*given, f"pairs={folder / 'pairs.csv'}"])
    with pytest.raises(SystemExit):
        ladder.main([*given, "pairs.csv"])
    assert "must be NAME=FILE, got 'pairs.csv'" in capsys.readouterr().err


def test_the_recipes_ladders_can_be_read():
    recipes = Path(ladder.__file__).resolve().parents[1] / "recipes"
    found = {path.parent.name: ladder.read_ladder(path) for path in recipes.glob("*/ladder.yaml")}
    assert [rung.stage for rung in found["stories260k"]] == ["mntp", "mntp", "simcse", "supervised"]
    assert {rung.data for rung in found["tiny"]} == {"texts", "crops", "pairs"}
