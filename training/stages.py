"""Which objective and which data a stage's settings ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from .batches import BatchOrder, Order
from .contrastive_objectives import Contrastive, RowPairs, TextPairs
from .data import PairData, TextData
from .mask_schedule import MaskNow
from .passes import Passes
from .processes import Processes
from .settings import MntpSettings, PretrainSettings, SimcseSettings, SupervisedSettings, TrainingSettings
from .token_objectives import MaskedNextTokens, NextTokens


class Objective(Protocol):
    """A loss over data. Each process adds its part: the sum over processes is the joined batch's."""

    def prepare(self, step: int) -> Any:
        """This process's part of the step, in slabs on the device: what is done on the host, and no pass.

        It depends on nothing but the data, the settings and `step`, and may be called in another thread than `train`.
        """
        ...

    def train(self, batch: Any, mask: MaskNow) -> dict[str, torch.Tensor]:
        """Add the gradients of what `prepare` gave to the parameters, without waiting for the device.

        Returns this process's part of each loss, `loss` among them, float32 scalars.
        """
        ...

    def evaluate(self, step: int, mask: MaskNow) -> dict[str, float]:
        """Sums over this process's part of batch `step`: `loss`, `correct` and the `count` that divides them."""
        ...


@dataclass
class Stage:
    """What the loop runs; `fingerprint` is that of the training data."""

    objective: Objective
    fingerprint: str
    evaluation: Objective | None
    num_evaluation_batches: int


def make_stage(settings: TrainingSettings, passes: Passes, processes: Processes) -> Stage:
    """Read the settings' data and make the objective that trains on it, and the one that evaluates.

    Raises:
        ValueError, FileNotFoundError: naming the file and line, or the field.
    """
    if settings.batch_size % processes.world_size:
        raise ValueError(
            f"batch_size must be a multiple of the {processes.world_size} processes, got {settings.batch_size}"
        )
    objective, fingerprint, _ = _make_objective(settings, passes, processes, settings.data, held_out=False)
    if not settings.eval_data:
        return Stage(objective, fingerprint, None, 0)
    evaluation, _, num_batches = _make_objective(settings, passes, processes, settings.eval_data, held_out=True)
    return Stage(objective, fingerprint, evaluation, num_batches)


def _make_objective(
    settings: TrainingSettings, passes: Passes, processes: Processes, files: list[str], *, held_out: bool
) -> tuple[Objective, str, int]:
    """Objective, its data's fingerprint, and the number of batches where they are held out."""
    if isinstance(settings, SupervisedSettings):
        return _pair_objective(settings, passes, processes, files, held_out)
    return _text_objective(settings, passes, processes, files, held_out)


def _text_objective(
    settings: TrainingSettings, passes: Passes, processes: Processes, files: list[str], held_out: bool
) -> tuple[Objective, str, int]:
    block_size = getattr(settings, "block_size", None) or None
    tokenizer = passes.trainee.tokenizer
    data = TextData(files, tokenizer, text_column=settings.text_column, block_size=block_size)
    contrastive = isinstance(settings, SimcseSettings)
    order, num_batches = _order((len(data),), files, settings, contrastive, held_out)
    if isinstance(settings, SimcseSettings):
        pairs = TextPairs(data, order, processes)
        return Contrastive(passes, pairs, processes, settings), data.fingerprint, num_batches
    if isinstance(settings, MntpSettings):
        return MaskedNextTokens(passes, data, order, processes, settings), data.fingerprint, num_batches
    assert isinstance(settings, PretrainSettings)
    return NextTokens(passes, data, order, processes), data.fingerprint, num_batches


def _pair_objective(
    settings: SupervisedSettings, passes: Passes, processes: Processes, files: list[str], held_out: bool
) -> tuple[Objective, str, int]:
    data = PairData(
        files,
        passes.trainee.tokenizer,
        instruction=settings.instruction,
        symmetric_instruction=settings.symmetric_instruction,
    )
    order, num_batches = _order(data.sizes, data.names, settings, True, held_out)
    return Contrastive(passes, RowPairs(data, order, processes), processes, settings), data.fingerprint, num_batches


def _order(
    sizes: Sequence[int], names: Sequence[str], settings: TrainingSettings, contrastive: bool, held_out: bool
) -> tuple[Order, int]:
    """The order of batches, and how many there are of held-out ones."""
    if not held_out:
        names = names if len(names) == len(sizes) else [", ".join(names)]
        return BatchOrder(sizes, settings.batch_size, settings.seed, names=names), 0
    order = HeldOutOrder(sizes, settings.batch_size, drop_last=contrastive)
    return order, len(order)


class HeldOutOrder:
    """Batches of held-out rows as they stand; with `drop_last` incomplete ones are left out, since a contrastive loss
    depends on the number of negatives, unless a data set has no other."""

    def __init__(self, sizes: Sequence[int], batch_size: int, *, drop_last: bool):
        self._batches = [
            (dataset, list(range(start, min(start + batch_size, size))))
            for dataset, size in enumerate(sizes)
            for start in range(0, size, batch_size)
            if start == 0 or start + batch_size <= size or not drop_last
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __call__(self, step: int) -> tuple[int, list[int]]:
        """The data set and the rows of batch `step`."""
        return self._batches[step]
