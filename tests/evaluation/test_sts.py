"""Text similarity: which files are read and which refused, and scores against scipy and known figures."""

import csv

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
from sklearn.metrics.pairwise import paired_cosine_distances

from bivec import Encoder
from bivec.evaluation.bad_rows import BadRows
from bivec.evaluation.baselines import tfidf
from bivec.evaluation.sts import Pairs, SimilarityTask, cosines, read_tasks, score
from bivec.evaluation.sts import read_pairs as read_pairs_counting


def read_pairs(path, on_error="fail"):
    return read_pairs_counting(path, BadRows(on_error))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", 'one,"two, too",3.5\nthree,four,0\n'),
        ("a.csv", '\ufeffone,"two, too",3.5\r\n\r\nthree,four,0\r\n'),
        ("a.csv", 'index,score,sentence2,sentence1\n7,3.5,"two, too",one\n8,0,four,three\n'),
        ("a.tsv", "one\ttwo, too\t3.5\nthree\tfour\t0\n"),
    ],
)
def test_layouts(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    pairs = read_pairs(tmp_path / name)
    assert (pairs.first, pairs.second) == (["one", "three"], ["two, too", "four"])
    assert pairs.scores.tolist() == [3.5, 0.0]


def test_quotes_are_text_in_a_tsv(tmp_path):
    (tmp_path / "a.tsv").write_text('"no" he said\tso "what\t1\n')
    assert read_pairs(tmp_path / "a.tsv").first == ['"no" he said']


@pytest.mark.parametrize(
    ("content", "line", "message"),
    [
        ("a,b,1\nc,d\n", 2, r"3 fields are needed \(sentence1, sentence2, score\), got 2"),
        ("a,b,1\n\nc,d,high\n", 3, "the score must be a number, got 'high'"),
        ("a,b,1\nc,d,nan\n", 2, "the score must be a number, got 'nan'"),
        ('a,"b\nb",1\n ,d,2\n', 3, "a sentence is empty"),
        ('a,b,1\nc,"d,2\n', 2, "unexpected end of data"),
        ("sentence1,sentence2,score,id\na,b,1\n", 2, "4 fields are needed .*, got 3"),
        ("a,b,1\n\udcff,d,1\n", 2, "invalid UTF-8: byte 0xff at position 1"),
        ("one,two,three\na,b,1\n", 1, "the score must be a number, got 'three'"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, content, line, message):
    (tmp_path / "a.csv").write_text(content, errors="surrogateescape")
    with pytest.raises(ValueError, match=rf"a\.csv:{line}: {message}"):
        read_pairs(tmp_path / "a.csv")


def test_bad_rows_are_left_out_where_that_is_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\nc,d,1\ne,\udcff,2\n f, ,3\ng,h,high\ni,j,4\n", errors="surrogateescape")
    bad_rows = BadRows("skip")
    with pytest.warns(UserWarning, match=r"a\.csv:\d: .* left out") as told:
        pairs = read_pairs_counting(tmp_path / "a.csv", bad_rows)
    assert (pairs.first, pairs.scores.tolist(), bad_rows.count) == (["c", "i"], [1.0, 4.0], 4)
    places = [str(one.message).split("a.csv:")[1][0] for one in told]
    assert places == ["1", "3", "4"]  # the first three are named
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.warns(UserWarning, match="got 2"), pytest.raises(ValueError, match="no pair stands below"):
        read_pairs(tmp_path / "a.csv", "skip")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_long_sentences_are_read(tmp_path, name):
    line = f"{'a' * 200_000},b,1\n"
    (tmp_path / name).write_text(line.replace(",", "\t") if name == "a.tsv" else line)
    limit = csv.field_size_limit(131_072)  # Python's own
    try:
        assert read_pairs(tmp_path / name).first == ["a" * 200_000]
    finally:
        csv.field_size_limit(limit)


def test_wide_characters_are_named(tmp_path):
    (tmp_path / "a.csv").write_text("a,b,1\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.csv: the file is in UTF-16, and must be in UTF-8"):
        read_pairs(tmp_path / "a.csv")


@pytest.mark.parametrize(("content", "message"), [("", "empty"), ("sentence1,sentence2,score\n", "below the header")])
def test_a_file_without_pairs_is_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_pairs(tmp_path / "a.csv")


def test_splits_by_name(similarity_folder):
    (task,) = read_tasks(similarity_folder, "dev")
    assert (task.name, len(task.pairs.scores), len(task.train.scores)) == ("small", 20, 30)
    (similarity_folder / "dev.tsv").write_text("a\tb\t1\n")
    assert [task.name for task in read_tasks(similarity_folder, "dev")] == ["pairs", "small"]
    (similarity_folder / "small_dev.tsv").write_text("a\tb\t1\n")
    with pytest.raises(ValueError, match=r"small-dev\.csv and .*small_dev\.tsv are both the dev split of small"):
        read_tasks(similarity_folder, "dev")


def test_absent_data_says_what_was_looked_for_where(similarity_folder, tmp_path):
    (similarity_folder / "small-dev.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no scored pairs in .*pairs: looked for \*-dev\.csv, \*_dev\.csv"):
        read_tasks(similarity_folder, "dev")
    with pytest.raises(FileNotFoundError, match="nowhere is no folder"):
        read_tasks(tmp_path / "nowhere", "dev")


def test_cosines_agree_with_scikit_learn():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(2, 30, 8))
    first[generator.random((30, 8)) < 0.5] = 0.0
    first[4] = 0.0
    expected = 1 - paired_cosine_distances(first, second)
    expected[4] = 0.0
    np.testing.assert_allclose(cosines(first, second), expected, atol=1e-12)
    np.testing.assert_allclose(cosines(*map(scipy.sparse.csr_matrix, (first, second))), expected, atol=1e-12)


def test_scores_are_scipys_and_random_vectors_are_at_chance():
    generator = np.random.default_rng(1)
    gold = np.round(generator.uniform(0, 5, size=400), 1)
    task = SimilarityTask("random", "test", Pairs([""] * 400, [""] * 400, gold), None)
    similarities = cosines(*generator.normal(size=(2, 400, 16)))
    spearman, pearson = score(task, "model", similarities)
    assert spearman.value == pytest.approx(scipy.stats.spearmanr(gold, similarities).statistic)
    assert pearson.value == pytest.approx(scipy.stats.pearsonr(gold, similarities).statistic)
    assert spearman.low < 0 < spearman.high
    assert abs(spearman.value) < 0.15
    assert score(task, "model", gold)[0].value == pytest.approx(1.0)


@pytest.mark.parametrize(("baseline", "known"), [("tfidf-words", 0.641), ("tfidf-characters", 0.704)])
def test_tfidf_on_the_sts_benchmark(shared_data, baseline, known):
    (task,) = read_tasks(shared_data / "stsb", "test")
    vectorizer = tfidf(baseline, [*task.train.first, *task.train.second])
    similarities = cosines(vectorizer.transform(task.pairs.first), vectorizer.transform(task.pairs.second))
    assert score(task, baseline, similarities)[0].value == pytest.approx(known, abs=0.005)


def test_causal_mean_pooling_of_stories260k_on_the_sts_benchmark(shared_data):
    (task,) = read_tasks(shared_data / "stsb", "test")
    encoder = Encoder.from_pretrained(shared_data / "stories260K" / "hf", window=(-1, 0), dtype="float32")
    first, second = encoder.encode(task.pairs.first), encoder.encode(task.pairs.second)
    assert score(task, "model", cosines(first, second))[0].value == pytest.approx(0.411, abs=0.001)
