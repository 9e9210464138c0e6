"""Each stage's loss and gradients against a plain implementation: transformers and PEFT, padded, eager, autograd."""

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.nn import functional as F

from bivec.engine.config import CAUSAL
from bivec.engine.tokens import Tokenized
from bivec.training.passes import identify, sequence_seeds
from bivec.training.token_objectives import following


def plain_model(settings, step):
    """The same weights in transformers, with the adapter in PEFT, by our parameters' names."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        settings.model, dtype=torch.float32, attn_implementation="eager"
    )
    if settings.full_finetuning:
        model.requires_grad_(True)
        return model, dict(model.named_parameters())
    config = peft.LoraConfig(
        r=settings.lora_r, lora_alpha=settings.lora_alpha, target_modules=list(settings.target_modules)
    )
    wrapped = peft.get_peft_model(model.model, config)
    model.lm_head.requires_grad_(False)
    parameters = {
        name.removeprefix("base_model.model."): parameter
        for name, parameter in wrapped.named_parameters()
        if parameter.requires_grad
    }
    with torch.no_grad():
        for name, parameter in step.trainee.parameters.items():
            parameters[name.removeprefix("model.")].copy_(parameter)
    return model, {name: parameters[name.removeprefix("model.")] for name in step.trainee.parameters}


def padded(sequences):
    """Token ids and attention mask (B, L), padded on the right."""
    longest = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def vectors(model, tokenized):
    """Mean of the final hidden states over each sequence's own tokens, (B, E)."""
    ids, mask = padded([sequence.ids for sequence in tokenized])
    states = model.model(input_ids=ids, attention_mask=mask, is_causal=False).last_hidden_state
    weights = mask.clone()
    for row, sequence in enumerate(tokenized):
        weights[row, : sequence.pool_start] = 0
    return (states * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)


def assert_same(losses, gradients, expected_loss, parameters):
    assert losses["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)
    expected_loss.backward()
    for name, gradient in gradients.items():
        scale = parameters[name].grad.abs().max()
        assert (gradient - parameters[name].grad).abs().max() <= 1e-5 * max(1.0, scale), name
    assert max(gradient.abs().max() for gradient in gradients.values()) > 1e-3


@pytest.mark.parametrize("block_size", [0, 16])
def test_pretrain(make_settings, make_step, block_size):
    settings = make_settings("pretrain", block_size=block_size)
    step = make_step(settings)
    losses, gradients = step.run()
    model, parameters = plain_model(settings, step)
    objective = step.stage.objective
    ids, mask = padded([sequence.ids for sequence in objective.data.tokens(objective.order(0)[1])])
    labels = ids.masked_fill(mask == 0, -100)
    assert_same(losses, gradients, model(input_ids=ids, attention_mask=mask, labels=labels).loss, parameters)


@pytest.mark.parametrize("style", ["bert", "all_mask"])
@pytest.mark.parametrize("token_budget", [None, 64])
def test_mntp(make_settings, make_step, style, token_budget):
    """transformers' own shift of the labels is what reads a masked token from the position before it."""
    settings = make_settings("mntp", mask_style=style, mask_token="x", token_budget=token_budget)
    step = make_step(settings)
    losses, gradients = step.run()
    model, parameters = plain_model(settings, step)
    objective = step.stage.objective
    rows = objective.order(0)[1]
    originals = objective.data.tokens(rows)
    masked, targets = objective._masked(originals, np.array(rows), 0)
    ids, mask = padded([sequence.ids for sequence in masked])
    labels = torch.full_like(ids, -100)
    reads, start = set(targets.reads.tolist()), 0
    for row, sequence in enumerate(originals):
        for place, token in enumerate(sequence.ids[1:], start=1):
            if start + place - 1 in reads:
                labels[row, place] = token
        start += len(sequence.ids)
    assert (labels >= 0).sum() == len(targets.tokens) > 8
    output = model.model(input_ids=ids, attention_mask=mask, is_causal=False).last_hidden_state
    logits = model.lm_head(output)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    assert_same(losses, gradients, loss, parameters)


def test_mntp_with_its_own_head_trained(make_settings, make_step, checkpoint_folders):
    settings = make_settings("mntp", model=str(checkpoint_folders["mistral"]), train_head=True, mask_token="x")
    _, gradients = make_step(settings).run()
    assert gradients["lm_head.weight"].abs().max() > 0
    with pytest.raises(ValueError, match="train_head needs a head of its own"):
        make_step(make_settings("mntp", train_head=True))


@pytest.mark.parametrize(
    "changes",
    [{}, {"symmetric": True}, {"dims": [16, 64]}, {"temperature": 0.3, "pooling": "last"}],
    ids=["plain", "symmetric", "matryoshka", "last"],
)
def test_simcse(make_settings, make_step, changes):
    """Without dropout both views are one vector, so the loss is that of the texts among themselves."""
    settings = make_settings("simcse", **changes)
    step = make_step(settings)
    losses, gradients = step.run()
    model, parameters = plain_model(settings, step)
    pairs = step.stage.objective.pairs(0)
    if settings.pooling == "last":
        for place, sequence in enumerate(pairs.sequences):
            pairs.sequences[place] = sequence._replace(pool_start=len(sequence.ids) - 1)
    both = vectors(model, pairs.sequences)
    queries, keys = both[: pairs.num_queries], both[pairs.num_queries :]
    terms = []
    for size in settings.dims or [both.shape[1]]:
        scores = F.normalize(queries[:, :size]) @ F.normalize(keys[:, :size]).T / settings.temperature
        diagonal = torch.arange(len(queries))
        term = F.cross_entropy(scores, diagonal)
        terms.append((term + F.cross_entropy(scores.T, diagonal)) / 2 if settings.symmetric else term)
    assert_same(losses, gradients, torch.stack(terms).mean(), parameters)


@pytest.mark.parametrize("instruction", [None, "find what follows:"])
def test_supervised(make_settings, make_step, instruction):
    settings = make_settings("supervised", instruction=instruction, batch_size=24)
    step = make_step(settings)
    losses, gradients = step.run()
    model, parameters = plain_model(settings, step)
    pairs = step.stage.objective.pairs(0)
    if instruction:
        assert min(sequence.pool_start for sequence in pairs.sequences[:24]) > 2
    both = vectors(model, pairs.sequences)
    queries, keys = both[:24], both[24:]
    assert len(keys) == 24 + 48
    scores = F.normalize(queries) @ F.normalize(keys).T / settings.temperature
    groups = torch.tensor(pairs.groups)
    false_negative = groups[None, :] == groups[:24, None]
    false_negative.fill_diagonal_(False)
    assert false_negative.sum() == 2  # the two rows with one query
    loss = F.cross_entropy(scores.masked_fill(false_negative, float("-inf")), torch.arange(24))
    assert_same(losses, gradients, loss, parameters)


@pytest.mark.parametrize("stage", ["mntp", "supervised"])
def test_keep_generation_adds_the_causal_loss(make_settings, make_step, stage):
    changes = {"mask_token": "x"} if stage == "mntp" else {}
    without = make_step(make_settings(stage, **changes))
    plain_losses, plain = without.run()
    step = make_step(make_settings(stage, keep_generation=0.25, **changes))
    losses, gradients = step.run()
    assert losses["loss"] == pytest.approx(plain_losses["loss"], abs=1e-6)
    model, parameters = plain_model(step.settings, step)
    if stage == "mntp":
        texts = step.stage.objective.data.tokens(step.stage.objective.order(0)[1])
    else:
        pairs = step.stage.objective.pairs(0)
        texts = pairs.sequences[pairs.num_queries :]
    ids, mask = padded([sequence.ids for sequence in texts])
    loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    assert losses["generation_loss"] == pytest.approx(loss.item(), abs=1e-5)
    (0.25 * loss).backward()
    for name, gradient in gradients.items():
        expected = plain[name.removeprefix("model.")] if name not in plain else plain[name]
        assert (gradient - expected - parameters[name].grad).abs().max() < 2e-5, name


@pytest.mark.parametrize("stage", ["simcse", "supervised"])
def test_gradcache_is_the_full_batch(make_settings, make_step, stage):
    """With dropout: both runs of a slab draw the same masks, whatever else is in it."""
    changes = {"attention_dropout": 0.3, "batch_size": 16}
    whole, whole_gradients = make_step(make_settings(stage, **changes)).run()
    step = make_step(make_settings(stage, token_budget=64, **changes))
    assert len(step.stage.objective.prepare(0).slabs) > 3
    chunked, gradients = step.run()
    assert chunked["loss"] == pytest.approx(whole["loss"], rel=1e-6)
    for name, gradient in gradients.items():
        scale = max(1.0, whole_gradients[name].abs().max())
        assert (gradient - whole_gradients[name]).abs().max() <= 1e-5 * scale, name
    other, _ = make_step(make_settings(stage, seed=43, **changes)).run()
    assert abs(other["loss"] - whole["loss"]) > 1e-4


def test_simcse_views_differ_by_their_masks(make_settings, make_step):
    step = make_step(make_settings("simcse", attention_dropout=0.3))
    pairs = step.stage.objective.pairs(0)
    (slab,) = step.stage.objective.prepare(0).slabs
    found = step.stage.objective._vectors(slab, step.schedule(0), dropout=True)
    by_place = dict(zip(slab.places, found, strict=True))
    for place in range(pairs.num_queries):
        assert (by_place[place] - by_place[place + pairs.num_queries]).abs().max() > 1e-3
    assert pairs.sequences[: pairs.num_queries] == pairs.sequences[pairs.num_queries :]


def test_following_reads_each_token_from_the_one_before():
    targets = following([Tokenized([5, 6, 7], 0), Tokenized([8], 0), Tokenized([9, 10], 0)])
    assert targets.reads.tolist() == [0, 1, 4]
    assert targets.tokens.tolist() == [6, 7, 10]


def test_seeds_differ_by_seed_step_row_and_part_and_by_nothing_else():
    rows = np.arange(1000)
    base = sequence_seeds(1, 2, identify(0, rows, 0))
    others = [
        sequence_seeds(2, 2, identify(0, rows, 0)),
        sequence_seeds(1, 3, identify(0, rows, 0)),
        sequence_seeds(1, 2, identify(1, rows, 0)),
        sequence_seeds(1, 2, identify(0, rows, 1)),
    ]
    assert len({*base.tolist(), *(seed for other in others for seed in other.tolist())}) == 5000
    assert base.min() >= 0
    assert sequence_seeds(1, 2, identify(0, rows[::-1].copy(), 0)).tolist() == base[::-1].tolist()


@pytest.mark.parametrize("kind", ["bidirectional", "causal", "window", "annealed", "layers"])
def test_mask_schedules(make_settings, make_step, kind):
    step = make_step(make_settings("mntp", mask_token="x", mask_schedule=kind))
    config = step.trainee.config
    masks = [step.schedule(number) for number in range(12)]
    rights = [[right for _, right in mask.windows] for mask in masks]
    if kind == "causal":
        assert all(mask.windows == config.windows(CAUSAL) for mask in masks)
        return
    assert masks[9].windows == masks[11].windows == config.bidirectional_windows
    assert masks[9].future_p == 1.0
    if kind == "annealed":
        assert [mask.future_p for mask in masks[:3]] == pytest.approx([0.1, 0.2, 0.3])
    if kind == "window":
        assert [right[0] for right in rights[:3]] == [5, 10, 14]  # tenths of 48 tokens
    if kind == "layers":
        assert rights[3] == [0, 0, -1]
        assert rights[6] == [0, -1, -1]
    losses, _ = step.run(3)
    assert 0 < losses["loss"] < 20
