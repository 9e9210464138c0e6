"""Word similarity: how well cosines of words' vectors order pairs that people have scored, alone and in context.

A word alone is a text of its own. Its vector is read at its token, at the position before it, or at both
(`states.py`). Beside the model stand

- `token average`, the mean of the word's input embeddings: no layer has been run. It is the model's own layer 0, too.
- `tfidf-characters`, which knows spelling alone: inverse document frequencies are those of the data set's own words.

In context (SCWS, Huang et al., ACL 2012) each word is read in its own context, and its score is the cosine of the two;
`word alone` are the same words without, and the model's lead over them is what the contexts are worth.

Before a text's first token stands BOS or nothing. So the previous position of a word of one token that stands alone is
the same vector for all of them in layer 0, and in every layer under a causal mask: cosines of 1, which order nothing.
Where more than half of the cosines are one and the same, a note says so; where all are, the correlation is undefined.

Pairs that share their first word are resampled together, where words repeat; those that share another are not.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ..engine.encoder import Encoder
from ..engine.tokens import TextTokenizer
from .baselines import TOKEN_AVERAGE, tfidf
from .report import Score, fingerprint
from .states import READ_OUTS, Layers, ReadOut, SubTokens, Words, WordStates, chosen_layers, word_states
from .statistics import bootstrap, clustered, correlation
from .sts import cosines
from .units import Scored, Unit
from .word_pairs import WordPairs, fitted, read_folder

METRICS = ("spearman", "pearson")
SPLIT = "all"
_DECIMALS = 9  # of cosines; what rounding leaves between equal vectors must not order them


def units(
    folder: Path,
    *,
    layers: Layers = "last",
    read_outs: Sequence[ReadOut] = READ_OUTS,
    sub_tokens: SubTokens = "mean",
    on_error: Literal["fail", "skip"] = "fail",
) -> list[Unit]:
    """A unit for each data set in `folder`.

    Raises:
        FileNotFoundError, RowError: as `read_folder`.
        ValueError: so too, or scikit-learn is absent.
    """
    found = []
    for pairs in read_folder(folder, on_error):
        spelling = tfidf("tfidf-characters", list(dict.fromkeys([*pairs.first, *pairs.second])))
        by_spelling = cosines(spelling.transform(pairs.first), spelling.transform(pairs.second))
        score = partial(_score, pairs, by_spelling, layers, tuple(read_outs), sub_tokens)
        contexts = [] if pairs.contexts is None else [*pairs.contexts.texts, *map(str, pairs.contexts.spans)]
        found.append(Unit(pairs.name, fingerprint(pairs.first, pairs.second, pairs.gold, contexts), score))
    return found


def _score(
    pairs: WordPairs,
    by_spelling: np.ndarray,
    layers: Layers,
    read_outs: Sequence[ReadOut],
    sub_tokens: SubTokens,
    encoder: Encoder,
) -> Scored:
    chosen = chosen_layers(encoder, layers)
    words = list(dict.fromkeys([*pairs.first, *pairs.second]))
    texts = Words(words, [[(0, len(word))] for word in words])
    alone = word_states(encoder, texts, chosen, sub_tokens, progress=f"{pairs.name}: words alone")
    place = {word: row for row, word in enumerate(words)}
    sides = [np.array([place[word] for word in side]) for side in (pairs.first, pairs.second)]
    facts = _facts(pairs, _num_tokens(encoder, words)[np.stack(sides)])
    systems = [_System("model", alone, sides)]
    if pairs.contexts is not None:
        contexts, facts["contexts cut to the words around"] = fitted(encoder, pairs.contexts)
        states = word_states(encoder, contexts, chosen, sub_tokens, progress=f"{pairs.name}: words in context")
        facts["pairs with a word of no token"] = int((~states.is_read.reshape(2, -1)).any(axis=0).sum())
        rows = np.arange(len(states)).reshape(2, -1)
        systems = [_System("model", states, list(rows)), _System("word alone", alone, sides)]
    scores, notes = [], [f"{pairs.name}: " + ", ".join(f"{what} {count:,}" for what, count in facts.items() if count)]
    for read_out in read_outs:
        for layer in chosen:
            found = {system.name: system.similarities(layer, read_out) for system in systems}
            scores += _compared(pairs, found, layer=layer, read_out=read_out)
            notes += _constant(pairs.name, found, f"{read_out}, layer {layer}")
    scores[0].details.update(facts)
    baselines = {TOKEN_AVERAGE: _System("", alone, sides).similarities(0, "token")} if sub_tokens == "mean" else {}
    baselines["tfidf-characters"] = by_spelling
    notes += _constant(pairs.name, baselines)
    leading = {"model": systems[0].similarities(chosen[-1], read_outs[0])}
    scores += [score for score in _compared(pairs, leading | baselines) if score.system != "model"]
    notes.append(f"{pairs.name}: leads over baselines are those of layer {chosen[-1]}, {read_outs[0]}")
    return Scored(scores, notes=notes)


class _System(NamedTuple):
    """States in which the pairs' words are read; `sides` are the rows of the first words and of the second ones."""

    name: str
    states: WordStates
    sides: list[np.ndarray]

    def similarities(self, layer: int, read_out: ReadOut) -> np.ndarray:
        vectors = self.states.vectors(layer, read_out)
        return cosines(*(vectors[side].float().numpy() for side in self.sides)).round(_DECIMALS)


def _facts(pairs: WordPairs, num_tokens: np.ndarray) -> dict[str, int]:
    """What a reader must know of the data; `num_tokens` `(2, n)` are those of the pairs' words."""
    return {
        "pairs": len(pairs.gold),
        "pairs with a word of several tokens": int((num_tokens > 1).any(axis=0).sum()),
        "pairs with a word of no token": int((num_tokens == 0).any(axis=0).sum()),
        "pairs of one word with itself": sum(map(str.__eq__, pairs.first, pairs.second)),
        "bad rows left out": pairs.num_left_out,
        "first words that are resampled, as words repeat": len(set(pairs.first)) % len(pairs.first),
    }


def _num_tokens(encoder: Encoder, words: Sequence[str]) -> np.ndarray:
    """How many tokens each word has that are more than white space, int64 `(n,)`."""
    found = TextTokenizer(encoder.tokenizer, encoder.max_length).with_offsets(words)
    return np.array(
        [
            sum(bool(word[begin:end].strip()) for begin, end in offsets)
            for word, (_, offsets) in zip(words, found, strict=True)
        ]
    )


def _compared(pairs: WordPairs, systems: dict[str, np.ndarray], **rest: Any) -> list[Score]:
    """The correlations of systems with the gold scores, each with the lead that the first has over it.

    Args:
        systems: similarities `(n,)` by name.
        rest: what else every score has.
    """
    names, clusters = np.unique(pairs.first, return_inverse=True)
    repeats = len(names) < len(clusters)
    clusters = clusters if repeats else np.arange(len(clusters))
    scores = []
    for metric in METRICS:
        statistics = [clustered(correlation(metric, pairs.gold, found), clusters)[0] for found in systems.values()]
        figures = bootstrap(statistics, len(names))
        for (system, similarities), figure in zip(systems.items(), figures, strict=True):
            items = {"gold": pairs.gold.tolist(), "similarity": similarities.tolist()}
            items |= {"cluster": clusters.tolist()} if repeats else {}
            lead = None if figure is figures[0] else figures[0].over(figure)
            about: dict[str, Any] = {"n": len(clusters), "items": items, "lead": lead} | rest
            scores.append(Score(pairs.name, SPLIT, system, metric, *figure.estimate(), **about))
    return scores


def _constant(name: str, systems: dict[str, np.ndarray], what: str = "") -> Iterator[str]:
    """A note on every system most of whose similarities are the same number."""
    for system, similarities in systems.items():
        most = int(np.unique(similarities, return_counts=True)[1].max())
        if 2 * most > len(similarities):
            same = "all" if most == len(similarities) else f"{most:,} of {len(similarities):,}"
            place = ", ".join(part for part in (name, system, what) if part)
            yield f"{place}: {same} pairs have one and the same cosine"
