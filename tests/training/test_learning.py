"""The direction in about a minute: on a real small Llama each stage's loss falls and sentences come out better."""

import gzip
import itertools
import json
from pathlib import Path

import pytest

from bivec import Encoder
from bivec.evaluation.statistics import paired_difference, spearman
from bivec.evaluation.sts import cosines, read_tasks
from bivec.training import read_settings, train

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "stories260k"


@pytest.fixture
def wiki(shared_data, tmp_path):
    """Training and held-out sentences."""
    (path,) = (shared_data / "wiki").glob("*.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        lines = list(itertools.islice((line for line in file if line.strip()), 6000))
    (tmp_path / "training.txt").write_text("".join(lines[:-100]))
    (tmp_path / "held-out.txt").write_text("".join(lines[-100:]))
    return tmp_path / "training.txt", tmp_path / "held-out.txt"


def test_stages_lift_a_real_model(shared_data, wiki, tmp_path):
    base, (texts, held_out) = shared_data / "stories260K" / "hf", wiki
    (pairs,) = (shared_data / "nli").glob("*.csv")

    def run(stage: str, model: Path, data: Path, *arguments: object) -> Path:
        output = tmp_path / stage
        given = ["--recipe", RECIPES / f"{stage}.yaml", "--model", model, "--data", data, "--output", output]
        train(read_settings(stage, [str(argument) for argument in (*given, "--device", "cpu", *arguments)]))
        return output

    mntp = run("mntp", base, texts, "--eval-data", held_out, "--max-steps", 60, "--batch-size", 16)
    log = [json.loads(line) for line in (mntp / "log.jsonl").read_text().splitlines()]
    untrained, trained = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert trained < 0.85 * untrained
    simcse = run("simcse", mntp, texts, "--max-steps", 8, "--batch-size", 32)
    supervised = run("supervised", simcse, pairs, "--max-steps", 24, "--batch-size", 32)

    (task,) = read_tasks(shared_data / "stsb", "dev")
    scores = task.pairs.scores

    def quality(model: Path):
        encoder = Encoder.from_pretrained(model, dtype="float32", device="cpu")
        return spearman(scores, cosines(encoder.encode(task.pairs.first), encoder.encode(task.pairs.second)))

    difference = paired_difference(quality(base), quality(supervised), len(scores), resamples=1000)
    assert difference.low > 0
