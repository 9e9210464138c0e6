"""The LoRA linears' passes over their input under dropout on the GPU: drawn once, their mask is kept as bits.

    low    = drop(x) @ a.T         draws the mask on its way; columns of frozen adapters see x itself
    grad_x += drop(grad_low @ a)   in place, frozen adapters' part not dropped
    grad_a = grad_low.T @ drop(x)

Each reads `x`, or reads and writes `grad_x`, once. `drop` scales what it keeps by `scale`. Bits are Philox 4x64-10's
(Salmon et al., 2011), numpy's stream: sixteen an element, in memory order of a contiguous x.

Shapes: T tokens, E input features, R columns of all adapters, of which the first `num_trained` are dropped; W = ceil(E
/ 16) words of sixteen bits, one an element, low end first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, matmul, narrow

PROGRAMS = 512  # about as many as a GPU runs at once, for sums over tokens


@triton.jit
def _multiply(CONSTANT_HIGH: tl.constexpr, CONSTANT_LOW: tl.constexpr, high, low):
    """The 128 bits of a constant of 64 times (high, low), as four words of 32, high ones first.

    Four products of 32 bits; `umulhi` and `*` would take twelve.
    """
    low = low.to(tl.uint64)
    high = high.to(tl.uint64)
    first = low * CONSTANT_LOW
    second = low * CONSTANT_HIGH + (first >> 32)
    third = high * CONSTANT_LOW + (second & 0xFFFFFFFF)
    fourth = high * CONSTANT_HIGH + (second >> 32) + (third >> 32)
    return (fourth >> 32).to(tl.uint32), fourth.to(tl.uint32), third.to(tl.uint32), first.to(tl.uint32)


@triton.jit
def _counter_bits(counter, seed, threshold):
    """Which of the sixteen elements of each counter stay, as sixteen bits."""
    counter += 1  # numpy counts before it draws
    # the four words of 64 bits in halves
    low0, high0 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    low1, high1 = tl.zeros_like(low0), tl.zeros_like(low0)
    low2, high2 = tl.zeros_like(low0), tl.zeros_like(low0)
    low3, high3 = tl.zeros_like(low0), tl.zeros_like(low0)
    key0 = seed.to(tl.int64).to(tl.uint64)
    key1 = key0 * 0
    for _ in tl.static_range(10):
        ahigh, amid, alow_high, alow = _multiply(0xD2E7470E, 0xE14C6C93, high0, low0)
        bhigh, bmid, blow_high, blow = _multiply(0xCA5A8263, 0x95121157, high2, low2)
        high0, low0 = bhigh ^ high1 ^ (key0 >> 32).to(tl.uint32), bmid ^ low1 ^ key0.to(tl.uint32)
        high2, low2 = ahigh ^ high3 ^ (key1 >> 32).to(tl.uint32), amid ^ low3 ^ key1.to(tl.uint32)
        high1, low1, high3, low3 = blow_high, blow, alow_high, alow
        key0 += 0x9E3779B97F4A7C15
        key1 += 0xBB67AE8584CAA73B
    bits = _two_bits(low0, threshold) | (_two_bits(high0, threshold) << 2)
    bits |= (_two_bits(low1, threshold) << 4) | (_two_bits(high1, threshold) << 6)
    bits |= (_two_bits(low2, threshold) << 8) | (_two_bits(high2, threshold) << 10)
    return bits | (_two_bits(low3, threshold) << 12) | (_two_bits(high3, threshold) << 14)


@triton.jit
def _two_bits(word, threshold):
    first = (word & 0xFFFF).to(tl.int32) >= threshold
    second = (word >> 16).to(tl.int32) >= threshold
    return first.to(tl.int32) | (second.to(tl.int32) << 1)


@triton.jit
def _draw(first, seed, threshold, STRADDLES: tl.constexpr):
    """Bits of the sixteen elements from the places `first` on, which STRADDLES two counters or are one's own."""
    bits = _counter_bits(first // 16, seed, threshold)
    if STRADDLES:
        after = _counter_bits(first // 16 + 1, seed, threshold)
        bits = ((bits | (after << 16)) >> (first % 16).to(tl.int32)) & 0xFFFF
    return bits


@triton.jit
def _drop(values, bits):
    """`values` [M, 16 * N], zero where the bit in `bits` [M, N, 1] is."""
    keep = ((bits >> tl.arange(0, 16)[None, None, :]) & 1) != 0
    return tl.where(tl.reshape(keep, values.shape), values, tl.zeros_like(values))


@triton.jit
def _load_bits(bits_ptr, rows, num_tokens, start, NUM_WORDS: tl.constexpr, BLOCK_W: tl.constexpr):
    words = start // 16 + tl.arange(0, BLOCK_W)
    inside = (rows < num_tokens)[:, None, None] & (words < NUM_WORDS)[None, :, None]
    places = rows.to(tl.int64)[:, None, None] * NUM_WORDS + words[None, :, None]
    return tl.load(bits_ptr + places, mask=inside, other=0).to(tl.int32)


@triton.jit(do_not_specialize=["num_tokens", "seed", "threshold"])
def _low_rank_kernel(
    x_ptr,
    a_ptr,
    low_ptr,
    bits_ptr,
    num_tokens,
    stride_x,
    stride_a,
    stride_low,
    seed,
    threshold,
    scale,
    NUM_TRAINED: tl.constexpr,
    NUM_FROZEN: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_k = tl.arange(0, BLOCK_K)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * stride_x
    dropped = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    whole = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    for start in range(0, SIZE, BLOCK_K):
        inside = (start + offs_k) < SIZE
        x = tl.load(x_rows + (start + offs_k)[None, :], mask=(rows < num_tokens)[:, None] & inside[None, :], other=0.0)
        words = start // 16 + tl.arange(0, BLOCK_K // 16)
        first = rows.to(tl.int64)[:, None, None] * SIZE + words[None, :, None] * 16
        bits = _draw(first, seed, threshold, SIZE % 16 != 0)  # [BLOCK_M, BLOCK_K / 16, 1]
        if tl.program_id(1) == 0:
            places = rows.to(tl.int64)[:, None, None] * NUM_WORDS + words[None, :, None]
            inside_words = (rows < num_tokens)[:, None, None] & (words < NUM_WORDS)[None, :, None]
            tl.store(bits_ptr + places, bits.to(tl.int16), mask=inside_words)
        # the matrix of A's transposed, [BLOCK_K, BLOCK_R]
        a_ptrs = a_ptr + columns.to(tl.int64)[None, :] * stride_a + (start + offs_k)[:, None]
        a = tl.load(a_ptrs, mask=inside[:, None] & (columns < NUM_TRAINED)[None, :], other=0.0)
        dropped = matmul(_drop(x, bits), a, dropped, UPCAST)
        if NUM_FROZEN:
            a_ptrs += NUM_TRAINED * stride_a
            a = tl.load(a_ptrs, mask=inside[:, None] & (columns < NUM_FROZEN)[None, :], other=0.0)
            whole = matmul(x, a, whole, UPCAST)
    low_ptrs = low_ptr + rows.to(tl.int64)[:, None] * stride_low + columns[None, :]
    dtype = low_ptr.dtype.element_ty
    mask = (rows < num_tokens)[:, None] & (columns < NUM_TRAINED)[None, :]
    tl.store(low_ptrs, narrow(dropped * scale, dtype, UPCAST), mask=mask)
    if NUM_FROZEN:
        mask = (rows < num_tokens)[:, None] & (columns < NUM_FROZEN)[None, :]
        tl.store(low_ptrs + NUM_TRAINED, narrow(whole, dtype, UPCAST), mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _add_grad_x_kernel(
    grad_x_ptr,
    grad_low_ptr,
    a_ptr,
    bits_ptr,
    num_tokens,
    stride_grad_x,
    stride_low,
    stride_a,
    scale,
    NUM_TRAINED: tl.constexpr,
    NUM_FROZEN: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_N
    offs_n = start + tl.arange(0, BLOCK_N)
    grad_low_ptrs = grad_low_ptr + rows.to(tl.int64)[:, None] * stride_low
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in tl.static_range(0, NUM_TRAINED, BLOCK_R):
        total = _add_product(
            total, grad_low_ptrs, a_ptr, stride_a, rows, num_tokens, offs_n, begin, NUM_TRAINED, SIZE, BLOCK_R, UPCAST
        )
    bits = _load_bits(bits_ptr, rows, num_tokens, start, NUM_WORDS, BLOCK_N // 16)
    total = _drop(total * scale, bits)
    for begin in tl.static_range(NUM_TRAINED, NUM_TRAINED + NUM_FROZEN, BLOCK_R):
        total = _add_product(
            total,
            grad_low_ptrs,
            a_ptr,
            stride_a,
            rows,
            num_tokens,
            offs_n,
            begin,
            NUM_TRAINED + NUM_FROZEN,
            SIZE,
            BLOCK_R,
            UPCAST,
        )
    grad_x_ptrs = grad_x_ptr + rows.to(tl.int64)[:, None] * stride_grad_x + offs_n[None, :]
    mask = (rows < num_tokens)[:, None] & (offs_n < SIZE)[None, :]
    total += tl.load(grad_x_ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(grad_x_ptrs, narrow(total, grad_x_ptr.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def _add_product(
    total,
    grad_low_ptrs,
    a_ptr,
    stride_a,
    rows,
    num_tokens,
    offs_n,
    begin: tl.constexpr,
    END: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    columns = begin + tl.arange(0, BLOCK_R)
    mask = (rows < num_tokens)[:, None] & (columns < END)[None, :]
    grad_low = tl.load(grad_low_ptrs + columns[None, :], mask=mask, other=0.0)
    mask = (columns < END)[:, None] & (offs_n < SIZE)[None, :]
    a = tl.load(a_ptr + columns.to(tl.int64)[:, None] * stride_a + offs_n[None, :], mask=mask, other=0.0)
    return matmul(grad_low, a, total, UPCAST)


@triton.jit(do_not_specialize=["num_tokens", "rows_of_a_program"])
def _grad_a_kernel(
    x_ptr,
    grad_low_ptr,
    bits_ptr,
    partials_ptr,
    num_tokens,
    rows_of_a_program,
    stride_x,
    stride_low,
    scale,
    NUM_TRAINED: tl.constexpr,
    SIZE: tl.constexpr,
    NUM_WORDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    start = tl.program_id(0) * BLOCK_N
    offs_n = start + tl.arange(0, BLOCK_N)
    columns = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = tl.program_id(1) * rows_of_a_program
    total = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for begin in range(first, tl.minimum(first + rows_of_a_program, num_tokens), BLOCK_M):
        rows = begin + tl.arange(0, BLOCK_M)
        mask = (rows < num_tokens)[:, None] & (offs_n < SIZE)[None, :]
        x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * stride_x + offs_n[None, :], mask=mask, other=0.0)
        bits = _load_bits(bits_ptr, rows, num_tokens, start, NUM_WORDS, BLOCK_N // 16)
        mask = (rows < num_tokens)[:, None] & (columns < NUM_TRAINED)[None, :]
        grad_low = tl.load(
            grad_low_ptr + rows.to(tl.int64)[:, None] * stride_low + columns[None, :], mask=mask, other=0.0
        )
        total = matmul(tl.trans(grad_low), _drop(x, bits), total, UPCAST)
    places = (tl.program_id(1).to(tl.int64) * NUM_TRAINED + columns)[:, None] * SIZE + offs_n[None, :]
    mask = (columns < NUM_TRAINED)[:, None] & (offs_n < SIZE)[None, :]
    tl.store(partials_ptr + places, total * scale, mask=mask)


def _tile(num_columns: int, x: Tensor) -> dict:
    size = x.shape[1]
    most = 64 if x.element_size() == 2 else 32  # in float32 products take registers
    block_r = min(most, max(16, triton.next_power_of_2(num_columns)))
    return {
        "SIZE": size,
        "NUM_WORDS": triton.cdiv(size, 16),
        "BLOCK_M": most,
        "BLOCK_R": block_r,
        "UPCAST": INTERPRETED and x.dtype == torch.bfloat16,
        "num_warps": 8 if block_r == 64 else 4,
    }


def low_rank(x: Tensor, a: Tensor, low: Tensor, num_trained: int, threshold: int, seed: int, scale: float) -> Tensor:
    """Write `low` (T, R) from x (T, E) and a (R, E); the mask's bits, int16 (T, W)."""
    num_tokens, num_frozen = x.shape[0], a.shape[0] - num_trained
    most = max(num_trained, num_frozen)
    tile = _tile(most, x)
    bits = torch.empty((num_tokens, tile["NUM_WORDS"]), dtype=torch.int16, device=x.device)
    if bits.numel():
        with torch.cuda.device_of(x):
            _low_rank_kernel[(triton.cdiv(num_tokens, tile["BLOCK_M"]), triton.cdiv(most, tile["BLOCK_R"]))](
                x_ptr=x,
                a_ptr=a,
                low_ptr=low,
                bits_ptr=bits,
                num_tokens=num_tokens,
                stride_x=x.stride(0),
                stride_a=a.stride(0),
                stride_low=low.stride(0),
                seed=seed - 2**64 if seed >= 2**63 else seed,
                threshold=threshold,
                scale=scale,
                NUM_TRAINED=num_trained,
                NUM_FROZEN=num_frozen,
                BLOCK_K=tile["BLOCK_M"],
                **tile,
            )
    return bits


def add_grad_x(grad_x: Tensor, grad_low: Tensor, a: Tensor, bits: Tensor, num_trained: int, scale: float) -> None:
    """Add what reaches x (T, E) through the adapters to `grad_x`, from grad_low (T, R) and a (R, E)."""
    num_tokens, size = grad_x.shape
    if grad_x.numel() == 0:
        return
    block_n = 128 if grad_x.element_size() == 2 else 64
    num_frozen = a.shape[0] - num_trained
    tile = _tile(max(num_trained, num_frozen), grad_x)
    with torch.cuda.device_of(grad_x):
        _add_grad_x_kernel[(triton.cdiv(num_tokens, tile["BLOCK_M"]), triton.cdiv(size, block_n))](
            grad_x_ptr=grad_x,
            grad_low_ptr=grad_low,
            a_ptr=a,
            bits_ptr=bits,
            num_tokens=num_tokens,
            stride_grad_x=grad_x.stride(0),
            stride_low=grad_low.stride(0),
            stride_a=a.stride(0),
            scale=scale,
            NUM_TRAINED=num_trained,
            NUM_FROZEN=num_frozen,
            BLOCK_N=block_n,
            **tile,
        )


def grad_a(x: Tensor, grad_low: Tensor, bits: Tensor, num_trained: int, scale: float) -> Tensor:
    """float32 (num_trained, E) from x (T, E) and grad_low (T, R), summed in an order that T and E alone decide."""
    num_tokens, size = x.shape
    block_n = 128 if x.element_size() == 2 else 64
    tile = _tile(num_trained, x)
    blocks = triton.cdiv(size, block_n) * triton.cdiv(num_trained, tile["BLOCK_R"])
    tiles = max(1, triton.cdiv(num_tokens, tile["BLOCK_M"]))
    tiles_of_a_program = triton.cdiv(tiles, triton.cdiv(PROGRAMS, blocks))
    num_sums = triton.cdiv(tiles, tiles_of_a_program)
    partials = torch.empty((num_sums, num_trained, size), dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _grad_a_kernel[(triton.cdiv(size, block_n), num_sums, triton.cdiv(num_trained, tile["BLOCK_R"]))](
            x_ptr=x,
            grad_low_ptr=grad_low,
            bits_ptr=bits,
            partials_ptr=partials,
            num_tokens=num_tokens,
            rows_of_a_program=tiles_of_a_program * tile["BLOCK_M"],
            stride_x=x.stride(0),
            stride_low=grad_low.stride(0),
            scale=scale,
            NUM_TRAINED=num_trained,
            BLOCK_N=block_n,
            **tile,
        )
    return partials.sum(0)
