"""What has diverged is no checkpoint and no success: training ends in one sentence, and what was saved before stays."""

from pathlib import Path

import pytest

from bivec import Encoder
from bivec.training import checkpoint, train
from bivec.training.divergence import find_divergence
from bivec.training.optimizer import Optimizer


def saved_steps(output: str) -> list[int]:
    return checkpoint.steps(Path(output))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("learning_rate", [1e3, 1e6, 1e30])
@pytest.mark.parametrize("stage", ["simcse", "mntp"])
def test_a_learning_rate_that_is_far_too_high_is_no_success(make_settings, stage, learning_rate, dtype):
    changes = {"mask_token": "x"} if stage == "mntp" else {}
    settings = make_settings(stage, learning_rate=learning_rate, dtype=dtype, max_steps=5, **changes)
    with pytest.raises(RuntimeError, match=r"training has diverged by step .* begin anew with --overwrite"):
        train(settings)
    assert {path.name for path in Path(settings.output).iterdir()} == {"log.jsonl"}
    train(make_settings(stage, learning_rate=1e-4, dtype=dtype, max_steps=1, overwrite=True, **changes))
    Encoder.from_pretrained(settings.output, dtype=dtype, device="cpu")


def test_full_finetuning_too(make_settings):
    settings = make_settings("pretrain", learning_rate=1e25, max_steps=4)
    with pytest.raises(RuntimeError, match="training has diverged by step"):
        train(settings)
    assert {path.name for path in Path(settings.output).iterdir()} == {"log.jsonl"}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e20])
@pytest.mark.parametrize("step", [3, 4])
def test_the_checkpoints_before_stay_and_can_be_gone_on_from(make_settings, monkeypatch, step, bad, tmp_path):
    """A weight is spoiled in a step that is saved, and in one that is not."""

    def settings(output="run", **changes):
        output = str(tmp_path / output)
        return make_settings("simcse", output=output, max_steps=6, save_steps=2, learning_rate=1e-3, **changes)

    original, calls = Optimizer.step, [0]

    def spoiled(self):
        norm = original(self)
        calls[0] += 1
        if calls[0] == step:
            for name, parameter in self.parameters.items():
                if "lora_B" in name:
                    parameter.data.fill_(bad)
        return norm

    monkeypatch.setattr(Optimizer, "step", spoiled)
    with pytest.raises(RuntimeError, match=r"diverged by step 4: .*(NaN or infinity|the base's .* is lost)"):
        train(settings())
    assert saved_steps(settings().output) == [2]
    assert not (tmp_path / "run" / "bivec.json").exists()
    monkeypatch.undo()
    summary = train(settings(resume=True))
    whole = train(settings("whole"))
    assert (summary.steps, summary.first_step, whole.steps, whole.first_step) == (4, 2, 6, 0)
    assert 0 < summary.tokens < whole.tokens
    assert str(summary).startswith(f"4 steps since it was resumed (6 in all), {summary.tokens:,} tokens in ")
    assert str(whole).startswith(f"6 steps, {whole.tokens:,} tokens in ")
    adapters = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("run", "whole")]
    assert adapters[0] == adapters[1]


def test_weights_that_are_no_numbers_end_training_at_the_next_step(make_settings, weights_lost):
    with pytest.raises(RuntimeError, match=r"diverged by step 3: .* holds NaN or infinity"):
        train(make_settings("simcse", max_steps=20))


def test_steps_that_are_all_skipped_are_no_success(make_settings, monkeypatch):
    original = Optimizer.step

    def spoiled(self):
        next(iter(self.parameters.values())).grad[0, 0] = float("inf")
        return original(self)

    monkeypatch.setattr(Optimizer, "step", spoiled)
    with pytest.raises(RuntimeError, match="2 steps in a row, the last of them 2, had no finite gradient"):
        train(make_settings("simcse", max_steps=2))


def test_what_is_sound_is_not_refused(make_step, make_settings):
    """A fresh adapter, a large one, and one over a linear that is zero, under every mask."""
    step = make_step(make_settings("simcse"))
    windows = [(-1, -1), (-1, 0)]
    assert [find_divergence(step.passes, window) for window in windows] == [None, None]
    for name, parameter in step.trainee.parameters.items():
        if "lora_B" in name:
            parameter.data.mul_(20)
    assert [find_divergence(step.passes, window) for window in windows] == [None, None]
    step.trainee.model.layers[0].self_attn.q_proj.base_layer.weight.data.zero_()
    assert [find_divergence(step.passes, window) for window in windows] == [None, None]
    step.trainee.model.norm.weight.data.zero_()
    assert find_divergence(step.passes, (-1, -1)) == "the model's states do not depend on the text any more"
    assert find_divergence(step.passes, (-1, 0)) == "the model's states do not depend on the text any more"


def test_one_embedding_that_is_no_number_is_enough(make_step, make_settings):
    step = make_step(make_settings("pretrain"))
    assert find_divergence(step.passes, (-1, 0)) is None
    step.trainee.model.embed_tokens.weight.data[200, 5] = float("nan")
    assert find_divergence(step.passes, (-1, 0)) == "model.embed_tokens.weight holds NaN or infinity"
