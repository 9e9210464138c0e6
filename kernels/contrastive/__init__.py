"""Contrastive loss (InfoNCE) without the N x M matrix: `contrastive_loss`, and `pooled_contrastive_loss` from packed
hidden states.

    scores = normalize(queries) @ normalize(keys).T / temperature      # false negatives masked
    loss = cross_entropy(scores, targets)

`reference.py` says the same in eager PyTorch. `N` queries, `M` keys, `E` embedding size, `T` packed tokens, `S`
sequences. The forward leaves the gradients behind, which the backward scales: a small batch takes two launches
(`small.py`), a large one goes through the queries by chunks, with 6 N M E operations for both and memory linear in N
and M (`chunks.py`); without Triton PyTorch does (`eager.py`). A second run gives the same bits.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import describe, require
from ..pooling import PoolingMode, pool
from ..ragged import INTERPRETED
from . import chunks, eager, small
from .gather import combine_columns, gather_keys, shapes_by_rank
from .scale import scale_gradients


def runs_kernel(device: torch.device) -> bool:
    return device.type == "cuda" or (device.type == "cpu" and INTERPRETED)


@torch.library.custom_op("bivec::contrastive_loss", mutates_args=())
def _contrastive_forward(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None,
    groups: Tensor | None,
    column_lse: Tensor | None,
    row_lse: Tensor | None,
    temperature: Tensor | None,
    number: float,
    normalize: bool,
    symmetric: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss; its gradients by queries and keys, empty unless needed; by the temperature, as parts of a sum.

    Targets of None are the diagonal, a temperature of None is `number`. `symmetric` comes with `column_lse` and
    `row_lse`, but for a small batch of one process.
    """
    device = queries.device
    with torch.cuda.device_of(queries):
        if runs_kernel(device) and small.is_small(queries.shape[0], keys.shape[0]):
            degree = number if temperature is None else temperature
            return small.loss_and_gradients(
                queries, keys, targets, groups, column_lse, degree, normalize, symmetric, needs_gradient
            )
        if targets is None:
            targets = torch.arange(queries.shape[0], device=device)
        if temperature is None:
            temperature = torch.full((), number, dtype=torch.float32, device=device)
        last = (temperature, normalize, needs_gradient)
        if runs_kernel(device):
            return chunks.loss_and_gradients(queries, keys, targets, groups, column_lse, row_lse, *last)
        return eager.loss_and_gradients(queries, keys, targets, groups, column_lse, *last)


@_contrastive_forward.register_fake
def _(queries, keys, targets, groups, column_lse, row_lse, temperature, number, normalize, symmetric, needs_gradient):
    loss = queries.new_empty((), dtype=torch.float32)
    grad_temperature = loss.new_empty(queries.shape[0] if runs_kernel(queries.device) else 1)
    if not needs_gradient:
        return loss, queries.new_empty(0), keys.new_empty(0), grad_temperature
    gradients = (rows.new_empty(rows.shape, dtype=eager.gradient_dtype(rows.dtype)) for rows in (queries, keys))
    return loss, *gradients, grad_temperature


def _save_for_backward(ctx, inputs, output):
    _, *gradients = output
    ctx.save_for_backward(*gradients)
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)  # or each of these outputs would get zeros for a gradient
    ctx.dtype = inputs[0].dtype


def _backward(ctx, upstream, *_):
    *gradients, grad_temperature = ctx.saved_tensors
    needs_gradients, needs_temperature = ctx.needs_input_grad[:2], ctx.needs_input_grad[6]
    wanted = [gradient for gradient, needed in zip(gradients, needs_gradients, strict=True) if needed]
    if not runs_kernel(upstream.device):
        # two dimensions, because a scalar would first be rounded to the gradients' dtype
        wanted = [(gradient * upstream.reshape(1, 1)).to(ctx.dtype) for gradient in wanted]
    elif wanted:
        wanted = scale_gradients(wanted, upstream, ctx.dtype)
    left = iter(wanted)
    grad_queries, grad_keys = (next(left) if needed else None for needed in needs_gradients)
    grad_temperature = grad_temperature.sum() * upstream if needs_temperature else None
    return grad_queries, grad_keys, None, None, None, None, grad_temperature, None, None, None, None


_contrastive_forward.register_autograd(_backward, setup_context=_save_for_backward)


@torch.library.custom_op("bivec::contrastive_columns", mutates_args=())
def _log_sum_exps(
    queries: Tensor, keys: Tensor, targets: Tensor, groups: Tensor | None, temperature: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of each key's scores over the queries, (M,), and what else the loss's operator then needs.

    That is of each query's negatives, (N,), empty unless it is needed. Their part of the gradient is the loss's.
    """
    arguments = (queries, keys, targets, groups, temperature, normalize)
    with torch.cuda.device_of(queries):
        if not runs_kernel(queries.device):
            return eager.column_log_sum_exp(*arguments), queries.new_empty(0, dtype=torch.float32)
        if small.is_small(queries.shape[0], keys.shape[0]):
            return small.column_log_sum_exp(*arguments), queries.new_empty(0, dtype=torch.float32)
        return chunks.log_sum_exps(*arguments)


@_log_sum_exps.register_fake
def _(queries, keys, targets, groups, temperature, normalize):
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    by_chunks = runs_kernel(queries.device) and not small.is_small(num_queries, num_keys)
    sizes = num_keys, num_queries if by_chunks else 0
    return tuple(queries.new_empty(size, dtype=torch.float32) for size in sizes)


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
    temperature_tensor, number = _check_temperature(temperature, queries.device)
    _check_groups(groups, keys)
    sizes = _check_dims(dims, queries.shape[1])
    if targets is not None and symmetric:
        counts = torch.zeros(keys.shape[0], dtype=torch.int64, device=keys.device)
        counts.scatter_add_(0, targets, torch.ones_like(targets))
        require((counts <= 1).all(), "targets must be unique when symmetric, got one twice")
    # on a GPU columns of a small batch are the loss's own; nobody else needs targets of the diagonal or a tensor
    columns_apart = symmetric and (process_group is not None or not _takes_two_launches(queries, keys))
    if targets is None and columns_apart:
        targets = torch.arange(queries.shape[0], device=queries.device)
    if temperature_tensor is None and columns_apart:
        temperature_tensor = torch.full((), number, dtype=torch.float32, device=queries.device)
    if process_group is not None:
        rank = dist.get_rank(process_group)
        if rank < 0:
            raise ValueError("process_group must have this process among its ranks, got one without it")
        _check_ranks(queries, keys, groups, process_group)
        first = rank * keys.shape[0]
        if targets is None:
            targets = torch.arange(first, first + queries.shape[0], device=queries.device)
        else:
            targets = targets + first
        keys, groups = gather_keys(keys, groups, process_group)
    needs_gradient = torch.is_grad_enabled() and any(
        tensor is not None and tensor.requires_grad for tensor in (queries, keys, temperature_tensor)
    )
    losses = []
    for size in sizes:
        rows = (queries[:, :size], keys[:, :size])
        column_lse = row_lse = None
        if columns_apart:
            column_lse, row_lse = _positives_columns(
                *rows, targets, groups, temperature_tensor, normalize, process_group
            )
        loss, *_ = _contrastive_forward(
            *rows,
            targets,
            groups,
            column_lse,
            row_lse,
            temperature_tensor,
            number,
            normalize,
            symmetric,
            needs_gradient,
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


def _positives_columns(queries, keys, targets, groups, temperature, normalize, process_group) -> tuple[Tensor, Tensor]:
    """Log-sum-exp of every positive's column over the queries of all ranks, infinite for the others; of the rows."""
    column_lse, row_lse = _log_sum_exps(
        queries.detach(), keys.detach(), targets, groups, temperature.detach(), normalize
    )
    is_positive = torch.zeros_like(column_lse, dtype=torch.bool).scatter(0, targets, True)
    if process_group is not None:
        column_lse, is_positive = combine_columns(column_lse, is_positive, process_group)
    return column_lse.masked_fill(~is_positive, math.inf), row_lse


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


def _takes_two_launches(queries: Tensor, keys: Tensor) -> bool:
    return runs_kernel(queries.device) and small.is_small(queries.shape[0], keys.shape[0])


def _check_temperature(temperature: float | Tensor, device: torch.device) -> tuple[Tensor | None, float]:
    """A float32 scalar on the device, or the number."""
    if not isinstance(temperature, Tensor):
        if isinstance(temperature, bool) or not isinstance(temperature, int | float):
            raise ValueError(f"temperature must be a number or a tensor of one element, got {temperature!r}")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature must be finite and above 0, got {temperature}")
        return None, float(temperature)
    if temperature.numel() != 1 or not temperature.is_floating_point():
        raise ValueError(f"temperature must be one floating-point element, got {describe(temperature)}")
    if temperature.device != device:
        raise ValueError(f"temperature must be on queries' device {device}, got {temperature.device}")
    if device.type == "cpu":
        require((temperature > 0).all(), "temperature must be above 0, got a tensor that is not")
    return temperature.reshape(()).float(), 0.0


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
