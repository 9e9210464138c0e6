"""float8 beside bfloat16 on a GPU: products and their accuracy by tile, the kernels that quantise, encoding.

    python -m bivec.benchmarks.float8 --output float8.json

A layer's products are those of a model's linears at each number of rows that the engine may use; `fast` is torch's fast
accumulation, which the engine does without. Errors are against float64 products of the same float8 rows and weights, as
a share of the largest value, the largest of four products; `agrees` says whether the rows have the bits of the largest
tile's. Kernels' GB/s count each input and output once. Cosines are those of float8's vectors to bfloat16's.
"""

import functools
import sys
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ..engine.float8 import Float8Linear
from ..engine.runner import TILES
from ..kernels.float8 import Float8Rows, quantize_rows, quantized_rms_norm, quantized_swiglu
from .cases import Case, Results
from .machine import describe_machine
from .shapes import SHAPES, Shape, write_checkpoint
from .texts import synthetic_mix
from .timing import argument_parser, measure, num_rounds, ratio
from .truth import largest_error

CUDA = torch.device("cuda")
WAYS = {"float8": False, "float8, fast": True}
BFLOAT16 = "bfloat16"


def products(shape_name: str, rounds: int) -> list[dict]:
    generator = torch.Generator(CUDA).manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, device=CUDA, dtype=torch.bfloat16)
    shape, tiles = SHAPES[shape_name], TILES["cuda"]
    weights = [randn(size) * 0.02 for size in shape.linears]
    linears = [Float8Linear("a linear", weight, None) for weight in weights]
    inputs = [randn(tiles[-1], columns) for _, columns in shape.linears]
    largest = {name: layer(linears, list(map(quantize_rows, inputs)), fast) for name, fast in WAYS.items()}
    rows = []
    for size in tiles:
        some = [x[:size].clone() for x in inputs]
        quantized = list(map(quantize_rows, some))
        variants: dict[str, Callable] = {BFLOAT16: functools.partial(in_bfloat16, weights, some)}
        variants |= {name: functools.partial(layer, linears, quantized, fast) for name, fast in WAYS.items()}
        timings = measure(variants, rounds=rounds, reverse=True, device=CUDA)
        truth = [
            dequantized(x)[:256] @ dequantized_weight(linear) for x, linear in zip(quantized, linears, strict=True)
        ]
        for name, timing in timings.items():
            row = {"case": "products", "shape": shape_name, "rows": size} | timing.row()
            row |= {"speedup": ratio(timings[BFLOAT16], timing)}
            if timing.seconds:
                row |= {"tflops": size * shape.flops_per_token / shape.num_layers / timing.median / 1e12}
            if name in WAYS:
                found = variants[name]()
                row |= {"error": largest_error([part[:256] for part in found], truth)}
                row |= {"agrees": all(map(torch.equal, found, (part[:size] for part in largest[name])))}
            rows.append(row)
    return rows


def in_bfloat16(weights: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return [x @ weight.t() for x, weight in zip(inputs, weights, strict=True)]


def layer(linears: list[Float8Linear], inputs: list[Float8Rows], fast: bool) -> list[Tensor]:
    return [
        torch._scaled_mm(
            values,
            linear.weight,
            scale_a=scales,
            scale_b=linear.scales,
            out_dtype=torch.bfloat16,
            use_fast_accum=fast,
        )
        for linear, (values, scales) in zip(linears, inputs, strict=True)
    ]


def dequantized(rows: Float8Rows) -> Tensor:
    values, scales = rows
    return values.double() * scales


def dequantized_weight(linear: Float8Linear) -> Tensor:
    return linear.weight.double() * linear.scales


def kernels(shape_name: str, rounds: int, copy_rate: float) -> list[dict]:
    shape, num_rows = SHAPES[shape_name], TILES["cuda"][-1]
    generator = torch.Generator(CUDA).manual_seed(0)
    randn = functools.partial(torch.randn, generator=generator, device=CUDA, dtype=torch.bfloat16)
    hidden, product = randn(num_rows, shape.hidden_size), randn(num_rows, shape.hidden_size) * 0
    gate, up = randn(num_rows, 2 * shape.intermediate_size).tensor_split(2, dim=1)
    weight = randn(shape.hidden_size)
    variants = {
        "rows": lambda: quantize_rows(hidden),
        "norm": lambda: quantized_rms_norm(hidden, weight, 1e-5),
        "sum and norm": lambda: quantized_rms_norm(hidden, weight, 1e-5, add=product),
        "SwiGLU": lambda: quantized_swiglu(gate, up),
    }
    # bytes an element of the result: what is read and written in bfloat16, and the result
    moved = {"rows": 3, "norm": 3, "sum and norm": 7, "SwiGLU": 5}
    found = []
    for name, timing in measure(variants, rounds=rounds, device=CUDA, flush_cache=True).items():
        size = shape.intermediate_size if name == "SwiGLU" else shape.hidden_size
        rate = moved[name] * num_rows * size / timing.median / 1e9
        found.append({"case": "kernels", "shape": shape_name} | timing.row() | {"gb_per_s": rate})
        found[-1] |= {"of_copy": rate / copy_rate}
    return found


def encoding(shape_name: str, num_texts: int, rounds: int) -> list[dict]:
    from bivec import Encoder

    texts = synthetic_mix(num_texts)
    shape: Shape = SHAPES[shape_name]
    encoders, held = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, folder, texts, device="cuda")
        for dtype in (BFLOAT16, "float8"):
            before = torch.cuda.memory_allocated()
            encoders[dtype] = Encoder.from_pretrained(folder, device="cuda", dtype=dtype)
            held[dtype] = torch.cuda.memory_allocated() - before
    encode = {name: functools.partial(one.encode, texts, show_progress_bar=False) for name, one in encoders.items()}
    vectors = {name: np.asarray(run(), dtype=np.float64) for name, run in encode.items()}
    norms = [np.linalg.norm(part, axis=1) for part in vectors.values()]
    cosines = (vectors[BFLOAT16] * vectors["float8"]).sum(1) / (norms[0] * norms[1])
    timings = measure(encode, rounds=rounds, reverse=True, device=CUDA)
    return [
        {"case": "encoding", "shape": shape_name, "texts": num_texts, "dtype": encoders[name].compute_dtype.name}
        | timing.row()
        | {
            "speedup": ratio(timings[BFLOAT16], timing),
            "held_bytes": held[name],
            "tiles": list(encoders[name].runner.tiles),
            "matrix_products": encoders[name].runner.products,
        }
        | ({"least_cosine": cosines.min(), "median_cosine": np.median(cosines)} if name == "float8" else {})
        for name, timing in timings.items()
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    arguments = parser.parse_args(argv)
    if not arguments.device.startswith("cuda"):
        parser.error("float8 needs a CUDA device")
    machine = describe_machine(torch.device(arguments.device))
    rounds = num_rounds(arguments, 9)
    cases = []
    for shape in ("quick",) if arguments.quick else ("1B", "8B", "135M"):
        cases += [
            Case(f"products, {shape}", functools.partial(products, shape, rounds)),
            Case(f"kernels, {shape}", functools.partial(kernels, shape, rounds, machine["copy_gb_per_s"])),
        ]
    for shape in ("quick",) if arguments.quick else ("1B", "135M"):
        run = functools.partial(encoding, shape, 64 if arguments.quick else 4096, min(rounds, 3))
        cases.append(Case(f"encoding, {shape}", run))
    return Results("float8", arguments, machine).run(cases)


if __name__ == "__main__":
    sys.exit(main())
