"""The kernels of a small batch's contrastive loss; `small.py` launches them.

`N` queries, `M` keys, `E` embedding size. A temperature is a number or a pointer to one, targets of None the diagonal.
"""

import triton
import triton.language as tl

from ..ragged import matmul, narrow
from .rows import inverse_norm, log1p
from .scores import MASKED


@triton.jit
def _load_number(number, IN_MEMORY: tl.constexpr):
    """A temperature: on the device, or given with the launch."""
    return tl.load(number) if IN_MEMORY else tl.cast(number, tl.float32)


@triton.jit
def _load_targets(targets_ptr, rows, in_range):
    """Of rows [BLOCK]; None is the diagonal."""
    if targets_ptr is None:
        return tl.where(in_range, rows, 0)
    else:
        return tl.load(targets_ptr + rows, mask=in_range, other=0).to(tl.int32)


@triton.jit
def _is_visible(columns, targets, groups_ptr, num_keys, HAS_GROUPS: tl.constexpr):
    """[BLOCK, BLOCK]: keys in range that are the row's positive, or neither of its group nor padding."""
    in_range = columns < num_keys
    visible = in_range[None, :]
    if HAS_GROUPS:
        target_groups = tl.load(groups_ptr + targets)
        groups = tl.load(groups_ptr + columns, mask=in_range, other=-1)
        negative = (groups[None, :] != target_groups[:, None]) & (groups >= 0)[None, :]
        visible = visible & (negative | (columns[None, :] == targets[:, None]))
    return visible


@triton.jit
def _contrastive_small_scores_kernel(
    queries_ptr,
    keys_ptr,
    targets_ptr,
    groups_ptr,
    temperature,
    scores_ptr,
    query_scales_ptr,
    key_scales_ptr,
    row_lse_ptr,
    column_lse_ptr,
    num_queries,
    num_keys,
    size,
    num_column_tiles,
    stride_scores,
    stride_qn,
    stride_qe,
    stride_km,
    stride_ke,
    HAS_GROUPS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_tile, column_tile = tl.program_id(0), tl.program_id(1)
    rows, columns = row_tile * BLOCK + tl.arange(0, BLOCK), column_tile * BLOCK + tl.arange(0, BLOCK)
    row_in_range, column_in_range = rows < num_queries, columns < num_keys
    queries_ptrs = queries_ptr + rows.to(tl.int64)[:, None] * stride_qn
    keys_ptrs = keys_ptr + columns.to(tl.int64)[None, :] * stride_km
    products = tl.zeros([BLOCK, BLOCK], tl.float32)
    query_squares, key_squares = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in tl.range(0, size, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask = row_in_range[:, None] & (offs_k < size)[None, :]
        queries = tl.load(queries_ptrs + offs_k[None, :] * stride_qe, mask=mask, other=0.0)  # [BLOCK, BLOCK_K]
        mask = column_in_range[None, :] & (offs_k < size)[:, None]
        keys = tl.load(keys_ptrs + offs_k[:, None] * stride_ke, mask=mask, other=0.0)  # [BLOCK_K, BLOCK]
        products = matmul(queries, keys, products, UPCAST)
        if NORMALIZE:
            queries, keys = queries.to(tl.float32), keys.to(tl.float32)
            query_squares += tl.sum(queries * queries, axis=1)
            key_squares += tl.sum(keys * keys, axis=0)
    query_scales = inverse_norm(query_squares, NORMALIZE)
    key_scales = inverse_norm(key_squares, NORMALIZE)
    # whoever writes, writes the same
    tl.store(query_scales_ptr + rows, query_scales, mask=row_in_range)
    tl.store(key_scales_ptr + columns, key_scales, mask=column_in_range)

    targets = _load_targets(targets_ptr, rows, row_in_range)
    scores = products * query_scales[:, None] * key_scales[None, :] * (1.0 / _load_number(temperature, IN_MEMORY))
    visible = _is_visible(columns, targets, groups_ptr, num_keys, HAS_GROUPS)
    scores = tl.where(visible & row_in_range[:, None], scores, MASKED)
    tl.store(scores_ptr + rows.to(tl.int64)[:, None] * stride_scores + columns[None, :], scores)
    negatives = tl.where(columns[None, :] == targets[:, None], MASKED, scores)
    largest = tl.max(negatives, axis=1)
    row_lse = largest + tl.log(tl.sum(tl.exp(negatives - largest[:, None]), axis=1))
    tl.store(row_lse_ptr + rows * num_column_tiles + column_tile, row_lse)
    if HAS_COLUMNS:
        largest = tl.max(scores, axis=0)
        column_lse = largest + tl.log(tl.sum(tl.exp(scores - largest[None, :]), axis=0))
        ptrs = column_lse_ptr + row_tile * num_keys + columns
        tl.store(ptrs, column_lse, mask=column_in_range)
        is_target = (columns[None, :] == targets[:, None]) & row_in_range[:, None]
        ptrs += tl.num_programs(0) * num_keys
        tl.store(ptrs, tl.max(is_target.to(tl.float32), axis=0), mask=column_in_range)


@triton.jit
def _contrastive_small_columns_kernel(
    parts_ptr, column_lse_ptr, num_keys, num_row_tiles, BLOCK: tl.constexpr, TILES: tl.constexpr
):
    """Log-sum-exp of each column from its tiles', infinite of those that are no query's positive."""
    columns, tiles = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, TILES)
    mask = (tiles < num_row_tiles)[:, None] & (columns < num_keys)[None, :]
    ptrs = parts_ptr + tiles[:, None] * num_keys + columns[None, :]
    parts = tl.load(ptrs, mask=mask, other=MASKED)
    is_positive = tl.max(tl.load(ptrs + num_row_tiles * num_keys, mask=mask, other=0.0), axis=0)
    largest = tl.max(parts, axis=0)
    column_lse = largest + tl.log(tl.sum(tl.exp(parts - largest[None, :]), axis=0))
    column_lse = tl.where(is_positive > 0, column_lse, float("inf"))
    tl.store(column_lse_ptr + columns, column_lse, mask=columns < num_keys)


@triton.jit
def _row_statistics(
    rows,
    targets,
    scores_ptr,
    row_lse_ptr,
    num_column_tiles,
    stride_scores,
    TILES: tl.constexpr,
):
    """Of rows [BLOCK] the positive's score and the log-sum-exp of the negatives."""
    tiles = tl.arange(0, TILES)
    ptrs = row_lse_ptr + rows[:, None] * num_column_tiles + tiles[None, :]
    parts = tl.load(ptrs, mask=(tiles < num_column_tiles)[None, :], other=MASKED)
    largest = tl.max(parts, axis=1)
    negatives = largest + tl.log(tl.sum(tl.exp(parts - largest[:, None]), axis=1))
    positives = tl.load(scores_ptr + rows.to(tl.int64) * stride_scores + targets)
    return positives, negatives


@triton.jit
def _score_gradient(scores, positives, negatives, columns, targets, column_lse_ptr, num_keys, SYMMETRIC: tl.constexpr):
    """d loss / d scores of a tile."""
    largest = tl.maximum(negatives, positives)
    ours, others = tl.exp(positives - largest), tl.exp(negatives - largest)
    row_lse = largest + tl.log(ours + others)
    is_target = columns[None, :] == targets[:, None]
    # the positive's is -sum / (1 + sum) of the negatives over it: its own probability less one would cancel
    gradient = tl.where(is_target, (-others / (ours + others))[:, None], tl.exp(scores - row_lse[:, None]))
    if SYMMETRIC:
        column_lse = tl.load(column_lse_ptr + columns, mask=columns < num_keys, other=float("inf"))
        gradient += tl.exp(scores - column_lse[None, :]) - tl.where(is_target, 1.0, 0.0)
    return gradient


@triton.jit
def _load_units(
    ptr, rows, scales, offs_e, num_rows, size, stride_n, stride_e, dtype: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows of length one, [BLOCK, BLOCK_E]."""
    mask = (rows < num_rows)[:, None] & (offs_e < size)[None, :]
    ptrs = ptr + rows.to(tl.int64)[:, None] * stride_n + offs_e[None, :] * stride_e
    return narrow(tl.load(ptrs, mask=mask, other=0.0).to(tl.float32) * scales[:, None], dtype, UPCAST)


@triton.jit
def _store_gradient(out_ptr, gradient, units, along, scales, rows, offs_e, num_rows, size, UPCAST: tl.constexpr):
    gradient = (gradient - units.to(tl.float32) * along[:, None]) * scales[:, None]
    mask = (rows < num_rows)[:, None] & (offs_e < size)[None, :]
    ptrs = out_ptr + rows.to(tl.int64)[:, None] * size + offs_e[None, :]
    tl.store(ptrs, narrow(gradient, out_ptr.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def _contrastive_small_gradients_kernel(
    queries_ptr,
    keys_ptr,
    targets_ptr,
    temperature,
    scores_ptr,
    query_scales_ptr,
    key_scales_ptr,
    row_lse_ptr,
    column_lse_ptr,
    grad_queries_ptr,
    grad_keys_ptr,
    loss_ptr,
    dots_ptr,
    num_queries,
    num_keys,
    size,
    num_row_tiles,
    num_column_tiles,
    num_size_tiles,
    stride_scores,
    stride_qn,
    stride_qe,
    stride_km,
    stride_ke,
    weight,
    gradient_scale,
    SYMMETRIC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    IN_MEMORY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TILES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program 0 adds the loss up, then come the tiles of grad_queries, then those of grad_keys."""
    program = tl.program_id(0) - 1
    temperature = _load_number(temperature, IN_MEMORY)
    offs_b = tl.arange(0, BLOCK)
    dtype = queries_ptr.dtype.element_ty
    if program < 0:
        losses = tl.zeros([BLOCK], tl.float32)
        for row_tile in tl.range(0, num_row_tiles):
            rows = row_tile * BLOCK + offs_b
            in_range = rows < num_queries
            targets = _load_targets(targets_ptr, rows, in_range)
            positives, negatives = _row_statistics(
                rows, targets, scores_ptr, row_lse_ptr, num_column_tiles, stride_scores, TILES
            )
            above = negatives - positives
            loss = tl.maximum(above, 0.0) + log1p(tl.exp(-tl.abs(above)))
            if SYMMETRIC:
                loss += tl.load(column_lse_ptr + targets) - positives
            losses += tl.where(in_range, loss, 0.0)
        tl.store(loss_ptr, tl.sum(losses, axis=0) * weight)
    elif program < num_row_tiles * num_size_tiles:
        rows = program // num_size_tiles * BLOCK + offs_b
        offs_e = program % num_size_tiles * BLOCK_E + tl.arange(0, BLOCK_E)
        in_range = rows < num_queries
        targets = _load_targets(targets_ptr, rows, in_range)
        positives, negatives = _row_statistics(
            rows, targets, scores_ptr, row_lse_ptr, num_column_tiles, stride_scores, TILES
        )
        result = tl.zeros([BLOCK, BLOCK_E], tl.float32)
        along, dots = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for column_tile in tl.range(0, num_column_tiles):
            columns = column_tile * BLOCK + offs_b
            scores = tl.load(scores_ptr + rows.to(tl.int64)[:, None] * stride_scores + columns[None, :])
            gradient = _score_gradient(
                scores, positives, negatives, columns, targets, column_lse_ptr, num_keys, SYMMETRIC
            )
            dots += tl.sum(gradient * scores, axis=1)
            gradient = narrow(gradient * gradient_scale, dtype, UPCAST)
            along += tl.sum(gradient.to(tl.float32) * scores, axis=1)
            key_scales = tl.load(key_scales_ptr + columns, mask=columns < num_keys, other=0.0)
            keys = _load_units(
                keys_ptr, columns, key_scales, offs_e, num_keys, size, stride_km, stride_ke, dtype, UPCAST
            )
            result = matmul(gradient, keys, result, UPCAST)
        factor = weight / (gradient_scale * temperature)
        query_scales = tl.load(query_scales_ptr + rows, mask=in_range, other=0.0)
        queries = _load_units(
            queries_ptr, rows, query_scales, offs_e, num_queries, size, stride_qn, stride_qe, dtype, UPCAST
        )
        along = along * temperature if NORMALIZE else along * 0.0
        _store_gradient(
            grad_queries_ptr,
            result * factor,
            queries,
            along * factor,
            query_scales,
            rows,
            offs_e,
            num_queries,
            size,
            UPCAST,
        )
        if program % num_size_tiles == 0:
            tl.store(dots_ptr + rows, dots * (-weight / temperature), mask=in_range)
    else:
        program -= num_row_tiles * num_size_tiles
        columns = program // num_size_tiles * BLOCK + offs_b
        offs_e = program % num_size_tiles * BLOCK_E + tl.arange(0, BLOCK_E)
        result = tl.zeros([BLOCK, BLOCK_E], tl.float32)
        along = tl.zeros([BLOCK], tl.float32)
        for row_tile in tl.range(0, num_row_tiles):
            rows = row_tile * BLOCK + offs_b
            in_range = rows < num_queries
            targets = _load_targets(targets_ptr, rows, in_range)
            positives, negatives = _row_statistics(
                rows, targets, scores_ptr, row_lse_ptr, num_column_tiles, stride_scores, TILES
            )
            scores = tl.load(scores_ptr + rows.to(tl.int64)[:, None] * stride_scores + columns[None, :])
            gradient = _score_gradient(
                scores, positives, negatives, columns, targets, column_lse_ptr, num_keys, SYMMETRIC
            )
            gradient = narrow(tl.where(in_range[:, None], gradient * gradient_scale, 0.0), dtype, UPCAST)
            along += tl.sum(gradient.to(tl.float32) * scores, axis=0)
            query_scales = tl.load(query_scales_ptr + rows, mask=in_range, other=0.0)
            queries = _load_units(
                queries_ptr, rows, query_scales, offs_e, num_queries, size, stride_qn, stride_qe, dtype, UPCAST
            )
            result = matmul(tl.trans(gradient), queries, result, UPCAST)
        factor = weight / (gradient_scale * temperature)
        key_scales = tl.load(key_scales_ptr + columns, mask=columns < num_keys, other=0.0)
        keys = _load_units(keys_ptr, columns, key_scales, offs_e, num_keys, size, stride_km, stride_ke, dtype, UPCAST)
        along = along * temperature if NORMALIZE else along * 0.0
        _store_gradient(
            grad_keys_ptr,
            result * factor,
            keys,
            along * factor,
            key_scales,
            columns,
            offs_e,
            num_keys,
            size,
            UPCAST,
        )
