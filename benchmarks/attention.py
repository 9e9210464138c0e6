"""Attention over packed sequences against everybody: forward, backward, both; long, short, mixed, windowed, dropped.

    python -m bivec.benchmarks.attention --output attention.json
    python -m bivec.benchmarks.attention --cases long short --dtype bfloat16
    TRITON_INTERPRET=1 python -m bivec.benchmarks.attention --quick --device cpu

TFLOP/s count visible scores alone, GB/s every input and output once, both also as shares of what the device reaches in
a matrix product and a copy in the same run. Errors are against float64 on the first key/value head of the first
sequences, as shares of the largest value, beside those of an eager version in the same dtype; who is further off than
truth.py allows has no speed. Dropout draws other masks for everybody and is timed unchecked. FlexAttention is compiled
anew for each of its cases, which takes long, so that it has fewer; if it would run unfused it fails. The most telling
cases come first.
"""

import contextlib
import functools
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from .attention_peers import FLEX, Attention, Peer, Prepared, peers
from .cases import Case, Results
from .machine import describe_machine
from .texts import synthetic_mix
from .timing import argument_parser, compiles_only, error_text, measure, num_rounds, ratio
from .truth import QUERIES_AT_ONCE, attention_in_pieces, largest_error, wrong

DIRECTIONS = ("forward", "backward", "both")
HEADS = {"D64 GQA 4": (32, 8, 64), "D128 GQA 4": (32, 8, 128), "D64 MHA": (16, 16, 64)}  # Llama 1B, 8B; an encoder's
# float64 scores of one head, and sequences, that the error is measured on
TRUTH_SCORES, TRUTH_SEQUENCES = 16384**2, 64
CHARACTERS_PER_TOKEN = 4
FIRST = (
    "D128 GQA 4, uniform 4096",
    "D64 GQA 4, uniform 4096",
    "D128 GQA 4, real mix",
    "D64 GQA 4, real mix",
    "D64 GQA 4, uniform 64",
    "D128 GQA 4, uniform 512",
    "D128 GQA 4, uniform 4096, causal",
    "D64 GQA 4, uniform 512",
    "D128 GQA 4, uniform 16384",
    "D128 GQA 4, uniform 64",
    "D128 GQA 4, uniform 4096, window 128",
    "D64 GQA 4, uniform 16",
    "D64 GQA 4, uniform 256",
)
WITH_FLEX = (*FIRST[:4], "D128 GQA 4, uniform 4096, causal", "D128 GQA 4, uniform 4096, window 128", "mix, causal")


def real_lengths(num_tokens: int) -> tuple[int, ...]:
    """Lengths of 16 to 512 as texts to embed have them, a token for four characters, until `num_tokens` are full."""
    lengths: list[int] = []
    for text in synthetic_mix(num_tokens // 16):
        length = min(512, max(16, len(text) // CHARACTERS_PER_TOKEN))
        if sum(lengths) + length > num_tokens:
            break
        lengths.append(length)
    return tuple(lengths)


def choose_cases(kinds: list[str], dtype: torch.dtype, quick: bool) -> list[Attention]:
    if quick:
        small = (2, 1, 16, torch.float32)
        return [
            Attention("uniform 24", (24,) * 2, *small),
            Attention("mix", (1, 20, 33), *small),
            Attention("mix, causal", (1, 20, 33), *small, window_size=(-1, 0)),
            Attention("mix, dropout 0.1", (5, 20), *small, dropout_p=0.1),
        ]
    cases = []
    for name, (num_heads, num_kv_heads, head_dim) in HEADS.items():
        shape = (num_heads, num_kv_heads, head_dim, dtype)

        def add(
            kind: str, label: str, lengths: tuple[int, ...], shape: tuple = shape, name: str = name, **settings
        ) -> None:
            if kind in kinds:
                cases.append(Attention(f"{name}, {label}", lengths, *shape, **settings))

        for length in (512, 1024, 2048, 4096, 8192, 16384):
            add("long", f"uniform {length}", (length,) * (16384 // length))
        for length in (16, 32, 64, 128, 256):
            add("short", f"uniform {length}", (length,) * (65536 // length))
        mix = real_lengths(65536)
        add("mix", "real mix", mix)
        add("windows", "uniform 4096, causal", (4096,) * 4, window_size=(-1, 0))
        add("windows", "uniform 4096, window 128", (4096,) * 4, window_size=(128, 128))
        add("dropout", "real mix, dropout 0.1", mix, dropout_p=0.1)
    return sorted(cases, key=lambda case: FIRST.index(case.name) if case.name in FIRST else len(FIRST))


def directions(prepared: Prepared) -> dict[str, Callable[[], object]]:
    """What is timed of a peer. The backward keeps its graph, so that it alone is repeated."""
    *leaves, upstream = prepared.inputs
    q, k, v = (tensor.detach().requires_grad_() for tensor in leaves)
    plain = [tensor.detach() for tensor in leaves]
    saved: list[Tensor] = []

    def forward() -> object:
        with torch.no_grad():
            return prepared.attend(*plain)

    def backward() -> object:
        if not saved:
            saved.append(prepared.attend(q, k, v))
        return torch.autograd.grad(saved[0], (q, k, v), upstream, retain_graph=True)

    def both() -> object:
        return torch.autograd.grad(prepared.attend(q, k, v), (q, k, v), upstream)

    return {"forward": forward, "backward": backward, "both": both}


class Truth:
    """Float64 results of a case's first sequences and first key/value head, computed once for all peers."""

    def __init__(self, case: Attention, inputs: list[Tensor]):
        lengths: list[int] = []
        for length in case.lengths[:TRUTH_SEQUENCES]:
            if lengths and sum(seen**2 for seen in [*lengths, length]) > TRUTH_SCORES:
                break
            lengths.append(length)
        group = case.num_heads // case.num_kv_heads
        self.rows, self.heads, self.dtype = sum(lengths), (group, group, 1, 1), case.dtype
        slices = [tensor[: self.rows, :heads] for tensor, heads in zip(inputs, (group, 1, 1, group), strict=True)]
        self.exact = attention_in_pieces(slices, lengths, case.window_size, torch.float64)
        self.eager = self._errors(attention_in_pieces(slices, lengths, case.window_size, case.dtype))

    def _errors(self, results: list[Tensor]) -> tuple[float, float | None]:
        gradients = largest_error(results[1:], self.exact[1 : len(results)]) if results[1:] else None
        return largest_error(results[:1], self.exact[:1]), gradients

    def judge(self, results: list[Tensor]) -> tuple[dict[str, float | None], str | None]:
        """The errors of packed results, the output's and the gradients', and why they have no speed, or None."""
        found = [result[: self.rows, :heads] for result, heads in zip(results, self.heads, strict=False)]
        errors = self._errors(found)
        reasons = [wrong(ours, self.dtype, eager) for ours, eager in zip(errors, self.eager, strict=True)]
        facts = dict(zip(("error", "gradient_error"), errors, strict=True))
        facts |= dict(zip(("eager_error", "eager_gradient_error"), self.eager, strict=True))
        return facts, next((reason for reason in reasons if reason), None)


def computed(prepared: Prepared) -> list[Tensor]:
    """A peer's packed output and, where it has a backward, its gradients."""
    *leaves, upstream = prepared.inputs
    with torch.no_grad():
        outputs = [prepared.attend(*leaves)]
    with contextlib.suppress(NotImplementedError):  # Flex on a CPU
        leaves = [tensor.detach().requires_grad_() for tensor in leaves]
        outputs += torch.autograd.grad(prepared.attend(*leaves), leaves, upstream)
    return [prepared.unpack(tensor) for tensor in outputs]


def run_case(
    case: Attention,
    peers: dict[str, Peer],
    device: torch.device,
    rounds: int,
    ceilings: tuple[float, float],
    quick: bool,
) -> list[dict]:
    inputs = case.inputs(device)
    truth = None if case.dropout_p else Truth(case, inputs)
    ready: dict[str, dict[str, Callable] | str] = {}
    accuracy: dict[str, dict] = {}
    for name, peer in peers.items():
        try:
            prepared = peer(case, inputs)
            if isinstance(prepared, str):
                ready[name] = prepared
                continue
            refusal = None
            if truth is not None:
                accuracy[name], refusal = truth.judge(computed(prepared))
            ready[name] = refusal or directions(prepared)
        except Exception as error:  # a peer that cannot do this case stands in the result with its reason
            ready[name] = error_text(error)
    rows = []
    p10, p50, p90 = np.percentile(case.lengths, [10, 50, 90]).tolist()
    facts = {"case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "tokens": case.num_tokens}
    facts |= {"head_dim": case.head_dim, "sequences": len(case.lengths), "p10": p10, "p50": p50, "p90": p90}
    for direction in DIRECTIONS:
        variants = {name: ways if isinstance(ways, str) else ways[direction] for name, ways in ready.items()}
        timings = measure(
            variants, rounds=rounds, device=device, flush_cache=device.type == "cuda", pause=0.0 if quick else 0.002
        )
        for name, timing in timings.items():
            row = facts | {"direction": direction} | timing.row() | accuracy.get(name, {})
            if not timing.skipped:
                tflops = case.flops(direction) / timing.median / 1e12
                gigabytes = case.least_bytes(direction) / timing.median / 1e9
                row |= {"tflops": tflops, "gb_per_s": gigabytes}
                row |= {"of_matmul": tflops / ceilings[0], "of_copy": gigabytes / ceilings[1]}
                if name != "bivec":
                    row["bivec_speedup"] = ratio(timing, timings["bivec"])
            rows.append(row)
    return rows


def case_bytes(case: Attention) -> float:
    """An estimate: everybody's inputs and gradients, padded ones longer, and the truth's scores."""
    padding = len(case.lengths) * max(case.lengths) / case.num_tokens
    group = case.num_heads // case.num_kv_heads
    scores = 8 * 8.0 * group * min(QUERIES_AT_ONCE, max(case.lengths)) * max(case.lengths)
    return case.least_bytes("both") * (4 + 6 * padding) + scores


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    kinds = ("long", "short", "mix", "windows", "dropout")
    parser.add_argument("--cases", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    dtype = "float32" if arguments.quick else arguments.dtype
    machine = describe_machine(device, dtypes=(dtype,))
    ceilings = (machine["matmul_tflops"][dtype], machine["copy_gb_per_s"])
    everybody = peers(device)
    quickly = {name: peer for name, peer in everybody.items() if name != FLEX}
    if compiles_only(arguments):
        quickly = {"bivec": everybody["bivec"]}
    rounds = num_rounds(arguments, 15)
    cases: list[Case] = []
    slow: list[Case] = []
    for case in choose_cases(arguments.cases, getattr(torch, dtype), arguments.quick):
        run = functools.partial(run_case, case, device=device, rounds=rounds, ceilings=ceilings, quick=arguments.quick)
        num_bytes = case_bytes(case)
        cases.append(Case(case.name, functools.partial(run, peers=quickly), num_bytes))
        if case.name in WITH_FLEX:
            pair = {name: everybody[name] for name in ("bivec", FLEX)}
            slow.append(Case(f"{case.name}, {FLEX}", functools.partial(run, peers=pair), num_bytes))
    place = len(FIRST)
    return Results("attention", arguments, machine).run([*cases[:place], *slow, *cases[place:]])


if __name__ == "__main__":
    sys.exit(main())
