"""The smoke test sees a wrong operator, and is silent about right ones."""

import functools
import json

import pytest
import torch

from bivec.benchmarks import smoke, tiles

CPU = torch.device("cpu")


@pytest.fixture
def few_checks(monkeypatch):
    names = ("attention D16, full, float32", "attention D16, dropout, float32", "pool mean, float32", "LoRA, float32")
    every = smoke.checks(CPU, quick=True)
    assert {"encoder", "training step", "contrastive 40, symmetric, float32", "rotary, float32"} <= set(every)
    monkeypatch.setattr(smoke, "checks", lambda *_: {name: every[name] for name in names})
    monkeypatch.setattr(smoke, "describe_machine", lambda *_, **__: {})


def rows(capsys) -> list[dict]:
    return json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
def test_right_operators(few_checks, capsys):
    assert smoke.main(["--quick", "--device", "cpu"]) == 0
    assert all(row["right"] and row["error"] < 1e-5 for row in rows(capsys))


def test_a_wrong_gradient_is_seen(few_checks, monkeypatch, capsys):
    def gradient_off(hidden, *arguments, **settings):
        right = smoke.reference.pool(hidden, *arguments, **settings)
        return right.detach() + 1.01 * (right - right.detach())

    monkeypatch.setattr(smoke, "pool", gradient_off)
    every = smoke.checks(CPU, True)
    monkeypatch.setattr(smoke, "checks", lambda *_: {"pool mean, float32": every["pool mean, float32"]})
    assert smoke.main(["--quick", "--device", "cpu"]) == 1
    (row,) = rows(capsys)
    assert row["right"] is False
    assert row["skipped"].startswith("wrong: error 0.01 ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled, not interpreted")
@pytest.mark.parametrize("name", ["rows", "SwiGLU"])
def test_a_wrong_scale_of_float8_is_seen(monkeypatch, name):
    assert smoke.quantized(name, torch.float32, CPU)[1] is None
    function = {"rows": "quantize_rows", "SwiGLU": "quantized_swiglu"}[name]
    right = getattr(smoke, function)

    def scaled(*arguments):
        values, scales = right(*arguments)
        return values, scales * 1.05

    monkeypatch.setattr(smoke, function, scaled)
    assert "wrong: off by" in smoke.quantized(name, torch.float32, CPU)[1]


def test_a_training_step_with_another_loss_is_seen(monkeypatch):
    row = {"name": "bivec", "skipped": None, "first_loss": 2.0}
    peer = {"name": "peer", "skipped": None, "first_loss": 2.01}
    monkeypatch.setattr("bivec.benchmarks.train.run_stage", lambda *_, **__: [row, peer])
    assert smoke.training_step(CPU, quick=True) == (pytest.approx(0.005, rel=0.01), None)
    peer["first_loss"] = None
    assert "the peers did not run" in str(smoke.training_step(CPU, quick=True)[1])


def test_tiles_that_do_not_agree_are_told(monkeypatch, capsys):
    monkeypatch.setattr(tiles, "describe_machine", lambda *_, **__: {})
    agreeing = tiles.TILES["cpu"][1:]
    monkeypatch.setattr("bivec.engine.runner.Runner._agreeing_tiles", lambda self, *_: agreeing)
    assert tiles.main(["--quick", "--device", "cpu", "--rounds", "1"]) == 0
    found = rows(capsys)
    assert all(row["skipped"] is None for row in found)
    assert [row["rows"] for row in found if row["agrees"]] == list(agreeing)
    assert [row["rows"] for row in found if not row["agrees"]] == [tiles.TILES["cpu"][0]]
    assert all(row["tflops"] > 0 for row in found)


def test_a_check_that_fails_is_a_row(monkeypatch, capsys):
    monkeypatch.setattr(smoke, "describe_machine", lambda *_, **__: {})

    def no_such_operator():
        raise NotImplementedError("addmm.dtype_out")

    right = functools.partial(tuple, (0.0, None))
    monkeypatch.setattr(smoke, "checks", lambda *_: {"first": no_such_operator, "second": right})
    assert smoke.main(["--quick", "--device", "cpu"]) == 1
    first, second = rows(capsys)
    assert first["skipped"] == "NotImplementedError: addmm.dtype_out"
    assert second["right"] is True
