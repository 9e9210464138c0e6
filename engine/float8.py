"""Float8 linears (e4m3) on GPUs of capability 8.9: weights with one scale an output channel, rows with one each.

Products are row-wise `torch._scaled_mm`, whose sizes must be multiples of 16, and add up in float32. Its fast
accumulation is left out: it keeps sums in the tensor cores' own format ("lower accuracy because intermediate results
will not periodically be promoted to a higher precision", cuBLAS on CUBLASLT_MATMUL_DESC_FAST_ACCUM), and what that
loses grows with the length of a row. How a row is quantised, and what of zeros and NaN, is in `kernels/float8`.
"""

import torch

from ..kernels.float8 import Float8Rows, quantize_rows

_MULTIPLE = 16


class Float8Linear:
    """`rows @ weight.T + bias` for `Float8Rows`; the weight `(N, K)` is quantised here, of any float dtype.

    Args:
        name: for errors.
    Raises:
        ValueError: N or K is no multiple of 16.
    """

    def __init__(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None):
        if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
            raise ValueError(
                f"dtype float8 needs products whose sizes are multiples of {_MULTIPLE}, "
                f"but the weight of {name} is {tuple(weight.shape)}; use bfloat16"
            )
        values, scales = quantize_rows(weight)
        self.weight, self.scales = values.t(), scales.t()  # (K, N), column by column, and (1, N)
        self.bias = None if bias is None else bias.to(torch.bfloat16)
        self.num_bytes = self.weight.nbytes + self.scales.nbytes

    def __call__(self, rows: Float8Rows, out: torch.Tensor | None = None) -> torch.Tensor:
        """(R, K) -> bfloat16 (R, N)."""
        values, scales = rows
        return torch._scaled_mm(
            values,
            self.weight,
            scale_a=scales,
            scale_b=self.scales,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
            out=out,
        )
