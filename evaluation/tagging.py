"""Tags of words from their frozen states: chunks, parts of speech, named entities.

A linear probe reads one layer's states of a word (see states.py) and gives its tag. Token accuracy is the share of
words whose tag is right, `O` too; of chunks and entities span F1 says how many spans are right (see spans.py).
Intervals are over sentences, of the mean over seeds.

The protocol `bivec` trains on standardised states, chooses the epoch on the development part (a tenth of the training
sentences where the data set has none, or where the development split is what is scored), and scores every word: one
that the tokenizer drops or `max_length` cuts off has a state of zeros. Beside the model stand the tag that each word
most often has in the training split, and a probe of the last layer whose training labels are shuffled.

The protocol `llm2vec` is the published one with its faults (BehnamGhader et al., arXiv 2404.05961, section 4, and
experiments/run_word_task.py and test_word_task.py in McGill-NLP/llm2vec): each word is tokenised by itself, a head in
bfloat16 is trained by AdamW in bfloat16 on raw states of the last layer, 8 sentences a step, at a rate that would fall
to zero in 10 epochs; training is stopped at 4,000 steps and step 3,000 is tested, chosen on nothing; one seed, 42;
dropout of .1 is active in the test; words behind token 512 are not scored, nor is a text's first word where the state
before it is read and the tokenizer adds no BOS. Only token accuracy is published. Two faults cannot be had: LoRA's
dropout while the head is trained (here the adapters are merged), and the head of another model that
Llama2-bi-mntp-simcse.json tests.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from ..engine.encoder import Encoder
from .bad_rows import OnError
from .folds import SHUFFLED
from .probes import DEVELOPMENT, TEST, TRAIN, UNUSED, ProbeSettings, Problem, train_and_predict
from .report import Score
from .spans import agreement, spans
from .splits import Split
from .states import READ_OUTS, Layers, ReadOut, SubTokens, Words, chosen_layers, split_word_states, word_states
from .tagged_files import TaggedSentences, Tags, read_folder
from .units import Scored

TOKEN_ACCURACY, SPAN_F1 = "token accuracy", "span F1"
MOST_FREQUENT = "most frequent tag"

# chosen on a tenth of CoNLL-2000's training sentences: ten epochs at 1e-2 gain .002 to .004 in three times the time
_PROBE = ProbeSettings(epochs=3, batch_size=512, learning_rate=2e-2)
_LEAST_STEPS = 600  # of small data sets, for which an epoch is a few
_LLM2VEC_PROBE = ProbeSettings(
    batch_size=8,
    epochs=10,
    last_step=3000,
    learning_rate=5e-4,
    weight_decay=0.0,
    max_grad_norm=1.0,
    dropout=0.1,
    drops_at_test=True,
    standardize=False,
    keeps_best=False,
    dtype=torch.bfloat16,
)
_LLM2VEC_SEED, _LLM2VEC_LENGTH = 42, 512


class TaggingSettings(NamedTuple):
    """Which states are probed, and how often.

    Attributes:
        seeds: of the protocol `bivec`.
        read_outs: None for the protocol's own: all, or for `llm2vec` what the model was trained for.
    """

    protocol: Literal["bivec", "llm2vec"]
    layers: Layers
    read_outs: tuple[ReadOut, ...] | None
    sub_tokens: SubTokens
    seeds: Sequence[int]


class TaggingTask(NamedTuple):
    """A data set's sentences of all parts, one after the other.

    Attributes:
        split: that is scored.
        roles: int8 `(sentences,)`, what each is to a probe.
        left_out: malformed sentences of each split that has some.
    """

    name: str
    kind: Tags
    split: Split
    words: list[list[str]]
    tags: list[list[str]]
    roles: np.ndarray
    left_out: dict[str, int]

    @property
    def word_roles(self) -> np.ndarray:
        """int8 `(N,)` of all words."""
        return np.repeat(self.roles, [len(words) for words in self.words])

    def of(self, role: int, sentences: Sequence[list[str]]) -> list[list[str]]:
        """The words or tags of the sentences with a role."""
        return [values for values, its_role in zip(sentences, self.roles, strict=True) if its_role == role]


def read_tasks(folder: Path, kind: Tags, split: Split, on_error: OnError = "fail") -> list[TaggingTask]:
    """Every data set in `folder` that has such tags and the split.

    Raises:
        FileNotFoundError: there is none, or one has no training split.
        ValueError: no data set has such tags, or a sentence is malformed, with its file and line.
    """
    tasks = []
    for name, parts in read_folder(folder, kind, {"train", "dev", split}, on_error).items():
        if split not in parts:
            continue
        if "train" not in parts:
            raise FileNotFoundError(f"no training split of {name} in {folder}, which a probe is trained on")
        tasks.append(_task(name, kind, split, parts))
    if not tasks:
        raise FileNotFoundError(f"no data set in {folder} has a {split} split")
    return tasks


def _task(name: str, kind: Tags, split: Split, parts: dict[str, TaggedSentences]) -> TaggingTask:
    train, scored = parts["train"], parts[split]
    roles = np.full(len(train.words), TRAIN, dtype=np.int8)
    used = [train, scored]
    if split == "dev" or "dev" not in parts:
        roles[9::10] = DEVELOPMENT
        if not (roles == DEVELOPMENT).any():
            raise ValueError(f"{name}: 10 training sentences are needed where one in 10 chooses the epoch")
    else:
        used.insert(1, parts["dev"])
        roles = np.append(roles, np.full(len(parts["dev"].words), DEVELOPMENT, dtype=np.int8))
    roles = np.append(roles, np.full(len(scored.words), TEST, dtype=np.int8))
    return TaggingTask(
        name,
        kind,
        split,
        [words for part in used for words in part.words],
        [tags for part in used for tags in part.tags],
        roles,
        {name: part.left_out for name, part in parts.items() if part.left_out},
    )


def score(task: TaggingTask, settings: TaggingSettings, encoder: Encoder) -> Scored:
    """Every layer's and read-out's figures by the protocol, and the controls'."""
    scores = (_score if settings.protocol == "bivec" else _score_as_llm2vec)(task, settings, encoder)
    lost = ", ".join(f"{count:,} of {split}" for split, count in task.left_out.items())
    return Scored(scores, notes=[f"{task.name}: malformed sentences are left out, {lost}"] if lost else [])


def _score(task: TaggingTask, settings: TaggingSettings, encoder: Encoder) -> list[Score]:
    lost = {"sentences left out": task.left_out} if task.left_out else {}
    scores = _scores(task, MOST_FREQUENT, [_most_frequent_tags(task)], details=lost)
    layers = chosen_layers(encoder, settings.layers)
    words = Words.of_sentences(task.words)
    states = word_states(encoder, words, layers, settings.sub_tokens, progress=task.name)
    roles = task.word_roles
    details = {"words without a token": int((~states.is_read[roles == TEST]).sum())} | lost
    steps_an_epoch = -(-int((roles == TRAIN).sum()) // _PROBE.batch_size)
    probe = replace(_PROBE, epochs=max(_PROBE.epochs, -(-_LEAST_STEPS // steps_an_epoch)))
    for layer in layers:
        for read_out in settings.read_outs or READ_OUTS:
            systems = ("model", SHUFFLED) if layer == layers[-1] else ("model",)
            predicted: dict[str, list[np.ndarray]] = {system: [] for system in systems}
            for seed in settings.seeds:
                name = f"{task.name}, layer {layer}, {read_out}, seed {seed}"
                count = len(systems) if seed == settings.seeds[0] else 1
                found = _probe(task, states.vectors(layer, read_out), roles, probe, seed, count, name)
                for system, tags in zip(systems, found, strict=False):  # labels are shuffled once
                    predicted[system].append(tags)
            for system, each_seeds in predicted.items():
                its_place: dict[str, Any] = {"layer": layer, "read_out": read_out, "probe": "linear"}
                scores += _scores(task, system, each_seeds, details=details, **its_place)
    return scores


def _score_as_llm2vec(task: TaggingTask, settings: TaggingSettings, encoder: Encoder) -> list[Score]:
    """Token accuracy by the protocol `llm2vec`, whose probe is `linear, llm2vec`."""
    own: ReadOut = "previous" if encoder.checkpoint.description.readout_shift else "token"
    layers = chosen_layers(encoder, settings.layers)
    layers = layers[-1:] if settings.layers == "last" else layers
    max_length = min(_LLM2VEC_LENGTH, encoder.max_length)
    states = split_word_states(encoder, task.words, layers, max_length, progress=task.name)
    sentences = np.repeat(np.arange(len(task.words)), [len(words) for words in task.words])
    scores = []
    for layer in layers:
        for read_out in settings.read_outs or (own,):
            has_label = states.is_read if read_out == "token" else states.is_read & states.has_previous
            roles = np.where(has_label, task.word_roles, UNUSED)
            name = f"{task.name}, layer {layer}, {read_out}"
            vectors = states.vectors(layer, read_out)
            (predicted,) = _probe(task, vectors, roles, _LLM2VEC_PROBE, _LLM2VEC_SEED, 1, name, groups=sentences)
            is_scored = has_label[task.word_roles == TEST]
            details: dict[str, Any] = {"words whose label is lost": int((~is_scored).sum())}
            if task.left_out:
                details["sentences left out"] = task.left_out
            its_place: dict[str, Any] = {"layer": layer, "read_out": read_out, "probe": "linear, llm2vec"}
            scores += _scores(task, "model", [predicted], is_scored=is_scored, details=details, **its_place)
    return scores


def _probe(
    task: TaggingTask,
    vectors: torch.Tensor,
    roles: np.ndarray,
    settings: ProbeSettings,
    seed: int,
    count: int,
    name: str,
    groups: np.ndarray | None = None,
) -> np.ndarray:
    """Tags str `(count, scored words)` that a probe gives, and a second one whose training labels are shuffled."""
    tags = np.array(_flat(task.tags))
    kinds = np.unique(tags[roles == TRAIN])
    places = {tag: place for place, tag in enumerate(kinds)}
    labels = np.array([places.get(tag, -1) for tag in tags])
    # what is never trained on is never answered, and so chooses no epoch
    roles = np.where((labels < 0) & (roles == DEVELOPMENT), UNUSED, roles)
    targets = np.tile(labels, (count, 1))
    is_train = roles == TRAIN
    for shuffled in targets[1:]:
        shuffled[is_train] = np.random.default_rng(seed).permutation(shuffled[is_train])
    each_roles = torch.from_numpy(np.tile(roles.astype(np.int8), (count, 1)))
    problem = Problem(torch.from_numpy(targets), each_roles, len(kinds), groups)
    predicted = train_and_predict(vectors, problem, settings, seed, progress=name)
    # words that are not scored get any tag
    return kinds[predicted[:, task.word_roles == TEST]]


def _flat(sentences: Sequence[Sequence[str]]) -> list[str]:
    return [value for values in sentences for value in values]


def _most_frequent_tags(task: TaggingTask) -> np.ndarray:
    """The tag that each scored word most often has in training, of equal ones the first; an unknown word's is all's."""
    tags_of: dict[str, Counter[str]] = defaultdict(Counter)
    words, tags = (_flat(task.of(TRAIN, values)) for values in (task.words, task.tags))
    for word, tag in zip(words, tags, strict=True):
        tags_of[word][tag] += 1
    ((overall, _),) = Counter(tags).most_common(1)
    best = {word: counts.most_common(1)[0][0] for word, counts in tags_of.items()}
    return np.array([best.get(word, overall) for word in _flat(task.of(TEST, task.words))])


def _scores(
    task: TaggingTask,
    system: str,
    predicted: Sequence[np.ndarray],
    *,
    is_scored: np.ndarray | None = None,
    details: dict[str, Any],
    **place: Any,
) -> list[Score]:
    """Token accuracy and, of all words of spans, span F1; `predicted` are each seed's tags `(scored words,)`."""
    true = task.of(TEST, task.tags)
    gold = np.array(_flat(true))
    begins = np.cumsum([0, *map(len, true)])[:-1]
    is_counted = np.ones(len(gold), dtype=bool) if is_scored is None else is_scored
    right = np.array([(tags == gold) & is_counted for tags in predicted])
    details = details | {"sentences": len(true)}

    def scored(metric: str, items: Mapping[str, np.ndarray], n: int, each: Sequence[float]) -> Score:
        its_details = details | {f"{metric} of each seed": list(each)}
        return Score.of_items(task.name, task.split, system, metric, dict(items), n=n, details=its_details, **place)

    over, under = (np.add.reduceat(values, begins) for values in (right.mean(axis=0), is_counted.astype(float)))
    count = int(is_counted.sum())
    accuracy = scored(TOKEN_ACCURACY, {"over": over, "under": under}, count, right.sum(axis=1) / count)
    if task.kind == "pos" or is_scored is not None:
        return [accuracy]
    items: dict[str, np.ndarray] = {}
    each = []
    for seed, tags in enumerate(predicted):
        over, under = agreement(true, [list(its_tags) for its_tags in np.split(tags, begins[1:])])
        items |= {f"over {seed}": over, f"under {seed}": under}
        each.append(over.sum() / max(under.sum(), 1))
    return [accuracy, scored(SPAN_F1, items, sum(len(spans(tags)) for tags in true), each)]
