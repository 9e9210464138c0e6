"""The padded attention against float64 and against the reference's masks, whatever the parts it computes in."""

import pytest
import torch

from bivec.kernels import philox_numpy, reference
from bivec.kernels.attention import padded as attention_padded
from bivec.kernels.attention.padded import varlen_attention

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LENGTHS = [1, 0, 15, 16, 17, 33, 65, 14, 0, 16]  # some share a part, some do not
SEEDS = torch.tensor([7, -1, 2**62 + 3, -(2**63), 5, 2**63 - 1, -12345678901234, 0, 1, 2**32])


def packed(lengths, num_heads, num_kv_heads, head_dim, dtype=torch.float32, tail=5):
    """q, k, v, upstream gradient and cu_seqlens; the tail belongs to no sequence."""
    generator = torch.Generator().manual_seed(sum(lengths) + head_dim)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    tensors = [torch.randn(sum(lengths) + tail, n, head_dim, generator=generator).to(dtype) for n in heads]
    return tensors[:3], tensors[3], torch.tensor([0, *lengths]).cumsum(0).int()


@pytest.fixture(params=["parts", "one head a part"])
def parts(request, monkeypatch):
    """How the work is divided: as it ships, and with every head of every sequence on its own."""
    attention_padded._plan.cache_clear()
    if request.param != "parts":
        monkeypatch.setattr(attention_padded, "MAX_SCORES", 1)
    yield
    attention_padded._plan.cache_clear()


@pytest.mark.usefixtures("parts")
@pytest.mark.parametrize(
    "masks",
    [
        {"window_size": (-1, -1)},
        {"window_size": (-1, 0)},
        {"window_size": (3, -1)},
        {"window_size": (0, 40)},
        {"dropout_p": 0.3},
        {"future_p": 0.4, "window_size": (-1, 20)},
        {"future_p": 0.5},
        {"dropout_p": 0.3, "future_p": 0.0},
    ],
    ids=str,
)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(2, 2, 8), (6, 2, 48)])
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_output_and_gradients(check_against_truth, dtype, num_heads, num_kv_heads, head_dim, masks):
    inputs, upstream, cu_seqlens = packed(LENGTHS, num_heads, num_kv_heads, head_dim, DTYPES[dtype])
    computed = check_against_truth(
        varlen_attention, reference.varlen_attention, inputs, upstream, cu_seqlens, 65, seeds=SEEDS, **masks
    )
    for tensor in computed:
        assert not tensor[cu_seqlens[-1] :].any()


def test_similar_lengths_share_a_part_within_the_limits():
    lengths = [int(x) for x in torch.randint(0, 60, (300,), generator=torch.Generator().manual_seed(0))]
    groups = list(attention_padded._similar(lengths, 8))
    assert sorted(i for group in groups for i in group) == [i for i, length in enumerate(lengths) if length]
    assert len(groups) < 40
    for group in groups:
        padded, needed = len(group) * lengths[group[0]] ** 2, sum(lengths[i] ** 2 for i in group)
        assert len(group) == 1 or padded * 8 <= attention_padded.MAX_SCORES
        assert padded - needed <= max(attention_padded.FREE_WASTE, attention_padded.MAX_WASTE * padded)


@pytest.mark.parametrize("chunk", [1, 100, 2**14])
@pytest.mark.parametrize("length", [1, 3, 4, 13, 50])
def test_words_are_the_reference_words_bit_by_bit(monkeypatch, chunk, length):
    """In any chunks of counters, for every seed, both streams, and heads that do not start at 0."""
    monkeypatch.setattr(philox_numpy, "CHUNK", chunk)
    for stream in (reference.DROPOUT_STREAM, reference.FUTURE_STREAM):
        numbers = torch.stack([reference._uniform(seed, length, 5, stream)[2:] for seed in SEEDS])
        for chance in (0.3, numbers.flatten()[numbers.numel() // 2].item()):
            drawn = philox_numpy.draw_at_least(SEEDS, length, range(2, 5), stream, chance)
            assert torch.equal(drawn, numbers >= chance)


@pytest.mark.parametrize("alone", [0, 1, 2])
def test_each_gradient_alone(gradients, alone):
    inputs, upstream, cu_seqlens = packed([5, 35, 34], 2, 1, 32)
    expected = gradients(varlen_attention, inputs, upstream, cu_seqlens, 35)[1 + alone]
    inputs[alone].requires_grad_()
    (gradient,) = torch.autograd.grad(varlen_attention(*inputs, cu_seqlens, 35), inputs[alone], upstream)
    assert torch.equal(gradient, expected)


def test_backward_uses_the_forward_mask():
    """Finite differences of the function itself, in float64."""
    inputs, _, cu_seqlens = packed([9, 35, 0, 33], 2, 1, 8, torch.float64)
    random = {"dropout_p": 0.3, "future_p": 0.6, "seeds": SEEDS[:4]}

    def function(q, k, v):
        return varlen_attention(q, k, v, cu_seqlens, 35, **random)

    inputs = [tensor.requires_grad_() for tensor in inputs]
    torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("num_tokens", "num_sequences"), [(0, 0), (0, 3), (7, 0), (7, 2)])
def test_empty_batches_give_zeros(gradients, num_tokens, num_sequences):
    inputs = [torch.randn(num_tokens, 2, 8) for _ in range(3)]
    cu_seqlens = torch.zeros(num_sequences + 1, dtype=torch.int32)
    seeds = torch.zeros(num_sequences, dtype=torch.int64)
    for tensor in gradients(
        varlen_attention, inputs, torch.randn_like(inputs[0]), cu_seqlens, 0, dropout_p=0.5, seeds=seeds
    ):
        assert tensor.shape == inputs[0].shape
        assert not tensor.any()


def test_nothing_passes_between_sequences(gradients):
    """One full of NaN leaves the others of its part, and the tail, as they were."""
    inputs, upstream, cu_seqlens = packed([20, 19, 18], 2, 1, 16)
    clean = gradients(varlen_attention, inputs, upstream, cu_seqlens, 20)
    for tensor in (*inputs, upstream):
        tensor[20:39] = float("nan")
        tensor[57:] = float("nan")
    for tensor, expected in zip(gradients(varlen_attention, inputs, upstream, cu_seqlens, 20), clean, strict=True):
        assert tensor[20:39].isnan().all()
        others = torch.cat((tensor[:20], tensor[39:]))
        assert torch.equal(others, torch.cat((expected[:20], expected[39:])))


def test_strided_inputs_and_expanded_gradients(gradients):
    inputs, _, cu_seqlens = packed([17, 40], 2, 2, 16, tail=0)
    expected = gradients(varlen_attention, inputs, torch.ones(57, 2, 16), cu_seqlens, 40)
    fused = torch.stack(inputs, dim=1).requires_grad_()
    output = varlen_attention(*fused.unbind(1), cu_seqlens, 40)
    (gradient,) = torch.autograd.grad(output, fused, torch.ones(1).expand(output.shape))
    assert torch.equal(output, expected[0])
    assert torch.equal(gradient, torch.stack(expected[1:], dim=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout_p": 1.0}, r"dropout_p must be in \[0, 1\), got 1.0"),
        ({"future_p": -0.1}, r"future_p must be in \[0, 1\], got -0.1"),
        ({"dropout_p": 0.1}, "seeds must be given with dropout_p above 0 or future_p below 1, got None"),
        ({"future_p": 0.1, "seeds": SEEDS}, r"seeds must be int64 of shape \(2,\), got int64 \(10,\)"),
        ({"window_size": (-2, 0)}, "window_size must hold two bounds of at least 0"),
        ({"softmax_scale": float("inf")}, "softmax_scale must be finite, got inf"),
    ],
)
def test_arguments_are_checked(changes, message):
    inputs, _, cu_seqlens = packed([3, 4], 2, 1, 8)
    with pytest.raises(ValueError, match=message):
        varlen_attention(*inputs, cu_seqlens, 4, **changes)
