"""Two gloo processes with unequal data against one process on the joined batch."""

import json
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from bivec.training import train

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


def run_processes(settings, world_size: int) -> None:
    """Train in forks of this process that find each other as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                torch.set_num_threads(1)
                AcceleratorState._reset_state(reset_partial_state=True)
                if world_size > 1:
                    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
                    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
                train(settings)
                status = 0
            except BaseException as error:
                print(repr(error), file=sys.stderr)
            finally:
                os._exit(status)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0] * world_size


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("mntp", {"mask_token": "x", "keep_generation": 0.5}),
        ("simcse", {"attention_dropout": 0.3, "token_budget": 96}),
        ("supervised", {"warmup_steps": 0, "symmetric": True, "token_budget": 128, "batch_size": 12}),
    ],
)
def test_two_processes_are_one(make_settings, tmp_path, stage, changes, text_file, pair_file):
    """Texts of unequal length, so unequal numbers of tokens and passes; unequal numbers of hard negatives."""
    results = []
    data = str(pair_file if stage == "supervised" else text_file)
    arguments = {"max_steps": 3, "learning_rate": 1e-3, "eval_data": [data], "eval_steps": 3} | changes
    for world_size in (1, 2):
        settings = make_settings(stage, output=str(tmp_path / f"{world_size}"), **arguments)
        run_processes(settings, world_size)
        log = [json.loads(line) for line in (Path(settings.output) / "log.jsonl").read_text().splitlines()]
        results.append((log[1:], load_file(Path(settings.output) / "adapter_model.safetensors")))
    (one_log, one), (two_log, two) = results
    assert len(one_log) == len(two_log) == 5
    for first, second in zip(one_log, two_log, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {"tokens"}:
            assert second[key] == pytest.approx(first[key], rel=2e-5, abs=1e-6), key
    for name in one:
        assert (one[name] - two[name]).abs().max() < 2e-5, name
    assert max(tensor.abs().max() for name, tensor in one.items() if "lora_B" in name) > 1e-3
