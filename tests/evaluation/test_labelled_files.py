"""Labelled texts and pairs: which files are data sets, which rows are none, and what is refused."""

import gzip

import pytest

from bivec.evaluation.bad_rows import BadRows
from bivec.evaluation.classification import read_tasks
from bivec.evaluation.labelled_files import read_labelled


def read(path, on_error="fail"):
    """Labels and texts of a file that is no file of pairs."""
    is_pairs, rows = read_labelled(path, BadRows(on_error))
    assert not is_pairs
    return [row.label for row in rows], [row.text for row in rows]


def test_data_sets_of_a_folder(labelled_folder):
    tasks = {task.name: task for task in read_tasks(labelled_folder, "test")}
    assert {name: {split: len(rows) for split, rows in task.rows.items()} for name, task in tasks.items()} == {
        "split": {"dev": 24, "test": 30, "train": 60},
        "three": {"test": 30, "train": 60},
        "whole": {"train": 40},
    }
    split = tasks["split"]
    expected = read(labelled_folder / "split.test")
    assert split.labels[split.rows["test"]].tolist() == expected[0]
    assert [split.texts[row] for row in split.rows["test"]] == expected[1]


def test_latin1_is_read_where_the_file_is_no_utf8(tmp_path):
    (tmp_path / "a").write_bytes("1 naïve\u0085café\r\n0 plain".encode("latin-1"))
    assert read(tmp_path / "a") == (["1", "0"], ["naïve\u0085café", "plain"])
    (tmp_path / "a").write_bytes("1 naïve 北京\n".encode())
    assert read(tmp_path / "a") == (["1"], ["naïve 北京"])


@pytest.mark.parametrize(
    ("content", "line"), [("0 a\nword\n", 2), ("0 a\n\n1 b\n", 2), ("0 a\n1  \n", 2), (" text\n", 1), ("", 1)]
)
def test_a_malformed_line_is_named(tmp_path, content, line):
    (tmp_path / "a.train").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.train:{line}: a line must be a label, a space and a text"):
        read(tmp_path / "a.train")


def test_absent_data_says_what_was_looked_for_where(labelled_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no labelled texts in .*empty: looked for \*-test\.all, .*\*\.all"):
        read_tasks(tmp_path / "empty", "test")
    (labelled_folder / "split.train").unlink()
    with pytest.raises(FileNotFoundError, match=r"no training split beside .*split\.dev: looked for split-train\.all"):
        read_tasks(labelled_folder, "test")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-32-be"])
def test_wide_characters_are_no_latin1(tmp_path, encoding):
    (tmp_path / "a").write_bytes("1 a text\n0 another\n".encode(encoding))
    with pytest.raises(ValueError, match=r"a: the file is in UTF-.*must be in UTF-8: convert it"):
        read(tmp_path / "a")


def test_labels_that_training_lacks_are_refused_where_they_count(labelled_folder):
    with (labelled_folder / "split.test").open("a") as file:
        file.write("1.0 a\n1.0 b\n2 c\n")
    with pytest.raises(
        ValueError, match=r"split\.test: every label must occur in .*split\.train, '1\.0' \(2 times\) does not"
    ):
        read_tasks(labelled_folder, "test")
    assert "split" in {task.name for task in read_tasks(labelled_folder, "dev")}
    with (labelled_folder / "split.dev").open("a") as file:
        file.write("x a\n")
    with pytest.raises(
        ValueError, match=r"split\.dev: every label must occur in .*split\.train, 'x' \(1 times\) does not"
    ):
        read_tasks(labelled_folder, "test")


def test_too_few_of_a_label_are_refused(labelled_folder):
    with (labelled_folder / "whole.all").open("a") as file:
        file.write("2 rare\n")
    with pytest.raises(ValueError, match=r"whole\.all: .* each stand 10 times, got '2' 1 times"):
        read_tasks(labelled_folder, "test")


PROBING = [("tr", 30), ("va", 6), ("te", 9)]


def write_probing(path, labels="ab", extra=""):
    rows = [f"{mark}\t{labels[i % len(labels)]}\t{mark} text , {i}\n" for mark, count in PROBING for i in range(count)]
    content = ("".join(rows) + extra).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.mark.parametrize("name", ["tree_depth.txt", "tree_depth.txt.gz"])
def test_a_probing_task_has_its_splits_in_one_file(tmp_path, name):
    write_probing(tmp_path / name)
    (tmp_path / "README.txt").write_text("train\tis not a split\n")
    (task,) = read_tasks(tmp_path, "test")
    assert task.name == "tree_depth"
    assert {split: len(rows) for split, rows in task.rows.items()} == {"train": 30, "dev": 6, "test": 9}
    assert [task.texts[row] for row in task.rows["dev"]] == [f"va text , {i}" for i in range(6)]
    assert task.labels[task.rows["test"]].tolist() == list("ababababa")
    (on_dev,) = read_tasks(tmp_path, "dev")
    assert set(on_dev.rows) == {"train", "dev"}


@pytest.mark.parametrize("line", ["xx\ta\ttext\n", "te\ta text\n", "te\t\ttext\n", "te\ta\t \n", "\n"])
def test_a_malformed_line_of_a_probing_task_is_named(tmp_path, line):
    write_probing(tmp_path / "depth.txt", extra=line)
    with pytest.raises(ValueError, match=r"depth\.txt:46: a line must be tr, va or te, a label and a text with tabs"):
        read_tasks(tmp_path, "test")
    with pytest.warns(UserWarning, match=r"depth\.txt:46: .*: left out"):
        (task,) = read_tasks(tmp_path, "test", "skip")
    assert (len(task.texts), task.num_left_out) == (45, 1)


def test_a_probing_task_without_a_split_is_refused(tmp_path):
    (tmp_path / "depth.txt").write_text("".join(f"tr\t{i % 2}\ttext\n" for i in range(30)))
    with pytest.raises(ValueError, match=r"depth\.txt: no line is of the dev split"):
        read_tasks(tmp_path, "test")
    write_probing(tmp_path / "depth.txt.gz")
    with pytest.raises(ValueError, match=r"depth\.txt\.gz: another file of .* is the data set depth, too"):
        read_tasks(tmp_path, "test")


def test_a_torn_file_is_named(tmp_path):
    write_probing(tmp_path / "depth.txt.gz")
    whole = (tmp_path / "depth.txt.gz").read_bytes()
    (tmp_path / "depth.txt.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"depth\.txt\.gz: "):
        read_tasks(tmp_path, "test")


HEADER = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"


def write_pairs(path, count, header=HEADER, extra="", mark="\ufeff", end="\r\n"):
    rows = [f'{i % 2}\t{i}\t{i + 1}\t"one" said {i}\tSaid {i} "one' for i in range(count)]
    path.write_bytes((mark + end.join([header, *rows]) + end + extra).encode())


@pytest.mark.parametrize(
    ("train", "other", "split"),
    [("msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "test"), ("train.tsv", "dev.tsv", "dev")],
)
def test_pairs_are_read_as_published(tmp_path, train, other, split):
    folder = tmp_path / "msr_paraphrase"
    folder.mkdir()
    write_pairs(folder / train, 30)
    write_pairs(folder / other, 7, mark="", end="\n")
    if split == "dev":  # GLUE keeps the labels of its test split back
        write_pairs(folder / "test.tsv", 7, header=HEADER.replace("Quality", "index"))
        with pytest.raises(ValueError, match=r"test\.tsv: this split's labels are kept back, --split dev scores"):
            read_tasks(folder, "test")
    (task,) = read_tasks(folder, split)
    assert task.name == "msr_paraphrase"
    assert {name: len(rows) for name, rows in task.rows.items()} == {"train": 30, split: 7}
    row = task.rows[split][6]
    assert (task.texts[row], task.seconds[row], task.labels[row]) == ('"one" said 6', 'Said 6 "one', "0")
    assert task.all_texts == [*task.texts, *task.seconds]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1\t2\t3\tone\n", "5 columns with tabs are needed, as in the header, got 4"),
        ("2\t2\t3\tone\ttwo\n", "the quality must be 0 or 1, got '2'"),
        ("1\t2\t3\tone\t \n", "a sentence is empty"),
    ],
)
def test_a_malformed_pair_is_named(tmp_path, line, message):
    write_pairs(tmp_path / "train.tsv", 30, extra=line)
    write_pairs(tmp_path / "test.tsv", 10)
    with pytest.raises(ValueError, match=rf"train\.tsv:32: {message}"):
        read_tasks(tmp_path, "test")
    with pytest.warns(UserWarning, match=message):
        (task,) = read_tasks(tmp_path, "test", "skip")
    assert (len(task.seconds), task.num_left_out) == (40, 1)


def test_another_header_is_named(tmp_path):
    for name in ("train.tsv", "test.tsv"):
        write_pairs(tmp_path / name, 30, header="sentence\tlabel", mark="")
    with pytest.raises(ValueError, match=r"\.tsv: a \.tsv must begin with the header 'Quality.*got 'sentence"):
        read_tasks(tmp_path, "test")


def test_pairs_and_texts_are_not_mixed(tmp_path):
    write_pairs(tmp_path / "train.txt", 30)
    (tmp_path / "test.txt").write_text("1 a text\n")
    with pytest.raises(ValueError, match="all must be of pairs or of texts"):
        read_tasks(tmp_path, "test")


def test_empty_texts_are_left_out_where_that_is_asked_for(labelled_folder):
    before = {task.name: task for task in read_tasks(labelled_folder, "test")}
    with (labelled_folder / "whole.all").open("a") as file:
        file.write("0 \n" * 5)
    with pytest.raises(ValueError, match=r"whole\.all:41: a line must be a label, a space and a text"):
        read_tasks(labelled_folder, "test")
    with pytest.warns(UserWarning, match=r"whole\.all:4[123]: .*: left out") as told:
        after = {task.name: task for task in read_tasks(labelled_folder, "test", "skip")}
    assert len(told) == 3
    assert "further ones are counted alone" in str(told[-1].message)
    assert [(task.name, task.num_left_out) for task in after.values()] == [("split", 0), ("three", 0), ("whole", 5)]
    assert after["whole"].texts == before["whole"].texts
