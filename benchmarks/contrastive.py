"""The contrastive loss against everybody, forward and backward: time, peak memory, error; with and without negatives.

    python -m bivec.benchmarks.contrastive --output contrastive.json
    python -m bivec.benchmarks.contrastive --cases 65536:0
    python -m bivec.benchmarks.contrastive --quick --device cpu

TFLOP/s count the three products that forward and backward need (6 N M E), also as a share of what the device reaches in
a matrix product in the same run. Errors are against float64, the largest of the loss and of each gradient as a share
of the largest value, beside those of eager PyTorch in the same dtype; who is further off than truth.py allows has no
speed. On a CPU there is no truth where it would take minutes. The peak is what a step takes beyond the embeddings,
with their gradients. On CUDA `breakdowns` says which kernels a step of ours spends its time in, and small losses are
timed as captured graphs too, ours and eager PyTorch's.
"""

import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .breakdown import breakdown
from .cases import Case, Results
from .contrastive_peers import PEERS, TEMPERATURE, Contrastive
from .machine import describe_machine
from .timing import argument_parser, compiles_only, cuda_graph, error_text, measure, num_rounds, ratio
from .truth import contrastive_in_pieces, largest_error, wrong

# queries, and hard negatives of each
CASES = {
    "cpu": [(512, 0), (512, 1), (4096, 0), (4096, 1), (16384, 0)],
    "cuda": [(65536, 0), (512, 0), (4096, 0), (16384, 0), (512, 1), (4096, 1), (16384, 1), (65536, 1)],
}
QUICK = [(96, 0), (130, 1)]
TRUTH_SCORES = {"cpu": 2**25, "cuda": 2**34}  # of the truth, which is computed in pieces
GRAPHED = 4096  # queries, at most, whose step is launches more than work
ROUND_FLOPS = {"cpu": 6e11, "cuda": 3e14}  # as many rounds as make this up, within bounds
COMPILED = ("bivec", "eager, torch.compile")


def step(queries: Tensor, keys: Tensor, loss: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    """A training step's share: the loss and both gradients, none of them left from before."""

    def run() -> list[Tensor]:
        queries.grad = keys.grad = None
        value = loss()
        value.backward()
        assert queries.grad is not None
        assert keys.grad is not None
        return [value.detach(), queries.grad, keys.grad]

    return run


def run_case(
    case: Contrastive, device: torch.device, rounds: int | None, ceiling: float, results: Results | None = None
) -> list[dict]:
    queries, keys = case.inputs(device)
    truth = None
    if case.num_queries * case.num_keys <= TRUTH_SCORES[device.type]:
        truth = contrastive_in_pieces(queries, keys, TEMPERATURE)
    steps: dict[str, Callable[[], list[Tensor]] | str] = {}
    errors: dict[str, float] = {}
    for name, peer in PEERS.items():
        if rounds == 0 and name not in COMPILED:
            continue
        try:
            loss = peer(case, queries, keys)
            steps[name] = loss if isinstance(loss, str) else step(queries, keys, loss)
            if truth is not None and not isinstance(loss, str):
                errors[name] = largest_error(step(queries, keys, loss)(), truth)
        except Exception as error:  # a peer that cannot do this case stands in the result with its reason
            steps[name] = error_text(error)
    variants: dict[str, Callable[[], object] | str] = {}
    for name, run in steps.items():
        variants[name] = wrong(errors.get(name), case.dtype, errors.get("eager")) or run
        small = device.type == "cuda" and case.num_queries <= GRAPHED and name in ("bivec", "eager")
        if small and not isinstance(run, str) and variants[name] is run:
            variants[f"{name}, CUDA graph"] = graphed(run)
    queries.grad = keys.grad = None
    if rounds is None:
        rounds = max(2, min(15, int(ROUND_FLOPS[device.type] / case.flops)))
    timings = measure(variants, rounds=rounds, warmup=1, reverse=True, device=device)
    if results is not None and device.type == "cuda" and rounds and callable(variants["bivec"]):
        found = results.document.get("breakdowns", {}) | {case.name: breakdown(variants["bivec"], device)}
        results.add(breakdowns=found)
    facts: dict = {"num_queries": case.num_queries, "num_keys": case.num_keys, "size": case.size}
    facts |= {"dtype": str(case.dtype).removeprefix("torch.")}
    rows = []
    for name, timing in timings.items():
        row = facts | timing.row() | {"error": errors.get(name), "eager_error": errors.get("eager")}
        if not timing.skipped:
            tflops = case.flops / timing.median / 1e12
            row |= {"tflops": tflops, "of_matmul": tflops / ceiling}
            if name != "bivec":
                row["bivec_speedup"] = ratio(timing, timings["bivec"])
        rows.append(row)
    return rows


def graphed(run: Callable[[], list[Tensor]]) -> Callable[[], object] | str:
    try:
        return cuda_graph(run)
    except Exception as error:  # what cannot be captured stands in the result with its reason
        return error_text(error)


def queries_and_negatives(text: str) -> tuple[int, int]:
    num_queries, negatives = map(int, text.split(":"))
    return num_queries, negatives


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--cases", type=queries_and_negatives, nargs="+", help="queries:negatives of each query")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="default: float32 on a CPU")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" and not arguments.quick else "float32")
    chosen = QUICK if arguments.quick else arguments.cases or CASES[device.type]
    machine = describe_machine(device, dtypes=(dtype,))
    results = Results("contrastive", arguments, machine, temperature=TEMPERATURE)
    rounds = num_rounds(arguments, 0) if arguments.quick or compiles_only(arguments) else arguments.rounds
    run = functools.partial(
        run_case, device=device, rounds=rounds, ceiling=machine["matmul_tflops"][dtype], results=results
    )
    sizes = [
        Contrastive(number, negatives, getattr(torch, dtype), 64 if arguments.quick else 768)
        for number, negatives in chosen
    ]
    return results.run([Case(case.name, functools.partial(run, case), case.num_bytes(device)) for case in sizes])


if __name__ == "__main__":
    sys.exit(main())
