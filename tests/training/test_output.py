"""The folder of a run: what is refused, what is removed, and who holds it."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from bivec.engine.outputs import open_locked
from bivec.training import loop, train
from bivec.training.optimizer import Optimizer


def files(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its name there; a link counts as what it says."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or path.is_file()]
    return {
        str(path.relative_to(folder)): os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        for path in found
    }


@pytest.fixture
def settings(make_settings, tmp_path):
    """Two steps with a checkpoint each."""

    def make(output: str = "run", *, stage: str = "simcse", **changes):
        arguments = {"max_steps": 2, "save_steps": 1, "output": str(tmp_path / output)}
        return make_settings(stage, **(arguments | changes))

    return make


@pytest.fixture
def run_folder(settings, tmp_path) -> Path:
    train(settings())
    return tmp_path / "run"


def killed_at(step: int, settings, monkeypatch) -> None:
    """Train, killed before `step` is done."""
    calls = [0]
    original = Optimizer.step

    def counted(self):
        calls[0] += 1
        if calls[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self)

    monkeypatch.setattr(Optimizer, "step", counted)
    train(settings)


@pytest.mark.parametrize("stage", ["simcse", "pretrain"])
def test_overwriting_removes_a_run_and_all_of_it(settings, tmp_path, stage):
    """Also what a killed run leaves: temporary files, an unfinished checkpoint, a lock."""
    base = settings("base", stage="mntp", mask_token="x", max_steps=1)
    train(base)
    model = {"model": base.output} if stage == "simcse" else {"random_weights": True}
    old, run = settings(stage=stage, **model), tmp_path / "run"
    train(old)
    leftovers = (".lock", ".log.jsonl.tmp", ".bivec.json.tmp", ".adapter_model.safetensors.tmp", ".tmpAb3dEf")
    for name in (*leftovers, "checkpoints/.step-9.tmp/state.json", "trackers/bivec/events"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b"left over")
    train(settings(stage=stage, max_steps=1, overwrite=True))
    train(settings("fresh", stage=stage, max_steps=1))
    assert files(run).keys() == files(tmp_path / "fresh").keys()
    assert not (run / "earlier").exists()
    assert not (run / "trackers").exists()


@pytest.mark.parametrize(
    "foreign",
    ["thesis.tex", "README.md", "checkpoints/thesis.tex", "checkpoints/step-1/notes.txt", "earlier/1/notes.txt",
     "data/.tmpAb3dEf", "checkpoints/step-x/state.json"],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["file", "link"])
def test_overwriting_refuses_what_a_run_did_not_write(settings, run_folder, tmp_path, foreign, kind):
    path = run_folder / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "file":
        path.write_text("years of work")
    else:
        (tmp_path / "elsewhere").write_text("years of work")
        path.symlink_to(tmp_path / "elsewhere")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match=f"did not write, as .*{Path(foreign).name}"):
        train(settings(overwrite=True))
    assert files(tmp_path) == before


def test_overwriting_leaves_what_came_after_it_was_checked(settings, run_folder, monkeypatch):
    original = loop.load_trainee

    def meanwhile(*arguments):
        (run_folder / "checkpoints" / "thesis.tex").write_text("years of work")
        return original(*arguments)

    monkeypatch.setattr(loop, "load_trainee", meanwhile)
    train(settings(overwrite=True, max_steps=1))
    assert (run_folder / "checkpoints" / "thesis.tex").read_text() == "years of work"
    assert not (run_folder / "checkpoints" / "step-2").exists()


@pytest.mark.parametrize("call", [1, 2, 5, 8])
def test_killed_while_it_removes_a_run(settings, run_folder, monkeypatch, exit_code, tmp_path, call):
    """What is left is a run still, so the same command does what it was asked to; no one takes it for a whole one."""

    def killed():
        original, calls = Path.unlink, [0]

        def counted(self, *arguments, **options):
            calls[0] += 1
            if calls[0] == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *arguments, **options)

        clear = loop.clear

        def watched(output):
            monkeypatch.setattr(Path, "unlink", counted)
            clear(output)

        monkeypatch.setattr(loop, "clear", watched)
        train(settings(overwrite=True, seed=7))

    before = files(run_folder).keys()
    assert exit_code(killed) == -signal.SIGKILL
    assert before - files(run_folder).keys() == set() or not (run_folder / "bivec.json").exists()
    with pytest.raises(ValueError, match="of another configuration: seed was 42, is 7"):
        train(settings(resume=True, seed=7))
    train(settings(overwrite=True, seed=7))
    train(settings("fresh", seed=7))
    assert files(run_folder) == files(tmp_path / "fresh")


def test_overwriting_refuses_a_link_in_the_place_of_a_file(settings, run_folder, tmp_path):
    (run_folder / "adapter_config.json").replace(tmp_path / "config")
    (run_folder / "adapter_config.json").symlink_to(tmp_path / "config")
    with pytest.raises(FileExistsError, match=r"did not write, as .*adapter_config\.json"):
        train(settings(overwrite=True))
    assert (tmp_path / "config").is_file()


@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_a_folder_that_is_no_run_stays_as_it_is(settings, fresh_llama_folder, how, tmp_path):
    """A model has names that a run has too, and so may any folder."""
    folders = {"model": fresh_llama_folder, "thesis": tmp_path / "thesis", "adapter": tmp_path / "adapter"}
    (folders["thesis"] / "checkpoints").mkdir(parents=True)
    (folders["thesis"] / "log.jsonl").write_text('{"step": 0}\n')
    train(settings("adapter"))
    shutil.rmtree(folders["adapter"] / "checkpoints")
    (folders["adapter"] / "log.jsonl").unlink()
    before = files(tmp_path)
    for folder in folders.values():
        with pytest.raises(FileExistsError, match="holds no run of bivec train"):
            train(settings(output=str(folder), **{how: True}))
    (tmp_path / "file").write_text("one")
    with pytest.raises(FileExistsError, match="output must be a folder"):
        train(settings("file", **{how: True}))
    (tmp_path / "file").unlink()
    assert files(tmp_path) == before


def test_an_output_that_is_an_input_is_refused(settings, run_folder, text_file, tmp_path):
    """The run's own folder, its base, an adapter beneath, data: each as the output, holding it, or within."""
    train(settings("next", model=str(run_folder)))
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(text_file, data / "texts.txt")
    cases = [
        ({"model": str(run_folder)}, "run"),
        ({"model": str(run_folder)}, "run/inside"),
        ({"model": str(tmp_path / "next")}, "next/earlier/1/inside"),
        ({"data": [str(data)]}, "data/run"),
        ({"eval_data": [str(data)]}, "data/run"),
    ]
    before = files(tmp_path)
    for changes, output in cases:
        with pytest.raises(ValueError, match=r"the output (would overwrite|lies within) the input"):
            train(settings(output, overwrite=True, **changes))
    with pytest.raises((ValueError, FileExistsError)):
        train(settings("", overwrite=True))
    assert files(tmp_path) == before


def test_resuming_needs_an_unfinished_run_of_the_same_settings(settings, run_folder, monkeypatch, exit_code, tmp_path):
    finished = files(run_folder)
    shutil.rmtree(run_folder / "checkpoints")
    before = files(tmp_path)
    with pytest.raises(FileExistsError, match="is a finished run without checkpoints"):
        train(settings(resume=True))
    with pytest.raises(ValueError, match=r"log\.jsonl is of another configuration: seed was 42, is 7"):
        train(settings(resume=True, seed=7))
    assert files(tmp_path) == before
    shutil.rmtree(run_folder)
    assert exit_code(lambda: killed_at(1, settings(save_steps=2), monkeypatch)) == -signal.SIGKILL
    assert not (run_folder / "checkpoints").exists()
    with pytest.raises(ValueError, match=r"log\.jsonl is of another configuration: temperature was 0.05, is 0.1"):
        train(settings(resume=True, temperature=0.1))
    (run_folder / "adapter_model.safetensors").write_bytes(b"another's")
    before = files(run_folder)
    with pytest.raises(FileExistsError, match=r"holds adapter_model\.safetensors, which its unfinished run has not"):
        train(settings(resume=True))
    assert files(run_folder) == before
    (run_folder / "adapter_model.safetensors").unlink()
    train(settings(resume=True))
    assert files(run_folder) == finished


def test_resuming_begins_in_an_empty_folder_or_none(settings, run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "killed early").mkdir()
    (tmp_path / "killed early" / ".lock").write_text("process 1 on nowhere")
    (tmp_path / "killed early" / ".log.jsonl.tmp").write_text('{"st')
    for name in ("empty", "killed early", "none"):
        train(settings(name, resume=True))
        assert files(tmp_path / name) == files(run_folder)


def test_two_runs_do_not_share_a_folder(settings, tmp_path):
    (tmp_path / "run").mkdir()
    with open_locked(tmp_path / "run" / ".lock") as lock:
        lock.write(b"process 1 on nowhere")
        lock.flush()
        for how in ({}, {"resume": True}):
            with pytest.raises(
                FileExistsError, match=r"run: another run is writing this output \(process 1 on nowhere"
            ):
                train(settings(**how))
        assert files(tmp_path / "run") == {".lock": b"process 1 on nowhere"}
    train(settings())
    assert ".lock" not in files(tmp_path / "run")


def test_a_run_that_cannot_begin_leaves_no_folder(settings, tmp_path):
    with pytest.raises(FileNotFoundError):
        train(settings("a/b/run", data=[str(tmp_path / "missing.txt")]))
    assert not (tmp_path / "a").exists()


def test_a_checkpoint_that_is_removed_keeps_what_is_not_its_own(settings, tmp_path):
    train(settings(max_steps=2, save_total_limit=2))
    notes = tmp_path / "run" / "checkpoints" / "step-1" / "notes.txt"
    notes.write_text("years of work")
    newest = tmp_path / "run" / "checkpoints" / "step-2"
    shutil.rmtree(newest)
    for name in ("adapter_config.json", "adapter_model.safetensors", "bivec.json"):
        (tmp_path / "run" / name).unlink()
    train(settings(max_steps=2, save_total_limit=1, resume=True))
    assert newest.is_dir()
    assert files(notes.parent) == {"notes.txt": b"years of work"}


def test_the_log_begins_with_the_settings(run_folder):
    first = json.loads((run_folder / "log.jsonl").read_text().splitlines()[0])
    assert first["step"] == 0
    assert first["settings"]["max_steps"] == 2
    assert load_file(run_folder / "adapter_model.safetensors")
