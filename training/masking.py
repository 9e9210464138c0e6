"""Which tokens masked next-token prediction (MNTP; BehnamGhader et al., arXiv 2404.05961) hides, and what for.

`T` packed tokens, `K` chosen ones.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import transformers

from ..engine.tokens import Tokenized
from .batches import random_words

MaskStyle = Literal["bert", "all_mask"]
MASK_STYLES = ("bert", "all_mask")


class MaskedTokens(NamedTuple):
    """Corrupted sequences, and where their chosen tokens are predicted.

    Attributes:
        sequences: as given, with chosen tokens replaced.
        read_rows: int64 `(K,)`, in increasing order: the row, among the packed tokens of `sequences`, of the token
            before each chosen one, from which it is predicted.
        targets: int64 `(K,)`, what the chosen tokens were.
    """

    sequences: list[Tokenized]
    read_rows: torch.Tensor
    targets: torch.Tensor


def mask_tokens(
    sequences: Sequence[Tokenized],
    *,
    probability: float,
    style: MaskStyle,
    mask_token: int,
    special: frozenset[int],
    vocab_size: int,
    seed: int,
    step: int,
    rows: Sequence[int],
) -> MaskedTokens:
    """Choose each token with `probability` and hide it; at least one in every sequence that has a candidate.

    Candidates are all tokens but special ones and the first, before which there is none to predict it from. What is
    chosen in a sequence depends on `seed`, `step`, its row and its tokens, never on its neighbours.

    Args:
        probability: above 0, at most 1.
        style: what a chosen token becomes. `bert`: with 80 % the mask token, with 10 % any token of the vocabulary that
            is not special, with 10 % it stays. `all_mask`: the mask token.
        special: ids that are never chosen and never put in a token's place.
        seed, step: at least 0.
        rows: the row of each sequence in its data set.
    Raises:
        ValueError: naming the argument that breaks these rules.
    """
    _check(sequences, probability, style, mask_token, vocab_size, rows)
    lengths = np.array([len(sequence.ids) for sequence in sequences], dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    tokens = np.array([token for sequence in sequences for token in sequence.ids], dtype=np.int64)
    specials = np.array(sorted(token for token in special if 0 <= token < vocab_size), dtype=np.int64)
    words = np.concatenate(
        [
            np.empty((3, 0), dtype=np.uint64),
            *(
                random_words(3 * length, seed, step, row).reshape(3, length)
                for length, row in zip(lengths.tolist(), rows, strict=True)
            ),
        ],
        axis=1,
    )
    draws, kinds = (words[:2] >> np.uint64(11)) * 2.0**-53  # in [0, 1)

    draws[np.isin(tokens, specials)] = np.inf
    draws[starts[lengths > 0]] = np.inf
    chosen = draws < probability
    for start, length in zip(starts.tolist(), lengths.tolist(), strict=True):
        own = slice(start, start + length)
        if not chosen[own].any() and length:
            least = start + int(draws[own].argmin())
            chosen[least] = draws[least] < 1  # none is a candidate if all are infinite

    corrupted = np.where(chosen, mask_token, tokens)
    if style == "bert":
        ordinary = words[2] % np.uint64(vocab_size - len(specials))  # its place among the tokens that are not special
        ordinary = ordinary.astype(np.int64)
        ordinary += np.searchsorted(specials - np.arange(len(specials)), ordinary, side="right")
        replaced = chosen & (kinds >= 0.8)
        corrupted = np.where(replaced, np.where(kinds < 0.9, ordinary, tokens), corrupted)
    places = np.flatnonzero(chosen)
    ids = corrupted.tolist()
    return MaskedTokens(
        [
            sequence._replace(ids=ids[start : start + length])
            for sequence, start, length in zip(sequences, starts.tolist(), lengths.tolist(), strict=True)
        ],
        torch.from_numpy(places - 1),
        torch.from_numpy(tokens[places]),
    )


def mask_token_id(tokenizer: transformers.PreTrainedTokenizerBase, mask_token: str = "_") -> int:
    """The id of the vocabulary item that hides a token; `_`, an ordinary one, is LLM2Vec's for every model.

    As there, `mask_token` is an item as the vocabulary writes it, not a text to tokenise (which may give `▁_`). Where
    it is a character that the vocabulary has as a byte alone, it is that byte (`<0x5F>` for `_`).

    Raises:
        ValueError: the vocabulary has no such item.
    """
    vocabulary = tokenizer.get_vocab()
    byte = f"<0x{ord(mask_token):02X}>" if len(mask_token) == 1 and mask_token.isascii() else mask_token
    for item in (mask_token, byte):
        if item in vocabulary:
            return vocabulary[item]
    special = set(tokenizer.all_special_tokens)
    rare = max((item for item in vocabulary if item not in special), key=lambda item: vocabulary[item], default="")
    raise ValueError(
        f"mask_token must be one item of the tokenizer's vocabulary, got {mask_token!r}: "
        f"pass an ordinary one that texts seldom hold, as {rare!r}"
    )


def _check(
    sequences: Sequence[Tokenized],
    probability: float,
    style: str,
    mask_token: int,
    vocab_size: int,
    rows: Sequence[int],
) -> None:
    if not 0 < probability <= 1:
        raise ValueError(f"probability must be above 0 and at most 1, got {probability}")
    if style not in MASK_STYLES:
        raise ValueError(f"style must be one of {', '.join(MASK_STYLES)}, got {style!r}")
    if not 0 <= mask_token < vocab_size:
        raise ValueError(f"mask_token must be from 0 to {vocab_size - 1}, got {mask_token}")
    if len(rows) != len(sequences):
        raise ValueError(f"rows must name one row a sequence ({len(sequences)}), got {len(rows)}")
