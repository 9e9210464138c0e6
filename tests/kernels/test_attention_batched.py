"""Attention in batches against float64, over every padded length's edges, and bitwise whatever the company."""

import pytest
import torch

from bivec.kernels import reference
from bivec.kernels.attention.batched import LENGTHS, batched_attention, plan_batches

EDGES = [16, 17, 0, 31, 32, 33, 129, 128, 1, 160, 161, 17, 40, 512, 513, 9, 300]
WINDOWS = [(-1, -1), (-1, 0), (3, 2), (0, -1), (700, 700)]


def heads_of(lengths, num_heads=6, num_groups=2, head_dim=24, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(lengths))
    shape = (sum(lengths), num_heads + 2 * num_groups, head_dim)
    heads = (2 * torch.randn(shape, generator=generator)).to(dtype)
    return heads.tensor_split([num_heads, num_heads + num_groups], dim=1)  # views, as a layer gives them


def attend(query, key, value, lengths, window=(-1, -1)):
    """NaN where nothing is written."""
    out = torch.full(query.shape, torch.nan)
    batched_attention(query, key, value, plan_batches(lengths, key.shape[1]), window, out)
    return out


@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize(("num_heads", "num_groups", "head_dim"), [(6, 2, 24), (2, 2, 64), (3, 1, 8)])
def test_agrees_with_float64(num_heads, num_groups, head_dim, window):
    heads = heads_of(EDGES, num_heads, num_groups, head_dim)
    cu_seqlens = torch.tensor([0, *EDGES]).cumsum(0).int()
    truth, eager = (
        reference.varlen_attention(*(part.to(dtype) for part in heads), cu_seqlens, 513, window_size=window).double()
        for dtype in (torch.float64, torch.bfloat16)
    )
    found = attend(*heads, EDGES, window).split(EDGES)
    for length, ours, exact, theirs in zip(EDGES, found, truth.split(EDGES), eager.split(EDGES), strict=True):
        if length not in LENGTHS:
            assert ours.isnan().all()
            continue
        baseline = (theirs - exact).abs().max().item()
        step = torch.finfo(torch.bfloat16).eps * exact.abs().max().item()
        assert (ours.double() - exact).abs().max().item() <= 2 * baseline + step, length


def test_a_sequence_has_the_same_bits_in_any_company():
    lengths = [length for length in EDGES if length in LENGTHS]
    heads = heads_of(lengths)
    together = attend(*heads, lengths)
    parts = [part.split(lengths) for part in (*heads, together)]
    for length, *alone, expected in zip(lengths, *parts, strict=True):
        assert torch.equal(attend(*alone, [length]), expected), length
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(1)).tolist()
    permuted = [torch.cat([part[place] for place in order]) for part in parts]
    assert torch.equal(attend(*permuted[:3], [lengths[place] for place in order]), permuted[3])


def test_neighbours_of_any_magnitude_do_not_reach_a_sequence():
    lengths = [20, 25, 30]
    query, key, value = (part.clone() for part in heads_of(lengths))
    expected = attend(query, key, value, lengths)[:20]
    for part in (query, key, value):
        part[20:45], part[45:] = torch.inf, torch.nan
    assert torch.equal(attend(query, key, value, lengths)[:20], expected)


def test_large_scores_do_not_overflow():
    query, key, value = heads_of([50])
    found = attend(query * 1e3, key * 1e3, value, [50])
    assert found.isfinite().all()
    chosen = torch.einsum("qhd,khd->hqk", query, key.repeat_interleave(3, 1)).argmax(-1)  # softmax takes the largest
    expected = value.bfloat16().float().repeat_interleave(3, 1)[chosen.T, torch.arange(6)]
    assert (found - expected).abs().amax(-1).median() == 0


def test_other_lengths_are_in_no_part():
    assert plan_batches([], 2) == []
    assert plan_batches([LENGTHS.start - 1, LENGTHS.stop, 0], 2) == []


def test_the_output_may_be_of_another_dtype():
    heads = heads_of([40, 3, 41])
    parts = plan_batches([40, 3, 41], 2)
    whole, rounded = torch.zeros(heads[0].shape), torch.zeros(heads[0].shape, dtype=torch.bfloat16)
    for out in (whole, rounded):
        batched_attention(*heads, parts, (-1, -1), out)
    assert torch.equal(whole.bfloat16(), rounded)
    assert not whole[40:43].any()
