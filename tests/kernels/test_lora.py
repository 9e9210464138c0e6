"""LoRA linears against float64, against autograd through the reference, and their dropout masks."""

import numpy as np
import pytest
import torch

from bivec.kernels import reference
from bivec.kernels.lora import LoraLinear, lora_linear, lora_linears

SHAPES = [(1, 8, 8, 1), (37, 24, 40, 4), (130, 64, 48, 16)]  # T, in, out, r


def make_inputs(num_tokens, in_features, out_features, rank, dtype=torch.float32, seed=0, bias=True):
    """x, weight, bias, A, B, the upstream gradient; B is not zero, as after training."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, in_features), (out_features, in_features), (out_features,), (rank, in_features)]
    shapes += [(out_features, rank), (num_tokens, out_features)]
    x, weight, b, lora_a, lora_b, upstream = (torch.randn(s, generator=generator).to(dtype) for s in shapes)
    return x, weight, b if bias else None, lora_a, lora_b, upstream


def evaluate(function, x, weight, bias, lora_a, lora_b, upstream, dtype=None, **options):
    """Output and the gradients of x, A and B."""
    dtype = dtype or x.dtype
    leaves = [tensor.detach().to(dtype).clone().requires_grad_() for tensor in (x, lora_a, lora_b)]
    bias = None if bias is None else bias.to(dtype)
    output = function(leaves[0], weight.to(dtype), bias, leaves[1], leaves[2], 0.5, **options)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(dtype))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3, "seed": 2**63 + 5}], ids=["plain", "dropout"])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_equal_float64(shape, dtype, options, bias):
    inputs = make_inputs(*shape, dtype=dtype, bias=bias)
    ours = evaluate(lora_linear, *inputs, **options)
    eager = evaluate(reference.lora_linear, *inputs, **options)
    truth = evaluate(reference.lora_linear, *inputs, dtype=torch.float64, **options)
    for name, got, theirs, exact in zip(("y", "dx", "da", "db"), ours, eager, truth, strict=True):
        assert got.dtype == dtype
        step = torch.finfo(dtype).eps * exact.abs().max()
        assert (got - exact).abs().max() <= 2 * (theirs - exact).abs().max() + step, name


def test_finite_differences_see_the_mask_of_the_backward():
    x, weight, bias, lora_a, lora_b, _ = make_inputs(5, 6, 7, 2, dtype=torch.float64)
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b)]

    def function(x, lora_a, lora_b):
        return lora_linear(x, weight, bias, lora_a, lora_b, 1.5, dropout_p=0.4, seed=11)

    assert torch.autograd.gradcheck(function, leaves)


def test_linears_of_one_input_equal_separate_ones():
    x, weight, bias, lora_a, lora_b, upstream = make_inputs(61, 24, 40, 4, dtype=torch.float64)
    second = make_inputs(61, 24, 16, 8, dtype=torch.float64, seed=1)
    third = make_inputs(61, 24, 12, 3, dtype=torch.float64, seed=2)
    options = {"dropout_p": 0.2, "seed": 7}
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b, second[3], second[4])]
    frozen = [(third[3], torch.randn(40, 3, dtype=torch.float64), 0.25)]
    linears = [
        LoraLinear(weight, bias, lora_a, lora_b, 0.5, frozen),
        (third[1], third[2]),  # without an adapter
        (second[1], None, second[3], second[4], 2.0),
    ]
    upstreams = [upstream, third[5], second[5]]
    ours = lora_linears(x, linears, **options)
    beneath = torch.nn.functional.linear(torch.nn.functional.linear(x, frozen[0][0]), frozen[0][1]) * 0.25
    separate = [
        reference.lora_linear(x, weight, bias, lora_a, lora_b, 0.5, **options) + beneath,
        torch.nn.functional.linear(x, third[1], third[2]),
        reference.lora_linear(x, second[1], None, second[3], second[4], 2.0, **options),
    ]
    torch.testing.assert_close(list(ours), separate)
    expected = torch.autograd.grad(separate, leaves, upstreams)
    torch.testing.assert_close(torch.autograd.grad(ours, leaves, upstreams), expected)


def test_a_linear_that_is_not_used_and_one_that_is_frozen_get_no_gradient():
    x, weight, bias, lora_a, lora_b, upstream = make_inputs(9, 8, 6, 2)
    other_a, other_b = (tensor.clone().requires_grad_() for tensor in (lora_a, lora_b))
    lora_a.requires_grad_()  # x and lora_b need none
    first, _ = lora_linears(x, [(weight, bias, lora_a, lora_b, 2.0), (weight, bias, other_a, other_b, 2.0)])
    first.backward(upstream)
    torch.testing.assert_close(lora_a.grad, 2.0 * (upstream @ lora_b).T @ x)
    assert x.grad is None
    assert lora_b.grad is None
    assert not other_a.grad.any()
    assert not other_b.grad.any()


def test_only_the_input_is_kept_and_no_gradient_has_the_weights_shape():
    x, weight, bias, lora_a, lora_b, upstream = make_inputs(50, 24, 40, 4)
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = lora_linear(x, weight, bias, lora_a, lora_b, 2.0, dropout_p=0.1, seed=3)
    allowed = {tensor.data_ptr() for tensor in (x, weight, bias, lora_a, lora_b)}
    assert {tensor.data_ptr() for tensor in kept} == allowed

    class Shapes(torch.utils._python_dispatch.TorchDispatchMode):
        seen = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.seen += (tuple(result.shape),)
            return result

    with Shapes() as shapes:
        torch.autograd.grad(y, leaves, upstream)
    assert (50, 24) in shapes.seen
    assert (40, 24) not in shapes.seen
    assert weight.grad is None


def test_a_mask_is_numpys_philox_and_the_same_on_any_run():
    x = torch.ones(300, 1000)
    options = {"dropout_p": 0.25, "seed": 2**64 - 1}
    arguments = (torch.zeros(1000, 1000), None, torch.eye(1000), torch.eye(1000), 1.0)
    first = lora_linear(x, *arguments, **options)
    assert torch.equal(first, lora_linear(x, *arguments, **options))
    bits = np.random.Philox(key=2**64 - 1).random_raw(75000).view(np.uint16).reshape(300, 1000)
    assert torch.equal(first, torch.from_numpy(bits >= 2**14) / 0.75)
    other = lora_linear(x, *arguments, dropout_p=0.25, seed=1)
    assert ((other > 0) != (first > 0)).float().mean() == pytest.approx(2 * 0.25 * 0.75, abs=0.005)


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(dropout_p):
    size = 512
    x = torch.ones(2048, size)
    arguments = (torch.zeros(size, size), None, torch.eye(size), torch.eye(size), 1.0)
    dropped = lora_linear(x, *arguments, dropout_p=dropout_p, seed=4)
    spread = (dropout_p * (1 - dropout_p) / x.numel()) ** 0.5
    assert abs((dropped == 0).double().mean() - dropout_p) < 4 * spread + 2**-17
    assert abs(dropped.double().mean() - 1.0) < 4 * spread / (1 - dropout_p) + 1e-6
    for dim in (0, 1):  # no row and no column has a chance of its own
        share = (dropped == 0).double().mean(dim)
        assert share.std() == pytest.approx((dropout_p * (1 - dropout_p) / x.shape[dim]) ** 0.5, rel=0.2)


def test_an_empty_batch_a_strided_input_and_an_expanded_gradient():
    x, weight, bias, lora_a, lora_b, _ = make_inputs(0, 8, 6, 2)
    leaves = [tensor.requires_grad_() for tensor in (x, lora_a, lora_b)]
    y = lora_linear(x, weight, bias, lora_a, lora_b, 2.0, dropout_p=0.1, seed=1)
    gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
    assert y.shape == (0, 6)
    assert not any(gradient.any() for gradient in gradients)
    assert [gradient.shape for gradient in gradients] == [leaf.shape for leaf in leaves]

    x, weight, bias, lora_a, lora_b, _ = make_inputs(12, 8, 6, 2, dtype=torch.float64)
    strided = x.T.contiguous().T
    upstream = torch.ones(1, 1, dtype=torch.float64).expand(12, 6)
    options = {"dropout_p": 0.5, "seed": 5}
    ours = evaluate(lora_linear, strided, weight, bias, lora_a, lora_b, upstream, **options)
    torch.testing.assert_close(
        ours, evaluate(reference.lora_linear, x, weight, bias, lora_a, lora_b, upstream, **options)
    )


def test_adapters_in_float32_beside_a_bfloat16_base_get_float32_gradients():
    inputs = make_inputs(64, 32, 48, 8, dtype=torch.bfloat16)
    x, weight, bias, lora_a, lora_b, upstream = inputs
    leaves = [lora_a.float().requires_grad_(), lora_b.float().requires_grad_()]
    y = lora_linear(x, weight, bias, *leaves, 0.5)
    gradients = torch.autograd.grad(y, leaves, upstream)
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 2
    truth = evaluate(reference.lora_linear, *inputs, dtype=torch.float64)
    for got, exact in zip((y, *gradients), (truth[0], *truth[2:]), strict=True):
        assert (got - exact).abs().max() <= 0.02 * exact.abs().max()


def test_bad_arguments_are_refused_by_name():
    x, weight, bias, lora_a, lora_b, _ = make_inputs(5, 8, 6, 2)
    good = {"x": x, "weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "scaling": 1.0}
    for message, changes in {
        r"x must be floating point \(T, in\), got float32 \(8,\)": {"x": x[0]},
        r"x must be floating point": {"x": x.long()},
        r"weight must be \(out, 8\) in x's dtype torch.float32, got float32 \(6, 7\)": {"weight": weight[:, :7]},
        r"weight must be .*got float64": {"weight": weight.double()},
        r"weight must be frozen": {"weight": weight.clone().requires_grad_()},
        r"bias must be \(6,\)": {"bias": bias[:3]},
        r"bias must be frozen": {"bias": bias.clone().requires_grad_()},
        r"lora_a must be floating point \(r, 8\)": {"lora_a": lora_a[:, :3]},
        r"r above 0": {"lora_a": lora_a[:0]},
        r"lora_b must be floating point \(6, 2\), got float32 \(6, 1\)": {"lora_b": lora_b[:, :1]},
        r"given together": {"lora_b": None},
        r"scaling must be finite": {"scaling": float("nan")},
        r"dropout_p must be in \[0, 1\), got 1.0": {"dropout_p": 1.0},
        r"dropout_p must be": {"dropout_p": -0.1},
        r"seed must be an integer .* got None": {"dropout_p": 0.1},
        r"seed must be an integer": {"dropout_p": 0.1, "seed": 2**64},
        r"device": {"weight": weight.to("meta")},
    }.items():
        with pytest.raises(ValueError, match=message):
            lora_linear(**(good | changes))
    with pytest.raises(ValueError, match="at least one linear"):
        lora_linears(x, [])
    trained = (lora_a.clone().requires_grad_(), lora_b, 1.0)
    with pytest.raises(ValueError, match="frozen adapter must not require a gradient"):
        lora_linears(x, [LoraLinear(weight, frozen=[trained])])
