"""Fixtures of the kernel tests: the device, and the comparison of an operator with its float64 truth."""

import pytest
import torch


@pytest.fixture(params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> str:
    """Kernels run on the GPU, with the tiles that ship, where there is one, and else under the interpreter."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled for the CUDA device, not interpreted")
    return request.param


def outputs_and_gradients(function, inputs, upstream, *args, **kwargs):
    """`function`'s output and its gradient with respect to each of `inputs`, for the upstream gradient `upstream`."""
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    output = function(*inputs, *args, **kwargs)
    return [output.detach(), *torch.autograd.grad(output, inputs, upstream.to(output.dtype))]


@pytest.fixture
def gradients():
    return outputs_and_gradients


@pytest.fixture
def check_against_truth():
    """Compare output and gradients with float64 on the same inputs.

    The error may be twice the eager version's own in the same dtype plus, of the largest value, one rounding step and
    what float32 sums over a head may lose in another order: n roundings at random make an error of sqrt(n). The eager
    version's largest error alone is one draw, and by luck a small one on some processors. On CUDA a power of two or a
    logarithm is off by two units of float32 (`ex2.approx`, `lg2.approx`), and a probability is made of up to four.
    """

    def check(function, reference, inputs, upstream, *args, **kwargs):
        computed = outputs_and_gradients(function, inputs, upstream, *args, **kwargs)
        eager = outputs_and_gradients(reference, inputs, upstream, *args, **kwargs)
        truth = outputs_and_gradients(reference, [x.double() for x in inputs], upstream.double(), *args, **kwargs)
        for name, ours, theirs, exact in zip(("output", "dq", "dk", "dv"), computed, eager, truth, strict=True):
            assert ours.dtype == inputs[0].dtype
            assert ours.isfinite().all(), name
            error, baseline = (ours.double() - exact).abs(), (theirs.double() - exact).abs()
            if exact.numel():
                sums = ours.shape[-1] ** 0.5 + (8 if ours.is_cuda else 0)
                steps = torch.finfo(ours.dtype).eps + sums * torch.finfo(torch.float32).eps
                steps *= exact.abs().max().item()
                assert error.max().item() <= 2 * baseline.max().item() + steps, name
        return computed

    return check
