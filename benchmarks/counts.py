"""Launches and bytes of what runs most often, counted on a fake GPU; the table is `results/counts.json`.

    python -m bivec.benchmarks.counts                     # count, and say what the table has
    python -m bivec.benchmarks.counts --write             # and renew its figures of now
    python -m bivec.benchmarks.counts --only contrastive  # those whose names hold a word

A layer is what three layers take more than two. `device_counts.py` has the rules. The table's figures `before` are of
commit 7acfdbb, before anything of this was counted; what is younger has none. Nothing is measured in seconds here.
"""

import argparse
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import triton

from ..engine.model import LlamaModel
from ..kernels.contrastive import contrastive_loss
from .cuda_paths import configuration, make_batch, make_runner, training_steps
from .device_counts import Section
from .fake_cuda import FakeCuda

TABLE = Path(__file__).with_name("results") / "counts.json"
LAYERS = 16  # of the 1B shape


Figures = dict[str, int]  # the fields of `Counts`, their `launches`, and `waits`, how often the host waits


def embedding(products: str = "bfloat16") -> dict[str, Figures]:
    """A pass of which every kernel is launched, its batch on the device."""

    def run(num_layers: int) -> Section:
        with FakeCuda() as fake, torch.inference_mode():
            runner = make_runner(configuration("llama-1B", num_hidden_layers=num_layers), products)
            batch = make_batch([128] * 64)
            runner._run(batch, runner.windows)
            with fake.section() as section:
                runner._run(batch, runner.windows)
        return section

    return {"a layer": _less(_figures(run(3)), _figures(run(2))), f"a pass of {LAYERS} layers": _figures(run(LAYERS))}


def captured() -> dict[str, Figures]:
    """What the host launches where the pass is captured: copies into its inputs, the graph, a copy of its output."""
    with FakeCuda() as fake:
        runner = make_runner(configuration("llama-1B"))
        batch = make_batch([128] * 64)
        runner(batch)
        with fake.section() as section:
            runner(batch)
    return {"a pass": _figures(section)}


def simcse() -> dict[str, Figures]:
    """128 texts twice in one slab, LoRA of rank 16 on every linear, dropout of inputs and of attention."""
    (forward_2, step_2), (forward_3, step_3) = _simcse_step(2), _simcse_step(3)
    forward, both = _less(forward_3, forward_2), _less(step_3, step_2)
    _, step = _simcse_step(LAYERS)
    return {
        "a layer, forward": forward,
        "a layer, backward and its part of the update": _less(both, forward),
        f"a step of {LAYERS} layers": step,
    }


def _simcse_step(num_layers: int) -> tuple[Figures, Figures]:
    """The model's forward pass, and all of the step."""
    passes, model_forward = [], LlamaModel.forward
    with FakeCuda() as fake:

        def watched_forward(*args, **kwargs):
            with fake.section() as section:
                passes.append(section)
                return model_forward(*args, **kwargs)

        with mock.patch.object(LlamaModel, "forward", watched_forward):
            section = training_steps(
                fake, "simcse", num_layers=num_layers, num_steps=1, lengths=[24], batch_size=128, token_budget=32768
            )
    return _figures(passes[1]), _figures(section)  # of the second of three steps


def contrastive(size: int, symmetric: bool, dtype: torch.dtype = torch.bfloat16) -> dict[str, Figures]:
    """Of `size` queries and as many keys of 768 elements."""
    with FakeCuda() as fake:
        queries, keys = (torch.empty(size, 768, dtype=dtype, device="cuda", requires_grad=True) for _ in range(2))
        with fake.section() as section:
            contrastive_loss(queries, keys, symmetric=symmetric).backward()
    return {"forward and backward": _figures(section)}


def _figures(section: Section) -> Figures:
    counts = section.counts
    return {"launches": counts.launches} | asdict(counts) | {"waits": len(section.hazards)}


def _less(more: Figures, fewer: Figures) -> Figures:
    return {name: number - fewer[name] for name, number in more.items()}


MEASURES: dict[str, Callable[[], dict[str, Figures]]] = {
    "embedding 8,192 tokens, 1B": embedding,
    "embedding 8,192 tokens, 1B, float8": partial(embedding, "float8"),
    "embedding 8,192 tokens, 1B, captured": captured,
    "SimCSE step with LoRA, 1B": simcse,
    "contrastive loss of 512, float32": partial(contrastive, 512, False, torch.float32),
}
for _size in (512, 8192, 65536):
    MEASURES[f"contrastive loss of {_size:,}"] = partial(contrastive, _size, False)
    MEASURES[f"contrastive loss of {_size:,}, symmetric"] = partial(contrastive, _size, True)


def count(names: Sequence[str]) -> dict[str, Figures]:
    """`"measure: part"` -> its counts, of the measures named."""
    figures = {}
    for name in names:
        for part, row in MEASURES[name]().items():
            figures[f"{name}: {part}"] = row
            print(f"{name}: {part}: " + "  ".join(f"{key} {value:,}" for key, value in row.items()), flush=True)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="words in measures' names")
    parser.add_argument("--write", nargs="?", const="now", choices=["before", "now"], help="renew these in the table")
    parser.add_argument("--table", type=Path, default=TABLE)
    arguments = parser.parse_args()
    logging.getLogger("bivec").setLevel(logging.ERROR)
    names = [name for name in MEASURES if any(word in name for word in arguments.only)]
    figures = count(names)
    if arguments.write:
        write(arguments.table, arguments.write, figures)
    print(json.dumps({"torch": torch.__version__, "triton": triton.__version__, "counts": figures}))


def write(path: Path, when: str, figures: dict[str, Figures]) -> None:
    """Put the figures into the table, a row to a line, and leave the others."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table |= {"torch": torch.__version__, "triton": triton.__version__}
    counts = table.setdefault("counts", {})
    for name, row in figures.items():
        counts.setdefault(name, {})[when] = row
    known = [name for name in counts if name.partition(": ")[0] in MEASURES]
    order = sorted(known, key=lambda name: list(MEASURES).index(name.partition(": ")[0]))
    table["counts"] = {name: dict(sorted(counts[name].items())) for name in order}
    text = json.dumps(table, indent=1)
    text = re.sub(r"\{([^{}]*)\}", lambda match: "{" + " ".join(match[1].split()) + "}", text)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
