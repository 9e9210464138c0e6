"""varlen_attention against float64: dtypes, head dimensions, groups, windows, ragged lengths, strides."""

import ast
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.kernels import reference
from bivec.kernels.attention import tile_list, tiles, varlen_attention
from bivec.kernels.attention.masks import AttentionMask

# around the tiles that run: 32 queries by 16 keys, short up to 16, in the interpreter; 64 and 128 on a GPU
LENGTHS = {"cpu": [1, 0, 15, 16, 17, 33, 65], "cuda": [1, 0, 63, 64, 65, 128, 129, 300, 1000]}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def packed(lengths, num_heads, num_kv_heads, head_dim, dtype, device, tail=5):
    """q, k, v, upstream gradient and cu_seqlens; the tail belongs to no sequence."""
    generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
    num_tokens = sum(lengths) + tail
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    tensors = [torch.randn(num_tokens, n, head_dim, generator=generator).to(device, dtype) for n in heads]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(device, torch.int32)
    return tensors[:3], tensors[3], cu_seqlens


# every dtype, head dimension, group size and window kind, each at least twice in some combination
CASES = [
    ("fp32", 32, 2, 2, (-1, -1)),
    ("fp32", 80, 4, 1, (-1, 0)),
    ("fp32", 256, 2, 1, (7, 7)),
    ("fp16", 48, 8, 1, (-1, 0)),
    ("fp16", 64, 4, 1, (-1, -1)),
    ("fp16", 128, 2, 2, (-1, 4)),
    ("bf16", 16, 2, 2, (20, -1)),
    ("bf16", 64, 8, 1, (0, 2)),
    ("bf16", 80, 4, 4, (-1, -1)),
    ("bf16", 128, 4, 1, (40, 3)),
]


@pytest.mark.parametrize(("dtype", "head_dim", "num_heads", "num_kv_heads", "window_size"), CASES)
def test_output_and_gradients(device, dtype, head_dim, num_heads, num_kv_heads, window_size, check_against_truth):
    inputs, upstream, cu_seqlens = packed(
        LENGTHS[device], num_heads, num_kv_heads, head_dim, DTYPES[dtype], device, tail=21
    )
    computed = check_against_truth(
        varlen_attention, reference.varlen_attention, inputs, upstream, cu_seqlens, 1000, window_size=window_size
    )
    for tensor in computed:
        assert not tensor[cu_seqlens[-1] :].any()


def drop_the_last_row(q, k, v, cu_seqlens, *arguments, **options):
    output = reference.varlen_attention(q, k, v, cu_seqlens, *arguments, **options)
    return output.index_fill(0, cu_seqlens[-1:].long() - 1, 0)


WRONG = {
    "scale": partial(reference.varlen_attention, softmax_scale=1.01 * 64**-0.5),
    "a key less": lambda *inputs, window_size: reference.varlen_attention(*inputs, window_size=(7, 6)),
    "a row less": drop_the_last_row,
    "queries rounded": lambda q, *inputs, **options: reference.varlen_attention(
        q.to(torch.float8_e4m3fn if q.dtype == torch.float16 else torch.bfloat16).to(q.dtype), *inputs, **options
    ),
}


@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("wrong", WRONG)
def test_control_a_wrong_kernel_is_noticed(dtype, wrong, check_against_truth):
    inputs, upstream, cu_seqlens = packed(LENGTHS["cpu"], 2, 1, 64, DTYPES[dtype], "cpu")
    arguments = (reference.varlen_attention, inputs, upstream, cu_seqlens, 65)
    check_against_truth(reference.varlen_attention, *arguments, window_size=(7, 7))
    with pytest.raises(AssertionError, match=r"output|d[qkv]"):
        check_against_truth(WRONG[wrong], *arguments, window_size=(7, 7))


def test_a_window_of_one_token_copies_the_values(device, gradients):
    inputs, upstream, cu_seqlens = packed([3, 40], 2, 2, 32, torch.float16, device, tail=0)
    output, grad_q, grad_k, grad_v = gradients(varlen_attention, inputs, upstream, cu_seqlens, 40, window_size=(0, 0))
    assert torch.equal(output, inputs[2])
    assert torch.equal(grad_v, upstream)
    for gradient in (grad_q, grad_k):  # of a constant
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 32, 48, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_combination_on_a_gpu(dtype, head_dim, check_against_truth):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for num_kv_heads in (8, 2, 1):
        inputs, upstream, cu_seqlens = packed(LENGTHS["cuda"], 8, num_kv_heads, head_dim, DTYPES[dtype], "cuda")
        for window in [(-1, -1), (-1, 0), (-1, 9), (100, 100)]:
            arguments = (inputs, upstream, cu_seqlens, 1000)
            check_against_truth(varlen_attention, reference.varlen_attention, *arguments, window_size=window)


@pytest.mark.parametrize("lengths", [[1], [40], [3, 1, 2, 5] * 40, [0, 0, 0], [0, 20], [100, 0, 0]])
def test_unusual_batches(device, lengths, check_against_truth):
    inputs, upstream, cu_seqlens = packed(lengths, 2, 1, 32, torch.float32, device)
    check_against_truth(varlen_attention, reference.varlen_attention, inputs, upstream, cu_seqlens, max(lengths))


@pytest.mark.parametrize(("num_tokens", "num_sequences"), [(0, 0), (0, 3), (7, 0)])
def test_empty_batches_give_zeros(device, num_tokens, num_sequences, gradients):
    inputs = [torch.randn(num_tokens, 2, 32, device=device) for _ in range(3)]
    cu_seqlens = torch.zeros(num_sequences + 1, dtype=torch.int32, device=device)
    for tensor in gradients(varlen_attention, inputs, torch.randn_like(inputs[0]), cu_seqlens, 0):
        assert tensor.shape == inputs[0].shape
        assert not tensor.any()


@settings(max_examples=8, derandomize=True, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 50), min_size=1, max_size=4),
    left=st.integers(-1, 40),
    right=st.integers(-1, 40),
    head_dim=st.integers(16, 40),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)
def test_any_lengths_and_windows(lengths, left, right, head_dim, dtype):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs, _, cu_seqlens = packed(lengths, 2, 1, head_dim, dtype, device)
    output = varlen_attention(*inputs, cu_seqlens, 50, window_size=(left, right))
    truth = reference.varlen_attention(*[x.double() for x in inputs], cu_seqlens, 50, window_size=(left, right))
    torch.testing.assert_close(output.double(), truth, rtol=0, atol=3e-3 if dtype == torch.float16 else 3e-6)


@pytest.mark.parametrize(("dtype", "head_dim"), [("fp16", 64), ("fp16", 128)])
def test_tiles_that_ship_under_the_interpreter(dtype, head_dim, check_against_truth):
    if torch.cuda.is_available():
        pytest.skip("the GPU runs these tiles in every test")
    shipped = tiles.tiles_for(head_dim, DTYPES[dtype], (9, 0), AttentionMask(-1, -1, 0.0, 1.0, None, None))
    inputs, upstream, cu_seqlens = packed([63, 64, 65, 130], 2, 1, head_dim, DTYPES[dtype], "cpu")
    with mock.patch.object(tiles, "INTERPRETER", shipped), mock.patch.object(tile_list, "TILE_ROWS", 128):
        check_against_truth(varlen_attention, reference.varlen_attention, inputs, upstream, cu_seqlens, 130)


def test_slices_of_a_fused_projection(device, gradients):
    """Strided q, k, v and upstream gradients, here expanded ones too, give what their contiguous copies give."""
    lengths, num_tokens = [17, 40], 60
    fused = torch.randn(num_tokens, 4 * 32, device=device)
    q, k, v = fused.split([64, 32, 32], dim=1)
    inputs = [q.unflatten(1, (2, 32)), k.unflatten(1, (1, 32)), v.unflatten(1, (1, 32))]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    expected = gradients(varlen_attention, inputs, torch.ones(num_tokens, 2, 32, device=device), cu_seqlens, 40)
    leaf = fused.clone().requires_grad_()
    q, k, v = leaf.split([64, 32, 32], dim=1)
    output = varlen_attention(q.unflatten(1, (2, 32)), k.unflatten(1, (1, 32)), v.unflatten(1, (1, 32)), cu_seqlens, 40)
    (gradient,) = torch.autograd.grad(output, leaf, torch.ones(1, device=device).expand(output.shape))
    assert torch.equal(output, expected[0])
    assert torch.equal(gradient, torch.cat([x.flatten(1) for x in expected[1:]], dim=1))


@pytest.mark.parametrize("alone", [0, 1, 2])
def test_each_gradient_alone(device, alone, gradients):
    inputs, upstream, cu_seqlens = packed([5, 35], 2, 1, 32, torch.float32, device)
    expected = gradients(varlen_attention, inputs, upstream, cu_seqlens, 35)[1 + alone]
    inputs[alone].requires_grad_()
    (gradient,) = torch.autograd.grad(varlen_attention(*inputs, cu_seqlens, 35), inputs[alone], upstream)
    assert torch.equal(gradient, expected)


def test_large_scores_do_not_overflow(device, gradients):
    """Scores of thousands: exp would overflow anywhere but behind the running maximum."""
    inputs, upstream, cu_seqlens = packed([9, 50], 2, 2, 32, torch.float32, device)
    inputs = [inputs[0] * 60, inputs[1] * 60, inputs[2]]
    computed = gradients(varlen_attention, inputs, upstream, cu_seqlens, 50)
    truth = reference.varlen_attention(*[x.double() for x in inputs], cu_seqlens, 50)
    torch.testing.assert_close(computed[0].double(), truth, rtol=0, atol=5e-3)
    assert all(tensor.isfinite().all() for tensor in computed)


@pytest.mark.parametrize("window_size", [(-1, -1), (9, 3)])
@pytest.mark.parametrize("softmax_scale", [-0.3, 0.0, -0.0, 1e-45, 0.3])
def test_any_finite_scale(device, softmax_scale, window_size, check_against_truth):
    """The maximum is taken before the scale: a negative one turns it round, and zero must not meet -inf."""
    inputs, upstream, cu_seqlens = packed(LENGTHS[device], 2, 1, 32, torch.float32, device)
    settings = {"window_size": window_size, "softmax_scale": softmax_scale}
    check_against_truth(varlen_attention, reference.varlen_attention, inputs, upstream, cu_seqlens, 1000, **settings)


def test_reference_is_softmax_attention():
    """The specification itself, against torch's own attention."""
    inputs, _, cu_seqlens = packed([4, 9], 4, 2, 16, torch.float64, "cpu", tail=0)
    output = reference.varlen_attention(*inputs, cu_seqlens, 9, window_size=(-1, 0))
    for start, stop in [(0, 4), (4, 13)]:
        q, k, v = (x[start:stop].transpose(0, 1)[None] for x in inputs)
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.testing.assert_close(output[start:stop], expected[0].transpose(0, 1), rtol=0, atol=1e-12)


def test_kernels_import_neither_the_engine_nor_the_reference():
    folder = Path(reference.__file__).parent
    assert not (folder / "__init__.py").exists()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not any(name.name.startswith("bivec") for name in node.names), path.name
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level <= len(path.relative_to(folder).parts), f"{path.name} reaches out of kernels/"
                assert node.module != "reference", f"{path.name} must not import the specification"
