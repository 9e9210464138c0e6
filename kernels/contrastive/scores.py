"""Kernels that multiply queries by keys and make of each tile of scores, before it is written, what is wanted of it.

    scores = queries @ keys.T / temperature
    probabilities    exp(scores - offset) of each row's negatives, their sums, and their sums times the scores
    statistics       log-sum-exp of each row's negatives, and of each column
    gradient         d loss / d scores, once the log-sum-exps of rows and columns are known

Rows are of length one already, in memory of `padded_size` columns, a multiple of 64. `N` queries, `M` keys. The scores
of `probabilities` are in units of log 2, so that an exponential is one instruction.

`probabilities` needs no pass over the scores before it: the offset of a row is the score of its positive, so what is
written are multiples of the positive's probability. Were their sum to leave float32 (a positive 60 nats below its
negatives), the row's tile is flagged and done again with its largest scores as the offsets, by a launch that returns at
once where there is no flag.
"""

import triton
import triton.language as tl

from ..ragged import matmul, narrow

# the score of a masked key: finite, so that probability zero times it is zero
MASKED = tl.constexpr(-1e30)
LOG2_E = tl.constexpr(1.4426950408889634)
# a tile's sum above which its rows are done again: no sum of tiles and no product with one leaves bfloat16 or float32
LARGEST_SUM = tl.constexpr(2.0**90)


@triton.jit
def _multiply_tile(
    queries_ptr,
    keys_ptr,
    rows,
    columns,
    num_rows,
    num_keys,
    padded_size,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """float32 products [BLOCK_M, BLOCK_N]; beyond the last row and key there is no memory, so they are repeated."""
    offs_k = tl.arange(0, BLOCK_K)
    rows = tl.minimum(rows, num_rows - 1).to(tl.int64)
    columns = tl.minimum(columns, num_keys - 1).to(tl.int64)
    queries_ptrs = queries_ptr + rows[:, None] * padded_size + offs_k[None, :]
    keys_ptrs = keys_ptr + columns[None, :] * padded_size + offs_k[:, None]
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in tl.range(0, padded_size, BLOCK_K):
        products = matmul(tl.load(queries_ptrs), tl.load(keys_ptrs), products, UPCAST)
        queries_ptrs += BLOCK_K
        keys_ptrs += BLOCK_K
    return products


@triton.jit
def _is_masked(columns, targets, groups_ptr, num_keys, HAS_GROUPS: tl.constexpr):
    """[BLOCK_M, BLOCK_N]: keys out of range, padding, and those of the group of a row's positive; the positive too."""
    in_range = columns < num_keys
    masked = (columns[None, :] == targets[:, None]) | (~in_range)[None, :]
    if HAS_GROUPS:
        target_groups = tl.load(groups_ptr + targets)
        groups = tl.load(groups_ptr + columns, mask=in_range, other=-1)
        masked = masked | (groups[None, :] == target_groups[:, None]) | (groups < 0)[None, :]
    return masked


@triton.jit
def _has_masked(first_column, targets, groups_ptr, num_keys, BLOCK_N: tl.constexpr, HAS_GROUPS: tl.constexpr):
    """Whether a tile has anything to mask: most have not, and no registers are taken for it."""
    inside = (targets >= first_column) & (targets < first_column + BLOCK_N)
    found = (tl.max(inside.to(tl.int32), axis=0) > 0) | (first_column + BLOCK_N > num_keys)
    if HAS_GROUPS:
        columns = first_column + tl.arange(0, BLOCK_N)
        target_groups = tl.load(groups_ptr + targets)
        groups = tl.load(groups_ptr + columns, mask=columns < num_keys, other=-1)
        # the other way round than the mask itself, or the compiler would keep this one for it
        equal = (groups[:, None] == target_groups[None, :]) | (groups < 0)[:, None]  # [BLOCK_N, BLOCK_M]
        found = found | (tl.max(tl.max(equal.to(tl.int32), axis=1), axis=0) > 0)
    return found


@triton.jit
def _mask(scores, first_column, targets, groups_ptr, num_keys, HAS_GROUPS: tl.constexpr):
    """Nothing is left but each row's negatives."""
    columns = first_column + tl.arange(0, scores.shape[1])
    return tl.where(_is_masked(columns, targets, groups_ptr, num_keys, HAS_GROUPS), MASKED, scores)


@triton.jit
def _probabilities_tile(
    products,
    offsets,
    rows,
    first_column,
    targets,
    has_masked,
    groups_ptr,
    temperature_ptr,
    probabilities_ptr,
    num_keys,
    stride_probabilities,
    HAS_GROUPS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write a tile's probabilities; returns its rows' sums of them, and of them times the scores above the offsets."""
    scores = products * (LOG2_E / tl.load(temperature_ptr)) - offsets[:, None]
    if has_masked:
        scores = _mask(scores, first_column, targets, groups_ptr, num_keys, HAS_GROUPS)
    probabilities = tl.exp2(scores)
    # before the tile is laid out anew to be written: in this order all stays in registers
    sums, dots = tl.sum(probabilities, axis=1), tl.sum(probabilities * scores, axis=1)
    if HAS_GRADIENT:
        # no mask: the matrix has whole tiles
        columns = first_column + tl.arange(0, products.shape[1])
        ptrs = probabilities_ptr + rows.to(tl.int64)[:, None] * stride_probabilities + columns[None, :]
        tl.store(ptrs, narrow(probabilities, probabilities_ptr.dtype.element_ty, UPCAST))
    return sums, dots


@triton.jit
def _contrastive_probabilities_kernel(
    queries_ptr,
    keys_ptr,
    positives_ptr,
    targets_ptr,
    groups_ptr,
    temperature_ptr,
    probabilities_ptr,
    partials_ptr,
    flags_ptr,
    num_rows,
    num_keys,
    padded_size,
    num_row_tiles,
    num_tiles,
    stride_probabilities,
    HAS_GROUPS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # the row tiles of a column tile one after another: the keys come from memory once, the queries stay in the cache
    row_tile, column_tile = tl.program_id(0) % num_row_tiles, tl.program_id(0) // num_row_tiles
    rows, first_column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N
    in_range = rows < num_rows
    targets = tl.load(targets_ptr + rows, mask=in_range, other=0).to(tl.int32)
    has_masked = _has_masked(first_column, targets, groups_ptr, num_keys, BLOCK_N, HAS_GROUPS)
    products = _multiply_tile(
        queries_ptr,
        keys_ptr,
        rows,
        first_column + tl.arange(0, BLOCK_N),
        num_rows,
        num_keys,
        padded_size,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        UPCAST,
    )
    positives = tl.load(positives_ptr + rows, mask=in_range, other=0.0) * (LOG2_E / tl.load(temperature_ptr))
    sums, dots = _probabilities_tile(
        products,
        positives,
        rows,
        first_column,
        targets,
        has_masked,
        groups_ptr,
        temperature_ptr,
        probabilities_ptr,
        num_keys,
        stride_probabilities,
        HAS_GROUPS,
        HAS_GRADIENT,
        UPCAST,
    )
    partials_ptrs = partials_ptr + rows.to(tl.int64) * num_tiles + column_tile
    tl.store(partials_ptrs, sums, mask=in_range)
    if HAS_GRADIENT:
        tl.store(partials_ptrs + num_rows.to(tl.int64) * num_tiles, dots, mask=in_range)
    too_large = in_range & (sums > LARGEST_SUM)
    # whoever writes, writes the same
    tl.store(flags_ptr + row_tile, 1, mask=tl.max(too_large.to(tl.int32), axis=0) > 0)


@triton.jit
def _contrastive_repair_kernel(
    queries_ptr,
    keys_ptr,
    positives_ptr,
    targets_ptr,
    groups_ptr,
    temperature_ptr,
    probabilities_ptr,
    partials_ptr,
    flags_ptr,
    shifts_ptr,
    num_rows,
    num_keys,
    padded_size,
    num_tiles,
    stride_probabilities,
    HAS_GROUPS: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A flagged row tile by one program, which goes through the keys twice.

    `shifts` are how far the rows' largest scores are above their positives'; the sums are left in their first part.
    """
    row_tile = tl.program_id(0)
    if tl.load(flags_ptr + row_tile) == 0:
        return
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_range = rows < num_rows
    scale = LOG2_E / tl.load(temperature_ptr)
    positives = tl.load(positives_ptr + rows, mask=in_range, other=0.0) * scale
    targets = tl.load(targets_ptr + rows, mask=in_range, other=0).to(tl.int32)
    largest = positives
    for first_column in tl.range(0, num_keys, BLOCK_N):
        has_masked = _has_masked(first_column, targets, groups_ptr, num_keys, BLOCK_N, HAS_GROUPS)
        products = _multiply_tile(
            queries_ptr,
            keys_ptr,
            rows,
            first_column + tl.arange(0, BLOCK_N),
            num_rows,
            num_keys,
            padded_size,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            UPCAST,
        )
        scores = products * scale
        if has_masked:
            scores = _mask(scores, first_column, targets, groups_ptr, num_keys, HAS_GROUPS)
        largest = tl.maximum(largest, tl.max(scores, axis=1))
    sums, dots = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for first_column in tl.range(0, num_keys, BLOCK_N):
        has_masked = _has_masked(first_column, targets, groups_ptr, num_keys, BLOCK_N, HAS_GROUPS)
        products = _multiply_tile(
            queries_ptr,
            keys_ptr,
            rows,
            first_column + tl.arange(0, BLOCK_N),
            num_rows,
            num_keys,
            padded_size,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            UPCAST,
        )
        tile_sums, tile_dots = _probabilities_tile(
            products,
            largest,
            rows,
            first_column,
            targets,
            has_masked,
            groups_ptr,
            temperature_ptr,
            probabilities_ptr,
            num_keys,
            stride_probabilities,
            HAS_GROUPS,
            HAS_GRADIENT,
            UPCAST,
        )
        sums += tile_sums
        dots += tile_dots
    tl.store(shifts_ptr + rows, largest - positives, mask=in_range)
    partials_ptrs = partials_ptr + rows.to(tl.int64) * num_tiles
    tl.store(partials_ptrs, sums, mask=in_range)
    if HAS_GRADIENT:
        tl.store(partials_ptrs + num_rows.to(tl.int64) * num_tiles, dots, mask=in_range)


@triton.jit
def _contrastive_statistics_kernel(
    queries_ptr,
    keys_ptr,
    targets_ptr,
    groups_ptr,
    temperature_ptr,
    row_lse_ptr,
    column_lse_ptr,
    num_rows,
    num_keys,
    padded_size,
    num_row_tiles,
    num_tiles,
    HAS_GROUPS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_tile, column_tile = tl.program_id(0) % num_row_tiles, tl.program_id(0) // num_row_tiles
    rows, first_column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    in_range = rows < num_rows
    targets = tl.load(targets_ptr + rows, mask=in_range, other=0).to(tl.int32)
    has_masked = _has_masked(first_column, targets, groups_ptr, num_keys, BLOCK_N, HAS_GROUPS)
    products = _multiply_tile(
        queries_ptr,
        keys_ptr,
        rows,
        columns,
        num_rows,
        num_keys,
        padded_size,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        UPCAST,
    )
    scores = products * (1.0 / tl.load(temperature_ptr))
    if HAS_COLUMNS:
        if has_masked | ((row_tile + 1) * BLOCK_M > num_rows):
            visible = ~_is_masked(columns, targets, groups_ptr, num_keys, HAS_GROUPS)
            visible = (visible | (columns[None, :] == targets[:, None])) & in_range[:, None]
            scores = tl.where(visible, scores, MASKED)
        largest = tl.max(scores, axis=0)
        column_lse = largest + tl.log(tl.sum(tl.exp(scores - largest[None, :]), axis=0))
        ptrs = column_lse_ptr + row_tile.to(tl.int64) * num_keys + columns
        tl.store(ptrs, column_lse, mask=columns < num_keys)
    if has_masked:
        scores = _mask(scores, first_column, targets, groups_ptr, num_keys, HAS_GROUPS)
    largest = tl.max(scores, axis=1)
    row_lse = largest + tl.log(tl.sum(tl.exp(scores - largest[:, None]), axis=1))
    tl.store(row_lse_ptr + rows.to(tl.int64) * num_tiles + column_tile, row_lse, mask=in_range)


@triton.jit
def _contrastive_gradient_kernel(
    queries_ptr,
    keys_ptr,
    positives_ptr,
    targets_ptr,
    groups_ptr,
    row_lse_ptr,
    column_lse_ptr,
    temperature_ptr,
    gradient_ptr,
    dots_ptr,
    num_rows,
    num_keys,
    padded_size,
    num_row_tiles,
    num_tiles,
    stride_gradient,
    gradient_scale,
    HAS_GROUPS: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row_tile, column_tile = tl.program_id(0) % num_row_tiles, tl.program_id(0) // num_row_tiles
    rows, first_column = row_tile * BLOCK_M + tl.arange(0, BLOCK_M), column_tile * BLOCK_N
    columns = first_column + tl.arange(0, BLOCK_N)
    in_range = rows < num_rows
    targets = tl.load(targets_ptr + rows, mask=in_range, other=0).to(tl.int32)
    has_masked = _has_masked(first_column, targets, groups_ptr, num_keys, BLOCK_N, HAS_GROUPS)
    products = _multiply_tile(
        queries_ptr,
        keys_ptr,
        rows,
        columns,
        num_rows,
        num_keys,
        padded_size,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        UPCAST,
    )
    scale = 1.0 / tl.load(temperature_ptr)
    positives = tl.load(positives_ptr + rows, mask=in_range, other=0.0) * scale
    negatives_lse = tl.load(row_lse_ptr + rows, mask=in_range, other=-MASKED)
    largest = tl.maximum(negatives_lse, positives)
    ours, others = tl.exp(positives - largest), tl.exp(negatives_lse - largest)
    row_lse = largest + tl.log(ours + others)

    scores = products * scale
    if has_masked:
        visible = ~_is_masked(columns, targets, groups_ptr, num_keys, HAS_GROUPS)
        scores = tl.where(visible | (columns[None, :] == targets[:, None]), scores, MASKED)
    gradient = tl.exp(scores - row_lse[:, None])
    if has_masked:
        # the positive's is -sum / (1 + sum) of the negatives over it: its own probability less one would cancel
        own = -others / (ours + others)
        gradient = tl.where(columns[None, :] == targets[:, None], own[:, None], gradient)
    if SYMMETRIC:
        column_lse = tl.load(column_lse_ptr + columns, mask=columns < num_keys, other=float("inf"))
        gradient += tl.exp(scores - column_lse[None, :])
        if has_masked:
            gradient -= tl.where(columns[None, :] == targets[:, None], 1.0, 0.0)
    dots = tl.sum(gradient * scores, axis=1)
    tl.store(dots_ptr + rows.to(tl.int64) * num_tiles + column_tile, dots, mask=in_range)
    ptrs = gradient_ptr + rows.to(tl.int64)[:, None] * stride_gradient + columns[None, :]
    tl.store(ptrs, narrow(gradient * gradient_scale, gradient_ptr.dtype.element_ty, UPCAST))
