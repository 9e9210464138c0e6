"""Pooling against float64: the eager path of the CPU, and the kernels, interpreted or on CUDA."""

import inspect
import math

import pytest
import torch

from bivec.kernels import pooling, reference
from bivec.kernels.pooling import POOLING_MODES, pool
from bivec.kernels.pooling import cpu as pooling_cpu
from bivec.kernels.pooling.sums import MODES, pool_sums

LENGTHS = [1, 5, 64, 65, 3, 130]
STARTS = [0, 2, 10, 64, 1, 70]


@pytest.fixture(params=["eager", "kernel"])
def path(request, device, monkeypatch) -> str:
    """Which implementation `pool` takes, and so the device: on a CPU the kernels must be asked for."""
    if request.param == "eager":
        return "cpu"
    if device == "cpu":
        monkeypatch.setattr(pooling, "pool_sums_cpu", interpreted_sums)
    return device


def interpreted_sums(hidden, cu_seqlens, pool_starts, mode, eps):
    return pool_sums(hidden, cu_seqlens, pool_starts, MODES.index(mode), eps)


def bounds(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).int()


def make(device, dtype=torch.float32, tail=9, size=40):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(sum(LENGTHS) + tail, size, generator=generator).to(device, dtype)
    hidden[sum(LENGTHS) :] = float("nan")  # unused rows
    weight = (torch.rand(size, generator=generator) + 0.5).to(device, dtype)
    return hidden, bounds(LENGTHS, device), torch.tensor(STARTS, dtype=torch.int32, device=device), weight


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize(("dim", "normalize"), [(None, False), (None, True), (7, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pool_equals_float64(path, mode, norm, dim, normalize, dtype):
    hidden, cu_seqlens, starts, weight = make(path, dtype)
    arguments = {"mode": mode, "norm_eps": 1e-5, "truncate_dim": dim, "normalize": normalize}
    vectors = pool(hidden, cu_seqlens, pool_starts=starts, norm_weight=weight if norm else None, **arguments)
    truth = reference.pool(
        hidden.double(), cu_seqlens, pool_starts=starts, norm_weight=weight.double() if norm else None, **arguments
    )
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors.double(), truth, atol=3e-6, rtol=3e-6)


@pytest.mark.parametrize("mode", POOLING_MODES)
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_equal_float64(path, mode, norm, dtype):
    hidden, cu_seqlens, starts, weight = make(path, dtype)
    hidden[sum(LENGTHS) :] = 0
    upstream = torch.randn(len(LENGTHS), 40, generator=torch.Generator().manual_seed(1)).to(path)
    ours = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
    pool(ours[0], cu_seqlens, pool_starts=starts, mode=mode, norm_weight=ours[1] if norm else None).backward(upstream)
    truth = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    reference.pool(
        truth[0], cu_seqlens, pool_starts=starts, mode=mode, norm_weight=truth[1] if norm else None
    ).backward(upstream.double())
    for our, true in zip(ours[: 1 + norm], truth, strict=False):
        assert our.grad.dtype == dtype
        largest = true.grad.abs().max().item()
        error = (our.grad.double() - true.grad).abs().max().item()
        assert error <= (torch.finfo(dtype).eps + 1e-6) * largest
    assert not ours[0].grad[sum(LENGTHS) :].any()


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_a_sequence_is_the_same_bits_in_any_company(path, mode):
    hidden, cu_seqlens, _, weight = make(path, tail=0)
    together = pool(hidden, cu_seqlens, mode=mode, norm_weight=weight)
    again = pool(hidden, cu_seqlens, mode=mode, norm_weight=weight)
    assert torch.equal(together, again)
    for i, rows in enumerate(hidden.split(LENGTHS)):
        assert torch.equal(pool(rows, bounds([len(rows)], path), mode=mode, norm_weight=weight)[0], together[i])


@pytest.mark.parametrize("mode", POOLING_MODES)
def test_chunks_change_nothing_on_the_cpu(monkeypatch, mode):
    """Chunks of a few rows, cut inside of sequences' parts and not, give the bits of one chunk."""
    hidden, cu_seqlens, starts, weight = make("cpu")
    upstream = torch.randn(len(LENGTHS), 40, generator=torch.Generator().manual_seed(1))
    results = []
    for elements in (2**19, 70 * 40, 1):
        monkeypatch.setattr(pooling_cpu, "CHUNK_ELEMENTS", elements)
        inputs = hidden.clone().requires_grad_()
        vectors = pool(inputs, cu_seqlens, pool_starts=starts, mode=mode, norm_weight=weight)
        results.append((vectors.detach(), *torch.autograd.grad(vectors, inputs, upstream)))
    for vectors, gradient in results[1:]:
        assert torch.equal(vectors, results[0][0])
        assert torch.equal(gradient, results[0][1])


def test_no_sequences(path):
    hidden = torch.randn(5, 40, device=path, requires_grad=True)
    vectors = pool(hidden, bounds([], path))
    assert vectors.shape == (0, 40)
    vectors.sum().backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))


@pytest.mark.parametrize("dim", [None, 7])
def test_output_in_float16_and_int8(path, dim):
    hidden, cu_seqlens, starts, weight = make(path, torch.float16)
    arguments = {"pool_starts": starts, "norm_weight": weight, "truncate_dim": dim}
    vectors = pool(hidden, cu_seqlens, **arguments)
    halves = pool(hidden, cu_seqlens, **arguments, output_dtype=torch.float16)
    assert halves.dtype == torch.float16
    assert torch.equal(halves, vectors.half())

    ranges = torch.stack([vectors.amin(0), vectors.amax(0) * 0.9])  # some values lie outside
    ranges[:, 2] = 0.01  # a dimension without extent
    levels = pool(hidden, cu_seqlens, **arguments, output_dtype=torch.int8, ranges=ranges)
    assert levels.dtype == torch.int8
    assert levels.min() == -128
    assert levels.max() == 127
    by_hand = [
        [
            min(max(math.floor((x - low) / ((high - low) / 255 or 1.0)), 0), 255) - 128
            for x, low, high in zip(row, *ranges.tolist(), strict=True)
        ]
        for row in vectors.tolist()
    ]
    # a value on the edge between two steps may fall to either
    differences = (levels.cpu().int() - torch.tensor(by_hand)).abs()
    assert differences.max() <= 1
    assert (differences > 0).float().mean() < 0.02
    truth = reference.pool(hidden.double(), cu_seqlens, **arguments, output_dtype=torch.int8, ranges=ranges)
    assert truth.dtype == torch.int8
    assert (levels.int() - truth.int()).abs().float().mean() < 0.02


def test_int8_is_sentence_transformers(path):
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    hidden, cu_seqlens, *_ = make(path)
    vectors = pool(hidden, cu_seqlens)
    ranges = torch.stack([vectors.amin(0), vectors.amax(0)])
    levels = pool(hidden, cu_seqlens, output_dtype=torch.int8, ranges=ranges)
    theirs = quantization.quantize_embeddings(vectors, "int8", ranges=ranges.cpu().numpy())
    assert torch.equal(levels.cpu(), torch.from_numpy(theirs))


def test_tail_and_instruction_get_zero_gradient_and_every_row_is_written(device, monkeypatch):
    """Outputs are allocated full of NaN, the slab has a long tail and spare sequences."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(float("nan")))
    hidden = torch.randn(sum(LENGTHS) + 300, 40, device=device).requires_grad_()
    cu_seqlens = bounds([*LENGTHS, 0, 0], device)
    starts = torch.tensor([*STARTS, 0, 0], dtype=torch.int32, device=device)
    sums = pool_sums(hidden, cu_seqlens, starts, MODES.index("mean"), 1e-6)
    assert not sums[-2:].any()
    sums.backward(torch.ones_like(sums))
    assert hidden.grad.isfinite().all()
    assert not hidden.grad[sum(LENGTHS) :].any()
    assert not hidden.grad[6 + 0 : 6 + 10].any()  # the third sequence's instruction
    assert hidden.grad[6 + 10 : 6 + 64].any(dim=1).all()


def test_kernel_does_not_read_the_instruction(device):
    hidden, cu_seqlens, starts, _ = make(device)
    expected = pool_sums(hidden, cu_seqlens, starts, 0, 1e-6)
    poisoned = hidden.clone()
    for begin, skipped in zip(cu_seqlens.tolist(), STARTS, strict=False):
        poisoned[begin : begin + skipped] = float("nan")
    assert torch.equal(pool_sums(poisoned, cu_seqlens, starts, 0, 1e-6), expected)


def test_opcheck(device):
    hidden, cu_seqlens, starts, _ = make(device, tail=0)
    torch.library.opcheck(pool_sums, (hidden.requires_grad_(), cu_seqlens, starts, 1, 1e-6))


def test_reference_has_the_same_signature():
    assert list(inspect.signature(reference.pool).parameters) == list(inspect.signature(pool).parameters)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.ones(4, 3, dtype=torch.int64)}, "hidden must be floating point"),
        ({"hidden": torch.ones(3, 4).T}, "hidden must be contiguous in its last dimension"),
        ({"cu_seqlens": torch.tensor([0, 2, 4])}, "cu_seqlens must be int32"),
        ({"pool_starts": torch.tensor([0, 0])}, "pool_starts must be int32"),
        ({"pool_starts": torch.tensor([0, 2], dtype=torch.int32)}, "sequence 1 has none"),
        ({"cu_seqlens": torch.tensor([0, 0, 4], dtype=torch.int32)}, "sequence 0 has none"),
        ({"mode": "max"}, "mode must be one of"),
        ({"norm_weight": torch.ones(4)}, "norm_weight must have shape"),
        ({"norm_weight": torch.ones(3, device="meta")}, "norm_weight must be on hidden's device"),
        ({"truncate_dim": 4}, "truncate_dim must be from 1 to 3"),
        ({"output_dtype": torch.int32}, "output_dtype must be floating point or int8, got torch.int32"),
        ({"output_dtype": torch.int8}, r"ranges must be float32 \(2, 3\) for an output_dtype of int8, got None"),
        (
            {"output_dtype": torch.int8, "ranges": torch.ones(2, 3), "truncate_dim": 2},
            r"ranges must be float32 \(2, 2\) on cpu, got torch.float32 \(2, 3\)",
        ),
        (
            {"output_dtype": torch.int8, "ranges": torch.ones(2, 3).double()},
            r"ranges must be float32 \(2, 3\) on cpu, got torch.float64",
        ),
        ({"ranges": torch.ones(2, 3)}, "ranges must be None unless output_dtype is int8"),
        (
            {"output_dtype": torch.int8, "ranges": torch.ones(2, 3), "hidden": torch.ones(4, 3).requires_grad_()},
            "hidden must not require a gradient for an output_dtype of int8",
        ),
        (
            {"output_dtype": torch.int8, "ranges": torch.ones(2, 3), "norm_weight": torch.ones(3).requires_grad_()},
            "norm_weight must not require a gradient",
        ),
    ],
)
def test_bad_input(changes, message):
    arguments = {"hidden": torch.ones(4, 3), "cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32)} | changes
    with pytest.raises(ValueError, match=message):
        pool(**arguments)
