"""Norm, rotary, SwiGLU and the head's cross-entropy, forward and backward: ours, eager PyTorch, torch.compile.

    python -m bivec.benchmarks.fusions --output fusions.json
    python -m bivec.benchmarks.fusions --quick

`speedup` is the time of eager PyTorch over that of the variant, of the same round; eager is what `kernels/reference.py`
says, its norm in the form that transformers has. Weights are frozen, as under LoRA. Errors are against float64, the
largest of the outputs and gradients as a share of the largest value; who is further off than truth.py allows has no
speed. GB/s count every input, output and gradient once, also as a share of a copy in the same run; not of the head.
"""

import functools
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
from .cases import Case as Measured
from .cases import Results
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .timing import argument_parser, error_text, measure, num_rounds, ratio
from .truth import largest_error, wrong

EAGER = "eager"
OPERATIONS = ("norm", "residual and norm", "rotary", "SwiGLU", "head and cross-entropy")
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


CASES = {
    "cpu": (
        Case("tiny", 1024, 64, 172, 8, 4, 8, 512),
        Case("135M", 1024, 576, 1536, 9, 3, 64, 49152),
        Case("135M, 4096 tokens", 4096, 576, 1536, 9, 3, 64, 49152),
    ),
    # fewer tokens are launches more than work there
    "cuda": (
        Case("1B", 16384, 2048, 8192, 32, 8, 64, 128256),
        Case("135M", 16384, 576, 1536, 9, 3, 64, 49152),
        Case("8B", 16384, 4096, 14336, 32, 8, 128, 128256),
    ),
}
QUICK = (Case("quick", 64, 32, 80, 4, 2, 8, 100),)


@dataclass(frozen=True)
class Operation:
    """Our function and the eager one, of inputs that have a gradient."""

    ours: Callable
    eager: Callable
    inputs: list[Tensor]
    moves: bool = True  # whether its time is that of moving its inputs and outputs


def eager_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def eager_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return total, eager_rms_norm(total, weight, eps)


def make_operation(name: str, case: Case, dtype: torch.dtype, device: torch.device) -> Operation:
    generator = torch.Generator(device).manual_seed(1)

    def randn(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    tokens, size = case.num_tokens, case.hidden_size
    if name == "SwiGLU":
        return Operation(swiglu, reference.swiglu, [randn(tokens, case.intermediate_size) for _ in range(2)])
    if name == "rotary":
        angles = randn(tokens, case.head_dim // 2, dtype=torch.float32)
        tables = angles.cos(), angles.sin()

        def turned(function: Callable) -> Callable:
            return lambda query, key: function(query, key, *(table.to(_wide(query.dtype)) for table in tables))

        heads = [randn(tokens, count, case.head_dim) for count in (case.num_heads, case.num_key_value_heads)]
        return Operation(turned(apply_rotary), turned(reference.apply_rotary), heads)
    if name == "head and cross-entropy":
        head = randn(case.vocab_size, size) * size**-0.5
        rows = torch.randperm(tokens, generator=generator, device=device)[: tokens // 5]  # MNTP masks a fifth
        targets = torch.randint(case.vocab_size, rows.shape, generator=generator, device=device)

        def with_head(function: Callable) -> Callable:
            return lambda hidden: function(hidden, head.to(hidden.dtype), targets, rows=rows)

        ours, eager = with_head(linear_cross_entropy), with_head(reference.linear_cross_entropy)
        return Operation(ours, eager, [randn(tokens, size)], moves=False)
    weight = randn(size)

    def with_weight(function: Callable) -> Callable:
        return lambda *x: function(*x, weight.to(x[0].dtype), EPS)

    if name == "norm":
        return Operation(with_weight(rms_norm), with_weight(eager_rms_norm), [randn(tokens, size)])
    sums = [randn(tokens, size) for _ in range(2)]
    return Operation(with_weight(add_rms_norm), with_weight(eager_add_rms_norm), sums)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: bfloat16 alone on CUDA")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out: it takes half a minute")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    machine = describe_machine(device)
    busy = [0.0]

    def rows_of(case: Case, dtype: str, name: str) -> list[dict]:
        others = BusyElsewhere()
        operation = make_operation(name, case, getattr(torch, dtype), device)
        rounds = num_rounds(arguments, 15, quick=3)
        labels = {"operation": name, "case": case.name, "dtype": dtype, "num_tokens": case.num_tokens}
        rows = run(operation, device, rounds, not arguments.no_compile, machine["copy_gb_per_s"])
        busy.append(others.cores())
        return [labels | row | {"cores_busy_elsewhere": busy[-1]} for row in rows]

    cases = [
        Measured(
            f"{name}, {case.name}, {dtype}",
            functools.partial(rows_of, case, dtype, name),
            # the head's weight and logits in float64, forward and backward; else some ten times the widest rows
            50.0 * case.vocab_size * (case.hidden_size + case.num_tokens // 5)
            if name.startswith("head")
            else 160.0 * case.num_tokens * case.intermediate_size,
        )
        for case in (QUICK if arguments.quick else CASES[device.type])
        for dtype in arguments.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
        for name in OPERATIONS
    ]
    status = Results("fusions", arguments, machine).run(cases)
    warn_if_disturbed(max(busy))
    return status


def run(operation: Operation, device: torch.device, rounds: int, compiles: bool, copy_rate: float) -> list[dict]:
    inputs = [tensor.requires_grad_() for tensor in operation.inputs]
    with torch.no_grad():
        outputs = as_tuple(operation.eager(*inputs))
    generator = torch.Generator(device).manual_seed(2)
    upstream = [torch.randn(x.shape, generator=generator, device=device).to(x.dtype) for x in outputs]
    functions = {EAGER: operation.eager, "bivec": operation.ours}
    if compiles:
        torch.compiler.reset()
        functions["torch.compile"] = torch.compile(operation.eager, dynamic=False)
    exact_inputs = [tensor.detach().double().requires_grad_() for tensor in inputs]
    truth = forward_and_backward(operation.eager, exact_inputs, [grad.double() for grad in upstream])()
    variants: dict[str, Callable | str] = {}
    errors: dict[str, float] = {}
    for name, function in functions.items():
        variant = forward_and_backward(function, inputs, upstream)
        try:
            errors[name] = largest_error(variant(), truth)
            variants[name] = wrong(errors[name], inputs[0].dtype, errors.get(EAGER)) or variant
        except Exception as error:
            variants[name] = error_text(error)
    del truth, exact_inputs
    timings = measure(variants, rounds=rounds, warmup=3, reverse=True, device=device)
    moved = sum(x.numel() * x.element_size() for x in (*inputs, *inputs, *outputs, *outputs))
    rows = []
    for name, timing in timings.items():
        row = timing.row() | {"speedup": ratio(timings[EAGER], timing), "error": errors.get(name)}
        if operation.moves and not timing.skipped:
            row |= {"gb_per_s": moved / timing.median / 1e9}
            row |= {"of_copy": row["gb_per_s"] / copy_rate}
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
