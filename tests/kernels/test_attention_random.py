"""Dropout and the annealed mask: the words are Philox's, the statistics hold, forward and backward agree."""

import pytest
import torch

from bivec.kernels import reference
from bivec.kernels.attention import varlen_attention

SEEDS = [7, -1, 2**62 + 3, -(2**63)]


def drawn_mask(device, function, length, num_heads, seeds, **random):
    """The mask as the operator applies it: equal scores and one-hot values make the output its rows; (S, H, L, L)."""
    num_sequences = len(seeds)
    q = torch.zeros(num_sequences * length, num_heads, 64, device=device)
    v = torch.eye(length, 64, device=device)[:, None].repeat(num_sequences, num_heads, 1)
    cu_seqlens = torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length
    output = function(q, q, v, cu_seqlens, length, seeds=torch.tensor(seeds, device=device), **random)
    return (output > 0).unflatten(0, (num_sequences, length)).transpose(1, 2)[..., :length]


def test_philox_known_answers():
    """Random123's own test vectors for philox4x32-10."""
    for counter, key, expected in [
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, -1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]:
        words = reference._philox(torch.tensor(key), *(torch.tensor(word) for word in counter))
        assert tuple(word.item() for word in words) == expected


@pytest.mark.parametrize("length", [13, 50])
@pytest.mark.parametrize("random", [{"dropout_p": 0.3}, {"future_p": 0.4}])
def test_masks_are_the_reference_masks_bit_by_bit(device, random, length):
    """For short and tiled sequences, seeds of both signs, and heads beyond the first group."""
    mask = drawn_mask(device, varlen_attention, length, 2, SEEDS, **random)
    assert torch.equal(mask, drawn_mask(device, reference.varlen_attention, length, 2, SEEDS, **random))
    assert not torch.equal(mask[0], mask[1])


def test_keep_rate_and_independent_heads():
    mask = drawn_mask("cpu", reference.varlen_attention, 64, 8, SEEDS, dropout_p=0.3).double()
    deviation = (0.3 * 0.7 / mask.numel()) ** 0.5
    assert abs(mask.mean().item() - 0.7) < 4 * deviation
    correlation = torch.corrcoef(mask.flatten(2).flatten(0, 1)) - torch.eye(32, dtype=torch.float64)
    assert correlation.abs().max() < 5 / 64


def test_future_tokens_are_shown_at_the_rate_and_alike_to_all_heads():
    mask = drawn_mask("cpu", reference.varlen_attention, 64, 4, SEEDS, future_p=0.4)
    ahead = torch.ones(64, 64, dtype=torch.bool).triu(1)
    assert mask[:, :, ~ahead].all()
    assert (mask == mask[:, :1]).all()
    shown = mask[:, 0, ahead].double()
    assert abs(shown.mean().item() - 0.4) < 4 * (0.4 * 0.6 / shown.numel()) ** 0.5


def test_dropout_is_unbiased(device):
    """The mean over copies of a text with different seeds is what attention without dropout gives."""
    copies, length = 100, 6
    text = [torch.randn(length, 2, 32, device=device) for _ in range(3)]
    inputs = [tensor.repeat(copies, 1, 1) for tensor in text]
    cu_seqlens = torch.arange(copies + 1, dtype=torch.int32, device=device) * length
    seeds = torch.arange(copies, device=device)
    dropped = varlen_attention(*inputs, cu_seqlens, length, dropout_p=0.25, seeds=seeds).unflatten(0, (copies, length))
    plain = varlen_attention(*text, cu_seqlens[:2], length)
    deviation = dropped.std(0) / copies**0.5
    assert ((dropped.mean(0) - plain).abs() < 5 * deviation + 1e-6).all()


@pytest.mark.parametrize("random", [{"dropout_p": 0.2}, {"future_p": 0.5}, {"dropout_p": 0.5, "future_p": 0.3}])
def test_gradients_with_random_masks(device, random, check_against_truth):
    lengths = [11, 16, 45]
    inputs = [torch.randn(80, heads, 32, device=device) for heads in (4, 2, 2)]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    seeds = torch.tensor(SEEDS[:3], device=device)
    check_against_truth(
        varlen_attention,
        reference.varlen_attention,
        inputs,
        torch.randn_like(inputs[0]),
        cu_seqlens,
        45,
        seeds=seeds,
        window_size=(-1, 20),
        **random,
    )


def test_backward_draws_the_forward_mask(device):
    """Finite differences of the operator itself, in float32: the gradient belongs to this mask and to no other."""
    cu_seqlens = torch.tensor([0, 9, 44], dtype=torch.int32, device=device)
    inputs = [torch.randn(44, 2, 16, device=device, requires_grad=True) for _ in range(3)]
    random = {"dropout_p": 0.3, "future_p": 0.6, "seeds": torch.tensor(SEEDS[:2], device=device)}
    upstream = torch.randn(44, 2, 16, device=device)
    gradients = torch.autograd.grad(varlen_attention(*inputs, cu_seqlens, 35, **random), inputs, upstream)
    step = 1e-2
    for index, gradient in enumerate(gradients):
        direction = torch.randn_like(gradient)
        values = []
        for sign in (1, -1):
            moved = [x.detach() + sign * step * direction if i == index else x.detach() for i, x in enumerate(inputs)]
            values.append((varlen_attention(*moved, cu_seqlens, 35, **random).double() * upstream).sum())
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close((gradient.double() * direction).sum(), slope, rtol=2e-3, atol=2e-3)


def test_two_copies_of_a_text_differ_and_a_seed_means_the_same_anywhere(device):
    text = [torch.randn(20, 2, 32, device=device) for _ in range(3)]
    inputs = [torch.cat([tensor] * 3) for tensor in text]
    cu_seqlens = torch.arange(4, dtype=torch.int32, device=device) * 20
    seeds = torch.tensor([1, 2, 1], device=device)
    first, second, third = varlen_attention(*inputs, cu_seqlens, 20, dropout_p=0.1, seeds=seeds).split(20)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)


def test_annealed_chance_in_device_memory(device):
    inputs = [torch.randn(30, 2, 32, device=device) for _ in range(3)]
    cu_seqlens = torch.tensor([0, 10, 30], dtype=torch.int32, device=device)
    seeds = torch.tensor(SEEDS[:2], device=device)
    number = varlen_attention(*inputs, cu_seqlens, 20, future_p=0.3, seeds=seeds)
    tensor = varlen_attention(*inputs, cu_seqlens, 20, future_p=torch.tensor(0.3, device=device), seeds=seeds)
    assert torch.equal(number, tensor)
    causal = varlen_attention(*inputs, cu_seqlens, 20, future_p=0.0, seeds=seeds)
    torch.testing.assert_close(causal, varlen_attention(*inputs, cu_seqlens, 20, window_size=(-1, 0)))
