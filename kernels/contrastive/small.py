"""The contrastive loss of a small batch in two launches, whatever the embedding size and the dtype.

The first writes the scores, which are small enough to stay in the cache, and the log-sum-exp of each tile's rows. In
the second, programs for tiles of `grad_queries` and of `grad_keys` turn scores into their gradient as they read them,
and one program adds the loss up. Rows are divided by their norms as they are read, in both. A loss in both directions
has one more between them, which puts the columns' log-sum-exps together.

`N` queries, `M` keys, `E` embedding size.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..ragged import INTERPRETED
from .eager import gradient_dtype
from .small_kernels import (
    _contrastive_small_columns_kernel,
    _contrastive_small_gradients_kernel,
    _contrastive_small_scores_kernel,
)

# with more scores than this the second launch reads them from the cache for longer than the chunks' launches take
SMALL_SCORES = 2**21
SMALL_ROWS = 4096  # one program goes through all of them
# float16 probabilities of a large batch would be subnormal; |gradient| <= 2 leaves this much room
FLOAT16_GRADIENT_SCALE = 2.0**14


class SmallTiles(NamedTuple):
    """Queries and keys of a tile of scores, embedding columns of a step of the first launch, and of a program of the
    second.
    """

    block: int
    block_k: int
    block_e: int
    num_warps: int


def is_small(num_queries: int, num_keys: int) -> bool:
    return num_queries * num_keys <= SMALL_SCORES and max(num_queries, num_keys) <= SMALL_ROWS


def small_tiles(dtype: torch.dtype) -> SmallTiles:
    if INTERPRETED:
        return SmallTiles(32, 16, 16, 1)
    return SmallTiles(32, 32, 64, 4) if dtype == torch.float32 else SmallTiles(64, 64, 64, 4)


class _Scores(NamedTuple):
    """What the first launch leaves: scores of whole tiles, what rows are multiplied by, log-sum-exps of tiles.

    Those of the columns (2, row tiles, M) come with whether a tile has the column's positive.
    """

    scores: Tensor
    query_scales: Tensor
    key_scales: Tensor
    row_lse: Tensor
    column_parts: Tensor


def _launch_scores(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None,
    groups: Tensor | None,
    temperature: Tensor | float,
    normalize: bool,
    has_columns: bool,
) -> _Scores:
    num_queries, num_keys, tiles = queries.shape[0], keys.shape[0], small_tiles(queries.dtype)
    grid = triton.cdiv(num_queries, tiles.block), triton.cdiv(num_keys, tiles.block)

    def numbers(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=queries.device)

    whole = grid[0] * tiles.block, grid[1] * tiles.block
    result = _Scores(
        numbers(*whole),
        numbers(num_queries),
        numbers(num_keys),
        numbers(whole[0], grid[1]),
        numbers(2, grid[0] if has_columns else 0, num_keys),
    )
    _contrastive_small_scores_kernel[grid](
        queries_ptr=queries,
        keys_ptr=keys,
        targets_ptr=targets,
        groups_ptr=queries if groups is None else groups,
        temperature=temperature,
        scores_ptr=result.scores,
        query_scales_ptr=result.query_scales,
        key_scales_ptr=result.key_scales,
        row_lse_ptr=result.row_lse,
        column_lse_ptr=result.column_parts if has_columns else result.row_lse,
        num_queries=num_queries,
        num_keys=num_keys,
        size=queries.shape[1],
        num_column_tiles=grid[1],
        stride_scores=whole[1],
        stride_qn=queries.stride(0),
        stride_qe=queries.stride(1),
        stride_km=keys.stride(0),
        stride_ke=keys.stride(1),
        HAS_GROUPS=groups is not None,
        HAS_COLUMNS=has_columns,
        NORMALIZE=normalize,
        IN_MEMORY=isinstance(temperature, Tensor),
        BLOCK=tiles.block,
        BLOCK_K=tiles.block_k,
        UPCAST=INTERPRETED and queries.dtype == torch.bfloat16,
        num_warps=tiles.num_warps,
    )
    return result


def column_log_sum_exp(
    queries: Tensor, keys: Tensor, targets: Tensor, groups: Tensor | None, temperature: Tensor, normalize: bool
) -> Tensor:
    """Log-sum-exp over the queries of each key's masked scores, (M,) float32."""
    return _launch_scores(queries, keys, targets, groups, temperature, normalize, True).column_parts[0].logsumexp(0)


def _positives_columns(parts: Tensor, tiles: SmallTiles) -> Tensor:
    _, row_tiles, num_keys = parts.shape
    column_lse = torch.empty(num_keys, dtype=torch.float32, device=parts.device)
    _contrastive_small_columns_kernel[(triton.cdiv(num_keys, tiles.block),)](
        parts_ptr=parts,
        column_lse_ptr=column_lse,
        num_keys=num_keys,
        num_row_tiles=row_tiles,
        BLOCK=tiles.block,
        TILES=triton.next_power_of_2(row_tiles),
        num_warps=tiles.num_warps,
    )
    return column_lse


def loss_and_gradients(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None,
    groups: Tensor | None,
    column_lse: Tensor | None,
    temperature: Tensor | float,
    normalize: bool,
    symmetric: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eager.loss_and_gradients`, the temperature's gradient as parts (N,) of a sum.

    Targets of None are the diagonal; where `symmetric` comes without `column_lse`, it is made of these queries.
    """
    (num_queries, size), num_keys, device = queries.shape, keys.shape[0], queries.device
    tiles = small_tiles(queries.dtype)
    makes_columns = symmetric and column_lse is None
    first = _launch_scores(queries, keys, targets, groups, temperature, normalize, makes_columns)
    if makes_columns:
        column_lse = _positives_columns(first.column_parts, tiles)
    loss, dots = (torch.empty(shape, dtype=torch.float32, device=device) for shape in ((), num_queries))
    grad_queries, grad_keys = (
        torch.empty(rows.shape if needs_gradient else 0, dtype=gradient_dtype(rows.dtype), device=device)
        for rows in (queries, keys)
    )
    row_tiles, column_tiles = triton.cdiv(num_queries, tiles.block), triton.cdiv(num_keys, tiles.block)
    size_tiles = triton.cdiv(size, tiles.block_e)
    grid = (1 + (row_tiles + column_tiles) * size_tiles if needs_gradient else 1,)
    _contrastive_small_gradients_kernel[grid](
        queries_ptr=queries,
        keys_ptr=keys,
        targets_ptr=targets,
        temperature=temperature,
        scores_ptr=first.scores,
        query_scales_ptr=first.query_scales,
        key_scales_ptr=first.key_scales,
        row_lse_ptr=first.row_lse,
        column_lse_ptr=first.row_lse if column_lse is None else column_lse,
        grad_queries_ptr=grad_queries,
        grad_keys_ptr=grad_keys,
        loss_ptr=loss,
        dots_ptr=dots,
        num_queries=num_queries,
        num_keys=num_keys,
        size=size,
        num_row_tiles=row_tiles,
        num_column_tiles=column_tiles,
        num_size_tiles=size_tiles,
        stride_scores=first.scores.stride(0),
        stride_qn=queries.stride(0),
        stride_qe=queries.stride(1),
        stride_km=keys.stride(0),
        stride_ke=keys.stride(1),
        weight=(1.0 if column_lse is None else 0.5) / num_queries,
        gradient_scale=FLOAT16_GRADIENT_SCALE if queries.dtype == torch.float16 else 1.0,
        SYMMETRIC=column_lse is not None,
        NORMALIZE=normalize,
        IN_MEMORY=isinstance(temperature, Tensor),
        BLOCK=tiles.block,
        BLOCK_E=tiles.block_e,
        TILES=triton.next_power_of_2(column_tiles),
        UPCAST=INTERPRETED and queries.dtype == torch.bfloat16,
        num_warps=tiles.num_warps,
    )
    return loss, grad_queries, grad_keys, dots
