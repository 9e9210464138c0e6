"""How alike hidden states are, layer by layer: between texts, within one, and under the two masks.

- `anisotropy` is the mean cosine of tokens of different texts (Ethayarajh, arXiv 1909.00512, section 3.4): each seed
  draws one token a text, and all pairs of texts count.
- `within text` is the mean cosine of a text's tokens and their mean (the paper's intra-sentence similarity).
- `readiness` is the mean cosine of a token's states under the causal and the bidirectional mask (BehnamGhader et al.,
  arXiv 2404.05961, section 4.2), in `details` also by position: high where a model is little changed by its new mask.

Special tokens are left out but for `by position`, which starts at a text's first token: their states are alike in
every text. Layer 0 is the embeddings; the last layer's states are after the final norm.

Shapes: N texts, T packed tokens, E hidden size, B resamples.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from ..engine.config import BIDIRECTIONAL, CAUSAL, Window
from ..engine.encoder import Encoder
from ..engine.packing import PackedBatch, pack
from ..engine.tokens import TextTokenizer, Tokenized
from .report import Score
from .statistics import Statistic, estimate, ratio
from .texts import HeldOutTexts

POSITIONS = 32
_SLAB_TOKENS = 4096
_SEQUENCES = 1024


class Slab(NamedTuple):
    """Texts that go through the model together.

    Attributes:
        places: of the texts.
        text_of: int64 `(T,)`, the place within the slab of each token's text.
        is_word: bool `(T,)`, false for special tokens.
        drawn: int64 `(seeds, texts)`, the row of the token that each seed draws of each text.
    """

    places: list[int]
    batch: PackedBatch
    text_of: torch.Tensor
    is_word: torch.Tensor
    drawn: torch.Tensor


@torch.no_grad()
def evaluate(encoder: Encoder, held_out: HeldOutTexts, seeds: Sequence[int]) -> list[Score]:
    """Scores of each layer under the encoder's own mask, and the readiness; raises ValueError where no text is fit."""
    sequences, word_masks = _words(encoder, held_out)
    drawn: dict[int, list[torch.Tensor]] = defaultdict(list)  # by layer; (seeds, texts, E) of each slab
    within, agreement = (np.zeros((encoder.config.num_hidden_layers + 1, len(sequences))) for _ in range(2))
    by_position = np.zeros((2, encoder.config.num_hidden_layers + 1, POSITIONS))  # sums and counts
    causal, bidirectional = encoder.config.windows(CAUSAL), encoder.config.windows(BIDIRECTIONAL)
    for slab in _slabs(encoder, sequences, word_masks, seeds):
        for layer, states in enumerate(_states(encoder, slab.batch, encoder.windows)):
            drawn[layer].append(states[slab.drawn].cpu())
            words = states[slab.is_word]
            means = _text_means(words, slab)[slab.text_of[slab.is_word]]
            to_mean = F.cosine_similarity(words, means, dim=-1)
            within[layer, slab.places] = _text_means(to_mean[:, None], slab).flatten().cpu()
        masks = zip(*(_states(encoder, slab.batch, windows) for windows in (causal, bidirectional)), strict=True)
        for layer, (first, second) in enumerate(masks):
            cosine = F.cosine_similarity(first, second, dim=-1)
            agreement[layer, slab.places] = _text_means(cosine[slab.is_word][:, None], slab).flatten().cpu()
            early = (slab.batch.positions < POSITIONS).cpu()
            places = slab.batch.positions.cpu()[early].numpy()
            np.add.at(by_position[0, layer], places, cosine.cpu()[early].numpy())
            np.add.at(by_position[1, layer], places, 1.0)
    return list(_scores(held_out.name, drawn, within, agreement, by_position))


def mean_cosine(vectors: np.ndarray) -> Statistic:
    """Mean cosine of all pairs of different items; `vectors` `(draws, n, E)`, pairs within a draw alone.

    Two copies of an item in a resample are no pair: their cosine is 1 whatever the model.
    """
    lengths = np.linalg.norm(vectors, axis=-1, keepdims=True)
    directions = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    products = np.einsum("dne,dme->nm", directions, directions, optimize=True) / len(directions)
    np.fill_diagonal(products, 0.0)

    def statistic(weights: np.ndarray) -> np.ndarray:
        pairs = weights.sum(axis=1) ** 2 - (weights * weights).sum(axis=1)
        sums = ((weights @ products) * weights).sum(axis=1)
        return np.divide(sums, pairs, out=np.full(len(weights), np.nan), where=pairs > 0)

    return statistic


def _words(encoder: Encoder, held_out: HeldOutTexts) -> tuple[list[list[int]], list[np.ndarray]]:
    """Token ids of the texts that have two tokens or more beside special ones, and which tokens are none of these."""
    special = encoder.tokenizer.all_special_ids
    tokenized = TextTokenizer(encoder.tokenizer, encoder.max_length)(held_out.texts, [""] * len(held_out.texts))
    sequences, masks = [], []
    for result in tokenized:
        if isinstance(result, Tokenized):
            is_word = ~np.isin(result.ids, special)
            if is_word.sum() >= 2:
                sequences.append(result.ids)
                masks.append(is_word)
    if len(sequences) < 2:
        raise ValueError(f"two texts of two tokens or more are needed, {held_out.name} has {len(sequences)}")
    return sequences, masks


def _slabs(
    encoder: Encoder, sequences: Sequence[Sequence[int]], word_masks: Sequence[np.ndarray], seeds: Sequence[int]
) -> Iterator[Slab]:
    chosen = np.array(
        [
            [generator.choice(np.flatnonzero(is_word)) for is_word in word_masks]
            for generator in map(np.random.default_rng, seeds)
        ]
    )
    lengths = list(map(len, sequences))
    for places in pack(lengths, max(_SLAB_TOKENS, encoder.max_length), _SEQUENCES):
        batch = PackedBatch.from_sequences([sequences[place] for place in places], device=encoder.device)
        seqlens = torch.tensor(batch.seqlens, device=encoder.device)
        yield Slab(
            places,
            batch,
            torch.repeat_interleave(torch.arange(len(places), device=encoder.device), seqlens),
            torch.from_numpy(np.concatenate([word_masks[place] for place in places])).to(encoder.device),
            batch.cu_seqlens[:-1].long() + torch.from_numpy(chosen[:, places]).to(encoder.device),
        )


def _states(encoder: Encoder, batch: PackedBatch, windows: Sequence[Window]) -> Iterator[torch.Tensor]:
    """Each layer's states, float32 `(T, E)`."""
    for states in encoder.runner.all_hidden_states(batch, windows):
        yield states.float()


def _text_means(values: torch.Tensor, slab: Slab) -> torch.Tensor:
    """Mean over each text's words of `(words, E)`: `(texts, E)`."""
    owner = slab.text_of[slab.is_word]
    counts = torch.bincount(owner, minlength=len(slab.places))
    sums = torch.zeros(len(slab.places), values.shape[1], device=values.device).index_add_(0, owner, values)
    return sums / counts[:, None]


def _scores(
    dataset: str,
    drawn: dict[int, list[torch.Tensor]],
    within: np.ndarray,
    agreement: np.ndarray,
    by_position: np.ndarray,
) -> Iterator[Score]:
    num_texts = within.shape[1]
    for layer, parts in drawn.items():
        between = estimate(mean_cosine(torch.cat(parts, dim=1).double().numpy()), num_texts)
        yield Score(dataset, "all", "model", "anisotropy", *between, layer=layer)
    for metric, values in (("within text", within), ("readiness", agreement)):
        for layer, shares in enumerate(values):
            details = {}
            if metric == "readiness":
                sums, counts = by_position[:, layer]
                details = {"by position": (sums[counts > 0] / counts[counts > 0]).tolist()}
            interval = estimate(ratio(shares), num_texts)
            items = {"share": shares.tolist()}
            yield Score(dataset, "all", "model", metric, *interval, layer=layer, items=items, details=details)
