"""Classification: the choice of C without the test split, accuracies and F1 against scikit-learn and chance."""

import numpy as np
import pytest
import scipy.sparse
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from bivec.evaluation import classification
from bivec.evaluation.classification import ClassificationTask, Outcome, classify, fixed_features, pair_features, score


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


def test_accuracy_is_scikit_learns_at_the_chosen_strength():
    task = make_task({"train": 200, "dev": 90, "test": 150}, classes=3)
    features = noisy(task, 0.6)
    outcome = classify(task, "test", lambda _: features, range(3))
    assert outcome.correct.shape == (1, 150)  # a development split leaves nothing to chance
    train, development, test = (task.rows[name] for name in ("train", "dev", "test"))

    def correct(strength, rows):
        model = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=5000, tol=1e-8))
        return model.fit(features[train], task.labels[train]).predict(features[rows]) == task.labels[rows]

    by_strength = [correct(strength, development).mean() for strength in classification.STRENGTHS]
    assert by_strength[classification.STRENGTHS.index(outcome.strengths[0])] == max(by_strength)
    assert 0.6 < outcome.correct.mean() < 1.0
    assert (outcome.correct[0] == correct(outcome.strengths[0], test)).all()
    (found,) = score(task, "test", "model", outcome)
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
    assert score(task, "dev", "model", outcome)[0].split == "dev"
    poisoned = task._replace(labels=task.labels.copy())
    poisoned.labels[task.rows["dev"]] = np.random.default_rng(4).permutation(task.labels[task.rows["dev"]])
    poisoned.labels[task.rows["test"]] = "0"
    assert classify(poisoned, "dev", lambda _: features, [0]).strengths == outcome.strengths


def test_what_no_fold_holds_is_named():
    outcome = Outcome(np.ones((1, 40), dtype=bool), [1.0] * 10)
    assert score(make_task({"train": 40}), "test", "model", outcome)[0].split == "10 folds"


@pytest.mark.parametrize("sizes", [{"train": 120, "dev": 60, "test": 90}, {"train": 120, "test": 90}, {"train": 120}])
def test_features_that_encode_the_label_are_never_wrong(sizes):
    task = make_task(sizes, classes=3)
    features = noisy(task, 0.01)
    found = classify(task, "test", lambda _: features, [0, 1])
    assert found.correct.mean() == 1.0


def test_labels_shuffled_within_training_teach_nothing():
    task = make_task({"train": 300, "dev": 99, "test": 300}, classes=3)
    features = noisy(task, 0.01)
    train = task.rows["train"]
    task.labels[train] = np.random.default_rng(5).permutation(task.labels[train])
    assert abs(classify(task, "test", lambda _: features, [0]).correct.mean() - 1 / 3) < 0.15


def test_seeds_shuffle_the_folds_that_choose():
    """With the same C the same classifier: a seed changes nothing but the folds."""
    task = make_task({"train": 150, "test": 200})
    features = noisy(task, 2.0)
    outcome = classify(task, "test", lambda _: features, range(8))
    assert outcome.correct.shape == (8, 200)
    assert len(set(outcome.strengths)) > 1
    answers = {}
    for strength, correct in zip(outcome.strengths, outcome.correct, strict=True):
        assert answers.setdefault(strength, correct.tolist()) == correct.tolist()


def pairs_task(sizes: dict[str, int], seed: int = 0) -> ClassificationTask:
    task = make_task(sizes, seed=seed)
    return task._replace(seconds=[""] * len(task.texts))


def test_f1_of_pairs_is_scikit_learns():
    task = pairs_task({"train": 200, "test": 150})
    test = task.rows["test"]
    gold = task.labels[test]
    answers = [np.random.default_rng(seed).permutation(gold) for seed in (1, 2)]
    accuracy, f1 = score(task, "test", "model", Outcome(np.stack([each == gold for each in answers]), [1.0, 1.0]))
    assert accuracy.value == pytest.approx(np.mean([accuracy_score(gold, each) for each in answers]))
    # of all seeds' answers together
    assert f1.value == pytest.approx(f1_score(np.tile(gold, 2), np.concatenate(answers), pos_label="1"))
    assert (f1.metric, f1.n, list(f1.items)) == ("f1", 150, ["over", "under"])
    right = Outcome(np.ones((1, 150), dtype=bool), [1.0])
    assert [found.value for found in score(task, "test", "model", right)] == [1.0, 1.0]
    assert [found.metric for found in score(make_task({"train": 20, "test": 150}), "test", "model", right)] == [
        "accuracy"
    ]


def test_pair_features_are_sentevals():
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(12, 5)) * (generator.random((12, 5)) < 0.6)
    first, second = vectors[:6], vectors[6:]
    expected = np.hstack([np.abs(first - second), first * second])
    np.testing.assert_array_equal(pair_features(vectors), expected)
    np.testing.assert_array_equal(pair_features(scipy.sparse.csr_matrix(vectors)).toarray(), expected)


def test_pairs_of_equal_vectors_are_told_from_others():
    """By |u - v| alone: a classifier of u and v side by side would be at chance."""
    task = pairs_task({"train": 400, "test": 200})
    generator = np.random.default_rng(3)
    first, second = generator.normal(size=(2, 600, 6))
    second[task.labels == "1"] = first[task.labels == "1"]
    vectors = np.concatenate([first, second])
    features = fixed_features(task, vectors)
    assert classify(task, "test", features, [0]).correct.mean() > 0.97
    side_by_side = classify(task, "test", lambda _: np.hstack([first, second]), [0])
    assert abs(side_by_side.correct.mean() - 0.5) < 0.1
