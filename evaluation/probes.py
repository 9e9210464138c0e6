"""Probes: linear classifiers, regressions and small perceptrons on frozen states, trained with torch on mini-batches.

Many probes of the same states (folds of a cross-validation, true and shuffled labels) train together: they share a
batch, in which a row that a probe must not see has weight 0, and one matrix product reads the states for all.

States are standardised by the mean and deviation of a probe's own training rows. AdamW's learning rate falls linearly
to zero over `epochs`. After each epoch a probe is judged on its development rows, and its best epoch is kept: the test
rows choose nothing.

Shapes: N rows, P probes, E features, C outputs (classes, or 1 for a regression).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

TRAIN, DEVELOPMENT, TEST, UNUSED = range(4)  # what a row is to a probe
_ROWS_AT_ONCE = 4096  # that are judged together

Kind = Literal["linear", "mlp"]


@dataclass(frozen=True)
class ProbeSettings:
    """How probes are trained.

    Attributes:
        hidden: sizes of the hidden layers, with ReLU between; none is a linear probe.
        batch_size: rows a step; groups, where groups are given.
        epochs: over which the learning rate falls to zero.
        last_step: training ends there, if that is earlier, with the learning rate that it has then.
        max_grad_norm: to which a probe's longer gradients are scaled down.
        dropout: of the inputs, which are then not standardised.
        drops_at_test: the same when predictions are made (as LLM2Vec's published code does, by mistake).
        standardize: whether inputs are standardised.
        keeps_best: whether the best epoch on the development rows is kept; else the last.
        dtype: of the probe's weights, its inputs and AdamW's moments.
    """

    hidden: tuple[int, ...] = ()
    batch_size: int = 256
    epochs: int = 10
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    last_step: int | None = None
    max_grad_norm: float | None = None
    dropout: float = 0.0
    drops_at_test: bool = False
    standardize: bool = True
    keeps_best: bool = True
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        if self.dropout and self.standardize:
            raise ValueError("dropout is of inputs that are not standardised")


class Problem(NamedTuple):
    """What probes of the same states learn.

    Attributes:
        targets: int64 `(P, N)` classes from 0, or float32 `(P, N)` values of a regression.
        roles: int8 `(P, N)`: `TRAIN`, `DEVELOPMENT`, `TEST` or `UNUSED`.
        num_classes: 0 for a regression.
        groups: int64 `(N,)`, rows that stand in a batch together (a sentence's words); None for each alone.
        draws: P numbers from 0 on: probes of one number begin with the same weights; None for all.
    """

    targets: torch.Tensor
    roles: torch.Tensor
    num_classes: int
    groups: np.ndarray | None = None
    draws: Sequence[int] | None = None


class Probes(nn.Module):
    """P perceptrons over the same inputs, each standardised by moments of its own.

    Args:
        sizes: E, the hidden layers', C.
        mean, deviation: `(P, E)`.
        draws: as a problem has them.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        mean: torch.Tensor,
        deviation: torch.Tensor,
        draws: Sequence[int],
        generator: torch.Generator,
    ):
        super().__init__()
        self.mean, self.deviation = mean, deviation
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            bound = inputs**-0.5  # as torch's Linear
            for parameters, shape in (self.weights, (inputs, outputs)), (self.biases, (1, outputs)):
                drawn = torch.empty(max(draws) + 1, *shape).uniform_(-bound, bound, generator=generator)
                parameters.append(nn.Parameter(drawn[list(draws)].to(mean.dtype)))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """`(P, B, C)` of inputs `(B, E)`."""
        # (x - mean) / deviation @ W, so that one product reads the inputs for all probes
        weight = self.weights[0] / self.deviation[:, :, None]
        bias = self.biases[0] - self.mean[:, None, :] @ weight
        together = inputs @ weight.transpose(0, 1).flatten(1)
        values = together.unflatten(1, (-1, weight.shape[2])).transpose(0, 1) + bias
        for weight, bias in zip(self.weights[1:], self.biases[1:], strict=True):
            values = torch.baddbmm(bias, F.relu(values), weight)
        return values

    def clip_gradients(self, max_norm: float) -> None:
        """Scale down the gradients of each probe whose norm over all its parameters is greater."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.flatten(1).norm(dim=1) for gradient in gradients]).norm(dim=0)
        scale = (max_norm / (norm + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(scale[:, None, None])


def train_and_predict(
    states: torch.Tensor, problem: Problem, settings: ProbeSettings, seed: int, *, progress: str = ""
) -> np.ndarray:
    """Train the probes and predict what they have as test rows.

    Args:
        states: `(N, E)` of any float dtype, which may lie in a file.
        progress: what a progress bar on a terminal is called.
    Returns:
        `(P, N)`: int64 classes, -1 for rows that are no test rows of a probe; or a regression's values, NaN.
    Raises:
        ValueError: a probe has no training row.
    """
    roles = problem.roles
    if not (roles == TRAIN).any(dim=1).all():
        raise ValueError("each probe needs a training row")
    generator = torch.Generator().manual_seed(seed)
    sizes = (states.shape[1], *settings.hidden, max(problem.num_classes, 1))
    mean, deviation = _moments(states, roles == TRAIN, settings.standardize)
    draws = problem.draws or [0] * len(roles)
    probes = Probes(sizes, mean.to(settings.dtype), deviation.to(settings.dtype), draws, generator)
    targets, to_predictions = _targets(problem)

    def outputs(rows: torch.Tensor, drops: bool) -> torch.Tensor:
        inputs = states.index_select(0, rows).to(settings.dtype)  # four times as fast as states[rows]
        if drops and settings.dropout:
            kept = torch.rand(inputs.shape, generator=generator) >= settings.dropout
            inputs = inputs * kept / (1 - settings.dropout)
        return probes(inputs).float()

    def losses(rows: torch.Tensor, role: int, drops: bool) -> torch.Tensor:
        """`(2, P)`: each probe's loss summed over its rows of a role, and how many they are."""
        found, is_counted = outputs(rows, drops), roles.index_select(1, rows) == role
        its_targets = targets.index_select(1, rows).where(is_counted, 0)  # no others are looked at
        if problem.num_classes:
            each = F.cross_entropy(found.flatten(0, 1), its_targets.flatten(), reduction="none").view_as(its_targets)
        else:
            each = (found.squeeze(-1) - its_targets) ** 2
        return torch.stack([each.where(is_counted, 0).sum(dim=1), is_counted.sum(dim=1).float()])

    batches = _Batches((roles == TRAIN).any(dim=0), problem.groups, settings.batch_size)
    horizon = settings.epochs * len(batches)
    last_step = min(horizon, settings.last_step or horizon)
    optimizer = torch.optim.AdamW(probes.parameters(), settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / horizon)
    best = _Best(probes)
    judged = (roles == DEVELOPMENT).any(dim=0).nonzero().flatten()
    num_steps = 0
    with tqdm(total=last_step, unit="step", desc=progress, disable=None, leave=False) as bar:
        while num_steps < last_step:
            for rows in islice(batches.shuffled(generator), last_step - num_steps):
                total, count = losses(rows, TRAIN, drops=True)
                optimizer.zero_grad(set_to_none=True)
                (total / count.clamp(min=1)).sum().backward()  # a sum over probes: none changes another's gradient
                if settings.max_grad_norm is not None:
                    probes.clip_gradients(settings.max_grad_norm)
                optimizer.step()
                schedule.step()
                num_steps += 1
                bar.update()
            if settings.keeps_best and len(judged):
                with torch.no_grad():
                    parts = [losses(rows, DEVELOPMENT, drops=False) for rows in judged.split(_ROWS_AT_ONCE)]
                total, count = torch.stack(parts).sum(dim=0)
                best.judge(total / count)  # NaN, which is never better, for a probe without development rows
    best.restore()

    is_test = roles == TEST
    nothing = -1 if problem.num_classes else torch.nan
    predicted = torch.full(roles.shape, nothing)
    with torch.no_grad():
        for rows in is_test.any(dim=0).nonzero().flatten().split(_ROWS_AT_ONCE):
            predicted[:, rows] = to_predictions(outputs(rows, settings.drops_at_test))
    return predicted.where(is_test, nothing).numpy()


class _Batches:
    """Rows in batches, or whole groups of rows, shuffled anew each time."""

    def __init__(self, is_wanted: torch.Tensor, groups: np.ndarray | None, batch_size: int):
        rows = np.flatnonzero(is_wanted.numpy())
        owner = rows if groups is None else groups[rows]
        self._rows = rows[np.argsort(owner, kind="stable")]
        _, self._counts = np.unique(owner, return_counts=True)
        self._begins = np.cumsum(self._counts) - self._counts
        self._batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self._counts) // self._batch_size)

    def shuffled(self, generator: torch.Generator) -> Iterator[torch.Tensor]:
        for chosen in torch.randperm(len(self._counts), generator=generator).split(self._batch_size):
            counts, begins = self._counts[chosen], self._begins[chosen]
            within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
            yield torch.from_numpy(self._rows[np.repeat(begins, counts) + within])


class _Best:
    """Each probe's weights after the epoch at which its loss on the development rows was least."""

    def __init__(self, probes: Probes):
        self._parameters = list(probes.parameters())
        self._kept = [parameter.detach().clone() for parameter in self._parameters]
        self._least = torch.full((len(probes.mean),), torch.inf)

    def judge(self, loss: torch.Tensor) -> None:
        is_better = loss < self._least
        self._least = loss.where(is_better, self._least)
        for kept, parameter in zip(self._kept, self._parameters, strict=True):
            kept[is_better] = parameter.detach()[is_better]

    def restore(self) -> None:
        """Leaves alone what has never been judged."""
        was_judged = self._least.isfinite()
        with torch.no_grad():
            for kept, parameter in zip(self._kept, self._parameters, strict=True):
                parameter[was_judged] = kept[was_judged]


def _moments(states: torch.Tensor, is_used: torch.Tensor, standardize: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation, float64 `(P, E)`, over each probe's rows; 0 and 1 where nothing is to be standardised."""
    num_probes, size = len(is_used), states.shape[1]
    mean, deviation = torch.zeros(num_probes, size).double(), torch.ones(num_probes, size).double()
    if not standardize:
        return mean, deviation
    is_any = is_used.any(dim=0)
    centre = states[is_any.nonzero().flatten()[:_ROWS_AT_ONCE]].float().mean(dim=0)  # near the mean, to keep digits
    sums, squares = torch.zeros(2, num_probes, size, dtype=torch.float64)
    for start in range(0, len(states), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        if is_any[rows].any():
            shares, values = is_used[:, rows].float(), states[rows].float() - centre
            sums += (shares @ values).double()
            squares += (shares @ values.square_()).double()
    count = is_used.sum(dim=1, keepdim=True)
    offset = sums / count
    mean, deviation = centre + offset, (squares / count - offset**2).clamp(min=0).sqrt()
    # what rounding leaves of a constant's
    return mean, deviation.where(deviation > 1e-6 * mean.abs().clamp(min=1e-30), 1.0)


def _targets(problem: Problem) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
    """Targets, of a regression standardised by the training rows' moments; how outputs `(P, B, C)` become `(P, B)`."""
    if problem.num_classes:
        return problem.targets, lambda outputs: outputs.argmax(dim=-1)
    is_train = problem.roles == TRAIN
    count = is_train.sum(dim=1, keepdim=True)
    mean = problem.targets.where(is_train, 0).sum(dim=1, keepdim=True) / count
    deviation = (((problem.targets - mean) ** 2).where(is_train, 0).sum(dim=1, keepdim=True) / count).sqrt()
    deviation = deviation.where(deviation > 0, 1.0)
    return (problem.targets - mean) / deviation, lambda outputs: outputs.squeeze(-1) * deviation + mean
