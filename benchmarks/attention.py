"""Attention over packed sequences against everybody: forward, backward, both; long, short, mixed, windowed, dropped.

    python -m bivec.benchmarks.attention --output attention.json
    python -m bivec.benchmarks.attention --cases long short --dtype bfloat16
    TRITON_INTERPRET=1 python -m bivec.benchmarks.attention --quick --device cpu

TFLOP/s count visible scores alone, GB/s every input and output once, both also as shares of what the device reaches in
a matrix product and a copy in the same run. Errors are against float64 on the first key/value head of the first
sequences, beside those of eager PyTorch in the same dtype. A CUDA-graph row leaves the launches' cost on the host out.
"""

import contextlib
import sys
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..kernels import reference
from .attention_peers import Attention, Peer, Prepared, peers
from .machine import describe_machine
from .texts import synthetic_mix
from .timing import argument_parser, cuda_graph, error_text, measure, ratio, report

DIRECTIONS = ("forward", "backward", "both")
HEADS = {"D64 GQA 4": (32, 8, 64), "D128 GQA 4": (32, 8, 128), "D64 MHA": (16, 16, 64)}  # Llama 1B, 8B; an encoder's
TRUTH_SCORES = 4096**2  # float64 scores of one head that the error is measured on
CHARACTERS_PER_TOKEN = 4


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
    return cases


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


def errors(case: Attention, inputs: list[Tensor], outputs: list[Tensor]) -> dict[str, float]:
    """Largest differences from float64, of the output and of the gradients, in the slice that the truth covers."""
    lengths: list[int] = []
    scores = 0
    for length in case.lengths:
        scores += length**2
        if lengths and scores > TRUTH_SCORES:
            break
        lengths.append(length)
    rows, group = sum(lengths), case.num_heads // case.num_kv_heads
    heads = (group, 1, 1, group)
    *leaves, upstream = (tensor[:rows, :count].double() for tensor, count in zip(inputs, heads, strict=True))
    q, k, v = (tensor.requires_grad_() for tensor in leaves)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(upstream.device, torch.int32)
    output = reference.varlen_attention(q, k, v, cu_seqlens, max(lengths), window_size=case.window_size)
    truth = [output.detach(), *torch.autograd.grad(output, (q, k, v), upstream)]
    largest = [
        (ours[:rows, : exact.shape[1]].double() - exact).abs().max().item()
        for ours, exact in zip(outputs, truth, strict=False)
    ]
    return {"error": largest[0]} | ({"gradient_error": max(largest[1:])} if largest[1:] else {})


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
    known: dict[str, Peer],
    device: torch.device,
    rounds: int,
    ceilings: tuple[float, float],
    quick: bool,
) -> list[dict]:
    inputs = case.inputs(device)
    ready: dict[str, dict[str, Callable[[], object]] | str] = {}
    accuracy: dict[str, dict[str, float]] = {}
    for name, peer in known.items():
        try:
            prepared = peer(case, inputs)
            if isinstance(prepared, str):
                ready[name] = prepared
                continue
            ready[name] = directions(prepared)
            if not case.dropout_p:
                accuracy[name] = errors(case, inputs, computed(prepared))
        except Exception as error:  # a peer that cannot do this case stands in the result with its reason
            ready[name] = error_text(error)
    rows = []
    p10, p50, p90 = np.percentile(case.lengths, [10, 50, 90]).tolist()
    facts = {"case": case.name, "dtype": str(case.dtype).removeprefix("torch."), "tokens": case.num_tokens}
    facts |= {"sequences": len(case.lengths), "p10": p10, "p50": p50, "p90": p90}
    for direction in DIRECTIONS:
        variants = {name: ways if isinstance(ways, str) else ways[direction] for name, ways in ready.items()}
        if device.type == "cuda" and not isinstance(ready["bivec"], str) and direction != "backward":
            try:
                variants["bivec, CUDA graph"] = cuda_graph(ready["bivec"][direction])
            except Exception as error:
                variants["bivec, CUDA graph"] = error_text(error)
        timings = measure(
            variants, rounds=rounds, device=device, flush_cache=device.type == "cuda", pause=0.0 if quick else 0.01
        )
        for name, timing in timings.items():
            row = facts | {"direction": direction} | timing.row()
            if not timing.skipped:
                tflops = case.flops(direction) / timing.median / 1e12
                gigabytes = case.least_bytes(direction) / timing.median / 1e9
                row |= {"tflops": tflops, "gb_per_s": gigabytes}
                row |= {"of_matmul": tflops / ceilings[0], "of_copy": gigabytes / ceilings[1]}
                row |= accuracy.get(name, {})
                row |= {f"eager_{key}": value for key, value in accuracy.get("eager, padded", {}).items()}
                if name != "bivec":
                    row["bivec_speedup"] = ratio(timing, timings["bivec"])
            rows.append(row)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    kinds = ("long", "short", "mix", "windows", "dropout")
    parser.add_argument("--cases", nargs="+", choices=kinds, default=list(kinds))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    dtype = "float32" if arguments.quick else arguments.dtype
    rounds = arguments.rounds or (2 if arguments.quick else 15)
    machine = describe_machine(device, dtypes=(dtype,))
    ceilings = (machine["matmul_tflops"][dtype], machine["copy_gb_per_s"])
    rows: list[dict] = []
    for case in choose_cases(arguments.cases, getattr(torch, dtype), arguments.quick):
        print(case.name, file=sys.stderr, flush=True)
        rows += run_case(case, peers(device), device, rounds, ceilings, arguments.quick)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report("attention", rows, machine=machine, output=arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
