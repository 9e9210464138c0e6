"""Steps are prepared while others run, and read a step later where the device is not to wait: with the same result."""

import json
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from bivec.training import checkpoint, loop, optimizer, train
from bivec.training.contrastive_objectives import Contrastive
from bivec.training.optimizer import Optimizer
from bivec.training.output import LOG


@pytest.fixture
def settings(make_settings, tmp_path):
    """Six steps over an epoch and a bit, in several passes each, with every kind of dropout."""

    def make(output: str = "run", **changes):
        arguments = {"attention_dropout": 0.3, "lora_dropout": 0.05, "token_budget": 96, "max_steps": 6}
        arguments |= {"learning_rate": 1e-3, "output": str(tmp_path / output)}
        return make_settings("simcse", **(arguments | changes))

    return make


def entries(run) -> list[dict]:
    """Of the log, but for the first."""
    return [json.loads(line) for line in (Path(run.output) / LOG).read_text().splitlines()][1:]


def adapter(run) -> bytes:
    return (Path(run.output) / "adapter_model.safetensors").read_bytes()


def one_after_the_other(items):
    yield from items


def test_a_step_is_prepared_while_the_one_before_it_runs(settings, monkeypatch):
    prepared = [threading.Event() for _ in range(6)]
    prepare, update = Contrastive.prepare, Optimizer.step
    threads, steps = set(), iter(range(6))

    def watched(self, step):
        threads.add(threading.current_thread())
        prepared[step].set()
        return prepare(self, step)

    def updated(self):
        following = next(steps) + 1
        assert following == 6 or prepared[following].wait(10)
        return update(self)

    monkeypatch.setattr(Contrastive, "prepare", watched)
    monkeypatch.setattr(Optimizer, "step", updated)
    train(settings())
    assert threads.isdisjoint(threading.enumerate())  # of one that has ended


def test_the_run_is_bitwise_that_of_steps_prepared_one_after_the_other(settings, text_file, monkeypatch):
    evaluated = {"eval_data": [str(text_file)], "eval_steps": 2}
    threaded, plain = settings("threaded", **evaluated), settings("plain", **evaluated)
    before = torch.get_num_threads()
    train(threaded)
    assert torch.get_num_threads() == before
    monkeypatch.setattr(loop, "ahead", one_after_the_other)
    train(plain)
    assert entries(threaded) == entries(plain)
    assert adapter(threaded) == adapter(plain)


def test_to_prepare_a_step_draws_nothing_from_torch(make_settings, make_step):
    """Whose random state the other thread's passes use meanwhile."""
    for stage in ("pretrain", "mntp", "simcse", "supervised"):
        step = make_step(make_settings(stage, **({"mask_token": "x"} if stage == "mntp" else {})))
        before = torch.get_rng_state()
        step.stage.objective.prepare(0)
        assert torch.equal(torch.get_rng_state(), before)


def test_a_bad_row_ends_the_run_at_its_step(settings, text_file, monkeypatch):
    make_stage = loop.make_stage
    rows = []

    def spoiled(*arguments):
        stage = make_stage(*arguments)
        pairs = stage.objective.pairs
        rows.append(pairs.order(3)[1][2])
        pairs.data._texts[rows[0]] = ""
        return stage

    monkeypatch.setattr(loop, "make_stage", spoiled)
    run = settings()
    with pytest.raises(ValueError, match=r"texts\.txt:\d+: the text leaves no token of its own") as error:
        train(run)
    assert f"{text_file}:{rows[0] + 1}: " in str(error.value)
    assert [entry["step"] for entry in entries(run)] == [1, 2, 3]


def test_an_interrupted_run_does_not_wait_for_the_step_that_is_prepared(settings, monkeypatch):
    never, prepare = threading.Event(), Contrastive.prepare

    def stuck(self, step):
        if step == 2:
            never.wait(60)
        return prepare(self, step)

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Contrastive, "prepare", stuck)
    monkeypatch.setattr(Optimizer, "step", interrupted)
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(settings())
    assert time.monotonic() - began < 30
    never.set()


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Steps as they are taken for a CUDA device, on the CPU: it decides what is skipped, and is read a step later."""
    monkeypatch.setattr(optimizer, "_on_cuda", lambda parameters: True)
    original = loop._Run.__init__

    def behind(self, *arguments):
        original(self, *arguments)
        self.behind = 1

    monkeypatch.setattr(loop._Run, "__init__", behind)


def spoil(monkeypatch, steps: set[int]) -> list[int]:
    """Give the gradients of these steps an infinity; returns the number of steps so far, as it grows."""
    original, calls = Optimizer.step, [0]

    def spoiled(self):
        calls[0] += 1
        if calls[0] in steps:
            next(iter(self.parameters.values())).grad[0, 0] = float("inf")
        return original(self)

    monkeypatch.setattr(Optimizer, "step", spoiled)
    return calls


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_the_device_itself_leaves_everything_as_it_is(settings, as_on_cuda, monkeypatch, bad):
    """Parameters, moments and AdamW's step, in the first step and in a later one; what follows is as without it."""
    monkeypatch.setattr(torch.Tensor, "item", None)  # nothing is read

    def run(gradients) -> tuple[Optimizer, list[dict[str, torch.Tensor]]]:
        generator = torch.Generator().manual_seed(0)
        parameters = {name: nn.Parameter(torch.randn(5, 3, generator=generator)) for name in "ab"}
        one = Optimizer(parameters, settings(weight_decay=0.1, lr_scheduler_type="constant"))
        states = []
        for value in gradients:
            for parameter in parameters.values():
                parameter.grad = torch.full_like(parameter, 0.3)
            parameters["b"].grad[2, 1] = value
            one.step()
            states.append({name: tensor.clone() for name, tensor in one.tensors().items()})
        return one, states

    spoiled, states = run([bad, 0.5, bad, bad, 2.0])
    _, sound = run([0.5, 2.0])
    assert [state["step.a"].tolist() for state in states] == [0, 1, 1, 1, 2]
    assert not any(
        state[f"exp_avg{suffix}.{name}"].any() for state in states[:1] for suffix in ("", "_sq") for name in "ab"
    )
    for place, expected in ((1, 0), (2, 0), (3, 0), (4, 1)):
        assert states[place].keys() == sound[expected].keys()
        for name, tensor in sound[expected].items():
            assert torch.equal(states[place][name], tensor), (place, name)
    assert not torch.equal(states[0]["parameter.a"], states[1]["parameter.a"])
    saved, schedule = spoiled.tensors(), spoiled.schedule_state()
    spoiled.restore(saved, schedule)
    assert all(torch.equal(tensor, saved[name]) for name, tensor in spoiled.tensors().items())


def test_the_log_is_the_same_where_steps_are_read_later(settings, request, monkeypatch):
    """With steps that are skipped, each with a line of its own, and lines that are not of every step."""
    changes = {"max_steps": 9, "logging_steps": 4, "save_steps": 3, "save_total_limit": 9}
    spoil(monkeypatch, {2, 3, 7})
    at_once = settings("once", **changes)
    assert train(at_once).skipped == 3
    monkeypatch.undo()
    request.getfixturevalue("as_on_cuda")
    spoil(monkeypatch, {2, 3, 7})
    later = settings("later", **changes)
    assert train(later).skipped == 3
    first, second = entries(at_once), entries(later)
    assert [entry["step"] for entry in first] == [2, 3, 4, 7, 8, 9]
    assert len(first) == len(second)
    for one, other in zip(first, second, strict=True):
        assert one.keys() == other.keys()
        assert all(other[name] == one[name] for name in ("step", "skipped", "tokens", "learning_rate"))
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
    for run in (at_once, later):
        folder = Path(run.output) / checkpoint.CHECKPOINTS
        states = [json.loads((folder / f"step-{step}" / "state.json").read_text()) for step in (3, 6, 9)]
        assert [state["skipped"] for state in states] == [2, 2, 3]


def test_skipped_steps_in_a_row_are_counted_where_they_are_read_later(settings, as_on_cuda, monkeypatch):
    calls = spoil(monkeypatch, {2, 3, 4})
    with pytest.raises(RuntimeError, match="3 steps in a row, the last of them 4, had no finite gradient"):
        train(settings(max_skipped_steps=3))
    assert calls == [5]  # one more than where nothing is behind
    assert [entry["step"] for entry in entries(settings())] == [1, 2, 3]


def test_weights_that_are_no_numbers_are_told_of_where_steps_are_read_later(settings, as_on_cuda, weights_lost):
    with pytest.raises(RuntimeError, match=r"diverged by step 3: .* holds NaN or infinity"):
        train(settings())


def test_a_run_that_is_read_later_resumes_bitwise(settings, as_on_cuda, monkeypatch):
    whole, run = settings("whole", save_steps=2), settings(save_steps=2)
    train(whole)
    original, calls = Optimizer.step, [0]

    def stopped(self):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(Optimizer, "step", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(run)
    monkeypatch.setattr(Optimizer, "step", original)
    assert train(settings(save_steps=2, resume=True)).first_step == 2
    assert entries(run) == entries(whole)
    assert adapter(run) == adapter(whole)
