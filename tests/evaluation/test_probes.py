"""Probes beside scikit-learn's, and what they must not do: learn from noise, from each other, or from test rows."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from bivec.evaluation.probes import DEVELOPMENT, TEST, TRAIN, UNUSED, Probes, ProbeSettings, Problem, train_and_predict
from bivec.evaluation.probes import _Batches as Batches
from bivec.evaluation.probes import _Best as Best

N = 1200
FAST = ProbeSettings(batch_size=64, epochs=8, learning_rate=1e-2)


@pytest.fixture
def states():
    """Standard normal `(N, 16)`, far from zero and of very different scales."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(N, 16, generator=generator) * torch.logspace(-2, 2, 16) + 30


@pytest.fixture
def roles():
    roles = torch.full((1, N), TRAIN, dtype=torch.int8)
    roles[:, 800:900], roles[:, 900:] = DEVELOPMENT, TEST
    return roles


def labels_of(states, num_classes=3):
    """Classes by a linear rule on standardised states."""
    rule = torch.randn(states.shape[1], num_classes, generator=torch.Generator().manual_seed(1))
    return (((states - states.mean(dim=0)) / states.std(dim=0)) @ rule).argmax(dim=1)


def accuracy(predicted, labels, roles):
    is_test = roles[0].numpy() == TEST
    return float((predicted[is_test] == labels.numpy()[is_test]).mean())


def test_a_label_that_states_hold_is_found(states, roles):
    labels = labels_of(states)
    states[:, 2:5] = 7 * torch.nn.functional.one_hot(labels)
    (predicted,) = train_and_predict(states, Problem(labels[None], roles, 3), ProbeSettings((), 64, 40, 2e-2), seed=0)
    assert accuracy(predicted, labels, roles) == 1


def test_noise_and_shuffled_labels_give_chance(states, roles):
    labels = labels_of(states, 2)
    noise = torch.randint(2, (N,), generator=torch.Generator().manual_seed(2))
    shuffled = labels.clone()
    shuffled[:800] = labels[torch.randperm(800, generator=torch.Generator().manual_seed(3))]
    problem = Problem(torch.stack([labels, noise, shuffled]), roles.expand(3, -1), 2)
    predicted = train_and_predict(states, problem, FAST, seed=0)
    assert accuracy(predicted[0], labels, roles) > 0.9
    assert accuracy(predicted[1], noise, roles) == pytest.approx(0.5, abs=0.1)  # 300 rows
    assert accuracy(predicted[2], labels, roles) == pytest.approx(0.5, abs=0.15)


def test_a_linear_probe_is_nearly_scikit_learns(states, roles):
    labels = labels_of(states)
    noisy = torch.where(torch.rand(N, generator=torch.Generator().manual_seed(4)) < 0.2, 0, labels)
    settings = ProbeSettings(batch_size=64, epochs=40, learning_rate=1e-2, weight_decay=0.0, keeps_best=False)
    (predicted,) = train_and_predict(states, Problem(noisy[None], roles, 3), settings, seed=0)
    standardised = ((states - states[:800].mean(dim=0)) / states[:800].std(dim=0)).numpy()
    theirs = LogisticRegression(C=1e4, max_iter=2000).fit(standardised[:800], noisy[:800]).predict(standardised[900:])
    assert (predicted[900:] == theirs).mean() > 0.96
    assert accuracy(predicted, noisy, roles) == pytest.approx((theirs == noisy[900:].numpy()).mean(), abs=0.02)


def test_a_regression_is_nearly_scikit_learns(states, roles):
    rule = torch.randn(16, generator=torch.Generator().manual_seed(5))
    values = 100 + 5 * ((states - 30) / torch.logspace(-2, 2, 16)) @ rule + torch.randn(N)
    settings = ProbeSettings(batch_size=64, epochs=40, learning_rate=1e-2, weight_decay=0.0, keeps_best=False)
    (predicted,) = train_and_predict(states, Problem(values[None], roles, 0), settings, seed=0)
    standardised = ((states - states[:800].mean(dim=0)) / states[:800].std(dim=0)).numpy()
    theirs = Ridge(1e-3).fit(standardised[:800], values[:800]).predict(standardised[900:])
    np.testing.assert_allclose(predicted[900:], theirs, atol=0.05 * float(values.std()))
    assert np.isnan(predicted[:900]).all()


def test_a_perceptron_learns_what_no_line_divides(roles):
    states = torch.randn(N, 2, generator=torch.Generator().manual_seed(6))
    labels = (states[:, 0] * states[:, 1] > 0).long()
    problem = Problem(labels[None], roles, 2)
    linear, perceptron = (
        train_and_predict(states, problem, ProbeSettings(hidden, 64, 40, 1e-2), seed=0)[0] for hidden in ((), (20, 10))
    )
    assert accuracy(linear, labels, roles) < 0.7
    assert accuracy(perceptron, labels, roles) > 0.93


@pytest.mark.parametrize("hidden", [(), (8,)])
def test_probes_together_are_each_alone(states, roles, hidden):
    settings = ProbeSettings(hidden, 64, 4, 1e-2, max_grad_norm=0.5)
    targets = torch.stack([labels_of(states), labels_of(-states)])
    together = train_and_predict(states, Problem(targets, roles.expand(2, -1), 3), settings, seed=3)
    for place in range(2):
        (alone,) = train_and_predict(states, Problem(targets[place : place + 1], roles, 3), settings, seed=3)
        assert (together[place] == alone).mean() > 0.995


@pytest.mark.parametrize("num_classes", [3, 0])
def test_other_rows_change_no_prediction(states, roles, num_classes):
    """Neither the targets of test rows and unused ones do, nor the states of unused ones."""
    roles[:, :50] = UNUSED
    targets = labels_of(states)[None] if num_classes else states[None, :, 0].clone()
    before = train_and_predict(states, Problem(targets, roles, num_classes), FAST, seed=0)
    targets = targets.clone()
    targets[(roles == TEST) | (roles == UNUSED)] = -7 if num_classes else torch.nan
    states[:50] = 1e6
    np.testing.assert_array_equal(before, train_and_predict(states, Problem(targets, roles, num_classes), FAST, seed=0))


def test_each_probe_keeps_its_own_best_epoch():
    probes = Probes([2, 3], torch.zeros(3, 2), torch.ones(3, 2), [0, 0, 0], torch.Generator())
    best = Best(probes)
    for epoch, losses in enumerate([[3.0, 1.0, torch.nan], [2.0, 2.0, torch.nan], [2.5, 3.0, torch.nan]]):
        with torch.no_grad():
            for parameter in probes.parameters():
                parameter.fill_(epoch)
        best.judge(torch.tensor(losses))
    best.restore()
    for parameter in probes.parameters():
        assert [probe.unique().tolist() for probe in parameter] == [[1], [0], [2]]


def test_development_rows_choose_the_epoch(states, roles):
    """Labels that are shuffled in training are learned by heart in the end, which development rows tell."""
    labels = labels_of(states, 2)
    labels[:60] = labels[torch.randperm(60, generator=torch.Generator().manual_seed(8))]
    roles[:, 60:800] = UNUSED
    problem = Problem(labels[None], roles, 2)
    found = {}
    for keeps_best in (True, False):
        settings = ProbeSettings((64,), 20, 60, 1e-2, keeps_best=keeps_best)
        found[keeps_best] = train_and_predict(states, problem, settings, seed=0)[0]
    assert (found[True] != found[False]).mean() > 0.02


def test_training_ends_at_the_last_step(states, roles, monkeypatch):
    rates = []
    step = torch.optim.AdamW.step

    def noting(self, *given, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *given, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", noting)
    settings = ProbeSettings(batch_size=100, epochs=10, learning_rate=1.0, last_step=20)
    train_and_predict(states, Problem(labels_of(states)[None], roles, 3), settings, seed=0)
    np.testing.assert_allclose(rates, 1 - np.arange(20) / 80)  # 8 steps an epoch


def test_dropout_at_test_is_asked_for(states, roles):
    problem = Problem(labels_of(states)[None], roles, 3)
    states = (states - states.mean(dim=0)) / states.std(dim=0)
    settings = {"batch_size": 64, "epochs": 8, "learning_rate": 1e-2, "dropout": 0.5, "standardize": False}
    without, dropped = (
        accuracy(
            train_and_predict(states, problem, ProbeSettings(**settings, drops_at_test=drops), 0)[0],
            problem.targets[0],
            roles,
        )
        for drops in (False, True)
    )
    assert without > 0.85
    assert dropped < without - 0.1
    with pytest.raises(ValueError, match="dropout is of inputs that are not standardised"):
        ProbeSettings(dropout=0.1)


def test_groups_stand_in_a_batch_together():
    groups = np.array([5, 5, 2, 9, 9, 9, 2, 7])
    is_wanted = torch.tensor([1, 1, 1, 1, 0, 1, 1, 1]).bool()
    batches = Batches(is_wanted, groups, 2)
    assert len(batches) == 2
    found = list(batches.shuffled(torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(found).tolist()) == [0, 1, 2, 3, 5, 6, 7]
    owners = [set(groups[rows]) for rows in found]
    assert [len(its) for its in owners] == [2, 2]
    assert not owners[0] & owners[1]


def test_a_probe_without_training_rows_is_refused(states, roles):
    with pytest.raises(ValueError, match="each probe needs a training row"):
        train_and_predict(states, Problem(labels_of(states)[None], torch.full_like(roles, TEST), 3), FAST, seed=0)
