"""What is printed for a reader is run as it is, where it can be run here, and gives the vectors that bivec gives."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bivec import Encoder, cli
from bivec.engine.export import export
from bivec.engine.gguf_export import export_gguf
from bivec.engine.readers import readers
from bivec.engine.run_folder import RunDescription

LLAMA3 = {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}


def test_an_export_says_who_reads_it(tiny_llama_folder, tmp_path):
    output = tmp_path / "out"
    arguments = ["export", "--model", str(tiny_llama_folder), "--output", str(output)]
    found = CliRunner().invoke(cli.app, arguments)
    assert (found.exit_code, found.stdout) == (0, f"{output}\n"), found.stderr
    lines = found.stderr.splitlines()
    assert lines[:-1] == [str(verdict) for verdict in readers(output)]
    assert lines[-1] == f"commands: bivec inspect --readers --model {output}"


@pytest.fixture
def exported(checkpoint_folders, tmp_path):
    """Exports a run of a checkpoint, which has a description; returns the folder."""

    def run(architecture, **description):
        source = tmp_path / "run"
        shutil.copytree(checkpoint_folders[architecture], source)
        RunDescription("supervised", None, **description).write(source)
        export(source, tmp_path / "it's out", dtype="float32")
        return tmp_path / "it's out"

    return run


def run_here(folder, reader, expected):
    """Runs what is printed for a Python reader; returns its variables, and bivec's encoder."""
    verdict = next(verdict for verdict in readers(folder) if verdict.reader == reader)
    assert verdict.verdict == expected, verdict
    names: dict = {}
    exec(verdict.command, names)
    return names, Encoder.from_pretrained(folder, dtype="float32")


@pytest.mark.parametrize("pooling", ["mean", "weighted_mean", "last", "first"])
@pytest.mark.parametrize(("architecture", "description"), [("llama", {}), ("qwen3", {"normalize": True})])
def test_transformers_gives_these_vectors(exported, architecture, description, pooling):
    folder = exported(architecture, pooling=pooling, **description)
    names, encoder = run_here(folder, "transformers", "yes")
    assert np.abs(names["vectors"].detach().numpy() - encoder.encode(["a text", "another"])).max() < 1e-5


@pytest.mark.parametrize(
    "description", [{"instruction": "find:"}, {"normalize": True}, {"instruction": "find:", "pooling": "last"}]
)
def test_sentence_transformers_gives_these_vectors(exported, description):
    pytest.importorskip("sentence_transformers")
    names, encoder = run_here(exported("mistral", **description), "sentence-transformers", "yes")
    assert np.abs(names["queries"] - encoder.encode_query(["a question"])).max() < 1e-5
    assert np.abs(names["documents"] - encoder.encode_document(["a text"])).max() < 1e-5


def test_a_base_is_read_where_it_can_be_told(checkpoint_folders, tmp_path):
    """It has no padding token, no length and no word on its mask, of which sentence-transformers must find the last."""
    names, encoder = run_here(checkpoint_folders["mistral"], "transformers", "with flags")
    assert np.abs(names["vectors"].detach().numpy() - encoder.encode(["a text", "another"])).max() < 1e-5
    pytest.importorskip("sentence_transformers")
    assert readers(checkpoint_folders["mistral"])[1].verdict == "no"
    shutil.copytree(checkpoint_folders["mistral"], tmp_path / "told")
    config = json.loads((tmp_path / "told" / "config.json").read_text())
    (tmp_path / "told" / "config.json").write_text(json.dumps(config | {"is_causal": False}))
    names, encoder = run_here(tmp_path / "told", "sentence-transformers", "with flags")
    assert np.abs(names["documents"] - encoder.encode(["a text"])).max() < 1e-5


@pytest.mark.parametrize("architecture", ["llama", "llama-bias", "mistral", "qwen2", "qwen3"])
def test_the_export_for_llama_cpp_is_one_that_runs(exported, architecture):
    pytest.importorskip("gguf")
    verdict = readers(exported(architecture))[-1]
    assert verdict.verdict == "with flags"
    export_command, serve_command = verdict.command.splitlines()
    program, *arguments = shlex.split(export_command)
    found = CliRunner().invoke(cli.app, arguments)
    assert (program, found.exit_code) == ("bivec", 0), found.stderr
    written = Path(found.stdout.strip())
    assert written.is_file()
    assert shlex.split(serve_command)[:3] == ["llama-server", "--model", str(written)]
    window = {"mistral": 7, "qwen2": 9}.get(architecture, 256)
    assert f"--ubatch-size {window} " in serve_command


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [("qwen3", {"attention_bias": True}), ("qwen2", {"head_dim": 32}), ("qwen3", LLAMA3)],
)
def test_what_llama_cpp_refuses_is_known_before(make_checkpoint, tmp_path, architecture, changes):
    pytest.importorskip("gguf")
    folder = make_checkpoint(tmp_path / "model", architecture)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    assert readers(folder)[-1].verdict == "no"
    with pytest.raises(ValueError, match="cannot be written as GGUF"):
        export_gguf(folder, tmp_path / "out.gguf")
