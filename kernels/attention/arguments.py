"""What attention over packed sequences requires of its arguments, on any device; each check raises ValueError."""

import math

import torch
from torch import Tensor

from ..checks import describe


def check_tensors(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> None:
    if q.dim() != 3:
        raise ValueError(f"q must be (num_tokens, num_heads, head_dim), got {describe(q)}")
    num_tokens, num_heads, head_dim = q.shape
    if k.dim() != 3 or k.shape[0] != num_tokens or k.shape[2] != head_dim:
        raise ValueError(f"k must be ({num_tokens}, num_kv_heads, {head_dim}), got {describe(k)}")
    if k.shape[1] == 0 or num_heads % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides q's {num_heads}, got {k.shape[1]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {describe(v)}")
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}, got {describe(tensor)}")
    for name, tensor in (("k", k), ("v", v), ("cu_seqlens", cu_seqlens)):
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")
    check_cu_seqlens(cu_seqlens)


def check_cu_seqlens(cu_seqlens: Tensor) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be int32 of shape (num_sequences + 1,), got {describe(cu_seqlens)}")
    if cu_seqlens.stride(0) != 1 and cu_seqlens.shape[0] > 1:
        raise ValueError(f"cu_seqlens must be contiguous, got strides {cu_seqlens.stride()}")


def check_tile_list(tile_list: Tensor | None, cu_seqlens: Tensor) -> None:
    if tile_list is None:
        return
    if tile_list.dtype != torch.int32 or tile_list.dim() != 2 or tile_list.shape[1] != 4:
        raise ValueError(f"tile_list must be what list_tiles gives, int32 (N, 4), got {describe(tile_list)}")
    if tile_list.device != cu_seqlens.device:
        raise ValueError(f"tile_list must be on q's device {cu_seqlens.device}, got {tile_list.device}")


def check_window(window_size: tuple[int, int]) -> tuple[int, int]:
    try:
        left, right = (int(bound) for bound in window_size)
    except (TypeError, ValueError):
        raise ValueError(f"window_size must be (left, right), got {window_size!r}") from None
    if left < -1 or right < -1:
        raise ValueError(f"window_size must hold two bounds of at least 0, or -1 for none, got {window_size}")
    return left, right


def check_chances(dropout_p: float, future_p: float) -> None:
    if not 0.0 <= future_p <= 1.0:
        raise ValueError(f"future_p must be in [0, 1], got {future_p}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")


def check_seeds(seeds: Tensor | None, random: bool, cu_seqlens: Tensor) -> None:
    if seeds is None:
        if random:
            raise ValueError("seeds must be given with dropout_p above 0 or future_p below 1, got None")
        return
    num_sequences = cu_seqlens.shape[0] - 1
    if seeds.dtype != torch.int64 or seeds.shape != (num_sequences,):
        raise ValueError(f"seeds must be int64 of shape ({num_sequences},), got {describe(seeds)}")
    if seeds.device != cu_seqlens.device:
        raise ValueError(f"seeds must be on q's device {cu_seqlens.device}, got {seeds.device}")
    if num_sequences > 1 and seeds.stride(0) != 1:
        raise ValueError(f"seeds must be contiguous, got strides {seeds.stride()}")


def check_scale(softmax_scale: float | None, head_dim: int) -> float:
    """The scale, by default head_dim ** -0.5."""
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return scale
