"""A sequence's result, bit by bit, whatever surrounds it; every element written."""

from unittest import mock

import pytest
import torch

from bivec.kernels.attention import varlen_attention

LENGTHS = {"cpu": [5, 16, 40, 17, 1], "cuda": [5, 64, 300, 65, 1, 129]}
RANDOM = {"dropout_p": 0.2, "future_p": 0.5}


def sequences(device, num_heads=4, num_kv_heads=2, head_dim=32, dtype=torch.float32):
    """A (q, k, v, upstream gradient) for each length."""
    generator = torch.Generator().manual_seed(0)
    heads = (num_heads, num_kv_heads, num_kv_heads, num_heads)
    return [
        [torch.randn(length, n, head_dim, generator=generator).to(device, dtype) for n in heads]
        for length in LENGTHS[device]
    ]


def run(gradients, texts, seeds, tail=0, spare=0, max_seqlen=300, fill=0.0, **random):
    """Output and gradients of a pack of texts, split by text; `spare` empty sequences and `tail` rows are unused."""
    device = texts[0][0].device
    packed = [
        torch.cat([*parts, parts[0].new_full((tail, *parts[0].shape[1:]), fill)]) for parts in zip(*texts, strict=True)
    ]
    lengths = [text[0].shape[0] for text in texts]
    cu_seqlens = torch.tensor([0, *lengths, *[0] * spare]).cumsum(0).to(device, torch.int32)
    seeds = torch.tensor([*seeds, *[0] * spare], device=device)
    tensors = gradients(varlen_attention, packed[:3], packed[3], cu_seqlens, max_seqlen, seeds=seeds, **random)
    return list(zip(*(tensor.split([*lengths, tail]) for tensor in tensors), strict=True))


def assert_same_bits(ours, theirs):
    for left, right in zip(ours, theirs, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("random", [{}, RANDOM], ids=["plain", "random"])
def test_neighbours_order_capacity_and_repetition_change_no_bit(device, gradients, random):
    texts = sequences(device)
    seeds = list(range(len(texts)))
    together = run(gradients, texts, seeds, **random)
    again = run(gradients, texts, seeds, **random)
    order = [3, 0, 4, 2, 1, *range(5, len(texts))]
    moved = run(
        gradients, [texts[i] for i in order], [seeds[i] for i in order], tail=70, spare=3, max_seqlen=1, **random
    )
    for place, text in enumerate(order):
        assert_same_bits(together[text], again[text])
        assert_same_bits(together[text], moved[place])
    for text in (0, 2):
        assert_same_bits(together[text], run(gradients, [texts[text]], [seeds[text]], tail=1, **random)[0])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_neighbours_change_no_bit_at_the_tiles_that_ship(gradients, head_dim, dtype):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    texts = sequences("cuda", head_dim=head_dim, dtype=dtype)
    together = run(gradients, texts, range(len(texts)))
    for _ in range(5):
        order = torch.randperm(len(texts)).tolist()
        moved = run(gradients, [texts[i] for i in order], order, tail=100)
        for place, text in enumerate(order):
            assert_same_bits(together[text], moved[place])


def test_every_element_is_written_and_the_tail_is_zero(device, gradients):
    """Memory that held NaN, and NaN in the unused rows of every input, leave no trace."""
    texts = sequences(device)
    expected = run(gradients, texts, range(len(texts)), tail=90)
    empty, empty_like = torch.empty, torch.empty_like

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    def poisoned_like(*args, **kwargs):
        return empty_like(*args, **kwargs).fill_(float("nan"))

    with mock.patch("torch.empty", poisoned), mock.patch("torch.empty_like", poisoned_like):
        written = run(gradients, texts, range(len(texts)), tail=90, fill=float("nan"))
    for ours, theirs in zip(written, expected, strict=True):
        assert_same_bits(ours, theirs)
    for tensor in written[-1]:
        assert tensor.shape[0] == 90
        assert not tensor.any()
