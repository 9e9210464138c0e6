"""Attention over packed sequences as a differentiable torch operator: `varlen_attention`, of any mask a window
describes.

    scores = q @ k.T * softmax_scale                    # for every sequence and head
    output = softmax(where(visible, scores, -inf)) @ v

`reference.py` says the same in eager PyTorch. `T` packed tokens (a slab's capacity), `S` sequences (likewise), `H`
query heads, `G` key/value heads, `D` head dimension. The launch depends on these alone: no length is read back, so a
call can be captured in a CUDA graph, and a sequence's result depends on nothing but itself.
"""

import torch
from torch import Tensor

from ..checks import describe
from .arguments import (
    check_chances,
    check_cu_seqlens,
    check_scale,
    check_seeds,
    check_tensors,
    check_tile_list,
    check_window,
)


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    *,
    window_size: tuple[int, int] = (-1, -1),
    softmax_scale: float | None = None,
    dropout_p: float = 0.0,
    future_p: float | Tensor = 1.0,
    seeds: Tensor | None = None,
    tile_list: Tensor | None = None,
) -> Tensor:
    """Attention within each packed sequence; (T, H, D), (T, G, D), (T, G, D) -> (T, H, D).

    q, k, v          bfloat16, float16 or float32 (multiplied as float32, never tf32); G divides H, D is 16 to 256; the
                     last dimension contiguous, the others strided at will: slices of a fused projection need no copy
    cu_seqlens       int32 (S + 1,), from 0 up, on the device. Rows at and beyond `cu_seqlens[-1]` are written as
                     zero, in the output and in every gradient
    max_seqlen       taken for flash-attention's signature; nothing is computed from it
    window_size      a query sees keys from `left` before to `right` after it, -1 for no bound: (-1, -1) is
                     bidirectional, (-1, 0) causal
    softmax_scale    default D ** -0.5
    dropout_p        in [0, 1): probabilities are dropped with this chance, the others scaled by 1 / (1 - dropout_p)
    future_p         in [0, 1]: each key ahead of its query is shown with this chance, the same to all heads. A
                     float32 tensor of one element on the device may stand for it, so that a captured graph can anneal
    seeds            int64 (S,) on the device, needed by the last two: the mask of a sequence is Philox 4x32-10 keyed by
                     its seed, on local positions
    tile_list        what `list_tiles(cu_seqlens, T)` gives, made once for all layers of a pass; made here if None

    Raises ValueError for arguments that break these rules, and for CPU tensors, which only Triton's interpreter takes
    (TRITON_INTERPRET=1 before triton is imported).
    """
    _check_kernel_limits(q)
    check_tensors(q, k, v, cu_seqlens)
    check_tile_list(tile_list, cu_seqlens)
    _check_strides(q, k, v)
    left, right = check_window(window_size)
    if not isinstance(max_seqlen, int) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be a number of tokens, got {max_seqlen!r}")
    future_p_tensor = None
    if isinstance(future_p, Tensor):
        if future_p.numel() != 1 or future_p.dtype != torch.float32 or future_p.device != q.device:
            raise ValueError(
                f"future_p must be a number or one float32 element on {q.device}, "
                f"got {describe(future_p)} on {future_p.device}"
            )
        future_p, future_p_tensor = 1.0, future_p
    check_chances(dropout_p, future_p)
    random = dropout_p > 0.0 or future_p < 1.0 or future_p_tensor is not None
    check_seeds(seeds, random, cu_seqlens)
    scale = check_scale(softmax_scale, q.shape[2])
    from ..ragged import INTERPRETED  # triton is there on Linux only
    from .operator import attention_forward
    from .tile_list import make_tile_list

    if q.device.type != "cuda" and not (q.device.type == "cpu" and INTERPRETED):
        raise ValueError(
            f"q must be on a CUDA device, got {q.device}; on a CPU use bivec.kernels.reference.varlen_attention or "
            "torch's scaled_dot_product_attention or, to test the kernel, set TRITON_INTERPRET=1 before triton loads"
        )
    out, _ = attention_forward(
        q,
        k,
        v,
        cu_seqlens,
        make_tile_list(cu_seqlens, q.shape[0]) if tile_list is None else tile_list,
        left,
        right,
        scale,
        float(dropout_p),
        float(future_p),
        future_p_tensor,
        seeds if random else None,
    )
    return out


def list_tiles(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """The work of attention over a packed batch as a list on the device, for every layer of a pass and its backward.

    cu_seqlens       int32 (S + 1,), from 0 up, on the device
    num_tokens       T, rows of the packed batch with its unused tail

    One small kernel; nothing is read back, so that a CUDA graph can hold it. Returns int32 (N, 4); N depends on S and T
    alone. The list belongs to these lengths: after `cu_seqlens` has changed it must be made again. Raises ValueError
    for a `cu_seqlens` that is not as above.
    """
    check_cu_seqlens(cu_seqlens)
    from .tile_list import make_tile_list

    return make_tile_list(cu_seqlens, num_tokens)


def _check_kernel_limits(q: Tensor) -> None:
    if q.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"q must be bfloat16, float16 or float32, got {describe(q)}")
    if q.dim() == 3 and not 16 <= q.shape[2] <= 256:
        raise ValueError(f"q must have a head dimension of 16 to 256, got {q.shape[2]}")


def _check_strides(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(2) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got strides {tensor.stride()}")
