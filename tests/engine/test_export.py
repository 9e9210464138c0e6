"""An exported model gives the vectors of the one it was made from, here and in the libraries that others use."""

import json
import resource

import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer
from typer.testing import CliRunner

from bivec import Encoder, cli
from bivec.engine.export import export
from bivec.engine.outputs import open_locked
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
    description = RunDescription("supervised", str(tiny_llama_folder), pooling="last", instruction="find:")
    description.write(folder)
    return folder


@pytest.mark.parametrize("pooling", [None, "mean", "last", "first"])
def test_the_export_is_the_run(run, tmp_path, pooling):
    export(run, tmp_path / "out", pooling=pooling, dtype="float32")
    source = Encoder.from_pretrained(run, pooling=pooling, dtype="float32")
    exported = Encoder.from_pretrained(tmp_path / "out", dtype="float32")
    assert exported.pooling == (pooling or "last")
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


def test_the_length_is_the_exported_models_own(run, tmp_path):
    export(run, tmp_path / "out", max_length=12)
    export(tmp_path / "out", tmp_path / "again")
    for folder in ("out", "again"):
        encoder = Encoder.from_pretrained(tmp_path / folder)
        assert encoder.max_length == 12
        assert encoder.describe()["encoding"]["max length"].startswith("12 tokens")
    assert Encoder.from_pretrained(tmp_path / "out", max_length=16).max_length == 16
    assert Encoder.from_pretrained(run).max_length == 256


def test_weights_are_rounded_once(run, tmp_path):
    for dtype in ("float32", "bfloat16", "float16"):
        export(run, tmp_path / dtype, dtype=dtype)
        assert json.loads((tmp_path / dtype / "config.json").read_text())["dtype"] == dtype
    whole = load_file(tmp_path / "float32" / "model.safetensors")
    for dtype in (torch.bfloat16, torch.float16):
        rounded = load_file(tmp_path / str(dtype).removeprefix("torch.") / "model.safetensors")
        assert rounded.keys() == whole.keys()
        assert all(torch.equal(rounded[name], whole[name].to(dtype)) for name in whole)


def test_the_command_line_normalizes_where_asked(run, tmp_path):
    for options in ([], ["--normalize"]):
        arguments = ["--model", str(run), "--output", str(tmp_path / f"out{len(options)}"), *options]
        assert CliRunner().invoke(cli.app, ["export", *arguments]).exit_code == 0
        lengths = np.linalg.norm(Encoder.from_pretrained(tmp_path / f"out{len(options)}").encode(TEXTS), axis=1)
        assert np.allclose(lengths, 1.0, atol=1e-3) == bool(options)


def test_whoever_reads_one_file_reads_all(run, tmp_path):
    export(run, tmp_path / "out")
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir() if path.is_file()}) == 1


@pytest.mark.parametrize(("limit", "message"), [(4_000, "File too large"), (60_000, "the weights cannot be written")])
def test_a_full_disk_is_one_line_and_leaves_nothing(tiny_llama_folder, tmp_path, limit, message):
    """A limit on the size of files stands for the disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        arguments = ["--model", str(tiny_llama_folder), "--output", str(tmp_path / "out")]
        found = CliRunner().invoke(cli.app, ["export", *arguments])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert found.exit_code == 1
    assert message in found.stderr
    assert [line[:6] for line in found.stderr.splitlines()] == ["error:"]
    assert list(tmp_path.iterdir()) == []


def test_one_run_alone_writes_a_folder(tiny_llama_folder, tmp_path):
    """What a killed one left is taken over; what nobody knows is not."""
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with open_locked(tmp_path / ".out.lock"), pytest.raises(FileExistsError, match="another run is writing this"):
        export(tiny_llama_folder, tmp_path / "out")
    (left / "thesis.tex").write_text("mine")
    with pytest.raises(FileExistsError, match=r"it holds what bivec did not write, as .*thesis\.tex"):
        export(tiny_llama_folder, tmp_path / "out")
    (left / "thesis.tex").unlink()
    export(tiny_llama_folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_input_is_no_place_for_the_output(run, tiny_llama_folder, tmp_path):
    for output in (run / "out", tiny_llama_folder / "out"):
        with pytest.raises(ValueError, match="the output lies within the input"):
            export(run, output)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileExistsError, match="link exists and is no empty folder"):
        export(run, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "run"]


def test_what_cannot_be_exported(run, tmp_path, tiny_llama_folder):
    with pytest.raises(ValueError, match=r"'weighted_mean' cannot be exported with the prompt 'query' \('find: '\)"):
        export(run, tmp_path / "out", pooling="weighted_mean")
    with pytest.raises(ValueError, match=r"the prompt 'query' .*: no token of the text is left after the prompt"):
        export(run, tmp_path / "out", max_length=4)
    with pytest.raises(ValueError, match="max_length must be at least 2 tokens"):
        export(run, tmp_path / "out", max_length=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="full exists and is no empty folder"):
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
