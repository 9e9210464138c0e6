"""What a folder in sentence-transformers' layout says wrongly, or asks for that is not computed, is refused by name."""

import json
from contextlib import suppress
from pathlib import Path

import pytest

from bivec import Encoder
from bivec.engine.checkpoints import resolve
from bivec.engine.lengths import own_max_length
from bivec.engine.prompts import model_prompts


def write_json(path: Path, value) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def edit_json(path: Path, **changes) -> None:
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.fixture
def folder(fresh_llama_folder) -> Path:
    """A model of width 64 with every file that sentence-transformers writes."""
    write_json(fresh_llama_folder / MODULES, [*PARTS, entry(MODELS + "Normalize", "2_Normalize")])
    write_json(fresh_llama_folder / POOLING, {"embedding_dimension": 64, "pooling_mode": "mean"})
    write_json(fresh_llama_folder / NORMALIZE, {"module_input_name": "sentence_embedding"})
    write_json(fresh_llama_folder / TRANSFORMER, {"max_seq_length": None, "do_lower_case": False})
    write_json(fresh_llama_folder / MODEL, {"model_type": "SentenceTransformer", "prompts": {}})
    return fresh_llama_folder


def entry(kind: object, path: object = "") -> dict:
    return {"idx": 0, "name": "0", "path": path, "type": kind}


MODELS = "sentence_transformers.models."
PARTS = [entry(MODELS + "Transformer"), entry(MODELS + "Pooling", "1_Pooling")]
DENSE = entry("sentence_transformers.base.modules.dense.Dense", "2_Dense")
MODULES, POOLING, NORMALIZE = "modules.json", "1_Pooling/config.json", "2_Normalize/config.json"
TRANSFORMER, MODEL = "sentence_bert_config.json", "config_sentence_transformers.json"
CUT_LEFT = {"direction": "Left", "max_length": 9, "strategy": "LongestFirst", "stride": 0}
CHAT = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}, "message": {"method": "forward"}}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (MODULES, {}, "must hold a JSON array, got dict"),
        (MODULES, ["Transformer"], "each module must have a type and a path, got 'Transformer'"),
        (MODULES, [{"type": 3, "path": ""}], "each module must have a type and a path"),
        (MODULES, [entry(MODELS + "Transformer", None)], "each module must have a type and a path"),
        (MODULES, [*PARTS, DENSE], r"the module '.*dense\.Dense' is not computed, .*; use the model with sentence-tr"),
        (MODULES, [entry("custom_st.Transformer"), PARTS[1]], "the module 'custom_st.Transformer' is not computed"),
        (MODULES, [entry("sentence_transformers.models.Evil.Pooling"), PARTS[1]], "Evil.Pooling' is not computed"),
        (MODULES, [entry(MODELS + "Router"), PARTS[1]], "Router' is not computed"),
        (MODULES, [], "in this order, got none"),
        (MODULES, PARTS[:1], "in this order, got Transformer$"),
        (MODULES, PARTS[::-1], "in this order, got Pooling, Transformer"),
        (MODULES, [PARTS[0], entry(MODELS + "Pooling", "../1_Pooling")], "within the model's, got '../1_Pooling'"),
        (MODULES, [entry(MODELS + "Transformer", "/etc"), PARTS[1]], "within the model's, got '/etc'"),
        (MODULES, [entry(MODELS + "Transformer", "C:\\x"), PARTS[1]], "within the model's"),
        (POOLING, None, "does not exist"),
        (POOLING, [], "must hold a JSON object, got list"),
        (POOLING, {"pooling_mode": "max"}, "pooling_mode must be one of mean, weightedmean, .* got 'max'"),
        (POOLING, {"pooling_mode": ["mean", "cls"]}, r"pooling_mode must be one of .* got \['mean', 'cls'\]"),
        (POOLING, {"pooling_mode_mean_sqrt_len_tokens": True}, "pooling_mode must be .* got 'mean_sqrt_len_tokens'"),
        (POOLING, {"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, r"got \['cls', 'max'\]"),
        (POOLING, {"pooling_mode_mean_tokens": 1}, "pooling_mode_mean_tokens must be true or false, got 1"),
        (POOLING, {"include_prompt": "no"}, "include_prompt must be true or false, got 'no'"),
        (POOLING, {"embedding_dimension": "64"}, "embedding_dimension must be one number, got '64'"),
        (POOLING, {"embedding_dimension": 64, "word_embedding_dimension": 32}, "must be one number, got 32"),
        (POOLING, {"pooling_mode_new": True}, "pooling_mode_new is not known, got True"),
        (NORMALIZE, {"module_input_name": "token_embeddings"}, "module_input_name is not supported"),
        (TRANSFORMER, {"do_lower_case": True}, "do_lower_case is not supported, got True"),
        (TRANSFORMER, {"transformer_task": "fill-mask"}, "transformer_task is not supported, got 'fill-mask'"),
        (TRANSFORMER, {"modality_config": {"image": CHAT["text"]}}, "modality_config is not supported"),
        (TRANSFORMER, {"modality_config": CHAT}, "modality_config has 'message', .* chat template"),
        (TRANSFORMER, {"query_length": 32}, "query_length is not supported, got 32"),
        (TRANSFORMER, {"model_args": {"rope_scaling": {}}}, "model_args is not supported, got 'rope_scaling' there"),
        (TRANSFORMER, {"model_kwargs": "dtype"}, "model_kwargs must be an object, got 'dtype'"),
        (TRANSFORMER, {"max_seq_length": -1}, "max_seq_length must be a number of tokens, got -1"),
        (TRANSFORMER, {"method": "forward"}, "method is not known, got 'forward'"),
        ("tokenizer_config.json", {"model_max_length": "40"}, "model_max_length must be a number of tokens, got '40'"),
        ("tokenizer_config.json", {"truncation_side": "left"}, "truncation_side must be right, got 'left'"),
        ("tokenizer.json", {"truncation": CUT_LEFT}, "truncation must have the direction Right, got 'Left'"),
        (MODULES, None, "does not exist, and 1_Pooling beside it says nothing without it; copy or download it again"),
        (MODEL, {"model_type": None}, "model_type must be SentenceTransformer, got None"),
        (MODEL, {"model_type": "SparseEncoder"}, "model_type must be SentenceTransformer, got 'SparseEncoder'"),
        (MODEL, {"truncate_dim": 32}, "truncate_dim is not applied .*; remove it there and give it to encode"),
        ("config.json", {"is_causal": 0}, "is_causal must be true or false, got 0"),
    ],
)
def test_what_is_wrong_or_not_computed_is_named(folder, name, value, message):
    path = folder / name
    if value is None:
        path.unlink()
    elif name in ("config.json", "tokenizer_config.json", "tokenizer.json"):
        edit_json(path, **value)
    else:
        write_json(path, value)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as found:
        Encoder.from_pretrained(folder)
    assert name in str(found.value)


def test_another_width_is_named(folder):
    edit_json(folder / POOLING, embedding_dimension=128)
    with pytest.raises(ValueError, match=r"embedding_dimension is 128, but hidden_size in .*config\.json is 64"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("name", [MODULES, POOLING, TRANSFORMER, MODEL])
def test_a_truncated_file_is_named(folder, name):
    path = folder / name
    path.write_text(path.read_text()[:-3])
    with pytest.raises(ValueError, match=rf"{path} is not valid JSON"):
        Encoder.from_pretrained(folder)


@pytest.mark.parametrize("odd", [None, True, -1, 1.5, 2**70, "x", "\0", [], [[]], [3], {}, {"x": []}])
def test_a_value_of_any_kind_is_read_or_refused(folder, odd):
    """By an error that names its file, and no other."""
    for name in (MODULES, POOLING, NORMALIZE, TRANSFORMER, MODEL):
        text = (folder / name).read_text()
        whole = json.loads(text)
        if name == MODULES:
            changed = [[*whole[:place], {**whole[place], key: odd}] for place in range(3) for key in whole[place]]
        else:
            changed = [{**whole, key: odd} for key in whole]
        for value in [*changed, odd]:
            write_json(folder / name, value)
            with suppress(ValueError, FileNotFoundError):
                checkpoint = resolve(folder)
                own_max_length(checkpoint)
                model_prompts(checkpoint)
        (folder / name).write_text(text)
