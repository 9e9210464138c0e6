"""Every operator once against float64, captured against launched, a small encoder and a training step: a minute.

    python -m bivec.benchmarks.smoke --output smoke.json
    TRITON_INTERPRET=1 python -m bivec.benchmarks.smoke --quick --device cpu

What a first run on a new device should show before anything is timed. Errors are of outputs and gradients, as shares of
the largest value; a row whose `skipped` says so is wrong, and the exit status is then 1. Two head dimensions, heads in
groups, lengths on and off the blocks.
"""

import functools
import sys
import tempfile
from collections.abc import Callable
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from ..engine.float8 import Float8Linear
from ..kernels import reference
from ..kernels.contrastive import contrastive_loss, pooled_contrastive_loss
from ..kernels.float8 import quantize_rows, quantized_rms_norm, quantized_swiglu
from ..kernels.pooling import pool
from . import fusions, lora
from .cases import Case, Results
from .machine import describe_machine
from .shapes import SHAPES, Shape, write_checkpoint
from .texts import synthetic_mix
from .timing import argument_parser, cuda_graph
from .truth import largest_error, wrong

LENGTHS, QUICK_LENGTHS = (1, 63, 64, 65, 300), (1, 20, 33)
# window, dropout_p, future_p
MASKS = {
    "full": ((-1, -1), 0.0, 1.0),
    "causal": ((-1, 0), 0.0, 1.0),
    "window": ((20, 3), 0.0, 1.0),
    "dropout": ((-1, -1), 0.1, 1.0),
    "annealed": ((-1, -1), 0.0, 0.5),
}
SMALL = Shape(512, 1024, 2, 8, 2, 64, 1e4, True)
LEAST_COSINE = {"auto": 0.99, "float8": 0.95}

Outcome = tuple[float | None, str | None]  # the error, and what is wrong


def outputs_and_gradients(function: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    found = fusions.as_tuple(function(*leaves))
    weights = [grad.to(output.dtype) for grad, output in zip(upstream, found, strict=True)]
    return [*(output.detach() for output in found), *torch.autograd.grad(found, leaves, weights)]


def compare(ours: Callable, exact: Callable, inputs: list[Tensor]) -> Outcome:
    """Our function and its specification in float64, and in the inputs' dtype for what rounding explains."""
    device, dtype = inputs[0].device, inputs[0].dtype
    generator = torch.Generator(device).manual_seed(1)
    with torch.no_grad():
        shapes = [output.shape for output in fusions.as_tuple(exact(*inputs))]
    upstream = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]
    truth = outputs_and_gradients(exact, [tensor.double() for tensor in inputs], [grad.double() for grad in upstream])
    eager = largest_error(outputs_and_gradients(exact, inputs, upstream), truth)
    error = largest_error(outputs_and_gradients(ours, inputs, upstream), truth)
    return error, wrong(error, dtype, eager)


def attention(mask: str, head_dim: int, dtype: torch.dtype, device: torch.device, lengths: tuple[int, ...]) -> Outcome:
    from ..kernels.attention import varlen_attention  # triton is there on Linux only

    window_size, dropout_p, future_p = MASKS[mask]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    seeds = torch.arange(len(lengths), device=device) + 7
    settings = {"window_size": window_size, "dropout_p": dropout_p, "future_p": future_p, "seeds": seeds}
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(sum(lengths), heads, head_dim) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes]

    def through(function: Callable) -> Callable:
        return lambda q, k, v: function(q, k, v, cu_seqlens, max(lengths), **settings)

    return compare(through(varlen_attention), through(reference.varlen_attention), inputs)


def pooling(mode: str, dtype: torch.dtype, device: torch.device) -> Outcome:
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(sum(LENGTHS), 96, generator=generator, device=device).to(dtype)
    weight = torch.rand(96, generator=generator, device=device).to(dtype) + 0.5

    def through(function: Callable) -> Callable:
        return lambda hidden: function(
            hidden, cu_seqlens, mode=mode, norm_weight=weight.to(hidden.dtype), output_dtype=_wide(hidden.dtype)
        )

    return compare(through(pool), through(reference.pool), [hidden])


def contrastive(dtype: torch.dtype, device: torch.device, num_queries: int, **settings) -> Outcome:
    generator = torch.Generator(device).manual_seed(0)
    keys = torch.randn(2 * num_queries, 96, generator=generator, device=device)
    queries = keys[:num_queries] + 4 * torch.randn(num_queries, 96, generator=generator, device=device)
    inputs = [queries.to(dtype), keys.to(dtype)]

    def through(function: Callable) -> Callable:
        return lambda queries, keys: function(queries, keys, **settings)

    return compare(through(contrastive_loss), through(reference.contrastive_loss), inputs)


def pooled_contrastive(dtype: torch.dtype, device: torch.device) -> Outcome:
    lengths = (3, 70, 1, 9, 64, 20)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(sum(lengths), 96, generator=generator, device=device).to(dtype)

    def exact(hidden: Tensor) -> Tensor:
        vectors = reference.pool(hidden, cu_seqlens, normalize=False, output_dtype=_wide(hidden.dtype))
        return reference.contrastive_loss(vectors[:3], vectors[3:])

    return compare(lambda hidden: pooled_contrastive_loss(hidden, cu_seqlens, num_queries=3), exact, [hidden])


def fused(name: str, dtype: torch.dtype, device: torch.device) -> Outcome:
    case = fusions.Case("smoke", 300, 128, 192, 4, 2, 64, 500)
    operation = fusions.make_operation(name, case, dtype, device)
    return compare(operation.ours, operation.eager, operation.inputs)


def adapted(dtype: torch.dtype, device: torch.device) -> Outcome:
    case = lora.Case("smoke", 128, (128, 64), 300, 8)
    layers = lora.Layers(case, 0.0, device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(case.num_tokens, size) for size in (case.in_features, *case.out_features)]
    x, *upstream = (torch.randn(shape, generator=generator, device=device).to(dtype) for shape in shapes)
    # a GPU's form writes low-rank columns behind its input
    with_room = x.new_empty((case.num_tokens, case.in_features + layers.room))[:, : case.in_features].copy_(x)
    truth = lora.exact_results(case, x, upstream, layers)

    def results(function: Callable, x: Tensor) -> list[Tensor]:
        x.requires_grad_()
        outputs = function(x)
        return [*outputs, *torch.autograd.grad(outputs, [x, *layers.adapters], upstream)]

    error = largest_error(results(layers.fused, with_room), truth)
    return error, wrong(error, dtype, largest_error(results(layers.peft, x), truth))


def quantized(name: str, dtype: torch.dtype, device: torch.device) -> Outcome:
    """Rows in float8 and their exact values: the error in steps of float8, of which rounding makes a half."""
    generator = torch.Generator(device).manual_seed(0)
    x, other, weight = (torch.randn(300, 192, generator=generator, device=device).to(dtype) for _ in range(3))
    wide, total = x.double(), x + other
    exact = {
        "rows": wide,
        "norm": reference.rms_norm(wide, weight[0].double(), fusions.EPS),
        "sum and norm": reference.rms_norm(total.double(), weight[0].double(), fusions.EPS),
        "SwiGLU": reference.swiglu(wide, other.double()),
    }[name]
    values, scales = {
        "rows": lambda: quantize_rows(x),
        "norm": lambda: quantized_rms_norm(x, weight[0], fusions.EPS),
        "sum and norm": lambda: quantized_rms_norm(x, weight[0], fusions.EPS, add=other),
        "SwiGLU": lambda: quantized_swiglu(x, other),
    }[name]()
    step = (exact.abs() * 2**-3).maximum(scales.double() * 2**-9)
    error = ((values.double() * scales - exact).abs() / step).max().item()
    if name == "sum and norm" and not torch.equal(x, total):
        return error, "wrong: x does not hold the sum"
    return error, None if error <= 0.5001 else f"wrong: off by {error:.3f} steps of float8, at most 0.5"


def float8_product(device: torch.device) -> Outcome:
    """torch's row-wise product, adding up accurately, of float8 rows and weights against float64 of the same."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(256, 8192), (512, 8192), (512,)]
    rows, weight, bias = (torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes)
    linear, (values, scales) = Float8Linear("smoke", weight, bias), quantize_rows(rows)
    exact = (values.double() * scales) @ (linear.weight.double() * linear.scales) + bias
    error = largest_error([linear((values, scales))], [exact])
    return error, None if error <= 2**-8 else f"wrong: error {error:.2g} of the largest value, at most {2**-8:.2g}"


def float32_products(device: torch.device) -> Outcome:
    """torch's products of 16-bit matrices that add up in float32, in place, which the loss is made of."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(96, 128), (128, 64), (96, 64)]
    a, b, total = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
    a, b = a.bfloat16(), b.bfloat16()
    product = a.double() @ b.double()
    truth = [product, total.double() + product]
    found = torch.empty_like(total)
    torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=found)
    torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    error = largest_error([found, total], truth)
    return error, wrong(error, torch.float32)


def captured(device: torch.device) -> Outcome:
    """Attention, forward and backward, and the loss, as a graph and as launches: the same bits."""
    from ..kernels.attention import varlen_attention

    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(device, torch.int32)
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(sum(LENGTHS), heads, 64) for heads in (4, 2, 2, 4)]
    *leaves, upstream = (torch.randn(shape, generator=generator, device=device).bfloat16() for shape in shapes)
    q, k, v = (leaf.requires_grad_() for leaf in leaves)
    rows = [
        torch.randn(count, 96, generator=generator, device=device).bfloat16().requires_grad_() for count in (64, 96)
    ]

    def run() -> list[Tensor]:
        output = varlen_attention(q, k, v, cu_seqlens, max(LENGTHS))
        loss = contrastive_loss(*rows)
        gradients = torch.autograd.grad((output, loss), (q, k, v, *rows), (upstream, torch.ones_like(loss)))
        return [output.detach(), loss.detach(), *gradients]

    kept: list[list[Tensor]] = []
    replay = cuda_graph(lambda: kept.append(run()))
    replay()
    torch.cuda.synchronize(device)
    differing = [place for place, pair in enumerate(zip(kept[-1], run(), strict=True)) if not torch.equal(*pair)]
    return None, f"wrong: captured results {differing} have other bits than launched ones" if differing else None


def encoder(device: torch.device, quick: bool, dtype: str = "auto") -> Outcome:
    """A small encoder: its vectors near the CPU's, and of the same bits alone, in company, captured and launched."""
    from bivec import Encoder

    texts = synthetic_mix(6 if quick else 40)
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(SHAPES["quick"] if quick else SMALL, folder, texts)
        ours = Encoder.from_pretrained(folder, device=str(device), dtype=dtype)
        vectors = ours.encode(texts, show_progress_bar=False)
        alone = np.stack([ours.encode(text, show_progress_bar=False) for text in texts[:5]])
        with mock.patch.object(ours.runner, "_captured", None):
            launched = ours.encode(texts, show_progress_bar=False)
        exact = Encoder.from_pretrained(folder, device="cpu", dtype="float32").encode(texts, show_progress_bar=False)
    if not np.array_equal(alone, vectors[:5]):
        return None, "wrong: texts alone have other bits than in company"
    if not np.array_equal(launched, vectors):
        return None, "wrong: captured passes have other bits than launched ones"
    centre = exact.mean(0)
    a, b = vectors - centre, exact - centre
    cosine = float(((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min())
    return 1 - cosine, None if cosine >= LEAST_COSINE[dtype] else f"wrong: cosine {cosine:.4f} with the CPU's vectors"


def training_step(device: torch.device, quick: bool) -> Outcome:
    """A supervised step: its first loss is that of transformers and PEFT."""
    from .train import OURS, run_stage

    texts = list(dict.fromkeys(synthetic_mix(60)))[: 12 if quick else 48]
    shape = SHAPES["quick"] if quick else SMALL
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(shape, folder, texts)
        dtype = "float32" if device.type == "cpu" else "bfloat16"
        rows = run_stage("supervised", shape, folder, texts, dtype, device, rounds=0)
    ours = next(row for row in rows if row["name"] == OURS)
    peers = [row["first_loss"] for row in rows if row["name"] != OURS and row["first_loss"] is not None]
    if ours["skipped"] or not peers:
        return None, ours["skipped"] or "the peers did not run: " + "; ".join(str(row["skipped"]) for row in rows[1:])
    return min(abs(ours["first_loss"] - loss) / abs(loss) for loss in peers), None


def checks(device: torch.device, quick: bool) -> dict[str, Callable[[], Outcome]]:
    """By name; on a CPU in float32 and without what needs CUDA."""
    on_cuda = device.type == "cuda"
    has_float8 = not on_cuda or torch.cuda.get_device_capability(device) >= (8, 9)
    dtypes = (torch.bfloat16, torch.float32) if on_cuda else (torch.float32,)
    heads, lengths = ((16,), QUICK_LENGTHS) if quick else ((64, 128), LENGTHS)
    found: dict[str, Callable[[], Outcome]] = {}
    if on_cuda:
        found["products into float32"] = functools.partial(float32_products, device)
    for dtype in dtypes:
        label = str(dtype).removeprefix("torch.")
        for head_dim in heads:
            for mask in MASKS if dtype == dtypes[0] else ("full",):
                name = f"attention D{head_dim}, {mask}, {label}"
                found[name] = functools.partial(attention, mask, head_dim, dtype, device, lengths)
        for mode in ("mean", "last") if quick else ("mean", "weighted_mean", "last", "first"):
            found[f"pool {mode}, {label}"] = functools.partial(pooling, mode, dtype, device)
        for count in (40,) if quick else (40, 1500):
            plain = functools.partial(contrastive, dtype, device, count)
            found[f"contrastive {count}, {label}"] = plain
            found[f"contrastive {count}, symmetric, {label}"] = functools.partial(plain, symmetric=True, dims=[96, 32])
        found[f"pooled contrastive, {label}"] = functools.partial(pooled_contrastive, dtype, device)
        for name in fusions.OPERATIONS:
            found[f"{name}, {label}"] = functools.partial(fused, name, dtype, device)
        found[f"LoRA, {label}"] = functools.partial(adapted, dtype, device)
        if has_float8:
            for name in ("rows", "norm", "sum and norm", "SwiGLU"):
                found[f"float8 {name}, {label}"] = functools.partial(quantized, name, dtype, device)
    if on_cuda:
        found["captured and launched"] = functools.partial(captured, device)
    found["encoder"] = functools.partial(encoder, device, quick)
    if on_cuda and has_float8:
        found["float8 product"] = functools.partial(float8_product, device)
        found["encoder in float8"] = functools.partial(encoder, device, quick, "float8")
    found["training step"] = functools.partial(training_step, device, quick)
    return found


def main(argv: list[str] | None = None) -> int:
    arguments = argument_parser(__doc__).parse_args(argv)
    device = torch.device(arguments.device)

    def row(name: str, check: Callable[[], Outcome]) -> list[dict]:
        error, reason = check()
        return [{"case": name, "name": "bivec", "error": error, "right": reason is None, "skipped": reason}]

    results = Results("smoke", arguments, describe_machine(device, dtypes=("float32",)))
    every = checks(device, arguments.quick)
    status = results.run([Case(name, functools.partial(row, name, check)) for name, check in every.items()])
    return status or int(any(row["skipped"] for row in results.document["rows"]))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


if __name__ == "__main__":
    sys.exit(main())
