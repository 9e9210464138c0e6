"""A chain of adapters as one: PEFT over the plain base, and bivec, give the states of the adapters merged in turn."""

import json
import shutil
import stat

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM
from typer.testing import CliRunner

from bivec import Encoder, cli
from bivec.engine.adapter_export import export_adapter
from bivec.engine.packing import PackedBatch
from bivec.engine.run_folder import RunDescription

TEXTS = ["the quick brown fox", "bidirectional attention lets every token see every other token"]
FILES = ("adapter_config.json", "adapter_model.safetensors")
LAST = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# what the adapters of a chain are, and whether PEFT saw a causal language model
CHAINS = {
    "one": [({}, False)],
    "one of half a rank": [({"lora_alpha": 3, "r": 6}, True)],
    "three": [
        ({}, True),
        ({"use_rslora": True, "r": 3, "target_modules": ["q_proj", "up_proj"], "rank_pattern": {"q_proj": 2}}, False),
        ({"layers_to_transform": [0, 2], "layers_pattern": "layers", "alpha_pattern": {"v_proj": 32}}, True),
    ],
    "no linear twice": [({"target_modules": ["q_proj"]}, False), ({"target_modules": ["down_proj"], "r": 2}, True)],
    "pissa": [({"init_lora_weights": "pissa"}, False)],
    "olora": [({"init_lora_weights": "olora", "use_rslora": True}, True)],
    "pissa on others": [
        ({"target_modules": ["q_proj", "v_proj"]}, False),
        ({"init_lora_weights": "olora", "r": 2, "target_modules": ["q_proj", "down_proj"]}, False),
        ({"init_lora_weights": "pissa", "r": 3}, True),
    ],
}


@pytest.fixture
def chain(make_adapter, tiny_llama_folder, tmp_path):
    """Adapters, each trained on the base with those before it merged; and the base with all of them merged."""

    def make(name):
        folders, base = [], tiny_llama_folder
        for seed, (form, causal) in enumerate(CHAINS[name], 1):
            folder = make_adapter(base, tmp_path / f"adapter-{seed}", causal, seed=seed, **form)
            model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(base, dtype=torch.float32)
            merged = PeftModel.from_pretrained(model, folder).merge_and_unload()
            base = tmp_path / f"merged-{seed}"
            (merged.model if causal else merged).save_pretrained(base)
            folders.append(folder)
        return folders, AutoModel.from_pretrained(base, dtype=torch.float32)

    return make


def load(model, **arguments):
    return Encoder.from_pretrained(model, dtype="float32", device="cpu", **arguments)


def states(model, ids):
    model.config.is_causal = False
    with torch.inference_mode():
        return model(torch.tensor([ids])).last_hidden_state[0]


def peft_states(base, folder, ids):
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    return states(PeftModel.from_pretrained(model, folder), ids)


def assert_same(found, expected, tolerance=1e-5):
    assert (found - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("name", CHAINS)
def test_one_adapter_gives_the_states_of_the_chain(chain, tiny_llama_folder, tmp_path, name):
    folders, merged = chain(name)
    export_adapter(tiny_llama_folder, tmp_path / "out", adapters=folders)
    encoder = load(tmp_path / "out")
    assert (encoder.checkpoint.base, encoder.checkpoint.adapters) == (tiny_llama_folder, (tmp_path / "out",))
    ids = encoder.tokenizer(TEXTS[1])["input_ids"]
    expected = states(merged, ids)
    with torch.no_grad():
        assert_same(encoder.forward_packed(PackedBatch.from_sequences([ids])), expected)
    assert_same(peft_states(tiny_llama_folder, tmp_path / "out", ids), expected)
    plain = states(AutoModel.from_pretrained(tiny_llama_folder, dtype=torch.float32), ids)
    assert (plain - expected).norm() > 1e-2 * expected.norm()


def test_a_real_model(make_adapter, shared_data, tmp_path):
    base = shutil.copytree(shared_data / "stories260K" / "hf", tmp_path / "base")
    folders = [make_adapter(base, tmp_path / f"adapter-{seed}", seed=seed, r=seed + 2) for seed in (1, 2)]
    export_adapter(base, tmp_path / "out", adapters=folders)
    encoder = load(tmp_path / "out")
    ids = encoder.tokenizer(TEXTS[1])["input_ids"]
    model = AutoModel.from_pretrained(base, dtype=torch.float32)
    for folder in folders:
        model = PeftModel.from_pretrained(model, folder).merge_and_unload()
    expected = states(model, ids)
    assert_same(peft_states(base, tmp_path / "out", ids), expected)
    assert_same(torch.from_numpy(encoder.encode(TEXTS[1])), expected.mean(0))


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def test_the_configuration_is_as_short_as_the_chain_allows(chain, tiny_llama_folder, tmp_path):
    folders, _ = chain("three")
    export_adapter(tiny_llama_folder, tmp_path / "two", adapters=folders[:2])
    found = config_of(tmp_path / "two")
    queries, ups = ([f"layers.{layer}.{name}" for layer in range(3)] for name in ("self_attn.q_proj", "mlp.up_proj"))
    assert found["target_modules"] == sorted(LAST)
    assert found["r"] == found["lora_alpha"] == 4
    assert found["rank_pattern"] == found["alpha_pattern"] == dict.fromkeys(queries, 6) | dict.fromkeys(ups, 7)
    assert found["base_model_name_or_path"] == str(tiny_llama_folder)
    export_adapter(tiny_llama_folder, tmp_path / "third", adapters=folders[2])
    found = config_of(tmp_path / "third")
    assert len(found["target_modules"]) == 14
    assert not any(name.startswith("layers.1.") for name in found["target_modules"])
    assert (found["r"], found["rank_pattern"]) == (4, {})


@pytest.fixture
def run(make_adapter, tiny_llama_folder, tmp_path):
    """A run with one earlier stage and a tokenizer of its own, as LLM2Vec's folders have, that adds no BOS."""
    folder = make_adapter(tiny_llama_folder, tmp_path / "run", seed=2)
    make_adapter(tiny_llama_folder, tmp_path / "run" / "earlier" / "1", seed=1)
    RunDescription(
        "supervised",
        str(tiny_llama_folder),
        ("earlier/1",),
        window=(-1, 3),
        pooling="weighted_mean",
        instruction="find:",
        pools_special_tokens=False,
    ).write(folder)
    tokenizer = json.loads((tiny_llama_folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer | {"post_processor": None}))
    shutil.copy(tiny_llama_folder / "tokenizer_config.json", folder)
    prompts = {"prompts": {"passage": "a text: "}, "default_prompt_name": "passage"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 9}))
    return folder


def test_a_run_is_loaded_back_as_it_was(run, tiny_llama_folder, tmp_path):
    export_adapter(run, tmp_path / "out")
    ours, theirs = load(tmp_path / "out"), load(run)
    assert (ours.pooling, ours.windows, ours.normalize) == (theirs.pooling, theirs.windows, theirs.normalize)
    assert ours.prompts == theirs.prompts == {"passage": "a text: ", "query": "find: "}
    assert ours.default_prompt_name == theirs.default_prompt_name == "passage"
    assert ours.max_length == theirs.max_length == 9
    assert ours.pooled == theirs.pooled
    for encode in (Encoder.encode, Encoder.encode_query):
        np.testing.assert_allclose(encode(ours, TEXTS), encode(theirs, TEXTS), atol=1e-5)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    prompts = {"config_sentence_transformers.json", "sentence_bert_config.json"}
    assert names == {*FILES, "bivec.json", "tokenizer.json", "tokenizer_config.json", *prompts}
    assert len({stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}) == 1
    export_adapter(run, tmp_path / "last", pooling="last")
    assert load(tmp_path / "last").pooling == "last"
    (run / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 10**30}))  # as of many tokenizers
    export_adapter(run, tmp_path / "long")
    assert json.loads((tmp_path / "long" / "sentence_bert_config.json").read_text())["max_seq_length"] == 256


def test_the_base_is_named_as_any_process_finds_it(make_adapter, tiny_llama_folder, tmp_path, monkeypatch):
    shutil.copytree(tiny_llama_folder, tmp_path / "models" / "base")
    make_adapter(tiny_llama_folder, tmp_path / "models" / "adapter")
    path = tmp_path / "models" / "adapter" / "adapter_config.json"
    monkeypatch.chdir(tmp_path)
    for place, name in enumerate(("./base", "models/base")):
        path.write_text(json.dumps(config_of(path.parent) | {"base_model_name_or_path": name}))
        export_adapter(tmp_path / "models" / "adapter", tmp_path / f"out-{place}")
        assert config_of(tmp_path / f"out-{place}")["base_model_name_or_path"] == str(tmp_path / "models" / "base")
        assert RunDescription.read(tmp_path / f"out-{place}").base_model == str(tmp_path / "models" / "base")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_factors_have_the_asked_dtype(run, tmp_path, dtype):
    export_adapter(run, tmp_path / "out", dtype=dtype)
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "out" / FILES[1]).values()} == {f"torch.{dtype}"}
    error = abs(load(tmp_path / "out").encode(TEXTS) - load(run).encode(TEXTS)).max()
    assert error < {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.01}[dtype]


def test_what_is_no_sum_of_products_is_refused_by_name(make_adapter, tiny_llama_folder, run, tmp_path):
    make_adapter(tiny_llama_folder, tmp_path / "dora", use_dora=True)
    with pytest.raises(ValueError, match=r"dora/adapter_config\.json: use_dora is no sum .*; export the merged model"):
        export_adapter(run, tmp_path / "out", adapters=tmp_path / "dora")
    with pytest.raises(ValueError, match=r"has no adapter .*; export it without --adapter-only"):
        export_adapter(tiny_llama_folder, tmp_path / "out")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'q8_0'"):
        export_adapter(run, tmp_path / "out", dtype="q8_0")
    with pytest.raises(ValueError, match=r"pooling must be one of mean, .*, got 'max'"):
        export_adapter(run, tmp_path / "out", pooling="max")
    make_adapter(tiny_llama_folder, tmp_path / "huge", lora_alpha=10**7)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj\.lora_B\.weight is not finite in float16"):
        export_adapter(tmp_path / "huge", tmp_path / "out", dtype="float16")
    with pytest.raises(ValueError, match="the output lies within the input"):
        export_adapter(run, run / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_the_command(run, tmp_path):
    def invoke(*options):
        arguments = ["export", "--model", str(run), "--output", str(tmp_path / "out"), "--adapter-only", *options]
        return CliRunner().invoke(cli.app, arguments)

    assert invoke("--pooling", "first", "--normalize", "--max-length", "7").exit_code == 0
    encoder = load(tmp_path / "out")
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == ("first", True, 7)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / FILES[1]).values()} == {torch.float32}
