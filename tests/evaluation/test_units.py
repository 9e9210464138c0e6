"""An evaluation that is interrupted: what was scored is kept, and taken again only for the same model and data."""

import json

import pytest
from typer.testing import CliRunner

from bivec import cli
from bivec.engine import dtypes
from bivec.evaluation import classification


@pytest.fixture
def evaluate(tiny_llama_folder, labelled_folder, tmp_path):
    def evaluate(*options):
        output = tmp_path / "report.json"
        given = ["classification", "--model", tiny_llama_folder, "--data", labelled_folder, "--output", output]
        return CliRunner().invoke(cli.app, ["evaluate", *map(str, given), "--dtype", "float32", *options])

    return evaluate


@pytest.fixture
def interrupt(evaluate, monkeypatch, tmp_path):
    """interrupt(*options): a classification that ends while its second data set is scored, which gives the data sets
    that are scored."""
    scored: list[str] = []
    classify = classification.classify

    def counting(task, *arguments):
        scored.append(task.name)
        if scored == ["split", "three"]:
            raise KeyboardInterrupt
        return classify(task, *arguments)

    def interrupt(*options):
        monkeypatch.setattr(classification, "classify", counting)
        assert evaluate(*options).exit_code == 130
        assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["report.json.unfinished"]
        return scored

    return interrupt


@pytest.fixture
def interrupted(interrupt):
    return interrupt()


def test_what_was_scored_is_not_scored_again(evaluate, interrupted, tmp_path):
    found = evaluate("--resume")
    assert found.exit_code == 0, found.output
    assert interrupted == ["split", "three", "three", "whole"]
    resumed = json.loads((tmp_path / "report.json").read_text())
    assert sorted(path.name for path in tmp_path.glob("*.json*")) == ["report.json"]
    (tmp_path / "report.json").unlink()
    assert evaluate().exit_code == 0
    assert json.loads((tmp_path / "report.json").read_text()) == resumed


def test_it_goes_on_in_its_dtype(evaluate, interrupt, monkeypatch, tmp_path):
    """Whatever is measured to be faster by then."""
    monkeypatch.setattr(dtypes, "onednn_multiplies", lambda dtype: True)
    monkeypatch.setattr(dtypes, "product_rates", lambda config: (1.0, 2.0))
    scored = interrupt("--dtype", "auto")
    monkeypatch.setattr(dtypes, "product_rates", lambda config: (2.0, 1.0))
    found = evaluate("--dtype", "auto", "--resume")
    assert found.exit_code == 0, found.output
    assert scored == ["split", "three", "three", "whole"]
    assert json.loads((tmp_path / "report.json").read_text())["model"]["dtype"] == "bfloat16"


def test_the_dtype_of_an_evaluation_that_is_replaced_is_not_taken_over(evaluate, interrupt, monkeypatch, tmp_path):
    monkeypatch.setattr(dtypes, "onednn_multiplies", lambda dtype: True)
    monkeypatch.setattr(dtypes, "product_rates", lambda config: (2.0, 1.0))
    scored = interrupt("--dtype", "bfloat16")
    found = evaluate("--dtype", "auto", "--resume", "--overwrite")
    assert found.exit_code == 0, found.output
    assert scored == ["split", "three", "split", "three", "whole"]
    assert json.loads((tmp_path / "report.json").read_text())["model"]["dtype"] == "float32"


def test_an_interrupted_evaluation_is_never_lost_unasked(evaluate, interrupted):
    found = evaluate()
    assert found.exit_code == 2
    assert "is an interrupted evaluation: --resume goes on with it, --overwrite begins anew" in found.stderr
    assert evaluate("--overwrite").exit_code == 0
    assert interrupted == ["split", "three", "split", "three", "whole"]


@pytest.mark.parametrize(
    ("change", "named"), [(["--pooling", "last"], "model and settings"), (["--seeds", "4"], "settings"), ([], "data")]
)
def test_another_evaluation_is_not_gone_on_with(evaluate, interrupted, labelled_folder, change, named):
    if named == "data":
        with (labelled_folder / "whole.all").open("a") as file:
            file.write("1 one more\n")
    found = evaluate("--resume", *change)
    assert found.exit_code == 2
    assert f"was scored with another {named}: --overwrite begins anew" in found.stderr


@pytest.mark.parametrize(("changes", "scored_again"), [([], False), (["--pooling", "last"], True)])
def test_what_is_there_may_be_gone_on_with_or_else_replaced(evaluate, interrupted, changes, scored_again):
    found = evaluate("--resume", "--overwrite", *changes)
    assert found.exit_code == 0, found.output
    assert interrupted == ["split", "three", *["split"] * scored_again, "three", "whole"]


def test_a_file_of_that_name_is_not_replaced(evaluate, tmp_path):
    (tmp_path / "report.json.unfinished").write_text("notes")
    found = evaluate("--overwrite")
    assert found.exit_code == 2
    assert "report.json.unfinished is not overwritten: it is nothing that this command wrote" in found.stderr
