"""contrastive_loss at the ends of float32's range: positives far above and far below the negatives, and the launch that
does rows again whose sums have left it."""

import math
from unittest import mock

import pytest
import torch

from bivec.kernels import contrastive, reference
from bivec.kernels.contrastive import chunks as contrastive_chunks
from bivec.kernels.contrastive import contrastive_loss
from bivec.kernels.contrastive import small as contrastive_small

WIDTH = 24


@pytest.fixture(params=["small", "chunks"])
def place(request, device):
    with (
        mock.patch.object(contrastive, "runs_kernel", return_value=True),
        mock.patch.object(contrastive_small, "SMALL_SCORES", 2**20 if request.param == "small" else 0),
    ):
        yield device


def results(function, queries, keys, temperature, upstream=1.7, **settings):
    """Loss and the gradients by queries, keys and temperature."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in (queries, keys, temperature)]
    loss = function(inputs[0], inputs[1], temperature=inputs[2], **settings)
    return [loss.detach(), *torch.autograd.grad(loss, inputs, torch.tensor(upstream).to(loss))]


def compare(queries, keys, temperature, rtol, **settings):
    computed = results(contrastive_loss, queries, keys, temperature, **settings)
    doubles = [tensor.double() for tensor in (queries, keys, temperature)]
    truth = results(reference.contrastive_loss, *doubles, **settings)
    for name, ours, exact in zip(("loss", "queries", "keys", "temperature"), computed, truth, strict=True):
        assert ours.isfinite().all(), name
        error = (ours.double() - exact).abs().max()
        assert error <= rtol * exact.abs().max(), f"{name}: {error / exact.abs().max()}"
    return computed


def example(device, dtype, num_queries=70, num_keys=101, scale=1.0):
    generator = torch.Generator().manual_seed(3)
    queries, keys = (torch.randn(number, WIDTH, generator=generator) * scale for number in (num_queries, num_keys))
    return queries.to(device, dtype), keys.to(device, dtype)


CASES = {
    "cold": {"temperature": 1e-3},
    "colder than any": {"temperature": 1e-5},
    "scores of thousands": {"temperature": 1.0, "scale": 20.0, "normalize": False},
    "one query in ten": {"temperature": 1e-2, "few": True},
    "groups": {"temperature": 1e-3, "groups": True},
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, dtype) for case in CASES for dtype in (torch.float32, torch.bfloat16)), ("cold", torch.float16)],
)
def test_positives_far_below_the_negatives(place, case, dtype):
    settings = dict(CASES[case])
    temperature = torch.tensor(settings.pop("temperature"), device=place)
    queries, keys = example(place, dtype, scale=settings.pop("scale", 1.0))
    if settings.pop("few", False):
        far = torch.arange(len(queries), device=place) % 10 == 3
        queries = torch.where(far[:, None], -keys[: len(queries)], keys[: len(queries)] + queries / 4)
    if settings.pop("groups", False):
        settings["groups"] = torch.arange(len(keys), device=place) % 60
    if dtype == torch.float32:
        # of scores of 1e5 a step of float32 is 0.01
        compare(queries, keys, temperature, 2e-3 if case == "colder than any" else 3e-4, **settings)
        return
    computed = results(contrastive_loss, queries, keys, temperature, **settings)
    doubles = [tensor.double() for tensor in (queries, keys, temperature)]
    truth = results(reference.contrastive_loss, *doubles, **settings)
    eager = results(reference.contrastive_loss, queries, keys, temperature, **settings)
    for ours, theirs, true in zip(computed, eager, truth, strict=True):
        assert ours.isfinite().all()
        error, baseline = (ours.double() - true).abs().max(), (theirs.double() - true).abs().max()
        # rounded vectors of length one may choose another of two keys
        assert error <= 2 * baseline + 0.05 * true.abs().max()


def flags_of(queries, keys, temperature):
    """Which row tiles are done again, and the number of rows of one."""
    zeros, made = torch.zeros, []

    def spy(*args, **kwargs):
        result = zeros(*args, **kwargs)
        if kwargs.get("dtype") == torch.int32:
            made.append(result)
        return result

    with mock.patch.object(torch, "zeros", spy):
        contrastive_loss(queries, keys, temperature=temperature)
    return made[-1].tolist()


def test_only_tiles_of_rows_that_leave_the_range_are_done_again(device):
    queries, keys = example(device, torch.float32)
    queries = keys[: len(queries)] + queries / 4
    queries[40] = -20 * keys[40]
    tile = contrastive_chunks.product_tiles(torch.float32, torch.device(device), True).block_m
    expected = [int(40 // tile == number) for number in range(-(-len(queries) // tile))]
    with mock.patch.object(contrastive_small, "SMALL_SCORES", 0):
        assert flags_of(queries, keys, 1e-2) == expected
        assert not any(flags_of(queries, keys, 0.05))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [0.2, 0.05, 0.03])
def test_gradients_of_positives_that_have_won(place, temperature, dtype):
    """At probabilities of one less 1e-9 and less, one of which float32 knows no difference to, gradients are exact."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(2 * WIDTH, 2 * WIDTH, generator=generator)).Q
    keys = torch.cat([basis, -basis])
    queries = keys[:40] + 0.01 * torch.randn(40, 2 * WIDTH, generator=generator)
    queries, keys = queries.to(place, dtype), keys.to(place, dtype)
    # at the coldest each query's gradient is a small remainder of what points along the query
    rtol = (2e-5 if temperature > 0.03 else 3e-3) if dtype == torch.float32 else 0.1
    computed = compare(queries, keys, torch.tensor(temperature, device=place), rtol)
    if temperature == 0.03:
        assert 0 < computed[0] < 1e-7  # which one less the probability would make zero


def test_equal_scores(place):
    """Every key is the positive's copy: a loss of log M."""
    queries, keys = example(place, torch.float32)
    keys = keys[:1].expand(len(keys), -1).contiguous()
    loss, grad_queries, _, grad_temperature = results(contrastive_loss, queries, keys, torch.tensor(0.05, device=place))
    assert loss.item() == pytest.approx(math.log(len(keys)), rel=1e-6)
    assert grad_queries.abs().max() < 1e-6
    assert grad_temperature.abs() < 1e-4


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_gradient_and_no_second_chance_change_no_bit(place, symmetric):
    """The loss without gradients is the loss with them, where rows are done again too, and twice the same."""
    queries, keys = example(place, torch.float32)
    for temperature in (0.05, 1e-3):
        tensor = torch.tensor(temperature, device=place)
        loss, *gradients = results(contrastive_loss, queries, keys, tensor, symmetric=symmetric)
        assert torch.equal(contrastive_loss(queries, keys, temperature=tensor, symmetric=symmetric), loss)
        again = results(contrastive_loss, queries, keys, tensor, symmetric=symmetric)
        for one, other in zip([loss, *gradients], again, strict=True):
            assert torch.equal(one, other)


def test_nan_is_not_hidden(place):
    queries, keys = example(place, torch.float32)
    queries[3, 5] = float("nan")
    loss, grad_queries, *_ = results(contrastive_loss, queries, keys, torch.tensor(0.05, device=place))
    assert loss.isnan()
    assert grad_queries[3].isnan().any()


def test_one_tile_or_many_is_one_loss(device):
    """Both sides of the switch between the two launches and the chunks."""
    queries, keys = example(device, torch.float32)
    temperature = torch.tensor(0.05, device=device)
    with mock.patch.object(contrastive, "runs_kernel", return_value=True):
        small = results(contrastive_loss, queries, keys, temperature)
        with mock.patch.object(contrastive_small, "SMALL_SCORES", 0):
            chunks = results(contrastive_loss, queries, keys, temperature)
    for one, other in zip(small, chunks, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
