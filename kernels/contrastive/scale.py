"""The contrastive loss's gradients times its upstream gradient, in one launch."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ragged import INTERPRETED, narrow

BLOCK = 4096


@triton.jit
def _contrastive_scale_kernel(
    first_ptr,
    second_ptr,
    upstream_ptr,
    scaled_first_ptr,
    scaled_second_ptr,
    num_first,
    num_second,
    num_first_blocks,
    UPCAST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    upstream = tl.load(upstream_ptr).to(tl.float32)
    dtype = scaled_first_ptr.dtype.element_ty
    block = tl.program_id(0)
    if block < num_first_blocks:
        place = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(first_ptr + place, mask=place < num_first).to(tl.float32) * upstream
        tl.store(scaled_first_ptr + place, narrow(values, dtype, UPCAST), mask=place < num_first)
    else:
        place = (block - num_first_blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        values = tl.load(second_ptr + place, mask=place < num_second).to(tl.float32) * upstream
        tl.store(scaled_second_ptr + place, narrow(values, dtype, UPCAST), mask=place < num_second)


@torch.library.custom_op("bivec::contrastive_scale", mutates_args=())
def scale_gradients(gradients: Sequence[Tensor], upstream: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """One or two gradients times the scalar `upstream`, rounded once, to `dtype`."""
    scaled = [torch.empty(gradient.shape, dtype=dtype, device=gradient.device) for gradient in gradients]
    blocks = [triton.cdiv(gradient.numel(), BLOCK) for gradient in gradients]
    with torch.cuda.device_of(upstream):
        _contrastive_scale_kernel[(sum(blocks),)](
            first_ptr=gradients[0],
            second_ptr=gradients[-1],
            upstream_ptr=upstream,
            scaled_first_ptr=scaled[0],
            scaled_second_ptr=scaled[-1],
            num_first=gradients[0].numel(),
            num_second=gradients[-1].numel(),
            num_first_blocks=blocks[0],
            UPCAST=INTERPRETED and dtype == torch.bfloat16,
            BLOCK=BLOCK,
            num_warps=8,
        )
    return scaled


@scale_gradients.register_fake
def _(gradients, upstream, dtype):
    return [gradient.new_empty(gradient.shape, dtype=dtype) for gradient in gradients]
