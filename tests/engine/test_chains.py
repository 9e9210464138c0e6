"""Which adapters a model or an adapter brings, in which order, and what a run says of them: one rule for both."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from bivec import Encoder
from bivec.engine.checkpoints import resolve
from bivec.engine.export import export
from bivec.engine.run_folder import RunDescription

TEXTS = ["the quick brown fox", "bidirectional attention lets every token see every other token"]
FILES = ("adapter_config.json", "adapter_model.safetensors")


@pytest.fixture(scope="module")
def folders(make_adapter, tiny_llama_folder, tmp_path_factory):
    """Runs as `bivec train` leaves them, each on the one before, and `plain`, an adapter of PEFT."""
    top = tmp_path_factory.mktemp("runs")
    make_adapter(tiny_llama_folder, top / "plain", seed=9)
    earlier = []
    for seed, stage in enumerate(("mntp", "simcse", "supervised"), 1):
        run = make_adapter(tiny_llama_folder, top / stage, seed=seed)
        names = tuple(f"earlier/{place}" for place in range(1, len(earlier) + 1))
        for name, source in zip(names, earlier, strict=True):
            (run / name).mkdir(parents=True)
            for file in FILES:
                shutil.copyfile(source / file, run / name / file)
        RunDescription(stage, str(tiny_llama_folder), names).write(run)
        earlier.append(run)
    path = top / "supervised"
    description = RunDescription.read(path)
    replace(description, window=(-1, 0), pooling="last", instruction="find:").write(path)
    return top


def load(model, **arguments):
    return Encoder.from_pretrained(model, dtype="float32", device="cpu", **arguments)


def test_a_run_is_the_same_as_the_model_and_as_an_adapter(folders, tiny_llama_folder):
    as_model = load(folders / "supervised")
    for arguments in (
        {"model": tiny_llama_folder, "adapters": [folders / "supervised"]},
        {"model": tiny_llama_folder, "adapters": str(folders / "supervised")},  # one is not its letters
        {"model": folders / "mntp", "adapters": [folders / "supervised"]},
        {"model": tiny_llama_folder, "adapters": [folders / "mntp", folders / "simcse", folders / "supervised"]},
    ):
        encoder = load(**arguments)
        assert len(encoder.checkpoint.adapters) == 3
        assert (encoder.pooling, encoder.windows) == ("last", as_model.windows)
        assert encoder.prompts == as_model.prompts == {"query": "find: "}
        assert (encoder.encode(TEXTS) == as_model.encode(TEXTS)).all()
    assert abs(load(tiny_llama_folder).encode(TEXTS) - as_model.encode(TEXTS)).max() > 1e-2


def test_the_chain_is_described_in_its_order(folders, tiny_llama_folder):
    described = load(tiny_llama_folder, adapters=[folders / "supervised"]).describe()["model"]
    run = folders / "supervised"
    assert described["adapters"] == [str(run / "earlier" / "1"), str(run / "earlier" / "2"), str(run)]
    checkpoint = resolve(folders / "supervised", [folders / "plain"])
    assert [path.name for path in checkpoint.adapters] == ["1", "2", "supervised", "plain"]
    assert checkpoint.run.pooling == "last"


def test_an_exported_adapter_brings_its_chain(folders, tiny_llama_folder, tmp_path):
    run = RunDescription.read(folders / "supervised")
    shutil.copytree(folders / "supervised", tmp_path / "run")
    replace(run, window=(-1, -1)).write(tmp_path / "run")
    export(tiny_llama_folder, tmp_path / "exported", adapters=[tmp_path / "run"], dtype="float32")
    assert abs(load(tmp_path / "exported").encode(TEXTS) - load(tmp_path / "run").encode(TEXTS)).max() < 1e-5
    with pytest.raises(ValueError, match="sees the window"):
        export(tiny_llama_folder, tmp_path / "causal", adapters=[folders / "supervised"])


@pytest.mark.parametrize(
    ("model", "adapters", "message"),
    [
        ("plain", ["simcse"], "simcse stands on .*earlier/1, and cannot be put on .*plain"),
        ("supervised", ["mntp"], "mntp stands on no adapter, and cannot be put on .*earlier/1.*supervised"),
        ("simcse", ["simcse"], "simcse stands on .*, and cannot be put on"),
        ("plain", ["plain"], "the adapter .*plain is there already"),
        ("base", ["plain", "mntp"], "mntp stands on no adapter, and cannot be put on .*plain"),
    ],
)
def test_a_chain_that_contradicts_another_is_refused(folders, tiny_llama_folder, model, adapters, message):
    with pytest.raises(ValueError, match=message):
        resolve(tiny_llama_folder if model == "base" else folders / model, [folders / name for name in adapters])


def test_a_runs_own_tokenizer_is_taken(folders, tiny_llama_folder, tmp_path):
    assert resolve(tiny_llama_folder, [folders / "simcse"]).tokenizer == tiny_llama_folder
    shutil.copytree(folders / "simcse", tmp_path / "run")
    for path in tiny_llama_folder.glob("token*"):
        shutil.copy(path, tmp_path / "run")
    assert resolve(tmp_path / "run").tokenizer == tmp_path / "run"
    assert resolve(tiny_llama_folder, [tmp_path / "run"]).tokenizer == tmp_path / "run"


def test_a_run_of_another_base_is_refused(folders, make_checkpoint, tiny_llama_folder, tmp_path):
    other = make_checkpoint(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match=r"mntp was trained on .*, which differs from .*other"):
        resolve(other, [folders / "mntp"])
    shutil.copytree(tiny_llama_folder, tmp_path / "copy")
    assert resolve(tmp_path / "copy", [folders / "simcse"]).base == tmp_path / "copy"
    shutil.copytree(folders / "simcse", tmp_path / "moved")  # its base has gone, so the model is what is given
    description = replace(RunDescription.read(tmp_path / "moved"), base_model=str(tmp_path / "gone"))
    description.write(tmp_path / "moved")
    assert len(resolve(tmp_path / "copy", [tmp_path / "moved"]).adapters) == 2


def test_an_adapter_trained_on_a_run_brings_it(folders, tiny_llama_folder, tmp_path):
    """transformers loads a folder with an adapter, and PEFT then names that folder as the base."""
    shutil.copytree(folders / "plain", tmp_path / "upper")
    path = tmp_path / "upper" / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": str(folders / "supervised")}
    path.write_text(json.dumps(values))
    for checkpoint in (resolve(tmp_path / "upper"), resolve(tiny_llama_folder, [tmp_path / "upper"])):
        assert [path.name for path in checkpoint.adapters] == ["1", "2", "supervised", "upper"]
        assert checkpoint.run.pooling == "last"
        assert checkpoint.base == tiny_llama_folder
    path.write_text(json.dumps(values | {"base_model_name_or_path": str(tmp_path / "upper")}))
    for arguments in ((tmp_path / "upper",), (tiny_llama_folder, [tmp_path / "upper"])):
        with pytest.raises(ValueError, match="leads back to itself"):
            resolve(*arguments)


def test_a_run_whose_earlier_adapter_is_missing_is_not_loaded_by_half(folders, tiny_llama_folder, tmp_path):
    shutil.copytree(folders / "simcse", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "earlier")
    with pytest.raises(FileNotFoundError, match=r"earlier/1/adapter_config\.json does not exist"):
        load(tiny_llama_folder, adapters=[tmp_path / "run"])


def test_a_run_without_its_description_is_not_loaded_by_half(folders, tmp_path):
    shutil.copytree(folders / "simcse", tmp_path / "run")
    (tmp_path / "run" / "bivec.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"run/bivec\.json does not exist, .* adapters in earlier"):
        load(tmp_path / "run")


def test_an_adapter_on_a_trained_checkpoint_keeps_its_description(folders, tiny_llama_folder, tmp_path):
    """A run of full fine-tuning is a base; what stands on it is read as it was."""
    AutoModel.from_pretrained(tiny_llama_folder, dtype=torch.float32).save_pretrained(tmp_path / "full")
    for path in tiny_llama_folder.glob("token*"):
        shutil.copy(path, tmp_path / "full")
    RunDescription("pretrain", None, pooling="first").write(tmp_path / "full")
    assert resolve(tmp_path / "full", [folders / "plain"]).run.pooling == "first"
    with pytest.raises(FileNotFoundError, match="an adapter is a PEFT folder"):
        resolve(tiny_llama_folder, [tmp_path / "full"])
