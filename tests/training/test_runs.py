"""What a run leaves: a folder that loads with its whole chain, here, in PEFT and in transformers."""

import json
import shutil

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from bivec import Encoder
from bivec.engine.export import export
from bivec.engine.model import LanguageModel
from bivec.engine.packing import PackedBatch
from bivec.engine.weights import load_model
from bivec.training import train

TEXTS = ["the quick brown fox", "many sequences side by side, every token sees every other", "a"]
STAGES = ("mntp", "simcse", "supervised")


@pytest.fixture(scope="module")
def chain(request, tmp_path_factory):
    """Folders of three stages, each on the one before, two steps at a high learning rate."""
    folder = tmp_path_factory.mktemp("chain")

    def build(make_settings):
        model = None
        for stage in STAGES:
            output = folder / stage
            changes = {} if model is None else {"model": str(model)}
            if stage == "mntp":
                changes["mask_token"] = "x"
            settings = make_settings(
                stage, output=str(output), max_steps=2, learning_rate=0.05, warmup_steps=0, seed=len(stage), **changes
            )
            if not output.exists():
                train(settings)
            model = output
        return folder

    return build


def hidden_states(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), is_causal=False).last_hidden_state[0]


def test_the_chain_gives_in_peft_what_it_gives_here(make_settings, chain, tiny_llama_folder):
    folder = chain(make_settings)
    encoder = Encoder.from_pretrained(folder / "supervised", dtype="float32", device="cpu")
    base = transformers.AutoModel.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    plain = {text: hidden_states(base, encoder.tokenizer(text)["input_ids"]) for text in TEXTS}
    run = folder / "supervised"
    with_adapters = peft.PeftModel.from_pretrained(base, run / "earlier" / "1", adapter_name="1")
    with_adapters.load_adapter(run / "earlier" / "2", adapter_name="2")
    with_adapters.load_adapter(run, adapter_name="3")
    with_adapters.base_model.set_adapter(["1", "2", "3"])
    for text in TEXTS:
        ids = encoder.tokenizer(text)["input_ids"]
        expected = hidden_states(with_adapters, ids)
        found = encoder.forward_packed(PackedBatch.from_sequences([ids]))
        assert (found - expected).abs().max() < 1e-4
        assert (found - plain[text]).abs().max() > 0.05


def test_peft_has_nothing_to_warn_of(make_settings, chain, tmp_path, recwarn):
    run = chain(make_settings) / "supervised"
    train(make_settings("simcse", model=str(run), max_steps=1, output=str(tmp_path / "on top")))
    Encoder.from_pretrained(tmp_path / "on top").language_model(adapters=True)
    export(tmp_path / "on top", tmp_path / "out")
    assert not [str(found.message) for found in recwarn if issubclass(found.category, UserWarning)]


def test_a_run_loads_from_wherever_it_was_moved(make_settings, chain, tmp_path):
    folder = chain(make_settings)
    before = Encoder.from_pretrained(folder / "supervised", dtype="float32").encode(TEXTS)
    shutil.copytree(folder / "supervised", tmp_path / "moved")
    encoder = Encoder.from_pretrained(tmp_path / "moved", dtype="float32")
    assert (encoder.encode(TEXTS) == before).all()
    assert [path.name for path in encoder.checkpoint.adapters] == ["1", "2", "moved"]


def test_no_stage_touches_the_language_model(make_settings, chain, tiny_llama_folder):
    encoder = Encoder.from_pretrained(chain(make_settings) / "supervised", dtype="float32", device="cpu")
    batch = PackedBatch.from_sequences([encoder.tokenizer(text)["input_ids"] for text in TEXTS])
    untouched = load_model(LanguageModel, tiny_llama_folder, torch.float32)
    with torch.no_grad():
        logits = encoder.language_model()(batch)
        assert torch.equal(logits, untouched(batch))
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
        for text, own in zip(TEXTS, logits.split(batch.seqlens), strict=True):
            expected = theirs(input_ids=torch.tensor([encoder.tokenizer(text)["input_ids"]])).logits[0]
            assert (own - expected).abs().max() < 1e-4


@pytest.mark.parametrize("form", [None, "pissa", "olora"])
def test_the_first_step_stands_on_the_earlier_adapters(
    make_settings, chain, make_step, make_adapter, tiny_llama_folder, tmp_path, form
):
    """A fresh adapter's B is zero: the trainee begins as what the earlier run embeds."""
    if form is None:
        model = chain(make_settings) / "simcse"
    else:
        model = make_adapter(tiny_llama_folder, tmp_path, init_lora_weights=form)
    step = make_step(make_settings("simcse", model=str(model)))
    for name, parameter in step.trainee.parameters.items():
        assert "stage_" not in name
        if "lora_B" in name:
            parameter.data.zero_()
    encoder = Encoder.from_pretrained(model, dtype="float32", device="cpu")
    batch = PackedBatch.from_sequences([encoder.tokenizer(text)["input_ids"] for text in TEXTS])
    with torch.no_grad():
        found = step.trainee.model.norm(step.trainee.model.eval()(batch, encoder.windows))
        assert (found - encoder.forward_packed(batch)).abs().max() < 1e-4


def test_continue_adapter_goes_on_with_the_last(make_settings, chain, tmp_path):
    folder = chain(make_settings)
    settings = make_settings(
        "supervised", model=str(folder / "simcse"), continue_adapter=True, learning_rate=0.0, max_steps=1,
        output=str(tmp_path / "continued"),
    )  # fmt: skip
    train(settings)
    before = load_file(folder / "simcse" / "adapter_model.safetensors")
    after = load_file(tmp_path / "continued" / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "continued" / "bivec.json").read_text())["earlier"] == ["earlier/1"]
    train(make_settings("simcse", model=str(folder / "simcse"), continue_adapter=True, max_steps=1, overwrite=True))
    with pytest.raises(ValueError, match="continue_adapter needs a model with an adapter"):
        train(make_settings("simcse", continue_adapter=True, overwrite=True))


@pytest.mark.parametrize(
    "form",
    [
        {"target_modules": ["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"]},
        {"alpha_pattern": {"^model.layers.1.self_attn.q_proj": 64}, "layers_to_transform": [0, 1]},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora", "causal": False},
    ],
    ids=["names in full", "patterns in full", "pissa", "olora"],
)
def test_an_adapter_of_peft_is_continued_and_trained_upon(
    make_settings, make_adapter, tiny_llama_folder, tmp_path, form
):
    model = make_adapter(tiny_llama_folder, tmp_path / "adapter", **{"causal": True} | form)
    before = Encoder.from_pretrained(model, dtype="float32", device="cpu").encode(TEXTS)
    for name, changes in {"continued": {"continue_adapter": True}, "on top": {}}.items():
        output = str(tmp_path / name)
        train(make_settings("simcse", model=str(model), output=output, learning_rate=0.0, max_steps=1, **changes))
        encoder = Encoder.from_pretrained(output, dtype="float32", device="cpu")
        assert len(encoder.checkpoint.adapters) == (1 if changes else 2)
        assert abs(encoder.encode(TEXTS) - before).max() < 1e-3 * abs(before).max()


def test_dora_is_refused_for_training_by_name(make_settings, make_adapter, tiny_llama_folder, tmp_path):
    model = str(make_adapter(tiny_llama_folder, tmp_path / "adapter", use_dora=True))
    with pytest.raises(ValueError, match="use_dora can be merged, not stacked; export the model first"):
        train(make_settings("simcse", model=model, max_steps=1))
    with pytest.raises(ValueError, match="continue_adapter cannot train DoRA"):
        train(make_settings("simcse", model=model, max_steps=1, continue_adapter=True))


def test_pretraining_leaves_a_checkpoint_of_its_own(make_settings, tmp_path, tiny_llama_folder):
    settings = make_settings("pretrain", random_weights=True, max_steps=3, learning_rate=1e-2, block_size=16)
    train(settings)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(settings.output, dtype=torch.float32)
    encoder = Encoder.from_pretrained(settings.output, dtype="float32", device="cpu")
    assert encoder.windows == encoder.config.causal_windows
    assert encoder.self_test["causal"].startswith("passed")
    ids = encoder.tokenizer(TEXTS[1])["input_ids"]
    with torch.no_grad():
        logits = theirs(input_ids=torch.tensor([ids])).logits[0]
        assert (encoder.language_model()(PackedBatch.from_sequences([ids])) - logits).abs().max() < 1e-4
    bidirectional = Encoder.from_pretrained(settings.output, dtype="float32", device="cpu", window=(-1, -1))
    assert abs(bidirectional.encode(TEXTS) - encoder.encode(TEXTS)).max() > 1e-4
    train(make_settings("mntp", model=settings.output, mask_token="x", max_steps=1, output=str(tmp_path / "on top")))
    on_top = Encoder.from_pretrained(tmp_path / "on top", dtype="float32")
    assert on_top.windows == on_top.config.bidirectional_windows
    assert on_top.checkpoint.run.base_model == settings.output


def test_a_runs_own_pooling_and_instruction_are_the_default(make_settings, pair_file):
    settings = make_settings("supervised", pooling="weighted_mean", instruction="find:", max_steps=1)
    train(settings)
    encoder = Encoder.from_pretrained(settings.output, dtype="float32")
    assert encoder.pooling == "weighted_mean"
    assert encoder.prompts == {"query": "find: "}
    assert (encoder.encode_query(TEXTS) == encoder.encode(TEXTS, prompt="find: ")).all()
    assert Encoder.from_pretrained(settings.output, pooling="last").pooling == "last"


def test_an_instruction_before_documents_too_is_the_default_prompt(make_settings, pair_file):
    settings = make_settings("supervised", instruction="find:", symmetric_instruction=True, max_steps=1)
    train(settings)
    encoder = Encoder.from_pretrained(settings.output, dtype="float32")
    expected = encoder.encode(TEXTS, prompt="find: ")
    for encode in (encoder.encode, encoder.encode_query, encoder.encode_document):
        assert (encode(TEXTS) == expected).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symmetric_instruction": "yes"}, "symmetric_instruction must be true or false, got 'yes'"),
        ({"pooling": "max"}, "pooling must be one of"),
        ({"window": [-1]}, "window must be two numbers"),
        ({"earlier": ["../../secret"]}, "earlier must name folders within"),
        ({"earlier": ["."]}, r"earlier must name folders within the run's, got '\.'"),
        ({"earlier": ["earlier/1", "earlier/1"]}, "earlier must name each folder once"),
        ({"earlier": ["earlier/1"], "base_model": None}, "base_model must name what the adapters stand on, got None"),
        ({"base_model": ""}, "base_model must name what the adapters stand on, got ''"),
        ({"instruction": "\ud800"}, r"instruction must not hold a lone surrogate, got '.ud800'"),
        ({"template": ["\ud800", ""]}, r"template must not hold a lone surrogate, got '.ud800'"),
        ({"colour": "red"}, "must describe a run"),
        ({"base_model": "/nowhere/at/all"}, "/nowhere/at/all is no folder"),
    ],
)
def test_a_broken_description_is_named(make_settings, chain, tmp_path, change, message):
    shutil.copytree(chain(make_settings) / "simcse", tmp_path / "broken")
    path = tmp_path / "broken" / "bivec.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Encoder.from_pretrained(tmp_path / "broken")


def test_a_run_on_a_published_model_says_itself_how_its_vectors_are_made(make_settings, fresh_llama_folder, tmp_path):
    """Whatever modules.json says of the base: the run was trained with a mask and a pooling of its own."""
    kinds = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path} for kind, path in kinds.items()]
    (fresh_llama_folder / "modules.json").write_text(json.dumps(modules))
    (fresh_llama_folder / "1_Pooling").mkdir()
    (fresh_llama_folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "lasttoken"}))
    train(make_settings("simcse", model=str(fresh_llama_folder), output=str(tmp_path / "run"), max_steps=1))
    base, run = (Encoder.from_pretrained(path, dtype="float32") for path in (fresh_llama_folder, tmp_path / "run"))
    assert (base.pooling, base.normalize, base.windows) == ("last", True, base.config.causal_windows)
    assert (run.pooling, run.normalize, run.windows) == ("mean", False, run.config.bidirectional_windows)
    assert run.pooled == "all, or those after the prompt"


def test_all_weights_of_nvidias_llama_are_a_llamas(make_settings, fresh_llama_folder, tmp_path):
    path = fresh_llama_folder / "config.json"
    auto_map = {"AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "llama_bidirec", "auto_map": auto_map}))
    output = tmp_path / "run"
    train(make_settings("simcse", model=str(fresh_llama_folder), output=str(output), max_steps=1, full_finetuning=True))
    written = json.loads((output / "config.json").read_text())
    assert written["model_type"] == "llama"
    assert "auto_map" not in written
    assert transformers.AutoModel.from_pretrained(output).config.model_type == "llama"
    assert Encoder.from_pretrained(output, dtype="float32").pooled == "all, or those after the prompt"
