"""A training step on a CUDA device never waits for it: every stage and option, on a device that computes nothing."""

import json
import threading
from types import SimpleNamespace

import pytest
import torch

from bivec.training import checkpoint, loop
from bivec.training.loop import _Run
from bivec.training.passes import activation_bytes
from bivec.training.preparation import prepare

pytest.importorskip("triton")
from bivec.benchmarks.fake_cuda import FakeCuda  # the device's kernels are Triton's

CASES = {
    "pretrain": ("pretrain", {}),
    "pretrain an adapter": ("pretrain", {"full_finetuning": False, "dtype": "float32"}),
    "mntp": ("mntp", {"mask_schedule": "window"}),
    "mntp with its own head": ("mntp", {"train_head": True, "model": "mistral"}),
    "mntp and generation": ("mntp", {"keep_generation": 0.5, "token_budget": 48}),
    "simcse": ("simcse", {"attention_dropout": 0.3, "lora_dropout": 0.05, "symmetric": True, "dims": [16, 64]}),
    "simcse in several passes": ("simcse", {"attention_dropout": 0.3, "lora_dropout": 0.05, "token_budget": 48}),
    "simcse, checkpointed": ("simcse", {"lora_dropout": 0.05, "gradient_checkpointing": True, "pooling": "last"}),
    "supervised": ("supervised", {"instruction": "find what follows:", "mask_schedule": "annealed"}),
    "supervised in several passes": ("supervised", {"keep_generation": 0.5, "token_budget": 64, "batch_size": 3}),
    "layers": ("supervised", {"mask_schedule": "layers", "symmetric_instruction": True}),
}


@pytest.fixture
def fake():
    with FakeCuda() as fake:
        yield fake


@pytest.fixture
def make_run(make_settings, checkpoint_folders, tmp_path):
    """A run on the fake device, ready for its first step."""

    def make(stage: str, **changes) -> _Run:
        if stage == "mntp":
            changes["mask_token"] = "x"
        if "model" in changes:
            changes["model"] = str(checkpoint_folders[changes["model"]])
        defaults = {"device": "cuda", "dtype": "bfloat16", "max_steps": 3, "batch_size": 4}
        settings = make_settings(stage, **(defaults | changes))
        device = torch.device("cuda", 0)
        process = SimpleNamespace(device=device, is_main_process=True, process_index=0, num_processes=1)
        process.end_training = lambda: None
        (tmp_path / "run").mkdir()
        run = _Run(prepare(settings, device), process, tmp_path / "run", None)
        run.open_output()
        return run

    return make


@pytest.mark.parametrize(("stage", "changes"), CASES.values(), ids=CASES)
def test_no_step_waits_for_the_device(fake, make_run, stage, changes):
    """But for the figures of the step before it, which are on the host already when the next one is launched."""
    run = make_run(stage, **changes)
    batch_of = run.stage.objective.prepare
    run._launch_step(batch_of(0))
    with fake.section() as section:
        for step in (1, 2):
            run._launch_step(batch_of(step))
            run._settle(run.behind)
    assert [hazard[:2] for hazard in section.hazards] == [("sync", "Event.synchronize")] * 2, section.hazards
    assert section.counts.triton > 2 * 10
    assert len(run.launched) == 1


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("changes", [{"lora_dropout": 0.05, "attention_dropout": 0.3}, {"attention_dropout": 0.3}])
def test_a_pass_keeps_no_more_than_its_budget_counts_on(fake, make_run, changes, checkpointed):
    run = make_run("simcse", gradient_checkpointing=checkpointed, **changes)
    slab = run.stage.objective.prepare(0).slabs[0]
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = run.passes.hidden_states(slab, run.schedule(0))
    assert states.requires_grad
    for parameter in run.trainee.network.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    estimate = activation_bytes(run.trainee, checkpointed) * slab.batch.num_tokens
    smallest = 0.15 if checkpointed else 0.6  # where a layer is computed again, its own come in the backward
    assert smallest * estimate < sum(kept.values()) < estimate


@pytest.mark.parametrize("stage", ["pretrain", "supervised"])
def test_a_whole_run(fake, make_run, stage, monkeypatch, tmp_path, text_file, pair_file):
    """Log, evaluations, checkpoints and the result, of the steps that they are said to be of."""
    monkeypatch.setattr(loop, "find_divergence", lambda *_: None)  # of weights that no one knows
    data = str(pair_file if stage == "supervised" else text_file)
    changes = {"logging_steps": 2, "eval_data": [data], "eval_steps": 3, "save_steps": 2, "save_total_limit": 9}
    run = make_run(stage, max_steps=5, **changes)
    assert run.train(threading.Event()).steps == 5
    entries = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in entries] == [0, 0, 2, 3, 4, 5, 5]
    assert ["eval_loss" in entry for entry in entries] == [False, True, False, True, False, False, True]
    assert checkpoint.steps(tmp_path / "run") == [5, 4, 2]
    assert (tmp_path / "run" / "bivec.json").exists()
