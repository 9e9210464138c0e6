"""Word-in-Context (Pilehvar and Camacho-Collados, NAACL 2019): whether a word means the same in two sentences.

    test.data.txt     lemma TAB part of speech TAB 4-4 TAB It was a narrow defeat . TAB The army 's only defeat .
    test.gold.txt     T or F, a line each; 4-4 are the words' places between white space, from 0 on

The fifth task of Feng et al. (arXiv 2510.01652), who probe the released test file alone. Of the word's two states u
and v a probe sees their `cosine`, their `difference` |u - v|, or both `concatenated`.

Protocols, controls and intervals are those of `semantic.py`; the word type is the lemma. Beside the probes stands the
`threshold` of the cosine that is best on the rows that a probe learns from, higher meaning T. `word alone` knows the
two forms of the word, which are most often equal: then their cosine is 1, their difference 0.

Of protocol `feng2025` hidden layers, batches and rates are the paper's, the epochs are not published and chosen here.
Its perceptron for the cosine, of 5 and 2 units, gives one class to all pairs for about half of all first weights, even
where the cosine tells everything: both units of the second layer are dead. Protocol `bivec` has 20 and 10 everywhere.
"""

import re
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch

from ..engine.encoder import Encoder
from ..texts.rows import Fault, RowError
from .folds import FOLDS, SHUFFLED, grouped_folds, random_split, without
from .probes import DEVELOPMENT, TRAIN, Kind, ProbeSettings
from .report import Score, fingerprint
from .semantic import Plan, Probing, long_enough
from .semantic_files import SemanticTask
from .states import ReadOut, Span, Words, WordStates, chosen_layers, word_states
from .sts import cosines
from .text_lines import text_lines
from .units import Scored, Unit

if TYPE_CHECKING:
    from .tasks import EvaluateSettings

NAME = "word_in_context"
FILES = ("test.data.txt", "test.gold.txt")
FEATURES = ("cosine", "difference", "concatenated")
_COLUMNS = "lemma, part of speech, i-j, sentence, sentence"

_PROBES: dict[str, ProbeSettings] = {
    "cosine": ProbeSettings((20, 10), batch_size=128, epochs=20, learning_rate=1e-2),
    "difference": ProbeSettings((20, 10), batch_size=128, epochs=15, learning_rate=3e-3),
    "concatenated": ProbeSettings((20, 10), batch_size=128, epochs=15, learning_rate=3e-3),
}
_LINEAR_RATES = {"cosine": 0.1}  # the first weight of a single feature is up to 1, far from what it must become
_published = partial(ProbeSettings, weight_decay=0.0, standardize=False, keeps_best=False)
_PUBLISHED_PROBES: dict[str, ProbeSettings] = {
    "cosine": _published((5, 2), batch_size=8, epochs=20, learning_rate=1e-3),
    "difference": _published((20, 10), batch_size=16, epochs=30, learning_rate=1e-5),
    "concatenated": _published((20, 10), batch_size=16, epochs=30, learning_rate=1.5e-5),
}


def read_units(settings: "EvaluateSettings") -> list[Unit]:
    """The unit of the task where its files are in the folder or in one within it, else none.

    Raises:
        FileNotFoundError: one of the two files is absent.
        RowError: a row is malformed, with its file and line, and none may be left out.
        ValueError: the files differ in length, stand in two places, or hold too few lemmas.
    """
    folder = Path(settings.data)
    if not folder.is_dir():
        return []
    inner = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [place for place in (folder, *inner) if any((place / name).is_file() for name in FILES)]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} both hold {FILES[0]}: name the folder of one")
    if not found:
        return []
    task = read_task(found[0], settings.on_error)
    used = fingerprint(task.texts, np.array(task.spans).ravel(), task.types, task.targets.ravel())
    return [Unit(NAME, used, partial(_score, task, _roles(task, settings), settings))]


def read_task(folder: Path, on_error: Literal["fail", "skip"] = "fail") -> SemanticTask:
    """The pairs of a folder's two files: `texts` and `spans` are the 2 N first and then second sentences; types and
    targets `(1, N)`, 1 for T, are the pairs'. Errors as of `read_units`.
    """
    data, gold = (folder / name for name in FILES)
    for path in (data, gold):
        if not path.is_file():
            raise FileNotFoundError(f"{folder} must hold {' and '.join(FILES)}, and has no {path.name}")
    rows, labels = list(_lines(data)), list(_lines(gold))
    if len(rows) != len(labels):
        raise ValueError(f"{gold} must have a line for each of {data}'s {len(rows):,}, got {len(labels):,}")
    pairs: list[tuple[str, list[tuple[str, Span]], int]] = []
    num_bad = 0
    for number, (row, label) in enumerate(zip(rows, labels, strict=True), start=1):
        pair, target = _pair(row), _label(label)
        if isinstance(pair, Fault) or isinstance(target, Fault):
            path, fault = (data, pair) if isinstance(pair, Fault) else (gold, target)
            if on_error == "fail":
                raise RowError(f"{path}:{number}: {fault}")
            num_bad += 1
        else:
            pairs.append((*pair, target))
    if not pairs:
        raise ValueError(f"{data}: no labelled pair stands in it")
    lemmas, places, targets = zip(*pairs, strict=True)
    sides = [side for half in zip(*places, strict=True) for side in half]
    return SemanticTask(
        NAME,
        "pairs",
        [text for text, _ in sides],
        [[span] for _, span in sides],
        np.array(lemmas),
        np.array([targets], dtype=np.int64),
        2,
        None,
        {"bad rows left out": num_bad} if num_bad else {},
    )


def _pair(row: str | Fault) -> tuple[str, list[tuple[str, Span]]] | Fault:
    """Lemma, and both sentences with the word's place."""
    if isinstance(row, Fault):
        return row
    fields = row.split("\t")
    if len(fields) != 5:
        return Fault(f"5 fields between tabs are needed ({_COLUMNS}), got {len(fields)}")
    lemma, _, places, *sentences = fields
    match = re.fullmatch(r"(\d+)-(\d+)", places)
    if match is None:
        return Fault(f"the words' places must be two numbers, as 4-4, got {places!r}")
    if not lemma.strip():
        return Fault("the lemma is empty")
    found = []
    for sentence, place in zip(sentences, map(int, match.groups()), strict=True):
        words = [word.span() for word in re.finditer(r"\S+", sentence)]
        if place >= len(words):
            return Fault(f"a word's place must be below {len(words)}, its sentence's number of words, got {place}")
        found.append((sentence, words[place]))
    return lemma.strip().lower(), found


def _label(line: str | Fault) -> int | Fault:
    if isinstance(line, Fault) or line.strip() in ("T", "F"):
        return line if isinstance(line, Fault) else int(line.strip() == "T")
    return Fault(f"the label must be T or F, got {line.strip()!r}")


def _lines(path: Path) -> list[str | Fault]:
    texts = [text for _, text in text_lines(path)]
    while texts and not texts[-1].strip():
        texts.pop()
    return texts


def _roles(task: SemanticTask, settings: "EvaluateSettings") -> np.ndarray:
    """int8 `(S, F, N)`: folds by lemma, or the published split."""
    if settings.protocol == "feng2025":
        return np.repeat(random_split(len(task.types))[None], settings.seeds, axis=0)
    if settings.protocol != "bivec":
        raise ValueError(f"the protocol must be bivec or feng2025, got {settings.protocol}")
    return np.stack([grouped_folds(task.types, task.targets[0], seed) for seed in range(settings.seeds)])


def _score(task: SemanticTask, roles: np.ndarray, settings: "EvaluateSettings", encoder: Encoder) -> Scored:
    is_published = settings.protocol == "feng2025"
    layers, read_outs = chosen_layers(encoder, settings.layers), settings.read_outs
    if is_published:
        layers = layers[-1:] if settings.layers == "last" else layers
        read_outs = ("token",) if settings.read_out is None else read_outs
    in_context = word_states(
        encoder, Words(task.texts, task.spans), layers, settings.sub_tokens, progress=f"{NAME}: texts"
    )
    forms = [text[slice(*span)] for text, (span,) in zip(task.texts, task.spans, strict=True)]
    vocabulary, row_of = np.unique(forms, return_inverse=True)
    alone = word_states(encoder, Words.of_sentences([[str(form)] for form in vocabulary]), layers, settings.sub_tokens)
    sides, sides_alone = (rows.reshape(2, -1) for rows in (np.arange(len(forms)), row_of))

    is_unread = (~in_context.is_read.reshape(2, -1)).any(axis=0)
    if is_unread.all():
        raise ValueError(f"{NAME}: every pair has a word that is cut off or has no token; --max-length must reach it")
    roles = without(roles, np.asarray(is_unread))
    split = "random fifth" if is_published else f"{FOLDS} folds by word type"
    scores: list[Score] = []
    for feature in FEATURES:
        probes: dict[Kind, ProbeSettings] = {
            "linear": long_enough(_linear(feature), len(task.types)),
            "mlp": long_enough((_PUBLISHED_PROBES if is_published else _PROBES)[feature], len(task.types)),
        }
        plan = Plan(roles, split, probes, 42 if is_published else 0)
        probing = Probing(task, plan, f"{NAME} {feature}")
        for layer, read_out in product(layers, read_outs):
            states = features(in_context, sides, layer, read_out, feature)
            probing.read(("model", SHUFFLED) if layer == layers[-1] else ("model",), states, layer, read_out)
            if feature == "cosine":
                answers = by_threshold(states[:, 0].numpy(), task.targets[0], roles.reshape(-1, len(task.types)))
                probing.answer("model", answers, probe="threshold", layer=layer, read_out=read_out)
        for layer in layers:
            probing.read(("word alone",), features(alone, sides_alone, layer, "token", feature), layer, "token")
        scores += probing.scores()
    counts = task.counts | {"pairs with a word that is cut off or has no token": int(is_unread.sum())}
    return Scored(scores, notes=[f"{NAME}: {number:,} {what}" for what, number in counts.items() if number])


def _linear(feature: str) -> ProbeSettings:
    settings = _PROBES[feature]
    return replace(settings, hidden=(), learning_rate=_LINEAR_RATES.get(feature, settings.learning_rate))


def features(states: WordStates, sides: np.ndarray, layer: int, read_out: ReadOut, feature: str) -> torch.Tensor:
    """What a probe sees of N pairs, float32 `(N, 1)`, `(N, E)` or `(N, 2 E)`; `sides` `(2, N)` are the words' rows."""
    vectors = states.vectors(layer, read_out).float()
    first, second = (vectors[rows] for rows in sides)
    if feature == "cosine":
        return torch.from_numpy(cosines(first.numpy(), second.numpy())).float()[:, None]
    return (first - second).abs() if feature == "difference" else torch.cat([first, second], dim=1)


def by_threshold(similarities: np.ndarray, gold: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """Classes `(P, N)` by the threshold that makes most of each probe's training and development rows right.

    It lies between two of their similarities, or beside all: at the least of those that are equally good.

    Args:
        similarities: `(N,)`, higher for class 1.
        gold: int `(N,)` of 0 and 1.
        roles: `(P, N)`.
    """
    answers = np.empty(roles.shape, dtype=np.int64)
    for place, its_roles in enumerate(roles):
        is_known = (its_roles == TRAIN) | (its_roles == DEVELOPMENT)
        values, owner = np.unique(similarities[is_known], return_inverse=True)
        gains = np.bincount(owner, weights=1 - 2 * gold[is_known])  # of a threshold above these values
        best = int(np.concatenate([[0], gains.cumsum()]).argmax())
        bounds = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
        answers[place] = similarities > bounds[best]
    return answers
