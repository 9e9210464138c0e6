"""The lexical-semantic probing tasks of Feng et al. (arXiv 2510.01652) on a word's frozen states.

What a word's state tells is what a probe that has never seen the word reads in it. Protocol `bivec`:

- Five folds in which no word type is in two of train, development and test. Every item is tested once, intervals are
  over word types. Each seed has folds and first weights of its own. The published split lets telicity, concreteness and
  the norms be answered by recognising the word, and tests 18 to 20 word types a context probe.
- Controls: `shuffled labels`, permuted among the rows that a probe learns from (last layer and first seed only); `word
  alone`, the same word as a text of its own; `majority`, the training rows' most frequent class.

Chance is what `majority` says, most often a little below one half: what is frequent in a test fold is rare outside it.
For the same reason the correlation of a probe that knows nothing were negative over all folds, each of which predicts
the mean of the others: so predictions count from the mean of the ratings that the probe learned from.

Protocol `feng2025` is the published one: the released split of the context probes, else a random fifth of all rows is
tested (seed 42; several seeds are several first weights), no development rows, perceptrons with the published sizes,
batches and rates on states as they are. Not published, and so chosen here: the epochs, after which the loss falls no
further; AdamW without weight decay and a rate that falls to zero; the linear probes, which are those of `bivec`.

Shapes: N items, D dimensions of the target, S seeds, F folds, P probes.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ..engine.encoder import Encoder
from .folds import FOLDS, SHUFFLED, grouped_folds, random_split, shuffled, without
from .probes import TEST, TRAIN, Kind, ProbeSettings, Problem, train_and_predict
from .report import Score, fingerprint, statistic_of
from .semantic_files import DIMENSIONS, SemanticTask, read_tasks
from .states import ReadOut, Words, chosen_layers, word_states
from .statistics import Statistic, bootstrap, correlation
from .units import Scored, Unit

if TYPE_CHECKING:
    from .tasks import EvaluateSettings

_SMALL, _LARGE = (20, 10), (40, 20)  # hidden layers, of the paper
_PROBES: dict[str, ProbeSettings] = {
    "context": ProbeSettings(_SMALL, batch_size=512, epochs=4, learning_rate=1e-2),
    "aspect": ProbeSettings(_SMALL, batch_size=256, epochs=10, learning_rate=3e-3),
    "concreteness": ProbeSettings(_LARGE, batch_size=64, epochs=20, learning_rate=3e-3),
    "norms": ProbeSettings(_LARGE, batch_size=128, epochs=10, learning_rate=1e-2),
}
_REACH = 0.2  # how far a weight must be able to move, else few rows give too few steps
_published = partial(ProbeSettings, weight_decay=0.0, standardize=False, keeps_best=False)
_PUBLISHED_PROBES: dict[str, ProbeSettings] = {
    "context": _published(_SMALL, batch_size=16, epochs=30, learning_rate=2e-5),
    "aspect": _published(_SMALL, batch_size=16, epochs=30, learning_rate=2e-5),
    "concreteness": _published(_LARGE, batch_size=8, epochs=20, learning_rate=2e-3),
    "norms": _published(_LARGE, batch_size=16, epochs=20, learning_rate=2e-3),
}


class Plan(NamedTuple):
    """What is trained and tested.

    Attributes:
        roles: int8 `(S, F, N)`.
        split: what it is called.
        probes: each kind of probe.
        seed: of the first weights, from which each of the S seeds draws its own.
    """

    roles: np.ndarray
    split: str
    probes: dict[Kind, ProbeSettings]
    seed: int


def read_units(settings: "EvaluateSettings", *, needed: bool = True) -> list[Unit]:
    """A unit a task; raises as `semantic_files.read_tasks`, and ValueError where there are too few word types."""
    units = []
    for task in read_tasks(Path(settings.data), settings.on_error, needed=needed):
        try:
            plan = planned(task, settings.protocol, settings.seeds)
        except ValueError as error:
            raise ValueError(f"{task.name}: {error}") from error
        used = fingerprint(task.texts, np.array(task.spans).ravel(), task.types, task.targets.ravel())
        units.append(Unit(task.name, used, partial(_score, task, plan, settings)))
    return units


def planned(task: SemanticTask, protocol: str, num_seeds: int) -> Plan:
    """Folds and probes of a task.

    Raises:
        ValueError: the protocol is another task's, or there are too few word types.
    """
    if protocol == "bivec":
        # of the classes of both released files, every fold has its share
        strata = task.targets[0] * (task.num_classes > 0)
        if task.is_test is not None:
            strata = strata + task.num_classes * task.is_test
        strata = strata.astype(np.int64)
        roles = np.stack([grouped_folds(task.types, strata, seed) for seed in range(num_seeds)])
        split, probes, seed = f"{FOLDS} folds by word type", _PROBES[task.kind], 0
    elif protocol == "feng2025":
        if task.is_test is None:
            one, split = random_split(len(task.texts)), "random fifth"
        else:
            one, split = np.where(task.is_test, TEST, TRAIN).astype(np.int8)[None], "test"
        roles = np.repeat(one[None], num_seeds, axis=0)
        probes, seed = _PUBLISHED_PROBES[task.kind], 42
    else:
        raise ValueError(f"the protocol must be bivec or feng2025, got {protocol}")
    linear = replace(_PROBES[task.kind], hidden=())
    num_items = len(task.texts)
    return Plan(roles, split, {"linear": long_enough(linear, num_items), "mlp": long_enough(probes, num_items)}, seed)


def long_enough(settings: ProbeSettings, num_items: int) -> ProbeSettings:
    """More epochs where few rows would make too few steps."""
    if not settings.standardize:
        return settings
    steps_an_epoch = math.ceil(num_items / settings.batch_size)
    num_steps = 2 * _REACH / settings.learning_rate  # a step of Adam is as long as the rate, which falls to zero
    return replace(settings, epochs=max(settings.epochs, math.ceil(num_steps / steps_an_epoch)))


def _score(task: SemanticTask, plan: Plan, settings: "EvaluateSettings", encoder: Encoder) -> Scored:
    layers, read_outs = chosen_layers(encoder, settings.layers), settings.read_outs
    if settings.protocol == "feng2025":
        layers = layers[-1:] if settings.layers == "last" else layers
        read_outs = ("token",) if settings.read_out is None else read_outs
    words = Words(task.texts, task.spans)
    in_context = word_states(encoder, words, layers, settings.sub_tokens, progress=f"{task.name}: texts")
    forms = [text[slice(*span)] for text, spans in zip(task.texts, task.spans, strict=True) for span in spans]
    vocabulary, row_of = np.unique(forms, return_inverse=True)
    alone = word_states(encoder, Words.of_sentences([[str(form)] for form in vocabulary]), layers, settings.sub_tokens)

    num_places = len(task.spans[0])
    is_unread = ~in_context.is_read.reshape(-1, num_places)
    names = [f"{task.name} position {place + 1}" if num_places > 1 else task.name for place in range(num_places)]
    for place, dataset in enumerate(names):
        if is_unread[:, place].all():
            raise ValueError(f"{dataset}: every word is cut off or has no token; --max-length must reach it")
    scores: list[Score] = []
    for place, dataset in enumerate(names):
        rows = np.arange(place, len(forms), num_places)
        probing = Probing(task, plan._replace(roles=without(plan.roles, is_unread[:, place])), dataset)
        for layer in layers:
            for read_out in read_outs:
                systems = ("model", SHUFFLED) if layer == layers[-1] else ("model",)
                probing.read(systems, in_context.vectors(layer, read_out)[rows], layer, read_out)
            probing.read(("word alone",), alone.vectors(layer, "token")[row_of[rows]], layer, "token")
        scores += probing.scores()
    counts = task.counts | {"words that are cut off or have no token": int(is_unread.sum())}
    return Scored(scores, notes=[f"{task.name}: {number:,} {what}" for what, number in counts.items() if number])


class Probing:
    """What probes find of a task in states, which are read one after the other; then all figures.

    Args:
        dataset: what the figures are called.
    """

    def __init__(self, task: SemanticTask, plan: Plan, dataset: str):
        self._task, self._plan, self._dataset = task, plan, dataset
        num_seeds, num_folds, num_items = plan.roles.shape
        self._shape = (num_seeds, len(task.targets), num_folds)
        # probes stand in the order of seeds, dimensions, folds
        self._roles = np.broadcast_to(plan.roles[:, None], (*self._shape, num_items)).reshape(-1, num_items)
        self._targets = np.broadcast_to(task.targets[:, None], (*self._shape, num_items)).reshape(-1, num_items)
        self._draws = np.indices(self._shape)[0].ravel()
        self._is_scored = (plan.roles[0] == TEST).any(axis=0)
        _, self._type_of = np.unique(task.types[self._is_scored], return_inverse=True)
        self._figures: list[Score] = self._majority() if task.num_classes else []

    def read(self, systems: Sequence[str], states: torch.Tensor, layer: int, read_out: ReadOut) -> None:
        """Train and test all probes on states `(N, E)`.

        Args:
            systems: what the figures are of; a second one is probes of shuffled labels, in the first seed's folds.
        """
        again = slice(self._shape[1] * self._shape[2] if len(systems) > 1 else 0)
        roles = np.concatenate([self._roles, self._roles[again]])
        targets = np.concatenate([self._targets, shuffled(self._targets[again], self._roles[again], self._plan.seed)])
        draws = [*self._draws, *self._draws[again]]
        problem = Problem(torch.from_numpy(targets), torch.from_numpy(roles), self._task.num_classes, draws=draws)
        for probe, settings in self._plan.probes.items():
            name = f"{self._dataset}: {systems[0]}, {probe}, {read_out}, layer {layer}"
            found = train_and_predict(states, problem, settings, self._plan.seed, progress=name)
            predicted = self._of_all_folds(found, targets, roles)
            num_seeds = self._shape[0]
            for system, its_predicted in zip(systems, (predicted[:num_seeds], predicted[num_seeds:]), strict=False):
                self._add(system, its_predicted, layer=layer, read_out=read_out, probe=probe)

    def answer(self, system: str, found: np.ndarray, **what: Any) -> None:
        """Add the figure of classes `(P, N)` that no probe has given."""
        self._add(system, self._of_all_folds(found, self._targets, self._roles), **what)

    def scores(self) -> list[Score]:
        """All figures with their intervals, those of as many items on the same resamples, which are drawn once."""
        statistics: dict[int, dict[int, Statistic]] = {}
        for place, score in enumerate(self._figures):
            found = statistic_of(score.metric, score.items)
            assert found is not None
            statistics.setdefault(found.num_items, {})[place] = found.statistic
        for num_items, its_statistics in statistics.items():
            for place, drawn in zip(its_statistics, bootstrap([*its_statistics.values()], num_items), strict=True):
                self._figures[place] = replace(self._figures[place], **drawn.estimate()._asdict())
        # the norms' are many numbers, which nobody compares but the model's
        is_kept = [score.system == "model" or len(self._task.targets) == 1 for score in self._figures]
        return [score if kept else replace(score, items={}) for score, kept in zip(self._figures, is_kept, strict=True)]

    def _of_all_folds(self, predicted: np.ndarray, targets: np.ndarray, roles: np.ndarray) -> np.ndarray:
        """`(S, D, n)` of the n items that are tested: classes, or how far above the mean that was learned from."""
        if not self._task.num_classes:
            is_train = roles == TRAIN
            predicted = predicted - ((targets * is_train).sum(axis=1) / is_train.sum(axis=1))[:, None]
        by_fold = np.where(roles == TEST, predicted, 0)[:, self._is_scored]
        return by_fold.reshape(-1, *self._shape[1:], by_fold.shape[1]).sum(axis=2)  # each is tested in one fold

    def _add(self, system: str, predicted: np.ndarray, **what: Any) -> None:
        """Figures of predictions `(S, D, n)`."""
        gold = self._task.targets[:, self._is_scored]
        if self._task.num_classes:
            correct = (predicted == gold).mean(axis=1)
            items = {"over": np.bincount(self._type_of, correct.mean(axis=0)), "under": np.bincount(self._type_of)}
            self._figure(system, "accuracy", items, {"accuracy of each seed": correct.mean(axis=1).tolist()}, **what)
            return
        suffixes = [f" {name}" for name in DIMENSIONS] if len(gold) > 1 else [""]
        items = {f"gold{suffix}": values for suffix, values in zip(suffixes, gold, strict=True)}
        for seed, its_predicted in enumerate(predicted):
            for suffix, values in zip(suffixes, its_predicted, strict=True):
                items[f"predicted {seed}{suffix}"] = values.round(4)
        items["cluster"] = self._type_of
        for metric in ("pearson", "spearman"):
            of_each = np.array([[_plain(metric, *pair) for pair in zip(gold, one, strict=True)] for one in predicted])
            details = {f"{metric} of each seed": of_each.mean(axis=1).tolist()}
            if len(gold) > 1:
                details[f"{metric} of each dimension"] = dict(
                    zip(DIMENSIONS, of_each.mean(axis=0).tolist(), strict=True)
                )
            self._figure(system, metric, items, details, **what)

    def _figure(
        self, system: str, metric: str, items: dict[str, np.ndarray], details: dict[str, Any], **what: Any
    ) -> None:
        """One without its value, which follows from the items."""
        plain = {name: column.tolist() for name, column in items.items()}
        n, num_types = int(self._is_scored.sum()), int(self._type_of.max()) + 1
        score = Score(self._dataset, self._plan.split, system, metric, np.nan, n=n, items=plain, **what)
        self._figures.append(replace(score, details={"word types": num_types} | details))

    def _majority(self) -> list[Score]:
        """Whether each item is of the class that most training rows of its fold have."""
        num_classes, is_train = self._task.num_classes, self._roles == TRAIN
        counts = [(is_train & (self._targets == label)).sum(axis=1) for label in range(num_classes)]
        answers = np.broadcast_to(np.argmax(counts, axis=0)[:, None], self._roles.shape)
        self._figures = []
        self._add("majority", self._of_all_folds(answers, self._targets, self._roles))
        return self._figures


def _plain(metric: str, gold: np.ndarray, predicted: np.ndarray) -> float:
    return float(correlation(metric, gold, predicted)(np.ones((1, len(gold))))[0])
