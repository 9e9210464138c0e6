"""Which slab capacities give the same bits, by model shape, in each way to multiply that the engine may choose.

    python -m bivec.benchmarks.tiles --output tiles.json
    python -m bivec.benchmarks.tiles --quick --device cpu

A capacity whose products do not agree with the largest's is not used, and a small request then pays for the next one.
`tflops` is the rate of a layer's linears at each number of rows: what a capacity and a way to multiply cost.
"""

import functools
import sys
import tempfile
from dataclasses import replace
from unittest import mock

import torch
from torch.nn import functional as F

from ..engine.products import PRODUCTS
from ..engine.runner import TILES
from .cases import Case, Results
from .machine import describe_machine
from .shapes import SHAPES, write_checkpoint
from .texts import synthetic_mix
from .timing import argument_parser, measure, num_rounds


def run_case(shape_name: str, setting: str, device: torch.device, rounds: int) -> list[dict]:
    from bivec import Encoder

    shape = replace(SHAPES[shape_name], num_layers=1)
    products = PRODUCTS[device.type][setting]
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, folder, synthetic_mix(24), device=str(device))
        with mock.patch.dict(PRODUCTS, {device.type: {setting: products}}):
            encoder = Encoder.from_pretrained(folder, device=str(device))
    agreeing, dtype = encoder.runner.tiles, encoder.dtype
    del encoder
    weights = [torch.randn(size, device=device).to(dtype) * 0.02 for size in shape.linears]

    def layer(inputs: list[torch.Tensor]) -> None:
        for x, weight in zip(inputs, weights, strict=True):
            F.linear(x, weight)

    variants = {
        str(rows): functools.partial(
            layer, [torch.randn(rows, columns, device=device).to(dtype) for _, columns in shape.linears]
        )
        for rows in TILES[device.type]
    }
    with torch.inference_mode(), products():
        timings = measure(variants, rounds=rounds, device=device)
    facts = {"shape": shape_name, "setting": setting, "dtype": str(dtype).removeprefix("torch.")}
    return [
        facts
        | {"rows": int(name), "agrees": int(name) in agreeing}
        | timing.row()
        | {"tflops": None if timing.skipped else int(name) * shape.flops_per_token / timing.median / 1e12}
        for name, timing in timings.items()
    ]


def main(argv: list[str] | None = None) -> int:
    arguments = argument_parser(__doc__).parse_args(argv)
    device = torch.device(arguments.device)
    shapes = ("quick",) if arguments.quick else ("1B", "8B", "135M")
    run = functools.partial(run_case, device=device, rounds=num_rounds(arguments, 10))
    return Results("tiles", arguments, describe_machine(device, dtypes=("float32",))).run(
        [
            Case(f"{shape}, {setting}", functools.partial(run, shape, setting))
            for setting in PRODUCTS[device.type]
            for shape in shapes
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
