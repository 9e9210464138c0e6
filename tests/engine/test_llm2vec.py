"""LLM2Vec's published layout: adapters that stand on an MNTP adapter which their base does not name, and its template.

The copies are as McGill-NLP's repositories are: base, `-mntp` with a whole configuration, code and the tokenizer beside
its adapter, `-mntp-unsup-simcse` and `-mntp-supervised` with an adapter alone, all of random weights.
"""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from tokenizers import AddedToken, Tokenizer
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from bivec import Encoder
from bivec.engine.adapter_export import export_adapter
from bivec.engine.checkpoints import HubOptions, resolve
from bivec.engine.prompts import as_prompt
from bivec.engine.published import BASES, RECIPE, TEMPLATES
from bivec.engine.tokens import TextTokenizer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
ENCODER = "modeling_llama_encoder"
# stack, family of its tokenizer, base, template as `prepare_for_tokenization` in llm2vec.py has it
STACKS = {
    "LLM2Vec-Sheared-LLaMA": ("llama-2", "princeton-nlp/Sheared-LLaMA-1.3B", "", ""),
    "LLM2Vec-Llama-2-7b-chat-hf": ("llama-2", "meta-llama/Llama-2-7b-chat-hf", "[INST] ", " [/INST]"),
    "LLM2Vec-Meta-Llama-3-8B-Instruct": (
        "llama-3",
        "meta-llama/Meta-Llama-3-8B-Instruct",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
}
LLAMA_3 = "LLM2Vec-Meta-Llama-3-8B-Instruct"
MNTP, SIMCSE, SUPERVISED = (f"{LLAMA_3}-{stage}" for stage in ("mntp", "mntp-unsup-simcse", "mntp-supervised"))
TEXTS = [
    "the quick brown fox",
    "dog \n",
    " two",
    "\nline",
    "北京 naïve café, München",
    "many sequences side by side " * 6,
]
INSTRUCTION = "find what answers it:"


def edit_json(path: Path, **changes) -> None:
    values = (json.loads(path.read_text()) if path.is_file() else {}) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def trace(folder: Path, parent_library: object) -> None:
    mapping = {"base_model_class": "LlamaEncoderModel", "parent_library": parent_library}
    edit_json(folder / "adapter_config.json", auto_mapping=mapping if parent_library else None)


def load(model, **arguments) -> Encoder:
    return Encoder.from_pretrained(model, dtype="float32", device="cpu", **arguments)


@pytest.fixture(scope="module")
def make_stack(family_folder_in, make_adapter, tmp_path_factory):
    """Makes a stack's folders beside each other, with the base in the folder `base`; each stack is made once."""
    made = {}

    def make(stack: str) -> Path:
        if stack in made:
            return made[stack]
        family, base_id, _, _ = STACKS[stack]
        top = made[stack] = tmp_path_factory.mktemp("stack")
        added = [
            AddedToken(token, special=True) for token in ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        ]
        base = family_folder_in(top / "base", family, *added)
        for seed, stage in enumerate(RECIPE.stages, 1):
            folder = make_adapter(base, top / f"{stack}-{stage}", seed=seed, r=16, lora_alpha=32)
            edit_json(folder / "adapter_config.json", base_model_name_or_path=base_id)
            trace(folder, f"transformers_modules.McGill-NLP.{stack}-mntp.{COMMIT}.{ENCODER}")
        mntp = top / f"{stack}-mntp"
        trace(mntp, None)
        classes = {"AutoModel": f"{ENCODER}.LlamaEncoderModel"}
        whole = json.loads((base / "config.json").read_text())
        edit_json(mntp / "config.json", **whole, _name_or_path=base_id, auto_map=classes)
        (mntp / f"{ENCODER}.py").write_text(f"open({str(top / 'was_run')!r}, 'w').close()\n")
        for path in base.glob("tokenizer*"):
            shutil.copy(path, mntp)
        return top

    yield make
    assert not [top for top in made.values() if (top / "was_run").exists()]


@pytest.fixture
def llama_3(make_stack, tmp_path) -> Path:
    """The folders of the Llama 3 stack, to change."""
    return shutil.copytree(make_stack(LLAMA_3), tmp_path / "folders")


@pytest.fixture
def publish(tmp_path):
    """publish(hub id, folder): put a copy where the hub's cache has it; returns arguments of `from_pretrained`."""

    def put(name: str, folder: Path) -> dict:
        repository = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(folder, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
        return {"cache_dir": str(tmp_path / "hub"), "local_files_only": True}

    return put


def reference(top: Path, stack: str, stages: list[str], instruction: str, pooling: str = "mean") -> np.ndarray:
    """Base, MNTP and the stage on top in transformers and PEFT, each merged before the next; left-padded as in LLM2Vec.

    A text's tokens are those that end after what stands before it; LLM2Vec counts those of the text alone instead,
    which is another number where a token joins the two.
    """
    _, _, before, after = STACKS[stack]
    model = AutoModel.from_pretrained(top / "base", dtype=torch.float32)
    for stage in stages:
        model = PeftModel.from_pretrained(model, top / f"{stack}-{stage}").merge_and_unload()
    model.config.is_causal = False
    tokenizer = AutoTokenizer.from_pretrained(top / "base", padding_side="left", pad_token="</s>")
    start = before + f"{instruction} " * bool(instruction)
    whole = [start + (text.rstrip() if before else text) + after for text in TEXTS]
    batch = tokenizer(whole, padding=True, return_tensors="pt", return_offsets_mapping=True)
    ends = batch.pop("offset_mapping")[..., 1]
    batch.pop("token_type_ids", None)
    with torch.inference_mode():
        states = model(**batch).last_hidden_state
    vectors = []
    for row, own in zip(states, ends, strict=True):
        first = int((own > len(start.removesuffix(" "))).nonzero()[0])
        pooled = row[first:]
        weights = torch.arange(1.0, len(pooled) + 1)
        vectors.append(
            {"mean": pooled.mean(0), "last": row[-1], "weighted_mean": weights @ pooled / weights.sum()}[pooling]
        )
    return torch.stack(vectors).numpy()


def assert_near(ours: np.ndarray, expected: np.ndarray) -> None:
    """Each vector differs by at most a hundred thousandth of its length."""
    assert (np.linalg.norm(ours - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max() < 1e-5


# --- a stack as it is published


@pytest.mark.parametrize("stage", RECIPE.stages)
@pytest.mark.parametrize("stack", STACKS)
def test_a_published_stack_gives_its_vectors(make_stack, publish, stack, stage):
    top = make_stack(stack)
    publish(STACKS[stack][1], top / "base")
    hub = publish(f"McGill-NLP/{stack}-mntp", top / f"{stack}-mntp")
    if stage != "mntp":
        publish(f"McGill-NLP/{stack}-{stage}", top / f"{stack}-{stage}")
    encoder = load(f"McGill-NLP/{stack}-{stage}", **hub)
    stages = ["mntp"] if stage == "mntp" else ["mntp", stage]
    assert_near(encoder.encode(TEXTS), reference(top, stack, stages, ""))
    paired = encoder.encode([[INSTRUCTION, text] for text in TEXTS])
    assert_near(paired, reference(top, stack, stages, INSTRUCTION))
    assert np.linalg.norm(paired - reference(top, stack, stages[-1:], INSTRUCTION)) > 1 or stage == "mntp"


def test_a_real_model(make_adapter, shared_data, tmp_path):
    base = shutil.copytree(shared_data / "stories260K" / "hf", tmp_path / "base")
    stack = "LLM2Vec-Sheared-LLaMA"
    for seed, stage in enumerate(("mntp", "mntp-supervised"), 1):
        make_adapter(base, tmp_path / f"{stack}-{stage}", seed=seed)
    encoder = load(tmp_path / f"{stack}-mntp-supervised")
    expected = reference(tmp_path, stack, ["mntp", "mntp-supervised"], INSTRUCTION)
    assert_near(encoder.encode([[INSTRUCTION, text] for text in TEXTS]), expected)


def test_a_real_vocabulary_pools_what_llm2vec_counts(shared_data):
    """Which is as many tokens from the right as the text and the template's end have alone."""
    with gzip.open(shared_data / "tokenizers" / "mistral-7b-v1.tokenizer.json.gz", "rt", encoding="utf-8") as stream:
        backend = Tokenizer.from_str(stream.read())
    real = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    before, after = TEMPLATES["mistralai/Mistral-7B-Instruct-v0.2"]
    tokenizer = TextTokenizer(real, 512, pools_special_tokens=False, template=(before, after))
    for prompt in ("", f"{INSTRUCTION} "):
        for text in [*TEXTS, "7 foxes", "(see p. 3)", "[INST] </s>"]:
            (found,) = tokenizer([text], [prompt])
            alone = real(text.rstrip() + after, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            whole = real(before + prompt + text.rstrip() + after, split_special_tokens=True)["input_ids"]
            assert (found.ids, len(found.ids) - found.pool_start) == (whole, len(alone))


def test_the_table_is_what_the_vectors_are_made_by(make_stack):
    for stack, (_, base, *template) in STACKS.items():
        top = make_stack(stack)
        run = resolve(top / "base", top / f"{stack}-mntp").run
        assert (BASES[stack], run.template, run.pooling) == (base, tuple(template), "mean")
        assert (run.pools_special_tokens, run.pools_prompt, run.readout_shift) == (False, False, 1)
        assert resolve(top / "base", top / f"{stack}-mntp-supervised").run.readout_shift == 0
    assert as_prompt("find:") == "find:" + RECIPE.joint
    assert len(BASES) == 5


@pytest.mark.parametrize(
    "parent_library",
    [
        f"transformers_modules.McGill-NLP.{MNTP}.{COMMIT}.{ENCODER}",
        f"transformers_modules.McGill_hyphen_NLP.{MNTP.replace('-', '_hyphen_')}.{COMMIT}.{ENCODER}",
        f"transformers_modules.McGill_hyphen_NLP.{MNTP.replace('-', '_hyphen_')}._{COMMIT}.{ENCODER}",
        f"transformers_modules.{MNTP}.{ENCODER}",
        f"transformers_modules.{MNTP.replace('-', '_hyphen_')}.{COMMIT[:32]}.{ENCODER}",
        "llm2vec.models.bidirectional_llama",  # no trace, but the name
        None,
    ],
)
def test_every_trace_of_mntp_is_followed(llama_3, publish, parent_library):
    trace(llama_3 / SUPERVISED, parent_library)
    beside = resolve(llama_3 / "base", llama_3 / SUPERVISED)
    assert beside.adapters == (llama_3 / MNTP, llama_3 / SUPERVISED)
    assert beside.tokenizer == llama_3 / MNTP
    hub = HubOptions(**publish(f"McGill-NLP/{MNTP}", llama_3 / MNTP))
    moved = shutil.move(llama_3 / SUPERVISED, llama_3 / "elsewhere" / SUPERVISED)
    cached = resolve(llama_3 / "base", moved, hub)
    assert [path.parent.parent.name for path in cached.adapters[:-1]] == [f"models--McGill-NLP--{MNTP}"]
    assert cached.adapters[-1] == moved
    assert cached.run.template == tuple(STACKS[LLAMA_3][2:])
    publish(f"McGill-NLP/{SUPERVISED}", moved)
    assert resolve(llama_3 / "base", f"McGill-NLP/{SUPERVISED}", hub).adapters[:-1] == cached.adapters[:-1]


def test_a_name_that_is_not_published_may_be_traced_too(llama_3, publish):
    """Sanitised by transformers, with dots."""
    (llama_3 / MNTP).rename(llama_3 / "my-l.v0.2-mntp")
    (llama_3 / SUPERVISED).rename(llama_3 / "later")
    for owner, name in (("", "my_hyphen_l_dot_v0_dot_2_hyphen_mntp"), ("1lab.", "my-l.v0.2-mntp")):
        commit = f".{COMMIT}" * bool(owner)
        trace(llama_3 / "later", f"transformers_modules.{owner}{name}{commit}.{ENCODER}")
        assert resolve(llama_3 / "base", llama_3 / "later").adapters[0] == llama_3 / "my-l.v0.2-mntp"
    hub = HubOptions(**publish("1lab/my-l.v0.2-mntp", llama_3 / "my-l.v0.2-mntp"))
    shutil.rmtree(llama_3 / "my-l.v0.2-mntp")
    assert "1lab--my-l.v0.2" in str(resolve(llama_3 / "base", llama_3 / "later", hub).adapters[0])


def test_what_was_found_is_said_in_its_order(llama_3):
    base = llama_3 / "base"
    for path in llama_3.glob("LLM2Vec*"):
        edit_json(path / "adapter_config.json", base_model_name_or_path=str(base))
    encoder = load(llama_3 / SUPERVISED)
    config = llama_3 / SUPERVISED / "adapter_config.json"
    assert encoder.checkpoint.found == (
        f"base: {base}, named by {llama_3 / SUPERVISED}",
        f"1. MNTP adapter {llama_3 / MNTP} (from auto_mapping.parent_library of {config})",
        f"2. LLM2Vec adapter {llama_3 / SUPERVISED}",
        r"vectors: mean of the text's tokens, template '<|start_header_id|>user<|end_header_id|>\n\n' … '<|eot_id|>'",
    )
    assert [*encoder.describe()["model"]["found"]] == ["base", "1.", "2.", "vectors"]
    assert encoder.identity()["template"] == [*STACKS[LLAMA_3][2:]]
    assert load(base).checkpoint.found[0] == f"base: {base}"


# --- an order that is given


def test_all_ways_to_name_a_stack_are_the_same(llama_3):
    base, mntp, supervised = (llama_3 / name for name in ("base", MNTP, SUPERVISED))
    expected = resolve(base, supervised)
    for adapters in ([mntp, supervised], [mntp, mntp.parent / "." / SUPERVISED]):
        assert resolve(base, adapters).adapters == expected.adapters
        assert resolve(base, adapters).found == expected.found
    for path in (mntp, supervised):
        edit_json(path / "adapter_config.json", base_model_name_or_path=str(base))
    for found in (resolve(supervised), resolve(mntp, supervised)):
        assert (found.base, found.adapters, found.tokenizer) == (base, expected.adapters, mntp)
        assert found.run.template == expected.run.template
    moved = mntp.rename(llama_3 / "moved")  # its files say what it is
    assert resolve(base, [moved, supervised]).adapters == (moved, supervised)
    assert resolve(moved).found[1] == f"1. MNTP adapter {moved} (from auto_map of {moved / 'config.json'})"


def test_a_later_stage_stands_on_mntp_alone(llama_3):
    base, mntp, simcse, supervised = (llama_3 / name for name in ("base", MNTP, SIMCSE, SUPERVISED))
    for adapters in ([simcse, supervised], [mntp, simcse, supervised]):
        with pytest.raises(ValueError, match=rf"{SUPERVISED} stands on \S+-mntp, and cannot be put on .*{SIMCSE}"):
            resolve(base, adapters)


def test_an_mntp_that_is_given_is_known_by_its_name_or_its_files(llama_3, tmp_path):
    """Of a community's copy there may be the adapter alone."""
    base, supervised = llama_3 / "base", llama_3 / SUPERVISED
    trace(supervised, f"transformers_modules.mine-mntp.{ENCODER}")
    bare = shutil.copytree(llama_3 / MNTP, tmp_path / "other")
    for path in bare.glob("[!a]*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match="stands on the MNTP adapter mine-mntp"):
        resolve(base, [bare, supervised])
    mntp = bare.rename(tmp_path / "mine-mntp")
    assert resolve(base, [mntp, supervised]).adapters == (mntp, supervised)


def test_without_its_mntp_a_stage_is_refused_with_the_remedy(llama_3, make_stack, tmp_path):
    base, supervised = llama_3 / "base", llama_3 / SUPERVISED
    hub = HubOptions(cache_dir=str(tmp_path / "empty"), local_files_only=True)
    mntp = shutil.move(llama_3 / MNTP, tmp_path / "kept")
    for arguments in ((supervised,), (base, supervised)):
        with pytest.raises(FileNotFoundError) as caught:
            resolve(*arguments, hub=hub)
        message = str(caught.value)
        assert f"stands on the MNTP adapter McGill-NLP/{MNTP}" in message
        assert f"hf download McGill-NLP/{MNTP} --local-dir {llama_3 / MNTP}" in message
        assert f"--adapter MNTP --adapter {supervised}" in message
    assert resolve(base, [mntp, supervised], hub).adapters == (Path(mntp), supervised)
    shutil.move(mntp, llama_3 / MNTP)
    assert resolve(base, supervised, hub).adapters == (llama_3 / MNTP, supervised)
    # of a local folder there is nothing to download
    trace(supervised, f"transformers_modules.mine-mntp.{ENCODER}")
    with pytest.raises(FileNotFoundError, match=f"{llama_3 / 'mine-mntp'} does not exist.*put it at"):
        resolve(base, supervised, hub)


def test_an_adapter_that_may_be_any_stage_must_be_given_its_order(llama_3):
    base, mntp = llama_3 / "base", llama_3 / MNTP
    for sign in ("parent_library", "llm2vec_config.json"):
        one = shutil.copytree(llama_3 / SUPERVISED, llama_3 / sign)
        trace(one, "llm2vec.models.bidirectional_llama" if sign == "parent_library" else None)
        if sign != "parent_library":
            edit_json(one / sign, pooling_mode="weighted_mean")
        with pytest.raises(ValueError, match=rf"--model \S+ --adapter MNTP --adapter {one}, or --model \S+ --adapter"):
            resolve(one)
        assert resolve(base, [mntp, one]).adapters == (mntp, one)
        alone = resolve(base, one)
        assert alone.adapters == (one,)
        assert not alone.run.pools_special_tokens
        assert alone.run.template == tuple(STACKS[LLAMA_3][2:])  # by the base that it names
    assert alone.run.pooling == "weighted_mean"


def test_mntp_may_lie_merged_in_a_checkpoint(llama_3, tmp_path):
    """As transformers 5 needs it, which loads no adapter with its base."""
    model = AutoModel.from_pretrained(llama_3 / "base", dtype=torch.float32)
    merged = PeftModel.from_pretrained(model, llama_3 / MNTP).merge_and_unload()
    shutil.move(llama_3 / MNTP, tmp_path / "adapter")
    merged.save_pretrained(llama_3 / MNTP)
    for path in (llama_3 / "base").glob("tokenizer*"):
        shutil.copy(path, llama_3 / MNTP)
    expected = load(llama_3 / "base", adapters=[tmp_path / "adapter", llama_3 / SUPERVISED]).encode(TEXTS)
    for encoder in (load(llama_3 / SUPERVISED), load(llama_3 / MNTP, adapters=llama_3 / SUPERVISED)):
        assert_near(encoder.encode(TEXTS), expected)
    with pytest.raises(ValueError, match=f"was trained on .*{MNTP}, which differs from .*base"):
        resolve(llama_3 / "base", llama_3 / SUPERVISED)
    assert resolve(llama_3 / MNTP).run.template == tuple(STACKS[LLAMA_3][2:])  # by its name


@pytest.mark.parametrize("named", ["hub id", "folder", "folder, untraced"])
def test_a_stage_may_name_mntp_as_its_base(llama_3, named):
    """As PEFT does where transformers loaded base and adapter at once."""
    base, mntp, supervised = (llama_3 / name for name in ("base", MNTP, SUPERVISED))
    if named == "folder, untraced":
        mntp, supervised = mntp.rename(llama_3 / "own-mntp"), supervised.rename(llama_3 / "later")
        trace(supervised, "llm2vec.models.bidirectional_llama")
    edit_json(mntp / "adapter_config.json", base_model_name_or_path=str(base))
    below = f"McGill-NLP/{MNTP}" if named == "hub id" else str(mntp)
    edit_json(supervised / "adapter_config.json", base_model_name_or_path=below)
    for found in (resolve(supervised), resolve(base, supervised), resolve(mntp, supervised)):
        assert (found.base, found.adapters) == (base, (mntp, supervised))


# --- what is refused


@pytest.mark.parametrize(
    "parent_library",
    [
        "transformers_modules....etc",
        f"transformers_modules....{ENCODER}",
        f"transformers_modules./etc/x-mntp.{ENCODER}",
        f"transformers_modules..._dot_..x-mntp.{COMMIT}.{ENCODER}",
        f"transformers_modules._dot__dot_.{COMMIT}.{ENCODER}",
        f"transformers_modules.{ENCODER}",
        7,
        ["transformers_modules"],
        {"a": "b"},
    ],
)
def test_a_trace_that_leads_elsewhere_is_refused(llama_3, parent_library):
    trace(llama_3 / SUPERVISED, parent_library)
    with pytest.raises(ValueError, match=r"adapter_config\.json: auto_mapping\.parent_library must be a module's name"):
        resolve(llama_3 / "base", llama_3 / SUPERVISED)


def test_an_mntp_that_leads_back_is_refused(llama_3):
    base, mntp, supervised = (llama_3 / name for name in ("base", MNTP, SUPERVISED))
    trace(mntp, f"transformers_modules.McGill-NLP.{SUPERVISED}.{COMMIT}.{ENCODER}")
    for one in (mntp, supervised):
        with pytest.raises(ValueError, match="which is no MNTP adapter: it stands on another one itself"):
            resolve(base, one)
    trace(mntp, f"transformers_modules.McGill-NLP.{MNTP}.{COMMIT}.{ENCODER}")
    with pytest.raises(ValueError, match=r"its MNTP adapter .* is itself"):
        resolve(base, mntp)


def test_an_mntp_of_another_base_is_refused(llama_3):
    edit_json(llama_3 / MNTP / "adapter_config.json", base_model_name_or_path="meta-llama/Meta-Llama-3.1-8B-Instruct")
    message = (
        rf"{SUPERVISED}/adapter_config\.json: base_model_name_or_path is meta-llama/Meta-Llama-3-8B-Instruct, but its "
        rf"MNTP adapter \S+ was trained on meta-llama/Meta-Llama-3\.1-8B-Instruct"
    )
    for arguments in ((llama_3 / SUPERVISED,), (llama_3 / "base", [llama_3 / MNTP, llama_3 / SUPERVISED])):
        with pytest.raises(ValueError, match=message):
            resolve(*arguments)


@pytest.mark.parametrize("base", ["~nobody-of-this-name/model", "x" * 5000, "nul\0", "/" + "x" * 999])
def test_a_base_that_can_be_no_folder_is_refused(llama_3, base):
    mntp, supervised = llama_3 / MNTP, llama_3 / SUPERVISED
    edit_json(supervised / "adapter_config.json", base_model_name_or_path=base)
    with pytest.raises(ValueError, match=r"adapter_config\.json: base_model_name_or_path is .* was trained on"):
        resolve(supervised)
    edit_json(mntp / "adapter_config.json", base_model_name_or_path=base)
    for one in (mntp, supervised):
        with pytest.raises((ValueError, FileNotFoundError), match=r"names .*, which|is no folder"):
            resolve(one)
    for name in (f"{base}-mntp", f"transformers_modules.{'x' * 999}.{ENCODER}"):
        edit_json(supervised / "adapter_config.json", base_model_name_or_path=name)
        trace(supervised, name if name.endswith(ENCODER) else None)
        with pytest.raises(FileNotFoundError, match=r"stands on the MNTP adapter .* which is not here"):
            resolve(supervised)


def test_a_copy_without_configuration_or_with_a_pickle(llama_3):
    base, mntp, supervised = (llama_3 / name for name in ("base", MNTP, SUPERVISED))
    (mntp / "config.json").unlink()
    assert resolve(base, supervised).adapters == (mntp, supervised)
    (mntp / "adapter_model.safetensors").rename(mntp / "adapter_model.bin")
    with pytest.raises(
        FileNotFoundError, match=rf"{MNTP}/adapter_model\.safetensors does not exist.*a pickle is refused"
    ):
        load(base, adapters=supervised)


# --- llm2vec_config.json


@pytest.mark.parametrize(
    ("mode", "pooling"), [("mean", "mean"), ("weighted_mean", "weighted_mean"), ("last_token", "last")]
)
def test_the_topmost_adapters_settings_hold(llama_3, mode, pooling):
    edit_json(llama_3 / MNTP / "llm2vec_config.json", pooling_mode="weighted_mean", max_length=30)
    settings = {"pooling_mode": mode, "max_length": 199, "doc_max_length": 400, "skip_instruction": True}
    edit_json(llama_3 / SUPERVISED / "llm2vec_config.json", **settings)
    encoder = load(llama_3 / "base", adapters=llama_3 / SUPERVISED)
    assert (encoder.pooling, encoder.max_length) == (pooling, 199)
    expected = reference(llama_3, LLAMA_3, ["mntp", "mntp-supervised"], INSTRUCTION, pooling)
    assert_near(encoder.encode([[INSTRUCTION, text] for text in TEXTS]), expected)
    assert load(llama_3 / "base", adapters=llama_3 / MNTP).max_length == 30


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pooling_mode": "eos_token"}, "pooling_mode must be one of mean, weighted_mean, last_token, got 'eos_token'"),
        ({"pooling_mode": "bos_token"}, "pooling_mode must be one of .*, got 'bos_token'"),
        ({"pooling_mode": ["mean"]}, "pooling_mode must be one of"),
        ({"skip_instruction": False}, "skip_instruction must be true, got False"),
        ({"max_length": 0}, "max_length must be a number of tokens, got 0"),
        ({"max_length": "512"}, "max_length must be a number of tokens"),
        ({"latents": 512}, "latents is not supported, got 512"),
    ],
)
def test_settings_that_are_not_computed_are_named(llama_3, settings, message):
    edit_json(llama_3 / SUPERVISED / "llm2vec_config.json", **settings)
    with pytest.raises(ValueError, match=rf"llm2vec_config\.json: {message}"):
        resolve(llama_3 / "base", llama_3 / SUPERVISED)


@pytest.mark.parametrize("sign", ["llm2vec_config.json", "LlamaBiModel", "LlamaEncoderModel", "auto_map"])
def test_a_merged_save_is_a_checkpoint(llama_3, tmp_path, sign):
    """`save(merge_before_save=True)`; transformers 4 wrote the base's name into the configuration."""
    model = AutoModel.from_pretrained(llama_3 / "base", dtype=torch.float32)
    for name in (MNTP, SUPERVISED):
        model = PeftModel.from_pretrained(model, llama_3 / name).merge_and_unload()
    model.save_pretrained(tmp_path / "merged")
    for path in (llama_3 / "base").glob("tokenizer*"):
        shutil.copy(path, tmp_path / "merged")
    classes = [sign if sign.startswith("Llama") else "LlamaModel"]
    code = {"AutoModel": f"McGill-NLP/{MNTP}--{ENCODER}.LlamaEncoderModel"} if sign == "auto_map" else None
    changes = {"architectures": classes, "auto_map": code, "_name_or_path": STACKS[LLAMA_3][1]}
    edit_json(tmp_path / "merged" / "config.json", **changes)
    expected = "mean"
    if sign.endswith("json"):
        edit_json(tmp_path / "merged" / sign, pooling_mode="last_token", max_length=199)
        expected = "last"
    encoder = load(tmp_path / "merged")
    assert (encoder.pooling, encoder.max_length) == (expected, 199 if expected == "last" else 256)
    reached = reference(llama_3, LLAMA_3, ["mntp", "mntp-supervised"], "", expected)
    assert_near(encoder.encode(TEXTS), reached)


@pytest.mark.parametrize("stack", STACKS)
def test_a_stack_is_one_adapter_for_peft(make_stack, tmp_path, stack):
    """With its template, what it pools and its length, for bivec; where its base lies is named with it."""
    top = shutil.copytree(make_stack(stack), tmp_path / "folders")
    edit_json(top / f"{stack}-mntp-supervised" / "llm2vec_config.json", pooling_mode="mean", max_length=40)
    edit_json(top / f"{stack}-mntp-supervised" / "adapter_config.json", base_model_name_or_path=str(top / "base"))
    edit_json(top / f"{stack}-mntp" / "adapter_config.json", base_model_name_or_path=str(top / "base"))
    export_adapter(top / f"{stack}-mntp-supervised", tmp_path / "out")
    encoder = load(tmp_path / "out")
    assert (encoder.checkpoint.adapters, encoder.max_length) == ((tmp_path / "out",), 40)
    paired = encoder.encode([[INSTRUCTION, text] for text in TEXTS[:5]])
    assert_near(paired, reference(top, stack, ["mntp", "mntp-supervised"], INSTRUCTION)[:5])
