"""What a `config.json` asks: met as transformers meets it, or refused by name."""

import json

import pytest
import torch
from transformers import AutoModel

from bivec import Encoder
from bivec.engine.config import load_config, parse_config
from bivec.engine.packing import PackedBatch

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}


def load(folder, **arguments):
    return Encoder.from_pretrained(folder, dtype="float32", device="cpu", **arguments)


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type must be one of llama, mistral, qwen2, qwen3, llama_bidirec, got 'gemma'"),
        ({"hidden_act": "gelu"}, "hidden_act must be silu, got 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type must be one of .* got 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type must be one of .* got 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number, got None"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is not supported"),
        ({"num_local_experts": 8}, "num_local_experts is not supported"),
        ({"auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map asks for remote code"),
        ({"hidden_size": "8"}, "hidden_size must be a positive integer, got '8'"),
        ({"num_hidden_layers": None}, "num_hidden_layers must be a positive integer, got None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads must divide num_attention_heads"),
        ({"model_type": "qwen2"}, "num_key_value_heads must be a positive integer"),
        ({"model_type": "mistral", "num_key_value_heads": 1, "sliding_window": 0}, "sliding_window must be positive"),
    ],
)
def test_what_the_engine_does_not_do_is_refused_by_name(changes, message):
    message = message.replace("sliding_window must be positive", "sliding_window must be a positive integer, got 0")
    with pytest.raises(ValueError, match=message):
        parse_config(LLAMA | changes)


def test_defaults_are_those_of_transformers():
    mistral = parse_config(LLAMA | {"model_type": "mistral", "num_key_value_heads": 1})
    assert mistral.sliding_windows == (4096, 4096)
    assert parse_config(LLAMA).num_key_value_heads == 2
    assert parse_config(LLAMA).rope.theta == 10000.0
    qwen3 = parse_config(LLAMA | {"model_type": "qwen3", "num_key_value_heads": 1})
    assert (qwen3.head_dim, qwen3.qk_norm, qwen3.sliding_windows) == (128, True, (None, None))


def test_a_broken_configuration_is_named(fresh_llama_folder):
    (fresh_llama_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        load(fresh_llama_folder)
    (fresh_llama_folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        load(fresh_llama_folder)


def test_remote_code_is_refused_and_not_run(fresh_llama_folder, tmp_path):
    edit_json(fresh_llama_folder / "config.json", auto_map={"AutoModel": "modeling_evil.Evil"})
    (fresh_llama_folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match=r"config\.json: auto_map asks for remote code"):
        load(fresh_llama_folder)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_read_from_a_real_checkpoint(shared_data):
    config = load_config(shared_data / "stories260K" / "hf")
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (64, 5, 4)
    assert config.tie_word_embeddings


LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TEXT = "bidirectional attention lets every token see every other token, the quick brown fox jumps"


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("llama", {"rope_scaling": LINEAR}),  # beside the rope_parameters that stand there
        ("llama", {"rope_scaling": LINEAR, "rope_theta": 500.0}),
        ("llama", {"rope_scaling": LINEAR | {"rope_theta": 300.0}, "rope_theta": 500.0}),
        ("llama", {"rope_parameters": None, "rope_theta": 500.0}),
        ("llama", {"rope_parameters": LINEAR, "rope_theta": 500.0}),
        ("llama", {"rope_parameters": LLAMA3, "original_max_position_embeddings": 64}),
        ("llama", {"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 16}}),
        ("llama", {"original_max_position_embeddings": 64}),
        ("llama", {"layer_types": ["sliding_attention"] * 3, "sliding_window": 3}),
        ("mistral", {"layer_types": ["full_attention"] * 3}),
        ("mistral", {"layer_types": ["sliding_attention"] * 3}),
        ("mistral", {"layer_types": ["full_attention", "sliding_attention", "full_attention"]}),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"]}),
        ("qwen2", {"layer_types": ["full_attention"] * 3, "use_sliding_window": False}),
        ("qwen2", {"layer_types": None, "max_window_layers": 2}),
    ],
)
def test_the_states_are_those_of_transformers(make_checkpoint, tmp_path, architecture, changes):
    make_checkpoint(tmp_path, architecture)
    edit_json(tmp_path / "config.json", **changes)
    theirs = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    theirs.config.is_causal = False
    encoder = load(tmp_path)
    ids = encoder.tokenizer(TEXT)["input_ids"]
    assert len(ids) > 9  # more than any window here
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).last_hidden_state[0]
        found = encoder.forward_packed(PackedBatch.from_sequences([ids]))
    assert (found - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("value", ["1", 2.5, True, 0, -1, 10**9 * 10**9, [1], {}], ids=str)
@pytest.mark.parametrize(
    "key",
    [
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings"),
        *("num_attention_heads", "num_key_value_heads", "head_dim"),
    ],
)
def test_sizes_are_positive_integers_within_reason(key, value):
    with pytest.raises(ValueError, match=f"{key} must be (a positive integer, got|at most)"):
        parse_config(LLAMA | {key: value})


@pytest.mark.parametrize("value", ["1e-6", None, True, 0, -1e-6, float("nan"), float("inf"), 10**400, [1]], ids=str)
def test_numbers_are_positive_and_finite(value):
    with pytest.raises(ValueError, match="rms_norm_eps must be a positive number, got"):
        parse_config(LLAMA | {"rms_norm_eps": value})
    if value is not None:
        with pytest.raises(ValueError, match="rope_theta must be a positive number, got"):
            parse_config(LLAMA | {"rope_theta": value})
    for key in ("factor", "low_freq_factor", "high_freq_factor"):
        with pytest.raises(ValueError, match=f"{key} must be a positive number, got"):
            parse_config(LLAMA | {"rope_parameters": LLAMA3 | {key: value}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 3}, r"num_attention_heads must divide hidden_size \(8\), got 3"),
        ({"num_attention_heads": 2**12, "head_dim": 2**13}, "num_attention_heads times head_dim must be at most"),
        ({"rope_parameters": LLAMA3 | {"low_freq_factor": 4.0}}, "low_freq_factor must be less than high_freq_factor"),
        ({"rope_parameters": {"full_attention": LINEAR}}, "rope_parameters must hold for all layers"),
        ({"rope_parameters": [LINEAR]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_type": ["linear"]}}, "rope_type must be one of"),
        ({"rope_parameters": LLAMA3 | {"original_max_position_embeddings": 8.5}}, "original_max_position_embeddings"),
        ({"attention_bias": "no"}, "attention_bias must be true or false, got 'no'"),
        ({"mlp_bias": 1}, "mlp_bias must be true or false, got 1"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings must be true or false"),
        ({"model_type": ["llama"]}, "model_type must be one of"),
        ({"model_type": "qwen3", "use_sliding_window": 1}, "use_sliding_window must be true or false"),
        ({"model_type": "qwen3", "layer_types": "full_attention"}, "layer_types must hold 2 entries"),
        ({"model_type": "qwen3", "layer_types": [{}, []]}, "layer_types must be full_attention or sliding_attention"),
        ({"model_type": "qwen3", "layer_types": ["sliding_attention"] * 2}, "there is no sliding_window"),
        ({"model_type": "qwen3", "max_window_layers": "2"}, "max_window_layers must be an integer of at least 0"),
        ({"model_type": "mistral", "sliding_window": "7"}, "sliding_window must be a positive integer, got '7'"),
    ],
)
def test_values_of_a_wrong_kind_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        parse_config(LLAMA | {"num_key_value_heads": 1} | changes)


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "bivec.json", "sentence_bert_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "nests deeper|recursion"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "nests deeper"),
        (b"[1]", "must hold a JSON object, got list|no tokenizer that transformers can read"),
        (b'{"a": "\xff"}', "is not valid JSON|no tokenizer that transformers can read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON|no tokenizer that transformers can read"),
    ],
    ids=["deepest", "deep", "list", "latin-1", "long number"],
)
def test_json_that_is_none_is_one_line_with_the_file(fresh_llama_folder, name, content, message):
    if name == "tokenizer_config.json" and message == "nests deeper":
        pytest.skip("what transformers reads without harm")
    (fresh_llama_folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        load(fresh_llama_folder)
    assert str(fresh_llama_folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("layers", [4, 4000])
def test_layers_that_the_files_do_not_have_are_not_built(fresh_llama_folder, layers, monkeypatch):
    from bivec.engine import model

    monkeypatch.setattr(model, "DecoderLayer", None)
    edit_json(fresh_llama_folder / "config.json", num_hidden_layers=layers)
    with pytest.raises(ValueError, match=rf"num_hidden_layers is {layers}, but there is no tensor of layers\.3"):
        load(fresh_llama_folder)


def test_sizes_that_the_files_do_not_have_are_not_allocated(fresh_llama_folder):
    edit_json(fresh_llama_folder / "config.json", hidden_size=2**24, intermediate_size=2**24, vocab_size=2**24)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight .* must have shape \(16777216, 16777216\)"):
        load(fresh_llama_folder)
