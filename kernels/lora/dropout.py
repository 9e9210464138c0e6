"""The LoRA linears' dropout mask drawn on the GPU: Philox 4x64-10 (Salmon et al., 2011), bit for bit numpy's stream."""

import torch
import triton
import triton.language as tl
from torch import Tensor

COUNTERS = 256  # of sixteen elements each, a program


@triton.jit(do_not_specialize=["num_counters", "seed", "threshold"])
def _keep_kernel(words_ptr, num_counters, seed, threshold, BLOCK: tl.constexpr):
    counter = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    multiplier_a = tl.full([BLOCK], 0xD2E7470EE14C6C93, tl.uint64)
    multiplier_b = tl.full([BLOCK], 0xCA5A826395121157, tl.uint64)
    step_a = tl.full([BLOCK], 0x9E3779B97F4A7C15, tl.uint64)
    step_b = tl.full([BLOCK], 0xBB67AE8584CAA73B, tl.uint64)
    c0 = (counter + 1).to(tl.uint64)  # numpy counts before it draws
    c1 = tl.zeros([BLOCK], tl.uint64)
    c2 = tl.zeros([BLOCK], tl.uint64)
    c3 = tl.zeros([BLOCK], tl.uint64)
    k0 = c1 + seed.to(tl.int64).to(tl.uint64)
    k1 = tl.zeros([BLOCK], tl.uint64)
    for _ in tl.static_range(10):
        high_a, low_a = tl.umulhi(multiplier_a, c0), multiplier_a * c0
        high_b, low_b = tl.umulhi(multiplier_b, c2), multiplier_b * c2
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0 += step_a
        k1 += step_b
    inside = counter < num_counters
    tl.store(words_ptr + counter * 4, _keep_bytes(c0, threshold), mask=inside)
    tl.store(words_ptr + counter * 4 + 1, _keep_bytes(c1, threshold), mask=inside)
    tl.store(words_ptr + counter * 4 + 2, _keep_bytes(c2, threshold), mask=inside)
    tl.store(words_ptr + counter * 4 + 3, _keep_bytes(c3, threshold), mask=inside)


@triton.jit
def _keep_bytes(word, threshold):
    # four elements of sixteen bits, low end first, as the bytes of one word
    keep = tl.zeros_like(word).to(tl.int32)
    for lane in tl.static_range(4):
        bits = ((word >> (16 * lane)) & 0xFFFF).to(tl.int32)
        keep |= (bits >= threshold).to(tl.int32) << (8 * lane)
    return keep


def draw_keep_mask(shape: tuple[int, ...], threshold: int, seed: int, device: torch.device) -> Tensor:
    """bool `shape`: which elements' sixteen bits are at least `threshold`."""
    numel = torch.Size(shape).numel()
    num_counters = triton.cdiv(numel, 16)
    words = torch.empty(4 * num_counters, dtype=torch.int32, device=device)
    if num_counters:
        signed = seed - 2**64 if seed >= 2**63 else seed
        with torch.cuda.device_of(words):
            _keep_kernel[(triton.cdiv(num_counters, COUNTERS),)](
                words,
                num_counters,
                signed,
                threshold,
                BLOCK=COUNTERS,
                num_warps=4,
            )
    return words.view(torch.bool)[:numel].view(shape)
