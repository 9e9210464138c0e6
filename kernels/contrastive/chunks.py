"""The contrastive loss by chunks of rows: matrix products around one kernel that turns logits into their gradient.

    logits = queries[chunk] @ keys.T                                  # the only matrix with M columns
    row_loss, gradient = softmax cross-entropy of logits / temperature, in the logits' own memory
    grad_queries[chunk] = gradient @ keys;  grad_keys += gradient.T @ queries[chunk]

A chunk's log-sum-exp is known as soon as its logits are, so forward and backward are three products and nothing is
multiplied twice. `N` queries, `M` keys, `E` embedding size. Where Triton does not run, the same chunks go through eager
PyTorch in float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chunks import accumulate, multiply
from ..ragged import INTERPRETED, narrow

# float32 logits held at a time: each CUDA chunk adds into all M key gradients once, so few chunks; a CPU has caches
LOGITS_BYTES = {"cuda": 256 * 2**20, "cpu": 32 * 2**20}
CACHED_ELEMENTS = 2**18  # of the logits that eager PyTorch works on at once
# float16 probabilities of a large batch would be subnormal; |gradient| <= 2 leaves this much room
FLOAT16_GRADIENT_SCALE = 2.0**14
NORM_EPS = 1e-12  # torch.nn.functional.normalize's
# the score of a masked key: finite, so that probability zero times it is zero
MASKED = tl.constexpr(-1e30)


@triton.jit
def _mask_scores(scores, columns, targets, in_range, groups_ptr, target_groups, num_keys, HAS_GROUPS: tl.constexpr):
    """Scores with the false negatives masked, keys of the positive's group that are not the positive, and padding."""
    if HAS_GROUPS:
        groups = tl.load(groups_ptr + columns, mask=columns < num_keys, other=-1)
        in_range = in_range & (((groups != target_groups) & (groups >= 0)) | (columns == targets))
    return tl.where(in_range, scores, MASKED)


@triton.jit
def _contrastive_rows_kernel(
    logits_ptr,
    gradient_ptr,
    targets_ptr,
    groups_ptr,
    column_lse_ptr,
    temperature_ptr,
    loss_ptr,
    dot_ptr,
    num_keys,
    stride_logits,
    stride_gradient,
    gradient_scale,
    HAS_GROUPS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    inverse_temperature = 1.0 / tl.load(temperature_ptr)
    logits_ptr += row * stride_logits
    gradient_ptr += row * stride_gradient
    positive = tl.load(logits_ptr + target) * inverse_temperature
    target_group = 0
    if HAS_GROUPS:
        target_group = tl.load(groups_ptr + target)

    maximum = positive  # always visible, so never the masked value
    total = 0.0
    for start in tl.range(0, num_keys, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        in_range = columns < num_keys
        scores = tl.load(logits_ptr + columns, mask=in_range, other=0.0) * inverse_temperature  # [BLOCK_N]
        scores = _mask_scores(scores, columns, target, in_range, groups_ptr, target_group, num_keys, HAS_GROUPS)
        larger = tl.maximum(maximum, tl.max(scores, axis=0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(scores - larger), axis=0)
        maximum = larger
    lse = maximum + tl.log(total)
    loss = lse - positive
    if SYMMETRIC:
        loss += tl.load(column_lse_ptr + target) - positive
    tl.store(loss_ptr + row, loss)

    if HAS_GRADIENT:
        dot = 0.0
        for start in tl.range(0, num_keys, BLOCK_N):
            columns = start + tl.arange(0, BLOCK_N)
            in_range = columns < num_keys
            scores = tl.load(logits_ptr + columns, mask=in_range, other=0.0) * inverse_temperature  # [BLOCK_N]
            scores = _mask_scores(scores, columns, target, in_range, groups_ptr, target_group, num_keys, HAS_GROUPS)
            gradient = tl.exp(scores - lse)
            gradient = tl.where(columns == target, gradient - 1.0, gradient)
            if SYMMETRIC:
                column_lse = tl.load(column_lse_ptr + columns, mask=in_range, other=float("inf"))
                gradient += tl.exp(scores - column_lse)
                gradient = tl.where(columns == target, gradient - 1.0, gradient)
            dot += tl.sum(gradient * scores, axis=0)
            narrowed = narrow(gradient * gradient_scale, gradient_ptr.dtype.element_ty, UPCAST)
            tl.store(gradient_ptr + columns, narrowed, mask=in_range)
        tl.store(dot_ptr + row, dot)


@triton.jit
def _contrastive_columns_kernel(
    logits_ptr,
    targets_ptr,
    groups_ptr,
    column_lse_ptr,
    temperature_ptr,
    num_rows,
    num_keys,
    stride_logits,
    HAS_GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add a chunk's rows to the running log-sum-exp of each column."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inverse_temperature = 1.0 / tl.load(temperature_ptr)
    maximum = tl.full([BLOCK_N], MASKED, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in tl.range(0, num_rows, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        in_range = (rows < num_rows)[:, None] & (columns < num_keys)[None, :]
        targets = tl.load(targets_ptr + rows, mask=rows < num_rows, other=0)
        target_groups = targets
        if HAS_GROUPS:
            target_groups = tl.load(groups_ptr + targets)
        ptrs = logits_ptr + rows.to(tl.int64)[:, None] * stride_logits + columns[None, :]
        scores = tl.load(ptrs, mask=in_range, other=0.0) * inverse_temperature  # [BLOCK_M, BLOCK_N]
        scores = _mask_scores(
            scores,
            columns[None, :],
            targets[:, None],
            in_range,
            groups_ptr,
            target_groups[:, None],
            num_keys,
            HAS_GROUPS,
        )
        larger = tl.maximum(maximum, tl.max(scores, axis=0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(scores - larger[None, :]), axis=0)
        maximum = larger
    before = tl.load(column_lse_ptr + columns, mask=columns < num_keys, other=MASKED)
    larger = tl.maximum(maximum, before)
    lse = larger + tl.log(tl.exp(before - larger) + total * tl.exp(maximum - larger))
    tl.store(column_lse_ptr + columns, lse, mask=columns < num_keys)


def launch_rows(
    logits: Tensor,
    gradient: Tensor | None,
    targets: Tensor,
    groups: Tensor | None,
    column_lse: Tensor | None,
    temperature: Tensor,
    loss: Tensor,
    dot: Tensor,
    gradient_scale: float,
) -> None:
    """Each row's loss, d loss / d scores times `gradient_scale` into `gradient`, and its dot product with the scores.

    `logits` (rows, M) float32 before the temperature, with `gradient` allowed to be the same memory; `loss` and `dot`
    (rows,).
    """
    num_rows, num_keys = logits.shape
    written = logits if gradient is None else gradient
    block_n = min(triton.next_power_of_2(num_keys), 4096)
    _contrastive_rows_kernel[(num_rows,)](
        logits_ptr=logits,
        gradient_ptr=written,
        targets_ptr=targets,
        groups_ptr=targets if groups is None else groups,
        column_lse_ptr=loss if column_lse is None else column_lse,
        temperature_ptr=temperature,
        loss_ptr=loss,
        dot_ptr=dot,
        num_keys=num_keys,
        stride_logits=logits.stride(0),
        stride_gradient=written.stride(0),
        gradient_scale=gradient_scale,
        HAS_GROUPS=groups is not None,
        SYMMETRIC=column_lse is not None,
        HAS_GRADIENT=gradient is not None,
        UPCAST=INTERPRETED and written.dtype == torch.bfloat16,
        BLOCK_N=block_n,
        num_warps=8 if block_n >= 2048 else 4,
    )


def launch_columns(
    logits: Tensor, targets: Tensor, groups: Tensor | None, column_lse: Tensor, temperature: Tensor
) -> None:
    num_rows, num_keys = logits.shape
    block_m, block_n = 16, 128  # 32 rows spill on sm_80
    _contrastive_columns_kernel[(triton.cdiv(num_keys, block_n),)](
        logits_ptr=logits,
        targets_ptr=targets,
        groups_ptr=targets if groups is None else groups,
        column_lse_ptr=column_lse,
        temperature_ptr=temperature,
        num_rows=num_rows,
        num_keys=num_keys,
        stride_logits=logits.stride(0),
        HAS_GROUPS=groups is not None,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=4,
    )


def runs_kernel(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and INTERPRETED)


def _eager_scores(logits: Tensor, targets: Tensor, groups: Tensor | None, temperature: Tensor) -> Tensor:
    scores = logits.div_(temperature)
    if groups is not None:
        masked = (groups[None, :] == groups[targets][:, None]) | (groups < 0)[None, :]
        masked.scatter_(1, targets[:, None], False)
        scores.masked_fill_(masked, MASKED.value)
    return scores


def _eager_rows(logits, gradient, targets, groups, column_lse, temperature, loss, dot, gradient_scale) -> None:
    """`launch_rows` in PyTorch, a few rows at a time, so that its many passes find them in the cache.

    The gradient is not scaled, because float32 needs no scale.
    """
    step = max(1, CACHED_ELEMENTS // logits.shape[1])
    for start in range(0, logits.shape[0], step):
        rows = slice(start, start + step)
        written = None if gradient is None else gradient[rows]
        _eager_block(logits[rows], written, targets[rows], groups, column_lse, temperature, loss[rows], dot[rows])


def _eager_block(logits, gradient, targets, groups, column_lse, temperature, loss, dot) -> None:
    scores = _eager_scores(logits, targets, groups, temperature)
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


def _eager_columns(logits, targets, groups, column_lse, temperature) -> None:
    scores = _eager_scores(logits, targets, groups, temperature)
    torch.logaddexp(column_lse, scores.logsumexp(0), out=column_lse)


def chunk_rows(num_queries: int, num_keys: int, device: torch.device) -> int:
    """Queries to a chunk: a multiple of 64 whose float32 logits stay about LOGITS_BYTES."""
    budget = LOGITS_BYTES["cuda" if device.type == "cuda" else "cpu"]
    return min(num_queries, max(budget // (4 * num_keys) // 64, 1) * 64)


def column_log_sum_exp(
    queries: Tensor, keys: Tensor, targets: Tensor, groups: Tensor | None, temperature: Tensor, normalize: bool
) -> Tensor:
    """Log-sum-exp over the queries of each key's masked scores, (M,) float32."""
    device = queries.device
    dtype = queries.dtype if runs_kernel(device) else torch.float32
    add_columns = launch_columns if runs_kernel(device) else _eager_columns
    unit_keys, _ = _unit_rows(keys, normalize, dtype)
    column_lse = torch.full((keys.shape[0],), MASKED.value, dtype=torch.float32, device=device)
    step = chunk_rows(queries.shape[0], keys.shape[0], device)
    buffer = _rows_buffer(step, keys.shape[0], torch.float32, device)
    for start in range(0, queries.shape[0], step):
        unit_queries, _ = _unit_rows(queries[start : start + step], normalize, dtype)
        logits = buffer[: unit_queries.shape[0]]
        multiply(unit_queries, unit_keys.T, logits)
        add_columns(logits, targets[start : start + step], groups, column_lse, temperature)
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
    """The loss and its gradients by queries, keys and temperature; the gradients are empty unless needed.

    With `column_lse` (M,), infinite where a key is nobody's positive, the loss is the average of both directions.
    Gradients have `gradient_dtype(queries.dtype)`.
    """
    device, num_queries = queries.device, queries.shape[0]
    dtype = queries.dtype if runs_kernel(device) else torch.float32
    differentiate_rows = launch_rows if runs_kernel(device) else _eager_rows
    scale = FLOAT16_GRADIENT_SCALE if dtype == torch.float16 else 1.0
    weight = 1 / num_queries if column_lse is None else 0.5 / num_queries

    unit_keys, key_scales = _unit_rows(keys, normalize, dtype)
    losses, dots = (torch.zeros(num_queries, dtype=torch.float32, device=device) for _ in range(2))
    step = chunk_rows(num_queries, keys.shape[0], device)
    logits_buffer = _rows_buffer(step, keys.shape[0], torch.float32, device)
    gradient_buffer = rows_buffer = None
    grad_queries, grad_keys = queries.new_empty(0), keys.new_empty(0)
    if needs_gradient:
        # products of 16-bit gradients need them in a matrix of their own
        in_place = dtype == torch.float32
        gradient_buffer = logits_buffer if in_place else _rows_buffer(step, keys.shape[0], dtype, device)
        rows_buffer = torch.empty((step, queries.shape[1]), dtype=torch.float32, device=device)
        grad_queries = torch.empty(queries.shape, dtype=gradient_dtype(queries.dtype), device=device)
        grad_keys = torch.zeros(keys.shape, dtype=torch.float32, device=device)
        factor = weight / scale / temperature

    for start in range(0, num_queries, step):
        chunk = slice(start, min(start + step, num_queries))
        unit_queries, query_scales = _unit_rows(queries[chunk], normalize, dtype)
        rows = unit_queries.shape[0]
        logits = logits_buffer[:rows]
        gradient = None if gradient_buffer is None else gradient_buffer[:rows]
        multiply(unit_queries, unit_keys.T, logits)
        differentiate_rows(
            logits, gradient, targets[chunk], groups, column_lse, temperature, losses[chunk], dots[chunk], scale
        )
        if gradient is not None and rows_buffer is not None:
            multiply(gradient, unit_keys, rows_buffer[:rows])
            grad_queries[chunk] = _before_normalization(rows_buffer[:rows].mul_(factor), unit_queries, query_scales)
            accumulate(grad_keys, gradient.T, unit_queries)

    grad_temperature = dots.sum() * (-weight / temperature)
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


def _rows_buffer(rows: int, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, columns) with rows aligned for vector loads."""
    return torch.empty((rows, (columns + 15) // 16 * 16), dtype=dtype, device=device)[:, :columns]


def _unit_rows(rows: Tensor, normalize: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Rows of length one in `dtype`, and what they were multiplied by, (rows, 1) float32."""
    if not normalize:
        return rows.to(dtype), None
    scales = torch.linalg.vector_norm(rows, dim=1, keepdim=True, dtype=torch.float32).clamp_min_(NORM_EPS).reciprocal_()
    return torch.mul(rows, scales, out=torch.empty(rows.shape, dtype=dtype, device=rows.device)), scales


def _before_normalization(gradient: Tensor, unit_rows: Tensor, scales: Tensor | None) -> Tensor:
    """(g - u (u . g)) * scale, in place: the gradient of the rows that `unit_rows` u were made from."""
    if scales is None:
        return gradient
    along = (gradient * unit_rows).sum(1, keepdim=True)
    return gradient.sub_(unit_rows * along).mul_(scales)
