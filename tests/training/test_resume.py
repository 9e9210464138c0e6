"""A killed run, resumed, is bitwise the run that was not: at every point of saving, and at steps between.

Runs are forked from this process, each with one thread, so that importing torch is paid for once.
"""

import errno
import json
import os
import resource
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bivec.engine import dtypes, weights
from bivec.training import checkpoint, train
from bivec.training.optimizer import Optimizer
from bivec.training.output import LOG
from bivec.training.trainee import Trainee

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture
def settings(make_settings, tmp_path):
    """Seven steps over an epoch and a half, in several passes each, with every kind of dropout."""

    def make(output: str = "run", **changes):
        arguments = {"attention_dropout": 0.3, "lora_dropout": 0.05, "token_budget": 96, "max_steps": 7}
        arguments |= {"save_steps": 2, "eval_steps": 3, "output": str(tmp_path / output)}
        return make_settings("simcse", **(arguments | changes))

    return make


def contents(output: Path) -> tuple[list[dict], bytes]:
    """The log's entries and the adapter's bytes."""
    entries = [json.loads(line) for line in (output / LOG).read_text().splitlines()]
    return entries, (output / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def uninterrupted(settings, exit_code):
    whole = settings("whole")
    assert exit_code(lambda: train(whole)) == 0
    return contents(Path(whole.output))


def assert_resumes(settings, uninterrupted, exit_code) -> None:
    resumed = settings(resume=True)
    assert exit_code(lambda: train(resumed)) == 0
    entries, adapter = contents(Path(resumed.output))
    assert entries == uninterrupted[0]
    assert adapter == uninterrupted[1]
    folders = sorted(path.name for path in (Path(resumed.output) / checkpoint.CHECKPOINTS).iterdir())
    assert folders == ["step-6", "step-7"]


# what saving a checkpoint does to the disk, each call a point at which a run can be killed
TOUCHES = [(weights, "save_file"), (checkpoint, "sync"), (os, "replace"), (Path, "unlink"), (Path, "write_text")]


def touch_counted(monkeypatch, at_call) -> None:
    """Call `at_call(number, what, arguments)` before each touch within `checkpoint.save`."""
    number, inside = [0], [False]
    save = checkpoint.save

    def counted(function, name):
        def call(*arguments, **options):
            if inside[0]:
                number[0] += 1
                at_call(number[0], name, arguments)
            return function(*arguments, **options)

        return call

    def watched(*arguments, **options):
        inside[0] = True
        try:
            return save(*arguments, **options)
        finally:
            inside[0] = False

    for owner, name in TOUCHES:
        monkeypatch.setattr(owner, name, counted(getattr(owner, name), name))
    monkeypatch.setattr(checkpoint, "save", watched)


def test_killed_at_every_point_of_saving(settings, uninterrupted, monkeypatch, tmp_path, exit_code):
    """The second and the third checkpoint: there is an older one, and there is one to remove."""
    calls = tmp_path / "calls"

    def count():
        touch_counted(monkeypatch, lambda number, name, _: calls.open("a").write(f"{number} {name}\n"))
        train(settings("counted"))

    assert exit_code(count) == 0
    points = [line.split() for line in calls.read_text().splitlines()]
    per_save = len([name for _, name in points if name == "save_file"])
    assert per_save == 4
    kills = [int(number) for number, _ in points][len(points) // 4 : 3 * len(points) // 4 + 1]
    assert len(kills) >= 16
    for point in kills:
        shutil.rmtree(settings().output, ignore_errors=True)

        def run_until(point=point):
            def kill(number, name, arguments):
                if number == point:
                    if name == "save_file":  # half a file
                        Path(arguments[1]).write_bytes(b"\x10\x00\x00\x00")
                    die()

            touch_counted(monkeypatch, kill)
            train(settings())

        assert exit_code(run_until) == -signal.SIGKILL
        assert_resumes(settings, uninterrupted, exit_code)


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7])
def test_killed_at_a_step(settings, uninterrupted, step, monkeypatch, exit_code):
    steps = [0]
    original = Optimizer.step

    def counted(self):
        steps[0] += 1
        if steps[0] == step:
            die()
        return original(self)

    def run():
        monkeypatch.setattr(Optimizer, "step", counted)
        train(settings())

    assert exit_code(run) == -signal.SIGKILL
    assert_resumes(settings, uninterrupted, exit_code)


def test_sigterm_saves_first(settings, uninterrupted, monkeypatch, exit_code):
    original = Optimizer.step
    steps = [0]

    def counted(self):
        steps[0] += 1
        if steps[0] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    def run():
        monkeypatch.setattr(Optimizer, "step", counted)
        train(settings())

    assert exit_code(run) == 143
    saved = checkpoint.newest(Path(settings().output))
    assert saved is not None
    assert saved.state["step"] == 3
    resumed = settings(resume=True)
    assert exit_code(lambda: train(resumed)) == 0
    assert contents(Path(resumed.output)) == uninterrupted


@pytest.mark.parametrize(("owner", "name", "call"), [(checkpoint, "save", 2), (Trainee, "save", 1)])
def test_a_full_disk_leaves_the_earlier_checkpoints(
    settings, uninterrupted, monkeypatch, exit_code, tmp_path, owner, name, call
):
    """The disk is full when the second checkpoint is written, and when the result is."""
    original, calls = getattr(owner, name), [0]

    def full(*arguments):
        calls[0] += 1
        if calls[0] == call:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        return original(*arguments)

    def run():
        monkeypatch.setattr(owner, name, full)
        try:
            train(settings())
        except OSError as error:
            (tmp_path / "error").write_text(f"{error.errno} {error.filename} {error.strerror}")
            raise SystemExit(3) from error

    assert exit_code(run) == 3
    folder = Path(settings().output)
    said = (tmp_path / "error").read_text()
    assert said.startswith(f"{errno.EFBIG} {folder}")
    assert said.endswith(os.strerror(errno.EFBIG))
    left = sorted(path.name for path in (folder / checkpoint.CHECKPOINTS).iterdir())
    assert left == (["step-2"] if owner is checkpoint else ["step-6", "step-7"])
    assert not (folder / "bivec.json").exists()
    assert_resumes(settings, uninterrupted, exit_code)


def test_a_damaged_checkpoint_is_passed_over(settings, caplog):
    run = settings(max_steps=4)
    train(run)
    folder = Path(run.output) / checkpoint.CHECKPOINTS
    with (folder / "step-4" / "tensors.safetensors").open("r+b") as file:
        file.seek(200)
        file.write(b"\xff")
    saved = checkpoint.newest(Path(run.output))
    assert saved is not None
    assert saved.path.name == "step-2"
    assert "step-4: damaged, passed over for " in caplog.text
    finished = contents(Path(run.output))
    train(settings(max_steps=4, resume=True))
    assert contents(Path(run.output)) == finished
    for name in ("step-2", "step-4"):
        (folder / name / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"every checkpoint is damaged, .*step-4, .*step-2; .*--overwrite"):
        train(settings(max_steps=4, resume=True))
    assert contents(Path(run.output)) == finished


def test_a_damaged_checkpoint_is_not_kept_for_a_whole_one(settings, monkeypatch, exit_code):
    run = settings(max_steps=4)
    train(run)
    folder = Path(run.output) / checkpoint.CHECKPOINTS
    (folder / "step-4" / "state.json").write_text("{}")
    for name in ("bivec.json", "adapter_config.json", "adapter_model.safetensors"):
        (Path(run.output) / name).unlink()
    original, calls = Optimizer.step, [0]

    def killed(self):
        calls[0] += 1
        if calls[0] == 2:
            die()
        return original(self)

    def go_on():
        monkeypatch.setattr(Optimizer, "step", killed)
        train(settings(max_steps=4, save_steps=1, save_total_limit=1, resume=True))

    assert exit_code(go_on) == -signal.SIGKILL
    assert [path.name for path in folder.iterdir()] == ["step-3"]
    assert train(settings(max_steps=4, resume=True)).first_step == 3


def test_resuming_a_finished_run_changes_nothing(settings):
    run = settings(max_steps=3)
    train(run)
    before = contents(Path(run.output))
    summary = train(settings(max_steps=3, resume=True))
    assert (summary.first_step, summary.steps, summary.tokens) == (3, 0, 0)
    assert contents(Path(run.output)) == before


@pytest.mark.parametrize("begun", ["bfloat16", "float32"])
def test_a_run_goes_on_in_the_dtype_that_it_was_begun_in(settings, monkeypatch, exit_code, begun):
    """Whatever is measured to be faster by then, and bitwise."""

    def faster(dtype):
        monkeypatch.setattr(dtypes, "onednn_multiplies", lambda dtype: True)
        monkeypatch.setattr(dtypes, "product_rates", lambda config: (1.0, 2.0) if dtype == "bfloat16" else (2.0, 1.0))

    asked, auto = (settings(name, dtype=dtype, max_steps=3) for name, dtype in (("asked", begun), ("auto", "auto")))
    assert exit_code(lambda: train(asked)) == 0
    faster(begun)
    original = checkpoint.save

    def stop(*arguments):
        original(*arguments)
        die()

    def interrupted():
        monkeypatch.setattr(checkpoint, "save", stop)
        train(auto)

    assert exit_code(interrupted) == -signal.SIGKILL
    faster({"bfloat16": "float32", "float32": "bfloat16"}[begun])
    assert exit_code(lambda: train(replace(auto, resume=True))) == 0
    expected, found = contents(Path(asked.output)), contents(Path(auto.output))
    assert found[0][1:] == expected[0][1:]
    assert found[1] == expected[1]
    assert checkpoint.newest(Path(auto.output)).state["dtype"] == begun


def test_refuses_another_configuration_or_other_data(settings, text_file):
    train(settings(max_steps=2))
    with pytest.raises(ValueError, match=r"temperature was 0.05, is 0.1") as error:
        train(settings(max_steps=2, temperature=0.1, resume=True))
    assert "step-2" in str(error.value)
    text_file.write_text(text_file.read_text().replace("fox", "cat"))
    with pytest.raises(ValueError, match="trained on other data"):
        train(settings(max_steps=2, resume=True))


@pytest.mark.parametrize(
    ("changed", "part"), [("weights", "base"), ("tokenizer", "tokenizer"), ("earlier", "adapters")]
)
def test_refuses_a_model_that_has_changed(settings, fresh_llama_folder, changed, part, tmp_path):
    model = fresh_llama_folder
    if changed == "earlier":
        train(settings("earlier", model=str(model), max_steps=1))
        model = tmp_path / "earlier"
    train(settings(model=str(model), max_steps=2))
    train(settings(model=str(model), max_steps=2, resume=True))
    if changed == "tokenizer":
        (model / "vocab.json").write_text("{}")
    else:
        path = model / {"weights": "model.safetensors", "earlier": "adapter_model.safetensors"}[changed]
        tensors = load_file(path)
        next(iter(tensors.values()))[0] += 1
        save_file(tensors, path)
    with pytest.raises(ValueError, match=f"other files of the model .* changed since: {part}$"):
        train(settings(model=str(model), max_steps=2, resume=True))


def test_keeps_what_stands_in_the_output(settings, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="is not empty: give --resume"):
        train(settings())
    with pytest.raises(FileExistsError, match="holds no run of bivec"):
        train(settings(overwrite=True))
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"
    train(settings("other", max_steps=1))
    with pytest.raises(FileNotFoundError):
        train(settings("other", max_steps=1, overwrite=True, data=["missing.txt"]))
    assert (tmp_path / "other" / "adapter_model.safetensors").is_file()


def test_steps_without_a_finite_gradient_are_skipped_and_counted(settings, monkeypatch):
    original = Optimizer.step
    calls = [0]

    def spoiled(bad):
        def step(self):
            calls[0] += 1
            if calls[0] in bad:
                next(iter(self.parameters.values())).grad[0, 0] = float("inf")
            before = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            norm = original(self)
            same = all(torch.equal(before[name], parameter) for name, parameter in self.parameters.items())
            assert same == (calls[0] in bad)
            return norm

        return step

    monkeypatch.setattr(Optimizer, "step", spoiled({2, 3}))
    assert train(settings(max_steps=5, max_skipped_steps=3)).skipped == 2
    calls[0] = 0
    monkeypatch.setattr(Optimizer, "step", spoiled({2, 3, 4}))
    with pytest.raises(RuntimeError, match="3 steps in a row, the last of them 4, had no finite gradient"):
        train(settings("bad", max_steps=5, max_skipped_steps=3))
