"""Spans of tagged sentences, and how well predicted ones agree with the true ones.

Tags are `O` or a prefix and a type: `B-` begins a span, `I-` and `E-` go on, `E-` ends it, `S-` is one of its own. A
span also begins where an `I-` or `E-` follows `O`, another type or an ended span, so that IOB1, IOB2 and IOBES are all
read: the rules of conlleval (Tjong Kim Sang and Buchholz, CoNLL-2000), as of seqeval's default mode.
"""

from collections.abc import Sequence

import numpy as np

Span = tuple[str, int, int]  # its type, its first word, and one behind its last


def spans(tags: Sequence[str]) -> set[Span]:
    """The spans of a sentence."""
    found: set[Span] = set()
    kind, begin, prefix = "", 0, "O"
    for place, tag in enumerate([*tags, "O"]):
        its_prefix, its_kind = tag[0], tag[2:]
        begins = its_prefix != "O" and (its_prefix in "BS" or prefix in "OES" or its_kind != kind)
        if prefix != "O" and (its_prefix == "O" or begins):
            found.add((kind, begin, place))
        if begins:
            begin = place
        kind, prefix = its_kind, its_prefix
    return found


def agreement(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> tuple[np.ndarray, np.ndarray]:
    """Twice the spans that are right, and the true ones plus the predicted ones, of each sentence; int64 `(n,)`.

    The sum of the first over the sum of the second is F1 = 2 tp / (2 tp + fp + fn).
    """
    counts = []
    for sentence, its_predicted in zip(gold, predicted, strict=True):
        true, found = spans(sentence), spans(its_predicted)
        counts.append((2 * len(true & found), len(true) + len(found)))
    over, under = np.array(counts, dtype=np.int64).reshape(-1, 2).T
    return over, under
