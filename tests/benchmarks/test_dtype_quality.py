"""What a dtype costs, in one document: paired differences as `bivec evaluate` has them, cosines of all texts."""

import json

import numpy as np
import pytest

from bivec import Encoder
from bivec.benchmarks import dtype_quality
from bivec.evaluation import sts
from bivec.evaluation.comparison import compare
from bivec.evaluation.tasks import EvaluateSettings, evaluate


@pytest.fixture
def folders(tmp_path, sentence):
    """Scored pairs and labelled texts."""
    similar, labelled = tmp_path / "similar", tmp_path / "labelled"
    similar.mkdir()
    labelled.mkdir()
    rows = [f"{sentence()},{sentence()},{place % 6}\n" for place in range(40)]
    (similar / "small-dev.csv").write_text("".join(rows))
    for split in ("train", "dev", "test"):
        (labelled / f"kind.{split}").write_text("".join(f"{place % 2} {sentence()}\n" for place in range(24)))
    return similar, labelled


def test_figures_are_those_of_evaluate(folders, tiny_llama_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dtype_quality, "describe_machine", lambda device: {})
    similar, labelled = folders
    output = tmp_path / "quality.json"
    given = ["--models", f"tiny={tiny_llama_folder}", "--dtypes", "bfloat16", "--splits", "dev"]
    given += ["--sts", similar, "--classification", labelled, "--output", output]
    assert dtype_quality.main([str(part) for part in given]) == 0
    similarity, accuracy = json.loads(output.read_text())["rows"]

    tasks = [("sts", similar, "dev", similarity), ("classification", labelled, "test", accuracy)]
    for task, data, split, row in tasks:
        reports = [
            evaluate(EvaluateSettings(task, str(data), str(tiny_llama_folder), dtype=dtype, split=split, seeds=1))
            for dtype in ("float32", "bfloat16")
        ]
        expected = compare(*reports).rows[0]
        assert (row["model"], row["dtype"], row["n"]) == ("tiny", "bfloat16", expected.known.n)
        assert row["float32"] == pytest.approx(expected.known.value)
        if expected.difference is None:  # the same answers
            assert row["difference"]["value"] == 0.0
        else:
            assert tuple(row["difference"].values()) == pytest.approx(expected.difference)

    (task,) = sts.read_tasks(similar, "dev")
    texts = [*task.pairs.first, *task.pairs.second]
    exact, found = (
        Encoder.from_pretrained(tiny_llama_folder, dtype=dtype).encode(texts).astype(float)
        for dtype in ("float32", "bfloat16")
    )
    for name, centre in (("cosine", 0.0), ("centred cosine", exact.mean(axis=0))):
        cosines = sts.cosines(found - centre, exact - centre)
        assert similarity[name] == pytest.approx({"least": cosines.min(), "median": np.median(cosines)})
    assert "small dev" in capsys.readouterr().out
