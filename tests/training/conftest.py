"""Small training files and settings, and one step of a stage with its gradients."""

import json
import random

import pytest
import torch
from accelerate import Accelerator

from bivec.engine.tokens import TextTokenizer, load_tokenizer
from bivec.training import STAGES
from bivec.training.mask_schedule import MaskSchedule
from bivec.training.optimizer import Optimizer
from bivec.training.passes import Passes
from bivec.training.preparation import prepare
from bivec.training.processes import Processes
from bivec.training.stages import make_stage, read_data
from bivec.training.trainee import load_trainee

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "batch", "holds", "many", "sequences", "sees")


def sentences(count: int, seed: int = 0) -> list[str]:
    """Different texts of 3 to 14 words."""
    chance = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(chance.choices(WORDS, k=chance.randint(3, 14)))] = None
    return list(found)


@pytest.fixture(scope="session")
def tokenizer(make_checkpoint, tmp_path_factory) -> TextTokenizer:
    """A byte-level BPE that puts BOS first and cuts a text at 16 tokens."""
    folder = make_checkpoint(tmp_path_factory.mktemp("tokenizer"))
    return TextTokenizer(load_tokenizer(folder, 1000), 16)


@pytest.fixture
def write(tmp_path):
    """write(name, lines) -> path, as a string, of a file that holds the lines."""

    def write(name: str, *lines: str) -> str:
        path = tmp_path / name
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("".join(text + "\n" for text in sentences(40)))
    return path


@pytest.fixture
def pair_file(tmp_path):
    """Rows with one to three negatives; the first two have the same query."""
    path = tmp_path / "pairs.jsonl"
    texts = iter(sentences(200, seed=1))
    rows = []
    for row in range(24):
        query = rows[0]["query"] if row == 1 else next(texts)
        rows.append({"query": query, "positive": next(texts), "negatives": [next(texts) for _ in range(1 + row % 3)]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def make_settings(tiny_llama_folder, text_file, pair_file, tmp_path):
    """Settings of a stage on the tiny model, float32, without dropout unless asked for."""

    def make(stage: str, **changes):
        arguments = {
            "model": str(tiny_llama_folder),
            "data": [str(pair_file if stage == "supervised" else text_file)],
            "output": str(tmp_path / "run"),
            "dtype": "float32",
            "device": "cpu",
            "batch_size": 8,
            "max_length": 48,
            "lora_r": 4,
            "lora_dropout": 0.0,
            "logging_steps": 1,
        }
        if stage in ("pretrain", "mntp"):
            arguments["block_size"] = 0
        if stage == "simcse":
            arguments |= {"attention_dropout": 0.0, "lora_dropout": 1e-9}  # rounds to none
        return STAGES[stage](**(arguments | changes))

    return make


class Step:
    """A stage on one process, ready for a step."""

    def __init__(self, settings):
        prepared = prepare(settings, torch.device("cpu"))
        settings = self.settings = prepared.settings
        self.trainee = load_trainee(prepared)
        self.passes = Passes(
            self.trainee,
            token_budget=settings.token_budget or 4096,
            attention_dropout=settings.attention_dropout,
            checkpoint_activations=settings.gradient_checkpointing,
            seed=settings.seed,
        )
        data = read_data(settings, prepared.tokenizer)
        self.stage = make_stage(settings, data, self.passes, Processes(Accelerator(cpu=True)))
        self.schedule = MaskSchedule(settings.mask_schedule, 10, settings.max_length, self.trainee.config)
        generator = torch.Generator().manual_seed(7)
        for name, parameter in self.trainee.parameters.items():
            if "lora_B" in name:  # zero at the start, which would leave A without a gradient
                parameter.data.normal_(0.0, 0.1, generator=generator)

    def run(self, step: int = 0) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
        """Losses and gradients of one step."""
        for parameter in self.trainee.parameters.values():
            parameter.grad = None
        objective = self.stage.objective
        losses = objective.train(objective.prepare(step), self.schedule(step))
        gradients = {name: parameter.grad.clone() for name, parameter in self.trainee.parameters.items()}
        return {name: loss.item() for name, loss in losses.items()}, gradients


@pytest.fixture
def make_step():
    return Step


@pytest.fixture
def weights_lost(monkeypatch) -> None:
    """The second update leaves a weight that is no number."""
    original, calls = Optimizer.step, [0]

    def spoiled(self):
        norm = original(self)
        calls[0] += 1
        if calls[0] == 2:
            next(iter(self.parameters.values())).data.fill_(float("nan"))
        return norm

    monkeypatch.setattr(Optimizer, "step", spoiled)
