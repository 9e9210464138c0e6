"""`bivec train`: a run from the command line, and what a user's mistake looks like."""

import importlib.util
import json
import os
import shutil

import pytest
from typer.testing import CliRunner

from bivec.cli import app
from bivec.training import data, trainee


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
        (["simcse", "--dtype", "float16"], "dtype must be one of auto, float32, bfloat16, got 'float16'"),
        (["simcse", "--dtype", "int8"], "dtype must be one of auto, float32, bfloat16, got 'int8'"),
        (
            ["mntp", "--block-size", "0", "--mask-token", "no such token"],
            "mask_token must be one item of the tokenizer's vocabulary",
        ),
        (["mntp", "--block-size", "512"], "block_size must be at most the model's 256 positions, got 512"),
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


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("mntp", ["--block-size", 0, "--mask-token", "no such token"], "mask_token must be one item"),
        ("mntp", ["--block-size", 0, "--mask-token", "x", "--train-head"], "train_head needs a head of its own"),
        ("simcse", ["--eval-data", "nowhere.txt"], "nowhere.txt"),
        ("simcse", ["--eval-data", "OTHER"], "no column 'text'; its columns are 'body'"),
        ("simcse", ["--target-modules", "typo"], "target_modules must be among down_proj, gate_proj, k_proj, "),
        ("simcse", ["--continue-adapter"], "continue_adapter needs a model with an adapter"),
        ("simcse", ["--dims", 8, 4096], "dims must be at most the model's hidden size, "),
        ("simcse", ["--max-length", 257], "max_length must be at most the model's 256 positions, got 257"),
    ],
)
def test_what_costs_nothing_is_known_before_texts_and_weights_are_read(
    fields, tmp_path, monkeypatch, stage, arguments, message
):
    (tmp_path / "other.jsonl").write_text('{"body": "a"}\n')
    monkeypatch.setattr("bivec.training.stages.TextData", lambda *_, **__: pytest.fail("the texts were read"))
    monkeypatch.setattr("bivec.training.trainee.load_model", lambda *_: pytest.fail("the weights were read"))
    arguments = [tmp_path / "other.jsonl" if argument == "OTHER" else argument for argument in arguments]
    result = run(stage, *fields, *arguments)
    assert result.output.startswith("error: ")
    assert message in result.output
    assert not (tmp_path / "run").exists()


def no_weights(*_):
    raise FileNotFoundError("the weights were read")


def test_rows_are_read_before_weights_and_tokenised_behind_them(fields, tmp_path, monkeypatch):
    """The held-out ones first, which are fewer."""
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": 3}\n')
    (tmp_path / "few.txt").write_text("few\n")
    given = (*fields, "--mask-token", "x", "--block-size", 16)
    load = trainee.load_model
    monkeypatch.setattr(trainee, "load_model", no_weights)
    assert "bad.jsonl:2: " in run("mntp", *given, "--eval-data", tmp_path / "bad.jsonl").output
    assert "batch_size must be at most the rows" in run("simcse", *fields, "--batch-size", 41).output
    cut, sizes = data.TextData._cut_blocks, []
    monkeypatch.setattr(
        data.TextData, "_cut_blocks", lambda self, size: sizes.append(len(self._texts)) or cut(self, size)
    )
    assert "error: the weights were read" in run("mntp", *given).output
    assert sizes == []
    monkeypatch.setattr(trainee, "load_model", load)
    assert "block_size must be at most the" in run("mntp", *given, "--eval-data", tmp_path / "few.txt").output
    assert sizes == [1]


def test_a_length_that_nobody_asked_for_is_lowered_aloud_and_resumed(fields, text_file, tmp_path, caplog):
    text_file.write_text(10 * text_file.read_text())
    given = [field for field in fields if field not in ("--max-length", 32)]
    given += ["--mask-token", "x", "--save-steps", 1]
    assert run("mntp", *given).exit_code == 0
    assert [record.getMessage() for record in caplog.records if "positions" in record.getMessage()] == [
        "block_size is 256, not 512: the model has no more positions"
    ]
    first, *_ = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(first)["settings"].items() >= {"max_length": 256, "block_size": 256}.items()
    resumed = run("mntp", *given, "--block-size", 256, "--resume")
    assert resumed.output.startswith("0 steps since it was resumed (1 in all), 0 tokens in ")
    assert "block_size was 256, is 128" in run("mntp", *given, "--block-size", 128, "--resume").output


def test_the_summary_says_how_many_texts_are_cut(fields, text_file, tmp_path):
    text_file.write_text("".join(f"{'x' * count}\n" for count in (2, 3, 40, 50)))
    found = run("simcse", *fields, "--max-length", 12, "--attention-dropout", 0.1)
    assert ", 0 skipped, 50.0% of the texts cut at max_length: " in found.output
    shutil.rmtree(tmp_path / "run")
    assert " cut" not in run("simcse", *fields, "--max-length", 200).output
