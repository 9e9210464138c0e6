"""Which rows a probe learns from and which it is tested on: folds without a word type in common, and random splits.

Shapes: N items, F folds, P probes.
"""

import numpy as np

from .probes import DEVELOPMENT, TEST, TRAIN, UNUSED

SHUFFLED = "shuffled labels"  # the control that is called so
FOLDS = 5
PARTS_A_FOLD = 2  # so that the development rows are half as many as the test rows: 70 : 10 : 20


def grouped_folds(groups: np.ndarray, strata: np.ndarray, seed: int) -> np.ndarray:
    """Folds in which each item is tested once, and no group is in two of train, development and test.

    Args:
        groups: `(N,)` of any values: an item's word type.
        strata: int64 `(N,)` from 0 on, as classes: of each, every fold has about the same share.
    Returns:
        int8 `(F, N)` roles.
    Raises:
        ValueError: there are fewer groups than parts.
    """
    num_parts = FOLDS * PARTS_A_FOLD
    part = _grouped_parts(groups, strata, num_parts, seed)
    roles = np.full((FOLDS, len(groups)), TRAIN, dtype=np.int8)
    for fold in range(FOLDS):
        first = fold * PARTS_A_FOLD
        roles[fold, (part >= first) & (part < first + PARTS_A_FOLD)] = TEST
        roles[fold, part == (first + PARTS_A_FOLD) % num_parts] = DEVELOPMENT
    return roles


def random_split(num_items: int, seed: int = 42) -> np.ndarray:
    """One random split, int8 roles `(1, N)`: a fifth, rounded up, is tested; no development rows.

    The same rows as scikit-learn's `train_test_split(test_size=0.2, random_state=seed)` chooses.
    """
    roles = np.full((1, num_items), TRAIN, dtype=np.int8)
    # the legacy generator, whose permutations that function takes
    roles[0, np.random.RandomState(seed).permutation(num_items)[: -(-num_items // 5)]] = TEST
    return roles


def without(roles: np.ndarray, is_left_out: np.ndarray) -> np.ndarray:
    """Roles `(F, N)` in which some items `(N,)` are not used."""
    return np.where(is_left_out, np.int8(UNUSED), roles)


def shuffled(targets: np.ndarray, roles: np.ndarray, seed: int) -> np.ndarray:
    """Targets `(P, N)` of which each probe's are permuted among the rows that it learns from or is judged on."""
    generator = np.random.default_rng(seed)
    targets = targets.copy()
    for its_targets, its_roles in zip(targets, roles, strict=True):
        rows = np.flatnonzero((its_roles == TRAIN) | (its_roles == DEVELOPMENT))
        its_targets[rows] = its_targets[generator.permutation(rows)]
    return targets


def _grouped_parts(groups: np.ndarray, strata: np.ndarray, num_parts: int, seed: int) -> np.ndarray:
    """Each item's part, `(N,)`: large groups first, each goes where its strata are rarest."""
    names, owner = np.unique(groups, return_inverse=True)
    if len(names) < num_parts:
        raise ValueError(f"{FOLDS} folds by word type need {num_parts} word types, got {len(names)}")
    counts = np.zeros((len(names), int(strata.max()) + 1))
    np.add.at(counts, (owner, strata), 1)
    order = np.random.default_rng(seed).permutation(len(names))
    # sizes within a factor of two are alike: else each seed had the same folds
    magnitude = np.floor(np.log2(counts.sum(axis=1)))
    filled = np.zeros((num_parts, counts.shape[1]))
    part_of_group = np.empty(len(names), dtype=np.int64)
    for group in order[np.argsort(-magnitude[order], kind="stable")]:
        crowding = filled @ counts[group] + 1e-6 * filled.sum(axis=1)  # the latter only where that is equal
        part_of_group[group] = crowding.argmin()
        filled[part_of_group[group]] += counts[group]
    return part_of_group[owner]
