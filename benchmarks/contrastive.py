"""The contrastive loss against everybody, forward and backward: time, peak memory, error; with and without negatives.

    python -m bivec.benchmarks.contrastive --output contrastive.json
    python -m bivec.benchmarks.contrastive --cases 65536:0
    python -m bivec.benchmarks.contrastive --quick --device cpu

TFLOP/s count the three products that forward and backward need (6 N M E), also as a share of what the device reaches in
a matrix product in the same run. Errors are against float64, the largest of the loss and of each gradient as a share
of the largest value, beside those of eager PyTorch in the same dtype; they stop where float64 would not fit. The peak
is what a step takes beyond the embeddings, with their gradients.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels import reference
from .contrastive_peers import PEERS, TEMPERATURE, Contrastive
from .machine import describe_machine
from .timing import argument_parser, error_text, measure, ratio, report

# queries, and hard negatives of each
CASES = {
    "cpu": [(512, 0), (512, 1), (4096, 0), (4096, 1), (16384, 0)],
    "cuda": [(size, negatives) for size in (512, 4096, 16384, 65536) for negatives in (0, 1)],
}
QUICK = [(96, 0), (130, 1)]
TRUTH_SCORES = 2**25  # of the float64 matrix of the truth
ROUND_FLOPS = {"cpu": 6e11, "cuda": 1e15}  # as many rounds as make this up, within bounds


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


def exact_results(queries: Tensor, keys: Tensor) -> list[Tensor]:
    """Loss and gradients in float64."""
    queries, keys = (rows.detach().double().requires_grad_() for rows in (queries, keys))
    loss = reference.contrastive_loss(queries, keys, temperature=TEMPERATURE)
    return [loss.detach(), *torch.autograd.grad(loss, (queries, keys))]


def largest_error(results: list[Tensor], truth: list[Tensor]) -> float:
    shares = [(got - exact).abs().max() / exact.abs().max() for got, exact in zip(results, truth, strict=True)]
    return max(share.item() for share in shares)


def run_case(case: Contrastive, device: torch.device, rounds: int | None, ceiling: float) -> list[dict]:
    queries, keys = case.inputs(device)
    truth = exact_results(queries, keys) if case.num_queries * case.num_keys <= TRUTH_SCORES else None
    variants: dict[str, Callable[[], list[Tensor]] | str] = {}
    errors: dict[str, float] = {}
    for name, peer in PEERS.items():
        try:
            loss = peer(case, queries, keys)
            variants[name] = loss if isinstance(loss, str) else step(queries, keys, loss)
            if truth is not None and not isinstance(loss, str):
                errors[name] = largest_error(step(queries, keys, loss)(), truth)
        except Exception as error:  # a peer that cannot do this case stands in the result with its reason
            variants[name] = error_text(error)
    queries.grad = keys.grad = None
    rounds = rounds or max(2, min(15, int(ROUND_FLOPS[device.type] / case.flops)))
    timings = measure(variants, rounds=rounds, warmup=1, reverse=True, device=device)
    facts: dict = {"num_queries": case.num_queries, "num_keys": case.num_keys, "size": case.size}
    facts |= {"dtype": str(case.dtype).removeprefix("torch.")}
    rows = []
    for name, timing in timings.items():
        row = facts | timing.row()
        if not timing.skipped:
            tflops = case.flops / timing.median / 1e12
            row |= {"tflops": tflops, "of_matmul": tflops / ceiling}
            row |= {"error": errors.get(name), "eager_error": errors.get("eager")}
            if name != "bivec":
                row["bivec_speedup"] = ratio(timing, timings["bivec"])
        rows.append(row)
    return rows


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
    cases = QUICK if arguments.quick else arguments.cases or CASES[device.type]
    machine = describe_machine(device, dtypes=(dtype,))
    rows: list[dict] = []
    for num_queries, negatives in cases:
        case = Contrastive(num_queries, negatives, getattr(torch, dtype), 64 if arguments.quick else 768)
        print(f"{case.num_queries} queries, {case.num_keys} keys", file=sys.stderr, flush=True)
        rounds = arguments.rounds or (2 if arguments.quick else None)
        rows += run_case(case, device, rounds, machine["matmul_tflops"][dtype])
        if device.type == "cuda":
            torch.cuda.empty_cache()
    report("contrastive", rows, machine=machine, output=arguments.output, temperature=TEMPERATURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
