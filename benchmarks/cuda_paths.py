"""The project's ways through CUDA, for a `FakeCuda`: passes of the encoder and steps of training, in models' shapes.

    python -m bivec.benchmarks.cuda_paths            # what each launches, and where its host would wait

Each of `PATHS` makes what it needs and returns the section of what is repeated a thousand times: a pass, a step. Layers
are few and weights have no values, so all of it takes seconds.
"""

import argparse
import json
import logging
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count, cycle
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate.state import AcceleratorState

from .. import DEFAULT_MODEL
from ..engine import encoder as encoder_module
from ..engine.config import ModelConfig, parse_config
from ..engine.encoder import Encoder
from ..engine.model import LlamaModel
from ..engine.packing import PackedBatch
from ..engine.runner import Runner
from ..engine.tokens import copy_tokenizer
from ..training import loop, trainee
from ..training.settings import STAGES
from .device_counts import Section
from .fake_cuda import FakeCuda

_SMALL = {"num_hidden_layers": 2, "vocab_size": 32000, "rms_norm_eps": 1e-5, "max_position_embeddings": 32768}
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama-1B": {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "llama-8B": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    | {"num_key_value_heads": 8},
    "mistral-7B": {"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2-7B": {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "use_sliding_window": False},
    "qwen3-0.6B": {"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16}
    | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
}
LENGTHS = {"short": [12] * 200, "long": [4000, 3000], "mixed": [4096, 1000, *range(1, 130), 64, 65]}
_WORDS = ["plants", "make", "sugar", "from", "light", "while", "the", "tide", "follows", "a", "pale", "moon"]


def configuration(name: str, **changes) -> ModelConfig:
    return parse_config(_SMALL | CONFIGURATIONS[name] | changes)


def make_model(kind: type, config: ModelConfig, dtype: torch.dtype) -> Any:
    """A `LlamaModel` or `LanguageModel` on the fake device."""
    with torch.device("cuda"):
        return kind(config).to(dtype).requires_grad_(False)


def make_runner(config: ModelConfig, products: str = "bfloat16") -> Runner:
    return Runner(make_model(LlamaModel, config, torch.bfloat16).eval(), "triton", products=products)


def make_batch(lengths: list[int]) -> PackedBatch:
    return PackedBatch.from_sequences([[7] * length for length in lengths], device="cuda")


def launched_pass(fake: FakeCuda, model: str, lengths: list[int], products: str = "bfloat16") -> Section:
    """A pass of which each kernel is launched."""
    runner = make_runner(configuration(model), products)
    with torch.inference_mode():
        runner._run(make_batch(lengths), runner.windows)  # tables that are made once
        batch = make_batch(lengths)
        with fake.section() as section:
            runner._run(batch, runner.windows)
    return section


def captured_pass(fake: FakeCuda, model: str, lengths: list[int], products: str = "bfloat16") -> Section:
    """A replay for another batch than the captured one; the hazards are those of the capture too."""
    runner = make_runner(configuration(model), products)
    with fake.section() as capture:
        runner(make_batch(lengths))
    with fake.section() as section:
        runner(make_batch(lengths[:-1]))
    section.hazards += [hazard for hazard in capture.hazards if hazard.kind == "in a capture"]
    section.launches += capture.launches
    return section


def encoding(fake: FakeCuda, dtype: str = "bfloat16", **arguments) -> Section:
    """Texts to vectors on the host, in several slabs."""
    with mock.patch.object(encoder_module, "check_mask", return_value={}):  # it looks at values
        encoder = Encoder.from_pretrained(device="cuda", dtype=dtype)
    texts = [" ".join(_WORDS[: 1 + place % len(_WORDS)]) for place in range(2100)]
    encoder.encode(texts, **arguments)  # which captures
    with fake.section() as section:
        encoder.encode(texts, **arguments)
    return section


def training_steps(
    fake: FakeCuda,
    stage: str,
    *,
    base: str = "llama-1B",
    num_layers: int = 2,
    num_steps: int = 2,
    lengths: Sequence[int] = (),
    **changes,
) -> Section:
    """Steps from the middle of a run, each as far as the host reads the figures of the one before.

    Args:
        base: a name in `CONFIGURATIONS`.
        lengths: words of the texts, in turn.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, texts, pairs = Path(folder, "model"), Path(folder, "texts.txt"), Path(folder, "pairs.csv")
        _model_folder(model, base, num_layers)
        lines = [" ".join(_words(place, length)) for place, length in zip(range(256), cycle(lengths or range(2, 40)))]
        texts.write_text("\n".join(lines) + "\n")
        rows = [f"{line},{line} too,not {line}\n" for line in lines]
        pairs.write_text("anchor,positive,negative\n" + "".join(rows))
        given: dict[str, Any] = {"model": str(model), "data": [str(pairs if stage == "supervised" else texts)]}
        given |= {"block_size": 64} if stage in ("pretrain", "mntp") else {}
        given |= {"output": str(Path(folder, "run")), "device": "cuda", "dtype": "bfloat16", "logging_steps": 1}
        settings = STAGES[stage](
            **given | {"batch_size": 32, "token_budget": 8192, "max_steps": num_steps + 2} | changes
        )
        with _middle_of_a_run(fake) as section:
            loop.train(settings)
    return section


def _words(place: int, length: int) -> list[str]:
    return [str(place), *(_WORDS[(place + word) % len(_WORDS)] for word in range(length - 1))]


def _model_folder(folder: Path, base: str, num_layers: int) -> None:
    """What training reads of a checkpoint, but for the weights."""
    folder.mkdir()
    copy_tokenizer(DEFAULT_MODEL, folder)
    values = _SMALL | CONFIGURATIONS[base] | {"num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").touch()


@contextmanager
def _middle_of_a_run(fake: FakeCuda) -> Iterator[Section]:
    """`loop.train` with weights that have no values; the section is of all steps but the first and the last."""
    launch, stack, steps = loop._Run._launch_step, ExitStack(), count(1)
    section = Section()

    def launch_step(run, batch):
        step = next(steps)
        if step == 2:
            stack.enter_context(fake.section(section))
        if step == run.settings.max_steps:
            stack.close()
        launch(run, batch)

    def load_model(kind, folder, dtype, config):
        return make_model(kind, config, dtype)

    with ExitStack() as patches, warnings.catch_warnings():
        for owner, name, value in (
            (loop._Run, "_launch_step", launch_step),
            (loop._Run, "_save", lambda *_: None),
            (loop, "ahead", iter),  # so that each step's copies are made in its turn
            (loop, "fingerprint", lambda *_, **__: {}),
            (trainee.Trainee, "save", lambda *_: None),
            (trainee, "load_model", load_model),
        ):
            patches.enter_context(mock.patch.object(owner, name, value))
        patches.callback(AcceleratorState._reset_state, True)  # it is the process's, and says cuda
        yield section


def _paths() -> Iterator[tuple[str, Callable[[FakeCuda], Section]]]:
    for model in CONFIGURATIONS:
        for name, lengths in LENGTHS.items():
            if name == "mixed" or model == "llama-1B":
                yield f"launched pass, {model}, {name}", partial(launched_pass, model=model, lengths=lengths)
    for model in ("llama-1B", "qwen2-7B", "qwen3-0.6B"):
        yield f"float8 pass, {model}", partial(launched_pass, model=model, lengths=LENGTHS["mixed"], products="float8")
    yield "captured pass", partial(captured_pass, model="llama-1B", lengths=LENGTHS["mixed"])
    yield "captured float8 pass", partial(captured_pass, model="llama-1B", lengths=LENGTHS["mixed"], products="float8")
    yield "encoding", encoding
    yield "encoding in float8", partial(encoding, dtype="float8")
    yield "encoding, int8", partial(encoding, precision="int8", normalize_embeddings=True, truncate_dim=64)
    for name, stage, changes in (
        ("pretrain", "pretrain", {}),
        ("mntp", "mntp", {}),
        ("mntp, annealed mask", "mntp", {"mask_schedule": "annealed", "mask_schedule_steps": 100}),
        ("mntp, trained head", "mntp", {"base": "llama-8B", "train_head": True, "keep_generation": 1.0}),
        ("simcse", "simcse", {}),
        ("simcse, two slabs", "simcse", {"token_budget": 1536}),
        ("simcse, checkpointing", "simcse", {"gradient_checkpointing": True}),
        ("supervised", "supervised", {}),
        ("supervised, all terms", "supervised", {"symmetric": True, "dims": [1024, 2048], "instruction": "Find: "}),
    ):
        yield f"training, {name}", partial(training_steps, stage=stage, **changes)


PATHS = dict(_paths())


def exists(path: str, capability: tuple[int, int]) -> bool:
    """Whether a device of that capability can go the way."""
    return "float8" not in path or capability >= (8, 9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", nargs="+", default=list(PATHS), choices=list(PATHS), metavar="PATH")
    arguments = parser.parse_args()
    logging.getLogger("bivec").setLevel(logging.ERROR)
    found = {}
    for name in arguments.path:
        with FakeCuda() as fake:
            section = PATHS[name](fake)
        counts = asdict(section.counts) | {"launches": section.counts.launches}
        hazards = Counter(section.hazards)
        print(f"{name}: " + ", ".join(f"{value:,} {part}" for part, value in counts.items() if value), flush=True)
        for (kind, operator, place), times in hazards.items():
            print(f"    {kind}: {operator} at {place}, {times} times", flush=True)
        found[name] = counts | {"hazards": [[*hazard, times] for hazard, times in hazards.items()]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
