"""What text-embeddings-inference and vLLM make of an exported folder, by rules written down from their sources.

A rule is the fields that a reader parses, with their types, and what it computes from them: which mask, which states
are pooled, which length. It computes here with transformers' layers, in float32, from nothing but the folder; what it
gives must be what bivec gives, or the reader must be one that is known not to be able to.

text-embeddings-inference 1.9.3 (commit 0d124dc): `router/src/lib.rs` (ModelConfig, PoolConfig, STConfig, NewSTConfig,
get_backend_model_type), `core/src/tokenization.rs`, `backends/candle/src/lib.rs` (Config, CandleBackend::new) and
`models/{llama,mistral,qwen2,qwen3,flash_mistral,flash_qwen2,flash_qwen3}.rs`, `layers/rotary.rs`.
vLLM 0.33: `vllm/transformers_utils/config.py` (get_pooling_config, parse_pooling_type), `vllm/config/model.py`
(_SUFFIX_TO_DEFAULTS), `vllm/model_executor/models/{llama,config,interfaces_base}.py` (LlamaDecoderLayer,
LlamaBidirectionalConfig, VllmModelForPooling).
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file

from bivec import Encoder
from bivec.engine.export import export
from bivec.engine.run_folder import RunDescription

TEXTS = ["the quick brown fox", "dog", "München, naïve café", "many sequences side by side, and more of them " * 3]
PROMPT = "find what answers it: "
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 20000.0}
POOLINGS = ["mean", "first", "last"]


class Refused(Exception):
    """The reader says no, and does not start."""


# kinds of fields as serde reads them: a question mark where they may be null or absent
KINDS: dict[str, Callable[[Any], bool]] = {
    "usize": lambda value: type(value) is int and value >= 0,
    "float": lambda value: type(value) in (int, float),
    "bool": lambda value: type(value) is bool,
    "string": lambda value: type(value) is str,
    "strings": lambda value: type(value) is list and all(type(entry) is str for entry in value),
    "map": lambda value: type(value) is dict and all(type(entry) is str for entry in value.values()),
    "rope": lambda value: type(value["rope_theta"]) is float and type(value["rope_type"]) is str,
    "any": lambda value: True,
}
TEI_MODEL = {
    "architectures": "strings",
    "model_type": "string",
    "max_position_embeddings": "usize?",
    "pad_token_id": "usize?",
    "id2label": "map?",
    "label2id": "any?",
    "auto_map": "map?",
}
TEI_POOLING = {
    name: "bool" for name in ("pooling_mode_cls_token", "pooling_mode_mean_tokens", "pooling_mode_lasttoken")
}
TEI_LENGTH = {"max_seq_length": "usize"}
TEI_PROMPTS = {"prompts": "map?"}
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEI_SHAPE = {
    **dict.fromkeys((*_SIZES, "num_key_value_heads", "max_position_embeddings"), "usize"),
    "hidden_act": "string",
    "rms_norm_eps": "float",
    "rope_theta": "float?",
    "rope_parameters": "rope?",
    "sliding_window": "usize?",
}
_TEI_MISTRAL = _TEI_SHAPE | {
    "initializer_range": "float",
    "rope_scaling": "any?",
    "use_bidirectional_attention": "bool?",
}
TEI_SHAPES = {
    "mistral": _TEI_MISTRAL,
    "llama": _TEI_MISTRAL
    | dict.fromkeys(("head_dim", "bos_token_id", "eos_token_id", "pad_token_id", "pretraining_tp"), "usize?")
    | {"attention_bias": "bool?", "attention_dropout": "float?", "mlp_bias": "bool", "tie_word_embeddings": "bool?"},
    "qwen2": _TEI_SHAPE | {"use_sliding_window": "bool", "is_causal": "bool"},
    "qwen3": _TEI_SHAPE
    | {"attention_bias": "bool", "use_sliding_window": "bool", "eos_token_id": "usize"}
    | {"head_dim": "usize?", "use_bidirectional_attention": "bool?", "num_labels": "usize?"},
}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def parse(path: Path, schema: dict[str, str]) -> dict[str, Any]:
    """The fields of a schema, which must be there and of their kinds."""
    values = read(path)
    for field, kind in schema.items():
        value = values.get(field)
        if not (kind.endswith("?") if value is None else KINDS[kind.rstrip("?")](value)):
            raise Refused(f"{path.name}: {field} must be {kind}, is {value!r}")
    return {field: values.get(field) for field in schema}


def tei_pooling(folder: Path) -> str:
    """`get_backend_model_type` without --pooling: the name of the pooling."""
    for architecture in parse(folder / "config.json", TEI_MODEL)["architectures"]:
        if architecture.endswith("Classification"):
            raise Refused("a classifier")
    modes = parse(folder / "1_Pooling" / "config.json", TEI_POOLING)
    names = {"cls_token": "first", "mean_tokens": "mean", "lasttoken": "last"}
    found = [name for field, name in names.items() if modes[f"pooling_mode_{field}"]]
    if not found:
        raise Refused("the pooling is not supported")
    return found[0]


def tei_model(folder: Path) -> torch.nn.Module:
    """The candle backend's model on CUDA, of what it reads of the configuration and the tensors that it asks for."""
    kind = read(folder / "config.json")["model_type"]
    values = parse(folder / "config.json", TEI_SHAPES[kind])
    if kind == "llama" and values["rope_scaling"] is not None:
        raise Refused("rope scaling is not supported")
    if values.get("use_sliding_window"):
        raise Refused("a sliding window is not supported")
    assert values["sliding_window"] is None, "it would slide a Mistral's window to the left alone"
    head_dim = values["hidden_size"] // values["num_attention_heads"]
    if kind == "qwen3":
        head_dim = values["head_dim"] or head_dim
    theta = values["rope_theta"] if values["rope_theta"] is not None else values["rope_parameters"]["rope_theta"]
    causal = values["is_causal"] if kind == "qwen2" else not values["use_bidirectional_attention"]
    shape = {field: values[field] for field in (*_SIZES, "num_key_value_heads", "max_position_embeddings")}
    config = transformers.AutoConfig.for_model(
        kind,
        **shape,
        head_dim=head_dim,
        rms_norm_eps=values["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": theta},
        is_causal=causal,
        sliding_window=values["sliding_window"],
        pad_token_id=None,
    )
    model = transformers.AutoModel.from_config(config).eval()
    weights = load_file(folder / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name not in weights or weights[name].shape != parameter.shape:
            raise Refused(f"no tensor {name} of shape {tuple(parameter.shape)}")
        parameter.data = weights[name].float()
    return model


def tei_vectors(folder: Path, texts: Sequence[str], prompt_name: str | None = None) -> np.ndarray:
    """Of `/embed` with its defaults: a prompt is put before the text and pooled with it; vectors get length 1."""
    pooling, model = tei_pooling(folder), tei_model(folder)
    length = parse(folder / "sentence_bert_config.json", TEI_LENGTH)["max_seq_length"]
    prompt = ""
    if prompt_name is not None:
        prompt = parse(folder / "config_sentence_transformers.json", TEI_PROMPTS)["prompts"][prompt_name]
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    ids = [tokenizer.encode(prompt + text).ids for text in texts]
    return normalized(vectors_of(model, ids, pooling))


def vllm_pooler(folder: Path, architecture: str = "") -> dict[str, Any]:
    """`get_pooling_config`, what the class `LlamaBidirectionalModel` does after it, and the defaults of a Llama."""
    found: dict[str, Any] = {"seq_pooling_type": "LAST", "use_activation": True}
    modules = read(folder / "modules.json")
    normalizes = any(module["type"] == "sentence_transformers.models.Normalize" for module in modules)
    pooling = next(module for module in modules if module["type"] == "sentence_transformers.models.Pooling")
    found["use_activation"] = normalizes
    for key, value in read(folder / pooling["path"] / "config.json").items():
        if value is True:
            name = key.replace("pooling_mode_", "").split("_", 1)[0]
            name = ("last" if "lasttoken" in name else name).upper()
            if name in ("CLS", "LAST", "MEAN"):
                found["seq_pooling_type"] = name
    values = read(folder / "config.json")
    if architecture == "LlamaBidirectionalModel":
        if values.get("pooling") not in ("avg", "cls", "last"):
            raise Refused(f"pool_type {values.get('pooling')!r} not supported")
        found["seq_pooling_type"] = {"avg": "MEAN", "cls": "CLS", "last": "LAST"}[values["pooling"]]
        values["is_causal"] = False
    else:
        assert all(name.endswith("Model") for name in values["architectures"])  # so it is a pooling model by itself
    return found | {"is_causal": values.get("is_causal", True)}


def vllm_vectors(folder: Path, texts: Sequence[str], architecture: str = "") -> np.ndarray:
    """Of `vllm serve FOLDER`: texts as they come, all tokens pooled; the shape is transformers' reading of the file."""
    pooler = vllm_pooler(folder, architecture)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.is_causal = pooler["is_causal"]
    model = transformers.AutoModel.from_pretrained(folder, config=config, dtype=torch.float32).eval()
    ids = transformers.AutoTokenizer.from_pretrained(folder)(list(texts))["input_ids"]
    names = {"MEAN": "mean", "CLS": "first", "LAST": "last"}
    vectors = vectors_of(model, ids, names[pooler["seq_pooling_type"]])
    return normalized(vectors) if pooler["use_activation"] else vectors


def vectors_of(model: torch.nn.Module, ids: Sequence[list[int]], pooling: str) -> np.ndarray:
    """Of each text alone, all of its tokens pooled."""
    with torch.no_grad():
        states = [model(input_ids=torch.tensor([row])).last_hidden_state[0] for row in ids]
    pools = {"mean": lambda state: state.mean(dim=0), "first": lambda state: state[0], "last": lambda state: state[-1]}
    return torch.stack([pools[pooling](state) for state in states]).numpy()


def normalized(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def assert_near(theirs: np.ndarray, ours: np.ndarray) -> None:
    """Each vector differs by at most a hundred thousandth of its length."""
    assert (np.linalg.norm(theirs - ours, axis=-1) / np.linalg.norm(ours, axis=-1)).max() < 1e-5


def differ(theirs: np.ndarray, ours: np.ndarray) -> bool:
    return np.linalg.norm(normalized(theirs) - normalized(ours), axis=1).min() > 0.01


@pytest.fixture(scope="module")
def plain_llama(make_checkpoint, tmp_path_factory) -> Path:
    """Of the shape that every reader has: as Llama 2, and Sheared-LLaMA."""
    return make_checkpoint(tmp_path_factory.mktemp("plain"), "llama", rope_parameters=PLAIN_ROPE)


@pytest.fixture
def exported(tmp_path):
    """Exports to a folder, which it returns with the encoder that reads it."""

    def run(model: Path, **options: Any) -> tuple[Path, Encoder]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        export(model, out, **{"dtype": "float32", "max_length": 24} | options)
        return out, Encoder.from_pretrained(out, dtype="float32")

    return run


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_both_compute_what_bivec_does(plain_llama, exported, pooling, normalize):
    out, encoder = exported(plain_llama, pooling=pooling, normalize=normalize)
    ours = encoder.encode(TEXTS)
    short = [text for text in TEXTS if len(text) < 30]  # vLLM refuses what is longer than max_seq_length
    assert tei_pooling(out) == pooling
    assert_near(tei_vectors(out, TEXTS), normalized(ours))
    assert vllm_pooler(out)["use_activation"] == normalize
    for architecture in ("", "LlamaBidirectionalModel"):
        assert_near(vllm_vectors(out, short, architecture), ours[: len(short)])


def test_each_key_is_the_one_that_its_reader_needs(plain_llama, exported):
    """Without it, text-embeddings-inference and vLLM are causal or do not start: the rules see what they should."""
    out, encoder = exported(plain_llama)
    ours, path = encoder.encode(TEXTS[:3]), out / "config.json"
    whole = read(path)

    def without(*keys: str) -> None:
        path.write_text(json.dumps({key: value for key, value in whole.items() if key not in keys}))

    without("use_bidirectional_attention")
    assert differ(tei_vectors(out, TEXTS[:1]), ours[:1])
    assert_near(vllm_vectors(out, TEXTS[:3]), ours)
    without("is_causal")
    assert differ(vllm_vectors(out, TEXTS[:1]), ours[:1])
    assert_near(tei_vectors(out, TEXTS[:3]), normalized(ours))
    without("rope_parameters")
    assert_near(tei_vectors(out, TEXTS[:3]), normalized(ours))
    without("pooling")
    with pytest.raises(Refused, match="pool_type None"):
        vllm_vectors(out, TEXTS[:1], "LlamaBidirectionalModel")
    path.write_text(json.dumps(whole | {"eos_token_id": [1, 0]}))
    with pytest.raises(Refused, match="eos_token_id must be usize"):
        tei_vectors(out, TEXTS[:1])


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("mistral", {"sliding_window": None}),
        ("qwen2", {"use_sliding_window": False}),
        ("qwen3", {"head_dim": 128, "attention_bias": False}),
    ],
)
def test_the_other_architectures(make_checkpoint, exported, tmp_path, architecture, changes):
    folder = make_checkpoint(tmp_path / "model", architecture, **changes)
    values = read(folder / "config.json")
    values.pop("head_dim", None)  # of a Qwen 3 it is 128 then, but text-embeddings-inference divides the width by heads
    (folder / "config.json").write_text(json.dumps(values))
    out, encoder = exported(folder)
    assert_near(tei_vectors(out, TEXTS), normalized(encoder.encode(TEXTS)))
    assert_near(vllm_vectors(out, TEXTS[:3]), encoder.encode(TEXTS[:3]))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope_parameters": PLAIN_ROPE | {"rope_type": "linear", "factor": 4.0}}, "rope scaling is not supported"),
        ({}, "rope scaling is not supported"),  # Llama 3.1's
        ({"rope_parameters": PLAIN_ROPE, "head_dim": 32}, r"no tensor .*q_proj.weight of shape \(64, 64\)"),
    ],
)
def test_a_shape_that_text_embeddings_inference_has_not_is_refused(
    make_checkpoint, exported, tmp_path, changes, reason
):
    """Aloud: with `rope_parameters` alone it would compute another rope, and start."""
    out, encoder = exported(make_checkpoint(tmp_path / "model", "llama", **changes))
    with pytest.raises(Refused, match=reason):
        tei_vectors(out, TEXTS)
    assert_near(vllm_vectors(out, TEXTS[:3]), encoder.encode(TEXTS[:3]))


def test_what_they_cannot_do_is_known(plain_llama, make_checkpoint, exported, tmp_path):
    """Biases, which text-embeddings-inference does not read; a weighted mean, which it refuses and vLLM leaves out."""
    out, encoder = exported(
        make_checkpoint(tmp_path / "bias", "llama", rope_parameters=PLAIN_ROPE, attention_bias=True)
    )
    assert differ(tei_vectors(out, TEXTS), encoder.encode(TEXTS))
    assert_near(vllm_vectors(out, TEXTS[:3]), encoder.encode(TEXTS[:3]))
    out, encoder = exported(plain_llama, pooling="weighted_mean")
    with pytest.raises(Refused, match="the pooling is not supported"):
        tei_vectors(out, TEXTS)
    with pytest.raises(Refused, match="pool_type None not supported"):
        vllm_vectors(out, TEXTS, "LlamaBidirectionalModel")
    assert vllm_pooler(out)["seq_pooling_type"] == "LAST"
    assert differ(vllm_vectors(out, TEXTS[:1]), encoder.encode(TEXTS[:1]))


@pytest.mark.parametrize("pools_prompt", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_prompt_is_pooled_by_both(make_checkpoint, exported, tmp_path, pooling, pools_prompt):
    """So theirs are other vectors, unless the last token is taken, or the model pools its prompts itself."""
    folder = make_checkpoint(tmp_path / "model", "llama", rope_parameters=PLAIN_ROPE)
    RunDescription("published", None, pooling=pooling, pools_prompt=pools_prompt).write(folder)
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": {"query": PROMPT}}))
    out, encoder = exported(folder)
    ours = encoder.encode(TEXTS[:2], prompt_name="query")
    tei, vllm = tei_vectors(out, TEXTS[:2], "query"), vllm_vectors(out, [PROMPT + text for text in TEXTS[:2]])
    if pools_prompt or pooling == "last":
        assert_near(tei, normalized(ours))
        assert_near(vllm, ours)
    else:
        assert differ(tei, ours)
        assert differ(vllm, ours)
