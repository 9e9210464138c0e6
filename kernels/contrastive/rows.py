"""Kernels of one program a row around the contrastive loss's products.

`N` queries, `M` keys, `E` embedding size. A row is read as often as it needs to be: it stays in the cache.
"""

import triton
import triton.language as tl

from ..ragged import narrow

LN_2 = tl.constexpr(0.6931471805599453)
NORM_EPS = tl.constexpr(1e-12)  # torch.nn.functional.normalize's


@triton.jit
def inverse_norm(squares, NORMALIZE: tl.constexpr):
    """What makes rows with these sums of squares of length one."""
    return 1.0 / tl.maximum(tl.sqrt_rn(squares), NORM_EPS) if NORMALIZE else squares * 0.0 + 1.0


@triton.jit
def _row_scale(ptr, stride, size, NORMALIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    squares = tl.zeros([BLOCK_E], tl.float32)
    if NORMALIZE:
        for start in tl.range(0, size, BLOCK_E):
            offs_e = start + tl.arange(0, BLOCK_E)
            values = tl.load(ptr + offs_e * stride, mask=offs_e < size, other=0.0).to(tl.float32)
            squares += values * values
    return inverse_norm(tl.sum(squares, axis=0), NORMALIZE)


@triton.jit
def _contrastive_unit_rows_kernel(
    queries_ptr,
    keys_ptr,
    targets_ptr,
    unit_queries_ptr,
    unit_keys_ptr,
    query_scales_ptr,
    key_scales_ptr,
    positives_ptr,
    num_keys,
    size,
    padded_size,
    stride_qn,
    stride_qe,
    stride_km,
    stride_ke,
    NORMALIZE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Rows of length one, zero beyond `size`; what they were multiplied by; each query's product with its positive."""
    program = tl.program_id(0)
    dtype = unit_keys_ptr.dtype.element_ty
    if program < num_keys:
        row = program.to(tl.int64)
        keys_ptr += row * stride_km
        scale = _row_scale(keys_ptr, stride_ke, size, NORMALIZE, BLOCK_E)
        tl.store(key_scales_ptr + row, scale)
        for start in tl.range(0, padded_size, BLOCK_E):
            offs_e = start + tl.arange(0, BLOCK_E)
            values = tl.load(keys_ptr + offs_e * stride_ke, mask=offs_e < size, other=0.0).to(tl.float32)
            ptrs = unit_keys_ptr + row * padded_size + offs_e
            tl.store(ptrs, narrow(values * scale, dtype, UPCAST), mask=offs_e < padded_size)
    else:
        row = (program - num_keys).to(tl.int64)
        queries_ptr += row * stride_qn
        keys_ptr += tl.load(targets_ptr + row) * stride_km
        scale = _row_scale(queries_ptr, stride_qe, size, NORMALIZE, BLOCK_E)
        key_scale = _row_scale(keys_ptr, stride_ke, size, NORMALIZE, BLOCK_E)
        tl.store(query_scales_ptr + row, scale)
        products = tl.zeros([BLOCK_E], tl.float32)
        for start in tl.range(0, padded_size, BLOCK_E):
            offs_e = start + tl.arange(0, BLOCK_E)
            values = tl.load(queries_ptr + offs_e * stride_qe, mask=offs_e < size, other=0.0).to(tl.float32)
            values = narrow(values * scale, dtype, UPCAST)
            tl.store(unit_queries_ptr + row * padded_size + offs_e, values, mask=offs_e < padded_size)
            others = tl.load(keys_ptr + offs_e * stride_ke, mask=offs_e < size, other=0.0).to(tl.float32)
            products += values.to(tl.float32) * narrow(others * key_scale, dtype, UPCAST).to(tl.float32)
        tl.store(positives_ptr + row, tl.sum(products, axis=0))


@triton.jit
def log1p(x):
    """log(1 + x) of x >= 0 to float32's precision, by the series of atanh where it is small."""
    z = x / (2.0 + x)
    square = z * z
    series = 2.0 * z * (1.0 + square * (1.0 / 3.0 + square * (0.2 + square / 7.0)))
    return tl.where(x < 0.25, series, tl.log(1.0 + x))


@triton.jit
def _contrastive_finish_rows_kernel(
    partials_ptr,
    flags_ptr,
    shifts_ptr,
    targets_ptr,
    queries_ptr,
    positives_ptr,
    scaled_ptr,
    losses_ptr,
    dots_ptr,
    inverse_sums_ptr,
    num_rows,
    num_tiles,
    padded_size,
    stride_probabilities,
    HAS_GRADIENT: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """A row's loss from its tiles' sums; its positive's gradient; the query over the sum of its probabilities."""
    row = tl.program_id(0).to(tl.int64)
    # the positive's probability is the unit, or so many powers of two below it
    shift, num_parts = 0.0, num_tiles
    if tl.load(flags_ptr + row // BLOCK_M) != 0:
        shift, num_parts = tl.load(shifts_ptr + row), 1
    sums, dots = tl.zeros([BLOCK_T], tl.float32), tl.zeros([BLOCK_T], tl.float32)
    for start in tl.range(0, num_parts, BLOCK_T):
        parts = start + tl.arange(0, BLOCK_T)
        ptrs = partials_ptr + row * num_tiles + parts
        sums += tl.load(ptrs, mask=parts < num_parts, other=0.0)
        if HAS_GRADIENT:
            dots += tl.load(ptrs + num_rows.to(tl.int64) * num_tiles, mask=parts < num_parts, other=0.0)
    negatives = tl.sum(sums, axis=0)
    total = tl.exp2(-shift) + negatives
    tl.store(losses_ptr + row, tl.where(shift > 0.0, (tl.log2(total) + shift) * LN_2, log1p(negatives)))

    if HAS_GRADIENT:
        # the gradients of a row add up to zero, so its scores may be counted from the positive's
        dot = (tl.sum(dots, axis=0) + shift * negatives) / total
        tl.store(dots_ptr + row, dot * LN_2)
        tl.store(inverse_sums_ptr + row, 1.0 / total)
        # less than its probability, which would cancel where that is about one
        target = tl.load(targets_ptr + row)
        own = narrow(-negatives, positives_ptr.dtype.element_ty, UPCAST)
        tl.store(positives_ptr + row * stride_probabilities + target, own)
        for start in tl.range(0, padded_size, BLOCK_E):
            offs_e = start + tl.arange(0, BLOCK_E)
            place = row * padded_size + offs_e
            values = tl.load(queries_ptr + place, mask=offs_e < padded_size, other=0.0).to(tl.float32)
            values = narrow(values / total, scaled_ptr.dtype.element_ty, UPCAST)
            tl.store(scaled_ptr + place, values, mask=offs_e < padded_size)


@triton.jit
def _contrastive_finish_gradient_kernel(
    gradient_ptr,
    units_ptr,
    scales_ptr,
    inverse_sums_ptr,
    temperature_ptr,
    out_ptr,
    size,
    padded_size,
    weight,
    HAS_SUMS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """(g - u (u . g)) * scale: from the gradient of rows u of length one that of the rows they were made from."""
    row = tl.program_id(0).to(tl.int64)
    gradient_ptr += row * padded_size
    units_ptr += row * padded_size
    factor = weight / tl.load(temperature_ptr)
    if HAS_SUMS:
        factor *= tl.load(inverse_sums_ptr + row)
    along = 0.0
    if NORMALIZE:
        products = tl.zeros([BLOCK_E], tl.float32)
        for start in tl.range(0, padded_size, BLOCK_E):
            offs_e = start + tl.arange(0, BLOCK_E)
            gradient = tl.load(gradient_ptr + offs_e, mask=offs_e < padded_size, other=0.0)
            products += gradient * tl.load(units_ptr + offs_e, mask=offs_e < padded_size, other=0.0).to(tl.float32)
        along = tl.sum(products, axis=0)
    scale = tl.load(scales_ptr + row)
    for start in tl.range(0, size, BLOCK_E):
        offs_e = start + tl.arange(0, BLOCK_E)
        gradient = tl.load(gradient_ptr + offs_e, mask=offs_e < size, other=0.0)
        if NORMALIZE:
            gradient -= along * tl.load(units_ptr + offs_e, mask=offs_e < size, other=0.0).to(tl.float32)
        # in this order no product leaves float32 on its way
        gradient = gradient * factor * scale
        tl.store(out_ptr + row * size + offs_e, narrow(gradient, out_ptr.dtype.element_ty, UPCAST), mask=offs_e < size)
