"""Splits: no word type on both sides, each item tested once, and the published random one."""

import numpy as np
import pytest
from sklearn.model_selection import train_test_split

from bivec.evaluation.folds import grouped_folds, random_split, shuffled, without
from bivec.evaluation.probes import DEVELOPMENT, TEST, TRAIN, UNUSED


@pytest.fixture
def words():
    """600 items of 60 word types, the first ones frequent, as verbs are; and their classes."""
    generator = np.random.default_rng(0)
    types = np.concatenate([np.arange(60), (60 * generator.random(540) ** 3).astype(int)])
    return np.array([f"word{number}" for number in types]), generator.integers(2, size=600)


def test_no_word_type_is_in_two_of_train_development_and_test(words):
    types, classes = words
    roles = grouped_folds(types, classes, seed=0)
    for its_roles in roles:
        sides = [set(types[its_roles == role]) for role in (TRAIN, DEVELOPMENT, TEST)]
        assert all(sides)
        assert len(set.union(*sides)) == sum(map(len, sides)) == 60


def test_each_item_is_tested_once_and_every_fold_has_its_share_of_each_class(words):
    types, classes = words
    roles = grouped_folds(types, classes, seed=0)
    assert ((roles == TEST).sum(axis=0) == 1).all()
    for label in (0, 1):
        shares = (roles[:, classes == label] == TEST).mean(axis=1)
        # the most frequent word alone is a quarter of all
        assert shares.min() > 0.12
        assert shares.max() < 0.3


def test_folds_differ_by_seed_and_are_the_same_for_one(words):
    first, again, other = (grouped_folds(*words, seed=seed) for seed in (0, 0, 1))
    assert (first == again).all()
    assert (first == other).mean() < 0.8


def test_too_few_word_types_are_refused():
    with pytest.raises(ValueError, match="5 folds by word type need 10 word types, got 9"):
        grouped_folds(np.arange(90) % 9, np.zeros(90, dtype=int), seed=0)


@pytest.mark.parametrize("num_items", [434, 448, 3239, 4900])
def test_the_random_split_is_that_of_scikit_learn(num_items):
    train, test = train_test_split(np.arange(num_items), test_size=0.2, random_state=42)
    (roles,) = random_split(num_items)
    assert set(np.flatnonzero(roles == TEST)) == set(test)
    assert set(np.flatnonzero(roles == TRAIN)) == set(train)


def test_labels_are_shuffled_among_what_is_learned_from():
    targets = np.tile(np.arange(100), (2, 1))
    roles = np.full((2, 100), TRAIN)
    roles[:, :30] = TEST
    roles[:, 30:40] = DEVELOPMENT
    roles[1, 99] = UNUSED
    found = shuffled(targets, roles, seed=0)
    assert (found[:, :30] == targets[:, :30]).all()
    assert found[1, 99] == 99
    assert (np.sort(found) == targets).all()
    assert (found[:, 30:] != targets[:, 30:]).mean() > 0.9
    assert (targets == np.arange(100)).all()


def test_items_left_out_have_no_role():
    roles = np.array([[TRAIN, TEST, DEVELOPMENT], [TEST, TRAIN, TRAIN]], dtype=np.int8)
    found = without(roles, np.array([False, True, False]))
    assert found.tolist() == [[TRAIN, UNUSED, DEVELOPMENT], [TEST, UNUSED, TRAIN]]
    assert found.dtype == np.int8
