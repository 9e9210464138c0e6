"""Stages that predict tokens: `pretrain` (the next one) and `mntp` (masked ones), by the model's own head.

A token is predicted from the state of the token before it, so both objectives share one head and one form. Losses are
divided by the number of predicted tokens over all processes: the sum of the processes' gradients is the joined batch's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ..engine.config import CAUSAL
from ..engine.packing import on_device
from ..engine.tokens import Tokenized
from ..kernels.cross_entropy import linear_cross_entropy
from .batches import Order
from .data import TextData
from .mask_schedule import MaskNow
from .masking import mask_token_id, mask_tokens
from .passes import Passes, Slab, identify
from .processes import Processes
from .settings import MntpSettings, TrainingSettings

_HELD_OUT = 2**62  # the step of what is random in an evaluation; no training step is so late
_GENERATION = 1  # the part of a row that the language-model loss beside another one is


class Targets(NamedTuple):
    """What a step's sequences predict.

    Attributes:
        reads: int64 (K,), increasing: rows, among the step's tokens as they stand, whose states predict.
        tokens: int64 (K,), what they predict.
    """

    reads: np.ndarray
    tokens: np.ndarray


class Predictions(NamedTuple):
    """A slab and what it predicts, on the device: int64 (N,) rows of its tokens, and the tokens they predict."""

    slab: Slab
    rows: torch.Tensor
    tokens: torch.Tensor


class TokenBatch(NamedTuple):
    """One process's part of a step, and how many tokens it predicts."""

    step: int
    parts: list[Predictions]
    num_targets: int


class MaskedBatch(NamedTuple):
    """One process's part of a step of `mntp`, and of the language-model loss beside it where there is one."""

    masked: TokenBatch
    generation: TokenBatch | None


def following(sequences: Sequence[Tokenized]) -> Targets:
    """Every token but a sequence's first, each from the token before it."""
    tokens = np.array([token for sequence in sequences for token in sequence.ids], dtype=np.int64)
    is_first = np.zeros(len(tokens) + 1, dtype=bool)
    is_first[np.cumsum([0, *(len(sequence.ids) for sequence in sequences)])] = True
    reads = np.flatnonzero(~is_first[1:])
    return Targets(reads, tokens[reads + 1])


class NextTokens:
    """`pretrain`: the next token of every token."""

    def __init__(self, passes: Passes, data: TextData, order: Order, processes: Processes):
        self.passes = passes
        self.data = data
        self.order = order
        self.processes = processes

    def prepare(self, step: int) -> TokenBatch:
        """This process's part of the step."""
        rows, sequences = _share(self.data, self.order, self.processes, step)
        return _prepare(self.passes, sequences, following(sequences), step, identify(0, rows, 0))

    def train(self, batch: TokenBatch, mask: MaskNow) -> dict[str, torch.Tensor]:
        """Add the step's gradients to the parameters; returns this process's part of each figure."""
        return {"loss": add_gradients(self.passes, batch, mask, self.processes)}

    def evaluate(self, step: int, mask: MaskNow) -> dict[str, float]:
        """Sums over this process's part of held-out batch `step`: `loss`, `correct` and their `count`."""
        rows, sequences = _share(self.data, self.order, self.processes, step)
        batch = _prepare(self.passes, sequences, following(sequences), _HELD_OUT, identify(0, rows, 0))
        return figures(self.passes, batch, mask)


class MaskedNextTokens:
    """`mntp`: every masked token, from the place before it (BehnamGhader et al., arXiv 2404.05961)."""

    def __init__(self, passes: Passes, data: TextData, order: Order, processes: Processes, settings: MntpSettings):
        self.passes = passes
        self.data = data
        self.order = order
        self.processes = processes
        self.settings = settings
        tokenizer = passes.trainee.tokenizer.hugging_face
        self.mask_token = mask_token_id(tokenizer, settings.mask_token)
        self.special = frozenset(tokenizer.all_special_ids)

    def prepare(self, step: int) -> MaskedBatch:
        """This process's part of the step."""
        rows, sequences = _share(self.data, self.order, self.processes, step)
        masked, targets = self._masked(sequences, rows, step)
        generation = None
        if self.settings.keep_generation:
            generation = prepare_generation(self.passes, sequences, step, identify(0, rows, _GENERATION))
        return MaskedBatch(_prepare(self.passes, masked, targets, step, identify(0, rows, 0)), generation)

    def train(self, batch: MaskedBatch, mask: MaskNow) -> dict[str, torch.Tensor]:
        """Add the step's gradients to the parameters; returns this process's part of each figure."""
        losses = {"loss": add_gradients(self.passes, batch.masked, mask, self.processes)}
        if batch.generation is not None:
            losses |= keep_generation(self.passes, batch.generation, self.processes, self.settings)
        return losses

    def evaluate(self, step: int, mask: MaskNow) -> dict[str, float]:
        """Sums over this process's part of held-out batch `step`: `loss`, `correct` and their `count`."""
        rows, sequences = _share(self.data, self.order, self.processes, step)
        masked, targets = self._masked(sequences, rows, _HELD_OUT)
        return figures(self.passes, _prepare(self.passes, masked, targets, _HELD_OUT, identify(0, rows, 0)), mask)

    def _masked(self, sequences: Sequence[Tokenized], rows: np.ndarray, step: int) -> tuple[list[Tokenized], Targets]:
        masked = mask_tokens(
            sequences,
            probability=self.settings.mask_probability,
            style=self.settings.mask_style,
            mask_token=self.mask_token,
            special=self.special,
            vocab_size=self.passes.trainee.config.vocab_size,
            seed=self.settings.seed,
            step=step,
            rows=rows.tolist(),
        )
        return masked.sequences, Targets(masked.read_rows.numpy(), masked.targets.numpy())


def prepare_generation(passes: Passes, sequences: Sequence[Tokenized], step: int, identities: np.ndarray) -> TokenBatch:
    """What `keep_generation` takes: the texts as they are."""
    return _prepare(passes, sequences, following(sequences), step, identities)


def keep_generation(
    passes: Passes, batch: TokenBatch, processes: Processes, settings: TrainingSettings
) -> dict[str, torch.Tensor]:
    """Add the gradients of `settings.keep_generation` times the causal language-model loss."""
    mask = MaskNow(passes.trainee.config.windows(CAUSAL))
    weight = settings.keep_generation
    return {"generation_loss": add_gradients(passes, batch, mask, processes, weight=weight) / weight}


def add_gradients(
    passes: Passes, batch: TokenBatch, mask: MaskNow, processes: Processes, *, weight: float = 1.0
) -> torch.Tensor:
    """Add the gradients of `weight` times the mean loss over all processes' targets; returns this process's part."""
    (count,) = processes.sum(batch.num_targets)
    if count == 0:
        raise ValueError(f"step {batch.step}: no text has a second token to predict")
    total = torch.zeros((), device=passes.trainee.device)
    for part in batch.parts:
        hidden_states = passes.hidden_states(part.slab, mask)
        states = _predicting(passes, part, hidden_states)
        if len(part.tokens):
            head = passes.trainee.head.to(states.dtype)
            loss = linear_cross_entropy(states, head, part.tokens, reduction="sum") * (weight / count)
            loss.backward()
            total += loss.detach()
    return total


@torch.no_grad()
def figures(passes: Passes, batch: TokenBatch, mask: MaskNow) -> dict[str, float]:
    """Sums over the targets, without dropout: of the losses, of correct predictions, and their number."""
    loss, correct, count = 0.0, 0, 0
    for part in batch.parts:
        states = _predicting(passes, part, passes.hidden_states(part.slab, mask, dropout=False))
        for rows, wanted in zip(states.split(512), part.tokens.split(512), strict=True):
            logits = (rows @ passes.trainee.head.to(rows.dtype).T).float()
            loss += torch.nn.functional.cross_entropy(logits, wanted, reduction="sum").item()
            correct += int((logits.argmax(dim=-1) == wanted).sum())
            count += len(wanted)
    return {"loss": loss, "correct": correct, "count": count}


def _prepare(
    passes: Passes, sequences: Sequence[Tokenized], targets: Targets, step: int, identities: np.ndarray
) -> TokenBatch:
    """A step's sequences in slabs, each with the targets that are read from it."""
    device = passes.trainee.device
    starts = np.cumsum([0, *(len(sequence.ids) for sequence in sequences)])
    bounds = np.searchsorted(targets.reads, starts)
    parts = []
    for slab in passes.slabs(sequences, step, identities):
        slab_start = 0
        rows, tokens = [], []
        for place, length in zip(slab.places, slab.batch.seqlens, strict=True):
            own = slice(bounds[place], bounds[place + 1])
            rows.append(targets.reads[own] - starts[place] + slab_start)
            tokens.append(targets.tokens[own])
            slab_start += length
        read, predicted = (on_device(np.concatenate(arrays), device) for arrays in (rows, tokens))
        parts.append(Predictions(slab, read, predicted))
    return TokenBatch(step, parts, len(targets.tokens))


def _predicting(passes: Passes, part: Predictions, hidden_states: torch.Tensor) -> torch.Tensor:
    """A slab's normalised states (N, E) that predict, in the compute dtype."""
    trainee = passes.trainee
    return trainee.model.norm(hidden_states.index_select(0, part.rows)).to(trainee.dtype)


def _share(data: TextData, order: Order, processes: Processes, step: int) -> tuple[np.ndarray, list[Tokenized]]:
    """This process's rows of a step and their tokens."""
    _, rows = order(step)
    share = rows[processes.share(len(rows))]
    return np.asarray(share, dtype=np.int64), data.tokens(share)
