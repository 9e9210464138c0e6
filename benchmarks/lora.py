"""LoRA linears against the frozen linear beneath them: forward and backward, ours and PEFT's, alone and in groups.

    python -m bivec.benchmarks.lora --output lora.json
    python -m bivec.benchmarks.lora --quick

`relative` is the time over that of the frozen linears (forward and the gradient of their input, which any adapter
needs) of the same round: the cost of training an adapter. Errors are against float64, the largest of the output and of
each gradient as a share of the largest value, beside those of PEFT's layers.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ..kernels.lora import LoraLinear, lora_linears
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .timing import argument_parser, measure, ratio, report

FROZEN = "frozen"
SEED = 1


@dataclass(frozen=True)
class Case:
    """Linears that share one input."""

    name: str
    in_features: int
    out_features: tuple[int, ...]
    num_tokens: int = 2048
    rank: int = 16


CASES = (
    Case("576 to 576", 576, (576,)),
    Case("q, k, v of 135M", 576, (576, 192, 192)),
    Case("gate, up of 135M", 576, (1536, 1536)),
    Case("2048 to 2048", 2048, (2048,)),
    Case("q, k, v of 1B", 2048, (2048, 512, 512)),
)
QUICK = (Case("quick", 64, (64,), 128, 4), Case("quick, three", 64, (64, 32, 32), 128, 4))


class Layers(nn.Module):
    """A case's linears with PEFT's adapters, B not zero."""

    def __init__(self, case: Case, dropout_p: float, device: torch.device, dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(SEED)
        for place, size in enumerate(case.out_features):
            self.add_module(f"linear_{place}", nn.Linear(case.in_features, size, bias=False))
        config = LoraConfig(
            r=case.rank,
            lora_alpha=2 * case.rank,
            lora_dropout=dropout_p,
            target_modules=r"linear_\d+",
            init_lora_weights=False,
        )
        inject_adapter_in_model(config, self)
        self.to(device, dtype)

    @property
    def layers(self) -> list:
        return list(self.children())

    @property
    def adapters(self) -> list[Tensor]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def frozen(self, x: Tensor) -> list[Tensor]:
        return [layer.base_layer(x) for layer in self.layers]

    def peft(self, x: Tensor) -> list[Tensor]:
        return [layer(x) for layer in self.layers]

    def fused(self, x: Tensor) -> Sequence[Tensor]:
        linears = [
            LoraLinear(
                layer.base_layer.weight,
                None,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.scaling["default"],
            )
            for layer in self.layers
        ]
        dropout_p = getattr(self.layers[0].lora_dropout["default"], "p", 0.0)
        return lora_linears(x, linears, dropout_p=dropout_p, seed=SEED if dropout_p else None)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--dropout", type=float, default=0.05, help="of the rows named so (default: %(default)s)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    rounds = arguments.rounds or (3 if arguments.quick else 25)
    rows: list[dict] = []
    busy: list[float] = []
    for dtype in arguments.dtypes:
        for case in QUICK if arguments.quick else CASES:
            others = BusyElsewhere()
            measured = run_case(case, getattr(torch, dtype), device, arguments.dropout, rounds)
            busy.append(others.cores())
            rows += [row | {"cores_busy_elsewhere": busy[-1]} for row in measured]
    report(
        "lora",
        rows,
        machine=describe_machine(device),
        output=arguments.output,
    )
    warn_if_disturbed(max(busy))
    return 0


def run_case(case: Case, dtype: torch.dtype, device: torch.device, dropout_p: float, rounds: int) -> list[dict]:
    plain, dropped = (Layers(case, chance, device, dtype) for chance in (0.0, dropout_p))
    generator = torch.Generator().manual_seed(SEED)
    shapes = [(case.num_tokens, size) for size in (case.in_features, *case.out_features)]
    x, *upstream = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    x.requires_grad_()

    def variant(function: Callable[[Tensor], Sequence[Tensor]], adapters: list[Tensor]) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            outputs = function(x)
            return [*outputs, *torch.autograd.grad(outputs, [x, *adapters], upstream)]

        return run

    variants = {
        FROZEN: variant(plain.frozen, []),
        "bivec": variant(plain.fused, plain.adapters),
        "PEFT": variant(plain.peft, plain.adapters),
        f"bivec, dropout {dropout_p}": variant(dropped.fused, dropped.adapters),
        f"PEFT, dropout {dropout_p}": variant(dropped.peft, dropped.adapters),
    }
    truth = exact_results(case, x, upstream, plain)
    timings = measure(variants, rounds=rounds, warmup=2, reverse=True, device=device)
    rows = []
    for name, timing in timings.items():
        row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "num_tokens": case.num_tokens}
        row |= {"rank": case.rank} | timing.row() | {"relative": ratio(timing, timings[FROZEN])}
        if name in ("bivec", "PEFT"):
            row["error"] = largest_error(variants[name](), truth)
        rows.append(row)
    return rows


def exact_results(case: Case, x: Tensor, upstream: list[Tensor], layers: Layers) -> list[Tensor]:
    """What the variants without dropout return, in float64."""
    exact = Layers(case, 0.0, x.device, torch.float64)
    exact.load_state_dict(layers.state_dict())
    x = x.detach().double().requires_grad_()
    outputs = exact.peft(x)
    return [*outputs, *torch.autograd.grad(outputs, [x, *exact.adapters], [grad.double() for grad in upstream])]


def largest_error(results: list[Tensor], truth: list[Tensor]) -> float:
    shares = [(got - exact).abs().max() / exact.abs().max() for got, exact in zip(results, truth, strict=True)]
    return max(share.item() for share in shares)


if __name__ == "__main__":
    sys.exit(main())
