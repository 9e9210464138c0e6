"""Rows in float8 with scales: bits of the specification, error within half a step, zeros, NaN and any company."""

import inspect

import pytest
import torch

from bivec.kernels import float8, reference
from bivec.kernels.float8 import kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
SHAPES = [(1, 8), (37, 24), (70, 100), (3, 4097), (0, 8)]
EPS = 1e-5


@pytest.fixture
def device(device) -> str:
    if device == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 needs a GPU of capability 8.9")
    return device


def randn(seed, *shapes, dtype=torch.float32, device="cpu"):
    """Rows of magnitudes from 2^-8 to 2^8."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in shapes:
        rows = torch.randn(shape, generator=generator)
        found.append((rows * torch.linspace(-8, 8, len(rows)).exp2()[:, None]).to(device, dtype))
    return found


def bits(values):
    return values.view(torch.uint8)


def dequantized(rows):
    values, scales = rows
    return values.double() * scales.double()


def same(found, expected):
    return torch.equal(bits(found[0]), bits(expected[0])) and torch.equal(found[1], expected[1])


def check(found, spec, inputs):
    """Scales, and values within half a step of the exact row."""
    values, scales = found
    exact_values, exact_scales = spec(*(tensor.double() for tensor in inputs))
    assert (values.dtype, scales.dtype) == (torch.float8_e4m3fn, torch.float32)
    assert (values.shape, scales.shape) == (exact_values.shape, exact_scales.shape)
    if values.numel():
        # sums and divisions in float32; on a GPU powers of two and reciprocal roots are off by two units each
        slack = 16 * torch.finfo(torch.float32).eps
        assert ((scales - exact_scales) / exact_scales).abs().max() <= slack
        exact = spec_before_rounding(spec, inputs)
        half_a_step = (exact.abs() * 2**-4).maximum(exact_scales * 2**-10)
        assert ((dequantized(found) - exact).abs() <= half_a_step * (1 + 16 * slack) + slack * exact_scales).all()


def spec_before_rounding(spec, inputs):
    inputs = [tensor.double() for tensor in inputs]
    if spec is reference.quantize_rows:
        return inputs[0]
    if spec is reference.quantized_swiglu:
        return reference.swiglu(*inputs)
    return reference.rms_norm(*inputs, EPS)


def norm_spec(x, weight):
    return reference.quantized_rms_norm(x, weight, EPS)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows(device, shape, dtype):
    (x,) = randn(0, shape, dtype=DTYPES[dtype], device=device)
    found = float8.quantize_rows(x)
    check(found, reference.quantize_rows, (x,))
    assert same(found, reference.quantize_rows(x))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm(device, shape, dtype):
    x, weight = randn(1, shape, (1, shape[1]), dtype=DTYPES[dtype], device=device)
    found = float8.quantized_rms_norm(x, weight[0], EPS)
    check(found, norm_spec, (x, weight[0]))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_of_a_sum(device, shape, dtype):
    x, add, weight = randn(2, shape, shape, (1, shape[1]), dtype=DTYPES[dtype], device=device)
    total, added = x + add, add.clone()
    found = float8.quantized_rms_norm(x, weight[0], EPS, add=add)
    assert torch.equal(x, total)
    assert torch.equal(add, added)
    assert same(found, float8.quantized_rms_norm(total, weight[0], EPS))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_swiglu(device, shape, dtype):
    """Gate and up as one product gives them, side by side."""
    (both,) = randn(3, (shape[0], 2 * shape[1]), dtype=DTYPES[dtype], device=device)
    gate, up = both.tensor_split(2, dim=1)
    found = float8.quantized_swiglu(gate, up)
    check(found, reference.quantized_swiglu, (gate, up))
    assert same(found, float8.quantized_swiglu(gate.contiguous(), up.contiguous()))


def test_every_value_and_what_lies_between_two_is_rounded_to_nearest_even(device):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()].sort().values
    middles = (every[1:] + every[:-1]) / 2
    above, below = (middles.nextafter(torch.tensor(side)) for side in (torch.inf, -torch.inf))
    row = torch.cat([every, middles, above, below])[None]
    values, scales = float8.quantize_rows(row.to(device))
    assert scales.item() == 1.0
    assert torch.equal(bits(values.cpu()), bits(row.to(torch.float8_e4m3fn)))


def every_operation(x, weight):
    yield float8.quantize_rows(x)
    yield float8.quantized_rms_norm(x, weight, EPS)
    yield float8.quantized_rms_norm(x.clone(), weight, EPS, add=torch.zeros_like(x))
    yield float8.quantized_swiglu(x, x)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_rows_of_zeros_are_exactly_zero(device, dtype):
    x, weight = randn(4, (5, 24), (1, 24), dtype=DTYPES[dtype], device=device)
    x[[1, 4]] = 0.0
    for values, scales in every_operation(x, weight[0]):
        assert (values.float()[[1, 4]] == 0).all()
        assert scales.isfinite().all()
        assert (scales > 0).all()  # of a scale that is none, a product would be NaN
        assert (values.float()[[0, 2, 3]] != 0).any(1).all()


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_nan_and_infinity_stay_in_their_row_and_are_not_hidden(device, dtype, wrong):
    x, weight = randn(5, (5, 24), (1, 24), dtype=DTYPES[dtype], device=device)
    sound = list(every_operation(x, weight[0]))
    x[2, 7] = wrong
    others = [0, 1, 3, 4]
    for found, expected in zip(every_operation(x, weight[0]), sound, strict=True):
        assert dequantized(found)[2].isnan().any()
        assert same([part[others] for part in found], [part[others] for part in expected])


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_rows_of_the_largest_and_the_least_magnitudes(device, dtype):
    largest, least = torch.finfo(DTYPES[dtype]).max, torch.finfo(DTYPES[dtype]).smallest_normal
    x = torch.tensor([[largest, -largest, 0.0, largest / 3], [least, -least, 0.0, least / 3]], dtype=DTYPES[dtype])
    found = float8.quantize_rows(x.to(device))
    values = dequantized(found).cpu()
    assert values.isfinite().all()
    assert ((values[0] - x[0].double()).abs() <= largest * 2**-4).all()
    assert ((values[1] - x[1].double()).abs() <= max(least * 2**-4, 2.0**-100)).all()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("size", [24, 100, 1500])
def test_a_row_has_the_same_bits_in_any_company_and_again(device, size, dtype):
    x, weight = randn(6, (70, size), (1, size), dtype=DTYPES[dtype], device=device)
    expected = list(every_operation(x, weight[0]))
    for again, first in zip(every_operation(x, weight[0]), expected, strict=True):
        assert same(again, first)
    some = torch.tensor([50, 3, 3, 69, 0])
    for rows in (slice(13, 29), slice(41, 42), some):
        for alone, together in zip(every_operation(x[rows], weight[0]), expected, strict=True):
            assert same(alone, [part[rows] for part in together])


def test_opcheck(device):
    x, other, weight = randn(7, (9, 24), (9, 24), (1, 24), device=device)
    faithful = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (kernels.quantize, (x,)),
        (kernels.norm, (x, weight[0], EPS, other)),
        (kernels.norm, (x, weight[0], EPS, None)),
        (kernels.swiglu, (x, other)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=faithful)


def test_reference_has_the_same_signatures():
    for function in (float8.quantize_rows, float8.quantized_rms_norm, float8.quantized_swiglu):
        theirs = inspect.signature(getattr(reference, function.__name__))
        assert list(theirs.parameters) == list(inspect.signature(function).parameters)


X = torch.ones(4, 8)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (float8.quantize_rows, {"x": X.long()}, r"x must be floating point \(T, E\), got int64 \(4, 8\)"),
        (float8.quantize_rows, {"x": X[0]}, r"x must be floating point \(T, E\), got float32 \(8,\)"),
        (float8.quantize_rows, {"x": X.to("meta")}, "x must be on a CUDA device, got meta"),
        (float8.quantized_rms_norm, {"x": X.t(), "weight": X[:, 0], "eps": EPS}, "x must have contiguous rows"),
        (float8.quantized_rms_norm, {"x": X, "weight": X[0, :7], "eps": EPS}, r"weight must be .* of shape \(8,\)"),
        (
            float8.quantized_rms_norm,
            {"x": X, "weight": X[0], "eps": EPS, "add": X[:3]},
            r"add must be float32 \(4, 8\)",
        ),
        (float8.quantized_swiglu, {"gate": X, "up": X.half()}, "up must be float32"),
    ],
)
def test_bad_input(monkeypatch, function, arguments, message):
    monkeypatch.setattr("bivec.kernels.ragged.INTERPRETED", True)
    with pytest.raises(ValueError, match=message):
        function(**arguments)
