"""Rotary position embedding of packed queries and keys: the halves of each head turn by the token's angles.

    first, second = heads.chunk(2, dim=-1)
    heads = cat(first * cos - second * sin, second * cos + first * sin)

`reference.py` says the same. Nothing but the tables is kept: the gradient turns by the opposite angles. On CUDA a
Triton kernel (`kernel.py`) turns queries and keys in one launch, on the CPU chunks of tokens turn in cache.

Source: Su et al., arXiv 2104.09864. `T` packed tokens, `H` query heads, `G` key heads, `D` head dimension.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..checks import describe
from ..chunks import row_chunks, rows_to_a_chunk, wide_dtype


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor):
        ctx.save_for_backward(cos, sin)
        return _rotate(query, key, cos, sin, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_query: Tensor, grad_key: Tensor):
        cos, sin = ctx.saved_tensors
        return *_rotate(grad_query, grad_key, cos, sin, True), None, None


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    if query.is_cuda:
        from .kernel import rotate  # triton is there on Linux only

        return rotate(query, key, cos, sin, inverse)
    return _rotate_by_chunks(query, key, cos, sin, inverse)


def _rotate_by_chunks(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    return _turn(query, cos, sin, inverse), _turn(key, cos, sin, inverse)


def _turn(heads: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    num_tokens, num_heads, head_dim = heads.shape
    half, row_size = head_dim // 2, num_heads * head_dim
    turned = heads.new_empty(heads.shape)
    scratch = None
    if heads.dtype != cos.dtype:
        scratch = cos.new_empty((2, rows_to_a_chunk(num_tokens, row_size), num_heads, head_dim))
    sign = -1 if inverse else 1
    for rows in row_chunks(num_tokens, row_size):
        values, out = heads[rows], turned[rows]
        if scratch is not None:
            values, out = scratch[0, : len(values)].copy_(values), scratch[1, : len(values)]
        torch.mul(values, torch.cat((cos[rows], cos[rows]), dim=-1)[:, None], out=out)
        out[..., :half].addcmul_(values[..., half:], sin[rows, None], value=-sign)
        out[..., half:].addcmul_(values[..., :half], sin[rows, None], value=sign)
        if scratch is not None:
            turned[rows] = out
    return turned


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Queries (T, H, D) and keys (T, G, D) turned by the angles of `cos` and `sin`, (T, D / 2) each.

    The tables are float32 (float64 for float64 heads); products are taken in their dtype and rounded once.
    Differentiable, once, in query and key. Raises ValueError for shapes, dtypes or devices that do not fit.
    """
    if query.dim() != 3 or not query.is_floating_point() or query.shape[2] % 2:
        raise ValueError(f"query must be floating point (T, H, D) with D even, got {describe(query)}")
    num_tokens, _, head_dim = query.shape
    if key.dim() != 3 or key.shape[::2] != query.shape[::2] or key.dtype != query.dtype:
        raise ValueError(f"key must be {query.dtype} ({num_tokens}, G, {head_dim}) like query, got {describe(key)}")
    wide = wide_dtype(query.dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        if table.dtype != wide or table.shape != (num_tokens, head_dim // 2):
            raise ValueError(f"{name} must be {wide} ({num_tokens}, {head_dim // 2}), got {describe(table)}")
    for name, tensor in (("key", key), ("cos", cos), ("sin", sin)):
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on query's device {query.device}, got {tensor.device}")
    return _Rotary.apply(query, key, cos, sin)
