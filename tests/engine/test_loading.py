"""Weights, tokenizers and adapters: what is refused, naming the file and what was expected."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from bivec import Encoder


def load(folder, **arguments):
    return Encoder.from_pretrained(folder, dtype="float32", **arguments)


def edit_json(path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def edit_tensors(path, edit):
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


# --- tokenizers


def test_a_tokenizer_with_remote_code_is_not_run(fresh_llama_folder, tmp_path):
    edit_json(
        fresh_llama_folder / "tokenizer_config.json",
        auto_map={"AutoTokenizer": ["evil.Evil", None]},
        tokenizer_class="Evil",
    )
    (fresh_llama_folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(ValueError, match="tokenizer"):
        load(fresh_llama_folder)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(make_checkpoint, tmp_path):
    make_checkpoint(tmp_path, num_hidden_layers=1)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["model"]["vocab"]["zzzz"] = 5000
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"token id 5000, but the model has \d+ embeddings"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("tokenizer_config.json", lambda values: values.update(model_max_length="512"), "holds no tokenizer .*'str'"),
        (
            "tokenizer.json",
            lambda values: values["post_processor"]["special_tokens"].clear(),
            "holds no tokenizer that transformers can read: no entry found for key",
        ),
        (
            "tokenizer.json",
            lambda values: values["post_processor"]["special_tokens"]["<s>"].update(ids=[4000]),
            r"token id 4000, but the model has \d+ embeddings",
        ),
        (
            "tokenizer.json",
            lambda values: values["model"]["vocab"].update(dict.fromkeys(list(values["model"]["vocab"])[-2:], 300)),
            "holds no tokenizer .* out of vocabulary",
        ),
        ("tokenizer.json", lambda values: values["model"].update(dropout=0.5), r"got dropout 0.5; set it to null in"),
    ],
    ids=["max length", "panic", "BOS beyond", "one id twice", "dropout"],
)
def test_a_tokenizer_that_cannot_be_relied_upon_is_refused(fresh_llama_folder, name, edit, message):
    path = fresh_llama_folder / name
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as found:
        load(fresh_llama_folder)
    assert str(fresh_llama_folder) in str(found.value)


def test_a_tokenizer_whose_tokens_are_lost_is_refused(fresh_llama_folder):
    """Of some classes transformers makes one of three tokens: each text would be its BOS alone."""
    edit_json(
        fresh_llama_folder / "tokenizer_config.json",
        tokenizer_class="LlamaTokenizer",
        add_bos_token=True,
        unk_token="<s>",
    )
    (fresh_llama_folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"gives the texts 'a' and 'b' the same tokens, .* tokenizer\.json among them"):
        load(fresh_llama_folder)


def test_what_transformers_says_of_a_configuration_is_one_line(fresh_llama_folder):
    edit_json(fresh_llama_folder / "config.json", initializer_range="0.02")
    with pytest.raises(ValueError, match=r"no tokenizer that transformers can read: .*'initializer_range'.*'0.02'"):
        load(fresh_llama_folder)


@pytest.mark.parametrize(
    "changes",
    [{"version": "2.0"}, {"pre_tokenizer": {"type": "OfTomorrow"}}, {"model": {"type": "OfTomorrow", "vocab": {}}}],
    ids=str,
)
def test_a_tokenizer_of_a_newer_library_is_one_line(fresh_llama_folder, changes):
    edit_json(fresh_llama_folder / "tokenizer.json", **changes)
    with pytest.raises(ValueError, match="holds no tokenizer that transformers can read") as caught:
        load(fresh_llama_folder)
    assert "\n" not in str(caught.value)


# --- weights


@pytest.mark.parametrize("keep", [0, 7, 100, 5000], ids=["empty", "short header", "torn header", "torn data"])
def test_a_truncated_file_is_refused(fresh_llama_folder, keep):
    path = fresh_llama_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors is not a whole safetensors file"):
        load(fresh_llama_folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"missing layers\.1\.mlp\.up_proj\.weight"),
        (lambda t: t.update({"model.layers.9.x": torch.ones(1)}), r"unexpected model\.layers\.9\.x"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(3)}),
            r"model\.norm\.weight .* must have shape \(64,\), got \(3,\)",
        ),
        (lambda t: t["model.norm.weight"].fill_(float("nan")), r"model\.norm\.weight .* holds NaN or infinity"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}), "must be floating point"),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(64).to(torch.float8_e4m3fn)}),
            r"model\.norm\.weight .* must be floating point \(F16, BF16, F32, F64\), got F8_E4M3",
        ),
        (lambda t: t.update({"norm.weight": torch.ones(64)}), r"norm\.weight are both norm\.weight"),
    ],
    ids=["missing", "extra", "misshapen", "nan", "integers", "float8", "twice"],
)
def test_tensors_that_do_not_fit_are_named(fresh_llama_folder, edit, message):
    edit_tensors(fresh_llama_folder / "model.safetensors", edit)
    with pytest.raises(ValueError, match=f"does not fit its config.json: .*{message}"):
        load(fresh_llama_folder)


@pytest.mark.parametrize("zero", ["", "o_proj"], ids=["all", "attention"])
def test_weights_that_let_no_token_reach_another_are_refused(fresh_llama_folder, zero):
    edit_tensors(fresh_llama_folder / "model.safetensors", lambda t: [t[name].zero_() for name in t if zero in name])
    with pytest.raises(ValueError, match="no token changes another's state; the weights are zero"):
        load(fresh_llama_folder)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model.bin.index.json"])
def test_a_pickle_is_refused(fresh_llama_folder, name):
    torch.save({}, fresh_llama_folder / name)
    (fresh_llama_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"{name} but no safetensors; a pickle can run code"):
        load(fresh_llama_folder)


def test_no_weights_at_all(fresh_llama_folder):
    (fresh_llama_folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors nor"):
        load(fresh_llama_folder)


def shard(folder):
    """Split a checkpoint into two shards with an index, as large ones are published."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        save_file({name: tensors[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors")
        weight_map |= {name: f"model-0000{i}-of-00002.safetensors" for name in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return index


def test_shards_give_the_same_vectors(fresh_llama_folder):
    expected = load(fresh_llama_folder).encode("the quick brown fox")
    shard(fresh_llama_folder)
    assert (load(fresh_llama_folder).encode("the quick brown fox") == expected).all()


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/model.safetensors", "a/../b.safetensors", "model.bin", 7]
)
def test_an_index_may_only_name_files_beside_it(fresh_llama_folder, name):
    index = shard(fresh_llama_folder)
    edit_json(index, weight_map={"model.norm.weight": name})
    with pytest.raises(
        ValueError, match=r"index\.json: a shard must be the name of a \.safetensors file in that folder"
    ):
        load(fresh_llama_folder)


def test_a_tensor_comes_from_the_shard_that_the_index_names(fresh_llama_folder):
    index = shard(fresh_llama_folder)
    places = json.loads(index.read_text())["weight_map"]
    name, other = "model.norm.weight", {"1": "2", "2": "1"}
    wrong = places[name].replace(places[name][10], other[places[name][10]], 1)
    edit_tensors(fresh_llama_folder / wrong, lambda t: t.update({name: torch.zeros(64)}))
    with pytest.raises(ValueError, match=rf"{name} is in {wrong}, but .*index\.json names {places[name]} for it"):
        load(fresh_llama_folder)
    edit_tensors(fresh_llama_folder / wrong, lambda t: t.pop(name))
    load(fresh_llama_folder)
    del places[name]
    edit_json(index, weight_map=places)
    with pytest.raises(ValueError, match=rf"{name} is in .*, but .*index\.json names no file for it"):
        load(fresh_llama_folder)


def test_a_shard_that_is_absent_is_named(fresh_llama_folder):
    shard(fresh_llama_folder)
    (fresh_llama_folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-00002\.safetensors does not exist, but"):
        load(fresh_llama_folder)


def test_a_name_that_is_neither_folder_nor_hub_id():
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load("./no/such/folder")


def test_a_hub_id_that_is_not_cached_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="owner/name is no folder here, and could not be read from") as caught:
        load("owner/name", local_files_only=True, cache_dir=str(tmp_path))
    assert "\n" not in str(caught.value)


def test_a_hub_id_loads_from_the_hub_cache(tiny_llama_folder, tmp_path):
    repository = tmp_path / "models--owner--name"
    shutil.copytree(tiny_llama_folder, repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    encoder = load("owner/name", cache_dir=str(tmp_path), local_files_only=True)
    assert encoder.checkpoint.name == "owner/name"
    assert (encoder.encode("fox") == load(tiny_llama_folder).encode("fox")).all()


# --- adapters


def save_adapter(base, folder, seed, causal=False, **changes):
    """A random LoRA adapter as PEFT saves it; returns the reference model with everything merged."""
    model = (AutoModelForCausalLM if causal else AutoModel).from_pretrained(base, dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": 4, "lora_alpha": 8, "target_modules": targets} | changes
    torch.manual_seed(seed)
    wrapped = get_peft_model(model, LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
    wrapped.save_pretrained(folder)
    return wrapped.merge_and_unload()


def mean_state(model, encoder, text):
    model.config.is_causal = False
    with torch.inference_mode():
        return model(torch.tensor([encoder.tokenizer(text)["input_ids"]])).last_hidden_state[0].mean(0)


TEXT = "bidirectional attention lets every token see every other token"


def test_an_adapter_names_its_base_and_two_stack_in_order(tiny_llama_folder, tmp_path):
    first = save_adapter(tiny_llama_folder, tmp_path / "first", 1)
    first.save_pretrained(tmp_path / "merged")
    second = save_adapter(tmp_path / "merged", tmp_path / "second", 2, r=2, use_rslora=True)
    plain = load(tiny_llama_folder)
    one = load(tmp_path / "first")
    two = load(tmp_path / "first", adapters=[tmp_path / "second"])
    also_two = load(tiny_llama_folder, adapters=[tmp_path / "first", tmp_path / "second"])
    assert one.checkpoint.adapters == (tmp_path / "first",)
    torch.testing.assert_close(torch.from_numpy(one.encode(TEXT)), mean_state(first, one, TEXT), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.from_numpy(two.encode(TEXT)), mean_state(second, two, TEXT), atol=1e-4, rtol=0)
    assert (two.encode(TEXT) == also_two.encode(TEXT)).all()
    assert abs(one.encode(TEXT) - plain.encode(TEXT)).max() > 1e-2
    assert abs(two.encode(TEXT) - one.encode(TEXT)).max() > 1e-2


def test_an_adapter_of_a_causal_model_fits(tiny_llama_folder, tmp_path):
    reference = save_adapter(tiny_llama_folder, tmp_path / "adapter", 3, causal=True).model
    encoder = load(tmp_path / "adapter")
    expected = mean_state(reference, encoder, TEXT)
    torch.testing.assert_close(torch.from_numpy(encoder.encode(TEXT)), expected, atol=1e-4, rtol=0)


def test_merging_in_bfloat16_rounds_once(tiny_llama_folder, tmp_path):
    reference = save_adapter(tiny_llama_folder, tmp_path / "adapter", 4)
    model = Encoder.from_pretrained(tmp_path / "adapter", dtype="bfloat16").model
    base = AutoModel.from_pretrained(tiny_llama_folder, dtype=torch.float32).layers[0].mlp.up_proj.weight
    delta = reference.layers[0].mlp.up_proj.weight - base
    expected = (base.bfloat16().float() + delta).bfloat16()
    ours = model.layers[0].mlp.up_proj.weight
    assert (ours != expected).float().mean() < 0.01  # a sum that lies on a rounding border


def test_the_language_model_is_untouched_by_adapters(tiny_llama_folder, tmp_path):
    save_adapter(tiny_llama_folder, tmp_path / "adapter", 5)
    base = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    ours = load(tmp_path / "adapter").language_model()
    for name, parameter in base.named_parameters():
        assert torch.equal(ours.get_parameter(name), parameter)


def test_an_adapter_of_another_base_is_refused(make_checkpoint, tiny_llama_folder, tmp_path):
    make_checkpoint(tmp_path / "other", hidden_size=32, num_hidden_layers=4)
    save_adapter(tmp_path / "other", tmp_path / "adapter", 6)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors does not fit this base: .*must have shape"):
        load(tiny_llama_folder, adapters=[tmp_path / "adapter"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(sorted(t)[0]), "does not fit this base: missing"),
        (lambda t: t.update({"base_model.model.head.lora_A.weight": torch.ones(4, 64)}), "unexpected base_model"),
        (lambda t: t[sorted(t)[0]].fill_(float("inf")), "holds NaN or infinity"),
        (lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]].double() * 1e300}), "holds NaN or infinity"),
        (lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]].int()}), "must be floating point .* got I32"),
        (
            lambda t: t.update({sorted(t)[0].removeprefix("base_model.model."): t[sorted(t)[0]].clone()}),
            "stands there twice",
        ),
        (
            lambda t: t.update({sorted(t)[0].replace("base_model.model.", "base_model.model.model."): torch.ones(1)}),
            "unexpected base_model",
        ),
    ],
    ids=["missing", "extra", "infinite", "beyond float32", "integers", "twice", "of two bases"],
)
def test_adapter_tensors_that_do_not_fit_are_named(tiny_llama_folder, tmp_path, edit, message):
    save_adapter(tiny_llama_folder, tmp_path, 7)
    edit_tensors(tmp_path / "adapter_model.safetensors", edit)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type must be LORA, got 'IA3'"),
        ({"use_dora": True}, r"missing layers.*lora_magnitude_vector"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save is not supported"),
        ({"base_model_name_or_path": None}, "base_model_name_or_path must be a folder or a hub id"),
        ({"target_modules": ["query_key_value"]}, "does not fit the base"),
    ],
)
def test_adapter_configurations_that_cannot_be_merged(tiny_llama_folder, tmp_path, changes, message):
    save_adapter(tiny_llama_folder, tmp_path, 8)
    edit_json(tmp_path / "adapter_config.json", **changes)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_an_adapter_in_a_pickle_is_refused(tiny_llama_folder, tmp_path):
    save_adapter(tiny_llama_folder, tmp_path, 9)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="must be in safetensors"):
        load(tmp_path)


def test_adapters_of_other_hub_models_are_told_apart_by_name(tmp_path, monkeypatch):
    from bivec.engine import checkpoints

    for name in ("base", "adapter"):
        (tmp_path / name).mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta/other"}))
    folders = {"meta/base": tmp_path / "base", "lab/adapter": tmp_path / "adapter"}
    monkeypatch.setattr(checkpoints, "_fetch", lambda name, hub: folders[name])
    with pytest.raises(ValueError, match="lab/adapter was trained on meta/other, not on meta/base"):
        checkpoints.resolve("meta/base", ("lab/adapter",))
