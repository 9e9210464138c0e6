"""`bivec evaluate` from start to end on the tiny model, and what it refuses before a model is loaded."""

import errno
import json
import os
import re

import numpy as np
import pytest
from typer.testing import CliRunner

from bivec import Encoder, cli
from bivec.engine.checkpoints import resolve
from bivec.engine.fingerprint import fingerprint
from bivec.engine.int8 import check_products
from bivec.engine.outputs import AtomicFile
from bivec.evaluation import tasks
from bivec.evaluation.report import Report
from bivec.evaluation.sts import cosines, read_tasks


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])


@pytest.fixture
def run(tiny_llama_folder, tmp_path):
    """Runs a task on the tiny model; returns the printed lines and the report."""

    def evaluate(task, data, *arguments, name="report"):
        output = tmp_path / f"{name}.json"
        found = invoke(
            task, "--model", tiny_llama_folder, "--dtype", "float32", "--data", data, "--output", output, *arguments
        )
        assert found.exit_code == 0, found.output
        return found.stdout.splitlines(), Report.read(output)

    return evaluate


@pytest.fixture(params=["bfloat16", "int8+float32"])
def second_dtype(request):
    if request.param.startswith("int8"):
        try:
            check_products()
        except ValueError as error:
            pytest.skip(str(error))
    return request.param


def test_sts(run, similarity_folder, tiny_llama_folder, tmp_path):
    lines, report = run("sts", similarity_folder, "--split", "dev", "--baseline", "--window", "causal")
    systems = ["model", "tfidf-words", "tfidf-characters", "token average"]
    assert [(score.system, score.metric) for score in report.scores] == [
        (system, metric) for system in systems for metric in ("spearman", "pearson")
    ]
    assert [score.lead is None for score in report.scores] == [True] * 2 + [False] * 6
    assert len(lines) == 10
    assert lines[-1] == "small: TF-IDF is fitted on the training split"
    assert report.model["mask"] == "causal, window (-1, 0)"
    assert report.origin["model"]["base"] == fingerprint(resolve(tiny_llama_folder))["base"]
    (task,) = read_tasks(similarity_folder, "dev")
    encoder = Encoder.from_pretrained(tiny_llama_folder, dtype="float32", window=(-1, 0))
    expected = cosines(encoder.encode(task.pairs.first), encoder.encode(task.pairs.second))
    np.testing.assert_array_equal(report.scores[0].items["similarity"], expected)


def test_sts_of_two_windows_compared(run, similarity_folder, tmp_path):
    run("sts", similarity_folder, name="bidirectional")
    run("sts", similarity_folder, "--window", "causal", name="causal")
    files = [tmp_path / f"{name}.json" for name in ("causal", "bidirectional")]
    found = invoke("compare", *files, "--output", tmp_path / "picture.png")
    assert found.exit_code == 0, found.output
    header, spearman, _ = found.stdout.splitlines()
    assert header.split()[:5] == ["n", "causal", "95", "%", "interval"]
    assert spearman.startswith("small test model spearman")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_sts_in_two_dtypes_compared(run, similarity_folder, tmp_path, second_dtype):
    run("sts", similarity_folder, name="a")
    _, report = run("sts", similarity_folder, "--dtype", second_dtype, name="b")
    assert report.model["dtype"] == report.model["identity"]["dtype"] == second_dtype
    files = [tmp_path / f"{name}.json" for name in "ab"]
    found = invoke("compare", *files)
    assert found.exit_code == 0, found.output
    header, spearman, _ = found.stdout.splitlines()
    assert re.split("  +", header.strip())[1::2] == ["a (float32)", f"b ({second_dtype})", "difference", "p"]
    assert re.search(r" [+-]0\.\d{4} +[+-]0\.\d{4} to [+-]0\.\d{4} +[01]\.\d{4}$", spearman)  # and not without items


def test_states_of_every_layer_in_eight_bits(run, text_file, second_dtype):
    figures = []
    for dtype in ("float32", second_dtype):
        _, report = run("anisotropy", text_file, "--dtype", dtype, name=dtype)
        figures.append({score.key: score.value for score in report.scores})
    assert figures[0] == pytest.approx(figures[1], abs=0.02)
    assert figures[0] != figures[1]


def test_a_picture_is_drawn_where_it_is_asked_for_and_free(run, similarity_folder, tmp_path, monkeypatch):
    run("sts", similarity_folder, name="a")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    result = tmp_path / "a.json"
    before = result.read_bytes()
    assert invoke("compare", result, result).exit_code == 0
    assert os.listdir() == []
    (tmp_path / "thesis.png").write_text("not a picture")
    for output, options, message in [
        (result, [], "a.json exists; --overwrite replaces it"),
        (result, ["--overwrite"], "a.json is not overwritten: it is nothing that this command wrote"),
        (tmp_path / "thesis.png", ["--overwrite"], "thesis.png is not overwritten"),
    ]:
        found = invoke("compare", result, result, "--output", output, *options)
        assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
        assert message in found.stderr
        assert "small test model spearman" in found.stdout
    assert (result.read_bytes(), (tmp_path / "thesis.png").read_text()) == (before, "not a picture")
    for options in ([], ["--overwrite"]):
        assert invoke("compare", result, result, "--output", "a.png", *options).exit_code == 0
    assert os.listdir() == ["a.png"]


def test_classification(run, labelled_folder):
    _, report = run("classification", labelled_folder, "--baseline", "--seeds", "2")
    found = {(score.dataset, score.system): score for score in report.scores}
    assert {name: found[name, "model"].split for name in ("split", "three", "whole")} == {
        "split": "test",
        "three": "test",
        "whole": "10 folds",
    }
    assert len(found["three", "model"].details["accuracy of each seed"]) == 2
    assert found["three", "tfidf-words"].value == 1.0  # a word tells the label
    assert all(0 <= score.low <= score.value <= score.high <= 1 for score in report.scores)
    assert all(score.lead for score in report.scores if score.system != "model")
    assert found["mean of 3", "model"].value == np.mean([found[name, "model"].value for name in report.data])
    assert found["mean of 3", "token average"].n == 30 + 30 + 40


@pytest.mark.parametrize(
    ("task", "name", "bad"),
    [("sts", "pairs/small-test.csv", "a,b\n"), ("classification", "labelled/whole.all", "1 \n")],
)
def test_bad_rows_are_left_out_and_counted(run, similarity_folder, labelled_folder, tmp_path, task, name, bad):
    path = tmp_path / name
    _, before = run(task, path.parent)
    with path.open("a") as file:
        file.write(bad * 5)
    found = invoke(task, "--data", path.parent)
    assert found.exit_code == 2
    assert f"{path}:{len(path.read_text().splitlines()) - 4}: " in found.stderr
    with pytest.warns(UserWarning, match=r"left out") as told:
        lines, after = run(task, path.parent, "--on-error", "skip", name="skip")
    assert len([one for one in told if path.name in str(one.message)]) == 3
    assert [score.value for score in after.scores] == [score.value for score in before.scores]
    data_set = path.name.split("-")[0].split(".")[0]
    assert lines[-1] == f"{data_set}: 5 bad rows are left out"
    assert {score.details.get("bad rows left out") for score in after.scores if score.dataset == data_set} == {5}


def test_generation_of_an_adapter(run, text_file, adapted):
    lines, report = run("generation", text_file, "--adapter", adapted[0], "--num-texts", "10", "--max-length", "100")
    assert lines[-1] == "with its adapters off, logits are bitwise the base's: yes"
    assert {score.system for score in report.scores} == {"base", "model", "text"}


def test_texts_that_generation_leaves_out_are_told(run, text_file):
    with text_file.open("a") as file:
        file.write("word " * 200 + "\n")
    lines, report = run("generation", text_file, "--num-texts", "100", "--max-length", "100")
    told = "held-out.txt: 1 of 31 texts are left out: 1 reach max_length, 100 tokens"
    assert (lines[-1], report.notes) == (told, [told])


def test_anisotropy(run, text_file):
    lines, report = run("anisotropy", text_file, "--num-texts", "10")
    assert {(score.metric, score.layer) for score in report.scores} == {
        (metric, layer) for metric in ("anisotropy", "within text", "readiness") for layer in range(4)
    }
    assert any("readiness, layer 3" in line for line in lines)


def test_the_same_texts_are_drawn_every_time(run, text_file):
    first, again, other = (
        run("anisotropy", text_file, "--num-texts", count, "--overwrite")[1].data for count in (5, 5, 6)
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("sts", "no scored pairs in data: looked for *-test.csv, *_test.csv, *.test.csv, *-test.tsv"),
        ("classification", "no labelled texts in data: looked for *-test.all"),
        ("generation", "no texts in data: looked for *.txt, *.txt.gz, *.jsonl"),
        ("anisotropy", "no texts in data: looked for *.txt, *.txt.gz, *.jsonl"),
    ],
)
def test_absent_data_is_one_line(tmp_path, monkeypatch, task, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "load_encoder", lambda _: pytest.fail("the model must not be loaded"))
    (tmp_path / "data").mkdir()
    found = invoke(task, "--data", "data", "--model", "m")
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith(f"error: {message}")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("task", "name"),
    [("sts", "a-test.csv"), ("classification", "a.test"), ("classification", "a.all"), ("generation", "a.txt")],
)
def test_a_pipe_among_the_data_is_refused(tmp_path, monkeypatch, task, name):
    monkeypatch.setattr(tasks, "load_encoder", lambda _: pytest.fail("the model must not be loaded"))
    os.mkfifo(tmp_path / name)
    found = invoke(task, "--data", tmp_path, "--model", "m")
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith(f"error: {tmp_path / name}: a regular file is needed")


@pytest.mark.parametrize(
    ("task", "name", "content", "status", "message"),
    [
        ("sts", "a-test.csv", b"a,b,1\nc,d\n", 2, "data/a-test.csv:2: 3 fields are needed"),
        ("classification", "a.all", b"1 a\nb\n", 2, "data/a.all:2: a line must be a label"),
        ("generation", "a.txt", b"a\n\xff\n", 1, "data/a.txt:2: invalid UTF-8"),
        ("anisotropy", "a.jsonl", b'{"text": 1}\n', 1, "data/a.jsonl:1: the text must be a string"),
        ("generation", "a.txt", b" \n\n", 2, "data/a.txt: every line is blank"),
    ],
)
def test_a_malformed_file_is_named_with_its_line(tmp_path, monkeypatch, task, name, content, status, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tasks, "load_encoder", lambda _: pytest.fail("the model must not be loaded"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(content)
    found = invoke(task, "--data", "data", "--model", "m")
    assert found.exit_code == status
    assert found.stderr.startswith(f"error: {message}")
    assert found.stderr.count("\n") == 1


def test_a_baseline_needs_no_training_split(run, similarity_folder):
    with_training = run("sts", similarity_folder, "--baseline")[1]
    (similarity_folder / "small-train.csv").unlink()
    lines, report = run("sts", similarity_folder, "--baseline", name="without")
    assert report.notes == ["small: TF-IDF is fitted on the scored sentences, whose scores it does not see"]
    assert lines[-1] == report.notes[0]
    values, before = ({s.system: s.value for s in found.scores} for found in (report, with_training))
    assert {system for system, value in values.items() if value != before[system]} == {
        "tfidf-words",
        "tfidf-characters",
    }


def test_an_output_in_no_folder_is_refused_before_the_work(similarity_folder, monkeypatch):
    monkeypatch.setattr(tasks, "load_encoder", lambda _: pytest.fail("the model must not be loaded"))
    found = invoke("sts", "--data", similarity_folder, "--model", "m", "--output", "nowhere/r.json")
    assert found.exit_code == 2
    assert "the folder 'nowhere' does not exist" in found.stderr


def test_an_output_that_must_not_be_written_is_refused_before_the_work(run, similarity_folder, tmp_path, monkeypatch):
    run("sts", similarity_folder)
    monkeypatch.setattr(tasks, "load_encoder", lambda _: pytest.fail("the model must not be loaded"))
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "link.json").symlink_to("report.json")
    data = similarity_folder / "small-test.csv"
    before = {path: path.read_bytes() for path in [*tmp_path.glob("*.*"), *similarity_folder.iterdir()]}
    for output, options, message in [
        (tmp_path / "report.json", [], "report.json exists; --overwrite replaces it"),
        (
            tmp_path / "notes.txt",
            ["--overwrite"],
            "notes.txt is not overwritten: it is nothing",
        ),
        (tmp_path / "link.json", ["--overwrite"], "link.json is a folder, a link or a device"),
        (data, [], "small-test.csv exists"),
        (data, ["--overwrite"], "small-test.csv is not overwritten"),
        (similarity_folder / "r.json", [], "the output lies within the input"),
        ("/dev/null", ["--overwrite"], "/dev/null is a folder, a link or a device"),
        (similarity_folder, ["--overwrite"], "pairs is a folder, a link or a device"),
        ("", [], "is a folder"),
    ]:
        found = invoke("sts", "--data", similarity_folder, "--model", "m", "--output", output, *options)
        assert (found.exit_code, found.stdout, found.stderr.count("\n")) == (2, "", 1), found.output
        assert message in found.stderr
    after = {path: path.read_bytes() for path in [*tmp_path.glob("*.*"), *similarity_folder.iterdir()]}
    assert after == before


def test_an_earlier_result_is_replaced_when_asked(run, similarity_folder, tmp_path):
    run("sts", similarity_folder)
    _, report = run("sts", similarity_folder, "--split", "dev", "--overwrite")
    assert report.settings["split"] == "dev"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs", "report.json"]


def test_a_result_that_cannot_be_written_is_still_printed(similarity_folder, tiny_llama_folder, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(AtomicFile, "finish", fail)
    found = invoke(*("sts", "--model", tiny_llama_folder, "--data", similarity_folder, "--output", tmp_path / "r.json"))
    assert (found.exit_code, found.stderr) == (1, f"error: {tmp_path / 'r.json'}: No space left on device\n")
    assert "spearman" in found.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pairs"]


def test_reports_of_two_tasks_are_not_compared(tmp_path):
    for name, task in (("a", "sts"), ("b", "generation")):
        values = {"task": task, "model": {}, "settings": {}, "data": {}, "scores": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(values))
    found = invoke("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert found.exit_code == 2
    assert found.stderr == "error: both reports must be of one task, got sts and generation\n"


def test_resuming_needs_an_output(similarity_folder):
    found = invoke("sts", "--data", similarity_folder, "--resume")
    assert found.exit_code == 2
    assert "resume needs an output" in found.output
