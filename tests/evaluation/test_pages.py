"""`bivec evaluate report`: every figure of every result in its place, nothing out of a file obeyed."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bivec import cli
from bivec.evaluation import comparison, pages
from bivec.evaluation.pages_results import Result, read_results
from bivec.evaluation.report import Report, Score
from bivec.evaluation.summary import summarized

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """The tables of a page as rows of texts, its pictures' texts and alternatives, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tables, self.alternatives, self.identifiers, self.open, self.tags = [], [], [], [], set()
        self.drawn = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in named:
            self.identifiers.append(named["id"])
        if tag == "svg":
            self.alternatives.append(named.get("aria-label", ""))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data
        if "text" in self.open:
            self.drawn.append(data)


def of_items(value_of: float, dataset="set", split="test", system="model", metric="accuracy", seed=0, **rest) -> Score:
    correct = np.random.default_rng(seed).random(200) < value_of
    return Score.of_items(dataset, split, system, metric, {"correct": correct.astype(float)}, **rest)


def result(name: str, task: str, *scores: Score, data: str = "same", path: str | None = None, **settings) -> Result:
    datasets = {score.dataset: data for score in scores}
    model = {"name": name, "base": "/models/base", "adapters": [], "mask": "causal"}
    return Result(name, Path(path or f"{name}-{task}.json"), Report(task, model, settings, datasets, list(scores)))


def markdown(*results: Result) -> str:
    return pages.render(results, Path("r.md"))


def html(*results: Result) -> Page:
    page = Page(pages.render(results, Path("r.html")))
    assert page.open == []
    assert len(set(page.identifiers)) == len(page.identifiers)
    return page


def rows_of(text: str, part: str, title: str = "") -> list[list[str]]:
    """Cells of the first table below a heading, or of that below a title."""
    below = text.split(f"### {part}\n", 1)[1]
    below = below.split(f"\n{title}\n", 1)[1] if title else below
    below = below.lstrip("\n")
    lines = re.match(r"(?:\|.*\n)+", below)[0].splitlines()
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines if "---" not in line]


def shown(score: Score) -> str:
    return f"{score.value:.4f} ({score.low:.4f} to {score.high:.4f})"


def test_word_tasks_stand_in_one_table_as_llm2vec_has_them():
    place = {"layer": 2, "read_out": "token", "probe": "linear"}
    found = {
        (name, task, metric): of_items(share, "conll", metric=metric, seed=seed, **place)
        for seed, (name, task, metric, share) in enumerate(
            [
                ("uni", "ner", "token accuracy", 0.9),
                ("uni", "ner", "span F1", 0.8),
                ("uni", "chunking", "token accuracy", 0.7),
                ("mntp", "chunking", "token accuracy", 0.8),
                ("mntp", "ner", "token accuracy", 0.85),
            ]
        )
    }
    results = [
        result(name, task, *(score for (n, t, _), score in found.items() if (n, t) == (name, task)))
        for name, task in [("uni", "ner"), ("uni", "chunking"), ("mntp", "chunking"), ("mntp", "ner")]
    ]
    header, *rows = rows_of(markdown(*results), "linear probe, read at the token")
    assert header == [
        "model",
        "Chunking: conll test: token accuracy (n = 200)",
        "NER: conll test: token accuracy (n = 200)",
        "NER: conll test: span F1 (n = 200)",
    ]
    plain = [[cell.replace("*", "") for cell in row] for row in rows]
    assert plain == [
        [
            "uni",
            shown(found["uni", "chunking", "token accuracy"]),
            shown(found["uni", "ner", "token accuracy"]),
            shown(found["uni", "ner", "span F1"]),
        ],
        ["mntp", shown(found["mntp", "chunking", "token accuracy"]), shown(found["mntp", "ner", "token accuracy"]), ""],
    ]
    page = html(*results)
    first, second = next(table for table in page.tables if "Chunking: conll test" in table[0])[:2]
    assert first == ["model", "Chunking: conll test", "NER: conll test"]
    assert second == ["token accuracy (n = 200)", "token accuracy (n = 200)", "span F1 (n = 200)"]


def test_a_page_holds_the_same_tables_and_a_picture_of_each_column():
    scores = [of_items(0.6 + 0.1 * place, dataset, seed=place) for place, dataset in enumerate("ab")]
    page = html(result("one", "classification", *scores), result("two", "classification", scores[0]))
    table = next(table for table in page.tables if "a test (n = 200)" in table[0])
    cells = [shown(score).replace(" (", " ").replace(")", "") for score in scores]
    mean = f"{(scores[0].value + scores[1].value) / 2:.4f}"
    assert table == [
        ["model", "a test (n = 200)", "b test (n = 200)", "mean"],
        ["one", *cells, mean],
        ["two", cells[0], "", ""],
    ]
    assert len(page.alternatives) == 2
    assert f"one {scores[0].value:.4f}; two {scores[0].value:.4f}" in page.alternatives[0]


def test_context_probes_are_columns_by_position():
    probes = [
        of_items(0.5 + position / 20, f"{name} position {position}", "test", layer=2, probe=probe, read_out="token")
        for probe in ("mlp", "linear")
        for name in ("subject_animacy", "verb_dynamic")
        for position in range(1, 6)
    ]
    chance = [replace(probe, system="majority", layer=None, probe=None, read_out=None) for probe in probes[:10]]
    rest = [
        of_items(0.9, "telicity", layer=2, probe="mlp", read_out="token"),
        of_items(0.8, "concreteness", metric="pearson", layer=2, probe="mlp", read_out="token"),
        of_items(0.7, "concreteness", metric="spearman", layer=2, probe="mlp", read_out="token"),
    ]
    found = result("m", "probing", *probes, *chance, *rest)
    for probe, its in (("mlp", probes[:10]), ("linear", probes[10:])):
        header, row, control = rows_of(markdown(found), f"accuracy by position, {probe} probe, read at the token")
        names = [
            f"{name} test: {place} (n = 200)" for name in ("subject_animacy", "verb_dynamic") for place in range(1, 6)
        ]
        assert header == ["model", *(name.replace("_", r"\_") for name in names)]
        assert row == ["m", *map(shown, its)]
        assert control == ["*majority*", *map(shown, its)]
    header, row = rows_of(markdown(found), "words in context, mlp probe, read at the token")
    assert [head.split(" (")[0] for head in header[1:]] == [
        "telicity test: accuracy",
        "concreteness test: pearson",
        "concreteness test: spearman",
    ]
    assert row == ["m", *map(shown, rest)]
    by_position = next(text for text in html(found).alternatives if text.startswith("subject_animacy"))
    assert f"m {probes[0].value:.4f} at position 1" in by_position


def test_llm2vecs_protocol_is_one_table_in_which_each_model_has_its_read_out():
    results = [
        result(name, "ner", of_items(share, layer=2, probe="linear, llm2vec", read_out=read_out))
        for name, share, read_out in (("uni", 0.5, "token"), ("mntp", 0.6, "previous"))
    ]
    rows = rows_of(markdown(*results), "linear, llm2vec probe")
    assert [row[0] for row in rows] == ["model", "uni, read at the token", "mntp, read at the position before"]
    assert [row[1].replace("*", "") for row in rows[1:]] == [shown(found.report.scores[0]) for found in results]


def test_leads_over_baselines_and_means_are_those_of_the_results():
    scores = [of_items(0.7, "a", seed=1), of_items(0.8, "b", seed=2)]
    scores += [
        replace(of_items(0.6, "a", seed=3), system="token average"),
        of_items(0.6, "b", system="token average", seed=4),
    ]
    first = summarized(scores, means=True)
    second = summarized([of_items(0.5, "a", seed=5), of_items(0.4, "b", seed=6)], means=True)
    text = markdown(result("one", "sts", *first), result("two", "sts", *second))
    header, row, *_ = rows_of(text, "accuracy")
    assert [head.split(" (")[0] for head in header] == ["model", "a test", "b test", "mean of 2 test"]
    assert row[3].replace("*", "") == shown(first[-2])
    (lead,) = rows_of(text, "accuracy", "lead over the baselines:")[1:]
    value, low, high, p_value = first[-1].lead
    assert lead[0] == "one over token average"
    assert lead[3] == f"{value:+.4f} ({low:+.4f} to {high:+.4f}; p {p_value:.4f})"
    (change,) = rows_of(text, "accuracy", "difference to one:")[1:]
    found = comparison.compare(result("one", "sts", *first).report, result("two", "sts", *second).report).rows[-1]
    value, low, high, p_value = found.difference
    assert change[3] == f"{value:+.4f} ({low:+.4f} to {high:+.4f}; p {p_value:.4f})"


def test_what_a_figure_is_the_mean_of_is_told():
    each = {"accuracy of each dimension": {"Vision": 0.25, "Touch": 0.75}}
    text = markdown(result("a", "new", of_items(0.5, details=each)), result("b", "new", of_items(0.6)))
    assert rows_of(text, "accuracy", "set test: accuracy of each dimension:") == [
        ["model", "Vision", "Touch"],
        ["a", "0.2500", "0.7500"],
    ]


def test_seeds_and_notes_are_told():
    score = of_items(0.7, details={"accuracy of each seed": [0.6, 0.8, 0.7]})
    found = result("m", "sts", score)
    found.report.notes.append("2 rows left out")
    text = markdown(found)
    assert rows_of(text, "accuracy")[1][1] == shown(score)[:-1] + "; 3 seeds 0.6000 to 0.8000)"
    assert rows_of(text, "What to know of the data")[1] == ["sts", "2 rows left out", "m"]


def test_the_best_is_marked_where_its_paired_difference_excludes_zero():
    items = np.random.default_rng(0).random(400)
    results = [
        result(
            name,
            "classification",
            Score.of_items("set", "test", "model", "accuracy", {"correct": (items < share) * 1.0}),
        )
        for name, share in [("low", 0.5), ("high", 0.8), ("hardly higher", 0.8025)]
    ]
    assert "**" not in "".join(cell for row in rows_of(markdown(*results), "accuracy") for cell in row)
    text = markdown(*results[:2])
    assert [row[1].startswith("**") for row in rows_of(text, "accuracy")[1:]] == [False, True]
    difference = rows_of(text, "accuracy", "difference to low:")
    value, low, high, p_value = map(float, re.findall(r"[-+]?\d\.\d+", difference[1][1]))
    high_score, low_score = (results[place].report.scores[0].value for place in (1, 0))
    assert value == pytest.approx(high_score - low_score, abs=1e-4)
    assert 0 < low < value < high
    assert p_value < 0.01


def test_controls_and_embeddings_stand_apart_and_once_where_they_are_the_same():
    def scores(share: float, seed: int) -> list[Score]:
        place = {"read_out": "token", "probe": "linear"}
        return [
            of_items(share, layer=3, seed=seed, **place),
            of_items(0.4, layer=0, seed=7, **place),
            of_items(0.2, system="shuffled labels", layer=3, seed=seed, **place),
            of_items(0.3, system="majority", seed=8, **place),
        ]

    rows = rows_of(
        markdown(result("a", "pos", *scores(0.8, 1)), result("b", "pos", *scores(0.7, 2))),
        "linear probe, read at the token",
    )
    assert [row[0] for row in rows] == [
        "model",
        "a",
        "b",
        "*layer 0 (embeddings)*",
        "*a, shuffled labels*",
        "*b, shuffled labels*",
        "*majority*",
    ]


def test_all_layers_stand_in_tables_and_in_a_picture_over_layers():
    layers = {
        name: [of_items(0.5 + 0.1 * layer, layer=layer, seed=layer + 10 * count) for layer in range(count)]
        for name, count in (("shallow", 3), ("deep", 5))
    }
    results = [result(name, "new-task", *scores) for name, scores in layers.items()]
    page = html(*results)
    table = next(table for table in page.tables if table[0][0] == "layer")
    assert table[0] == ["layer", "shallow", "deep"]
    assert [row[0] for row in table[1:]] == ["0", "1", "2", "3", "4"]
    assert [float(row[2].split()[0]) for row in table[1:]] == [round(score.value, 4) for score in layers["deep"]]
    assert [row[1] for row in table[4:]] == ["", ""]
    assert [float(row[1].split()[0]) for row in table[1:4]] == [round(score.value, 4) for score in layers["shallow"]]
    (alternative,) = page.alternatives
    assert "deep" in alternative
    assert f"{layers['deep'][4].value:.4f} at layer 4" in alternative


def test_the_last_layers_of_models_of_unlike_depth_are_no_curve():
    results = [
        result(name, "sts", *(of_items(0.5, layer=layer, seed=layer) for layer in (0, last)))
        for name, last in (("shallow", 2), ("deep", 5))
    ]
    page = html(*results)
    assert "layer" not in {table[0][0] for table in page.tables}
    assert f"deep {of_items(0.5, seed=5).value:.4f}; layer 0" in page.alternatives[0]


def test_a_control_of_no_layer_is_beside_all_layers():
    layers = [of_items(0.5 + 0.1 * layer, layer=layer, seed=layer) for layer in range(4)]
    (alternative,) = html(result("m", "new-task", *layers, of_items(0.2, system="majority"))).alternatives
    assert f"m, majority {of_items(0.2).value:.4f} throughout" in alternative


def test_several_runs_of_a_model_are_one_row_with_their_mean():
    scores = [of_items(share, seed=seed) for seed, share in enumerate((0.6, 0.7, 0.8))]
    runs = [result("mntp", "classification", score, path=f"seed-{seed}.json") for seed, score in enumerate(scores)]
    _, row, _ = rows_of(markdown(*runs, result("base", "classification", of_items(0.5, seed=9))), "accuracy")
    mean, low, high, *each = map(float, re.findall(r"\d\.\d+", row[1]))
    assert mean == pytest.approx(np.mean([score.value for score in scores]), abs=1e-4)
    assert low < mean < high
    assert high - low < min(score.high - score.low for score in scores)  # these runs' faults have nothing in common
    assert each == [round(score.value, 4) for score in scores]


def test_runs_of_other_settings_are_no_runs_of_one_evaluation():
    runs = [result("m", "sts", of_items(0.5), path=f"{split}.json", protocol=split) for split in ("bivec", "llm2vec")]
    with pytest.raises(ValueError, match=r"bivec\.json and llm2vec\.json, both named 'm', .* protocol is 'bivec' and"):
        markdown(*runs)


def test_results_of_other_data_have_columns_of_their_own():
    results = [result("a", "sts", of_items(0.5), data="0123456789"), result("b", "sts", of_items(0.6), data="abcdef")]
    text = markdown(*results)
    header, *rows = rows_of(text, "accuracy")
    assert header == ["model", "set test (01234567) (n = 200)", "set test (abcdef) (n = 200)", "mean"]
    assert [[bool(cell) for cell in row] for row in rows] == [[True, True, False, False], [True, False, True, False]]
    assert "Not the same data in all results: set." in text
    assert "difference to a" not in text


HOSTILE = "<script>alert(1)</script>|`*_[x](y)\n# $\\frac{1}{0}$ & \"'"


def test_names_out_of_files_are_shown_and_not_obeyed():
    score = of_items(0.5, HOSTILE, HOSTILE, metric=HOSTILE, layer=1, read_out=HOSTILE, probe=HOSTILE)
    control = replace(score, system=HOSTILE)
    hostile = result(HOSTILE, HOSTILE, score, control, **{HOSTILE: HOSTILE})
    hostile.report.checks[HOSTILE] = True
    other = result("plain", HOSTILE, replace(score, layer=2), replace(score, layer=3), replace(score, layer=4))
    page = html(hostile, other)
    assert "script" not in page.tags
    assert any("$\\frac{1}{0}$" in text for text in page.drawn)
    assert any(HOSTILE in cell for table in page.tables for row in table for cell in row)
    text = markdown(hostile, other)
    assert "<" not in text.removeprefix(pages.MARK)
    assert not re.search(r"(?<!\\)[`\[$]", text)
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


def test_an_undefined_figure_is_said_and_drawn_as_nothing():
    undefined = Score("set", "test", "model", "pearson", float("nan"), float("nan"), float("nan"), layer=1)
    results = [result("a", "sts", undefined), result("b", "sts", replace(of_items(0.5, metric="pearson"), layer=1))]
    assert rows_of(markdown(*results), "pearson")[1] == ["a", "undefined"]
    assert "a undefined" in html(*results).alternatives[0]


def test_what_differs_between_models_is_said_at_the_top():
    first, second = (
        result("a", "sts", of_items(0.5), protocol="bivec"),
        result("b", "sts", of_items(0.6), protocol="bivec"),
    )
    second.report.model.update(mask="bidirectional", adapters=["/home/me/runs/mntp"])
    header, *rows = rows_of(markdown(first, second), "What differs")
    assert header == ["model", "results", "name", "adapters", "mask"]
    assert rows == [
        ["a", "sts: a-sts.json", "a", "none", "causal"],
        ["b", "sts: b-sts.json", "b", "runs/mntp", "bidirectional"],
    ]
    assert "| protocol | bivec |" in markdown(first, second)


def test_the_same_results_give_the_same_bytes():
    results = [result(name, "sts", *(of_items(0.5, layer=layer) for layer in range(4))) for name in "ab"]
    assert pages.render(results, Path("r.html")) == pages.render(results, Path("r.html"))


def test_a_page_asks_for_nothing_from_elsewhere():
    text = pages.render([result("a", "sts", *(of_items(0.5, layer=layer) for layer in range(4)))], Path("r.html"))
    assert not re.search(r"(?:src|(?<!xlink:)href)=|url\((?!#)|@import|<script|<link", text.replace('href="#', ""))
    assert set(re.findall(r'https?://[^"]*', text)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "#07080" not in text  # a colour that the page does not know


@pytest.fixture
def written(tmp_path):
    """Writes results under paths below a folder."""

    def write(*files: str, task: str | None = None) -> list[Path]:
        paths = [tmp_path / file for file in files]
        for seed, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            report = result(path.parent.name, task or path.stem, of_items(0.5, seed=seed)).report
            path.write_bytes(report.to_json())
        return paths

    return write


@pytest.mark.parametrize(
    ("files", "task", "names"),
    [
        (["base.json", "mntp.json"], "sts", ["base", "mntp"]),
        (["one/base.json", "two/base.json"], "sts", ["one/base", "two/base"]),
        (["base/sts.json", "base/pos.json", "mntp/sts.json"], None, ["base", "base", "mntp"]),
        (["one/base/sts.json", "two/base/sts.json"], None, ["one/base", "two/base"]),
    ],
)
def test_a_result_is_called_as_its_file_or_folder(written, files, task, names):
    assert [found.name for found in read_results(list(map(str, written(*files, task=task))))] == names


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["one/sts.json", "two/sts.json"], ["one (float32)", "two (int8+bfloat16)", "base"]),
        (["one/sts.json", "one/pos.json"], ["one (float32)", "one (int8+bfloat16)", "base"]),
    ],
)
def test_a_dtype_stands_behind_names_of_one_model_in_several(written, files, names):
    paths = written(*files, "base.json", task="sts")
    for path, model, dtype in zip(paths, ("m", "m", "n"), ("float32", "int8+bfloat16", "float32"), strict=True):
        report = Report.read(path)
        report.model.update(name=model, dtype=dtype)
        path.write_bytes(replace(report, task="pos" if path.stem == "pos" else "sts").to_json())
    assert [found.name for found in read_results(list(map(str, paths)))] == names


def test_a_name_may_be_given(written, tmp_path):
    paths = written("seed-1/sts.json", "seed-2/sts.json", "base.json", task="sts")
    found = read_results([f"mntp={paths[0]}", f"mntp={paths[1]}", str(paths[2])])
    assert [(result.name, result.path) for result in found] == list(zip(["mntp", "mntp", "base"], paths, strict=True))


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["evaluate", "report", *map(str, arguments)])


def test_the_command(written, tmp_path):
    paths = written("base.json", "mntp.json", task="sts")
    for name, begin in (("r.md", pages.MARK), ("r.html", "<!doctype html>")):
        output = tmp_path / name
        assert invoke(*paths, "--output", output).exit_code == 0
        assert output.read_text().startswith(begin)
        before = output.read_bytes()
        again = invoke(*paths, "--output", output)
        assert (again.exit_code, again.stderr) == (2, f"error: {output} exists; --overwrite replaces it\n")
        assert invoke(*paths, "--output", output, "--overwrite").exit_code == 0
        assert output.read_bytes() == before


def test_what_the_command_did_not_write_is_kept(written, tmp_path):
    (path,) = written("base.json", task="sts")
    for name in ("notes.md", "thesis.html"):
        (tmp_path / name).write_text("<!doctype html>\nmine")
        found = invoke(path, "--output", tmp_path / name, "--overwrite")
        assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
        assert f"{name} is not overwritten: it is nothing that this command wrote" in found.stderr
        assert (tmp_path / name).read_text() == "<!doctype html>\nmine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base.json", "--output", "r.pdf"], "r.pdf: the output must be named .md or .html"),
        (["base.json", "base.json", "--output", "r.md"], "base.json is given twice"),
        (["a=base.json", "b=./base.json", "--output", "r.md"], "base.json is given twice"),
        (["notes.txt", "--output", "r.md"], "notes.txt must be what `bivec evaluate --output` wrote"),
    ],
)
def test_what_cannot_be_reported_is_one_line(written, tmp_path, monkeypatch, arguments, message):
    written("base.json", task="sts")
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    found = invoke(*arguments)
    assert (found.exit_code, found.stderr.count("\n")) == (2, 1)
    assert message in found.stderr
    assert not (tmp_path / "r.md").exists()


def test_what_a_terminal_would_obey_stands_in_no_file(tmp_path):
    path = tmp_path / "r.json"
    path.write_bytes(result("m", "sts", of_items(0.5, "a\x1b[31m\u202eb")).report.to_json())
    assert invoke(path, "--output", tmp_path / "r.html").exit_code == 0
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", (tmp_path / "r.html").read_text())
