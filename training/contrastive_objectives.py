"""Stages that compare texts: `simcse` (a text and itself) and `supervised` (queries, positives and hard negatives).

Shapes: N queries, M keys, E hidden size.
"""

from typing import NamedTuple

import numpy as np
import torch

from ..engine.tokens import Tokenized
from ..kernels.contrastive import contrastive_loss
from ..kernels.contrastive.gather import gather_keys
from ..kernels.pooling import pool
from .batches import Order
from .data import PairData, TextData
from .gradcache import backpropagate
from .mask_schedule import MaskNow
from .passes import Passes, Slab, identify
from .processes import Processes
from .settings import ContrastiveSettings
from .token_objectives import keep_generation

_GENERATION = 1 << 62  # in the identity of a text in the language-model loss beside this one


class Pairs(NamedTuple):
    """One process's part of a step: the queries' sequences, then the keys', the positives first."""

    sequences: list[Tokenized]
    num_queries: int
    groups: list[int]  # of the keys, then -1 for each key that another process has more
    identities: np.ndarray  # of the sequences


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

    def train(self, step: int, mask: MaskNow) -> dict[str, torch.Tensor]:
        """Add the step's gradients to the parameters; returns this process's part of each figure."""
        pairs = self.pairs(step)
        slabs = self.passes.slabs(pairs.sequences)

        def embed(place: int) -> torch.Tensor:
            return self._vectors(slabs[place], mask, step, pairs.identities, dropout=True)

        loss = backpropagate([slab.places for slab in slabs], embed, lambda vectors: self._loss(vectors, pairs))
        losses = {"loss": loss}
        if self.settings.keep_generation:
            # of a text that stands in the step twice once
            texts = pairs.sequences[pairs.num_queries :]
            identities = pairs.identities[pairs.num_queries :] | _GENERATION
            losses |= keep_generation(self.passes, texts, identities, step, self.processes, self.settings)
        return losses

    @torch.no_grad()
    def evaluate(self, step: int, mask: MaskNow) -> dict[str, float]:
        """Sums over this process's queries of held-out batch `step`: `loss`, `correct` and their `count`.

        SimCSE's views differ by dropout alone, so it stays; elsewhere there is none.
        """
        pairs = self.pairs(step)
        dropout = isinstance(self.pairs, TextPairs)
        slabs = self.passes.slabs(pairs.sequences)
        parts = [self._vectors(slab, mask, step, pairs.identities, dropout=dropout) for slab in slabs]
        places = torch.tensor([place for slab in slabs for place in slab.places], device=parts[0].device)
        joined = torch.cat(parts)
        vectors = torch.empty_like(joined).index_copy_(0, places, joined)
        loss = self._loss(vectors, pairs).item() * self.processes.world_size
        queries, keys, groups = self._split(vectors, pairs)
        own = groups[: len(queries)]
        if self.processes.group is not None:
            keys, gathered = gather_keys(keys, groups, self.processes.group)
            assert gathered is not None
            groups = gathered
        scores = torch.nn.functional.normalize(queries, dim=-1) @ torch.nn.functional.normalize(keys, dim=-1).T
        nearest = scores.masked_fill(groups < 0, -torch.inf).argmax(dim=-1)
        return {"loss": loss * len(queries), "correct": (groups[nearest] == own).sum().item(), "count": len(queries)}

    def _vectors(self, slab: Slab, mask: MaskNow, step: int, identities: np.ndarray, *, dropout: bool) -> torch.Tensor:
        """One vector of each of the slab's sequences, float32 (S, E)."""
        model = self.passes.trainee.model
        hidden_states = self.passes.hidden_states(slab, mask, step, identities, dropout=dropout)
        return pool(
            hidden_states,
            slab.batch.cu_seqlens,
            pool_starts=slab.batch.pool_starts,
            mode=self.settings.pooling,
            norm_weight=model.norm.weight,
            norm_eps=model.norm.eps,
            normalize=False,
        )

    def _loss(self, vectors: torch.Tensor, pairs: Pairs) -> torch.Tensor:
        """This process's part of the mean loss over all queries."""
        settings, processes = self.settings, self.processes
        queries, keys, groups = self._split(vectors, pairs)
        loss = contrastive_loss(
            queries,
            keys,
            temperature=settings.temperature,
            symmetric=settings.symmetric,
            groups=groups,
            dims=settings.dims or None,
            process_group=processes.group,
        )
        return loss / processes.world_size

    def _split(self, vectors: torch.Tensor, pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries (N, E), keys (M, E) and their groups (M,), as many keys as in every process."""
        num_padding = pairs.num_queries + len(pairs.groups) - len(vectors)
        keys = torch.nn.functional.pad(vectors[pairs.num_queries :], (0, 0, 0, num_padding))
        return vectors[: pairs.num_queries], keys, torch.tensor(pairs.groups, device=vectors.device)


def _require_negatives(groups: list[int], step: int) -> None:
    if len(set(groups)) == 1:
        raise ValueError(f"step {step}: every text of the batch is the same, so there are no negatives to learn from")
