"""Every form of LoRA that PEFT writes, over a causal language model and over its stack, gives PEFT's own states or is
refused by name."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from bivec import Encoder
from bivec.engine import adapter_config
from bivec.engine.packing import PackedBatch

TENSORS = "adapter_model.safetensors"
TEXT = "bidirectional attention lets every token see every other token"
FULL = ["model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.1.self_attn.v_proj"]
SHORT = [name.removeprefix("model.") for name in FULL]

# for both classes of base, for the causal one alone, and for the stack alone
BOTH = {
    "rslora": {"use_rslora": True},
    "all-linear": {"target_modules": "all-linear"},
    "list of layers": {"target_modules": SHORT},
    "expression": {"target_modules": r".*\.(q|v|down)_proj"},
    "expression with layers": {"target_modules": r".*layers\.[02]\..*(q|up)_proj"},
    "one layer": {"layers_to_transform": 1, "layers_pattern": "layers"},
    "two layers": {"layers_to_transform": [0, 2], "layers_pattern": ["layers", "h"]},
    "rank of a name": {"rank_pattern": {"q_proj": 2, "mlp.up_proj": 6}},
    "rank of a layer": {"rank_pattern": {"layers.1.self_attn.q_proj": 2}},
    "rank of an expression": {"rank_pattern": {r"layers\.[01]\..*_proj": 3}},
    "alpha of a layer": {"alpha_pattern": {"layers.1.self_attn.q_proj": 64}},
    "alpha of a name": {"alpha_pattern": {"v_proj": 0.5}, "rank_pattern": {"v_proj": 1}, "use_rslora": True},
    "excluded names": {"exclude_modules": ["down_proj", "layers.1.self_attn.q_proj"]},
    "excluded expression": {"exclude_modules": r".*layers\.1\..*"},
    "dora": {"use_dora": True},
    "dora with ranks": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 2}},
    "gaussian": {"init_lora_weights": "gaussian"},
    "mica": {"init_lora_weights": "mica"},
    "biases where there are none": {"bias": "all"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "random": {"init_lora_weights": False},
    "eva": {"init_lora_weights": "eva"},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "dropout": {"lora_dropout": 0.5},
    "module of a layer": {"target_modules": ["self_attn.q_proj"]},
}
CAUSAL = {
    "list in full": {"target_modules": FULL},
    "expression in full": {"target_modules": r"model\.layers\.\d+\.(self_attn|mlp)\.(q|up)_proj"},
    "layers without a pattern": {"layers_to_transform": [0, 2]},
    "rank in full": {"rank_pattern": {"model.layers.1.self_attn.q_proj": 2}},
    "rank from the beginning": {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 2}},
    "alpha in full": {"alpha_pattern": {"model.layers.1.self_attn.q_proj": 64}},
    "alpha from the beginning": {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 64}},
    "excluded in full": {"exclude_modules": FULL},
    "excluded expression in full": {"exclude_modules": r"model\.layers\.1\..*"},
}
STACK = {
    "expression of the stack": {"target_modules": r"layers\.\d+\.mlp\.(up|down)_proj"},
    "alpha from the beginning": {"alpha_pattern": {"^layers.1.self_attn.q_proj": 64}},
}
FORMS = [
    *(pytest.param(causal, form, id=f"{name}-{causal}") for name, form in BOTH.items() for causal in (True, False)),
    *(pytest.param(True, form, id=f"{name}-causal") for name, form in CAUSAL.items()),
    *(pytest.param(False, form, id=f"{name}-stack") for name, form in STACK.items()),
]


def peft_states(base, folders, causal, ids):
    """What PEFT gives, one adapter merged after another."""
    model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(base, dtype=torch.float32)
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    stack = model.model if causal else model
    stack.config.is_causal = False
    with torch.inference_mode():
        return stack(torch.tensor([ids])).last_hidden_state[0]


def states(encoder, ids):
    with torch.no_grad():
        return encoder.forward_packed(PackedBatch.from_sequences([ids]))


def load(folder, **arguments):
    return Encoder.from_pretrained(folder, dtype="float32", device="cpu", **arguments)


def edit_config(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_same(found, expected):
    assert (found - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize(("causal", "form"), FORMS)
def test_the_states_are_those_of_peft(make_adapter, tiny_llama_folder, tmp_path, causal, form):
    make_adapter(tiny_llama_folder, tmp_path, causal, **form)
    encoder = load(tmp_path)
    ids = encoder.tokenizer(TEXT)["input_ids"]
    found = states(encoder, ids)
    assert_same(found, peft_states(tiny_llama_folder, [tmp_path], causal, ids))
    plain = states(load(tiny_llama_folder), ids)
    assert (found - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("causal", [True, False])
def test_a_configuration_that_says_all_linears_or_little_else(make_adapter, tiny_llama_folder, tmp_path, causal):
    """PEFT writes the names that it found, and what it does not know yet it cannot write."""
    make_adapter(tiny_llama_folder, tmp_path, causal, target_modules="all-linear", r=8)
    ids = load(tmp_path).tokenizer(TEXT)["input_ids"]
    expected = peft_states(tiny_llama_folder, [tmp_path], causal, ids)
    few = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_llama_folder), "target_modules": "all-linear"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(few))
    assert_same(peft_states(tiny_llama_folder, [tmp_path], causal, ids), expected)
    assert_same(states(load(tmp_path), ids), expected)


@pytest.mark.parametrize("form", ["pissa", "olora", "dora", "rslora"])
def test_a_second_stage_stands_on_the_first(make_adapter, tiny_llama_folder, tmp_path, form):
    make_adapter(tiny_llama_folder, tmp_path / "first", False)
    merged = PeftModel.from_pretrained(AutoModel.from_pretrained(tiny_llama_folder), tmp_path / "first")
    merged.merge_and_unload().save_pretrained(tmp_path / "merged")
    make_adapter(tmp_path / "merged", tmp_path / "second", False, seed=2, **BOTH[form])
    encoder = load(tiny_llama_folder, adapters=[tmp_path / "first", tmp_path / "second"])
    ids = encoder.tokenizer(TEXT)["input_ids"]
    assert_same(states(encoder, ids), peft_states(tmp_path / "merged", [tmp_path / "second"], False, ids))


def test_loading_draws_no_random_numbers_and_is_the_same_twice(make_adapter, tiny_llama_folder, tmp_path):
    make_adapter(tiny_llama_folder, tmp_path, True, init_lora_weights="orthogonal")
    state = torch.random.get_rng_state()
    first = load(tmp_path).encode(TEXT)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(7)
    assert (load(tmp_path).encode(TEXT) == first).all()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("init_lora_weights", "pissa_niter_4"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("lora_bias", True),
        ("modules_to_save", ["norm"]),
        ("modules_to_save", ["score", "embed_tokens"]),
        ("trainable_token_indices", [3]),
        ("target_parameters", ["mlp.up_proj.weight"]),
        ("layer_replication", [[0, 2], [1, 3]]),
        ("alora_invocation_tokens", [1, 2]),
        ("use_qalora", True),
        ("arrow_config", {"top_k": 2}),
        ("velora_config", {"scale": 1.0}),
        ("monteclora_config", {"num_samples": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("kasa_config", {}),
        ("use_bdlora", {"nblocks": 2}),
        ("megatron_config", {"tensor_model_parallel_size": 2}),
        ("a_key_of_tomorrow", True),
        ("r", "4"),
        ("r", 4.0),
        ("r", True),
        ("r", 10**9),
        ("lora_alpha", "8"),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 1e400),
        ("use_rslora", "yes"),
        ("rank_pattern", ["q_proj"]),
        ("rank_pattern", []),
        ("alpha_pattern", ""),
        ("rank_pattern", {"q_proj": 0}),
        ("rank_pattern", {"(": 4}),
        ("alpha_pattern", {"q_proj": "8"}),
        ("target_modules", "*q_proj"),
        ("target_modules", [1]),
        ("target_modules", None),
        ("exclude_modules", "("),
        ("exclude_modules", "a" * 10_001),
        ("layers_pattern", "(?i)layers"),
        ("layers_pattern", {"layers": 1}),
        ("layers_to_transform", "0"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(make_adapter, tiny_llama_folder, tmp_path, key, value):
    adapter = tmp_path / "adapter"
    make_adapter(tiny_llama_folder, adapter, True)
    edit_config(adapter, **({"layers_to_transform": [0]} if key == "layers_pattern" else {}), **{key: value})
    with pytest.raises(ValueError, match=rf"adapter_config\.json: .*{key}"):
        load(adapter)


def test_a_rank_that_the_file_does_not_have_allocates_nothing(make_adapter, tiny_llama_folder, tmp_path):
    make_adapter(tiny_llama_folder, tmp_path, True)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 2**24}))
    with pytest.raises(ValueError, match=r"must have shape \(16777216, 64\), got \(4, 64\)"):
        load(tmp_path)


def test_embeddings_are_refused_by_name(make_adapter, tiny_llama_folder, tmp_path):
    make_adapter(tiny_llama_folder, tmp_path, True, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"target_modules may only name linears, got model\.embed_tokens"):
        load(tmp_path)


def test_a_merge_that_overflows_is_refused_by_name(make_adapter, tiny_llama_folder, tmp_path):
    make_adapter(tiny_llama_folder, tmp_path, True)
    tensors = {name: tensor.fill_(1e30) for name, tensor in load_file(tmp_path / TENSORS).items()}
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.weight is not finite with this adapter"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("kind", "head", "form"),
    [
        (AutoModelForCausalLM, "lm_head.weight", {"modules_to_save": ["lm_head"]}),
        (AutoModelForCausalLM, "lm_head.lora_A.weight", {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
        (AutoModelForSequenceClassification, "score.weight", {"task_type": "SEQ_CLS"}),
        (AutoModelForTokenClassification, "score.weight", {"task_type": "TOKEN_CLS"}),
    ],
    ids=["saved", "adapted", "sequences", "tokens"],
)
def test_what_an_adapter_holds_of_a_head_is_no_part_of_the_encoder(checkpoint_folders, tmp_path, kind, head, form):
    base = checkpoint_folders["llama-bias"]  # its head is not tied to its embeddings
    torch.manual_seed(0)
    config = LoraConfig(**{"r": 4, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]} | form)
    get_peft_model(kind.from_pretrained(base), config).save_pretrained(tmp_path)
    assert f"base_model.model.{head}" in load_file(tmp_path / TENSORS)
    encoder = load(tmp_path)
    (line,) = (line for line in encoder.checkpoint.found if line.startswith("1. adapter "))
    assert ("but for its head (" in line) == ("lora" not in head)
    ids = encoder.tokenizer(TEXT)["input_ids"]
    stack = PeftModel.from_pretrained(kind.from_pretrained(base), tmp_path).base_model.model.model
    stack.config.is_causal = False
    with torch.inference_mode():
        expected = stack(torch.tensor([ids])).last_hidden_state[0]
    assert_same(states(encoder, ids), expected)
    plain = states(load(base), ids)
    assert (expected - plain).norm() > 1e-3 * plain.norm()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused_by_name(make_adapter, checkpoint_folders, tmp_path, bias):
    make_adapter(checkpoint_folders["qwen2"], tmp_path, bias=bias)
    with pytest.raises(
        ValueError, match=r"adapter_model\.safetensors .*q_proj\.(base_layer\.)?bias \(a trained bias: where"
    ):
        load(tmp_path)


def test_a_resized_vocabulary_is_refused_by_name(tiny_llama_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder)
    model.resize_token_embeddings(model.config.vocab_size + 8)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected .*embed_tokens\.weight \(embeddings, .*\(merge_and_unload\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("target_modules", "(.+)+x"),
        ("exclude_modules", "(.+)+x"),
        ("layers_pattern", "(.+)+x"),
        ("rank_pattern", {"(.+)+x": 2}),
        ("alpha_pattern", {"(.+)+x": 2}),
    ],
)
def test_an_expression_that_never_ends_is_refused(make_adapter, tiny_llama_folder, tmp_path, monkeypatch, key, value):
    make_adapter(tiny_llama_folder, tmp_path, True)
    edit_config(tmp_path, **{"layers_to_transform": [0] if key == "layers_pattern" else None, key: value})
    monkeypatch.setattr(adapter_config, "_SECONDS", 0.2)
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {key} takes more than 0\.2 s to match"):
        load(tmp_path)
