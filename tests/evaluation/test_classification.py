"""Classification: the files, the choice of C without the test split, accuracies against scikit-learn and chance."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bivec.evaluation import classification
from bivec.evaluation.classification import ClassificationTask, Outcome, classify, read_labelled, read_tasks, score


def make_task(sizes: dict[str, int], classes: int = 2, seed: int = 0) -> ClassificationTask:
    bounds = np.cumsum([0, *sizes.values()])
    rows = {name: np.arange(*bounds[place : place + 2]) for place, name in enumerate(sizes)}
    labels = np.random.default_rng(seed).permutation(np.arange(bounds[-1]) % classes).astype(str)
    return ClassificationTask("made", [""] * bounds[-1], labels, rows)


def noisy(task: ClassificationTask, noise: float, seed: int = 1) -> np.ndarray:
    """Features that tell the label through noise, of very different scales."""
    generator = np.random.default_rng(seed)
    clean = np.eye(10)[task.labels.astype(int)]
    return (clean + noise * generator.normal(size=clean.shape)) * 10.0 ** np.arange(-4, 6)


def test_data_sets_of_a_folder(labelled_folder):
    tasks = {task.name: task for task in read_tasks(labelled_folder, "test")}
    assert {name: {split: len(rows) for split, rows in task.rows.items()} for name, task in tasks.items()} == {
        "split": {"dev": 24, "test": 30, "train": 60},
        "three": {"test": 30, "train": 60},
        "whole": {"train": 40},
    }
    split = tasks["split"]
    expected = read_labelled(labelled_folder / "split.test")
    assert split.labels[split.rows["test"]].tolist() == expected[0]
    assert [split.texts[row] for row in split.rows["test"]] == expected[1]


def test_latin1_is_read_where_the_file_is_no_utf8(tmp_path):
    (tmp_path / "a").write_bytes("1 naïve\u0085café\r\n0 plain".encode("latin-1"))
    assert read_labelled(tmp_path / "a") == (["1", "0"], ["naïve\u0085café", "plain"])
    (tmp_path / "a").write_bytes("1 naïve 北京\n".encode())
    assert read_labelled(tmp_path / "a") == (["1"], ["naïve 北京"])


@pytest.mark.parametrize(
    ("content", "line"), [("0 a\nword\n", 2), ("0 a\n\n1 b\n", 2), ("0 a\n1  \n", 2), (" text\n", 1), ("", 1)]
)
def test_a_malformed_line_is_named(tmp_path, content, line):
    (tmp_path / "a.train").write_text(content)
    with pytest.raises(ValueError, match=rf"a\.train:{line}: a line must be a label, a space and a text"):
        read_labelled(tmp_path / "a.train")


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
        read_labelled(tmp_path / "a")


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


def test_accuracy_is_scikit_learns_at_the_chosen_strength():
    task = make_task({"train": 200, "dev": 90, "test": 150}, classes=3)
    features = noisy(task, 0.6)
    outcome = classify(task, "test", lambda _: features, range(3))
    assert outcome.correct.shape == (1, 150)  # a development split leaves nothing to chance
    train, development, test = (task.rows[name] for name in ("train", "dev", "test"))

    def correct(strength, rows):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=2000))
        return model.fit(features[train], task.labels[train]).predict(features[rows]) == task.labels[rows]

    by_strength = [correct(strength, development).mean() for strength in classification.STRENGTHS]
    assert by_strength[classification.STRENGTHS.index(outcome.strengths[0])] == max(by_strength)
    assert 0.6 < outcome.correct.mean() < 1.0
    assert (outcome.correct[0] == correct(outcome.strengths[0], test)).mean() > 0.99
    found = score(task, "test", "model", outcome)
    assert found.value == pytest.approx(outcome.correct.mean())
    assert found.low < found.value < found.high


@pytest.mark.parametrize("sizes", [{"train": 300, "test": 300}, {"train": 300}, {"train": 300, "dev": 99, "test": 300}])
def test_random_features_are_at_chance(sizes):
    task = make_task(sizes, classes=3)
    features = np.random.default_rng(2).normal(size=(len(task.texts), 12))
    outcome = classify(task, "test", lambda _: features, [0])
    assert abs(outcome.correct.mean() - 1 / 3) < 0.1


def test_the_test_split_chooses_nothing():
    task = make_task({"train": 120, "dev": 60, "test": 60})
    features = noisy(task, 1.0)
    poisoned = task._replace(labels=task.labels.copy())
    poisoned.labels[task.rows["test"]] = "0"
    changed = features.copy()
    changed[task.rows["test"]] = 1e3
    plain = classify(task, "test", lambda _: features, [0])
    assert classify(poisoned, "test", lambda _: features, [0]).strengths == plain.strengths
    other = classify(task, "test", lambda _: changed, [0])
    assert other.strengths == plain.strengths
    assert (other.correct != plain.correct).any()


def test_a_held_out_text_is_never_fitted_on():
    """Features that are a text's own number could only help a classifier that has seen it."""
    task = make_task({"train": 100})
    seen = []

    def features(rows):
        seen.append(set(rows.tolist()))
        return np.eye(100)

    outcome = classify(task, "test", features, [0, 1])
    assert outcome.correct.shape == (2, 100)
    assert abs(outcome.correct.mean() - 0.5) < 0.2
    folds = [set(range(100)) - fitted for fitted in seen]
    assert [len(fold) for fold in folds] == [10] * 20
    assert set().union(*folds[:10]) == set().union(*folds[10:]) == set(range(100))
    assert folds[:10] != folds[10:]  # each seed shuffles anew


def test_the_development_split_does_not_choose_when_it_is_scored():
    task = make_task({"train": 120, "dev": 60, "test": 60})
    features = noisy(task, 1.0)
    outcome = classify(task, "dev", lambda _: features, [0])
    assert outcome.correct.shape == (1, 60)
    assert outcome.correct.mean() > 0.55
    assert score(task, "dev", "model", outcome).split == "dev"
    poisoned = task._replace(labels=task.labels.copy())
    poisoned.labels[task.rows["dev"]] = np.random.default_rng(4).permutation(task.labels[task.rows["dev"]])
    poisoned.labels[task.rows["test"]] = "0"
    assert classify(poisoned, "dev", lambda _: features, [0]).strengths == outcome.strengths


def test_what_no_fold_holds_is_named():
    outcome = Outcome(np.ones((1, 40), dtype=bool), [1.0] * 10)
    assert score(make_task({"train": 40}), "test", "model", outcome).split == "10 folds"
