"""The LoRA linears' form for a GPU: against float64, its masks, what it keeps, and when it takes an adapter over."""

import copy
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bivec.kernels.lora import LoraLinear, lora_linears, room_behind
from bivec.kernels.lora import kernels as lora_kernels
from bivec.kernels.lora.stack import LoraStack

DROPOUT = {"dropout_p": 0.3, "seed": 2**63 + 5}
# outputs, rank in training, ranks of frozen adapters, whether there is a bias
LINEARS = [(40, 5, [3], True), (16, None, [], True), (24, 16, [], False), (8, None, [17], True)]


def make(num_tokens, size, dtype, device, spare=None, linears=LINEARS):
    """x, as a part of a buffer of NaN with `spare` columns behind it, linears and upstream gradients."""
    generator = torch.Generator().manual_seed(7)

    def randn(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype).to(device)

    x = randn(num_tokens, size)
    if spare is not None:
        buffer = torch.full((num_tokens, size + spare), float("nan"), dtype=dtype, device=device)
        x = buffer[:, :size].copy_(x)
    made = []
    for out, rank, frozen_ranks, bias in linears:
        a, b = (None, None) if rank is None else (randn(rank, size), randn(out, rank))
        frozen = [(randn(r, size), randn(out, r), 0.25) for r in frozen_ranks]
        made.append(LoraLinear(randn(out, size), randn(out) if bias else None, a, b, 0.5, frozen))
    return x, made, [randn(num_tokens, out) for out, *_ in linears]


def to_double(x, linears, upstream):
    def double(tensor):
        return None if tensor is None else tensor.double()

    wide = [
        LoraLinear(*map(double, linear[:4]), linear.scaling, [(a.double(), b.double(), s) for a, b, s in linear.frozen])
        for linear in linears
    ]
    return x.double(), wide, [grad.double() for grad in upstream]


def evaluate(x, linears, upstream, **options):
    """Outputs and the gradients of x, the A's and the B's."""
    x = x.detach().requires_grad_()
    linears = [
        linear._replace(lora_a=linear.lora_a.detach().requires_grad_(), lora_b=linear.lora_b.detach().requires_grad_())
        if linear.lora_a is not None
        else linear
        for linear in linears
    ]
    stack = options.pop("stack", None)
    outputs = lora_linears(x, linears, stack=stack(linears) if stack else None, **options)
    leaves = [x, *(t for linear in linears if linear.lora_a is not None for t in (linear.lora_a, linear.lora_b))]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 64), (67, 24), (130, 70)], ids=str)
@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
@pytest.mark.parametrize("room", [True, False])
def test_outputs_and_gradients_equal_float64(device, shape, dtype, options, room):
    spare = room_behind(shape[1], [5, 16, 3, 17]) if room else None
    inputs = make(*shape, dtype, device, spare)
    ours = evaluate(*inputs, stack=LoraStack, room=spare or 0, **options)
    x, linears, upstream = make(*shape, dtype, "cpu")
    eager = evaluate(x, linears, upstream, **options)
    truth = evaluate(*to_double(x, linears, upstream), **options)
    for place, (got, theirs, exact) in enumerate(zip(ours, eager, truth, strict=True)):
        assert got.dtype == dtype
        step = torch.finfo(dtype).eps * exact.abs().max()
        assert (got.cpu() - exact).abs().max() <= 2 * (theirs - exact).abs().max() + step, place


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_an_empty_batch_and_a_strided_input(device, options):
    for got in evaluate(*make(0, 24, torch.float32, device, 64), stack=LoraStack, room=64, **options):
        assert not got.any()
    x, linears, upstream = make(19, 24, torch.float32, device)
    upstream = [grad[:1, :1].expand(grad.shape) for grad in upstream]
    strided = evaluate(x.T.contiguous().T, linears, upstream, stack=LoraStack, **options)
    torch.testing.assert_close(strided, evaluate(x, linears, upstream, stack=LoraStack, **options))


@pytest.mark.parametrize("size", [16, 23, 160])
@pytest.mark.parametrize("seed", [0, 1, 2**40 + 3, 2**63 + 11, 2**64 - 1])
def test_the_mask_is_numpys(device, size, seed):
    threshold, num_tokens = 2**15 - 5, 70
    x, a = torch.zeros(num_tokens, size, device=device), torch.zeros(8, size, device=device)
    low = torch.empty(num_tokens, 8, device=device)
    words = lora_kernels.low_rank(x, a, low, 8, threshold, seed, 1.0)
    numbers = np.random.Philox(key=seed).random_raw(-(-x.numel() // 4)).view(np.uint16)[: x.numel()]
    expected = torch.from_numpy(numbers >= threshold).view(num_tokens, size)
    bits = (words.cpu()[:, :, None].int() >> torch.arange(16)) & 1
    assert torch.equal(bits.flatten(1)[:, :size].bool(), expected)


class Operators(TorchDispatchMode):
    """Counts calls of torch's operators."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_an_adapter_is_taken_over_once_and_again_when_it_has_changed(device):
    x, linears, _ = make(9, 24, torch.float32, device)
    stack = LoraStack(linears)
    linears = [linear._replace(weight=weight) for linear, weight in zip(linears, stack.weights, strict=True)]

    def outputs_and_copies():
        with Operators() as operators:
            outputs = lora_linears(x, linears, stack=stack)
        return outputs, operators.counts["copy_"]

    _, copies = outputs_and_copies()
    assert copies == 4
    first, copies = outputs_and_copies()
    assert copies == 0
    linears[2].lora_b.mul_(2.0)  # as an optimizer writes
    second, copies = outputs_and_copies()
    assert copies == 1
    assert torch.equal(first[0], second[0])
    torch.testing.assert_close(second[2], lora_linears(x.cpu(), [cpu(linears[2])])[0].to(device))
    assert not torch.equal(first[2], second[2])
    linears[0].frozen[0][1].data = linears[0].frozen[0][1] + 1.0  # as `.to()` and `load_state_dict(assign)` replace
    third, copies = outputs_and_copies()
    assert copies == 1
    torch.testing.assert_close(third[0], lora_linears(x.cpu(), [cpu(linears[0])])[0].to(device))


def cpu(linear):
    frozen = [(a.cpu(), b.cpu(), scale) for a, b, scale in linear.frozen]
    tensors = [None if tensor is None else tensor.cpu() for tensor in linear[:4]]
    return LoraLinear(*tensors, linear.scaling, frozen)


def test_a_stack_holds_its_own_linears_alone(device):
    _, linears, _ = make(1, 24, torch.float32, device)
    stack = LoraStack(linears)
    assert not stack.holds(linears)
    own = [linear._replace(weight=weight) for linear, weight in zip(linears, stack.weights, strict=True)]
    assert stack.holds(own)
    assert not stack.holds(own[:3])
    assert not stack.holds([own[0], own[2], own[1], own[3]])
    assert not stack.holds([own[0], own[1]._replace(weight=own[1].weight.clone()), *own[2:]])
    assert not stack.holds([own[0]._replace(frozen=[]), *own[1:]])
    other_rank = own[2]._replace(lora_a=own[2].lora_a[:4], lora_b=own[2].lora_b[:, :4])
    assert not stack.holds([*own[:2], other_rank, own[3]])
    assert copy.deepcopy(stack) is None


def test_with_room_outputs_are_written_by_one_product_each(device):
    x, linears, _ = make(9, 24, torch.float32, device, 64)
    stack = LoraStack(linears)
    stack.update(linears)
    for room, expected in ((64, {"mm": 1, "addmm": 4}), (0, {"mm": 1, "addmm": 4, "addmm_": 3})):
        with Operators() as operators:
            lora_linears(x, [linear._replace(bias=linear.weight[:, 0]) for linear in linears], stack=stack, room=room)
        assert {name: count for name, count in operators.counts.items() if "mm" in name} == expected


@pytest.mark.parametrize("options", [{}, DROPOUT], ids=["plain", "dropout"])
def test_two_calls_that_write_behind_one_input_are_caught(device, options):
    x, linears, upstream = make(9, 24, torch.float32, device, 64)
    linears = [linear._replace(lora_a=linear.lora_a.requires_grad_()) for linear in linears[::2]]
    first = lora_linears(x, linears, stack=LoraStack(linears), room=64, **options)
    lora_linears(x, linears, stack=LoraStack(linears), room=64, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(first, linears[0].lora_a, upstream[::2])


def test_gradients_side_by_side_are_one_product(device):
    x, linears, upstream = make(9, 24, torch.float32, device)
    both = torch.cat(upstream, dim=1)
    beside = [part for part in both.split([grad.shape[1] for grad in upstream], dim=1)]
    expected = evaluate(x, linears, upstream, stack=LoraStack)
    products = []
    for gradients in (upstream, beside):
        with Operators() as operators:
            got = evaluate(x, linears, gradients, stack=LoraStack)
        torch.testing.assert_close(got, expected)
        products.append(sum(count for name, count in operators.counts.items() if "mm" in name))
    # of four linears, all with a gradient of x, three with adapters: of x, of low and of B
    assert products[0] - products[1] == 3 + 2 + 2


def test_dropout_keeps_bits_and_the_input_alone(device):
    x, linears, _ = make(50, 24, torch.float32, device, 64)
    linears = [linear._replace(lora_a=linear.lora_a.requires_grad_()) for linear in linears[:1]]
    stack = LoraStack(linears)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lora_linears(x, linears, stack=stack, room=64, **DROPOUT)
    others = [tensor for tensor in kept if tensor.data_ptr() not in (x.data_ptr(), stack.matrix.data_ptr())]
    assert [(tensor.dtype, tuple(tensor.shape)) for tensor in others] == [(torch.int16, (50, 2))]


def test_float64_is_refused_with_dropout():
    x, linears, _ = make(5, 24, torch.float64, "cpu")
    with pytest.raises(ValueError, match="x must be float32 or of 16 bits for dropout on a GPU, got float64"):
        lora_linears(x, linears, stack=LoraStack(linears), **DROPOUT)
