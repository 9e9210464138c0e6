"""Pooling of packed hidden states: final RMSNorm, mean over each sequence, truncation and normalisation in one call.

Shapes: T packed tokens, S sequences, E hidden size.
"""

from typing import Literal, get_args

import torch

from .cpu import pool_sums_cpu

PoolingMode = Literal["mean", "weighted_mean", "last", "first"]
POOLING_MODES: tuple[str, ...] = get_args(PoolingMode)


def pool(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    pool_starts: torch.Tensor | None = None,
    mode: PoolingMode = "mean",
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
    truncate_dim: int | None = None,
    normalize: bool = True,
    output_dtype: torch.dtype | None = None,
    ranges: torch.Tensor | None = None,
) -> torch.Tensor:
    """One vector a sequence, `(S, E)` or `(S, truncate_dim)`, from packed hidden states `(T, E)`.

    Everything is computed in float32, in token order within each sequence; a sequence's vector depends on its own
    rows alone. Differentiable in `hidden` and `norm_weight`.

    Args:
        hidden: `(T, E)`, floating point; rows at and beyond `cu_seqlens[-1]` are ignored.
        cu_seqlens: int32 `(S + 1,)`.
        pool_starts: int32 `(S,)`, tokens to skip at each sequence's start (its instruction); default none.
        mode: `mean`; `weighted_mean` with weights 1, 2, 3, … over the pooled tokens (Muennighoff, arXiv 2202.08904);
            `last`; `first` (of the pooled tokens).
        norm_weight: `(E,)`, applies RMSNorm with `norm_eps` to each row first.
        truncate_dim: keep that many leading dimensions, before `normalize`.
        normalize: divide by the L2 norm.
        output_dtype: a floating-point one, default float32; or int8, which has no gradient.
        ranges: float32 `(2, E)` or `(2, truncate_dim)`, required by int8 alone: the values of each dimension that
            become -128 and 127, as in sentence-transformers' `quantize_embeddings`; what lies outside is clipped.
    Raises:
        ValueError: a wrong shape or dtype, an unknown mode, or a sequence without a pooled token. (On CUDA that last
            one would have to wait for the device; such a sequence gets a vector of zeros.)
    """
    _check(hidden, cu_seqlens, pool_starts, mode, norm_weight, truncate_dim)
    _check_output(hidden, norm_weight, truncate_dim, output_dtype, ranges)
    if pool_starts is None:
        pool_starts = torch.zeros_like(cu_seqlens[1:])
    eps = None if norm_weight is None else norm_eps
    if hidden.is_cuda:
        from .sums import MODES, pool_sums  # triton is there on Linux only

        vectors = pool_sums(hidden, cu_seqlens, pool_starts, MODES.index(mode), eps)
    else:
        vectors = pool_sums_cpu(hidden, cu_seqlens, pool_starts, mode, eps)
    # the norm's weight is the same for every token, so it is applied to the sum
    vectors = vectors if norm_weight is None else vectors * norm_weight.float()
    vectors = vectors[:, :truncate_dim]
    if normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    if ranges is not None:
        return _quantize(vectors, ranges)
    return vectors.to(output_dtype or torch.float32)


def _quantize(vectors: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """int8 by 256 steps between each dimension's bounds."""
    low, high = ranges
    steps = (high - low) / 255
    steps = torch.where(steps == 0, 1.0, steps)
    return ((vectors - low) / steps).floor_().clamp_(0, 255).sub_(128).to(torch.int8)


def _check(
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    pool_starts: torch.Tensor | None,
    mode: str,
    norm_weight: torch.Tensor | None,
    truncate_dim: int | None,
) -> None:
    if hidden.dim() != 2 or not hidden.is_floating_point():
        raise ValueError(f"hidden must be floating point (T, E), got {hidden.dtype} {tuple(hidden.shape)}")
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(
            f"cu_seqlens must be int32 of shape (num_sequences + 1,), got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
        )
    if pool_starts is not None and (pool_starts.dtype != torch.int32 or pool_starts.shape != cu_seqlens[1:].shape):
        raise ValueError(
            f"pool_starts must be int32 of shape ({cu_seqlens.shape[0] - 1},), "
            f"got {pool_starts.dtype} {tuple(pool_starts.shape)}"
        )
    if mode not in POOLING_MODES:
        raise ValueError(f"mode must be one of {', '.join(POOLING_MODES)}, got {mode!r}")
    for name, tensor in (("cu_seqlens", cu_seqlens), ("pool_starts", pool_starts), ("norm_weight", norm_weight)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device {hidden.device}, got {tensor.device}")
    if hidden.stride(1) != 1 and hidden.shape[1] > 1:
        raise ValueError(f"hidden must be contiguous in its last dimension, got strides {hidden.stride()}")
    if norm_weight is not None and norm_weight.shape != hidden.shape[1:]:
        raise ValueError(f"norm_weight must have shape {tuple(hidden.shape[1:])}, got {tuple(norm_weight.shape)}")
    if truncate_dim is not None and not 1 <= truncate_dim <= hidden.shape[1]:
        raise ValueError(f"truncate_dim must be from 1 to {hidden.shape[1]}, got {truncate_dim}")


def _check_output(
    hidden: torch.Tensor,
    norm_weight: torch.Tensor | None,
    truncate_dim: int | None,
    output_dtype: torch.dtype | None,
    ranges: torch.Tensor | None,
) -> None:
    if output_dtype != torch.int8:
        if output_dtype is not None and not output_dtype.is_floating_point:
            raise ValueError(f"output_dtype must be floating point or int8, got {output_dtype}")
        if ranges is not None:
            raise ValueError(f"ranges must be None unless output_dtype is int8, got {tuple(ranges.shape)}")
        return
    shape = (2, truncate_dim or hidden.shape[1])
    if ranges is None:
        raise ValueError(f"ranges must be float32 {shape} for an output_dtype of int8, got None")
    if ranges.dtype != torch.float32 or ranges.shape != shape or ranges.device != hidden.device:
        raise ValueError(
            f"ranges must be float32 {shape} on {hidden.device}, got {ranges.dtype} {tuple(ranges.shape)} on "
            f"{ranges.device}"
        )
    for name, tensor in (("hidden", hidden), ("norm_weight", norm_weight)):
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient for an output_dtype of int8, got one that does")
