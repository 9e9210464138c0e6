"""The contrastive loss in eager PyTorch by chunks of rows, in float32: where Triton does not run.

    logits = queries[chunk] @ keys.T                                  # the only matrix with M columns
    row_loss, gradient = softmax cross-entropy of logits / temperature, in the logits' own memory
    grad_queries[chunk] = gradient @ keys;  grad_keys += gradient.T @ queries[chunk]

A chunk's log-sum-exp is known as soon as its logits are, so forward and backward are three products and nothing is
multiplied twice. `N` queries, `M` keys, `E` embedding size.
"""

import torch
from torch import Tensor

from ..chunks import accumulate, multiply

LOGITS_BYTES = 32 * 2**20  # float32 logits held at a time: a CPU has caches
CACHED_ELEMENTS = 2**18  # of the logits that are worked on at once
NORM_EPS = 1e-12  # torch.nn.functional.normalize's
# the score of a masked key: finite, so that probability zero times it is zero
MASKED = -1e30


def _masked_scores(logits: Tensor, targets: Tensor, groups: Tensor | None, temperature: Tensor) -> Tensor:
    scores = logits.div_(temperature)
    if groups is not None:
        masked = (groups[None, :] == groups[targets][:, None]) | (groups < 0)[None, :]
        masked.scatter_(1, targets[:, None], False)
        scores.masked_fill_(masked, MASKED)
    return scores


def _differentiate_rows(logits, gradient, targets, groups, column_lse, temperature, loss, dot) -> None:
    """Each row's loss, d loss / d scores in the logits' own memory where needed, and its dot product with the scores.

    A few rows at a time, so that the many passes find them in the cache.
    """
    step = max(1, CACHED_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        written = None if gradient is None else gradient[rows]
        _differentiate_block(
            logits[rows], written, targets[rows], groups, column_lse, temperature, loss[rows], dot[rows]
        )


def _differentiate_block(logits, gradient, targets, groups, column_lse, temperature, loss, dot) -> None:
    scores = _masked_scores(logits, targets, groups, temperature)
    positive = scores.gather(1, targets[:, None])
    row_lse = scores.logsumexp(1, keepdim=True)
    loss.copy_((row_lse - positive)[:, 0])
    if column_lse is not None:
        loss.add_(column_lse[targets]).sub_(positive[:, 0])
    if gradient is None:
        return
    result = (scores - row_lse).exp_()
    minus_one = scores.new_full((1, 1), -1.0).expand_as(positive)
    result.scatter_add_(1, targets[:, None], minus_one)
    if column_lse is not None:
        result.add_((scores - column_lse).exp_()).scatter_add_(1, targets[:, None], minus_one)
    dot.copy_((result * scores).sum(1))
    gradient.copy_(result)


def _add_columns(logits, targets, groups, column_lse, temperature) -> None:
    scores = _masked_scores(logits, targets, groups, temperature)
    torch.logaddexp(column_lse, scores.logsumexp(0), out=column_lse)


def chunk_rows(num_queries: int, num_keys: int) -> int:
    """Queries to a chunk: a multiple of 64 whose logits stay about LOGITS_BYTES."""
    return min(num_queries, max(LOGITS_BYTES // (4 * num_keys) // 64, 1) * 64)


def column_log_sum_exp(
    queries: Tensor, keys: Tensor, targets: Tensor, groups: Tensor | None, temperature: Tensor, normalize: bool
) -> Tensor:
    """Log-sum-exp over the queries of each key's masked scores, (M,) float32."""
    unit_keys, _ = _unit_rows(keys, normalize)
    column_lse = torch.full((keys.shape[0],), MASKED, dtype=torch.float32, device=keys.device)
    step = chunk_rows(queries.shape[0], keys.shape[0])
    buffer = _rows_buffer(step, keys.shape[0], keys.device)
    for start in range(0, queries.shape[0], step):
        unit_queries, _ = _unit_rows(queries[start : start + step], normalize)
        logits = buffer[: unit_queries.shape[0]]
        multiply(unit_queries, unit_keys.T, logits)
        _add_columns(logits, targets[start : start + step], groups, column_lse, temperature)
    return column_lse


def loss_and_gradients(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    groups: Tensor | None,
    column_lse: Tensor | None,
    temperature: Tensor,
    normalize: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss; its gradients by queries and keys, empty unless needed; by the temperature as parts of a sum, (1,).

    With `column_lse` (M,), infinite where a key is nobody's positive, the loss is the average of both directions.
    Gradients have `gradient_dtype(queries.dtype)`.
    """
    device, num_queries = queries.device, queries.shape[0]
    weight = 1 / num_queries if column_lse is None else 0.5 / num_queries
    unit_keys, key_scales = _unit_rows(keys, normalize)
    losses, dots = (torch.zeros(num_queries, dtype=torch.float32, device=device) for _ in range(2))
    step = chunk_rows(num_queries, keys.shape[0])
    logits_buffer = _rows_buffer(step, keys.shape[0], device)
    rows_buffer = None
    grad_queries, grad_keys = queries.new_empty(0), keys.new_empty(0)
    if needs_gradient:
        rows_buffer = torch.empty((step, queries.shape[1]), dtype=torch.float32, device=device)
        grad_queries = torch.empty(queries.shape, dtype=gradient_dtype(queries.dtype), device=device)
        grad_keys = torch.zeros(keys.shape, dtype=torch.float32, device=device)
        factor = weight / temperature

    for start in range(0, num_queries, step):
        chunk = slice(start, min(start + step, num_queries))
        unit_queries, query_scales = _unit_rows(queries[chunk], normalize)
        rows = unit_queries.shape[0]
        logits = logits_buffer[:rows]
        multiply(unit_queries, unit_keys.T, logits)
        gradient = logits if needs_gradient else None
        _differentiate_rows(
            logits, gradient, targets[chunk], groups, column_lse, temperature, losses[chunk], dots[chunk]
        )
        if rows_buffer is not None:
            multiply(logits, unit_keys, rows_buffer[:rows])
            grad_queries[chunk] = _before_normalization(rows_buffer[:rows].mul_(factor), unit_queries, query_scales)
            accumulate(grad_keys, logits.T, unit_queries)

    grad_temperature = (dots.sum() * (-weight / temperature)).reshape(1)
    loss = losses.sum() * weight
    if not needs_gradient:
        return loss, grad_queries, grad_keys, grad_temperature
    for start in range(0, keys.shape[0], 4096):  # so that temporaries stay small
        chunk = slice(start, start + 4096)
        scales = None if key_scales is None else key_scales[chunk]
        _before_normalization(grad_keys[chunk].mul_(factor), unit_keys[chunk], scales)
    return loss, grad_queries, grad_keys.to(gradient_dtype(keys.dtype)), grad_temperature


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which gradients wait for the backward: an upstream loss scale must find float16's small ones unrounded."""
    return torch.float32 if dtype == torch.float16 else dtype


def _rows_buffer(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows, columns) with rows aligned for vector loads."""
    return torch.empty((rows, (columns + 15) // 16 * 16), dtype=torch.float32, device=device)[:, :columns]


def _unit_rows(rows: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None]:
    """Rows of length one, and what they were multiplied by, (rows, 1)."""
    if not normalize:
        return rows.float(), None
    scales = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(NORM_EPS).reciprocal_()
    return torch.mul(rows, scales, out=torch.empty(rows.shape, dtype=torch.float32, device=rows.device)), scales


def _before_normalization(gradient: Tensor, unit_rows: Tensor, scales: Tensor | None) -> Tensor:
    """(g - u (u . g)) * scale, in place: the gradient of the rows that `unit_rows` u were made from."""
    if scales is None:
        return gradient
    along = (gradient * unit_rows).sum(1, keepdim=True)
    return gradient.sub_(unit_rows * along).mul_(scales)
