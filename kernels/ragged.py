"""What the kernels share: the search for a sequence by its place, rows of a ragged matrix, products, rounding.

`S` sequences, `D` head dimension.
"""

import triton
import triton.language as tl

# whether the kernels were defined for Triton's interpreter, which alone takes CPU tensors
INTERPRETED: bool = triton.knobs.runtime.interpret


@triton.jit
def find_sequence(starts_ptr, num_sequences, place, FAN: tl.constexpr):
    """The last sequence whose start is not after `place`: two rounds of FAN probes, a binary search takes ten."""
    stride = tl.cdiv(num_sequences, FAN)
    probes = tl.arange(0, FAN) * stride
    starts = tl.load(starts_ptr + probes, mask=probes < num_sequences, other=0x7FFFFFFF)
    first = (tl.sum((starts <= place).to(tl.int32), axis=0) - 1) * stride
    sequence = first - 1
    end = tl.minimum(first + stride, num_sequences)
    for begin in range(first, end, FAN):
        probes = begin + tl.arange(0, FAN)
        starts = tl.load(starts_ptr + probes, mask=probes < end, other=0x7FFFFFFF)
        sequence += tl.sum((starts <= place).to(tl.int32), axis=0)
    return sequence


@triton.jit
def _row_mask(num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    rows = tl.arange(0, ROWS)[:, None] < num_rows
    if HEAD_DIM != BLOCK_D:
        rows = rows & (tl.arange(0, BLOCK_D) < HEAD_DIM)[None, :]
    return rows


@triton.jit
def load_rows(ptrs, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """The tile at `ptrs` [ROWS, BLOCK_D]; zero from `num_rows` on and in the columns that pad HEAD_DIM.

    A `num_rows` that is known to be ROWS while compiling leaves no mask behind.
    """
    if isinstance(num_rows, tl.constexpr) and HEAD_DIM == BLOCK_D:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=_row_mask(num_rows, ROWS, HEAD_DIM, BLOCK_D), other=0.0)


@triton.jit
def store_rows(
    ptrs, rows, num_rows, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):
    tl.store(ptrs, narrow(rows, ptrs.dtype.element_ty, UPCAST), mask=_row_mask(num_rows, ROWS, HEAD_DIM, BLOCK_D))


@triton.jit
def narrow(values, dtype: tl.constexpr, UPCAST: tl.constexpr):
    """float32 `values` in `dtype`, to nearest even. UPCAST: the interpreter truncates to bfloat16, so round first."""
    if UPCAST:
        bits = values.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        values = bits.to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def matmul(a, b, accumulator, UPCAST: tl.constexpr):
    """`accumulator + a @ b` in float32; float32 operands are never rounded to tf32.

    UPCAST is for the interpreter, where a product of bfloat16 tiles is garbage: the operands are already rounded.
    """
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")
