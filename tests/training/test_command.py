"""`bivec train`: a run from the command line, and what a user's mistake looks like."""

import importlib.util
import json
import os

import pytest
from typer.testing import CliRunner

from bivec.cli import app


def run(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture
def fields(tiny_llama_folder, text_file, tmp_path):
    """A run of one step."""
    return (
        "--model", tiny_llama_folder, "--data", text_file, "--output", tmp_path / "run", "--max-steps", 1,
        "--batch-size", 4, "--max-length", 32, "--dtype", "float32",
    )  # fmt: skip


def test_a_run_says_what_it_did_and_keeps_its_log(fields, tmp_path, text_file):
    result = run("simcse", *fields, "--eval-data", text_file)
    assert result.exit_code == 0, result.output
    assert result.output.startswith("1 steps, ")
    assert "eval_loss" in result.output
    first, *_, last = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert first["settings"]["temperature"] == 0.05
    assert first["versions"]["torch"]
    assert {"step", "eval_loss", "eval_accuracy"} == set(last)
    assert run("simcse", *fields).exit_code == 2
    assert "give --resume to go on" in run("simcse", *fields).output


def test_without_a_stage_the_help_is_shown():
    assert run().exit_code == 2
    assert "bivec train STAGE --help lists every field" in " ".join(run("--help").output.split())
    assert run("--help").exit_code == 0


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "a:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "a:1"}])
def test_cuda_memory_grows_in_place_unless_it_is_told_otherwise(monkeypatch, own):
    monkeypatch.setattr(os, "environ", dict(own))
    run("no-stage")
    assert dict(os.environ) == (own or {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("empty.txt", "", "empty.txt"),
        ("same.txt", "one and the same\n" * 8, "every text of the batch is the same"),
        ("few.txt", "one\ntwo\n", "batch_size must be at most the rows of each data set, got 4: "),
        ("other.jsonl", '{"body": "a"}\n', "no column 'text'; its columns are 'body'"),
        ("number.jsonl", '{"text": "a"}\n{"text": 3}\n', "number.jsonl:2: "),
        ("data.xyz", "a\n", "unknown extension"),
    ],
)
def test_bad_texts_are_named(fields, tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    changed = ["--data" if field == "--data" else field for field in fields]
    changed[3] = tmp_path / name
    result = run("simcse", *changed)
    assert result.exit_code in (1, 2)
    assert result.output.count("\n") == 1, result.output
    assert result.output.startswith("error: ")
    assert message in result.output
    assert not (tmp_path / "run" / "bivec.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("query\na\n", "pairs.csv"),
        ("query,positive\na,b\nc\n", "pairs.csv:3: "),
        ("query,positive\na,b\n,c\n", "pairs.csv:3: "),
    ],
)
def test_bad_pairs_are_named(fields, tmp_path, text, message):
    (tmp_path / "pairs.csv").write_text(text)
    changed = list(fields)
    changed[3] = tmp_path / "pairs.csv"
    result = run("supervised", *changed)
    assert result.exit_code in (1, 2)
    assert result.output.startswith("error: ")
    assert message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mlm"], "the stage must be one of pretrain, mntp, simcse, supervised, got 'mlm'"),
        (["simcse", "--max-length", "9999"], "max_length must be at most the model's 256 positions, got 9999"),
        (["simcse", "--target-modules", "q_proj", "typo"], "target_modules must be among"),
        (["simcse", "--lr-scheduler-type", "wavy"], "lr_scheduler_type 'wavy' cannot be used"),
        (["simcse", "--lr-scheduler-type", "reduce_lr_on_plateau"], "a schedule of the step's number alone"),
        (["simcse", "--report-to", "nope"], "report_to must name trackers of accelerate, got nope"),
        (["simcse", "--dtype", "float16"], "float16 needs a CUDA device"),
        (
            ["mntp", "--block-size", "0", "--mask-token", "no such token"],
            "mask_token must be one item of the tokenizer's vocabulary",
        ),
        (["mntp"], "block_size must be at most the model's 256 positions, got 512"),
        (["simcse", "--full-finetuning", "--model", "RUN"], "full_finetuning needs a model without adapters"),
    ],
)
def test_mistakes_are_one_line(fields, tmp_path, arguments, message):
    if "RUN" in arguments:
        assert run("simcse", *fields).exit_code == 0
        arguments = [tmp_path / "run" if argument == "RUN" else argument for argument in arguments]
        fields = ["--output" if f == "--output" else f for f in fields]
        fields[5] = tmp_path / "second"
    stage, *rest = arguments
    result = run(stage, *fields, *rest)
    assert result.output.count("\n") == 1, result.output
    assert result.exit_code == 2
    assert result.output.startswith("error: ")
    assert message in result.output


def test_a_scheduler_or_a_tracker_is_refused_before_anything_is_loaded(fields):
    fields = ["nowhere/at/all" if field == fields[1] else field for field in fields]
    assert "nowhere/at/all is no folder" in run("simcse", *fields).output
    assert "got 'greedy'" in run("simcse", *fields, "--lr-scheduler-type", "greedy").output
    assert "got nope" in run("simcse", *fields, "--report-to", "nope").output


@pytest.mark.skipif(importlib.util.find_spec("aim") is not None, reason="aim is installed")
def test_a_tracker_that_is_not_installed_is_an_error(fields):
    assert run("simcse", *fields, "--report-to", "aim").output == "error: report_to: aim is not installed\n"


def test_a_missing_mask_token_is_known_before_weights_and_texts_are_read(fields, tmp_path, monkeypatch):
    monkeypatch.setattr("bivec.training.trainee.load_model", lambda *_: pytest.fail("the weights were read"))
    result = run("mntp", *fields, "--block-size", "0", "--mask-token", "no such token")
    assert "error: mask_token must be one item" in result.output
    assert not (tmp_path / "run").exists()
