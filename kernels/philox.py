"""Random masks that need no storage: Philox 4x32-10 (Salmon et al., 2011) on the position inside the sequence.

The key is the sequence's 64-bit seed; the counter is (query, key // 4, head, stream) with local positions, 32 bits
each, and key `n` takes the word `n % 4`. So a mask does not depend on tiles, on neighbours or on where the sequence
stands, the backward draws the forward's mask again, and nothing can wrap. `reference.py` draws the same words in plain
torch.
"""

import triton
import triton.language as tl

# counter words that keep the two masks of one attention apart
DROPOUT_STREAM = tl.constexpr(0)
FUTURE_STREAM = tl.constexpr(1)


@triton.jit
def _unit_interval(bits):
    # the upper 24 bits are exact in float32
    return (bits >> 8).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def uniform_rows(seed, query, head, key_start, stream: tl.constexpr, BLOCK_N: tl.constexpr):
    """Uniform numbers in [0, 1) for queries [M] with heads [M] and BLOCK_N keys from `key_start`, a multiple of 4.

    Returns [M, BLOCK_N].
    """
    group = (key_start // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    query = query[:, None] + group * 0
    head = head[:, None] + group * 0
    group = group + query * 0
    w0, w1, w2, w3 = tl.philox(seed, query, group, head, query * 0 + stream)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [M, BLOCK_N / 4, 2, 2]
    return _unit_interval(tl.reshape(words, [query.shape[0], BLOCK_N]))


@triton.jit
def uniform_columns(seed, query, head, key_start, stream: tl.constexpr, BLOCK_N: tl.constexpr):
    """The transpose of `uniform_rows`, computed as such: [BLOCK_N, M]."""
    group = (key_start // 4 + tl.arange(0, BLOCK_N // 4))[:, None]
    query = query[None, :] + group * 0
    head = head[None, :] + group * 0
    group = group + query * 0
    w0, w1, w2, w3 = tl.philox(seed, query, group, head, query * 0 + stream)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BLOCK_N / 4, M, 2, 2]
    return _unit_interval(tl.reshape(tl.permute(words, [0, 2, 3, 1]), [BLOCK_N, query.shape[1]]))
