"""The exported `config.json` asks every reader for the model that was exported, whatever the base's file holds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from bivec import Encoder
from bivec.engine.config import load_config
from bivec.engine.export import export

TEXTS = ["the quick brown fox", "many sequences side by side, and more of them than an original context holds", "dog"]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
ROPES = {
    "default": {},
    "theta": {"rope_theta": 500000.0},
    "linear": {"rope_theta": 20000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
    "of transformers 5": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}},
}


def change(folder: Path, **changes) -> None:
    """Rewrite keys of `config.json`; None takes one out."""
    path = folder / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def transformers_means(folder: Path, **changes) -> np.ndarray:
    """Mean-pooled vectors of a padded batch, by transformers and the pooling written here."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token
    config = transformers.AutoConfig.from_pretrained(folder)
    config.update(changes)
    model = transformers.AutoModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    return ((states * mask).sum(dim=1) / mask.sum(dim=1)).numpy()


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
def test_every_architecture_says_its_own_shape(checkpoint_folders, tmp_path, architecture):
    base = checkpoint_folders[architecture]
    export(base, tmp_path / "out", dtype="float32")
    assert load_config(tmp_path / "out") == load_config(base)
    expected = transformers_means(base, is_causal=False)
    assert np.abs(transformers_means(tmp_path / "out") - expected).max() < 1e-5
    assert np.abs(Encoder.from_pretrained(tmp_path / "out", dtype="float32").encode(TEXTS) - expected).max() < 1e-5
    change(tmp_path / "out", layer_types=None)  # as for readers that know max_window_layers alone
    assert load_config(tmp_path / "out") == load_config(base)


@pytest.mark.parametrize("rope", ROPES)
def test_both_spellings_of_a_rope_are_one(fresh_llama_folder, tmp_path, rope):
    """Each alone and both together, here and in transformers; and it is the base's."""
    change(fresh_llama_folder, **{"rope_parameters": None} | ROPES[rope])
    export(fresh_llama_folder, tmp_path / "out", dtype="float32")
    expected = transformers_means(fresh_llama_folder, is_causal=False)
    whole = json.loads((tmp_path / "out" / "config.json").read_text())
    assert ("rope_scaling" in whole) == (rope not in ("default", "theta"))
    older, newer = dict(whole), dict(whole)
    del older["rope_parameters"]
    newer = {key: value for key, value in whole.items() if key not in ("rope_theta", "rope_scaling")}
    for values in (whole, older, newer):
        (tmp_path / "out" / "config.json").write_text(json.dumps(values))
        assert load_config(tmp_path / "out") == load_config(fresh_llama_folder)
        assert np.abs(transformers_means(tmp_path / "out") - expected).max() < 1e-5


def test_nothing_of_the_base_misleads(fresh_llama_folder, tmp_path):
    expected = Encoder.from_pretrained(fresh_llama_folder, dtype="float32").encode(TEXTS)
    misleading = {
        "torch_dtype": "float16",
        "is_causal": True,
        "use_bidirectional_attention": False,
        "pooling": "cls",
        "eos_token_id": [1, 0],
        "pad_token_id": -1,
        "architectures": ["LlamaForSequenceClassification"],
        "id2label": {"0": "no", "1": "yes"},
        "label2id": {"no": 0, "yes": 1},
        "sliding_window": 2,
        "_attn_implementation": "nobody's",
        "_name_or_path": "/home/somebody/secret",
    }
    change(fresh_llama_folder, **misleading)
    path = fresh_llama_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": None, "auto_map": {}}))
    export(fresh_llama_folder, tmp_path / "out", dtype="bfloat16")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    right = {
        "architectures": ["LlamaModel"],
        "dtype": "bfloat16",
        "is_causal": False,
        "use_bidirectional_attention": True,
        "pooling": "avg",
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    assert {key: written[key] for key in right} == right
    assert (
        not written.keys() & (misleading.keys() - right.keys()) | {"quantization_config", "auto_map"} & written.keys()
    )
    export(fresh_llama_folder, tmp_path / "whole", dtype="float32")
    assert np.abs(transformers_means(tmp_path / "whole") - expected).max() < 1e-5


@pytest.mark.parametrize(
    ("pooling", "name"), [("mean", "avg"), ("first", "cls"), ("last", "last"), ("weighted_mean", None)]
)
def test_the_pooling_has_its_name_of_vllm(tiny_llama_folder, tmp_path, pooling, name):
    export(tiny_llama_folder, tmp_path / "out", pooling=pooling)
    assert json.loads((tmp_path / "out" / "config.json").read_text()).get("pooling") == name


def test_a_mistral_whose_layers_differ_is_refused(make_checkpoint, tmp_path):
    """transformers would slide the window in all of them."""
    make_checkpoint(tmp_path / "model", "mistral")
    change(tmp_path / "model", layer_types=["full_attention", "sliding_attention", "full_attention"])
    with pytest.raises(ValueError, match="layer_types gives some layers of a mistral a sliding window"):
        export(tmp_path / "model", tmp_path / "out")
    change(tmp_path / "model", layer_types=["full_attention"] * 3)
    export(tmp_path / "model", tmp_path / "out", dtype="float32")
    expected = Encoder.from_pretrained(tmp_path / "model", dtype="float32").encode(TEXTS)
    assert np.abs(transformers_means(tmp_path / "out") - expected).max() < 1e-5


@pytest.mark.parametrize(("pooling", "name"), [("avg", "mean"), ("cls", "first"), ("last", "last")])
def test_nvidias_type_becomes_a_llama(fresh_llama_folder, tmp_path, pooling, name):
    """transformers knows no `llama_bidirec` without its code, which is not exported."""
    code = {"AutoConfig": "model.LlamaBidirectionalConfig", "AutoModel": "model.LlamaBidirectionalModel"}
    change(fresh_llama_folder, model_type="llama_bidirec", pooling=pooling, temperature=0.02, auto_map=code)
    export(fresh_llama_folder, tmp_path / "out", dtype="float32")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    found = [written[key] for key in ("model_type", "architectures", "pooling")]
    assert found == ["llama", ["LlamaModel"], pooling]
    assert not written.keys() & {"auto_map", "temperature"}
    source, exported = (
        Encoder.from_pretrained(path, dtype="float32") for path in (fresh_llama_folder, tmp_path / "out")
    )
    assert exported.pooling == source.pooling == name
    assert np.array_equal(exported.encode(TEXTS, prompt="find: "), source.encode(TEXTS, prompt="find: "))
    if name == "mean":
        assert np.abs(transformers_means(tmp_path / "out") - exported.encode(TEXTS)).max() < 1e-5
