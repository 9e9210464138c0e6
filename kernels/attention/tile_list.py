"""The work of a pass over packed sequences as a list on the device: which tile of which sequence each program takes.

A grid must not depend on the lengths, which live on the device, so a launch has the number of programs that the worst
lengths would need, and the list tells each its tile: the tail that no sequence uses first, then the tiles of the
longest sequence, of the next one, and so on (what takes longest starts first, and sequences that a kernel leaves to
another stand together behind those that it takes), and at the end those with nothing to do. Within a sequence the last
rows come first: under a causal mask they see most. A tile is TILE_ROWS rows; a kernel with smaller blocks gives it to
several programs. One list serves every layer of a pass and its backward.

`T` packed tokens, `S` sequences.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, store_rows

TILE_ROWS = 32 if INTERPRETED else 128  # blocks of every attention kernel divide it; the interpreter's are small


@triton.jit
def load_tile(list_ptr, num_heads, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """This program's (head, sequence, its first packed row, its length, first row of BLOCK in it)."""
    program = tl.program_id(0)
    block = program // num_heads
    tile_ptr = list_ptr + block // (ROWS // BLOCK) * 4
    row = tl.load(tile_ptr + 3) + block % (ROWS // BLOCK) * BLOCK
    return program % num_heads, tl.load(tile_ptr), tl.load(tile_ptr + 1), tl.load(tile_ptr + 2), row


@triton.jit
def zero_rows(ptr, stride_t, start, length, row, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Zero rows `row` to `row + ROWS` of a sequence in a (T, ...) matrix; `ptr` is at its first row."""
    ptrs = ptr + (start + row).to(tl.int64) * stride_t
    ptrs = ptrs + tl.arange(0, ROWS)[:, None] * stride_t + tl.arange(0, BLOCK_D)[None, :]
    zeros = tl.zeros([ROWS, BLOCK_D], ptr.dtype.element_ty)
    store_rows(ptrs, zeros, length - row, ROWS, HEAD_DIM, BLOCK_D, False)


@triton.jit
def _bounds(cu_seqlens_ptr, sequence, num_sequences, num_tokens):
    """First row and length of sequences [N]; the tail is sequence S, and after it they are empty."""
    start = tl.load(cu_seqlens_ptr + sequence, mask=sequence <= num_sequences, other=num_tokens)
    stop = tl.load(cu_seqlens_ptr + sequence + 1, mask=sequence < num_sequences, other=num_tokens)
    return start, stop - start


@triton.jit
def _rank(length, sequence, num_sequences):
    """What the list is sorted by, descending; the tail precedes any sequence."""
    return tl.where(sequence == num_sequences, 0x7FFFFFFF, length)


@triton.jit(do_not_specialize=["num_sequences", "num_tokens", "num_tiles"])
def _list_tiles_kernel(
    cu_seqlens_ptr,
    list_ptr,
    num_sequences,
    num_tokens,
    num_tiles,
    ROWS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    sequence = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    start, length = _bounds(cu_seqlens_ptr, sequence, num_sequences, num_tokens)
    rank = _rank(length, sequence, num_sequences)

    # where each sequence's tiles begin: all sequences are compared with these, which for thousands is microseconds
    place = tl.zeros([BLOCK_S], tl.int32)
    num_live = 0
    for first in tl.range(0, num_sequences + 1, BLOCK_T):
        other = first + tl.arange(0, BLOCK_T)
        _, other_length = _bounds(cu_seqlens_ptr, other, num_sequences, num_tokens)
        other_rank = _rank(other_length, other, num_sequences)[None, :]
        other_tiles = tl.cdiv(other_length, ROWS)
        precedes = (other_rank > rank[:, None]) | ((other_rank == rank[:, None]) & (other[None, :] < sequence[:, None]))
        place += tl.sum(tl.where(precedes, other_tiles[None, :], 0), axis=1)
        num_live += tl.sum(other_tiles, axis=0)

    tiles = tl.cdiv(length, ROWS)
    for first in tl.range(0, tl.max(tiles, axis=0), BLOCK_T):
        tile = (first + tl.arange(0, BLOCK_T))[None, :]
        ptrs = list_ptr + (place[:, None] + tile) * 4  # [BLOCK_S, BLOCK_T]
        own = tile < tiles[:, None]
        tl.store(ptrs, tl.where(sequence == num_sequences, -1, sequence)[:, None] + tile * 0, mask=own)
        tl.store(ptrs + 1, start[:, None] + tile * 0, mask=own)
        tl.store(ptrs + 2, length[:, None] + tile * 0, mask=own)
        tl.store(ptrs + 3, (tiles[:, None] - 1 - tile) * ROWS, mask=own)

    idle = num_live * 4 + tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    for first in tl.range(0, (num_tiles - num_live) * 4, tl.num_programs(0) * BLOCK_T):
        tl.store(list_ptr + first + idle, tl.zeros([BLOCK_T], tl.int32), mask=first + idle < num_tiles * 4)


@torch.library.custom_op("bivec::list_attention_tiles", mutates_args=())
def make_tile_list(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The list (N, 4), int32; a row is (sequence, its first packed row, its length, the tile's first row in it).

    The tail's sequence is -1, and a length of 0 is nothing to do. N follows from S and T alone.
    """
    num_sequences = cu_seqlens.shape[0] - 1
    num_tiles = max_tiles(num_tokens, num_sequences, 0)
    tile_list = torch.empty((num_tiles, 4), dtype=torch.int32, device=cu_seqlens.device)
    block = 64
    with torch.cuda.device_of(cu_seqlens):
        _list_tiles_kernel[(triton.cdiv(num_sequences + 1, block),)](
            cu_seqlens_ptr=cu_seqlens,
            list_ptr=tile_list,
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            num_tiles=num_tiles,
            ROWS=TILE_ROWS,
            BLOCK_S=block,
            BLOCK_T=32,  # a product of 64 and 128 would not fit into registers
            num_warps=4,
        )
    return tile_list


@make_tile_list.register_fake
def _(cu_seqlens, num_tokens):
    num_tiles = max_tiles(num_tokens, cu_seqlens.shape[0] - 1, 0)
    return cu_seqlens.new_empty((num_tiles, 4), dtype=torch.int32)


def over_tiles(
    tile_list: Tensor, num_tokens: int, num_sequences: int, short: int, num_heads: int, block: int
) -> tuple[tuple[int], dict]:
    """Grid and arguments of a kernel that takes the sequences above `short` in blocks of `block` rows."""
    grid = (max_tiles(num_tokens, num_sequences, short) * (TILE_ROWS // block) * num_heads,)
    return grid, {"tile_list_ptr": tile_list, "num_heads": num_heads, "TILE_ROWS": TILE_ROWS}


def max_tiles(num_tokens: int, num_sequences: int, short: int) -> int:
    """The most tiles that the tail and the sequences of more than `short` tokens can have: the front of the list."""
    parts = 1 + min(num_sequences, num_tokens // (short + 1))
    # a part of n rows has at most (n - 1) // TILE_ROWS + 1 tiles
    by_count = parts + max(num_tokens - parts, 0) // TILE_ROWS
    # and, if it has more than `short` rows, at most these for each token: one of short + 1, or two of TILE_ROWS + 1
    by_length = 1 + max(num_tokens // (short + 1), 2 * num_tokens // (TILE_ROWS + 1))
    return min(by_count, by_length)
