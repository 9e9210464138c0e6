"""Two gloo processes with unequal data against one process on the joined batch."""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from bivec.training import train
from bivec.training.processes import Processes

TRAIN = """
import json, sys
from bivec.training import STAGES, train
train(STAGES[sys.argv[1]](**json.loads(sys.argv[2])))
"""

# float32 is faster for the first process and bfloat16 for the second
MEASURES_OTHERWISE = """
import os
from bivec.engine import dtypes

dtypes.onednn_multiplies = lambda dtype: True
dtypes.product_rates = lambda config: (2.0 - int(os.environ["RANK"]), 1.0)
"""


def run_processes(settings, world_size: int) -> None:
    """Train in processes that find each other as torchrun's do, by a store whose port nobody else can take."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    environment |= {"WORLD_SIZE": str(world_size), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", MEASURES_OTHERWISE + TRAIN, settings.stage, json.dumps(asdict(settings))]
    ranks = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    try:
        assert [rank.wait(timeout=240) for rank in ranks] == [0] * world_size
    finally:
        for rank in ranks:
            rank.kill()


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("mntp", {"mask_token": "x", "keep_generation": 0.5}),
        ("simcse", {"attention_dropout": 0.3, "token_budget": 96}),
        ("supervised", {"warmup_steps": 0, "symmetric": True, "token_budget": 128, "batch_size": 12}),
    ],
)
def test_two_processes_are_one(make_settings, tmp_path, stage, changes, text_file, pair_file):
    """Texts of unequal length, so unequal numbers of tokens and passes; unequal numbers of hard negatives; the dtype of
    the first process, whatever the other measures."""
    results = []
    data = str(pair_file if stage == "supervised" else text_file)
    arguments = {"max_steps": 3, "learning_rate": 1e-3, "eval_data": [data], "eval_steps": 3} | changes
    for world_size in (1, 2):
        dtype = {1: "float32", 2: "auto"}[world_size]
        settings = make_settings(stage, output=str(tmp_path / f"{world_size}"), dtype=dtype, **arguments)
        if world_size == 1:
            train(settings)
        else:
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


def test_what_the_hosts_know_is_not_summed_on_the_device(monkeypatch):
    """Which they would wait for."""
    made, summed = [], []
    monkeypatch.setattr(dist, "group", SimpleNamespace(WORLD="world"))
    monkeypatch.setattr(dist, "new_group", lambda backend: made.append(backend) or "hosts")
    monkeypatch.setattr(
        dist, "all_reduce", lambda tensor, group: summed.append((tensor.device.type, group)) or tensor.mul_(2)
    )
    for device in ("cuda", "cpu"):
        accelerator = SimpleNamespace(process_index=0, num_processes=2, device=torch.device(device))
        assert Processes(accelerator).sum(3, 0.5) == [6.0, 1.0]
    assert made == ["gloo"]
    assert summed == [("cpu", "hosts"), ("cpu", "world")]
