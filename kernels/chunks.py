"""What computations by chunks share: rows that stay in a CPU's cache, and products that add up in float32."""

from collections.abc import Iterator

import torch
from torch import Tensor

# float32 scratch of a chunk is then 1 MB: in cache, and calls are few
CHUNK_ELEMENTS = 2**18
# of fewer elements a matrix is worth no function of its own: eager PyTorch is faster and what it keeps is little
SMALL = 2**18


def rows_to_a_chunk(num_rows: int, row_size: int) -> int:
    return max(1, min(num_rows, CHUNK_ELEMENTS // max(row_size, 1)))


def row_chunks(num_rows: int, row_size: int) -> Iterator[slice]:
    """Consecutive ranges of rows of about `CHUNK_ELEMENTS` elements."""
    step = rows_to_a_chunk(num_rows, row_size)
    for start in range(0, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def is_small(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.numel() <= SMALL


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which elementwise work on `dtype` is done: float32, float64 for itself."""
    return torch.promote_types(dtype, torch.float32)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """float32 `out` = a @ b, accumulated in float32."""
    if a.dtype == torch.float32:
        torch.mm(a, b, out=out)
    elif a.is_cuda:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """float32 `total` += a @ b."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
