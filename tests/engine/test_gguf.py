"""A GGUF file says what the model is, and llama.cpp gives its vectors."""

import json
import os
import re
import resource
import signal
import sys
import warnings

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bivec import DEFAULT_MODEL, Encoder, cli
from bivec.engine.gguf_export import export_gguf
from bivec.engine.outputs import open_locked
from bivec.engine.run_folder import RunDescription

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed (bivec[gguf])")

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
TEXTS = [
    "the quick brown fox jumps over the lazy dog " * 4,
    "München, naïve café, 北京 😀 and punctuation!? 12345",
    "It's a dog; they'll say: \"we've 3\"\n\nof  them\t",
    "a",
]


def read(path):
    """Keys, and tensors in float32 with their types, as they stand in the file."""
    reader = gguf.GGUFReader(path)
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    tensors = {one.name: (gguf.dequantize(one.data, one.tensor_type), one.tensor_type.name) for one in reader.tensors}
    return keys, tensors


def halves_apart(rows, head_dim):
    """Back from llama.cpp's order, in which the two numbers that are turned together are neighbours."""
    order = [*range(0, head_dim, 2), *range(1, head_dim, 2)]
    return rows.reshape(-1, head_dim, *rows.shape[1:])[:, order].reshape(rows.shape)


NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def expected_name(name):
    if not name.startswith("layers."):
        return {"embed_tokens.weight": "token_embd.weight", "norm.weight": "output_norm.weight"}[name]
    _, layer, rest = name.split(".", 2)
    part, kind = rest.rsplit(".", 1)
    return f"blk.{layer}.{NAMES[part]}.{kind}"


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.filterwarnings("ignore:llama.cpp gives other tokens")
def test_every_tensor_is_the_merged_weight(checkpoint_folders, make_adapter, tmp_path, architecture):
    base = checkpoint_folders[architecture]
    adapter = make_adapter(base, tmp_path / "adapter")
    export_gguf(base, tmp_path / "model.gguf", adapters=adapter, dtype="float32")
    model = peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base, dtype=torch.float32), adapter)
    merged = model.merge_and_unload().state_dict()
    _, tensors = read(tmp_path / "model.gguf")
    tensors.pop("rope_freqs.weight", None)
    assert {kind for _, kind in tensors.values()} == {"F32"}
    assert set(tensors) == set(map(expected_name, merged))
    for name, weight in merged.items():
        found = tensors[expected_name(name)][0]
        if "qwen" not in architecture and re.search("[qk]_proj", name):
            assert not np.array_equal(found, weight.numpy())
            found = halves_apart(found, model.config.head_dim)
        assert np.array_equal(found, weight.numpy()), name


def test_every_key_of_a_llama(tiny_llama_folder, tmp_path):
    export_gguf(tiny_llama_folder, tmp_path / "model.gguf", dtype="float32")
    keys, tensors = read(tmp_path / "model.gguf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama_folder)
    described = json.loads((tiny_llama_folder / "tokenizer.json").read_text())
    ids = range(len(tokenizer))
    assert keys == {
        "general.architecture": "llama",
        "general.file_type": 0,
        "general.quantization_version": 2,
        "llama.vocab_size": len(tokenizer),
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.block_count": 3,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.attention.layer_norm_rms_epsilon": pytest.approx(1e-5),
        "llama.attention.causal": False,
        "llama.pooling_type": 1,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokenizer.convert_ids_to_tokens(ids),
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(tokenizer) - 2)],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in described["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
    }
    # Llama 3.1's rule, wavelength by wavelength, for 32 original positions
    factors = []
    for place in range(8):
        wavelength = 2 * np.pi * 10000.0 ** (2 * place / 16)
        smooth = (32 / wavelength - 1.0) / (4.0 - 1.0)
        between = 1 / ((1 - smooth) / 8.0 + smooth)
        factors.append(1.0 if wavelength < 32 / 4 else 8.0 if wavelength > 32 else between)
    assert len({1.0, 8.0} & set(factors)) == 2 < len(set(factors))
    assert tensors["rope_freqs.weight"][0] == pytest.approx(factors, rel=1e-5)


@pytest.mark.parametrize(
    ("architecture", "changes", "expected"),
    [
        ("mistral", {}, {"llama.context_length": 7, "llama.attention.key_length": 16}),
        ("qwen2", {}, {"qwen2.context_length": 9, "qwen2.attention.causal": False}),
        ("qwen3", {}, {"qwen3.attention.key_length": 32, "qwen3.pooling_type": 1}),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0, "llama.rope.freq_base": 500.0},
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:llama.cpp gives other tokens")
def test_keys_of_other_models(make_checkpoint, tmp_path, architecture, changes, expected):
    base = make_checkpoint(tmp_path / "model", architecture, **changes)
    export_gguf(base, tmp_path / "model.gguf")
    keys, tensors = read(tmp_path / "model.gguf")
    assert {key: keys[key] for key in expected} == expected
    assert "rope_freqs.weight" not in tensors


def test_pooling_and_length_are_as_asked(tiny_llama_folder, tmp_path):
    for pooling, number in {"mean": 1, "first": 2, "last": 3}.items():
        export_gguf(tiny_llama_folder, tmp_path / pooling, pooling=pooling, max_length=100)
        keys, _ = read(tmp_path / pooling)
        assert (keys["llama.pooling_type"], keys["llama.context_length"]) == (number, 100)


def test_weights_of_each_dtype(make_checkpoint, tmp_path):
    base = make_checkpoint(tmp_path / "model", intermediate_size=100)  # rows that 8-bit blocks do not divide
    files = {dtype: tmp_path / f"{dtype}.gguf" for dtype in ("float32", "bfloat16", "float16", "q8_0")}
    for dtype, path in files.items():
        export_gguf(base, path, dtype=dtype)
    _, exact = read(files["float32"])
    kinds = {"bfloat16": ("BF16", torch.bfloat16, 32), "float16": ("F16", torch.float16, 1)}
    for dtype, (kind, torch_dtype, file_type) in kinds.items():
        keys, tensors = read(files[dtype])
        assert keys["general.file_type"] == file_type
        for name, (weight, _) in exact.items():
            found, stored = tensors[name]
            assert stored == ("F32" if weight.ndim == 1 else kind)
            rounded = weight if weight.ndim == 1 else torch.tensor(weight).to(torch_dtype).float().numpy()
            assert np.array_equal(found, rounded), (dtype, name)
    keys, tensors = read(files["q8_0"])
    assert keys["general.file_type"] == 7
    for name, (weight, _) in exact.items():
        found, stored = tensors[name]
        assert stored == ("F32" if weight.ndim == 1 else "F16" if "ffn_down" in name else "Q8_0")
        if stored == "Q8_0":  # half a step, and the rounding of its float16 scale
            steps = np.abs(weight.reshape(-1, 32)).max(axis=1, keepdims=True) / 127
            assert np.all(np.abs(found - weight).reshape(-1, 32) <= 0.57 * steps)


def as_run(base, **fields):
    """The checkpoint as a run that says how its vectors are made."""
    RunDescription(**({"stage": "export", "base_model": None} | fields)).write(base)
    return base


@pytest.mark.parametrize(
    ("fields", "arguments", "message"),
    [
        ({}, {"pooling": "weighted_mean"}, "must be one of mean, first, last in a GGUF file, got 'weighted_mean'"),
        ({"pooling": "weighted_mean"}, {}, "got 'weighted_mean'"),
        ({}, {"dtype": "q4_0"}, "dtype must be one of float32, bfloat16, float16, q8_0, got 'q4_0'"),
        ({}, {"max_length": 1}, "max_length must be at least 2 tokens, 1 of which the tokenizer adds, got 1"),
        ({}, {"max_length": 257}, "^max_length must be at most the model's 256 positions, got 257"),
        ({"window": (-1, 0)}, {}, "only a bidirectional model"),
        ({"pools_special_tokens": False}, {}, "does not pool special tokens, which llama.cpp does"),
        ({"template": ("<s>user ", "</s>"), "pooling": "last"}, {}, "puts a chat template around texts"),
        ({"instruction": "find:", "symmetric_instruction": True}, {}, "'find: ' before every text and does not pool"),
    ],
)
def test_what_a_file_cannot_say_is_refused(fresh_llama_folder, tmp_path, fields, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_gguf(as_run(fresh_llama_folder, **fields), tmp_path / "out" / "model.gguf", **arguments)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("architecture", "changes", "message"),
    [
        ("qwen2", {"head_dim": 32}, "head_dim must be hidden_size / num_attention_heads in Qwen2, got 32"),
        ("qwen3", {"attention_bias": True}, "attention_bias is not supported in qwen3"),
        ("qwen3", {"rope_parameters": LLAMA3_ROPE}, "rope_type llama3 is not supported in qwen3"),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(make_checkpoint, tmp_path, architecture, changes, message):
    base = make_checkpoint(tmp_path / "model", architecture, **changes)
    with pytest.raises(ValueError, match=rf"config\.json cannot be written as GGUF: {message}"):
        export_gguf(base, tmp_path / "model.gguf")


def test_a_tokenizer_that_llama_cpp_has_not_is_refused(tmp_path):
    message = "the tokenizer of .*default_model cannot be written as GGUF: llama.cpp does not do its normalizer"
    with pytest.raises(ValueError, match=message):
        export_gguf(DEFAULT_MODEL, tmp_path / "model.gguf")


def test_texts_of_which_llama_cpp_makes_other_tokens_are_warned_of(fresh_llama_folder, tmp_path):
    described = json.loads((fresh_llama_folder / "tokenizer.json").read_text())
    (fresh_llama_folder / "tokenizer.json").write_text(json.dumps(described | {"normalizer": {"type": "NFC"}}))
    with pytest.warns(UserWarning, match="llama.cpp gives other tokens to texts that are not in Unicode's form NFC"):
        export_gguf(fresh_llama_folder, tmp_path / "model.gguf")


def test_prompts_are_for_the_reader_to_put(fresh_llama_folder, tmp_path):
    prompts = {"prompts": {"query": "", "document": ""}, "default_prompt_name": "document"}
    (fresh_llama_folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export_gguf(fresh_llama_folder, tmp_path / "none.gguf")
    run = as_run(fresh_llama_folder, instruction="find:")
    with pytest.warns(UserWarning, match="query 'find: '.*pools them, which the model does not do"):
        export_gguf(run, tmp_path / "mean.gguf")
    with pytest.warns(UserWarning, match="query 'find: '.*pools them, as the model does"):
        export_gguf(run, tmp_path / "last.gguf", pooling="last")
    run = as_run(fresh_llama_folder, instruction="find:", symmetric_instruction=True, pools_prompt=True)
    with pytest.warns(UserWarning, match="document 'find: '.*pools them, as the model does"):
        export_gguf(run, tmp_path / "all.gguf")


def test_without_the_package_the_error_names_the_extra(tiny_llama_folder, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ValueError, match=r"pip install 'bivec\[gguf\]'"):
        export_gguf(tiny_llama_folder, tmp_path / "model.gguf")


def test_a_failed_export_leaves_nothing(fresh_llama_folder, tmp_path):
    weights = load_file(fresh_llama_folder / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 5] = 1e5
    save_file(weights, fresh_llama_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"blk.2.ffn_down.weight holds 100000, too large for float16"):
        export_gguf(fresh_llama_folder, tmp_path / "out" / "model.gguf", dtype="float16")
    assert [*(tmp_path / "out").iterdir()] == []
    export_gguf(fresh_llama_folder, tmp_path / "out" / "model.gguf", dtype="bfloat16")


def test_a_killed_export_leaves_no_file_and_the_next_one_succeeds(tiny_llama_folder, tmp_path, exit_code, monkeypatch):
    path = tmp_path / "model.gguf"
    calls = []

    def quantize(*arguments):
        calls.append(arguments)
        if len(calls) == 9:
            os.kill(os.getpid(), signal.SIGKILL)
        return ours(*arguments)

    ours = gguf.quantize
    with monkeypatch.context() as patched:
        patched.setattr(gguf, "quantize", quantize)
        assert exit_code(lambda: export_gguf(tiny_llama_folder, path)) == -signal.SIGKILL
    assert [one.name for one in tmp_path.iterdir()] == [".model.gguf.partial"]
    export_gguf(tiny_llama_folder, path)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]
    assert len(read(path)[1]) == 3 * 9 + 3


@pytest.mark.parametrize(("limit", "message"), [(4_000, "File too large"), (60_000, "the weights cannot be written")])
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_llama_folder, tmp_path, limit, message):
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        arguments = ["--model", str(tiny_llama_folder), "--output", str(tmp_path / "out"), "--format", "gguf"]
        found = CliRunner().invoke(cli.app, ["export", *arguments])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.exit_code == 1
    assert message in found.stderr
    assert [line[:6] for line in found.stderr.splitlines()] == ["error:"]
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(fresh_llama_folder, tmp_path):
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(FileExistsError, match=r"model\.gguf exists"):
        export_gguf(fresh_llama_folder, tmp_path / "model.gguf")
    assert (tmp_path / "model.gguf").read_text() == "mine"
    with pytest.raises(ValueError, match="lies within the input"):
        export_gguf(fresh_llama_folder, fresh_llama_folder / "model.gguf")
    with open_locked(tmp_path / ".other.gguf.partial"), pytest.raises(FileExistsError, match="another run is writing"):
        export_gguf(fresh_llama_folder, tmp_path / "other.gguf")


def test_the_command(tiny_llama_folder, tmp_path):
    def invoke(*arguments):
        found = CliRunner().invoke(cli.app, ["export", "--model", str(tiny_llama_folder), *map(str, arguments)])
        return found.exit_code, found.output

    path = tmp_path / "model.gguf"
    assert invoke("--format", "gguf", "--dtype", "q8_0", "--output", path) == (0, f"{path}\n")
    assert read(path)[0]["general.file_type"] == 7
    status, output = invoke("--dtype", "q8_0", "--output", tmp_path / "folder")
    assert status == 2
    assert "dtype must be one of float32" in output
    status, output = invoke("--format", "gguf", "--normalize", "--output", tmp_path / "other.gguf")
    assert status == 2
    assert "normalize cannot be said in a GGUF file" in output
    status, output = invoke("--format", "gguf", "--adapter-only", "--output", tmp_path / "other.gguf")
    assert status == 2
    assert "--adapter-only writes PEFT's format" in output
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]


@pytest.fixture
def compare(tmp_path):
    """The least cosine of llama.cpp's vectors with ours, where it gives each text the same tokens."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")

    def compare(folder, texts, pooling, dtype):
        path = tmp_path / f"{pooling}-{dtype}.gguf"
        export_gguf(folder, path, pooling=pooling, dtype=dtype)
        encoder = Encoder.from_pretrained(folder, pooling=pooling, device="cpu", dtype="float32")
        context = {"n_ctx": 256, "n_batch": 256, "n_ubatch": 256}
        model = llama_cpp.Llama(str(path), embedding=True, n_threads=1, verbose=False, **context)
        try:
            for text in texts:
                assert model.tokenize(text.encode()) == encoder.tokenizer(text)["input_ids"], text
            theirs = np.array([model.embed(text) for text in texts])
        finally:
            model.close()
        ours = encoder.encode(texts)
        return min((ours * theirs).sum(axis=1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1))

    return compare


LEAST = {"float32": 0.9999, "float16": 0.999, "bfloat16": 0.999, "q8_0": 0.99}


@pytest.mark.parametrize("dtype", LEAST)
def test_llama_cpp_gives_the_vectors_of_a_real_model(compare, shared_data, dtype):
    texts = ["Once upon a time, there was a girl named Lily.", "She ran, 北京 😀!\nIt's 42.", "x"]
    with pytest.warns(UserWarning, match="llama.cpp gives other tokens to texts that have a line that begins"):
        assert compare(shared_data / "stories260K" / "hf", texts, "mean", dtype) > LEAST[dtype]


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
@pytest.mark.filterwarnings("ignore:llama.cpp gives other tokens")
def test_llama_cpp_gives_the_vectors_of_every_architecture(compare, make_checkpoint, tmp_path, architecture):
    window = {"sliding_window": 200} if architecture in ("mistral", "qwen2") else {}
    base = make_checkpoint(tmp_path / "model", architecture, **window)
    for pooling in ("mean", "last", "first"):
        assert compare(base, TEXTS, pooling, "float32") > 0.9999


@pytest.mark.parametrize(
    "changes",
    [
        {"head_dim": 6, "num_key_value_heads": 4},
        {"head_dim": 80, "num_attention_heads": 2, "num_key_value_heads": 1},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}},
        {"intermediate_size": 100, "num_hidden_layers": 1},
    ],
)
def test_llama_cpp_gives_the_vectors_of_other_shapes(compare, make_checkpoint, tmp_path, changes):
    base = make_checkpoint(tmp_path / "model", "llama", **changes)
    for dtype, least in LEAST.items():
        assert compare(base, TEXTS, "mean", dtype) > least
