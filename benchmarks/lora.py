"""LoRA linears against the frozen linear beneath them: forward and backward, ours and PEFT's, alone and in groups.

    python -m bivec.benchmarks.lora --output lora.json
    python -m bivec.benchmarks.lora --quick

`relative` is the time over that of the frozen linears (forward and the gradient of their input, which any adapter
needs) of the same round: the cost of training an adapter. On a GPU ours have what the model gives them: a stack of
their weights, adapters that are taken over once a step and not in each call, and room behind their input. Errors are
against float64, the largest of the output and of each gradient as a share of the largest value, beside those of PEFT's
layers; who is further off than truth.py allows has no speed. With dropout the masks differ, and the times are
unchecked.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from ..kernels.lora import LoraLinear, lora_linears, room_behind
from .cases import Case as Measured
from .cases import Results
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .timing import argument_parser, error_text, measure, num_rounds, ratio
from .truth import largest_error, wrong

if TYPE_CHECKING:
    from ..kernels.lora.stack import LoraStack

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

    @property
    def num_bytes(self) -> float:
        """An estimate: rows and weights in float64 and several times in the case's dtype."""
        sizes = (self.in_features, *self.out_features)
        return 80.0 * self.num_tokens * sum(sizes) + 40.0 * self.in_features * sum(self.out_features)


CASES = {
    "cpu": (
        Case("576 to 576", 576, (576,)),
        Case("q, k, v of 135M", 576, (576, 192, 192)),
        Case("gate, up of 135M", 576, (1536, 1536)),
        Case("2048 to 2048", 2048, (2048,)),
        Case("q, k, v of 1B", 2048, (2048, 512, 512)),
    ),
    # fewer tokens are launches more than work there
    "cuda": (
        Case("2048 to 2048", 2048, (2048,), 16384),
        Case("q, k, v of 1B", 2048, (2048, 512, 512), 16384),
        Case("gate, up of 1B", 2048, (8192, 8192), 16384),
        Case("down of 1B", 8192, (2048,), 16384),
        Case("q, k, v of 8B", 4096, (4096, 1024, 1024), 16384),
    ),
}
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
        self.room = room_behind(case.in_features, [case.rank] * len(case.out_features)) if device.type == "cuda" else 0
        self.stack: LoraStack | None = None

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
        if self.room and self.stack is None:
            from ..kernels.lora.stack import LoraStack  # needs triton

            self.stack = LoraStack(linears)
        seed = SEED if dropout_p else None
        return lora_linears(x, linears, dropout_p=dropout_p, seed=seed, stack=self.stack, room=self.room)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), help="default: bfloat16 alone on CUDA")
    parser.add_argument("--dropout", type=float, default=0.05, help="of the rows named so (default: %(default)s)")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    rounds = num_rounds(arguments, 25, quick=3)
    busy = [0.0]

    def rows_of(case: Case, dtype: str) -> list[dict]:
        others = BusyElsewhere()
        rows = run_case(case, getattr(torch, dtype), device, arguments.dropout, rounds)
        busy.append(others.cores())
        return [row | {"cores_busy_elsewhere": busy[-1]} for row in rows]

    cases = [
        Measured(f"{case.name}, {dtype}", functools.partial(rows_of, case, dtype), case.num_bytes)
        for case in (QUICK if arguments.quick else CASES[device.type])
        for dtype in arguments.dtypes or (["bfloat16"] if device.type == "cuda" else ["float32", "bfloat16"])
    ]
    status = Results("lora", arguments, describe_machine(device)).run(cases)
    warn_if_disturbed(max(busy))
    return status


def run_case(case: Case, dtype: torch.dtype, device: torch.device, dropout_p: float, rounds: int) -> list[dict]:
    plain, dropped = (Layers(case, chance, device, dtype) for chance in (0.0, dropout_p))
    generator = torch.Generator(device).manual_seed(SEED)
    shapes = [(case.num_tokens, size) for size in (case.in_features, *case.out_features)]
    x, *upstream = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    with_room = x.new_empty((case.num_tokens, case.in_features + plain.room))[:, : case.in_features].copy_(x)
    x.requires_grad_()
    with_room.requires_grad_()

    def variant(
        function: Callable[[Tensor], Sequence[Tensor]], x: Tensor, adapters: list[Tensor]
    ) -> Callable[[], list[Tensor]]:
        def run() -> list[Tensor]:
            outputs = function(x)
            return [*outputs, *torch.autograd.grad(outputs, [x, *adapters], upstream)]

        return run

    runs = {
        FROZEN: variant(plain.frozen, x, []),
        "bivec": variant(plain.fused, with_room, plain.adapters),
        "PEFT": variant(plain.peft, x, plain.adapters),
        f"bivec, dropout {dropout_p}": variant(dropped.fused, with_room, dropped.adapters),
        f"PEFT, dropout {dropout_p}": variant(dropped.peft, x, dropped.adapters),
    }
    truth = exact_results(case, x, upstream, plain)
    variants: dict[str, Callable[[], list[Tensor]] | str] = dict(runs)
    errors: dict[str, float] = {}
    for name in ("PEFT", "bivec"):
        try:
            errors[name] = largest_error(runs[name](), truth)
            variants[name] = wrong(errors[name], dtype, errors.get("PEFT")) or runs[name]
        except Exception as error:
            variants[name] = error_text(error)
    del truth
    timings = measure(variants, rounds=rounds, warmup=2, reverse=True, device=device)
    rows = []
    for name, timing in timings.items():
        row = {"case": case.name, "dtype": str(dtype).removeprefix("torch."), "num_tokens": case.num_tokens}
        row |= {"rank": case.rank} | timing.row() | {"relative": ratio(timing, timings[FROZEN])}
        row["error"] = errors.get(name)
        rows.append(row)
    return rows


def exact_results(case: Case, x: Tensor, upstream: list[Tensor], layers: Layers) -> list[Tensor]:
    """What the variants without dropout return, in float64."""
    exact = Layers(case, 0.0, x.device, torch.float64)
    exact.load_state_dict(layers.state_dict())
    x = x.detach().double().requires_grad_()
    outputs = exact.peft(x)
    return [*outputs, *torch.autograd.grad(outputs, [x, *exact.adapters], [grad.double() for grad in upstream])]


if __name__ == "__main__":
    sys.exit(main())
