"""Final norm, mean over each text and L2 norm against everybody: forward, and forward with backward.

    python -m bivec.benchmarks.pooling --output pooling.json
    python -m bivec.benchmarks.pooling --quick --device cpu

GB/s count the hidden states once forward, and backward their gradient once (with RMSNorm the hidden states once more),
also as a share of what the device reaches in a copy in the same run. A padded peer is given padded hidden states,
whose making is not timed, and its bytes are those of the real tokens. Errors are against float64 on the first texts,
the largest of the vectors and of the gradient as a share of the largest value, beside the padded mean's in the same
dtype; who is further off than truth.py allows has no speed.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import reference
from ..kernels.pooling import pool
from .attention import real_lengths
from .cases import Case, Results
from .machine import describe_machine
from .timing import argument_parser, error_text, measure, num_rounds, ratio
from .truth import largest_error, wrong

NORM_EPS = 1e-5
TRUTH_SEQUENCES = 16  # that the error is measured on
PADDED = "sentence-transformers, padded"


@dataclass(frozen=True)
class Pooling:
    """One case: texts of these lengths, `T` tokens in all, hidden states of `size` (E)."""

    name: str
    lengths: tuple[int, ...]
    size: int
    dtype: torch.dtype
    norm: bool

    def least_bytes(self, direction: str) -> float:
        """The hidden states, their gradient and the vectors, each moved no more often than it must be."""
        hidden = sum(self.lengths) * self.size * self.dtype.itemsize
        vectors = len(self.lengths) * self.size * 4
        if direction == "forward":
            return hidden + vectors
        return hidden * (3 if self.norm else 2) + 2 * vectors

    def inputs(self, device: torch.device) -> list[Tensor]:
        """Hidden states, the norm's weight, the upstream gradient of the vectors."""
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(sum(self.lengths), self.size), (self.size,), (len(self.lengths), self.size)]
        dtypes = (self.dtype, self.dtype, torch.float32)
        return [
            torch.randn(shape, generator=generator, device=device).to(dtype)
            for shape, dtype in zip(shapes, dtypes, strict=True)
        ]

    @property
    def label(self) -> str:
        return f"{self.name}, {self.size}, {self.dtype}, {'with' if self.norm else 'no'} norm"

    @property
    def num_bytes(self) -> float:
        """An estimate, the padded peer's float32 copies included."""
        padded = len(self.lengths) * max(self.lengths) * self.size
        return 8.0 * self.dtype.itemsize * sum(self.lengths) * self.size + 16.0 * padded


@dataclass
class Prepared:
    """A peer's own hidden states, the function of them to vectors (S, E), and the way back to packed rows."""

    hidden: Tensor
    pool: Callable[[Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor] = lambda packed: packed


Peer = Callable[[Pooling, Tensor, Tensor], Prepared | str]


def _bounds(case: Pooling, device: torch.device) -> Tensor:
    return torch.tensor([0, *case.lengths]).cumsum(0).to(device, torch.int32)


def bivec(case: Pooling, hidden: Tensor, weight: Tensor) -> Prepared:
    cu_seqlens = _bounds(case, hidden.device)
    norm_weight = weight if case.norm else None
    return Prepared(hidden, lambda hidden: pool(hidden, cu_seqlens, norm_weight=norm_weight, norm_eps=NORM_EPS))


def _rms_norm(hidden: Tensor, weight: Tensor) -> Tensor:
    """As transformers' Llama does it."""
    rows = hidden.float()
    rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + NORM_EPS)
    return weight * rows.to(hidden.dtype)


def padded(case: Pooling, hidden: Tensor, weight: Tensor) -> Prepared | str:
    try:
        from sentence_transformers.sentence_transformer.modules import Pooling as Module
    except ImportError:
        return "package sentence-transformers (6) is not installed"
    module, lengths = Module(case.size), torch.tensor(case.lengths, device=hidden.device)
    rows = torch.nn.utils.rnn.pad_sequence(hidden.split(case.lengths), batch_first=True)
    mask = (torch.arange(rows.shape[1], device=hidden.device) < lengths[:, None]).long()

    def pool(hidden: Tensor) -> Tensor:
        hidden = _rms_norm(hidden, weight) if case.norm else hidden
        pooled = module({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]
        return F.normalize(pooled.float(), dim=1)

    return Prepared(rows, pool, lambda gradient: gradient[mask.bool()])


def _mean_by_index_add(hidden: Tensor, weight: Tensor | None, sequence: Tensor, counts: Tensor) -> Tensor:
    rows = (hidden if weight is None else _rms_norm(hidden, weight)).float()
    sums = rows.new_zeros((counts.shape[0], rows.shape[1])).index_add(0, sequence, rows)
    return F.normalize(sums / counts[:, None], dim=1)


# compiled once for all lengths and sizes, as a model's would be
_compiled_mean = torch.compile(_mean_by_index_add, dynamic=True)


def index_add(case: Pooling, hidden: Tensor, weight: Tensor, mean: Callable[..., Tensor]) -> Prepared:
    counts = _bounds(case, hidden.device).long().diff()
    sequence, norm_weight = torch.repeat_interleave(counts), weight if case.norm else None
    return Prepared(hidden, lambda hidden: mean(hidden, norm_weight, sequence, counts))


def segment_reduce(case: Pooling, hidden: Tensor, weight: Tensor) -> Prepared:
    cu_seqlens = _bounds(case, hidden.device).long()

    def pool(hidden: Tensor) -> Tensor:
        rows = (_rms_norm(hidden, weight) if case.norm else hidden).float()
        return F.normalize(torch.segment_reduce(rows, "mean", offsets=cu_seqlens, axis=0), dim=1)

    return Prepared(hidden, pool)


PEERS: dict[str, Peer] = {
    "bivec": bivec,
    PADDED: padded,
    "eager, packed, index_add": partial(index_add, mean=_mean_by_index_add),
    "eager, packed, segment_reduce": segment_reduce,
    "packed, index_add, torch.compile": partial(index_add, mean=_compiled_mean),
}
COMPILED = ("bivec", "packed, index_add, torch.compile")


def choose_cases(device: torch.device, quick: bool) -> list[Pooling]:
    if quick:
        return [Pooling("quick", (3, 70, 1), 24, torch.float32, norm) for norm in (False, True)]
    on_gpu = device.type == "cuda"
    num_tokens = 2**18 if on_gpu else 2**13
    small, large = (2048, 4096) if on_gpu else (576, 2048)
    mix, short = ("real mix", real_lengths(num_tokens)), ("uniform 16", (16,) * (num_tokens // 16))
    cases = []
    for dtype in (torch.bfloat16,) if on_gpu else (torch.float32, torch.bfloat16):
        for texts, size, norm in ((mix, small, False), (mix, small, True), (short, small, True), (mix, large, True)):
            cases.append(Pooling(*texts, size, dtype, norm))
    return cases


def directions(prepared: Prepared, upstream: Tensor) -> dict[str, Callable[[], Tensor]]:
    hidden = prepared.hidden.detach().requires_grad_()

    @torch.no_grad()
    def forward() -> Tensor:
        return prepared.pool(prepared.hidden)

    def both() -> Tensor:
        return torch.autograd.grad(prepared.pool(hidden), hidden, upstream)[0]

    return {"forward": forward, "both": both}


def exact_results(case: Pooling, hidden: Tensor, weight: Tensor, upstream: Tensor) -> list[Tensor]:
    """Vectors and gradient in float64, of the first texts: a text is a matter of its own."""
    lengths = case.lengths[:TRUTH_SEQUENCES]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(hidden.device, torch.int32)
    hidden = hidden[: sum(lengths)].double().requires_grad_()
    norm_weight = weight.double() if case.norm else None
    vectors = reference.pool(hidden, cu_seqlens, norm_weight=norm_weight, norm_eps=NORM_EPS)
    return [vectors.detach(), *torch.autograd.grad(vectors, hidden, upstream[: len(lengths)].double())]


def run_case(case: Pooling, device: torch.device, rounds: int, copy_rate: float) -> list[dict]:
    hidden, weight, upstream = case.inputs(device)
    truth = exact_results(case, hidden, weight, upstream)
    ready: dict[str, dict[str, Callable[[], Tensor]] | str] = {}
    errors: dict[str, float] = {}
    for name, peer in PEERS.items():
        if rounds == 0 and name not in COMPILED:
            continue
        try:
            prepared = peer(case, hidden, weight)
            if isinstance(prepared, str):
                ready[name] = prepared
                continue
            ways = directions(prepared, upstream)
            results = (ways["forward"](), prepared.unpack(ways["both"]()))
            first = [result[: len(exact)] for result, exact in zip(results, truth, strict=True)]
            errors[name] = largest_error(first, truth)
            ready[name] = wrong(errors[name], case.dtype, errors.get(PADDED)) or ways
        except Exception as error:  # a peer that cannot do this case stands in the result with its reason
            ready[name] = error_text(error)
    p10, p50, p90 = np.percentile(case.lengths, [10, 50, 90]).tolist()
    facts = {"case": case.name, "size": case.size, "dtype": str(case.dtype).removeprefix("torch."), "norm": case.norm}
    facts |= {"tokens": sum(case.lengths), "sequences": len(case.lengths), "p10": p10, "p50": p50, "p90": p90}
    rows = []
    for direction in ("forward", "both"):
        variants = {name: ways if isinstance(ways, str) else ways[direction] for name, ways in ready.items()}
        timings = measure(variants, rounds=rounds, reverse=True, device=device, flush_cache=device.type == "cuda")
        for name, timing in timings.items():
            row = facts | {"direction": direction} | timing.row()
            row |= {"error": errors.get(name), "padded_error": errors.get(PADDED)}
            if not timing.skipped:
                gigabytes = case.least_bytes(direction) / timing.median / 1e9
                row |= {"gb_per_s": gigabytes, "of_copy": gigabytes / copy_rate}
                if name != "bivec":
                    row["bivec_speedup"] = ratio(timing, timings["bivec"])
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    arguments = argument_parser(__doc__).parse_args(argv)
    device = torch.device(arguments.device)
    machine = describe_machine(device)
    run = functools.partial(
        run_case, device=device, rounds=num_rounds(arguments, 15), copy_rate=machine["copy_gb_per_s"]
    )
    cases = choose_cases(device, arguments.quick)
    return Results("pooling", arguments, machine).run(
        [Case(case.label, functools.partial(run, case), case.num_bytes) for case in cases]
    )


if __name__ == "__main__":
    sys.exit(main())
