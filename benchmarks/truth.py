"""Correct results in pieces that fit into memory, and how far from them a result may be that is timed.

`T` packed tokens, `P` query heads of one key/value head, `D` head dimension; `N` queries, `M` keys, `E` embedding size.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

QUERIES_AT_ONCE = 1024
# of the largest value, where no eager version tells what rounding explains; a wrong mask, scale or index makes more
LARGEST_ERROR = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}

LEAST_ALLOWED = 1e-5  # an approximated exponential and another order of sums are not wrong; tests are stricter


def largest_error(results: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """The largest difference of each result from its truth, as a share of the truth's largest value; NaN stays NaN."""
    shares = [
        (got.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-300)
        for got, exact in zip(results, truth, strict=True)
        if exact.numel()
    ]
    return torch.stack(shares).max().item() if shares else 0.0


def wrong(error: float | None, dtype: torch.dtype, eager_error: float | None = None) -> str | None:
    """Why a result with this error has no speed, or None: four times the eager version's and some roundings are none.

    An error of None, of what cannot be compared, is none.
    """
    allowed = LARGEST_ERROR[dtype]
    if eager_error is not None and math.isfinite(eager_error):
        allowed = 4 * eager_error + max(2 * torch.finfo(dtype).eps, LEAST_ALLOWED)
    if error is None or error <= allowed:
        return None
    return f"wrong: error {error:.2g} of the largest value, at most {allowed:.2g}"


def attention_in_pieces(
    inputs: Sequence[Tensor], lengths: Sequence[int], window_size: tuple[int, int], dtype: torch.dtype
) -> list[Tensor]:
    """Attention's output and gradients by q, k and v, the products in `dtype`, the softmax in float32 or wider.

    Args:
        inputs: q (T, P, D), k and v (T, 1, D), upstream gradient (T, P, D); T is the sum of `lengths`.
    """
    q, k, v, upstream = (tensor.to(dtype) for tensor in inputs)
    wide = torch.promote_types(dtype, torch.float32)
    scale = q.shape[-1] ** -0.5
    output, grad_q = torch.empty_like(q), torch.empty_like(q)
    grad_k, grad_v = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        begin += length
        keys, values = k[rows, 0], v[rows, 0]
        left, right = (length if bound < 0 else bound for bound in window_size)
        for first in range(rows.start, rows.stop, QUERIES_AT_ONCE):
            chunk = slice(first, min(first + QUERIES_AT_ONCE, rows.stop))
            query, gradient = q[chunk].transpose(0, 1), upstream[chunk].transpose(0, 1)  # (P, C, D)
            places = torch.arange(rows.start, rows.stop, device=q.device)
            ahead = places - places[chunk.start - rows.start : chunk.stop - rows.start, None]
            scores = (query @ keys.T).to(wide) * scale
            probabilities = scores.masked_fill_((ahead < -left) | (ahead > right), -math.inf).softmax(-1)
            found = probabilities.to(dtype) @ values
            delta = (gradient * found).sum(-1, keepdim=True, dtype=wide)
            grad_scores = (probabilities * ((gradient @ values.T).to(wide) - delta) * scale).to(dtype)
            output[chunk], grad_q[chunk] = found.transpose(0, 1), (grad_scores @ keys).transpose(0, 1)
            grad_k[rows, 0] += (grad_scores.mT @ query).sum(0, dtype=wide)
            grad_v[rows, 0] += (probabilities.to(dtype).mT @ gradient).sum(0, dtype=wide)
    return [output, grad_q, grad_k, grad_v]


def contrastive_in_pieces(queries: Tensor, keys: Tensor, temperature: float) -> list[Tensor]:
    """The loss of the diagonal's positives and its gradients by queries (N, E) and keys (M, E), in float64."""
    queries, keys = (rows.detach().double().requires_grad_() for rows in (queries, keys))
    unit = F.normalize(queries, dim=1), F.normalize(keys, dim=1)
    rows, columns = (part.detach() for part in unit)
    grad_rows, grad_columns = torch.empty_like(rows), torch.zeros_like(columns)
    loss = rows.new_zeros(())
    for first in range(0, len(rows), QUERIES_AT_ONCE):
        chunk = rows[first : first + QUERIES_AT_ONCE]
        targets = torch.arange(first, first + len(chunk), device=rows.device)
        scores = chunk @ columns.T / temperature
        loss += F.cross_entropy(scores, targets, reduction="sum") / len(rows)
        gradient = scores.softmax(1)
        gradient[torch.arange(len(chunk), device=rows.device), targets] -= 1
        gradient /= temperature * len(rows)
        grad_rows[first : first + len(chunk)] = gradient @ columns
        grad_columns += gradient.T @ chunk
    return [loss, *torch.autograd.grad(unit, (queries, keys), (grad_rows, grad_columns))]
