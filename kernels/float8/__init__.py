"""Rows of float8 (e4m3) with one float32 scale a row, as row-wise `torch._scaled_mm` takes them; inference alone.

    scale = max(|row|) / 448
    values = round(row * (448 / max(|row|)))

A row depends on itself alone. Norm and SwiGLU give their rows so without writing them in a wider dtype first, and
nothing is rounded on the way. A row of zeros is zeros, and one that holds NaN or infinity holds NaN; one whose largest
magnitude is below 2^-100 is scaled as if it were that. `reference.py` says the same. On CUDA alone, of capability 8.9.

Source: Micikevicius et al., arXiv 2209.05433 (the format); `T` rows, `E` their size.
"""

from torch import Tensor

from ..checks import describe

Float8Rows = tuple[Tensor, Tensor]  # values float8_e4m3fn (T, E), scales float32 (T, 1)


def quantize_rows(x: Tensor) -> Float8Rows:
    """(T, E) -> (T, E) and (T, 1). Raises ValueError for shapes, dtypes or devices that do not fit."""
    _check("x", x)
    from .kernels import quantize  # triton is there on Linux only

    return quantize(x)


def quantized_rms_norm(x: Tensor, weight: Tensor, eps: float, *, add: Tensor | None = None) -> Float8Rows:
    """`rms_norm(x, weight, eps)` of `kernels.norm` in float8; (T, E), (E,) -> (T, E) and (T, 1).

    `add` (T, E) is first added to x, in place, and the sum is normed as x then holds it. Raises ValueError for shapes,
    dtypes or devices that do not fit.
    """
    _check("x", x)
    if x.stride(1) != 1:
        raise ValueError(f"x must have contiguous rows, got strides {x.stride()}")
    if weight.shape != x.shape[1:] or not weight.is_floating_point() or weight.device != x.device:
        raise ValueError(
            f"weight must be floating point of shape ({x.shape[1]},) on {x.device}, "
            f"got {describe(weight)} on {weight.device}"
        )
    if add is not None:
        _check_like("add", add, "x", x)
    from .kernels import norm

    return norm(x, weight, eps, add)


def quantized_swiglu(gate: Tensor, up: Tensor) -> Float8Rows:
    """`silu(gate) * up` in float8; twice (T, E) -> (T, E) and (T, 1).

    Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    _check("gate", gate)
    _check_like("up", up, "gate", gate)
    from .kernels import swiglu

    return swiglu(gate, up)


def _check(name: str, rows: Tensor) -> None:
    if rows.dim() != 2 or not rows.is_floating_point():
        raise ValueError(f"{name} must be floating point (T, E), got {describe(rows)}")
    from ..ragged import INTERPRETED

    if rows.device.type != "cuda" and not (rows.device.type == "cpu" and INTERPRETED):
        raise ValueError(
            f"{name} must be on a CUDA device, got {rows.device}; on a CPU use bivec.kernels.reference or, "
            "to test the kernel, set TRITON_INTERPRET=1 before triton loads"
        )


def _check_like(name: str, rows: Tensor, other_name: str, other: Tensor) -> None:
    if rows.shape != other.shape or rows.dtype != other.dtype or rows.device != other.device:
        raise ValueError(
            f"{name} must be {describe(other)} on {other.device} like {other_name}, "
            f"got {describe(rows)} on {rows.device}"
        )
