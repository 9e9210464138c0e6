"""Stages that compare texts: `simcse` (a text and itself) and `supervised` (queries, positives and hard negatives).

Shapes: N queries, M keys, E hidden size.
"""

from typing import NamedTuple

import numpy as np
import torch

from ..engine.packing import on_device
from ..engine.tokens import Tokenized
from ..kernels.contrastive import contrastive_loss
from ..kernels.contrastive.gather import gather_keys
from ..kernels.pooling import pool
from .batches import Order
from .data import PairData, TextData
from .gradcache import backpropagate, in_order
from .mask_schedule import MaskNow
from .passes import Passes, Slab, identify
from .processes import Processes
from .settings import ContrastiveSettings
from .token_objectives import TokenBatch, keep_generation, prepare_generation

_GENERATION = 1 << 62  # in the identity of a text in the language-model loss beside this one


class Pairs(NamedTuple):
    """One process's part of a step: the queries' sequences, then the keys', the positives first."""

    sequences: list[Tokenized]
    num_queries: int
    groups: list[int]  # of the keys, then -1 for each key that another process has more
    identities: np.ndarray  # of the sequences


class PairBatch(NamedTuple):
    """Such a part in slabs, on the device.

    Attributes:
        places: int64 (S,), those of the first slab's sequences, then of the second's, and so on.
        groups: int64 (M,), of the keys of this process, and of as many more as another process has.
        generation: the keys' texts, where a language-model loss stands beside this one.
    """

    slabs: list[Slab]
    places: torch.Tensor
    num_queries: int
    groups: torch.Tensor
    generation: TokenBatch | None


class TextPairs:
    """SimCSE's pairs (Gao et al., arXiv 2104.08821): every text twice, which differ by what dropout hides."""

    def __init__(self, data: TextData, order: Order, processes: Processes):
        self.data = data
        self.order = order
        self.processes = processes

    def __call__(self, step: int) -> Pairs:
        """This process's part of the step."""
        _, rows = self.order(step)
        groups = self.data.groups(rows)
        _require_negatives(groups, step)
        share = self.processes.share(len(rows))
        own = np.asarray(rows[share], dtype=np.int64)
        texts = self.data.tokens(rows[share])
        identities = np.concatenate([identify(0, own, part) for part in (0, 1)])
        return Pairs([*texts, *texts], len(texts), groups[share], identities)


class RowPairs:
    """Queries with their positives and hard negatives; all of a step come from one data set."""

    def __init__(self, data: PairData, order: Order, processes: Processes):
        self.data = data
        self.order = order
        self.processes = processes

    def __call__(self, step: int) -> Pairs:
        """This process's part of the step."""
        dataset, rows = self.order(step)
        share = self.processes.share(len(rows))
        own = np.asarray(rows[share], dtype=np.int64)
        tokens = self.data.tokens(dataset, rows, share=share)
        counts = np.array([len(row.negatives) for row in self.data.rows(dataset, rows)])
        most = max(counts[part].sum() for part in self.processes.shares(len(rows)))
        num_negatives = counts[share]
        groups = [*tokens.groups, *[-1] * (most - num_negatives.sum())]
        identities = [identify(dataset, own, 0), identify(dataset, own, 1)]
        identities += [
            identify(dataset, np.full(count, row), 2 + np.arange(count))
            for row, count in zip(own, num_negatives, strict=True)
        ]
        return Pairs([*tokens.queries, *tokens.keys], len(tokens.queries), groups, np.concatenate(identities))


class Contrastive:
    """InfoNCE of a step's pairs over all processes."""

    def __init__(
        self, passes: Passes, pairs: TextPairs | RowPairs, processes: Processes, settings: ContrastiveSettings
    ):
        self.passes = passes
        self.pairs = pairs
        self.order = pairs.order
        self.processes = processes
        self.settings = settings

    def prepare(self, step: int) -> PairBatch:
        """This process's part of the step."""
        pairs = self.pairs(step)
        generation = None
        if self.settings.keep_generation:
            # of a text that stands in the step twice once
            texts = pairs.sequences[pairs.num_queries :]
            identities = pairs.identities[pairs.num_queries :] | _GENERATION
            generation = prepare_generation(self.passes, texts, step, identities)
        return self._pack(pairs, step, generation)

    def train(self, batch: PairBatch, mask: MaskNow) -> dict[str, torch.Tensor]:
        """Add the step's gradients to the parameters; returns this process's part of each figure."""

        def embed(place: int) -> torch.Tensor:
            return self._vectors(batch.slabs[place], mask, dropout=True)

        counts = [len(slab.places) for slab in batch.slabs]
        losses = {"loss": backpropagate(counts, batch.places, embed, lambda vectors: self._loss(vectors, batch))}
        if batch.generation is not None:
            losses |= keep_generation(self.passes, batch.generation, self.processes, self.settings)
        return losses

    @torch.no_grad()
    def evaluate(self, step: int, mask: MaskNow) -> dict[str, float]:
        """Sums over this process's queries of held-out batch `step`: `loss`, `correct` and their `count`.

        SimCSE's views differ by dropout alone, so it stays; elsewhere there is none.
        """
        batch = self._pack(self.pairs(step), step)
        dropout = isinstance(self.pairs, TextPairs)
        vectors = in_order([self._vectors(slab, mask, dropout=dropout) for slab in batch.slabs], batch.places)
        loss = self._loss(vectors, batch).item() * self.processes.world_size
        queries, keys = self._split(vectors, batch)
        groups, own = batch.groups, batch.groups[: len(queries)]
        if self.processes.group is not None:
            keys, gathered = gather_keys(keys, groups, self.processes.group)
            assert gathered is not None
            groups = gathered
        scores = torch.nn.functional.normalize(queries, dim=-1) @ torch.nn.functional.normalize(keys, dim=-1).T
        nearest = scores.masked_fill(groups < 0, -torch.inf).argmax(dim=-1)
        return {"loss": loss * len(queries), "correct": (groups[nearest] == own).sum().item(), "count": len(queries)}

    def _pack(self, pairs: Pairs, step: int, generation: TokenBatch | None = None) -> PairBatch:
        slabs = self.passes.slabs(pairs.sequences, step, pairs.identities)
        places = np.array([place for slab in slabs for place in slab.places], dtype=np.int64)
        groups = np.array(pairs.groups, dtype=np.int64)
        device = self.passes.trainee.device
        return PairBatch(slabs, on_device(places, device), pairs.num_queries, on_device(groups, device), generation)

    def _vectors(self, slab: Slab, mask: MaskNow, *, dropout: bool) -> torch.Tensor:
        """One vector of each of the slab's sequences, float32 (S, E)."""
        model = self.passes.trainee.model
        hidden_states = self.passes.hidden_states(slab, mask, dropout=dropout)
        return pool(
            hidden_states,
            slab.batch.cu_seqlens,
            pool_starts=slab.batch.pool_starts,
            mode=self.settings.pooling,
            norm_weight=model.norm.weight,
            norm_eps=model.norm.eps,
            normalize=False,
        )

    def _loss(self, vectors: torch.Tensor, batch: PairBatch) -> torch.Tensor:
        """This process's part of the mean loss over all queries."""
        settings, processes = self.settings, self.processes
        queries, keys = self._split(vectors, batch)
        loss = contrastive_loss(
            queries,
            keys,
            temperature=settings.temperature,
            symmetric=settings.symmetric,
            groups=batch.groups,
            dims=settings.dims or None,
            process_group=processes.group,
        )
        return loss / processes.world_size

    def _split(self, vectors: torch.Tensor, batch: PairBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (N, E) and keys (M, E), as many keys as in every process."""
        num_padding = batch.num_queries + len(batch.groups) - len(vectors)
        keys = torch.nn.functional.pad(vectors[batch.num_queries :], (0, 0, 0, num_padding))
        return vectors[: batch.num_queries], keys


def _require_negatives(groups: list[int], step: int) -> None:
    if len(set(groups)) == 1:
        raise ValueError(f"step {step}: every text of the batch is the same, so there are no negatives to learn from")
