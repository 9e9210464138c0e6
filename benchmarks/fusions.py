"""Norm, rotary, SwiGLU and the head's cross-entropy, forward and backward: ours, eager PyTorch, torch.compile.

    python -m bivec.benchmarks.fusions --output fusions.json
    python -m bivec.benchmarks.fusions --quick

`speedup` is the time of eager PyTorch over that of the variant, of the same round; eager is what `kernels/reference.py`
says, its norm in the form that transformers has. Weights are frozen, as under LoRA. Errors are against float64, the
largest of the outputs and gradients as a share of the largest value.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels import reference
from ..kernels.cross_entropy import linear_cross_entropy
from ..kernels.norm import add_rms_norm, rms_norm
from ..kernels.rotary import apply_rotary
from ..kernels.swiglu import swiglu
from .lora import largest_error
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .timing import argument_parser, measure, ratio, report

EAGER = "eager"
EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """A model's sizes."""

    name: str
    num_tokens: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int


CASES = (
    Case("tiny", 1024, 64, 172, 8, 4, 8, 512),
    Case("135M", 1024, 576, 1536, 9, 3, 64, 49152),
    Case("135M, 4096 tokens", 4096, 576, 1536, 9, 3, 64, 49152),
)
QUICK = (Case("quick", 64, 32, 80, 4, 2, 8, 100),)


@dataclass(frozen=True)
class Operation:
    """Our function and the eager one, of inputs that have a gradient."""

    ours: Callable
    eager: Callable
    inputs: list[Tensor]


def eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, eager_rms_norm(total, weight, eps)


def operations(case: Case, dtype: torch.dtype, device: torch.device) -> dict[str, Operation]:
    generator = torch.Generator().manual_seed(1)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    tokens, size = case.num_tokens, case.hidden_size
    weight, head = randn(size), randn(case.vocab_size, size) * size**-0.5
    angles = torch.randn(tokens, case.head_dim // 2, generator=generator).to(device)
    cos, sin = angles.cos(), angles.sin()
    rows = torch.randperm(tokens, generator=generator)[: tokens // 5].to(device)  # MNTP masks a fifth
    targets = torch.randint(case.vocab_size, rows.shape, generator=generator).to(device)

    def with_tables(function: Callable) -> Callable:
        return lambda query, key: function(query, key, *(t.to(_wide(query.dtype)) for t in (cos, sin)))

    def with_weight(function: Callable) -> Callable:
        return lambda *x: function(*x, weight.to(x[0].dtype), EPS)

    def with_head(function: Callable) -> Callable:
        return lambda hidden: function(hidden, head.to(hidden.dtype), targets, rows=rows)

    heads = [randn(tokens, count, case.head_dim) for count in (case.num_heads, case.num_key_value_heads)]
    gates = [randn(tokens, case.intermediate_size) for _ in range(2)]
    sums = [randn(tokens, size) for _ in range(2)]
    return {
        "norm": Operation(with_weight(rms_norm), with_weight(eager_rms_norm), sums[:1]),
        "residual and norm": Operation(with_weight(add_rms_norm), with_weight(eager_add_rms_norm), sums),
        "rotary": Operation(with_tables(apply_rotary), with_tables(reference.apply_rotary), heads),
        "SwiGLU": Operation(swiglu, reference.swiglu, gates),
        "head and cross-entropy": Operation(
            with_head(linear_cross_entropy), with_head(reference.linear_cross_entropy), sums[:1]
        ),
    }


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes half a minute")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    rounds = arguments.rounds or (3 if arguments.quick else 15)
    rows: list[dict] = []
    busy: list[float] = []
    for dtype in arguments.dtypes:
        for case in QUICK if arguments.quick else CASES:
            others = BusyElsewhere()
            for name, operation in operations(case, getattr(torch, dtype), device).items():
                labels = {"operation": name, "case": case.name, "dtype": dtype, "num_tokens": case.num_tokens}
                rows += [labels | row for row in run(operation, device, rounds, not arguments.no_compile)]
            busy.append(others.cores())
    report("fusions", rows, machine=describe_machine(device), cores_busy_elsewhere=max(busy), output=arguments.output)
    warn_if_disturbed(max(busy))
    return 0


def run(operation: Operation, device: torch.device, rounds: int, compiles: bool) -> list[dict]:
    inputs = [tensor.clone().requires_grad_() for tensor in operation.inputs]
    with torch.no_grad():
        outputs = as_tuple(operation.eager(*inputs))
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator).to(device, x.dtype) for x in outputs]
    functions = {EAGER: operation.eager, "bivec": operation.ours}
    if compiles:
        torch.compiler.reset()
        functions["torch.compile"] = torch.compile(operation.eager, dynamic=False)
    variants = {name: forward_and_backward(function, inputs, upstream) for name, function in functions.items()}
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = forward_and_backward(operation.eager, exact_inputs, [grad.double() for grad in upstream])()
    timings = measure(variants, rounds=rounds, warmup=3, reverse=True, device=device)
    rows = []
    for name, timing in timings.items():
        row = timing.row() | {"speedup": ratio(timings[EAGER], timing)}
        if timing.skipped is None:
            row["error"] = largest_error(variants[name](), truth)
        rows.append(row)
    return rows


def forward_and_backward(function: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> Callable:
    def variant() -> list[Tensor]:
        outputs = as_tuple(function(*inputs))
        return [*outputs, *torch.autograd.grad(outputs, inputs, upstream)]

    return variant


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


if __name__ == "__main__":
    sys.exit(main())
