"""RMSNorm, rotary, SwiGLU and the head's cross-entropy against float64: in eager PyTorch and with the kernels."""

import inspect
import itertools

import pytest
import torch

from bivec.kernels import (
    chunks,
    cross_entropy,
    norm,
    reference,
    rotary,
    swiglu,
)
from bivec.kernels.cross_entropy import kernel as cross_entropy_kernel
from bivec.kernels.norm import kernels as norm_kernels
from bivec.kernels.rotary import kernel as rotary_kernel
from bivec.kernels.swiglu import kernels as swiglu_kernels

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
EPS = 1e-5


@pytest.fixture
def nothing_is_small(monkeypatch):
    monkeypatch.setattr(chunks, "SMALL", -1)


@pytest.fixture(params=["kernel", "chunks", "small"])
def place(request, device, monkeypatch) -> str:
    """The device: once with the kernels, for which a CPU must be asked, and once with each way that a CPU takes."""
    if request.param != "small":
        monkeypatch.setattr(chunks, "SMALL", -1)
    monkeypatch.setattr(norm_kernels, "MAX_PROGRAMS", 2)  # a few rows are several rounds of a program
    if request.param != "kernel":
        if device == "cuda":
            pytest.skip("CUDA takes the kernels")
    elif device == "cpu":
        monkeypatch.setattr(norm, "_norm_by_chunks", norm_kernels.norm_forward)
        monkeypatch.setattr(norm, "_norm_backward_by_chunks", norm_kernels.norm_backward)
        monkeypatch.setattr(rotary, "_rotate_by_chunks", rotary_kernel.rotate)
        monkeypatch.setattr(swiglu, "_swiglu_by_chunks", swiglu_kernels.swiglu_forward)
        monkeypatch.setattr(swiglu, "_swiglu_backward_by_chunks", side_by_side)
        monkeypatch.setattr(cross_entropy, "_eager_rows", cross_entropy_kernel.differentiate_rows)
    return device


def side_by_side(grad, gate, up):
    both = swiglu_kernels.swiglu_backward(grad, gate, up)
    return both[:, 0].view(gate.shape), both[:, 1].view(gate.shape)


@pytest.fixture
def small_chunks(monkeypatch):
    """So that a few rows are several chunks and the last is a part of one."""
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(swiglu, "CHUNK_ELEMENTS", 300)
    monkeypatch.setattr(cross_entropy, "LOGITS_BYTES", {"cuda": 1, "cpu": 1})


def randn(seed, *shapes, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes]


def evaluate(function, inputs, upstream, wanted=None):
    """The outputs, and the gradients of the wanted inputs for random upstream gradients of every output."""
    wanted = range(len(inputs)) if wanted is None else wanted
    inputs = [tensor.detach().clone().requires_grad_(index in wanted) for index, tensor in enumerate(inputs)]
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pairs = [(x, grad.to(x.dtype)) for x, grad in zip(outputs, upstream, strict=True) if x.requires_grad]
    differentiated, upstream = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(differentiated, [inputs[index] for index in wanted], upstream)
    return [output.detach() for output in outputs], list(gradients)


def check(ours, spec, inputs, upstream, num_steps=1):
    """Against float64: at most twice the error of eager PyTorch, and `num_steps` of rounding the largest value.

    Every gradient is also computed alone, and must be the same bits.
    """
    outputs, gradients = evaluate(ours, inputs, upstream)
    eager = itertools.chain(*evaluate(spec, inputs, upstream))
    truth = itertools.chain(*evaluate(spec, [tensor.double() for tensor in inputs], upstream))
    for place, (got, theirs, exact) in enumerate(zip(outputs + gradients, eager, truth, strict=True)):
        assert got.dtype == theirs.dtype
        assert got.shape == exact.shape
        assert got.isfinite().all(), place
        if exact.numel():
            # a GPU's powers of two and reciprocal roots are off by two units of float32 each
            approximated = 4 * torch.finfo(torch.float32).eps if got.is_cuda else 0.0
            step = (num_steps * torch.finfo(got.dtype).eps + approximated) * exact.abs().max()
            assert (got - exact).abs().max() <= 2 * (theirs - exact).abs().max() + step, place
    for index, together in enumerate(gradients):
        alone_outputs, (alone,) = evaluate(ours, inputs, upstream, wanted=[index])
        assert torch.equal(alone, together)
        assert all(map(torch.equal, alone_outputs, outputs))


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1, 8), (37, 24), (70, 100), (5, 3, 16), (0, 8)], ids=str)
def test_rms_norm(place, small_chunks, shape, dtype):
    x, weight, upstream = randn(0, shape, shape[-1:], shape, dtype=DTYPES[dtype], device=place)
    check(
        lambda x, weight: norm.rms_norm(x, weight, EPS),
        lambda x, weight: reference.rms_norm(x, weight, EPS),
        (x, weight),
        (upstream,),
        num_steps=4,  # the weight's gradient is a sum over the rows
    )


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1, 8), (37, 24), (70, 100)], ids=str)
def test_add_rms_norm(place, small_chunks, shape, dtype):
    x, residual, weight, *upstream = randn(1, shape, shape, shape[-1:], shape, shape, dtype=DTYPES[dtype], device=place)
    check(
        lambda x, residual, weight: norm.add_rms_norm(x, residual, weight, EPS),
        lambda x, residual, weight: reference.add_rms_norm(x, residual, weight, EPS),
        (x, residual, weight),
        upstream,
        num_steps=4,
    )
    total, normed = norm.add_rms_norm(x, residual, weight, EPS)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, norm.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("used", [0, 1], ids=["sum", "normed"])
def test_add_rms_norm_when_one_output_is_used(place, used):
    x, residual, weight, upstream = randn(2, (9, 24), (9, 24), (24,), (9, 24), device=place)
    inputs = (x, residual) if used == 0 else (x, residual, weight)
    check(
        lambda x, residual, weight=weight: norm.add_rms_norm(x, residual, weight, EPS)[used],
        lambda x, residual, weight=weight: reference.add_rms_norm(x, residual, weight.to(x.dtype), EPS)[used],
        inputs,
        (upstream,),
        num_steps=4,
    )


def test_add_rms_norm_of_two_dtypes_as_under_autocast(place):
    x, residual, weight = randn(3, (9, 24), (9, 24), (24,), device=place)
    total, normed = norm.add_rms_norm(x.bfloat16(), residual, weight, EPS)
    assert torch.equal(total, x.bfloat16() + residual)
    torch.testing.assert_close(normed, reference.rms_norm(total, weight, EPS))


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_norm_is_the_same_bits_with_and_without_gradient_and_in_any_company(place, small_chunks, dtype):
    x, weight = randn(4, (70, 100), (100,), dtype=DTYPES[dtype], device=place)
    expected = norm.rms_norm(x.requires_grad_(), weight, EPS).detach()
    with torch.no_grad():
        assert torch.equal(norm.rms_norm(x, weight, EPS), expected)
        assert torch.equal(norm.rms_norm(x[13:29], weight, EPS), expected[13:29])


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_small_matrices_are_normed_to_the_same_bits(monkeypatch, dtype):
    x, weight = randn(4, (70, 100), (100,), dtype=DTYPES[dtype])
    at_once = norm.rms_norm(x, weight, EPS)
    monkeypatch.setattr(chunks, "SMALL", -1)
    assert torch.equal(norm.rms_norm(x, weight, EPS), at_once)


def angles(num_tokens, half, device, dtype=torch.float32):
    (table,) = randn(5, (num_tokens, half), device=device)
    return (4 * table).cos().to(dtype), (4 * table).sin().to(dtype)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1, 2, 1, 8), (37, 3, 1, 10), (70, 4, 2, 64), (0, 2, 1, 8)], ids=str)
def test_rotary(place, small_chunks, shape, dtype):
    num_tokens, num_heads, num_key_heads, head_dim = shape
    shapes = [(num_tokens, heads, head_dim) for heads in (num_heads, num_key_heads)]
    query, key, *upstream = randn(6, *shapes, *shapes, dtype=DTYPES[dtype], device=place)
    tables = angles(num_tokens, head_dim // 2, place)
    check(
        lambda q, k: rotary.apply_rotary(q, k, *tables),
        lambda q, k: reference.apply_rotary(
            q, k, *(table.to(torch.promote_types(q.dtype, torch.float32)) for table in tables)
        ),
        (query, key),
        upstream,
    )


def test_rotary_of_slices_of_one_projection(place):
    (projection,) = randn(7, (37, 5 * 16), device=place)
    query, key = projection.unflatten(1, (5, 16))[:, :3], projection.unflatten(1, (5, 16))[:, 3:]
    tables = angles(37, 8, place)
    turned = rotary.apply_rotary(query, key, *tables)
    expected = rotary.apply_rotary(query.contiguous(), key.contiguous(), *tables)
    assert all(map(torch.equal, turned, expected))
    assert torch.equal(query, projection.unflatten(1, (5, 16))[:, :3])


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1, 8), (37, 24), (70, 101), (0, 8)], ids=str)
def test_swiglu(place, small_chunks, shape, dtype):
    gate, up, upstream = randn(8, shape, shape, shape, dtype=DTYPES[dtype], device=place)
    check(swiglu.swiglu, reference.swiglu, (3 * gate, up), (upstream,))


def test_swiglu_of_strided_inputs_and_gradients(place):
    both, upstream = randn(9, (37, 48), (1, 24), device=place)
    check(
        lambda both: swiglu.swiglu(both[:, :24], both[:, 24:]),
        lambda both: reference.swiglu(both[:, :24], both[:, 24:]),
        (both,),
        (upstream.expand(37, 24),),
    )


@pytest.fixture
def fresh_memory_is_nan():
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("shape", [(37, 24), (1, 101), (0, 8)], ids=str)
def test_room_behind_rows_is_left_alone(device, fresh_memory_is_nan, shape):
    x, residual, weight = randn(20, shape, shape, shape[1:], device=device)
    num_rows, size = shape
    for function, arguments, place in (
        (norm_kernels.norm_forward, (x, residual, weight, EPS), 1),
        (swiglu_kernels.swiglu_forward, (x, residual), slice(None)),
    ):
        with_room, alone = function(*arguments, 16)[place], function(*arguments)[place]
        assert torch.equal(with_room, alone)
        buffer = with_room.as_strided((num_rows, size + 16), (size + 16, 1))
        assert buffer[:, size:].isnan().all()


def language_model(vocab_size, num_tokens=90, size=24, dtype=torch.float32, device="cpu"):
    hidden, weight = randn(10, (num_tokens, size), (vocab_size, size), dtype=dtype, device=device)
    generator = torch.Generator().manual_seed(11)
    rows = torch.randperm(num_tokens, generator=generator)[: num_tokens - 13].to(device)
    targets = torch.randint(vocab_size, rows.shape, generator=generator).to(device)
    return hidden, weight / 4, targets, rows


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("vocab_size", [1, 97, 512])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_cross_entropy(place, small_chunks, vocab_size, dtype, reduction):
    hidden, weight, targets, rows = language_model(vocab_size, dtype=DTYPES[dtype], device=place)
    check(
        lambda h, w: cross_entropy.linear_cross_entropy(h, w, targets, rows=rows, reduction=reduction),
        lambda h, w: reference.linear_cross_entropy(h, w, targets, rows=rows, reduction=reduction),
        (hidden, weight),
        (torch.tensor(1.7, device=place),),
        num_steps=4,
    )


def test_cross_entropy_of_all_rows_and_of_a_repeated_one(place):
    hidden, weight, _, _ = language_model(97, device=place)
    targets = torch.arange(90, device=place)
    upstream = (torch.tensor(-0.3, device=place),)
    for rows in (None, torch.arange(90, device=place) // 3):
        check(
            lambda h, w, rows=rows: cross_entropy.linear_cross_entropy(h, w, targets, rows=rows),
            lambda h, w, rows=rows: reference.linear_cross_entropy(h, w, targets, rows=rows),
            (hidden, weight),
            upstream,
            num_steps=4,
        )


def test_cross_entropy_survives_large_logits_and_small_float16_gradients(place):
    hidden, weight, targets, rows = language_model(97, device=place)
    loss = cross_entropy.linear_cross_entropy(1000 * hidden, weight, targets, rows=rows)
    torch.testing.assert_close(loss, reference.linear_cross_entropy(1000 * hidden, weight, targets, rows=rows))
    # a gradient of about 1e-7, of which float16 holds no digit
    hidden, weight = 200 * hidden.sign().half(), torch.zeros(97, 24, dtype=torch.float16, device=place)
    weight[0] = hidden[0] / 200 * 0.003
    zeros = torch.zeros(1, dtype=torch.int64, device=place)
    hidden.requires_grad_()
    cross_entropy.linear_cross_entropy(hidden, weight, zeros, rows=zeros).backward(torch.tensor(2.0**14, device=place))
    exact = hidden.detach().double().requires_grad_()
    reference.linear_cross_entropy(exact, weight.double(), zeros, rows=zeros).backward(torch.tensor(2.0**14).to(place))
    torch.testing.assert_close(hidden.grad[0].double(), exact.grad[0], rtol=0.03, atol=0)


def test_cross_entropy_keeps_no_matrix_of_the_vocabulary(monkeypatch):
    """What is saved for the backward is the gradient by the selected rows, whatever the vocabulary."""
    hidden, weight, targets, rows = language_model(512)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        cross_entropy.linear_cross_entropy(hidden.requires_grad_(), weight, targets, rows=rows)
    assert sum(tensor.numel() for tensor in saved) == 77 * 24 + 77


def test_what_is_saved_for_the_backward(nothing_is_small):
    x, residual, weight, other = randn(12, (40, 24), (40, 24), (24,), (40, 24))
    x.requires_grad_()
    cases = {
        lambda: norm.add_rms_norm(x, residual, weight, EPS): 40 * 24 + 24 + 40,
        lambda: norm.rms_norm(x, weight, EPS): 40 * 24 + 24 + 40,
        lambda: swiglu.swiglu(x, other): 2 * 40 * 24,
        lambda: rotary.apply_rotary(x.view(40, 3, 8), x.view(40, 3, 8), *angles(40, 4, "cpu")): 2 * 40 * 4,
    }
    for function, expected in cases.items():
        saved: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
            function()
        assert sum(tensor.numel() for tensor in saved) == expected


def test_float64_gradcheck(nothing_is_small):
    x, residual, weight, other = (
        tensor.double().requires_grad_() for tensor in randn(13, (5, 8), (5, 8), (8,), (5, 8))
    )
    tables = angles(5, 2, "cpu", torch.float64)
    assert torch.autograd.gradcheck(lambda x, w: norm.rms_norm(x, w, EPS), (x, weight))
    assert torch.autograd.gradcheck(lambda x, r, w: norm.add_rms_norm(x, r, w, EPS), (x, residual, weight))
    assert torch.autograd.gradcheck(swiglu.swiglu, (x, other))
    assert torch.autograd.gradcheck(
        lambda q, k: rotary.apply_rotary(q.view(5, 2, 4), k.view(5, 2, 4), *tables), (x, other)
    )


def test_opcheck(device):
    x, weight, grad = randn(14, (9, 24), (24,), (9, 24), device=device)
    rstd = torch.ones(9, 1, device=device)
    tables = angles(9, 4, device)
    hidden, head, targets, rows = language_model(40, device=device)
    faithful = ("test_schema", "test_faketensor")
    for operator, arguments in (
        (norm_kernels.norm_forward, (x, grad, weight, EPS)),
        (norm_kernels.norm_forward, (x, None, weight, EPS)),
        (norm_kernels.norm_forward, (x, grad, weight, EPS, 5)),
        (norm_kernels.norm_backward, (grad, x, x, weight, rstd, True)),
        (norm_kernels.norm_backward, (grad, None, x, weight, rstd, False)),
        (rotary_kernel.rotate, (x.view(9, 3, 8), x.view(9, 3, 8), *tables, True)),
        (swiglu_kernels.swiglu_forward, (x, grad)),
        (swiglu_kernels.swiglu_forward, (x, grad, 5)),
        (swiglu_kernels.swiglu_backward, (grad, x, grad)),
    ):
        torch.library.opcheck(operator, arguments, test_utils=faithful)
    arguments = (hidden.requires_grad_(), head.requires_grad_(), targets, rows, True, True)
    torch.library.opcheck(cross_entropy._linear_cross_entropy, arguments)


def test_reference_has_the_same_signatures():
    for function in (
        norm.rms_norm,
        norm.add_rms_norm,
        rotary.apply_rotary,
        swiglu.swiglu,
        cross_entropy.linear_cross_entropy,
    ):
        theirs = inspect.signature(getattr(reference, function.__name__))
        ours = [name for name in inspect.signature(function).parameters if name != "room"]  # where, and not what
        assert list(theirs.parameters) == ours


X, INDICES = torch.ones(4, 8), torch.arange(4)
HEADS, TABLE = torch.ones(4, 2, 8), torch.ones(4, 4)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (norm.rms_norm, (X.long(), X[0], EPS), "x must be floating point"),
        (norm.rms_norm, (X, X[0, :7], EPS), r"weight must be floating point of shape \(8,\), got float32 \(7,\)"),
        (norm.rms_norm, (X, X[0].to("meta"), EPS), "weight must be on x's device cpu, got meta"),
        (norm.add_rms_norm, (X, X[:3], X[0], EPS), r"residual must be floating point \(4, 8\)"),
        (norm.add_rms_norm, (X, X.long(), X[0], EPS), "residual must be floating point"),
        (rotary.apply_rotary, (X, HEADS, TABLE, TABLE), "query must be floating point"),
        (rotary.apply_rotary, (HEADS[..., :7], HEADS[..., :7], TABLE, TABLE), "with D even"),
        (rotary.apply_rotary, (HEADS, HEADS[:3], TABLE, TABLE), "key must be torch.float32"),
        (rotary.apply_rotary, (HEADS, HEADS.half(), TABLE, TABLE), "key must be torch.float32"),
        (rotary.apply_rotary, (HEADS, HEADS, TABLE[:3], TABLE), r"cos must be torch.float32 \(4, 4\)"),
        (rotary.apply_rotary, (HEADS, HEADS, TABLE, TABLE.double()), "sin must be torch.float32"),
        (rotary.apply_rotary, (HEADS, HEADS.to("meta"), TABLE, TABLE), "key must be on query's device cpu"),
        (swiglu.swiglu, (X.long(), X), "gate must be floating point"),
        (swiglu.swiglu, (X, X[:, :7]), "up must be float32"),
        (swiglu.swiglu, (X, X.half()), "up must be float32"),
    ],
)
def test_bad_input(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": X.double()}, "hidden must be bfloat16, float16 or float32"),
        ({"hidden": X[0]}, "hidden must be"),
        ({"weight": X[:, :7]}, r"weight must be torch.float32 \(V, 8\)"),
        ({"weight": X.half()}, "weight must be torch.float32"),
        ({"weight": X.to("meta")}, "weight must be on hidden's device cpu"),
        ({"targets": INDICES.int()}, r"targets must be int64 of shape \(4,\)"),
        ({"targets": INDICES[:3]}, r"targets must be int64 of shape \(4,\), got int64 \(3,\)"),
        ({"targets": INDICES - 1}, "targets must be from 0 to 3, got one outside"),
        ({"targets": INDICES + 1}, "targets must be from 0 to 3, got one outside"),
        ({"rows": INDICES.int()}, r"rows must be int64 of shape \(N,\)"),
        ({"rows": INDICES[:, None]}, r"rows must be int64 of shape \(N,\)"),
        ({"rows": INDICES + 1}, "rows must be from 0 to 3, got one outside"),
        ({"rows": INDICES[:0], "targets": INDICES[:0]}, "targets must hold at least one target, got none"),
        ({"reduction": "none"}, "reduction must be mean or sum, got 'none'"),
    ],
)
def test_bad_cross_entropy_input(changes, message):
    arguments = {"hidden": X, "weight": X, "targets": INDICES} | changes
    with pytest.raises(ValueError, match=message):
        cross_entropy.linear_cross_entropy(
            arguments.pop("hidden"), arguments.pop("weight"), arguments.pop("targets"), **arguments
        )
