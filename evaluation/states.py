"""Hidden states of words within texts: one packed pass a text, which keeps the layers that a task reads.

A word is a run of characters; its tokens are those that hold one of its characters and more than white space. Its
vector is their states' mean, or the first's or the last's. It is read out

- at the `token` itself,
- at the `previous` position, where masked next-token prediction puts what it knows of a token (BehnamGhader et al.,
  arXiv 2404.05961, section 4.1: of the tokens BOS t11 t12 t21 the word t11 t12 is the mean of BOS and t11), or
- at `both`, concatenated.

A word without a token (cut off by `max_length`, or dropped by the tokenizer) has zeros, and `is_read` says so; so has
the previous position of a text's first token where the tokenizer adds no BOS. Texts have no prompt and no template.
Layer 0 is the embeddings, which know a word and nothing of its context; the last layer's states are after the final
norm.

Shapes: N words of all texts, L chosen layers, E hidden size.
"""

import shutil
import tempfile
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from ..engine.encoder import Encoder
from ..engine.memory import free_memory
from ..engine.packing import PackedBatch
from ..engine.tokens import TextTokenizer, Tokenized

ReadOut = Literal["token", "previous", "both"]
SubTokens = Literal["mean", "first", "last"]
Layers = Literal["last", "all"]
READ_OUTS: tuple[ReadOut, ...] = ("token", "previous", "both")

Span = tuple[int, int]  # of characters: the first, and one behind the last


class Words(NamedTuple):
    """Words within texts.

    Attributes:
        texts: each of them once.
        spans: a text's words, as characters `(begin, end)`; the words of all texts in this order are the N words.
    """

    texts: list[str]
    spans: list[list[Span]]

    @classmethod
    def of_sentences(cls, sentences: Sequence[Sequence[str]]) -> "Words":
        """All words of sentences that are divided already; a space joins them."""
        texts, spans = [], []
        for words in sentences:
            ends = np.cumsum([len(word) + 1 for word in words])
            texts.append(" ".join(words))
            spans.append([(int(end) - 1 - len(word), int(end) - 1) for word, end in zip(words, ends, strict=True)])
        return cls(texts, spans)


class WordStates:
    """Vectors of N words in some layers.

    Attributes:
        layers: those that were kept.
        is_read: bool `(N,)`, false for words that have no token.
        has_previous: bool `(N,)`, whether a token stands before the word's first.
    """

    def __init__(self, layers: tuple[int, ...], is_read: np.ndarray, has_previous: np.ndarray, states: torch.Tensor):
        self.layers, self.is_read, self.has_previous = layers, is_read, has_previous
        self._states = states  # (L, N, 2, E): at the token, at the position before

    def __len__(self) -> int:
        return self._states.shape[1]

    def vectors(self, layer: int, read_out: ReadOut) -> torch.Tensor:
        """`(N, E)`, `(N, 2 E)` for `both`, on the CPU in the encoder's dtype; a view that may lie in a file."""
        states = self._states[self.layers.index(layer)]
        return states.flatten(1) if read_out == "both" else states[:, READ_OUTS.index(read_out)]


def chosen_layers(encoder: Encoder, layers: Layers) -> tuple[int, ...]:
    """The embeddings, as a control without context, and the last layer; or all."""
    last = encoder.config.num_hidden_layers
    return (0, last) if layers == "last" else tuple(range(last + 1))


def word_states(
    encoder: Encoder, words: Words, layers: Sequence[int], sub_tokens: SubTokens = "mean", *, progress: str = ""
) -> WordStates:
    """Run all texts once and keep the words' states.

    Args:
        progress: what a progress bar on a terminal is called.
    Raises:
        ValueError: a text cannot be tokenised, with its place and the reason.
    """
    return _states(encoder, *_locate(encoder, words, sub_tokens), layers, progress)


def split_word_states(
    encoder: Encoder, sentences: Sequence[Sequence[str]], layers: Sequence[int], max_length: int, *, progress: str = ""
) -> WordStates:
    """As `word_states`, of sentences whose words are tokenised one by one (`is_split_into_words` in transformers).

    Args:
        max_length: in tokens.
    """
    tokenizer = TextTokenizer(encoder.tokenizer, max_length)
    tokenized, spans = [], []
    for (ids, owners), words in zip(tokenizer.of_words(sentences), sentences, strict=True):
        tokenized.append(Tokenized(ids, 0))
        pairs = [pair for pair in enumerate(owners) if pair[1] is not None]
        places, words_of = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        found, firsts, counts = np.unique(words_of, return_index=True, return_counts=True)
        spans.append(np.zeros((len(words), 2), dtype=np.int64))
        spans[-1][found] = np.stack([places[firsts], places[firsts] + counts], axis=1)
    return _states(encoder, tokenized, spans, layers, progress)


def _states(
    encoder: Encoder,
    tokenized: Sequence[Tokenized],
    token_spans: Sequence[np.ndarray],
    layers: Sequence[int],
    progress: str,
) -> WordStates:
    """Run texts; `token_spans` int64 `(words, 2)` are a word's first token and one behind its last, equal for none."""
    counts = [len(spans) for spans in token_spans]
    bounds = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
    size = encoder.config.hidden_size
    states = room((len(layers), int(bounds[-1]), 2, size), encoder.dtype)
    firsts, ends = np.concatenate([np.zeros((0, 2), dtype=np.int64), *token_spans]).T
    is_read = firsts < ends
    rows = [row for row in range(len(tokenized)) if is_read[bounds[row] : bounds[row + 1]].any()]

    @torch.no_grad()  # of the thread that runs it
    def run(slab: list[int], batch: PackedBatch) -> int:
        its_spans = [token_spans[rows[index]] for index in slab]
        word_rows, *gathering = _gathering(its_spans, [int(bounds[rows[index]]) for index in slab], batch.seqlens)
        places, shares, owners = (tensor.to(encoder.device) for tensor in gathering)
        found = encoder.runner.all_hidden_states(batch)
        for layer, hidden_states in enumerate(found):
            if layer in layers:
                read = torch.zeros(2 * len(word_rows), size, device=encoder.device)
                read.index_add_(0, owners, hidden_states.index_select(0, places).float().mul_(shares[:, None]))
                states[layers.index(layer), word_rows] = read.view(-1, 2, size).to(encoder.dtype).cpu()
        return len(slab)

    with tqdm(total=len(rows), unit="text", desc=progress, disable=None, leave=False) as bar:
        for num_texts in encoder.slabs.map(run, [tokenized[row] for row in rows]):
            bar.update(num_texts)
    return WordStates(tuple(layers), is_read, is_read & (firsts > 0), states)


def room(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Zeros in memory, or in an unnamed file of the temporary folder where half of the free memory is too little.

    Raises:
        ValueError: the folder's disk has no room either.
    """
    elements = int(np.prod(shape))
    size = elements * dtype.itemsize
    if 2 * size <= free_memory():
        return torch.zeros(*shape, dtype=dtype)
    folder = tempfile.gettempdir()
    if size > shutil.disk_usage(folder).free:  # writing to the mapped file would end the process
        raise ValueError(
            f"the states of {shape[1]:,} words in {shape[0]} layers need {size / 2**30:.1f} GiB, more than there is in "
            f"memory or in {folder}: read fewer layers, or set TMPDIR to a larger disk"
        )
    with tempfile.NamedTemporaryFile() as file:  # whose memory stays mapped when its name is gone
        return torch.from_file(file.name, shared=True, size=elements, dtype=dtype).view(*shape)


def _locate(encoder: Encoder, words: Words, sub_tokens: SubTokens) -> tuple[list[Tokenized], list[np.ndarray]]:
    """The texts' tokens, and each word's tokens among them."""
    tokenizer = TextTokenizer(encoder.tokenizer, encoder.max_length)
    tokenized, spans = [], []
    found = tokenizer.with_offsets(words.texts)
    for (ids, offsets), text, its_words in zip(found, words.texts, words.spans, strict=True):
        tokenized.append(Tokenized(ids, 0))
        begins, ends = np.array(offsets, dtype=np.int64).reshape(-1, 2).T
        # a token that is white space alone is no word's, though it may lie within one
        num_visible = np.cumsum([0, *(not character.isspace() for character in text)])
        places = np.flatnonzero(num_visible[ends] > num_visible[begins])
        word_begins, word_ends = np.array(its_words, dtype=np.int64).reshape(-1, 2).T
        # tokens stand in the text's order, so that those that hold a character of a word are neighbours
        firsts = np.searchsorted(ends[places], word_begins, side="right")
        behind = np.searchsorted(begins[places], word_ends, side="left")
        has_token = (firsts < behind) & (word_begins < word_ends)
        places = np.append(places, 0)  # for words behind the last token
        firsts, lasts = places[firsts], places[behind - 1]
        if sub_tokens == "first":
            lasts = firsts
        elif sub_tokens == "last":
            firsts = lasts
        spans.append(np.stack([firsts, lasts + 1], axis=1) * has_token[:, None])
    return tokenized, spans


def _gathering(
    token_spans: Sequence[np.ndarray], first_rows: Sequence[int], seqlens: Sequence[int]
) -> tuple[torch.Tensor, ...]:
    """How a slab's states become words': the rows of the words that are read, and of each state that is added its place
    in the slab, its share, and where it is added: at twice the word's place among these rows, one more for the
    previous position. All int64 but the shares, float32.
    """
    counts = [len(spans) for spans in token_spans]
    rows = _ranges(np.array(first_rows), np.array(counts))
    spans = np.concatenate(token_spans)
    starts = np.repeat(np.cumsum([0, *seqlens])[:-1], counts)
    is_read = spans[:, 0] < spans[:, 1]
    rows, starts, spans = rows[is_read], starts[is_read], spans[is_read]
    parts = []
    for shift in (0, 1):
        begins = np.maximum(spans[:, 0] - shift, 0)
        lengths = spans[:, 1] - shift - begins
        shares = np.repeat(1.0 / np.maximum(lengths, 1), lengths).astype(np.float32)
        parts.append((_ranges(starts + begins, lengths), shares, np.repeat(2 * np.arange(len(rows)) + shift, lengths)))
    gathered = [torch.from_numpy(np.concatenate(columns)) for columns in zip(*parts, strict=True)]
    return torch.from_numpy(rows), *gathered


def _ranges(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The whole numbers of many ranges, one after the other."""
    return np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
