"""The contrastive loss by chunks of rows on a GPU: no score is ever written, only its exponential, which products read.

    probabilities = exp(queries[chunk] @ keys.T / temperature - offset)           # the only matrix with M columns
    grad_queries[chunk] = probabilities @ keys / sum
    grad_keys += probabilities.T @ (queries[chunk] / sum)

`N` queries, `M` keys, `E` embedding size. The sum of a row is known when its probabilities are, and it is divided by it
on the other side of each product, so forward and backward are three products: 6 N M E operations. Two cases need the
log-sum-exps before anything is written, and so one product more: the loss in both directions, and float16, which has no
room for numbers that are not yet divided.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..chunks import accumulate, multiply
from ..ragged import INTERPRETED
from .eager import gradient_dtype
from .rows import (
    _contrastive_finish_gradient_kernel,
    _contrastive_finish_rows_kernel,
    _contrastive_unit_rows_kernel,
)
from .scores import (
    _contrastive_gradient_kernel,
    _contrastive_probabilities_kernel,
    _contrastive_repair_kernel,
    _contrastive_statistics_kernel,
)
from .small import FLOAT16_GRADIENT_SCALE

# probabilities held at a time: each chunk reads all keys and adds into all of their gradients, so few chunks
MATRIX_BYTES = 512 * 2**20
LARGEST_CHUNK = 2**14  # rows, however few the keys


class ProductTiles(NamedTuple):
    """Queries, keys and embedding columns of a tile of the product, its warps and stages of its pipeline."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class UnitRows(NamedTuple):
    """Rows of length one in their dtype, zero from E up to a multiple of 64, and what they were multiplied by."""

    queries: Tensor
    keys: Tensor
    query_scales: Tensor
    key_scales: Tensor
    positives: Tensor  # (N,) each query's product with its positive


def product_tiles(dtype: torch.dtype, device: torch.device, wide: bool) -> ProductTiles:
    """`wide` for a kernel that needs few registers beside its tile."""
    if INTERPRETED:
        return ProductTiles(32, 64 if wide else 32, 32, 1, 1)
    if dtype == torch.float32:
        return ProductTiles(64, 64, 32, 4, 3)
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 12 or (major == 8 and minor > 0):  # 100 KB of shared memory
        return ProductTiles(128, 128, 32, 8, 3)
    return ProductTiles(128, 256 if wide and major >= 9 else 128, 64, 8, 3)


def chunk_rows(num_queries: int, num_keys: int, dtype: torch.dtype, block_m: int) -> int:
    """Queries to a chunk: a multiple of `block_m` whose probabilities stay about MATRIX_BYTES."""
    rows = MATRIX_BYTES // (dtype.itemsize * num_keys) // block_m * block_m
    return min(max(rows, block_m), LARGEST_CHUNK, triton.cdiv(num_queries, block_m) * block_m)


def unit_rows(queries: Tensor, keys: Tensor, targets: Tensor, normalize: bool) -> UnitRows:
    (num_queries, size), num_keys = queries.shape, keys.shape[0]
    padded_size = triton.cdiv(size, 64) * 64

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=queries.device)

    result = UnitRows(
        empty(num_queries, padded_size, dtype=queries.dtype),
        empty(num_keys, padded_size, dtype=keys.dtype),
        empty(num_queries),
        empty(num_keys),
        empty(num_queries),
    )
    _contrastive_unit_rows_kernel[(num_queries + num_keys,)](
        queries_ptr=queries,
        keys_ptr=keys,
        targets_ptr=targets,
        unit_queries_ptr=result.queries,
        unit_keys_ptr=result.keys,
        query_scales_ptr=result.query_scales,
        key_scales_ptr=result.key_scales,
        positives_ptr=result.positives,
        num_keys=num_keys,
        size=size,
        padded_size=padded_size,
        stride_qn=queries.stride(0),
        stride_qe=queries.stride(1),
        stride_km=keys.stride(0),
        stride_ke=keys.stride(1),
        NORMALIZE=normalize,
        **_row_launch(queries.dtype, padded_size),
    )
    return result


class Chunks:
    """The launches over chunks of rows; buffers are those of the largest chunk."""

    def __init__(self, units: UnitRows, targets: Tensor, groups: Tensor | None, temperature: Tensor, wide: bool):
        self.units, self.targets, self.temperature = units, targets, temperature
        self.groups = None if groups is None else _dense(groups)
        (self.num_queries, self.padded_size), self.num_keys = units.queries.shape, units.keys.shape[0]
        self.dtype, self.device = units.queries.dtype, units.queries.device
        self.tiles = product_tiles(self.dtype, self.device, wide)
        self.step = chunk_rows(self.num_queries, self.num_keys, self.dtype, self.tiles.block_m)
        self.num_tiles = triton.cdiv(self.num_keys, self.tiles.block_n)

    def __iter__(self):
        for start in range(0, self.num_queries, self.step):
            yield slice(start, min(start + self.step, self.num_queries))

    def numbers(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def matrix(self) -> Tensor:
        """(step, num_tiles * block_n): whole tiles, so that rows are aligned and no store needs a mask."""
        return torch.empty((self.step, self.num_tiles * self.tiles.block_n), dtype=self.dtype, device=self.device)

    def num_row_tiles(self, chunk: slice) -> int:
        return triton.cdiv(chunk.stop - chunk.start, self.tiles.block_m)

    def product_arguments(self, chunk: slice, tiles: ProductTiles) -> dict:
        """What every kernel that multiplies takes."""
        return {
            "queries_ptr": self.units.queries[chunk],
            "keys_ptr": self.units.keys,
            "targets_ptr": self.targets[chunk],
            "groups_ptr": self.temperature if self.groups is None else self.groups,
            "temperature_ptr": self.temperature,
            "num_rows": chunk.stop - chunk.start,
            "num_keys": self.num_keys,
            "padded_size": self.padded_size,
            "num_tiles": self.num_tiles,
            "HAS_GROUPS": self.groups is not None,
            "BLOCK_M": tiles.block_m,
            "BLOCK_N": tiles.block_n,
            "BLOCK_K": tiles.block_k,
            "UPCAST": INTERPRETED and self.dtype == torch.bfloat16,
            "num_warps": tiles.num_warps,
            "num_stages": tiles.num_stages,
        }

    def launch_probabilities(
        self, chunk: slice, partials: Tensor, flags: Tensor, shifts: Tensor, matrix: Tensor | None
    ) -> None:
        """Probabilities (step, M), their tiles' sums, and both again where a row's `flags` ask for it."""
        written = self.units.queries if matrix is None else matrix
        row_tiles = self.num_row_tiles(chunk)
        arguments = {
            "positives_ptr": self.units.positives[chunk],
            "probabilities_ptr": written,
            "partials_ptr": partials,
            "flags_ptr": flags,
            "stride_probabilities": written.stride(0),
            "HAS_GRADIENT": matrix is not None,
        }
        _contrastive_probabilities_kernel[(row_tiles * self.num_tiles,)](
            num_row_tiles=row_tiles, **arguments, **self.product_arguments(chunk, self.tiles)
        )
        tiles = product_tiles(self.dtype, self.device, wide=False)
        _contrastive_repair_kernel[(row_tiles,)](shifts_ptr=shifts, **arguments, **self.product_arguments(chunk, tiles))

    def launch_finish_rows(
        self,
        chunk: slice,
        partials: Tensor,
        flags: Tensor,
        shifts: Tensor,
        matrix: Tensor | None,
        scaled: Tensor | None,
        losses: Tensor,
        dots: Tensor,
        inverse_sums: Tensor,
    ) -> None:
        queries = self.units.queries[chunk]
        written = queries if matrix is None else matrix
        _contrastive_finish_rows_kernel[(queries.shape[0],)](
            partials_ptr=partials,
            flags_ptr=flags,
            shifts_ptr=shifts,
            targets_ptr=self.targets[chunk],
            queries_ptr=queries,
            positives_ptr=written[:, 0],  # one element of each row is written
            scaled_ptr=queries if scaled is None else scaled,
            losses_ptr=losses[chunk],
            dots_ptr=dots[chunk],
            inverse_sums_ptr=inverse_sums,
            num_rows=queries.shape[0],
            num_tiles=self.num_tiles,
            padded_size=self.padded_size,
            stride_probabilities=written.stride(0),
            HAS_GRADIENT=matrix is not None,
            BLOCK_M=self.tiles.block_m,
            BLOCK_T=min(triton.next_power_of_2(self.num_tiles), 512),
            **_row_launch(self.dtype, self.padded_size),
        )

    def launch_statistics(self, chunk: slice, row_lse: Tensor, column_lse: Tensor | None) -> None:
        """Log-sum-exps by tiles: (rows, num_tiles) of each row's negatives, (row tiles, M) of each column."""
        row_tiles = self.num_row_tiles(chunk)
        _contrastive_statistics_kernel[(row_tiles * self.num_tiles,)](
            row_lse_ptr=row_lse,
            column_lse_ptr=row_lse if column_lse is None else column_lse,
            num_row_tiles=row_tiles,
            HAS_COLUMNS=column_lse is not None,
            **self.product_arguments(chunk, self.tiles),
        )

    def launch_gradient(
        self, chunk: slice, row_lse: Tensor, column_lse: Tensor | None, matrix: Tensor, dots: Tensor, scale: float
    ) -> None:
        """`scale` times d loss / d scores (step, M), and its rows' dot products with the scores, by tiles."""
        row_tiles = self.num_row_tiles(chunk)
        _contrastive_gradient_kernel[(row_tiles * self.num_tiles,)](
            positives_ptr=self.units.positives[chunk],
            row_lse_ptr=row_lse[chunk],
            column_lse_ptr=row_lse if column_lse is None else column_lse,
            gradient_ptr=matrix,
            dots_ptr=dots,
            num_row_tiles=row_tiles,
            stride_gradient=matrix.stride(0),
            gradient_scale=scale,
            SYMMETRIC=column_lse is not None,
            **self.product_arguments(chunk, self.tiles),
        )


class Gradients:
    """Those of queries and keys, from each chunk's matrix of d loss / d scores."""

    def __init__(self, chunks: Chunks, size: int, normalize: bool, weight: float):
        self.chunks, self.normalize, self.weight = chunks, normalize, weight
        dtype, device = gradient_dtype(chunks.dtype), chunks.device
        self.queries = torch.empty((chunks.num_queries, size), dtype=dtype, device=device)
        self.keys = torch.empty((chunks.num_keys, size), dtype=dtype, device=device)
        self.rows = chunks.numbers(chunks.step, chunks.padded_size)
        self.totals = chunks.numbers(chunks.num_keys, chunks.padded_size)

    def add(self, chunk: slice, matrix: Tensor, queries: Tensor, inverse_sums: Tensor | None) -> None:
        """`queries` (rows, E) are the chunk's, over its sums of probabilities if the matrix has not been divided."""
        units = self.chunks.units
        rows = chunk.stop - chunk.start
        gradient = matrix[:rows, : self.chunks.num_keys]
        multiply(gradient, units.keys, self.rows[:rows])
        self._finish(
            self.rows[:rows], units.queries[chunk], units.query_scales[chunk], inverse_sums, self.queries[chunk]
        )
        if chunk.start == 0:
            multiply(gradient.T, queries, self.totals)
        else:
            accumulate(self.totals, gradient.T, queries)

    def finish_keys(self) -> None:
        units = self.chunks.units
        self._finish(self.totals, units.keys, units.key_scales, None, self.keys)

    def _finish(
        self, gradient: Tensor, units: Tensor, scales: Tensor, inverse_sums: Tensor | None, out: Tensor
    ) -> None:
        _contrastive_finish_gradient_kernel[(out.shape[0],)](
            gradient_ptr=gradient,
            units_ptr=units,
            scales_ptr=scales,
            inverse_sums_ptr=scales if inverse_sums is None else inverse_sums,
            temperature_ptr=self.chunks.temperature,
            out_ptr=out,
            size=out.shape[1],
            padded_size=self.chunks.padded_size,
            weight=self.weight,
            HAS_SUMS=inverse_sums is not None,
            NORMALIZE=self.normalize,
            **_row_launch(out.dtype, self.chunks.padded_size),
        )


def log_sum_exps(
    queries: Tensor, keys: Tensor, targets: Tensor, groups: Tensor | None, temperature: Tensor, normalize: bool
) -> tuple[Tensor, Tensor]:
    """Of each column's scores, (M,), and of those of each query's negatives, (N,); float32."""
    units = unit_rows(queries, keys, targets, normalize)
    chunks = Chunks(units, targets, groups, temperature, wide=False)
    return _statistics(chunks, has_columns=True)


def _statistics(chunks: Chunks, has_columns: bool) -> tuple[Tensor, Tensor]:
    row_lse = chunks.numbers(chunks.num_queries)
    columns = chunks.numbers(0)
    parts = chunks.numbers(chunks.step, chunks.num_tiles)
    column_parts = chunks.numbers(chunks.step // chunks.tiles.block_m, chunks.num_keys) if has_columns else None
    for chunk in chunks:
        rows = parts[: chunk.stop - chunk.start]
        chunks.launch_statistics(chunk, rows, column_parts)
        torch.logsumexp(rows, 1, out=row_lse[chunk])
        if column_parts is not None:
            ours = column_parts[: chunks.num_row_tiles(chunk)].logsumexp(0)
            columns = ours if chunk.start == 0 else torch.logaddexp(columns, ours)
    return columns, row_lse


def loss_and_gradients(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor,
    groups: Tensor | None,
    column_lse: Tensor | None,
    row_lse: Tensor | None,
    temperature: Tensor,
    normalize: bool,
    needs_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `eager.loss_and_gradients`, the temperature's gradient as parts (N,) of a sum.

    `row_lse` (N,) of the queries' negatives comes with `column_lse`.
    """
    one_pass = column_lse is None and queries.dtype != torch.float16
    units = unit_rows(queries, keys, targets, normalize)
    chunks = Chunks(units, targets, groups, temperature, wide=one_pass)
    weight = (1.0 if column_lse is None else 0.5) / chunks.num_queries
    scale = FLOAT16_GRADIENT_SCALE if queries.dtype == torch.float16 else 1.0
    gradients = Gradients(chunks, queries.shape[1], normalize, weight / scale) if needs_gradient else None
    if one_pass:
        losses, dots = _one_pass(chunks, gradients)
    else:
        if row_lse is None:
            _, row_lse = _statistics(chunks, has_columns=False)
        positives = chunks.units.positives / temperature
        losses = torch.nn.functional.softplus(row_lse - positives)
        if column_lse is not None:
            losses += column_lse[targets] - positives
        dots = losses
        if gradients is not None:
            dots = _second_pass(chunks, gradients, row_lse, column_lse, scale)
    loss = losses.sum() * weight
    if gradients is None:
        return loss, queries.new_empty(0), keys.new_empty(0), dots
    gradients.finish_keys()
    return loss, gradients.queries, gradients.keys, dots.mul_(-weight / temperature)


def _one_pass(chunks: Chunks, gradients: Gradients | None) -> tuple[Tensor, Tensor]:
    """Each query's loss, and its gradient's dot product with the scores, both (N,)."""
    losses, dots = chunks.numbers(chunks.num_queries), chunks.numbers(chunks.num_queries)
    inverse_sums, shifts = chunks.numbers(chunks.step), chunks.numbers(chunks.step)
    partials = chunks.numbers(2, chunks.step, chunks.num_tiles)
    tiles_of_all = triton.cdiv(chunks.num_queries, chunks.tiles.block_m)
    all_flags = torch.zeros(tiles_of_all, dtype=torch.int32, device=chunks.device)
    matrix = scaled = None
    if gradients is not None:
        matrix = chunks.matrix()
        scaled = torch.empty_like(chunks.units.queries[: chunks.step])
    for chunk in chunks:
        flags = all_flags[chunk.start // chunks.tiles.block_m :]
        chunks.launch_probabilities(chunk, partials, flags, shifts, matrix)
        chunks.launch_finish_rows(chunk, partials, flags, shifts, matrix, scaled, losses, dots, inverse_sums)
        if gradients is not None and matrix is not None and scaled is not None:
            rows = chunk.stop - chunk.start
            gradients.add(chunk, matrix, scaled[:rows], inverse_sums[:rows])
    return losses, dots


def _second_pass(
    chunks: Chunks, gradients: Gradients, row_lse: Tensor, column_lse: Tensor | None, scale: float
) -> Tensor:
    """The gradient's dot products with the scores, (N,)."""
    matrix, dots = chunks.matrix(), chunks.numbers(chunks.num_queries)
    parts = chunks.numbers(chunks.step, chunks.num_tiles)
    for chunk in chunks:
        rows = parts[: chunk.stop - chunk.start]
        chunks.launch_gradient(chunk, row_lse, column_lse, matrix, rows, scale)
        torch.sum(rows, 1, out=dots[chunk])
        gradients.add(chunk, matrix, chunks.units.queries[chunk], None)
    return dots


def _row_launch(dtype: torch.dtype, padded_size: int) -> dict:
    """What the kernels of one program a row take."""
    block_e = min(triton.next_power_of_2(padded_size), 2048)
    return {
        "UPCAST": INTERPRETED and dtype == torch.bfloat16,
        "BLOCK_E": block_e,
        "num_warps": 4 if block_e > 512 else 2,
    }


def _dense(groups: Tensor) -> Tensor:
    """int32 numbers that are equal where those of `groups` (M,) are, and -1 where they are: half the registers."""
    ordered, places = groups.sort()
    numbers = torch.zeros_like(ordered, dtype=torch.int32)
    torch.cumsum(ordered[1:] != ordered[:-1], 0, dtype=torch.int32, out=numbers[1:])
    return torch.empty_like(numbers).scatter_(0, places, numbers).masked_fill_(groups < 0, -1)
