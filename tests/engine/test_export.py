"""An exported model gives the vectors of the one it was made from, here and in the libraries that others use."""

import json

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

from bivec import Encoder
from bivec.engine.export import export
from bivec.engine.run_folder import RunDescription

TEXTS = ["the quick brown fox", "many sequences side by side, and more of them", "dog", "München, naïve café"]


@pytest.fixture
def run(tiny_llama_folder, tmp_path):
    """A run with an adapter that does something, whose pooling and instruction are its own."""
    torch.manual_seed(0)
    model = transformers.AutoModel.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0.0, 0.1)
    folder = tmp_path / "run"
    model.save_pretrained(folder)
    description = RunDescription("supervised", str(tiny_llama_folder), pooling="weighted_mean", instruction="find:")
    description.write(folder)
    return folder


@pytest.mark.parametrize("pooling", [None, "mean", "last", "first"])
def test_the_export_is_the_run(run, tmp_path, pooling):
    export(run, tmp_path / "out", pooling=pooling, dtype="float32")
    source = Encoder.from_pretrained(run, pooling=pooling, dtype="float32")
    exported = Encoder.from_pretrained(tmp_path / "out", dtype="float32")
    assert exported.pooling == (pooling or "weighted_mean")
    assert exported.checkpoint.adapters == ()
    assert np.array_equal(exported.encode(TEXTS), source.encode(TEXTS))
    assert np.array_equal(exported.encode_query(TEXTS), source.encode_query(TEXTS))
    assert not np.array_equal(exported.encode_query(TEXTS), exported.encode(TEXTS))
    base = Encoder.from_pretrained(source.checkpoint.base, dtype="float32")
    assert np.abs(base.encode(TEXTS) - exported.encode(TEXTS)).max() > 0.01


def test_transformers_gives_the_same_states(run, tmp_path):
    """Padded, with nothing but the exported configuration to say that the model is bidirectional."""
    export(run, tmp_path / "out", pooling="mean", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"][:, :, None]
    means = (states * mask).sum(dim=1) / mask.sum(dim=1)
    vectors = Encoder.from_pretrained(tmp_path / "out", dtype="float32").encode(TEXTS)
    assert np.abs(means.numpy() - vectors).max() < 1e-5


@pytest.mark.parametrize("pooling", ["weighted_mean", "mean", "last", "first"])
def test_sentence_transformers_gives_the_same_vectors(run, tmp_path, pooling):
    library = pytest.importorskip("sentence_transformers", reason="package sentence-transformers is not installed")
    export(run, tmp_path / "out", pooling=pooling, max_length=12, dtype="float32")
    peer = library.SentenceTransformer(str(tmp_path / "out"), device="cpu", model_kwargs={"dtype": torch.float32})
    encoder = Encoder.from_pretrained(tmp_path / "out", dtype="float32")
    assert peer.max_seq_length == encoder.max_length == 12
    assert Encoder.from_pretrained(tmp_path / "out", max_length=16).max_length == 16  # what is asked for wins
    assert np.abs(peer.encode(TEXTS) - encoder.encode(TEXTS)).max() < 1e-5
    assert peer.prompts["query"] == encoder.prompts["query"] == "find: "


def test_weights_are_rounded_once(run, tmp_path):
    for dtype in ("float32", "bfloat16", "float16"):
        export(run, tmp_path / dtype, dtype=dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    whole = load_file(tmp_path / "float32" / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = load_file(tmp_path / str(dtype).removeprefix("torch.") / "model.safetensors")
        assert rounded.keys() == whole.keys()
        assert all(torch.equal(rounded[name], whole[name].to(dtype)) for name in whole)


def test_whoever_reads_one_file_reads_all(run, tmp_path):
    export(run, tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}) == 1


def test_what_cannot_be_exported(run, tmp_path, tiny_llama_folder):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="full exists and is not empty"):
        export(run, tmp_path / "full")
    with pytest.raises(ValueError, match="pooling must be one of mean, weighted_mean, last, first, got 'max'"):
        export(run, tmp_path / "out", pooling="max")
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, float16, got 'int8'"):
        export(run, tmp_path / "out", dtype="int8")
    RunDescription("mntp", str(tiny_llama_folder), window=(-1, 0)).write(run)
    with pytest.raises(ValueError, match=r"sees the window \(-1, 0\); only a bidirectional model can be exported"):
        export(run, tmp_path / "out")
    RunDescription("mntp", str(tiny_llama_folder)).write(run)
    (run / "adapter_model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="is not a whole safetensors file"):
        export(run, tmp_path / "out")
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
