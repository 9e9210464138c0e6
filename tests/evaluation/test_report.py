"""Reports: written whole or not at all, compared on the same items, drawn."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bivec.engine.outputs import open_output
from bivec.evaluation import comparison, extras
from bivec.evaluation.comparison import _draw_lines, compare, draw, is_picture
from bivec.evaluation.report import Report, Score, fingerprint, is_report, statistic_of, table
from bivec.evaluation.statistics import Difference, paired_difference, spearman


def similarity_score(seed: int, system: str = "model") -> Score:
    generator = np.random.default_rng(seed)
    gold = np.random.default_rng(0).uniform(0, 5, size=50)
    items = {"gold": gold.tolist(), "similarity": (gold + generator.normal(size=50)).tolist()}
    return Score("set", "test", system, "spearman", 0.5, 0.4, 0.6, items=items)


def make_report(*scores: Score, task: str = "sts", data: str = "same") -> Report:
    return Report(task, {"name": "m"}, {"split": "test"}, {"set": data}, list(scores), {"the base is untouched": True})


def test_a_report_is_read_as_it_was_written(tmp_path):
    undefined = Score("set", "test", "model", "pearson", float("nan"), float("nan"), float("nan"))
    led = replace(similarity_score(1, "tfidf-words"), lead=Difference(0.1, 0.05, 0.2, 0.001))
    report = make_report(led, Score("set", "all", "model", "readiness", 0.3, layer=2), undefined)
    report.notes.append("all is well")
    with open_output(tmp_path / "r.json", overwrite=False, is_own=is_report) as publish:
        publish(report.to_json())
    found = Report.read(tmp_path / "r.json")
    assert np.isnan(found.scores.pop().value)
    report.scores.pop()
    assert found == report
    assert '"p_value": 0.001' in (tmp_path / "r.json").read_text()
    assert "NaN" not in (tmp_path / "r.json").read_text()
    assert os.listdir(tmp_path) == ["r.json"]


def test_a_report_of_before_is_read(tmp_path):
    """Without leads, notes, n and the rest."""
    (tmp_path / "r.json").write_text(json.dumps(REPORT | {"scores": [SCORE], "checks": {}}))
    found = Report.read(tmp_path / "r.json")
    assert (found.notes, found.scores[0].lead, found.scores[0].n) == ([], None, None)


def test_a_failed_write_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    before = make_report(similarity_score(1)).to_json()
    path.write_bytes(before)

    def fail(*_):
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(os, "fsync", fail)
    with (
        pytest.raises(OSError, match=r"No space left on device: .*r\.json"),
        open_output(path, overwrite=True, is_own=is_report) as publish,
    ):
        publish(make_report(similarity_score(2)).to_json())
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["r.json"]


def test_whoever_reads_the_old_report_keeps_it_whole(tmp_path):
    path = tmp_path / "r.json"
    before = make_report(similarity_score(1), task="generation").to_json()
    path.write_bytes(before)
    with path.open("rb") as reader:
        with open_output(path, overwrite=True, is_own=is_report) as publish:
            publish(make_report(similarity_score(1)).to_json())
        assert reader.read() == before
    assert Report.read(path).task == "sts"


def test_one_run_alone_writes_a_report(tmp_path):
    path = tmp_path / "r.json"
    with (
        open_output(path, overwrite=False, is_own=is_report),
        pytest.raises(FileExistsError, match="another run is writing this output"),
        open_output(path, overwrite=False, is_own=is_report),
    ):
        pass
    assert os.listdir(tmp_path) == []


SCORE = {"dataset": "set", "split": "test", "system": "model", "metric": "accuracy", "value": 1}
NO_SCORES = [
    SCORE | {"value": "high"},
    SCORE | {"value": [1]},
    SCORE | {"low": "1"},
    SCORE | {"layer": [1]},
    SCORE | {"dataset": 5},
    SCORE | {"system": None},
    SCORE | {"unknown": 1},
    SCORE | {"items": [1]},
    SCORE | {"items": {"correct": 1}},
    SCORE | {"items": {"correct": ["1 or so"]}},
    SCORE | {"items": {"correct": []}},
    SCORE | {"lead": [0.1, 0.0, 0.2, 0.5]},
    SCORE | {"lead": {"value": 0.1}},
    SCORE | {"items": {"gold": [1, 2], "similarity": [1]}},
    {"dataset": "set"},
    None,
]
REPORT = {"task": "sts", "model": {}, "settings": {}, "data": {}}
NO_REPORTS = [
    *({**REPORT, "scores": [score]} for score in NO_SCORES),
    {**REPORT, "scores": [], "data": []},
    {**REPORT, "scores": [], "task": 1},
]


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"scores": [{}]}', '{"scores": 3}', "[" * 100_000, *map(json.dumps, NO_REPORTS)],
)
def test_what_is_no_report_is_refused(tmp_path, content):
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ValueError, match=r"r\.json must be what `bivec evaluate --output` wrote"):
        Report.read(tmp_path / "r.json")


def test_fingerprints_tell_columns_apart():
    assert fingerprint(["a", "b"], np.array([1.0, 2.0])) == fingerprint(("a", "b"), [1.0, 2.0])
    assert fingerprint(["a", "b"]) != fingerprint(["a"], ["b"]) != fingerprint(["ab"])


def test_the_table_is_aligned():
    lines = list(
        table(make_report(replace(similarity_score(1), n=40), Score("set", "all", "base", "perplexity", 23.456)))
    )
    assert lines == [
        "data  split  n   system  metric      value   95 % interval",
        "set   test   40  model   spearman    0.5000  0.4000 to 0.6000",
        "set   all        base    perplexity  23.46",
        "the base is untouched: yes",
    ]


def test_a_baseline_stands_with_the_models_lead_over_it():
    baseline = replace(similarity_score(1, "tfidf-words"), lead=Difference(-0.125, -0.25, 0.0, 0.04))
    report = replace(make_report(similarity_score(1), baseline), checks={}, notes=["set: 2 rows are left out"])
    lines = list(table(report))
    assert lines[0].endswith("model's lead  95 % interval       p")
    assert lines[1].endswith("0.4000 to 0.6000")
    assert lines[2].endswith("0.4000 to 0.6000  -0.1250       -0.2500 to +0.0000  0.0400")
    assert lines[3] == "set: 2 rows are left out"


def test_a_name_of_several_lines_is_one_row_of_the_table():
    header, row, _ = table(make_report(replace(similarity_score(1), dataset="a\nb")))
    assert header.startswith("data  split")
    assert row.startswith("a\\nb  test")


def test_differences_are_on_the_same_items():
    baseline = similarity_score(9, "tfidf-words")
    first, second = similarity_score(1), similarity_score(2)
    found = compare(make_report(first, baseline), make_report(second, baseline, similarity_score(3, "other")))
    rows = found.rows
    assert [(row.known.system, row.difference is not None) for row in rows] == [
        ("model", True),
        ("tfidf-words", False),
    ]
    expected = paired_difference(spearman(*first.items.values()), spearman(*second.items.values()), 50)
    assert rows[0].difference == expected
    lines = list(comparison.table(found, ("a", "b")))
    assert f"{expected.value:+.4f}" in lines[1]
    assert lines[3:] == ["only in b: set test other"]


def test_what_only_one_report_has_is_named():
    shared, alone = similarity_score(1), replace(similarity_score(2), dataset="CR")
    first = make_report(shared, alone, replace(alone, system="tfidf-words"))
    second = make_report(shared, similarity_score(3, "tfidf-words"))
    first.data["CR"] = "one"
    lines = list(comparison.table(compare(first, second), ("a", "b")))
    assert [line.split()[:3] for line in lines[1:2]] == [["set", "test", "model"]]
    assert lines[2:] == ["only in a: CR", "only in b: set test tfidf-words"]
    second = replace(make_report(replace(shared, dataset="MR")), data={"MR": "other"})
    with pytest.raises(ValueError, match=r"must have figures in common, got the data sets set, CR and MR"):
        compare(first, second)


@pytest.mark.parametrize(
    ("metric", "items", "value"),
    [
        ("accuracy", {"correct": [1.0, 0.0, 1.0, 1.0]}, 0.75),
        ("readiness", {"share": [0.5, 0.7, 0.3, 0.1]}, 0.4),
        ("perplexity", {"loss": [1.0, 2.0, 3.0, 2.0], "tokens": [1.0, 1.0, 1.0, 1.0]}, np.exp(2.0)),
        ("bits per character", {"bits": [1.0, 2.0, 3.0, 2.0], "characters": [2.0, 2.0, 2.0, 2.0]}, 1.0),
        ("pearson", {"gold": [1.0, 2.0, 3.0, 5.0], "similarity": [2.0, 4.0, 6.0, 10.0]}, 1.0),
    ],
)
def test_each_metric_is_rebuilt_from_its_items(metric, items, value):
    statistic, num_items = statistic_of(metric, items)
    assert num_items == len(next(iter(items.values())))
    assert statistic is not None
    assert statistic(np.ones((1, 4)))[0] == pytest.approx(value)


def test_what_cannot_be_compared_is_refused():
    report = make_report(similarity_score(1))
    with pytest.raises(ValueError, match="of one task, got sts and generation"):
        compare(report, replace(report, task="generation"))
    with pytest.raises(ValueError, match="those of set differ"):
        compare(report, make_report(similarity_score(1), data="other"))


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_picture_has_a_panel_a_metric(tmp_path, suffix):
    layers = [Score("set", "all", "model", "readiness", 1 - layer / 9, layer=layer) for layer in range(3)]
    undefined = Score("set", "test", "model", "pearson", float("nan"))
    first, second = (
        make_report(similarity_score(1), undefined, *layers),
        make_report(similarity_score(2), undefined, *layers),
    )
    path = tmp_path / f"picture{suffix}"
    content = draw(compare(first, second).rows, ("a", "b"), path)
    path.write_bytes(content)
    assert is_picture(path)
    assert content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")
    if suffix == ".svg":
        assert [f"<!-- {title} -->".encode() in content for title in ("spearman", "pearson", "readiness")] == [True] * 3


def test_each_figure_over_layers_has_a_line_of_its_own():
    places = [(layer, read_out) for layer in (0, 1, 2) for read_out in ("token", "previous")]
    scores = [
        Score("set", "test", "model", "accuracy", 0.1 * layer, layer=layer, read_out=read_out)
        for layer, read_out in places
    ]
    report = make_report(Score("set", "test", "majority", "accuracy", 0.5), *scores)
    rows = compare(report, report).rows
    drawn = []
    axis = SimpleNamespace(plot=lambda layers, values, **_: drawn.append(layers), set_xlabel=lambda _: None)
    _draw_lines(axis, rows[1:], ("a", "b"))
    assert drawn == [[0, 1, 2]] * 4
    assert b"<!-- layer -->" in draw(rows, ("a", "b"), Path("picture.svg"))


def test_an_unknown_format_is_refused(tmp_path):
    rows = compare(make_report(similarity_score(1)), make_report(similarity_score(2))).rows
    with pytest.raises(ValueError, match=r"picture\.docx: Format 'docx' is not supported"):
        draw(rows, ("a", "b"), Path(tmp_path / "picture.docx"))


def test_an_absent_extra_is_named():
    with pytest.raises(ValueError, match=r"the picture needs nothing: pip install 'bivec\[eval\]'"):
        extras.needed("bivec_has_no_such_module", "nothing", "the picture")
