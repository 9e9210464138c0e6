"""Which objective and which data a stage's settings ask for."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..engine.tokens import TextTokenizer
from .batches import BatchOrder, Order
from .contrastive_objectives import Contrastive, RowPairs, TextPairs
from .data import PairData, TextData, look_at_pairs, look_at_texts
from .mask_schedule import MaskNow
from .passes import Passes
from .processes import Processes
from .settings import ContrastiveSettings, MntpSettings, SimcseSettings, SupervisedSettings, TrainingSettings
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
class Data:
    """The rows of a run, and those that are held out."""

    training: TextData | PairData
    held_out: TextData | PairData | None


@dataclass
class Stage:
    """What the loop runs; `fingerprint` is that of the training data."""

    objective: Objective
    fingerprint: str
    evaluation: Objective | None
    num_evaluation_batches: int


def look_at_data(settings: TrainingSettings) -> None:
    """That every file is there, and has its columns and a good first row: all files, before any is read to its end.

    Raises:
        ValueError, FileNotFoundError: naming the file and line, or the field.
    """
    for files in filter(None, (settings.data, settings.eval_data)):
        if isinstance(settings, SupervisedSettings):
            look_at_pairs(files)
        else:
            look_at_texts(files, settings.text_column)


def read_data(settings: TrainingSettings, tokenizer: TextTokenizer) -> Data:
    """Read and check all rows; blocks are tokenised when the stage is made.

    Raises:
        ValueError, FileNotFoundError: naming the file and line, or the field.
    """
    training = _read(settings, tokenizer, settings.data)
    held_out = _read(settings, tokenizer, settings.eval_data) if settings.eval_data else None
    if not getattr(settings, "block_size", None):
        _order(training, settings)  # refuses data of fewer rows than a batch
    return Data(training, held_out)


def _read(settings: TrainingSettings, tokenizer: TextTokenizer, files: list[str]) -> TextData | PairData:
    if isinstance(settings, SupervisedSettings):
        return PairData(
            files,
            tokenizer,
            instruction=settings.instruction,
            symmetric_instruction=settings.symmetric_instruction,
        )
    block_size = getattr(settings, "block_size", None) or None
    return TextData(files, tokenizer, text_column=settings.text_column, block_size=block_size)


def make_stage(settings: TrainingSettings, data: Data, passes: Passes, processes: Processes) -> Stage:
    """The objective that trains on the data, and the one that evaluates.

    Raises:
        ValueError: the data have fewer rows than a batch, or than a block has tokens.
    """
    evaluation, num_batches = None, 0
    if data.held_out is not None:  # first: what is held out is tokenised sooner, and may be too little
        held_out = HeldOutOrder(
            data.held_out.sizes, settings.batch_size, drop_last=isinstance(settings, ContrastiveSettings)
        )
        evaluation = _objective(settings, data.held_out, held_out, passes, processes)
        num_batches = len(held_out)
    objective = _objective(settings, data.training, _order(data.training, settings), passes, processes)
    return Stage(objective, data.training.fingerprint, evaluation, num_batches)


def _order(data: TextData | PairData, settings: TrainingSettings) -> BatchOrder:
    return BatchOrder(data.sizes, settings.batch_size, settings.seed, names=data.names)


def _objective(
    settings: TrainingSettings, data: TextData | PairData, order: Order, passes: Passes, processes: Processes
) -> Objective:
    if isinstance(data, PairData):
        assert isinstance(settings, SupervisedSettings)
        return Contrastive(passes, RowPairs(data, order, processes), processes, settings)
    if isinstance(settings, SimcseSettings):
        return Contrastive(passes, TextPairs(data, order, processes), processes, settings)
    if isinstance(settings, MntpSettings):
        return MaskedNextTokens(passes, data, order, processes, settings)
    return NextTokens(passes, data, order, processes)


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
