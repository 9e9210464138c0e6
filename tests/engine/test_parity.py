"""The packed engine against transformers with `is_causal=False`, and mutants that must be caught."""

import csv
import dataclasses
import json

import pytest
import torch
import transformers
from scipy.stats import spearmanr

from bivec.engine.checkpoints import resolve
from bivec.engine.config import Rope, load_config
from bivec.engine.encoder import Encoder
from bivec.engine.model import LanguageModel, LlamaModel
from bivec.engine.packing import PackedBatch
from bivec.engine.runner import Runner
from bivec.engine.weights import load_model

TOLERANCE = 1e-4
LENGTHS = (41, 1, 60, 17, 60, 33)  # longer than every sliding window and than the original context of 32
NAMES = ("llama", "llama-bias", "mistral", "qwen2", "qwen3")


def sequences(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(vocab_size, (length,), generator=generator).tolist() for length in LENGTHS]


def load_ours(folder, dtype=torch.float32, **changes) -> LlamaModel:
    return load_model(LlamaModel, folder, dtype, dataclasses.replace(load_config(folder), **changes)).eval()


@torch.inference_mode()
def transformers_states(folder, dtype=torch.float32) -> torch.Tensor:
    """transformers' last hidden states, one text at a time (no padding), concatenated `(T, E)`, float32."""
    model = transformers.AutoModel.from_pretrained(folder, dtype=dtype).eval()
    model.config.is_causal = False
    texts = sequences(model.config.vocab_size)
    return torch.cat([model(torch.tensor([ids])).last_hidden_state[0] for ids in texts]).float()


@torch.inference_mode()
def our_states(model: LlamaModel, runner: bool) -> torch.Tensor:
    batch = PackedBatch.from_sequences(sequences(model.config.vocab_size))
    hidden = Runner(model, "sdpa")(batch) if runner else model(batch)
    return model.norm(hidden).float()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("runner", [False, True], ids=["model", "runner"])
def test_hidden_states_equal_transformers(checkpoint_folders, name, runner):
    expected = transformers_states(checkpoint_folders[name])
    difference = (our_states(load_ours(checkpoint_folders[name]), runner) - expected).abs().max()
    assert difference < TOLERANCE


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("runner", [False, True], ids=["model", "runner"])
def test_bfloat16_is_no_further_than_transformers_bfloat16(checkpoint_folders, name, runner):
    truth = transformers_states(checkpoint_folders[name])
    theirs = (transformers_states(checkpoint_folders[name], torch.bfloat16) - truth).square().mean().sqrt()
    ours = (our_states(load_ours(checkpoint_folders[name], torch.bfloat16), runner) - truth).square().mean().sqrt()
    assert 0 < ours < 1.5 * theirs


@pytest.mark.parametrize("name", NAMES)
def test_causal_logits_equal_transformers(checkpoint_folders, name):
    folder = checkpoint_folders[name]
    model = load_model(LanguageModel, folder, torch.float32)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    texts = sequences(model.config.vocab_size)
    with torch.inference_mode():
        expected = torch.cat([reference(torch.tensor([ids])).logits[0] for ids in texts])
        logits = model(PackedBatch.from_sequences(texts))
    assert (logits - expected).abs().max() < TOLERANCE * expected.abs().max().clamp(min=1)


def _no_rope(model):
    model.rotary_tables = lambda positions: LlamaModel.rotary_tables(model, torch.zeros_like(positions))


def _swap_key_value_heads(model):
    for layer in model.layers:
        for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            projection.weight = torch.nn.Parameter(
                projection.weight.view(2, -1, 64).flip(0).reshape(-1, 64).contiguous()
            )


def _drop_bias(model):
    for layer in model.layers:
        layer.self_attn.k_proj.bias = None
        layer.self_attn.v_proj.bias = None


MUTANTS = {
    "no rope": ("llama", {}, _no_rope),
    "wrong theta": ("qwen3", {"rope": Rope(theta=15000.0)}, None),
    "unscaled rope": ("llama", {"rope": Rope()}, None),
    "swapped key/value heads": ("llama", {}, _swap_key_value_heads),
    "dropped bias": ("qwen2", {}, _drop_bias),
    "wrong window": ("mistral", {"sliding_windows": (8, 8, 8)}, None),
    "no window": ("mistral", {"sliding_windows": (None, None, None)}, None),
    "causal mask": ("llama", {}, None),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_miss_the_tolerance_by_ten(checkpoint_folders, mutant):
    name, changes, change_model = MUTANTS[mutant]
    folder = checkpoint_folders[name]
    model = load_ours(folder, **changes)
    if change_model is not None:
        change_model(model)
    batch = PackedBatch.from_sequences(sequences(model.config.vocab_size))
    windows = model.config.causal_windows if mutant == "causal mask" else None
    with torch.inference_mode():
        states = model.norm(model(batch, windows))
    assert (states - transformers_states(folder)).abs().max() > 10 * TOLERANCE


def test_published_and_transformers_5_spellings_give_one_model(checkpoint_folders, tmp_path):
    values = json.loads((checkpoint_folders["llama"] / "config.json").read_text())
    rope = values.pop("rope_parameters")
    old = values | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert load_config(tmp_path) == load_config(checkpoint_folders["llama"])


def test_real_checkpoint_equals_transformers(shared_data):
    folder = shared_data / "stories260K" / "hf"
    expected = transformers_states(folder)
    for runner in (False, True):
        assert (our_states(load_ours(folder), runner) - expected).abs().max() < TOLERANCE


def test_sts_benchmark_correlation_equals_transformers(shared_data):
    folder = shared_data / "stories260K" / "hf"
    with open(shared_data / "stsb" / "stsb-en-test.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file))
    scores = [float(row[2]) for row in rows]
    texts = [row[0] for row in rows] + [row[1] for row in rows]
    assert len(texts) == 2758

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.is_causal = False
    by_length: dict[int, list[int]] = {}
    ids = tokenizer(texts)["input_ids"]
    for place, text_ids in enumerate(ids):
        by_length.setdefault(len(text_ids), []).append(place)
    reference = torch.empty(len(texts), model.config.hidden_size)
    with torch.inference_mode():
        for places in by_length.values():  # texts of one length need no padding
            reference[places] = model(torch.tensor([ids[place] for place in places])).last_hidden_state.mean(1)
    vectors = torch.from_numpy(Encoder.from_pretrained(folder, dtype="float32").encode(texts))
    assert (vectors - reference).abs().max() < TOLERANCE

    def correlation(embeddings):
        half = len(rows)
        return spearmanr(torch.cosine_similarity(embeddings[:half], embeddings[half:]), scores).statistic

    assert correlation(vectors) == pytest.approx(correlation(reference), abs=1e-3)
    assert 0.2 < correlation(vectors) < 0.8


def test_language_model_is_the_base_whatever_was_merged(checkpoint_folders):
    encoder = Encoder.from_pretrained(checkpoint_folders["llama"], dtype="float32")
    reference = transformers.AutoModelForCausalLM.from_pretrained(checkpoint_folders["llama"], dtype=torch.float32)
    ids = sequences(encoder.config.vocab_size)[0]
    with torch.inference_mode():
        logits = encoder.language_model()(PackedBatch.from_sequences([ids]))
        assert torch.equal(encoder.language_model().lm_head.weight, reference.lm_head.weight)
        assert (logits - reference(torch.tensor([ids])).logits[0]).abs().max() < 1e-3
    assert resolve(checkpoint_folders["llama"]).adapters == ()
