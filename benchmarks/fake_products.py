"""Products of `fake_cuda.py`'s device that torch's meta kernels do not know, or know wrong in some versions."""

from typing import Any

import torch

from .device_counts import Counts, bytes_of


def typed_product(fake: Any, *args, out: torch.Tensor, **kwargs) -> torch.Tensor:
    """`mm` and `addmm` into another dtype."""
    *total, a, b, dtype = args
    if out.dtype != dtype or any(tensor.shape != (a.shape[0], b.shape[1]) for tensor in (out, *total)):
        raise RuntimeError(f"out must be {dtype} of shape {(a.shape[0], b.shape[1])}, got {out}")
    added = bytes_of(total)
    fake.note("addmm" if total else "mm", Counts(kernels=1, bytes=bytes_of([a, b]) + added + bytes_of([out])))
    return out


def scaled_product(
    fake: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale_result: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Row-wise `_scaled_mm` of float8 into bfloat16, refused where CUDA's would be (aten's ScaledBlas.cpp)."""
    (num_rows, size), num_columns = a.shape, b.shape[1]
    if out is None:
        out = a.new_empty((num_rows, num_columns), dtype=out_dtype)
    required = {
        "a GPU of capability 8.9 or more": fake.capability >= (8, 9),
        "float8_e4m3fn matrices": a.dtype == b.dtype == torch.float8_e4m3fn,
        "matrices that fit": b.shape[0] == size,
        "sizes that are multiples of 16": size % 16 == num_columns % 16 == 0,
        "rows one after another": a.is_contiguous(),
        "columns one after another": b.t().is_contiguous(),
        "addresses that are multiples of 16": all(tensor.data_ptr() % 16 == 0 for tensor in (a, b, out)),
        "a scale a row": scale_a.shape == (num_rows, 1) and scale_a.is_contiguous(),
        "a scale a column": scale_b.shape == (1, num_columns) and scale_b.t().is_contiguous(),
        "float32 scales": scale_a.dtype == scale_b.dtype == torch.float32,
        "a bfloat16 bias": bias is None or (bias.dtype == torch.bfloat16 and bias.shape == (num_columns,)),
        "a bfloat16 result": out_dtype == out.dtype == torch.bfloat16 and scale_result is None,
        "a result of that shape": out.shape == (num_rows, num_columns) and out.is_contiguous(),
    }
    missing = [what for what, holds in required.items() if not holds]
    if missing:
        raise RuntimeError(f"_scaled_mm needs {', '.join(missing)}")
    read = [a, b, scale_a, scale_b, *([] if bias is None else [bias])]
    fake.note("_scaled_mm", Counts(kernels=1, bytes=bytes_of(read) + bytes_of([out])))
    return out
