"""A LoRA training step, SimCSE and supervised, against transformers + PEFT: tokens/s, and memory beyond the weights.

    python -m bivec.benchmarks.train --output train.json
    python -m bivec.benchmarks.train --shape 1B --num-texts 128 --device cuda
    python -m bivec.benchmarks.train --quick --device cpu

A step is forward, loss, backward and AdamW over the same texts in the same dtype. The peer runs in two ways: `padded`,
each column of the batch (queries, positives, negatives) in random order and padded to its longest text, as
sentence-transformers and LLM2Vec do; and `grouped`, all texts of the step sorted by length in small padded batches
whose size is the fastest of those tried. Its adapters are in the base's dtype, which is faster for it than PEFT's
default. Tokens are those of the texts; padding counts for nothing. `first_loss` is the untrained adapter's: without
attention dropout it is the same number for all, and where ours is not it has no speed. On CUDA a step has as many of
the texts as an estimate says that memory holds.
"""

import functools
import gc
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from ..training.mask_schedule import MaskSchedule
from ..training.optimizer import Optimizer
from ..training.passes import Passes
from ..training.preparation import prepare
from ..training.processes import Processes
from ..training.settings import SimcseSettings, SupervisedSettings, TrainingSettings
from ..training.stages import make_stage, read_data
from ..training.trainee import load_trainee
from .cases import SHARE_OF_MEMORY, Case, Results, free_bytes
from .embed import choose_texts
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .shapes import SHAPES, Shape, write_checkpoint
from .texts import DATA, token_counts
from .timing import argument_parser, error_text, measure, num_rounds, ratio

GROUPS = (8, 16, 32)  # rows of the peer's batches of similar length
ATTENTION_DROPOUT = {"simcse": 0.3, "supervised": 0.0}
LORA_DROPOUT = 0.05
OURS, PADDED, GROUPED = "bivec", "transformers + PEFT, padded", "transformers + PEFT, grouped"
PEER_BYTES = 2.0  # of ours for the same tokens, about: norms and rotations keep float32
LOSS_TOLERANCE = 0.02


def make_settings(stage: str, folder: str, texts: Sequence[str], **changes) -> TrainingSettings:
    """Settings whose one batch is all of the texts: pairs of a text and itself, or rows of three texts."""
    path = Path(folder, f"{stage}.jsonl")
    rows: list[dict] = [{"text": text} for text in texts]
    if stage == "supervised":
        columns = [texts[place::3][: len(texts) // 3] for place in range(3)]
        rows = [{"query": q, "positive": p, "negatives": [n]} for q, p, n in zip(*columns, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kind = SimcseSettings if stage == "simcse" else SupervisedSettings
    return kind(
        model=folder,
        data=[str(path)],
        output=str(Path(folder, "run")),
        batch_size=len(rows),
        attention_dropout=ATTENTION_DROPOUT[stage],
        lora_dropout=LORA_DROPOUT,
        warmup_steps=0,
        **changes,
    )


class BivecStep:
    """A step of bivec's own training loop, without its log and checkpoints."""

    def __init__(self, settings: TrainingSettings, device: torch.device, token_budget: int):
        prepared = prepare(settings, device)
        settings = prepared.settings
        trainee = load_trainee(prepared)
        self.passes = Passes(
            trainee,
            token_budget=token_budget,
            attention_dropout=settings.attention_dropout,
            checkpoint_activations=False,
            seed=settings.seed,
        )
        processes = Processes(Accelerator(cpu=device.type == "cpu"))
        self.objective = make_stage(settings, read_data(settings, trainee.tokenizer), self.passes, processes).objective
        self.optimizer = Optimizer(trainee.parameters, settings)
        self.mask = MaskSchedule("bidirectional", 1, trainee.tokenizer.max_length, trainee.config)(0)
        self.first_loss: float | None = None

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        losses = self.objective.train(self.objective.prepare(0), self.mask)
        self.optimizer.step()
        if self.first_loss is None:
            self.first_loss = losses["loss"].item()


class PeerStep:
    """The same step in transformers and PEFT.

    Args:
        columns: token ids of the texts of each column, the queries first.
        group: rows of a batch of similar length; None for a batch a column, in random order.
    """

    def __init__(self, settings: SimcseSettings | SupervisedSettings, columns, dtype, device, group: int | None):
        import transformers

        model = transformers.AutoModel.from_pretrained(settings.model, dtype=dtype, attn_implementation="sdpa")
        model.config.attention_dropout = settings.attention_dropout
        for layer in model.layers:
            layer.self_attn.attention_dropout = settings.attention_dropout
        config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=settings.target_modules,
        )
        self.model = get_peft_model(model, config, autocast_adapter_dtype=False).to(device).train()
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
        self.parameters = parameters
        self.temperature = settings.temperature
        self.device = device
        self.num_queries = len(columns[0])
        sequences = [ids for column in columns for ids in column]
        order = list(range(len(sequences)))
        if group is None:
            sizes = [len(column) for column in columns]
            starts = [sum(sizes[:place]) for place in range(len(sizes))]
            self.batches = [order[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        else:
            order.sort(key=lambda place: len(sequences[place]))
            self.batches = [order[start : start + group] for start in range(0, len(order), group)]
        self.padded = [self._pad([sequences[place] for place in batch]) for batch in self.batches]
        self.first_loss: float | None = None

    def _pad(self, sequences: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        longest = max(map(len, sequences))
        ids = torch.tensor([[*sequence, *[0] * (longest - len(sequence))] for sequence in sequences])
        mask = torch.tensor([[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences])
        return ids.to(self.device), mask.to(self.device)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        parts = []
        for ids, mask in self.padded:
            states = self.model(input_ids=ids, attention_mask=mask, is_causal=False).last_hidden_state
            weights = mask[..., None].to(states.dtype)
            parts.append(((states * weights).sum(1) / weights.sum(1)).float())
        places = torch.tensor([place for batch in self.batches for place in batch], device=self.device)
        joined = torch.cat(parts)
        vectors = F.normalize(torch.empty_like(joined).index_copy(0, places, joined), dim=-1)
        scores = vectors[: self.num_queries] @ vectors[self.num_queries :].T / self.temperature
        loss = F.cross_entropy(scores, torch.arange(self.num_queries, device=self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        if self.first_loss is None:
            self.first_loss = loss.item()


def run_stage(
    stage: str, shape: Shape, folder: str, texts: list[str], dtype: str, device: torch.device, rounds: int
) -> list[dict]:
    from transformers import AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    settings = make_settings(stage, folder, texts, dtype=dtype, device=str(device), max_length=512)
    assert isinstance(settings, SimcseSettings | SupervisedSettings)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(settings.data[0]).read_text(encoding="utf-8").splitlines()]
    if stage == "simcse":
        column_texts = [[row["text"] for row in rows]] * 2
    else:
        column_texts = [[row["query"] for row in rows], [row["positive"] for row in rows]]
        column_texts.append([negative for row in rows for negative in row["negatives"]])
    columns = [tokenizer(column, truncation=True, max_length=512)["input_ids"] for column in column_texts]
    num_tokens = sum(len(ids) for column in columns for ids in column)
    torch_dtype = getattr(torch, dtype)
    steps: dict[str, BivecStep | PeerStep] = {}
    variants: dict[str, Callable[[], object] | str] = {}
    seconds: dict[str, float] = {}

    def enter(name: str, padded_tokens: int, make: Callable[[], BivecStep | PeerStep]) -> None:
        """One step, which compiles and says how long it takes; who does not fit says so."""
        needed = step_bytes(shape, padded_tokens, torch_dtype) * (1 if name == OURS else PEER_BYTES)
        if device.type == "cuda" and needed > SHARE_OF_MEMORY * free_bytes(device):
            variants[name] = f"needs about {needed / 2**30:.0f} GiB, {free_bytes(device) / 2**30:.0f} GiB are free"
            return
        try:
            step = make()
            seconds[name] = _once(step)
            steps[name] = variants[name] = step
            return
        except Exception as error:  # out of memory, most likely: a row with its reason
            variants[name] = error_text(error)
        gc.collect()  # what the error held is free by now
        if device.type == "cuda":
            torch.cuda.empty_cache()

    enter(OURS, num_tokens, lambda: BivecStep(settings, device, max(num_tokens, 512)))
    padded = sum(len(column) * max(map(len, column)) for column in columns)
    enter(PADDED, padded, lambda: PeerStep(settings, columns, torch_dtype, device, None))
    # one of each in memory at a time would be fairer to the cache, but no faster: the best is chosen by one step
    groups = {f"{GROUPED} {group}": group for group in GROUPS}
    for name, group in groups.items():
        enter(name, num_tokens, functools.partial(PeerStep, settings, columns, torch_dtype, device, group))
    best = min((name for name in groups if name in steps), key=seconds.__getitem__, default=None)
    reasons = [variants.pop(name) for name in groups if name != best]
    if best is None:
        variants[GROUPED] = reasons[0]
    for name in groups:
        if name != best:
            steps.pop(name, None)
    untrained = {name: step.first_loss for name, step in steps.items()}
    if ATTENTION_DROPOUT[stage] == 0 and OURS in steps:
        variants[OURS] = disagreement(untrained) or variants[OURS]
    timings = measure(variants, rounds=rounds, warmup=1, reverse=True, device=device, clock=time.perf_counter)
    results = []
    for name, timing in timings.items():
        row = {"stage": stage, "dtype": dtype} | timing.row() | {"name": GROUPED if name == best else name}
        row |= {"tokens_per_s": num_tokens / timing.median, "first_loss": untrained.get(name)}
        row["group"] = groups.get(name)
        if name != OURS:
            row["bivec_speedup"] = ratio(timing, timings[OURS])
        results.append(row)
    return results


def disagreement(first_losses: dict[str, float | None]) -> str | None:
    """Why our step has no speed: its first loss is not that of any peer that ran; None where it is, or none ran."""
    ours = first_losses[OURS]
    peers = [loss for name, loss in first_losses.items() if name != OURS and loss is not None]
    if ours is None or not math.isfinite(ours):
        return f"wrong: the first loss is {ours}"
    if not peers or any(abs(ours - loss) <= LOSS_TOLERANCE * abs(loss) for loss in peers):
        return None
    return f"wrong: the first loss is {ours:.5g}, the peers' {', '.join(f'{loss:.5g}' for loss in peers)}"


def step_bytes(shape: Shape, num_tokens: int, dtype: torch.dtype) -> float:
    """An estimate: what a layer keeps for its backward, some eight rows of hidden size and four of the wide one."""
    kept = shape.num_layers * (8 * shape.hidden_size + 4 * shape.intermediate_size)
    weights = shape.num_layers * sum(rows * columns for rows, columns in shape.linears)
    return dtype.itemsize * (num_tokens * kept + 2.0 * weights)


def texts_that_fit(lengths: Sequence[int], shape: Shape, dtype: torch.dtype, free: float) -> int:
    """How many of the first texts make a step that half of the memory holds, each passing twice as SimCSE has it."""
    for count in range(len(lengths), 3, -1):
        if step_bytes(shape, 2 * sum(lengths[:count]), dtype) <= free / 2:
            return count
    return min(3, len(lengths))


def _once(step: Callable[[], None]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json[.gz] or its folder; else one is trained here")
    parser.add_argument("--data", type=Path, default=DATA, help="holds wiki/*.gz and tatoeba/*.gz")
    parser.add_argument("--synthetic", action="store_true", help="made-up texts, which need no data")
    parser.add_argument("--num-texts", type=int, help="texts of a step: pairs of SimCSE, three to a supervised row")
    parser.add_argument("--stages", nargs="+", choices=list(ATTENTION_DROPOUT), default=list(ATTENTION_DROPOUT))
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    shape_name = "quick" if arguments.quick else arguments.shape
    shape = SHAPES[shape_name]
    num_texts = arguments.num_texts or (12 if arguments.quick else 48 if device.type == "cpu" else 128)
    rounds = num_rounds(arguments, 3 if device.type == "cpu" else 10)
    mix, texts = choose_texts(None, arguments.data, arguments.synthetic, 2 * num_texts)
    texts = list(dict.fromkeys(texts))[:num_texts]
    random.Random(0).shuffle(texts)
    others = BusyElsewhere()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, folder, texts, tokenizer=arguments.tokenizer, device=str(device))
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(folder)
        counts = token_counts(texts, tokenizer, 512)[0].tolist()
        if device.type == "cuda":
            fitting = texts_that_fit(counts, shape, getattr(torch, arguments.dtype), free_bytes(device))
            if fitting < len(texts):
                print(f"{fitting} texts a step: {len(texts)} would not fit into memory", file=sys.stderr)
                texts = texts[:fitting]
        results = Results(
            "train",
            arguments,
            describe_machine(device),
            shape=shape_name,
            mix=mix,
            tokenizer=str(arguments.tokenizer or "trained on the texts"),
            tokens=token_counts(texts, tokenizer, 512)[1],
            texts_asked_for=num_texts,
        )
        run = functools.partial(
            run_stage, shape=shape, folder=folder, texts=texts, dtype=arguments.dtype, device=device, rounds=rounds
        )
        status = results.run([Case(stage, functools.partial(run, stage)) for stage in arguments.stages])
    disturbance = others.cores()
    warn_if_disturbed(disturbance)
    return status


if __name__ == "__main__":
    sys.exit(main())
