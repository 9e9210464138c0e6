"""Which keys run without a mask: the ranges against all pairs, and attention at every place of a window's edges."""

import itertools

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.kernels import reference
from bivec.kernels.attention import varlen_attention
from bivec.kernels.attention.masks import UNBOUNDED, visible_range

BLOCK, OTHER = 32, 16


@triton.jit(do_not_specialize=["start", "length", "before", "after"])
def _range_kernel(
    out_ptr,
    start,
    length,
    before,
    after,
    BLOCK: tl.constexpr,
    OTHER: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    HAS_FUTURE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    begin, end, full_begin, full_end = visible_range(
        start, length, before, after, BLOCK, OTHER, HAS_WINDOW, HAS_FUTURE, TRANSPOSED
    )
    tl.store(out_ptr, begin)
    tl.store(out_ptr + 1, end)
    tl.store(out_ptr + 2, full_begin)
    tl.store(out_ptr + 3, full_end)


BOUND = st.one_of(st.just(UNBOUNDED), st.integers(0, 100))


@settings(max_examples=200, derandomize=True, deadline=None)
@given(
    length=st.integers(1, 150),
    block=st.integers(0, 4),
    before=BOUND,
    after=BOUND,
    annealed=st.booleans(),
    transposed=st.booleans(),
)
def test_ranges_hold_what_all_pairs_say(length, block, before, after, annealed, transposed):
    start = block * BLOCK
    if start >= length:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = torch.zeros(4, dtype=torch.int32, device=device)
    windowed = before < UNBOUNDED or after < UNBOUNDED
    _range_kernel[(1,)](out, start, length, before, after, BLOCK, OTHER, windowed, annealed, transposed)
    begin, end, full_begin, full_end = out.tolist()
    rows = torch.arange(start, min(start + BLOCK, length))[:, None]
    others = torch.arange(length)[None, :]
    visible = (others >= rows - before) & (others <= rows + after)
    sure = visible & ((others >= rows) if transposed else (others <= rows)) if annealed else visible
    seen = visible.any(0).nonzero().flatten().tolist()
    assert begin <= min(seen)
    assert end == max(seen) + 1, "nothing behind the last one that is seen"
    assert begin > min(seen) - OTHER, "no block before the first one that is seen"
    assert sure[:, full_begin:full_end].all()
    # every whole block that all see is among them
    whole = [n for n in range(0, length - OTHER + 1, OTHER) if sure[:, n : n + OTHER].all()]
    assert list(range(full_begin, full_end, OTHER)) == whole
    assert full_begin >= begin
    assert full_end <= max(end, full_begin)


# around the blocks, so that edges fall on, before and after their ends, with and without whole blocks between them
EDGES = [(31, 31), (32, 47), (33, 48), (47, 15), (48, 33), (49, 64), (63, 0), (64, 32), (65, 17), (-1, 16), (46, -1)]


@pytest.mark.parametrize(("window_size", "group_size"), list(zip(EDGES, itertools.cycle([1, 2]))))
def test_a_window_at_every_place(device, window_size, group_size, check_against_truth):
    """Several blocks on both sides of the boundary, forward and backward."""
    factor = 1 if device == "cpu" else 4
    lengths = [100 * factor]
    inputs = [
        torch.randn(sum(lengths) + 3, heads, 16, device=device, dtype=torch.float16) for heads in (group_size, 1, 1)
    ]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    window = tuple(bound * factor if bound > 0 else bound for bound in window_size)
    check_against_truth(
        varlen_attention,
        reference.varlen_attention,
        inputs,
        torch.randn_like(inputs[0]),
        cu_seqlens,
        max(lengths),
        window_size=window,
    )


@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (70, 20)])
@pytest.mark.parametrize("random", [{"future_p": 0.5}, {"future_p": 0.5, "dropout_p": 0.2}])
def test_annealed_masks_that_leave_whole_blocks(device, window_size, random, check_against_truth):
    lengths = [100, 66]
    inputs = [torch.randn(170, heads, 16, device=device, dtype=torch.float16) for heads in (2, 1, 1)]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    check_against_truth(
        varlen_attention,
        reference.varlen_attention,
        inputs,
        torch.randn_like(inputs[0]),
        cu_seqlens,
        100,
        window_size=window_size,
        seeds=torch.tensor([3, -4], device=device),
        **random,
    )
