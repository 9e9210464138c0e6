"""`philox.py`'s random masks without Triton: the same words, drawn on the CPU in numpy.

A counter is (query, key // 4, head, stream). Its words depend on few of these at first, so the first two and a half of
the ten rounds are done on small tables; then a chunk of counters that stays in the cache is worked on in place. The
64-bit product of two 32-bit words holds its high and its low word at once.

B sequences, H heads, L positions, K = ceil(L / 4) groups of keys.
"""

import math

import numpy as np
import torch
from torch import Tensor

DROPOUT_STREAM, FUTURE_STREAM = 0, 1
ROUND_A, ROUND_B = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
KEY_A, KEY_B = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
WORD, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
CHUNK = 2**14  # counters


def draw_at_least(seeds: Tensor, length: int, heads: range, stream: int, chance: float) -> Tensor:
    """Which uniform numbers are at least `chance` (a float32), bool (B, H, L, L) over queries and keys, on the CPU.

    seeds            int64 (B,), one a sequence
    """
    # a number is its word's upper 24 bits, so words and not floats can be compared
    threshold = np.uint64(math.ceil(float(np.float32(chance)) * 2**24) << 8)
    num_groups = -(-length // 4)
    drawn = np.empty((len(seeds), len(heads), length, num_groups, 4), dtype=np.bool_)
    keys = seeds.cpu().numpy().view(np.uint64)
    head_words = np.array(heads, dtype=np.uint64)
    counters = length * num_groups
    num_sequences = max(1, CHUNK // max(1, len(heads) * counters))
    chunk_heads = max(1, min(len(heads), CHUNK // max(1, counters)))
    scratch = np.empty((3, 2, num_sequences * chunk_heads * counters), dtype=np.uint64)
    for sequence in range(0, len(seeds), num_sequences):
        rows = slice(sequence, sequence + num_sequences)
        for head in range(0, len(heads), chunk_heads):
            columns = slice(head, head + chunk_heads)
            words = _words(keys[rows], head_words[columns], length, stream, scratch)
            for place, word in enumerate(words):
                drawn[rows, columns, :, :, place] = (word >= threshold).transpose(0, 2, 3, 1)
    return torch.from_numpy(drawn.reshape(len(seeds), len(heads), length, 4 * num_groups)[..., :length])


def _words(keys: np.ndarray, heads: np.ndarray, length: int, stream: int, scratch: np.ndarray) -> list[np.ndarray]:
    """The four words of every counter, uint64 (B, K, H, L) each, in `scratch` (3, 2, at least B K H L)."""
    key_a, key_b = (part[:, None, None, None] for part in (keys & WORD, keys >> HALF))
    query = np.arange(length, dtype=np.uint64)
    group = np.arange(-(-length // 4), dtype=np.uint64)[:, None, None]

    # round 1: c0, c2 of (B, K, H, 1) and (B, 1, 1, L)
    product_a, product_b = query * ROUND_A, heads[:, None] * ROUND_B
    c0, c1 = (product_b >> HALF) ^ group ^ key_a, product_b & WORD
    c2, c3 = (product_a >> HALF) ^ np.uint64(stream) ^ key_b, product_a & WORD
    # round 2: c0 of (B, 1, H, L), c2 of every counter
    key_a, key_b = (key_a + KEY_A) & WORD, (key_b + KEY_B) & WORD
    product_a, product_b = c0 * ROUND_A, c2 * ROUND_B
    c0, c1 = (product_b >> HALF) ^ c1 ^ key_a, product_b & WORD
    shape = (len(keys), len(group), len(heads), length)
    # lane 0 is (c0, c1), lane 1 is (c2, c3)
    first, second, product = scratch[:, :, : math.prod(shape)].reshape(3, 2, *shape)
    np.bitwise_xor((product_a >> HALF) ^ key_b, c3, out=first[1])
    c3 = product_a & WORD
    # round 3
    key_a, key_b = (key_a + KEY_A) & WORD, (key_b + KEY_B) & WORD
    product_a = c0 * ROUND_A
    np.multiply(first[1], ROUND_B, out=second[0])
    np.right_shift(second[0], HALF, out=first[0])
    np.bitwise_xor(first[0], c1 ^ key_a, out=first[0])
    np.bitwise_xor((product_a >> HALF) ^ key_b, c3, out=first[1])
    second[1] = product_a & WORD

    first, second, product = (array.reshape(2, len(keys), -1) for array in (first, second, product))
    factors = np.stack((ROUND_A, ROUND_B))[:, None, None]
    steps = np.stack((KEY_B, KEY_A))[:, None, None]
    round_keys = np.stack((key_b, key_a)).reshape(2, len(keys), 1)
    for _ in range(7):
        round_keys = (round_keys + steps) & WORD
        np.multiply(first, factors, out=product)
        np.right_shift(product, HALF, out=first)
        # a product's upper half goes into the other lane: instead of moving it, the lanes change their names
        np.bitwise_xor(first, second[::-1], out=first)
        np.bitwise_xor(first, round_keys, out=first)
        np.bitwise_and(first, WORD, out=first)
        second, product = product, second
        factors, steps, round_keys = factors[::-1], steps[::-1], round_keys[::-1]
    np.bitwise_and(second, WORD, out=second)
    # after seven exchanges lane 0 holds c2, c3
    return [lane.reshape(shape) for lane in (first[1], second[1], first[0], second[0])]
