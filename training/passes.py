"""One step's sequences through the model, in packed slabs of a token budget.

Everything random is a function of the run's seed, the step and the row, so that a pass can be repeated (GradCache,
activation checkpointing, a resumed run) with the same masks.
"""

import operator
import os
from collections.abc import Sequence
from contextlib import nullcontext
from typing import NamedTuple

import numpy as np
import torch

from ..engine.packing import PackedBatch, on_device, pack
from ..engine.tokens import Tokenized
from .mask_schedule import MaskNow
from .settings import TrainingSettings
from .trainee import Trainee

_BUDGETS = (4096, 8192, 16384, 32768)  # tokens of a pass to choose from
# of an element that is trained: its gradient, AdamW's moments, and what autocast makes of it, as if all were float32
_STATE_BYTES = 4 + 8 + 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


class Slab(NamedTuple):
    """Sequences of a step that go through the model together.

    Attributes:
        places: theirs in the step.
        batch: their tokens.
        seeds: int64 (S,) on the device, of what is random about each sequence.
        adapter_seed: of the adapter's dropout, which is drawn on the host.
        num_cut: sequences that have more tokens than `max_length`.
    """

    places: list[int]
    batch: PackedBatch
    seeds: torch.Tensor
    adapter_seed: int
    num_cut: int


class Counts(NamedTuple):
    """Tokens, sequences, and those of the sequences that were cut."""

    tokens: int
    sequences: int
    cut: int


class Passes:
    """Runs slabs of one process through a trainee's model.

    Args:
        token_budget: tokens of a slab.
        attention_dropout: chance of a probability to be dropped, in training and wherever `dropout` asks for it.
    """

    def __init__(
        self, trainee: Trainee, *, token_budget: int, attention_dropout: float, checkpoint_activations: bool, seed: int
    ):
        self.trainee = trainee
        self.token_budget = token_budget
        self.attention_dropout = attention_dropout
        self.checkpoint_activations = checkpoint_activations
        self.seed = seed
        self._counts = Counts(0, 0, 0)

    def take_counts(self) -> Counts:
        """What was trained on since this was asked last; a pass without gradient counts for nothing."""
        counts, self._counts = self._counts, Counts(0, 0, 0)
        return counts

    def slabs(self, sequences: Sequence[Tokenized], step: int, identities: np.ndarray) -> list[Slab]:
        """The sequences in slabs on the device, sequences of similar length together.

        Args:
            identities: from `identify`, one for every sequence of the step: what is random about a sequence depends on
                the run's seed, the step and its identity.
        """
        lengths = [len(sequence.ids) for sequence in sequences]
        divided = pack(lengths, self.token_budget, self.token_budget)
        return [self.slab(sequences, places, step, identities) for places in divided]

    def slab(self, sequences: Sequence[Tokenized], places: list[int], step: int, identities: np.ndarray) -> Slab:
        """The sequences at these places in one slab, however many tokens they have."""
        device = self.trainee.device
        chosen = [sequences[place] for place in places]
        seeds = sequence_seeds(self.seed, step, identities[places])
        batch = PackedBatch.from_sequences([text.ids for text in chosen], [text.pool_start for text in chosen], device)
        num_cut = sum(text.cut for text in chosen)
        return Slab(places, batch, on_device(seeds, device), int(seeds[0]), num_cut)

    def hidden_states(self, slab: Slab, mask: MaskNow, *, dropout: bool = True) -> torch.Tensor:
        """Last hidden states `(T, E)` of a slab before the final norm, in the compute dtype."""
        trainee = self.trainee
        torch.manual_seed(slab.adapter_seed)
        autocast = trainee.adapter is None and trainee.dtype is not torch.float32
        precision = torch.autocast(trainee.device.type, trainee.dtype) if autocast else nullcontext()
        if trainee.network.training != dropout:  # which goes through every module
            trainee.network.train(dropout)
        if torch.is_grad_enabled():
            own = (slab.batch.num_tokens, len(slab.places), slab.num_cut)
            self._counts = Counts(*map(operator.add, self._counts, own))
        with precision:
            return trainee.model(
                slab.batch,
                mask.windows,
                backend=trainee.backend,
                dropout_p=self.attention_dropout if dropout else 0.0,
                future_p=mask.future_p,
                seeds=slab.seeds,
                checkpoint_activations=self.checkpoint_activations and torch.is_grad_enabled(),
            )


def choose_token_budget(settings: TrainingSettings, trainee: Trainee) -> int:
    """Tokens of a pass: as asked, or what memory holds beside the weights and the optimizer's state.

    Half of that on CUDA, as the backward and the losses need some too, and a third of all memory on the CPU. A text
    that is longer is a pass of its own.
    """
    if settings.token_budget is not None:
        return settings.token_budget
    if trainee.device.type == "cuda":
        memory = torch.cuda.get_device_properties(trainee.device).total_memory
        state = sum(parameter.numel() * _STATE_BYTES for parameter in trainee.parameters.values())
        weights = sum(parameter.numel() * parameter.element_size() for parameter in trainee.network.parameters())
        kept = activation_bytes(trainee, settings.gradient_checkpointing)
        fitting = (memory - weights - state) // 2 // kept
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        fitting = memory // 3 // activation_bytes(trainee)
    longest = max(trainee.tokenizer.max_length, getattr(settings, "block_size", 0) or 0)
    return max([longest, *(budget for budget in _BUDGETS if budget <= fitting)])


def activation_bytes(trainee: Trainee, checkpointed: bool = False) -> int:
    """At most what a training pass keeps of a token for its backward; checkpointed, one layer's beside all inputs."""
    config = trainee.config
    heads = 2 * (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    layer = 6 * config.hidden_size + heads + 4 * config.intermediate_size
    layers = config.num_hidden_layers * layer
    if checkpointed:
        layers = layer + config.num_hidden_layers * config.hidden_size
    return layers * trainee.dtype.itemsize


def identify(dataset: int, rows: np.ndarray, part: int | np.ndarray) -> np.ndarray:
    """An identity of each sequence: of a data set, of a row (below 2 ** 32), of a part of the row (below 2 ** 16)."""
    return (np.int64(dataset) << 48) | (rows.astype(np.int64) << 16) | part


def sequence_seeds(seed: int, step: int, identities: np.ndarray) -> np.ndarray:
    """A 63-bit seed of each sequence: SplitMix64 (Steele et al., 2014) over seed, step and identity, int64."""
    state = np.full(len(identities), seed, dtype=np.uint64)
    with np.errstate(over="ignore"):
        for word in (np.uint64(step), identities.astype(np.uint64)):
            state = _mix(state + _GOLDEN * (word + np.uint64(1)))
    return (state >> np.uint64(1)).astype(np.int64)


def _mix(state: np.ndarray) -> np.ndarray:
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
