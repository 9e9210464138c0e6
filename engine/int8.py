"""Eight-bit linears on the CPU: weights with one scale an output channel, activations with one scale a row.

    w ≈ q_w * scale_w[:, None]          q_w = round(w / scale_w), scale_w = max |w| of the channel / 127
    x ≈ q_x * scale_x                   q_x = round(x * 127 / max |x| of the row)
    x @ w.T ≈ (q_x @ q_w.T) * scale_w * scale_x

Sums of integers are exact, whatever their order: a row's product depends on no other row, and on no number of rows or
cores. Rounding is to the nearest, ties to even; an all-zero row or channel gives zeros, and a row that is not finite
gives one that is not.

oneDNN multiplies unsigned rows by signed weights fast, and signed ones by a reference that takes minutes: rows are kept
as q_x + 128, what that adds is taken away within the integers. Source of the scheme: Dettmers et al., arXiv 2208.07339.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from .cores import on_cores

_LEVELS = 127
_ZERO_POINT = 128
_TOO_SLOW = 30  # times float32: a reference implementation takes hundreds
_TINY = 1e-30  # the least magnitude that scales: its inverse is finite
# added to a float32 of at most 2**22, it leaves the nearest integer in the low bits of the sum, here plus 128
_ROUND = 1.5 * 2.0**23 + _ZERO_POINT
_PART, _WHOLE = 2**15, 32  # elements that torch leaves to one core, and a multiple of those that it computes at once


class QuantizedRows(NamedTuple):
    """Rows and their scales: `(values - 128) * scales` are about the rows.

    Attributes:
        values: uint8 `(R, K)`.
        scales: float32 `(R, 1)`.
    """

    values: torch.Tensor
    scales: torch.Tensor


def quantize_rows(rows: torch.Tensor, *, out: torch.Tensor | None = None) -> QuantizedRows:
    """Each of float32 `rows` `(R, K)` scaled by its own largest magnitude.

    Args:
        out: float32 `(R, K)`, room for what is between; it may be `rows`.
    """
    largest = torch.maximum(rows.amax(-1, keepdim=True), rows.amin(-1, keepdim=True).neg_()).clamp_(min=_TINY)
    scaled = torch.mul(rows, _LEVELS / largest, out=out).add_(_ROUND)
    return QuantizedRows(scaled.view(torch.int32).to(torch.uint8), largest.mul_(1 / _LEVELS))


def silu_(rows: torch.Tensor) -> torch.Tensor:
    """SiLU in place on contiguous float32 of any shape; an element has the same bits wherever it stands.

    torch divides elements evenly among cores, and those that fill no vector at the end of a part it computes in another
    way, with other bits. Rows that are quantised next hide that from the checks at load, mostly. So parts are whole.
    """
    elements, cores = rows.view(-1), torch.get_num_threads()
    size = len(elements)
    unit = _WHOLE * cores if size > _PART * cores else _PART
    evenly, whole = size // unit * unit, size // _WHOLE * _WHOLE
    for part in (elements[:evenly], elements[evenly:whole]):
        if len(part):
            F.silu(part, inplace=True)
    if whole < size:
        elements[whole:] = F.silu(F.pad(elements[whole:], (0, _WHOLE - size + whole)))[: size - whole]
    return rows


class Int8Linear:
    """`rows @ weight.T`, up to the rows' scales, for `QuantizedRows`; the weight `(N, K)` is quantised here.

    Attributes:
        bias: float32 `(N,)` or None, for whoever has put the rows' scales in.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        weight = weight.float()
        largest = weight.abs().amax(-1, keepdim=True).clamp_(min=_TINY)
        quantized = weight.mul(_LEVELS / largest).round_().to(torch.int8)
        self.scales = largest.mul_(1 / _LEVELS).view(-1)
        # a copy, because a file is in memory as long as anything of it
        self.bias = None if bias is None else bias.to(torch.float32, copy=True)
        self.num_bytes = quantized.numel() + self.scales.nbytes
        self._zero_points = torch.zeros(len(quantized), dtype=torch.int64)
        # the number of rows is a hint
        self._weight = torch.ops.onednn.qlinear_prepack(quantized, [512, quantized.shape[1]])

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        """Float32 `(R, N)` of `QuantizedRows.values` `(R, K)`: what it means once multiplied by their scales."""
        return torch.ops.onednn.qlinear_pointwise(
            rows,
            1.0,  # the rows' scale
            _ZERO_POINT,
            self._weight,
            self.scales,
            self._zero_points,
            None,  # bias
            1.0,  # the output's scale
            0,  # and zero point
            torch.float32,
            "none",
            [],
            "",
        )


@torch.inference_mode()
def check_products() -> None:
    """Raises ValueError where this processor or this torch does not multiply eight-bit integers exactly and fast."""
    wrong = "dtype int8 cannot be used here"
    generator = torch.Generator().manual_seed(0)
    num_rows, size = 64, 256
    # the largest products there are: where sums are kept in 16 bits, as without VNNI, they saturate
    weight = torch.randint(0, 2, (size, size), generator=generator).mul_(2 * _LEVELS).sub_(_LEVELS).to(torch.int8)
    rows = torch.randint(0, 2, (num_rows, size), generator=generator).mul_(255).to(torch.uint8)
    expected = ((rows.long() - _ZERO_POINT) @ weight.long().T).float()
    try:
        linear = Int8Linear(weight.float(), None)
        found = linear(rows)
    except (AttributeError, RuntimeError, NotImplementedError) as error:
        raise ValueError(f"{wrong}: torch {torch.__version__} has no eight-bit product for this processor") from error
    if not torch.equal(found, expected):
        raise ValueError(f"{wrong}: this processor's eight-bit products are not exact (it has no VNNI)")
    floats = rows.float(), weight.float().T
    with on_cores(1):  # several would wait for each other where others compute too
        ours, float32 = _seconds(lambda: linear(rows)), _seconds(lambda: floats[0] @ floats[1])
    if ours > _TOO_SLOW * float32:
        raise ValueError(f"{wrong}: eight-bit products take {ours / float32:.0f} times as long as float32 ones")


def _seconds(run: Callable[[], object]) -> float:
    """At its best of a few."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
