"""Truths in pieces are those of the whole, and a wrong result has no speed."""

import math

import pytest
import torch

from bivec.benchmarks import truth
from bivec.benchmarks.truth import attention_in_pieces, contrastive_in_pieces, largest_error, wrong
from bivec.kernels import reference


@pytest.mark.parametrize("window_size", [(-1, -1), (-1, 0), (2, 1)])
def test_attention_in_pieces_is_the_whole_one(monkeypatch, window_size):
    monkeypatch.setattr(truth, "QUERIES_AT_ONCE", 4)
    lengths = (1, 9, 4, 7)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(sum(lengths), heads, 8, generator=generator).double() for heads in (3, 1, 1, 3)]
    *leaves, upstream = (tensor.clone().requires_grad_() for tensor in inputs)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    output = reference.varlen_attention(*leaves, cu_seqlens, max(lengths), window_size=window_size)
    expected = [output, *torch.autograd.grad(output, leaves, upstream)]
    found = attention_in_pieces(inputs, lengths, window_size, torch.float64)
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_contrastive_in_pieces_is_the_whole_one(monkeypatch):
    monkeypatch.setattr(truth, "QUERIES_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(count, 6, generator=generator).double().requires_grad_() for count in (7, 14))
    loss = reference.contrastive_loss(queries, keys, temperature=0.1)
    expected = [loss, *torch.autograd.grad(loss, (queries, keys))]
    for ours, exact in zip(contrastive_in_pieces(queries, keys, 0.1), expected, strict=True):
        torch.testing.assert_close(ours, exact)


def test_the_largest_error_is_of_each_result_s_largest_value():
    truths = [torch.tensor([1.0, -4.0]), torch.tensor([100.0]), torch.empty(0)]
    results = [torch.tensor([1.0, -3.0]), torch.tensor([110.0]), torch.empty(0)]
    assert largest_error(results, truths) == 0.25
    results[1] = torch.tensor([math.nan])
    assert math.isnan(largest_error(results, truths))


def test_what_is_wrong():
    assert wrong(1e-2, torch.bfloat16) is None
    assert wrong(None, torch.bfloat16) is None
    assert wrong(0.3, torch.bfloat16) == "wrong: error 0.3 of the largest value, at most 0.04"
    assert "wrong" in str(wrong(math.nan, torch.bfloat16))
    # the eager version's own error tells better
    assert wrong(2e-3, torch.float32, eager_error=1e-3) is None
    assert wrong(9e-6, torch.float32, eager_error=4.5e-8) is None
    assert wrong(3e-4, torch.float32, eager_error=4.5e-8) == "wrong: error 0.0003 of the largest value, at most 1e-05"
    assert wrong(0.02, torch.bfloat16, eager_error=1e-3) == "wrong: error 0.02 of the largest value, at most 0.02"
