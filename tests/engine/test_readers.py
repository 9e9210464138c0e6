"""Verdicts on a folder's readers: each rule has a folder on either side, and no folder is more than a line."""

import json
import shlex
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import normalizers, pre_tokenizers
from typer.testing import CliRunner

from bivec import cli
from bivec.engine import checkpoints
from bivec.engine.readers import READERS, readers
from bivec.engine.run_folder import POOLINGS, RunDescription
from bivec.kernels.pooling import POOLING_MODES

CONFIG = {
    "architectures": ["LlamaModel"],
    "model_type": "llama",
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
    "is_causal": False,
    "use_bidirectional_attention": True,
}
QWEN = {"attention_bias": False, "use_sliding_window": False}
SLIDING = {"model_type": "qwen2", "architectures": ["Qwen2Model"], "use_sliding_window": True, "sliding_window": 10}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}
PROMPTS = {"prompts": {"query": "find: ", "document": ""}}
LENGTH = {"max_seq_length": 512, "do_lower_case": False}


def pooling(mode="mean_tokens", include_prompt=False):
    keys = ("cls_token", "mean_tokens", "weightedmean_tokens", "lasttoken")
    return {**{f"pooling_mode_{key}": key == mode for key in keys}, "include_prompt": include_prompt}


def modules(*kinds):
    kinds = kinds or ("Transformer", "Pooling", "Normalize")
    return [
        {"idx": place, "name": str(place), "path": f"{place}_{kind}" if place else "", "type": f"{prefix}.{kind}"}
        for place, kind in enumerate(kinds)
        for prefix in ["sentence_transformers.models"]
    ]


# a folder that everybody reads
WHOLE = {
    "config.json": CONFIG,
    "modules.json": modules(),
    "1_Pooling/config.json": pooling(),
    "sentence_bert_config.json": LENGTH,
    "tokenizer_config.json": {"pad_token": "</s>", "eos_token": "</s>"},
}


def write(folder, changes):
    """`WHOLE` with changed files; of `config.json`, changed keys; None removes."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in (WHOLE | changes).items():
        if name == "config.json":
            values = {key: value for key, value in (CONFIG | values).items() if value is not ...}
        if values is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


def judge(folder, changes):
    return {verdict.reader: verdict for verdict in readers(write(folder, changes))}


def test_a_whole_folder_is_read_by_all(tmp_path):
    found = judge(tmp_path, {})
    assert tuple(found) == READERS
    assert [verdict.verdict for verdict in found.values()] == ["yes", "yes", "yes", "yes", "with flags"]
    assert found["vLLM"].command == f"vllm serve {tmp_path}"
    assert found["TEI"].command == f"text-embeddings-router --model-id {tmp_path}"
    gguf = f"{tmp_path}.gguf"
    assert found["llama.cpp"].command.splitlines() == [
        f"bivec export --model {tmp_path} --format gguf --output {gguf}",
        f"llama-server --model {gguf} --embeddings --pooling mean --batch-size 512 --ubatch-size 512",
    ]


def byte_level(normalizer):
    pieces = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: place for place, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.normalizer = normalizer
    return {"tokenizer.json": tokenizer.to_str(), "config.json": {"vocab_size": 258}}


def test_the_tokenizer_is_judged_for_llama_cpp(tmp_path):
    of_bytes = judge(tmp_path / "bytes", byte_level(None))["llama.cpp"]
    assert of_bytes.verdict == "with flags"
    assert not [note for note in of_bytes.notes if "token" in note and "512" not in note]
    composed = judge(tmp_path / "composed", byte_level(normalizers.NFC()))["llama.cpp"]
    assert composed.verdict == "with flags"
    assert "texts that are not in Unicode's form NFC have other tokens there" in composed.notes
    for changes, reason in (
        (byte_level(normalizers.Lowercase()), "llama.cpp does not do its normalizer"),
        (byte_level(None) | {"tokenizer.json": "{}"}, "tokenizer.json cannot be read"),
    ):
        refused = judge(tmp_path / reason[:9], changes)["llama.cpp"]
        assert (refused.verdict, refused.command) == ("no", "")
        assert reason in refused.reasons[0]


RUN = {"stage": "export", "base_model": None, "earlier": [], "window": [-1, -1], "pooling": "mean"}


def config(**changes):
    return {"config.json": changes}


def run(**changes):
    return {"bivec.json": RUN | {"normalize": True} | changes}


def pooled(mode="mean_tokens", include_prompt=False):
    return {"1_Pooling/config.json": pooling(mode, include_prompt)}


def length(tokens):
    return {"sentence_bert_config.json": {"max_seq_length": tokens}}


PROMPTED = {"config_sentence_transformers.json": PROMPTS}
PROMPTED_BY_DEFAULT = {"config_sentence_transformers.json": PROMPTS | {"default_prompt_name": "query"}}
NO_MODULES = {"modules.json": None, "1_Pooling/config.json": None}
NOT_NORMALIZED = {"modules.json": modules("Transformer", "Pooling")}
RULES = [
    # (reader, changed files, verdict, what is said or to be run)
    ("transformers", NO_MODULES | config(is_causal=...), "with flags", "config.is_causal = False"),
    ("transformers", config(auto_map={"AutoModel": "model.LlamaBidirectionalModel"}), "no", "code of the model's own"),
    ("transformers", config(model_type="llama_bidirec"), "no", "code of the model's own"),
    ("transformers", {"tokenizer_config.json": {"eos_token": "</s>"}}, "with flags", "pad_token = tokenizer.eos_token"),
    ("transformers", PROMPTED, "yes", "'query') are put before a text by hand"),
    ("transformers", run(window=[-1, 0], normalize=False), "no", "bivec.json a causal window"),
    ("transformers", length(5000), "yes", "max_length=1024"),
    ("sentence-transformers", PROMPTED, "yes", "encode_query"),
    (
        "sentence-transformers",
        NO_MODULES | {"sentence_bert_config.json": None},
        "with flags",
        "')\nencoder.max_seq_length = 512",
    ),
    ("sentence-transformers", NO_MODULES | config(is_causal=...), "no", "does not say is_causal: false"),
    ("sentence-transformers", NO_MODULES | run(pooling="last", normalize=False), "no", "no modules.json"),
    ("sentence-transformers", run(pooling="last", normalize=False), "no", "pooling 'mean', bivec.json to 'last'"),
    ("sentence-transformers", run(normalize=False), "no", "differ in normalize"),
    (
        "sentence-transformers",
        PROMPTED | run(normalize=False) | pooled(include_prompt=True),
        "no",
        "would be pooled with the text",
    ),
    (
        "sentence-transformers",
        PROMPTED | pooled("weightedmean_tokens") | run(pooling="weighted_mean"),
        "no",
        "begin with a prompt's tokens",
    ),
    (
        "sentence-transformers",
        PROMPTED | run(pools_prompt=True),
        "no",
        "1_Pooling/config.json leaves prompts out of pooling, bivec.json does not",
    ),
    ("vLLM", config(is_causal=...) | run(), "with flags", "--hf-overrides '{\"is_causal\": false}'"),
    ("vLLM", config(dtype="float32"), "with flags", "--dtype float32"),
    ("vLLM", config(dtype=..., torch_dtype="float32"), "with flags", "--dtype float32"),
    ("vLLM", config(architectures=["MistralForCausalLM"], model_type="mistral", sliding_window=None), "yes", ""),
    ("vLLM", config(architectures=["MyModel"]), "no", "must name one that it serves"),
    ("vLLM", config(architectures=None), "no", "must name one that it serves"),
    ("vLLM", config(architectures=["LlamaBidirectionalModel"], pooling="avg"), "yes", ""),
    ("vLLM", config(architectures=["LlamaBidirectionalModel"], pooling="cls"), "no", "must be 'avg', got 'cls'"),
    ("vLLM", config(architectures=["LlamaBidirectionalModel"]), "no", "must be 'avg', got None"),
    (
        "vLLM",
        NO_MODULES | config(architectures=["LlamaForCausalLM"]) | {"sentence_bert_config.json": None},
        "with flags",
        "--runner pooling --convert embed --pooler-config "
        '\'{"pooling_type": "MEAN", "use_activation": false}\' --max-model-len 512',
    ),
    ("vLLM", NO_MODULES | run(), "with flags", '\'{"pooling_type": "MEAN"}\''),
    ("vLLM", {"1_Pooling/config.json": {"pooling_mode": "lasttoken"}}, "yes", ""),
    ("vLLM", pooled("weightedmean_tokens", include_prompt=True), "no", "no pooling 'weighted_mean'"),
    ("vLLM", PROMPTED, "no", "its prompts ('query') would be pooled with the text"),
    ("vLLM", PROMPTED | pooled("lasttoken"), "yes", "('query') are put before a text by hand"),
    ("vLLM", PROMPTED | pooled(include_prompt=True), "yes", "('query') are put before a text by hand"),
    (
        "vLLM",
        config(architectures=["MistralModel"], model_type="mistral", sliding_window=511),
        "no",
        "510 tokens to either side there, not 511",
    ),
    ("vLLM", config(architectures=["MistralModel"], model_type="mistral", sliding_window=512), "yes", ""),
    (
        "vLLM",
        config(**QWEN | {"attention_bias": True, "model_type": "qwen3", "architectures": ["Qwen3Model"]}),
        "no",
        "no bias in o_proj",
    ),
    ("vLLM", length(None), "no", "must be a number, got null"),
    ("vLLM", run(pooling="last"), "with flags", '\'{"pooling_type": "LAST"}\''),
    ("vLLM", run(instruction="find:"), "no", "its prompts ('query') would be"),
    (
        "vLLM",
        config(**SLIDING, layer_types=["sliding_attention", "sliding_attention"]),
        "no",
        "9 tokens to either side",
    ),
    ("vLLM", config(**SLIDING, layer_types=["full_attention", "full_attention"]), "yes", ""),
    (
        "vLLM",
        config(**SLIDING | {"sliding_window": 512, "layer_types": ["full_attention", "sliding_attention"]}),
        "no",
        "some of its layers slide a window and some do not",
    ),
    ("vLLM", PROMPTED | pooled("lasttoken") | run(pooling="last"), "yes", "put before a text by hand"),
    (
        "TEI",
        config(use_bidirectional_attention=...),
        "no",
        "use_bidirectional_attention: true in config.json it is causal",
    ),
    ("TEI", config(is_causal=...) | run(), "yes", ""),
    ("TEI", config(**QWEN, model_type="qwen2", use_bidirectional_attention=...), "yes", ""),
    ("TEI", config(**QWEN, model_type="qwen2", is_causal=...) | run(), "no", "without is_causal: false"),
    ("TEI", config(model_type="qwen2"), "no", "must have use_sliding_window"),
    ("TEI", config(**QWEN | {"use_sliding_window": True, "model_type": "qwen2"}), "no", "refuses use_sliding_window"),
    ("TEI", config(**QWEN, model_type="qwen3", head_dim=32), "yes", ""),
    (
        "TEI",
        config(**QWEN, model_type="qwen3", eos_token_id=[1, 2]),
        "no",
        "eos_token_id in config.json must be one number",
    ),
    ("TEI", config(model_type="mistral", eos_token_id=[1, 2], sliding_window=None), "yes", ""),
    ("TEI", config(model_type="mistral", sliding_window=100), "no", "its sliding window (100)"),
    ("TEI", config(model_type="mistral", sliding_window=512), "yes", ""),
    ("TEI", config(eos_token_id=[2, 3]), "no", "eos_token_id in config.json must be one number, got [2, 3]"),
    ("TEI", config(pad_token_id=-1), "no", "pad_token_id in config.json must be one number"),
    ("TEI", config(rope_theta=...), "no", "must have rope_theta"),
    ("TEI", config(rope_theta=..., rope_parameters={"rope_type": "default", "rope_theta": 10000.0}), "yes", ""),
    ("TEI", config(rope_parameters={"rope_theta": 10000.0}), "no", "must have rope_theta and rope_type"),
    ("TEI", config(rope_parameters=LLAMA3), "no", "leaves the scaling out, without a word"),
    ("TEI", config(rope_scaling=LLAMA3), "no", "refuses to start"),
    ("TEI", config(head_dim=32), "no", "head_dim must be hidden_size / num_attention_heads (16), got 32"),
    ("TEI", config(head_dim=16), "yes", ""),
    ("TEI", config(hidden_size=48), "no", "heads of a multiple of 8 up to 256, got 12"),
    ("TEI", config(attention_bias=True), "no", "those of attention_bias would be left out"),
    ("TEI", config(initializer_range=...), "no", "must have initializer_range"),
    (
        "TEI",
        {"1_Pooling/config.json": {"pooling_mode": "mean", "include_prompt": False}},
        "with flags",
        "--pooling mean",
    ),
    ("TEI", pooled("lasttoken"), "yes", ""),
    ("TEI", pooled("weightedmean_tokens", include_prompt=True), "no", "no pooling 'weighted_mean'"),
    ("TEI", PROMPTED, "no", "its prompts ('query') would be pooled"),
    ("TEI", PROMPTED_BY_DEFAULT | pooled("lasttoken"), "with flags", "--default-prompt-name query"),
    ("TEI", NOT_NORMALIZED, "yes", '"normalize": false'),
    ("TEI", {"sentence_bert_config.json": {}}, "no", "must have max_seq_length"),
    ("TEI", length(20000) | config(max_position_embeddings=32768), "with flags", "--max-batch-tokens 20000"),
    ("TEI", config(model_type="mistral", sliding_window=None, rope_scaling=LLAMA3), "yes", ""),
    (
        "TEI",
        config(model_type="mistral", sliding_window=None, rope_parameters=LLAMA3),
        "no",
        "leaves the scaling out, without a word",
    ),
    (
        "TEI",
        config(model_type="mistral", sliding_window=None, rope_scaling=LINEAR),
        "no",
        "scales it otherwise, without a word",
    ),
    ("TEI", config(**QWEN, model_type="qwen3", head_dim=16), "yes", "the CPU's in float32"),
    ("TEI", config(**QWEN, model_type="qwen3"), "no", "head_dim must be hidden_size / num_attention_heads"),
    ("TEI", config(mlp_bias=True), "no", "those of mlp_bias would be left out"),
    ("TEI", config(sliding_window=100), "no", "its sliding window (100)"),
    ("TEI", {"1_Pooling/config.json": {"pooling_mode_mean_tokens": True}}, "with flags", "--pooling mean"),
    ("TEI", {}, "yes", "the CPU's refuses it; ROCm's, HPU's and Intel's are causal"),
    ("llama.cpp", NOT_NORMALIZED, "with flags", "--embd-normalize -1"),
    ("llama.cpp", length(777), "with flags", "--ubatch-size 777"),
    ("llama.cpp", pooled("lasttoken"), "with flags", "--pooling last"),
    ("llama.cpp", pooled("weightedmean_tokens", include_prompt=True), "no", "no pooling 'weighted_mean'"),
    ("llama.cpp", PROMPTED, "no", "its prompts ('query') would be pooled"),
    ("llama.cpp", config(model_type="mistral", sliding_window=100), "with flags", "--batch-size 100 --ubatch-size 100"),
    ("llama.cpp", config(is_causal=...), "no", "bidirectional models alone"),
    ("llama.cpp", config(**QWEN, model_type="qwen3", rope_scaling=LLAMA3), "no", "no rope of type"),
    ("llama.cpp", config(rope_scaling=LLAMA3), "with flags", "--pooling mean"),
    ("llama.cpp", config(model_type="qwen3", attention_bias=True), "no", "no bias in o_proj"),
    ("llama.cpp", config(model_type="llama", attention_bias=True), "with flags", "--pooling mean"),
    ("llama.cpp", config(model_type="qwen2", head_dim=32), "no", "head_dim must be"),
    ("llama.cpp", config(model_type="qwen3", head_dim=32), "with flags", "--pooling mean"),
    ("llama.cpp", PROMPTED_BY_DEFAULT, "no", "the prompt 'query' stands before every text"),
]


@pytest.mark.parametrize(("reader", "changes", "expected", "said"), RULES)
def test_each_rule(tmp_path, reader, changes, expected, said):
    verdict = judge(tmp_path, changes)[reader]
    assert verdict.verdict == expected, verdict
    assert said in "\n".join([*verdict.reasons, *verdict.notes, verdict.command]), verdict


@pytest.mark.parametrize(
    ("run", "said"),
    [
        ({"pools_special_tokens": False}, "it never pools BOS"),
        ({"template": ["<|user|>", "<|end|>"]}, "a chat template"),
        ({"window": [-1, 4]}, "the window (-1, 4)"),
    ],
)
def test_what_only_bivec_does(tmp_path, run, said):
    found = judge(tmp_path, {"bivec.json": RUN | {"normalize": True} | run})
    assert {(verdict.verdict, verdict.command) for verdict in found.values()} == {("no", "")}
    assert all(said in verdict.reasons[0] for verdict in found.values())


def test_the_last_token_is_no_special_one(tmp_path):
    """Whether BOS is pooled makes no difference to it."""
    changes = {"1_Pooling/config.json": pooling("lasttoken")}
    run = RUN | {"normalize": True, "pooling": "last", "pools_special_tokens": False}
    assert judge(tmp_path, changes | {"bivec.json": run})["vLLM"].verdict == "yes"


def test_nothing_is_downloaded(tmp_path, monkeypatch):
    """Whatever a folder names."""
    asked = []
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *_, **options: asked.append(options) or tmp_path)
    entries = modules("Transformer", "Pooling")
    entries[0]["path"] = "0_Transformer"
    folder = write(tmp_path, {"modules.json": entries})
    (folder / "0_Transformer").mkdir()
    (folder / "config.json").rename(folder / "0_Transformer" / "config.json")
    adapter = {"base_model_name_or_path": "meta/Llama"}
    (folder / "0_Transformer" / "adapter_config.json").write_text(json.dumps(adapter))
    with pytest.raises((ValueError, FileNotFoundError)):
        readers(folder)
    assert [options["local_files_only"] for options in asked] == [True]


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"pools_special_tokens": False}, "it never pools BOS, which every other reader does"),
        ({"template": ("[INST] ", " [/INST]")}, "it puts texts into a chat template"),
        ({"window": (-1, 0)}, "it is causal, which is not exported"),
    ],
)
def test_an_adapter_that_cannot_be_exported_is_not_told_to_be(tiny_llama_folder, tmp_path, changes, obstacle):
    base = {"base_model_name_or_path": str(tiny_llama_folder)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(base))
    RunDescription("supervised", str(tiny_llama_folder), **changes).write(tmp_path)
    for verdict in readers(tmp_path):
        assert (verdict.verdict, verdict.reasons[0], verdict.command) == (
            "no",
            f"it is an adapter on {tiny_llama_folder}",
            "",
        )
        assert verdict.reasons[1].startswith(obstacle)


def test_an_adapter_is_to_be_exported(tmp_path):
    folder = write(tmp_path / "a b", {"adapter_config.json": {"base_model_name_or_path": "meta/Llama"}})
    for verdict in readers(folder):
        assert (verdict.verdict, verdict.reasons) == ("no", ("it is an adapter on meta/Llama: export it first",))
        assert shlex.split(verdict.command) == [
            "bivec",
            "export",
            "--model",
            str(folder),
            "--output",
            f"{folder}-exported",
        ]


def test_a_run_that_lost_its_adapter_is_refused(tiny_llama_folder, tmp_path):
    folder = write(tmp_path, {"bivec.json": RUN | {"base_model": str(tiny_llama_folder)}})
    with pytest.raises(FileNotFoundError, match=r"adapter_config\.json does not exist, and the folder is said to hold"):
        readers(folder)


def test_a_causal_model_of_others_is_causal_everywhere(tmp_path):
    """What transformers makes of such a folder is what bivec makes of it, and no export is advised."""
    causal = {"is_causal": ..., "use_bidirectional_attention": ...}
    found = judge(tmp_path, {"config.json": causal, "1_Pooling/config.json": pooling("lasttoken", include_prompt=True)})
    assert [verdict.verdict for verdict in found.values()] == ["yes", "yes", "yes", "yes", "no"]
    assert "is_causal" not in found["transformers"].command + found["vLLM"].command
    assert "without a word" not in "".join(found["TEI"].notes)
    found = judge(tmp_path, {"config.json": causal | {"use_bidirectional_attention": True}})
    assert (found["TEI"].verdict, found["TEI"].command) == ("no", "")
    assert "with use_bidirectional_attention: true in config.json it is bidirectional" in found["TEI"].reasons[0]


def test_what_helps_is_said(tmp_path):
    """An export, where it does away with every reason; where prompts alone stand in the way, what serves the rest."""
    found = judge(tmp_path, {"config.json": {"use_bidirectional_attention": ..., "eos_token_id": [1, 2]}})["TEI"]
    assert len(found.reasons) == 2
    assert found.command == f"bivec export --model {tmp_path} --output {tmp_path}-exported"
    found = judge(tmp_path, {"config.json": {"use_bidirectional_attention": ..., "head_dim": 32}})["TEI"]
    assert found.command == ""
    found = judge(tmp_path, {"config_sentence_transformers.json": PROMPTS})["vLLM"]
    assert (found.verdict, found.command) == ("no", f"vllm serve {tmp_path}")
    assert str(found) == (
        "vLLM: no: its prompts ('query') would be pooled with the text; texts without a prompt come out right"
    )


def test_names_and_dtype_of_weights_come_from_their_header(tmp_path):
    config = {"dtype": ...}
    folder = write(tmp_path, {"config.json": config})
    weight = np.ones((2, 2), np.float32)
    for name, tei in (("embed_tokens.weight", "yes"), ("model.embed_tokens.weight", "no")):
        save_file({name: weight}, folder / "model.safetensors")
        found = judge(folder, {"config.json": config})
        assert (found["TEI"].verdict, "--dtype float32" in found["vLLM"].command) == (tei, True)
    save_file({"embed_tokens.weight": weight.astype(np.float16)}, folder / "model.safetensors")
    assert "--dtype" not in judge(folder, {"config.json": config})["vLLM"].command
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "one.safetensors"}}
    found = judge(folder, {"config.json": config, "model.safetensors.index.json": index})
    assert (found["TEI"].verdict, "--dtype" in found["vLLM"].command) == ("no", False)


def test_a_transformer_in_a_folder_of_its_own(tmp_path):
    """As old versions of sentence-transformers wrote it."""
    entries = modules("Transformer", "Pooling")
    entries[0]["path"] = "0_Transformer"
    write(tmp_path, {"modules.json": entries})
    (tmp_path / "0_Transformer").mkdir()
    for name in ("config.json", "sentence_bert_config.json", "tokenizer_config.json"):
        (tmp_path / name).rename(tmp_path / "0_Transformer" / name)
    found = {verdict.reader: verdict for verdict in readers(tmp_path)}
    assert found["sentence-transformers"].verdict == "yes"
    for reader in ("transformers", "vLLM", "TEI"):
        assert "config.json lies in 0_Transformer" in found[reader].reasons
        assert found[reader].command.startswith("bivec export")


@pytest.mark.parametrize("name", ["plain", "it's a folder", '"quoted" $HOME `x`'])
def test_commands_can_be_copied(tmp_path, name):
    folder = tmp_path / name
    for verdict in judge(folder, {"config.json": {"dtype": "float32"}}).values():
        if verdict.reader in ("transformers", "sentence-transformers"):
            compile(verdict.command, verdict.reader, "exec")
            assert repr(str(folder)) in verdict.command
        else:
            lines = [shlex.split(line) for line in verdict.command.splitlines()]
            assert all(str(folder) in line or f"{folder}.gguf" in line for line in lines)


BROKEN = [
    ({"config.json": "{"}, "config.json is not valid JSON"),
    ({"config.json": "[]"}, "config.json must hold a JSON object"),
    ({"config.json": json.dumps(CONFIG | {"model_type": "bert"})}, "model_type must be one of llama, "),
    ({"config.json": json.dumps(CONFIG | {"model_type": ["llama"]})}, "model_type must be one of llama, "),
    ({"config.json": json.dumps(CONFIG | {"hidden_size": "64"})}, "hidden_size must be a positive integer"),
    ({"config.json": json.dumps(CONFIG | {"num_attention_heads": 0})}, "num_attention_heads must be a positive"),
    ({"modules.json": "{}"}, "modules.json must hold a JSON array"),
    ({"modules.json": [1]}, "each module must have a type"),
    ({"modules.json": [{"type": "Pooling", "path": "../x"}]}, "the module 'Pooling' is not computed"),
    ({"modules.json": [{"type": "x.Pooling", "path": "../x"}], "bivec.json": RUN}, "a path within the folder"),
    ({"1_Pooling/config.json": None}, "config.json does not exist"),
    ({"1_Pooling/config.json": "[]"}, "must hold a JSON object"),
    ({"sentence_bert_config.json": {"max_seq_length": "512"}}, "max_seq_length must be a number of tokens"),
    ({"config_sentence_transformers.json": {"prompts": ["x"]}}, "prompts must be strings by name"),
    ({"config_sentence_transformers.json": {"default_prompt_name": "x"}}, "default_prompt_name must be one of"),
    (
        {"config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": ["x"]}},
        "default_prompt_name must be",
    ),
    ({"bivec.json": RUN | {"window": 3}}, "window must be a list"),
    ({"bivec.json": RUN | {"pooling": ["mean"]}}, "pooling must be one of mean"),
    ({"adapter_config.json": {}}, "base_model_name_or_path must be"),
    ({"model.safetensors": "short"}, "its header cannot be read"),
    ({"model.safetensors": "\x02" + "\0" * 7 + "[]"}, "its header cannot be read"),
    ({"model.safetensors.index.json": {"weight_map": ["x"]}}, "weight_map must name a file"),
]


@pytest.mark.parametrize(("changes", "message"), BROKEN)
def test_a_broken_folder_is_one_line(tmp_path, changes, message):
    folder = write(tmp_path / "broken", {name: values for name, values in changes.items() if name != "config.json"})
    if "config.json" in changes:
        (folder / "config.json").write_text(changes["config.json"])
    if changes.get("1_Pooling/config.json", "") is None:
        (folder / "1_Pooling" / "config.json").unlink(missing_ok=True)
    found = CliRunner().invoke(cli.app, ["inspect", "--readers", "--model", str(folder)])
    assert (found.exit_code, found.stdout) == (2, ""), found.output
    assert len(found.stderr.splitlines()) == 1
    assert message in found.stderr


@pytest.mark.parametrize("value", [None, True, 3, -1.5, "x", [], [1], {}, {"x": 1}])
def test_values_of_the_wrong_kind_crash_nothing(tmp_path, value):
    """Whatever stands at a key, there is a verdict or a ValueError that names the file."""
    folder = write(tmp_path, {})

    def check(name, values):
        before = (folder / name).read_bytes() if (folder / name).exists() else b"{}"
        (folder / name).write_text(json.dumps(values))
        try:
            verdicts = readers(folder)
        except ValueError as error:
            if str(folder) not in str(error):
                raise
        else:
            assert tuple(verdict.reader for verdict in verdicts) == READERS
        (folder / name).write_bytes(before)

    names = [*CONFIG, *QWEN, "rope_parameters", "rope_scaling", "layer_types", "sliding_window", "head_dim", "pooling"]
    for name in [*names, "pad_token_id", "mlp_bias", "auto_map", "torch_dtype"]:
        for kind in ("llama", "mistral", "qwen3"):
            check("config.json", CONFIG | QWEN | {"use_sliding_window": True, "model_type": kind} | {name: value})
    for name in ("pooling_mode", "include_prompt", "pooling_mode_mean_tokens"):
        check("1_Pooling/config.json", {name: value})
    check("tokenizer_config.json", {"pad_token": value, "eos_token": value})
    check("sentence_bert_config.json", {"max_seq_length": value})
    for name in ("stage", "window", "pooling", "pools_prompt", "normalize", "template", "instruction"):
        check("bivec.json", RUN | {name: value})


def test_the_command_line(tmp_path):
    folder = write(tmp_path / "a b", {})
    arguments = ["inspect", "--readers", "--model", str(folder)]
    found = CliRunner().invoke(cli.app, arguments)
    assert (found.exit_code, found.stderr) == (0, "")
    assert "\nvLLM: yes\n" in found.stdout
    assert f"\nvllm serve '{folder}'\n" in found.stdout
    found = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert json.loads(found.stdout) == json.loads(json.dumps([asdict(verdict) for verdict in readers(folder)]))
    found = CliRunner().invoke(cli.app, [*arguments, "--adapter", "x"])
    assert (found.exit_code, found.stdout) == (2, "")
    found = CliRunner().invoke(cli.app, ["inspect", "--readers", "--model", "owner/name"])
    assert (found.exit_code, found.stdout) == (2, "")
    assert "bivec export --model owner/name --output DIR" in found.stderr


def test_nothing_heavy_is_imported(tmp_path):
    folder = write(tmp_path / "whole", run())
    program = (
        "import sys; from bivec.cli import app\n"
        f"try: app(['inspect', '--readers', '--model', {str(folder)!r}])\n"
        "finally: print({'torch', 'transformers', 'peft'} & set(sys.modules), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stderr == "set()\n"
    assert POOLINGS == POOLING_MODES
