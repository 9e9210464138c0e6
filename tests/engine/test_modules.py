"""Models as sentence-transformers and NVIDIA publish them have the vectors that their own files say."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

from bivec import Encoder
from bivec.engine.export import export
from bivec.engine.run_folder import RunDescription

TEXTS = [
    *(
        "the quick brown fox jumps",
        "7 foxes in 2026",
        " two spaces",
        "München, naïve café",
        "北京 is large",
        ": so it is",
    ),
    "many sequences side by side " * 9,
]
PROMPTS = {"query": "find: ", "document": "passage:", "none": ""}
MODES = {"mean": "mean", "weightedmean": "weighted_mean", "lasttoken": "last", "cls": "first"}
LEGACY = {"mean": "mean_tokens", "weightedmean": "weightedmean_tokens", "lasttoken": "lasttoken", "cls": "cls_token"}

MODELS = "sentence_transformers.models."
TYPES = {
    "legacy": {kind: MODELS + kind for kind in ("Transformer", "Pooling", "Normalize")},
    "files": {kind: f"{MODELS}{kind}.{kind}" for kind in ("Transformer", "Pooling", "Normalize")},
    "version 5.4": {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Normalize": "sentence_transformers.sentence_transformer.modules.normalize.Normalize",
    },
    "version 6": {
        "Transformer": "sentence_transformers.base.modules.transformer.Transformer",
        "Pooling": "sentence_transformers.sentence_transformer.modules.pooling.Pooling",
        "Normalize": "sentence_transformers.base.modules.normalize.Normalize",
    },
}
NVIDIA = {
    "AutoConfig": "llama_bidirectional_model.LlamaBidirectionalConfig",
    "AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel",
}


def write_json(path: Path, value) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value))


def edit_json(path: Path, **changes) -> None:
    """Change keys of a JSON object; None takes one away."""
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def write_modules(
    folder: Path,
    spelling: str = "version 6",
    mode: str = "mean",
    include_prompt: bool | None = None,
    normalize: bool = False,
    transformer: str = "",
) -> Path:
    """sentence-transformers' files in one of its spellings, for a model of width 64."""
    kinds = ["Transformer", "Pooling", *["Normalize"] * normalize]
    paths = [transformer, *(f"{place}_{kind}" for place, kind in enumerate(kinds) if place)]
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": TYPES[spelling][kind]}
        for place, (kind, path) in enumerate(zip(kinds, paths, strict=True))
    ]
    write_json(folder / "modules.json", modules)
    if spelling in ("legacy", "files"):
        pooling = {"word_embedding_dimension": 64} | {f"pooling_mode_{LEGACY[key]}": key == mode for key in MODES}
        write_json(folder / transformer / "sentence_bert_config.json", {"max_seq_length": 40, "do_lower_case": False})
    else:
        pooling = {"embedding_dimension": 64, "pooling_mode": mode}
        read = {"text": {"method": "forward", "method_output_name": "last_hidden_state"}}
        values = {"transformer_task": "feature-extraction", "modality_config": read}
        write_json(
            folder / transformer / "sentence_bert_config.json", values | {"module_output_name": "token_embeddings"}
        )
        edit_json(folder / transformer / "tokenizer_config.json", model_max_length=40)
        if normalize:
            write_json(folder / "2_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})
    included = {} if include_prompt is None else {"include_prompt": include_prompt}
    write_json(folder / "1_Pooling" / "config.json", pooling | included)
    write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": PROMPTS, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )
    return folder


def theirs(
    model, folder: Path, mode: str, prompt: str = "", *, include_prompt: bool = True, max_length: int = 40
) -> np.ndarray:
    """Vectors of `TEXTS` by transformers over a padded batch, pooled one by one: what modules.json asks for."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    rows = [tokenizer(prompt + text, truncation=True, max_length=max_length)["input_ids"] for text in TEXTS]
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    with torch.no_grad():
        states = model.eval()(input_ids=ids, attention_mask=mask).last_hidden_state
    alone = [] if include_prompt or not prompt else tokenizer(prompt)["input_ids"]
    begin = len(alone) - (alone[-1:] == [tokenizer.eos_token_id])
    weights = torch.arange(1.0, ids.shape[1] + 1)
    vectors = []
    for place, row in enumerate(rows):
        pooled = states[place, begin : len(row)]
        weighted = (pooled * weights[: len(pooled), None]).sum(0) / weights[: len(pooled)].sum()
        vectors.append(
            {"mean": pooled.mean(0), "weightedmean": weighted, "lasttoken": pooled[-1], "cls": pooled[0]}[mode]
        )
    return torch.stack(vectors).numpy()


def by_transformers(folder: Path):
    return transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)


def load(folder: Path, **arguments) -> Encoder:
    return Encoder.from_pretrained(folder, dtype="float32", **arguments)


def assert_near(ours: np.ndarray, expected: np.ndarray) -> None:
    """Each vector differs by at most a hundred thousandth of its length."""
    assert (np.linalg.norm(ours - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max() < 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("spelling", TYPES)
def test_every_spelling_and_pooling(fresh_llama_folder, spelling, mode):
    folder = write_modules(fresh_llama_folder, spelling, mode, normalize=mode == "mean")
    encoder = load(folder)
    assert (encoder.pooling, encoder.normalize, encoder.max_length) == (MODES[mode], mode == "mean", 40)
    assert (encoder.prompts, encoder.default_prompt_name) == (PROMPTS, None)
    expected = theirs(by_transformers(folder), folder, mode)
    if mode == "mean":
        expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    assert_near(encoder.encode(TEXTS), expected)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("include_prompt", [None, True, False])
def test_prompts_are_pooled_as_the_files_say(fresh_llama_folder, include_prompt, mode):
    """By default they are; where not, as many tokens are left out as the prompt has alone."""
    folder = write_modules(fresh_llama_folder, "version 6", mode, include_prompt)
    if mode == "weightedmean" and include_prompt is False:
        with pytest.raises(ValueError, match=r"1_Pooling/config.json: pooling_mode 'weightedmean' with include_prompt"):
            load(folder)
        return
    encoder, model = load(folder), by_transformers(folder)
    for name, prompt in PROMPTS.items():
        expected = theirs(model, folder, mode, prompt, include_prompt=include_prompt is not False)
        assert_near(encoder.encode(TEXTS, prompt_name=name), expected)


@pytest.mark.parametrize("mode", ["mean", "cls", "lasttoken"])
def test_a_token_after_the_text_is_none_of_the_prompts(fresh_llama_folder, mode):
    """sentence-transformers counts it out of the prompt's tokens."""
    folder = write_modules(fresh_llama_folder, mode=mode, include_prompt=False)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    expected = theirs(by_transformers(folder), folder, mode, "find: ", include_prompt=False)
    assert_near(load(folder).encode(TEXTS, prompt_name="query"), expected)


def test_the_last_token_needs_no_count(fresh_llama_folder):
    """Where sentence-transformers leaves out a text's only token and gives zeros."""
    folder = write_modules(fresh_llama_folder, mode="lasttoken", include_prompt=False)
    word, whole = (load(folder).encode("dog", prompt_name="query"), load(folder).encode("find: dog"))
    assert np.array_equal(word, whole)


def test_a_text_that_the_count_leaves_nothing_of_is_zero_as_there(fresh_llama_folder, library):
    """The prompt has a space alone that a single token of a text would have joined; files report the text."""
    folder = write_modules(fresh_llama_folder, include_prompt=False)
    encoder, texts = load(folder), ["dog", "", "a dog"]
    found = encoder.encode(texts, prompt_name="query")
    assert found.any(axis=1).tolist() == [False, False, True]
    peer = library.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    peer.tokenizer.pad_token = peer.tokenizer.eos_token
    assert np.allclose(found, peer.encode(texts, prompt_name="query"), atol=1e-4)
    _, reasons, _ = encoder.encode_rows(texts, prompt=encoder.prompts["query"])
    assert [reason is None for reason in reasons] == [False, False, True]
    assert "is left after the prompt's" in reasons[0]


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("is_causal", [None, True, False])
def test_the_mask_is_what_transformers_makes_of_the_configuration(
    checkpoint_folders, tmp_path, architecture, is_causal
):
    folder = shutil.copytree(checkpoint_folders[architecture], tmp_path / "model")
    edit_json(folder / "config.json", is_causal=is_causal)
    write_modules(folder, mode="lasttoken")
    encoder = load(folder)
    causal = is_causal is not False
    assert encoder.windows == (encoder.config.causal_windows if causal else encoder.config.bidirectional_windows)
    assert encoder.describe()["encoding"]["mask"].startswith("causal" if causal else "bidirectional")
    assert encoder.checkpoint.found[-1] == "vectors: last of all tokens, a prompt's too" + ", causal" * causal
    assert_near(encoder.encode(TEXTS), theirs(by_transformers(folder), folder, "lasttoken"))


def test_what_transformers_ignores_makes_nothing_bidirectional(fresh_llama_folder):
    edit_json(fresh_llama_folder / "config.json", use_bidirectional_attention=True)
    folder = write_modules(fresh_llama_folder)
    encoder = load(folder)
    assert encoder.windows == encoder.config.causal_windows
    assert_near(encoder.encode(TEXTS), theirs(by_transformers(folder), folder, "mean"))


def test_a_bare_checkpoint_is_made_bidirectional(fresh_llama_folder):
    encoder = load(fresh_llama_folder)
    assert encoder.checkpoint.run is None
    assert encoder.windows == encoder.config.bidirectional_windows
    assert load(write_modules(fresh_llama_folder), window=(-1, -1)).windows == encoder.windows


def test_the_length_is_the_files(fresh_llama_folder):
    """`max_seq_length`, else the tokenizer's own, else the model's positions."""
    folder = write_modules(fresh_llama_folder, "legacy")
    edit_json(folder / "tokenizer_config.json", model_max_length=30)
    assert load(folder).max_length == 40
    edit_json(folder / "sentence_bert_config.json", max_seq_length=None)
    assert load(folder).max_length == 30
    assert_near(load(folder).encode(TEXTS), theirs(by_transformers(folder), folder, "mean", max_length=30))
    edit_json(folder / "tokenizer_config.json", model_max_length=10**30)
    assert load(folder).max_length == 256


def test_a_bare_checkpoints_length_is_no_tokenizers(fresh_llama_folder):
    edit_json(fresh_llama_folder / "tokenizer_config.json", model_max_length=30)
    assert load(fresh_llama_folder).max_length == 256


def test_the_transformer_may_have_a_folder_of_its_own(make_checkpoint, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    inner = make_checkpoint(folder / "0_Transformer")
    write_modules(folder, "legacy", "cls", transformer="0_Transformer")
    encoder = load(folder)
    assert (encoder.checkpoint.base, encoder.prompts, encoder.max_length) == (inner, PROMPTS, 40)
    assert_near(encoder.encode(TEXTS), theirs(by_transformers(inner), inner, "cls"))


@pytest.mark.parametrize("is_causal", [None, False])
def test_an_adapter_with_modules_has_its_bases_mask(fresh_llama_folder, make_adapter, tmp_path, is_causal):
    """As sentence-transformers saves a model with an adapter: neither base nor configuration are in the folder."""
    edit_json(fresh_llama_folder / "config.json", is_causal=is_causal)
    folder = make_adapter(fresh_llama_folder, tmp_path / "adapter")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fresh_llama_folder / name, folder)
    write_modules(folder, mode="lasttoken", normalize=True)
    encoder = load(folder)
    assert (encoder.checkpoint.base, encoder.checkpoint.adapters) == (fresh_llama_folder, (folder,))
    model = by_transformers(fresh_llama_folder)
    model.load_adapter(str(folder))
    expected = theirs(model, folder, "lasttoken")
    assert_near(encoder.encode(TEXTS), expected / np.linalg.norm(expected, axis=-1, keepdims=True))


def test_an_adapter_on_such_a_model_is_described_by_its_base(fresh_llama_folder, make_adapter, tmp_path):
    write_modules(fresh_llama_folder, mode="lasttoken")
    folder = make_adapter(fresh_llama_folder, tmp_path / "adapter")
    encoder = load(folder)
    assert (encoder.pooling, encoder.windows) == ("last", encoder.config.causal_windows)
    RunDescription("supervised", str(fresh_llama_folder), pooling="mean").write(folder)  # as `bivec train` leaves it
    encoder = load(folder)
    assert (encoder.pooling, encoder.windows) == ("mean", encoder.config.bidirectional_windows)
    assert not encoder.checkpoint.run.pools_prompt


def test_an_export_says_itself_how_its_vectors_are_made(tiny_llama_folder, tmp_path):
    """Its modules.json is for others; its prompts end where the text begins, also where a reader would count them."""
    export(tiny_llama_folder, tmp_path / "out", dtype="float32")
    write_json(tmp_path / "out" / "modules.json", "not for bivec")
    source, exported = load(tiny_llama_folder), load(tmp_path / "out")
    assert exported.checkpoint.run.stage == "export"
    assert np.array_equal(exported.encode(TEXTS, prompt="find: "), source.encode(TEXTS, prompt="find: "))


@pytest.mark.parametrize("include_prompt", [True, False])
def test_such_a_model_is_exported(fresh_llama_folder, tmp_path, include_prompt):
    """The space that ends a prompt is left out there too, where it is."""
    edit_json(fresh_llama_folder / "config.json", is_causal=False)
    folder = write_modules(fresh_llama_folder, include_prompt=include_prompt, normalize=True)
    export(folder, tmp_path / "out", dtype="float32")
    source, exported, model = load(folder), load(tmp_path / "out"), by_transformers(tmp_path / "out")
    for name, prompt in PROMPTS.items():
        vectors = exported.encode(TEXTS, prompt_name=name)
        assert np.array_equal(vectors, source.encode(TEXTS, prompt_name=name))
        expected = theirs(model, tmp_path / "out", "mean", prompt, include_prompt=include_prompt)
        assert_near(vectors, expected / np.linalg.norm(expected, axis=1, keepdims=True))
    edit_json(fresh_llama_folder / "config.json", is_causal=None)
    with pytest.raises(ValueError, match="only a bidirectional model can be exported"):
        export(folder, tmp_path / "other")


@pytest.fixture
def library():
    return pytest.importorskip("sentence_transformers", reason="package sentence-transformers is not installed")


def saved_by(library, base: Path, folder: Path, mode: str, include_prompt: bool, normalize: bool = False):
    """A model that sentence-transformers saved, as it is in memory there."""
    modules = library.sentence_transformer.modules
    transformer = modules.Transformer(
        str(base), model_kwargs={"dtype": torch.float32}, processor_kwargs={"model_max_length": 40}
    )
    transformer.tokenizer.pad_token = "</s>"
    parts = [transformer, modules.Pooling(64, mode, include_prompt=include_prompt), *[modules.Normalize()] * normalize]
    model = library.SentenceTransformer(modules=parts, device="cpu", prompts=PROMPTS)
    model.save(str(folder), create_model_card=False)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("include_prompt", "normalize", "causal"), [(True, False, True), (False, True, False)])
def test_saves_of_sentence_transformers(fresh_llama_folder, library, tmp_path, mode, include_prompt, normalize, causal):
    edit_json(fresh_llama_folder / "config.json", is_causal=causal)
    include_prompt = include_prompt or mode == "weightedmean"
    peer = saved_by(library, fresh_llama_folder, tmp_path / "saved", mode, include_prompt, normalize)
    encoder = load(tmp_path / "saved")
    assert (encoder.max_length, encoder.normalize) == (40, normalize)
    for name, prompt in PROMPTS.items():
        assert encoder.prompts[name] == prompt
        assert_near(encoder.encode(TEXTS, prompt_name=name), peer.encode(TEXTS, prompt_name=name))
    for method in ("encode", "encode_query", "encode_document"):
        assert_near(getattr(encoder, method)(TEXTS), getattr(peer, method)(TEXTS))


def test_a_save_with_an_adapter(fresh_llama_folder, library, make_adapter, tmp_path):
    """The adapter's files instead of the transformer's."""
    saved_by(library, fresh_llama_folder, tmp_path / "saved", "lasttoken", True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "saved" / name).unlink()
    make_adapter(fresh_llama_folder, tmp_path / "saved")
    encoder = load(tmp_path / "saved")
    assert encoder.checkpoint.adapters == (tmp_path / "saved",)
    peer = library.SentenceTransformer(str(tmp_path / "saved"), device="cpu", model_kwargs={"dtype": torch.float32})
    assert_near(encoder.encode(TEXTS), peer.encode(TEXTS))


def nvidia(folder: Path, **changes) -> Path:
    """A Llama as NVIDIA publishes its encoders: a type of its own, and no prefix before its tensors' names."""
    plain = {"architectures": ["LlamaBidirectionalModel"], "temperature": 0.02, "auto_map": NVIDIA}
    edit_json(folder / "config.json", model_type="llama_bidirec", **plain | changes)
    tensors = load_file(folder / "model.safetensors")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def bidirectional(folder: Path, kind: str = "Llama"):
    """transformers' model of the same weights, without the causal mask."""
    config = getattr(transformers, f"{kind}Config").from_pretrained(folder)
    config.is_causal = False
    return getattr(transformers, f"{kind}Model").from_pretrained(folder, config=config, dtype=torch.float32)


@pytest.mark.parametrize(("pooling", "mode"), [("avg", "mean"), (None, "mean"), ("last", "lasttoken"), ("cls", "cls")])
def test_llama_bidirec(fresh_llama_folder, pooling, mode):
    """Its pooling takes all tokens, a prompt's too."""
    folder = nvidia(fresh_llama_folder, pooling=pooling)
    encoder, model = load(folder, max_length=40), bidirectional(folder)
    assert encoder.windows == encoder.config.bidirectional_windows
    assert encoder.pooling == MODES[mode]
    for prompt in ("", "query: "):
        assert_near(encoder.encode(TEXTS, prompt=prompt), theirs(model, folder, mode, prompt))


def test_its_tokenizer_is_a_llamas(tiny_llama_folder, fresh_llama_folder, caplog):
    """Though transformers knows no such type, and would say so."""
    ours = load(nvidia(fresh_llama_folder)).tokenizer
    assert type(ours) is type(load(tiny_llama_folder).tokenizer)
    assert {record.name for record in caplog.records} <= {"bivec.engine.lengths"}


@pytest.mark.parametrize(
    "auto_map",
    [
        None,
        {name: value.replace("llama_bidirectional_model", "model") for name, value in NVIDIA.items()},
        {name: f"nvidia/llama-nemotron-embed-1b-v2--{value}" for name, value in NVIDIA.items()},
    ],
)
def test_llama_bidirec_with_modules(fresh_llama_folder, auto_map):
    """Which say more than its configuration."""
    folder = write_modules(nvidia(fresh_llama_folder, pooling="last", auto_map=auto_map), normalize=True)
    encoder = load(folder)
    assert (encoder.pooling, encoder.normalize) == ("mean", True)
    expected = theirs(bidirectional(folder), folder, "mean", PROMPTS["query"])
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    assert_near(encoder.encode(TEXTS, prompt_name="query"), expected)


@pytest.mark.parametrize("kind", ["Llama", "Mistral"])
def test_merged_saves_of_llm2vec(checkpoint_folders, tmp_path, kind):
    """Its classes have no causal mask; BOS is pooled where modules.json has sentence-transformers' way."""
    folder = shutil.copytree(checkpoint_folders[kind.lower()], tmp_path / "model")
    code = f"McGill-NLP/LLM2Vec-some-mntp--modeling_{kind.lower()}_encoder.{kind}EncoderModel"
    edit_json(folder / "config.json", auto_map={"AutoModel": code})
    expected = theirs(bidirectional(folder, kind), folder, "mean")
    assert not load(folder).checkpoint.run.pools_special_tokens
    assert_near(load(write_modules(folder)).encode(TEXTS), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooling": "weighted_avg"}, "pooling must be one of avg, last, cls, got 'weighted_avg'"),
        ({"pooling": ["avg"]}, r"pooling must be one of avg, last, cls, got \['avg'\]"),
        ({"auto_map": {"AutoModel": "modeling_evil.Evil"}}, r"remote code \(AutoModel: 'modeling_evil.Evil'\)"),
        ({"auto_map": NVIDIA | {"AutoModel": "evil/x--model.LlamaBidirectionalModel"}}, "asks for remote code"),
        ({"auto_map": NVIDIA | {"AutoModelForSequenceClassification": "x.Y"}}, "AutoModelForSequenceClassification"),
        ({"auto_map": {"AutoModel": ["modeling_llama_encoder.LlamaEncoderModel"]}}, "asks for remote code"),
        ({"auto_map": "modeling_llama_encoder.LlamaEncoderModel"}, "asks for remote code"),
    ],
)
def test_what_llama_bidirec_may_not_ask_is_refused(fresh_llama_folder, changes, message):
    with pytest.raises(ValueError, match=rf"config\.json: .*{message}"):
        load(nvidia(fresh_llama_folder, **changes))


def test_a_hub_snapshot_is_links_to_files(fresh_llama_folder, tmp_path):
    write_modules(fresh_llama_folder)
    snapshot = tmp_path / "snapshots" / "0"
    for path in [path for path in fresh_llama_folder.rglob("*") if path.is_file()]:
        link = snapshot / path.relative_to(fresh_llama_folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    assert np.array_equal(load(snapshot).encode(TEXTS), load(fresh_llama_folder).encode(TEXTS))


def check(folder: Path, library) -> None:
    """Every prompt gives the vectors that sentence-transformers gives."""
    encoder = load(folder)
    peer = library.SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    for name in PROMPTS:
        assert_near(encoder.encode(TEXTS, prompt_name=name), peer.encode(TEXTS, prompt_name=name))


@pytest.mark.parametrize("include_prompt", [True, False])
@pytest.mark.parametrize("family", ["llama-2", "mistral", "llama-3", "qwen-2", "qwen-3"])
def test_every_family_of_tokenizers(family_folder, library, family, include_prompt):
    """Their chat templates are not used."""
    folder = write_modules(family_folder(family), "legacy", include_prompt=include_prompt)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    edit_json(folder / "tokenizer_config.json", pad_token=settings["eos_token"])
    check(folder, library)


def test_a_save_whose_texts_go_through_a_chat_template_is_refused(family_folder, library, tmp_path):
    """sentence-transformers 6 does so with every checkpoint that has one."""
    saved_by(library, family_folder("llama-3"), tmp_path / "saved", "mean", True)
    with pytest.raises(ValueError, match=r"sentence_bert_config\.json: modality_config has 'message'"):
        load(tmp_path / "saved")


@pytest.mark.parametrize("include_prompt", [True, False])
def test_a_real_model(shared_data, library, tmp_path, include_prompt):
    folder = shutil.copytree(shared_data / "stories260K" / "hf", tmp_path / "model")
    write_modules(folder, "legacy", include_prompt=include_prompt, normalize=True)
    edit_json(folder / "tokenizer_config.json", pad_token="</s>")
    check(folder, library)
