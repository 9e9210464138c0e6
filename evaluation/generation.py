"""Is the model still a language model? Perplexity of held-out texts and repetition of its own, under the causal mask.

`base` is the original checkpoint; `model` is the same with the run's adapters merged, which an encoder was trained to
be. Texts that reach `max_length` tokens are left out, since their characters would not be those that were scored.

Repetition (Welleck et al., arXiv 1908.04319): seq-rep-4 is the share of a continuation's 4-grams that stood in it
before. distinct-n (Li et al., arXiv 1510.03055) is the share of different n-grams, here within a continuation. Both are
over tokens; `text` is the same of the held-out texts' beginnings. Continuations have a fixed number of tokens, and the
end-of-text token is one like any other. Each token runs the whole packed pass again: there is no cache of keys and
values, which is fit for a diagnostic and small models.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from peft.tuners.lora import LoraLayer
from torch.nn import functional as F

from ..engine.adapters import stack_adapters
from ..engine.encoder import Encoder
from ..engine.model import LanguageModel
from ..engine.packing import PackedBatch, pack
from ..engine.tokens import TextTokenizer, Tokenized
from .report import Score
from .texts import HeldOutTexts
from .units import Scored

NUM_PROMPTS = 32
PROMPT_TOKENS = 8
NEW_TOKENS = 64
_LOGITS = 2**26  # elements that are in memory together
_SEQUENCES = 1024


class TokenizedTexts(NamedTuple):
    """Texts that are whole within `max_length`, of two tokens or more, and the number of characters of each.

    Attributes:
        notes: how many of the others there are.
    """

    sequences: list[list[int]]
    characters: list[int]
    notes: list[str]


def evaluate(encoder: Encoder, held_out: HeldOutTexts, seeds: Sequence[int]) -> Scored:
    """Scores of the base, of the model where it has adapters, and of the texts; whether the base is untouched; and how
    many texts were left out.

    Raises:
        ValueError: no text is fit for it, or the model has too few positions for a continuation.
    """
    texts = tokenize(encoder, held_out)
    prompts = [ids[:PROMPT_TOKENS] for ids in texts.sequences if len(ids) >= PROMPT_TOKENS][:NUM_PROMPTS]
    if not prompts:
        raise ValueError(f"no text of {held_out.name} has the {PROMPT_TOKENS} tokens of a prompt")
    positions = encoder.config.max_position_embeddings
    if positions < PROMPT_TOKENS + NEW_TOKENS:
        raise ValueError(f"generation needs {PROMPT_TOKENS + NEW_TOKENS} positions, the model has {positions}")
    base = encoder.language_model()
    models = {"base": base}
    checks = {}
    if encoder.checkpoint.adapters:
        checks["with its adapters off, logits are bitwise the base's"] = adapters_leave_the_base(encoder, base, texts)
        models["model"] = encoder.language_model(adapters=True)
    scores: list[Score] = []
    for system, model in models.items():
        scores += _perplexities(held_out.name, system, model, encoder.backend, texts)
        greedy = continuations(model, prompts, encoder.backend)
        scores += _repetitions(held_out.name, system, "greedy ", [greedy])
        sampled = [continuations(model, prompts, encoder.backend, seed=seed) for seed in seeds]
        scores += _repetitions(held_out.name, system, "sampled ", sampled)
    beginnings = [ids[:NEW_TOKENS] for ids in texts.sequences]
    scores += _repetitions(held_out.name, "text", "", [beginnings])
    return Scored(scores, checks, texts.notes)


def tokenize(encoder: Encoder, held_out: HeldOutTexts) -> TokenizedTexts:
    """Token ids as the encoder makes them, special tokens included."""
    tokenized = TextTokenizer(encoder.tokenizer, encoder.max_length)(held_out.texts, [""] * len(held_out.texts))
    kept, num_long = [], 0
    for text, result in zip(held_out.texts, tokenized, strict=True):
        if isinstance(result, Tokenized) and len(result.ids) >= encoder.max_length:
            num_long += 1
        elif isinstance(result, Tokenized) and len(result.ids) >= 2:
            kept.append((result.ids, len(text)))
    if not kept:
        raise ValueError(f"no text of {held_out.name} has from 2 to {encoder.max_length - 1} tokens")
    num_short = len(held_out.texts) - len(kept) - num_long
    reasons = {
        f"{num_long} reach max_length, {encoder.max_length} tokens": num_long,
        f"{num_short} are too short": num_short,
    }
    found = ", ".join(reason for reason, count in reasons.items() if count)
    notes = [f"{held_out.name}: {num_long + num_short} of {len(held_out.texts)} texts are left out: {found}"]
    sequences, characters = zip(*kept, strict=True)
    return TokenizedTexts(list(sequences), list(characters), notes if found else [])


@torch.no_grad()
def token_losses(model: LanguageModel, sequences: Sequence[Sequence[int]], backend: str) -> np.ndarray:
    """Sum of the negative log-likelihoods in nats of each sequence's tokens but the first, float64 `(n,)`."""
    losses = np.zeros(len(sequences))
    for slab, batch in _slabs(model, sequences):
        logits = model(batch, backend=backend)
        ends = batch.cu_seqlens[1:].long()
        is_last = torch.zeros(batch.num_tokens, dtype=torch.bool, device=logits.device)
        is_last[ends - 1] = True
        reads = (~is_last).nonzero().flatten()
        loss = F.cross_entropy(logits[reads].float(), batch.input_ids[reads + 1], reduction="none").double()
        owner = torch.bucketize(reads, ends, right=True)
        losses[slab] = torch.zeros(len(slab), dtype=torch.float64, device=loss.device).index_add_(0, owner, loss).cpu()
    return losses


@torch.no_grad()
def continuations(
    model: LanguageModel, prompts: Sequence[Sequence[int]], backend: str, *, seed: int | None = None
) -> list[list[int]]:
    """`NEW_TOKENS` tokens after each prompt: the likeliest ones, or with a seed sampled at temperature 1."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(NEW_TOKENS):
        for slab, batch in _slabs(model, sequences):
            hidden_states = model.model(batch, model.config.causal_windows, backend=backend)
            last = hidden_states[batch.cu_seqlens[1:].long() - 1]
            logits = model.lm_head(model.model.norm(last)).float().cpu()
            if generator is None:
                chosen = logits.argmax(dim=-1)
            else:
                chosen = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator).flatten()
            for place, token in zip(slab, chosen.tolist(), strict=True):
                sequences[place].append(token)
    return [ids[len(prompt) :] for ids, prompt in zip(sequences, prompts, strict=True)]


def distinct(ids: Sequence[int], n: int) -> float:
    """Share of different n-grams among the `len(ids) - n + 1` of a sequence; nan where it has none."""
    total = len(ids) - n + 1
    return len({tuple(ids[place : place + n]) for place in range(total)}) / total if total > 0 else math.nan


@torch.no_grad()
def adapters_leave_the_base(encoder: Encoder, base: LanguageModel, texts: TokenizedTexts) -> bool:
    """Whether a model that carries the run's adapters, switched off, gives bitwise the base's logits for the texts."""
    stacked = encoder.language_model()
    stack_adapters(stacked.model, encoder.checkpoint.adapters)
    stacked.to(encoder.device).eval()
    for module in stacked.modules():
        if isinstance(module, LoraLayer):
            module.enable_adapters(False)
    return all(
        torch.equal(stacked(batch, backend=encoder.backend), base(batch, backend=encoder.backend))
        for _, batch in _slabs(base, texts.sequences)
    )


def _slabs(model: LanguageModel, sequences: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], PackedBatch]]:
    """Packed batches of all sequences with their places, small enough for their logits."""
    lengths = list(map(len, sequences))
    max_tokens = max(_LOGITS // model.config.vocab_size, *lengths, 1)
    device = model.lm_head.weight.device
    for slab in pack(lengths, max_tokens, _SEQUENCES):
        yield slab, PackedBatch.from_sequences([sequences[place] for place in slab], device=device)


def _perplexities(
    dataset: str, system: str, model: LanguageModel, backend: str, texts: TokenizedTexts
) -> Iterator[Score]:
    losses = token_losses(model, texts.sequences, backend)
    tokens = [float(len(ids) - 1) for ids in texts.sequences]
    yield Score.of_items(dataset, "all", system, "perplexity", {"loss": losses, "tokens": tokens})
    items = {"bits": losses / math.log(2), "characters": np.array(texts.characters, dtype=np.float64)}
    yield Score.of_items(dataset, "all", system, "bits per character", items)


def _repetitions(dataset: str, system: str, prefix: str, drawn: Sequence[Sequence[Sequence[int]]]) -> Iterator[Score]:
    """Means over texts; each text's figure is the mean over the draws, `(draws, texts)` of token ids."""
    shares = {
        "seq-rep-4": [[1 - distinct(ids, 4) for ids in texts] for texts in drawn],
        "distinct-1": [[distinct(ids, 1) for ids in texts] for texts in drawn],
        "distinct-2": [[distinct(ids, 2) for ids in texts] for texts in drawn],
    }
    for metric, values in shares.items():
        share = np.mean(values, axis=0)
        share = share[~np.isnan(share)]  # of held-out texts that are shorter than an n-gram
        if share.size:
            yield Score.of_items(dataset, "all", system, prefix + metric, {"share": share})
