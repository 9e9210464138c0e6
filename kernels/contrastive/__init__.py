"""Contrastive loss (InfoNCE) without the N x M matrix: `contrastive_loss`, and `pooled_contrastive_loss` from packed
hidden states.

    scores = normalize(queries) @ normalize(keys).T / temperature      # false negatives masked
    loss = cross_entropy(scores, targets)

`reference.py` says the same in eager PyTorch. `N` queries, `M` keys, `E` embedding size, `T` packed tokens, `S`
sequences. The forward goes through the queries by chunks and leaves the gradients behind, which the backward scales:
6 N M E operations for both, and memory linear in N and M. A second run gives the same bits.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import describe, require
from ..pooling import PoolingMode, pool
from .chunks import column_log_sum_exp, gradient_dtype, loss_and_gradients
from .gather import combine_columns, gather_keys, shapes_by_rank


@torch.library.custom_op("bivec::contrastive_loss", mutates_args=())
def _contrastive_forward(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    groups: Tensor | None,
    column_lse: Tensor | None,
    temperature: Tensor,
    normalize: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, and its gradients by queries, keys and temperature, empty unless needed."""
    with torch.cuda.device_of(queries):
        return loss_and_gradients(queries, keys, targets, groups, column_lse, temperature, normalize, needs_gradient)


@_contrastive_forward.register_fake
def _(queries, keys, targets, groups, column_lse, temperature, normalize, needs_gradient):
    scalar = temperature.new_empty((), dtype=torch.float32)
    if not needs_gradient:
        return scalar, queries.new_empty(0), queries.new_empty(0), torch.empty_like(scalar)
    gradients = (rows.new_empty(rows.shape, dtype=gradient_dtype(rows.dtype)) for rows in (queries, keys))
    return scalar, *gradients, torch.empty_like(scalar)


def _save_for_backward(ctx, inputs, output):
    _, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*gradients)
    ctx.dtype = inputs[0].dtype


def _backward(ctx, upstream, *_):
    grad_queries, grad_keys, grad_temperature = ctx.saved_tensors
    # two dimensions, because a scalar would first be rounded to the gradients' dtype
    grad_queries, grad_keys = (
        (gradient * upstream.reshape(1, 1)).to(ctx.dtype) if needed else None
        for gradient, needed in zip((grad_queries, grad_keys), ctx.needs_input_grad, strict=False)
    )
    return grad_queries, grad_keys, None, None, None, grad_temperature * upstream, None, None


_contrastive_forward.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("bivec::contrastive_columns", mutates_args=())
def _column_lse(
    queries: Tensor, keys: Tensor, targets: Tensor, groups: Tensor | None, temperature: Tensor, normalize: bool
) -> Tensor:
    """Log-sum-exp over the queries of each key's scores, (M,); its part of the gradient is in the loss's operator."""
    with torch.cuda.device_of(queries):
        return column_log_sum_exp(queries, keys, targets, groups, temperature, normalize)


@_column_lse.register_fake
def _(queries, keys, targets, groups, temperature, normalize):
    return queries.new_empty(keys.shape[0], dtype=torch.float32)


def contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    targets: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    normalize: bool = True,
    symmetric: bool = False,
    groups: Tensor | None = None,
    dims: Sequence[int] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """InfoNCE (van den Oord et al., arXiv 1807.03748), the mean over queries; (N, E), (M, E) -> float32 scalar.

    queries, keys    bfloat16, float16 or float32; products are accumulated, and the softmax computed, in float32.
                     Rows of `keys` that are nobody's positive are hard negatives
    targets          int64 (N,), the row of `keys` that is each query's positive; default the diagonal
    temperature      above zero; a tensor of one element gets its gradient
    normalize        divide queries and keys by their L2 norms first
    symmetric        average with the loss of finding each positive's query among all queries; needs unique targets
    groups           int64 (M,), at least -1: keys of the same group as a query's positive are no negatives of it and
                     are masked, the positive itself never. Keys of group -1 are padding, nobody's negatives
    dims             Matryoshka sizes (Kusupati et al., arXiv 2205.13147): the mean of the losses of the leading
                     dimensions, each truncated before it is normalised
    process_group    negatives from every rank. Each rank gives as many queries and keys as the others, `targets`
                     counts its own keys, and group ids mean the same everywhere. One collective of three numbers
                     compares shapes, one gathers keys and groups, one sums the keys' gradients (`symmetric`: one
                     more of (M,) numbers). The mean of the loss over the ranks is the loss of the joined batch; as in
                     DistributedDataParallel, the gradient on a rank is that of the ranks' sum, the world size times
                     the joined batch's for queries and keys, so that averaging parameters' (and the temperature's)
                     gradients over ranks gives the joined batch's

    Raises ValueError for arguments that break these rules, unequal shapes on every rank. What is inside of `targets`,
    `groups` and a temperature tensor is checked on the CPU; on CUDA, without waiting for the device, a device-side
    assertion guards the first two, and the other ranks' shapes.
    """
    _check_rows(queries, keys, targets)
    temperature_tensor = _check_temperature(temperature, queries.device)
    _check_groups(groups, keys)
    sizes = _check_dims(dims, queries.shape[1])
    if targets is None:
        targets = torch.arange(queries.shape[0], device=queries.device)
    elif symmetric:
        counts = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        counts.scatter_add_(0, targets, torch.ones_like(targets))
        require((counts <= 1).all(), "targets must be unique when symmetric, got one twice")
    if process_group is not None:
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ValueError("process_group must have this process among its ranks, got one without it")
        _check_ranks(queries, keys, groups, process_group)
        targets = targets + rank * keys.shape[0]
        keys, groups = gather_keys(keys, groups, process_group)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (queries, keys, temperature_tensor)
    )
    losses = []
    for size in sizes:
        rows = (queries[:, :size], keys[:, :size])
        column_lse = None
        if symmetric:
            column_lse = _positives_columns(*rows, targets, groups, temperature_tensor, normalize, process_group)
        loss, *_ = _contrastive_forward(
            *rows, targets, groups, column_lse, temperature_tensor, normalize, needs_gradient
        )
        losses.append(loss)
    return losses[0] if len(losses) == 1 else torch.stack(losses).mean()


def pooled_contrastive_loss(
    hidden: Tensor,
    cu_seqlens: Tensor,
    *,
    num_queries: int,
    pool_starts: Tensor | None = None,
    mode: PoolingMode = "mean",
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    targets: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    normalize: bool = True,
    symmetric: bool = False,
    groups: Tensor | None = None,
    dims: Sequence[int] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """The loss from packed hidden states (T, E) and int32 `cu_seqlens` (S + 1,) -> float32 scalar.

    The first `num_queries` sequences are the queries, the S - num_queries others the keys. `pool_starts`, `mode`,
    `norm_weight` and `norm_eps` are `pool`'s, the rest `contrastive_loss`'s; vectors are in the hidden states' dtype.
    """
    vectors = pool(
        hidden,
        cu_seqlens,
        pool_starts=pool_starts,
        mode=mode,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
        normalize=False,
        output_dtype=hidden.dtype,
    )
    if not isinstance(num_queries, int) or not 1 <= num_queries < vectors.shape[0]:
        raise ValueError(
            f"num_queries must be from 1 to {vectors.shape[0] - 1}, so that keys are left of "
            f"{vectors.shape[0]} sequences, got {num_queries!r}"
        )
    return contrastive_loss(
        vectors[:num_queries],
        vectors[num_queries:],
        targets=targets,
        temperature=temperature,
        normalize=normalize,
        symmetric=symmetric,
        groups=groups,
        dims=dims,
        process_group=process_group,
    )


def _positives_columns(queries, keys, targets, groups, temperature, normalize, process_group) -> Tensor:
    """Log-sum-exp of every positive's column over the queries of all ranks; infinite for the other columns."""
    column_lse = _column_lse(queries.detach(), keys.detach(), targets, groups, temperature.detach(), normalize)
    is_positive = torch.zeros_like(column_lse, dtype=torch.bool).scatter(0, targets, True)
    if process_group is not None:
        column_lse, is_positive = combine_columns(column_lse, is_positive, process_group)
    return column_lse.masked_fill(~is_positive, math.inf)


def _check_rows(queries: Tensor, keys: Tensor, targets: Tensor | None) -> None:
    if queries.dim() != 2 or queries.shape[0] == 0 or queries.shape[1] == 0:
        raise ValueError(f"queries must be (num_queries, embedding_size), both at least 1, got {describe(queries)}")
    if queries.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"queries must be bfloat16, float16 or float32, got {describe(queries)}")
    if keys.dim() != 2 or keys.shape[0] == 0 or keys.shape[1] != queries.shape[1]:
        raise ValueError(f"keys must be (num_keys, {queries.shape[1]}) like queries, got {describe(keys)}")
    if keys.dtype != queries.dtype:
        raise ValueError(f"keys must have queries' dtype {describe(queries)}, got {describe(keys)}")
    if keys.device != queries.device:
        raise ValueError(f"keys must be on queries' device {queries.device}, got {keys.device}")
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    if targets is None:
        if num_keys < num_queries:
            raise ValueError(f"keys must have {num_queries} rows or more unless targets are given, got {num_keys}")
        return
    if targets.dtype != torch.int64 or targets.shape != (num_queries,):
        raise ValueError(f"targets must be int64 of shape ({num_queries},), got {describe(targets)}")
    if targets.device != queries.device:
        raise ValueError(f"targets must be on queries' device {queries.device}, got {targets.device}")
    require(((targets >= 0) & (targets < num_keys)).all(), f"targets must be from 0 to {num_keys - 1}, got one outside")


def _check_temperature(temperature: float | Tensor, device: torch.device) -> Tensor:
    """As a float32 scalar on the device."""
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise ValueError(f"temperature must be a number or a tensor of one element, got {temperature!r}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {temperature}")
        return torch.full((), temperature, dtype=torch.float32, device=device)
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(f"temperature must be one floating-point element, got {describe(temperature)}")
    if temperature.device != device:
        raise ValueError(f"temperature must be on queries' device {device}, got {temperature.device}")
    if device.type == "cpu":
        require((temperature > 0).all(), "temperature must be above 0, got a tensor that is not")
    return temperature.reshape(()).float()


def _check_groups(groups: Tensor | None, keys: Tensor) -> None:
    if groups is None:
        return
    if groups.dtype != torch.int64 or groups.shape != keys.shape[:1]:
        raise ValueError(f"groups must be int64 of shape ({keys.shape[0]},), got {describe(groups)}")
    if groups.device != keys.device:
        raise ValueError(f"groups must be on queries' device {keys.device}, got {groups.device}")
    require((groups >= -1).all(), "groups must be at least 0, or -1 for padding, got one below")


def _check_ranks(queries: Tensor, keys: Tensor, groups: Tensor | None, process_group: dist.ProcessGroup) -> None:
    """Before the gather, which with unequal shapes would wait for ever or mix rows up."""
    shapes = shapes_by_rank(queries, keys, groups, process_group)
    came = "others"
    if shapes.device.type == "cpu" and not torch.compiler.is_compiling():
        came = f"(queries, keys, bytes of a key and its group) {shapes.tolist()}"
    require(
        (shapes == shapes[:1]).all(),
        f"queries, keys and groups must have the same shapes and dtypes on every rank of process_group, got {came}",
    )


def _check_dims(dims: Sequence[int] | None, embedding_size: int) -> Sequence[int]:
    if dims is None:
        return (embedding_size,)
    if (
        not isinstance(dims, Sequence)
        or not dims
        or not all(isinstance(size, int) and 1 <= size <= embedding_size for size in dims)
    ):
        raise ValueError(f"dims must be one or more sizes from 1 to {embedding_size}, got {dims!r}")
    return dims
