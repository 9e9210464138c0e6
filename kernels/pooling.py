"""Pooling of packed hidden states: final RMSNorm, mean over each sequence, truncation and normalisation in one call.

Shapes: T packed tokens, S sequences, E hidden size.
"""

from typing import Literal, get_args

import torch

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
        output_dtype: default float32.
    Raises:
        ValueError: a wrong shape or dtype, an unknown mode, or a sequence without a pooled token. (On CUDA that last
            one would have to wait for the device; such a sequence gets a vector of zeros.)
    """
    _check(hidden, cu_seqlens, pool_starts, mode, norm_weight, truncate_dim)
    if pool_starts is None:
        pool_starts = torch.zeros_like(cu_seqlens[1:])
    eps = None if norm_weight is None else norm_eps
    if hidden.is_cuda:
        from .pooling_sums import MODES, pool_sums  # triton is there on Linux only

        vectors = pool_sums(hidden, cu_seqlens, pool_starts, MODES.index(mode), eps)
    else:
        vectors = _eager_sums(hidden, cu_seqlens.long(), pool_starts.long(), mode, eps)
    # the norm's weight is the same for every token, so it is applied to the sum
    vectors = vectors if norm_weight is None else vectors * norm_weight.float()
    vectors = vectors[:, :truncate_dim]
    if normalize:
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
    return vectors.to(output_dtype or torch.float32)


def _eager_sums(
    hidden: torch.Tensor, bounds: torch.Tensor, pool_starts: torch.Tensor, mode: PoolingMode, eps: float | None
) -> torch.Tensor:
    """Weighted sums of (RMS-normalised) rows, float32 `(S, E)`; `pooling_sums.py` computes the same on CUDA."""
    starts, ends = bounds[:-1] + pool_starts, bounds[1:]
    if bool((starts >= ends).any()):
        empty = int((starts >= ends).nonzero()[0])
        raise ValueError(f"every sequence must have a token to pool, sequence {empty} has none")
    if mode in ("last", "first"):
        return _rms_norm(hidden[ends - 1 if mode == "last" else starts].float(), eps)
    num_tokens = int(bounds[-1])
    rows = _rms_norm(hidden[:num_tokens].float(), eps)
    place = torch.arange(num_tokens, device=hidden.device)
    place = place - torch.repeat_interleave(starts, bounds.diff(), output_size=num_tokens)
    weights = ((place + 1 if mode == "weighted_mean" else torch.ones_like(place)) * (place >= 0)).float()
    sums = torch.segment_reduce(rows * weights[:, None], "sum", offsets=bounds, axis=0)
    return sums / torch.segment_reduce(weights, "sum", offsets=bounds)[:, None]


def _rms_norm(rows: torch.Tensor, eps: float | None) -> torch.Tensor:
    return rows if eps is None else rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + eps)


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
