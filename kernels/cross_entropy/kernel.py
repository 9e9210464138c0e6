"""Cross-entropy of a chunk of logits on the GPU: a program goes over its row twice, the second time in L2."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, narrow


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    targets_ptr,
    losses_ptr,
    vocab_size,
    stride_logits,
    scale,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(targets_ptr + row)
    logits_ptr += row * stride_logits
    at_target = tl.load(logits_ptr + target).to(tl.float32)
    maximum = at_target
    total = 0.0
    for start in tl.range(0, vocab_size, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + columns, mask=columns < vocab_size, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(logits, axis=0))
        total = total * tl.exp(maximum - larger) + tl.sum(tl.exp(logits - larger), axis=0)
        maximum = larger
    # never maximum + log(total): a confident row's total is all that is left of its loss
    tl.store(losses_ptr + row, tl.log(total) + (maximum - at_target))
    if NEEDS_GRADIENT:
        for start in tl.range(0, vocab_size, BLOCK_V):
            columns = start + tl.arange(0, BLOCK_V)
            inside = columns < vocab_size
            logits = tl.load(logits_ptr + columns, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(logits - maximum) / total
            gradient = tl.where(columns == target, gradient - 1.0, gradient) * scale
            tl.store(logits_ptr + columns, narrow(gradient, logits_ptr.dtype.element_ty, UPCAST), mask=inside)


def differentiate_rows(logits: Tensor, targets: Tensor, losses: Tensor, scale: float, needs_gradient: bool) -> None:
    """Each row's loss into `losses` (rows,); where needed, `scale` times its gradient over `logits` (rows, V)."""
    num_rows, vocab_size = logits.shape
    block_v = min(triton.next_power_of_2(vocab_size), 4096)
    _cross_entropy_kernel[(num_rows,)](
        logits_ptr=logits,
        targets_ptr=targets,
        losses_ptr=losses,
        vocab_size=vocab_size,
        stride_logits=logits.stride(0),
        scale=scale,
        NEEDS_GRADIENT=needs_gradient,
        BLOCK_V=block_v,
        UPCAST=INTERPRETED and logits.dtype == torch.bfloat16,
        num_warps=8 if block_v >= 2048 else 4,
    )
