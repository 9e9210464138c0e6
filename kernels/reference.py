"""The specification: each operation of `kernels/` in eager PyTorch, with the same name, signature and random masks.

Slow, exact in any floating-point dtype, differentiable by autograd. `T` packed tokens, `S` sequences, `H` query heads,
`G` key/value heads, `D` head dimension; `N` queries, `M` keys, `E` embedding size, `V`
vocabulary.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

PHILOX_ROUND_A, PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
DROPOUT_STREAM, FUTURE_STREAM = 0, 1


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
    """softmax(q kᵀ · scale + mask) v within each sequence; (T, H, D), (T, G, D), (T, G, D) -> (T, H, D).

    The meaning of every argument is `bivec.kernels.attention.varlen_attention`'s. 16-bit inputs are multiplied in their
    own dtype with a float32 softmax, as eager models do; float32 and float64 stay what they are.
    """
    num_tokens, num_heads, head_dim = q.shape
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    softmax_dtype = q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
    left, right = window_size
    bounds = cu_seqlens.tolist()
    outputs = []
    for sequence, (start, stop) in enumerate(itertools.pairwise(bounds)):
        group_size = num_heads // k.shape[1]
        queries = q[start:stop].transpose(0, 1)  # (H, L, D)
        keys = k[start:stop].transpose(0, 1).repeat_interleave(group_size, dim=0)
        values = v[start:stop].transpose(0, 1).repeat_interleave(group_size, dim=0)
        position = torch.arange(stop - start, device=q.device)
        ahead = position[None, :] - position[:, None]  # (L, L), key minus query

        visible = torch.ones_like(ahead, dtype=torch.bool)
        if left >= 0:
            visible &= ahead >= -left
        if right >= 0:
            visible &= ahead <= right
        if isinstance(future_p, Tensor) or future_p < 1.0:
            assert seeds is not None
            chance = torch.as_tensor(future_p, dtype=torch.float32, device=q.device)
            visible &= (ahead <= 0) | (_uniform(seeds[sequence], stop - start, 1, FUTURE_STREAM)[0] < chance)

        scores = (queries @ keys.transpose(1, 2)).to(softmax_dtype) * scale
        probabilities = scores.masked_fill(~visible, float("-inf")).softmax(dim=-1)
        if dropout_p > 0.0:
            assert seeds is not None
            chance = torch.tensor(dropout_p, dtype=torch.float32)
            keep = _uniform(seeds[sequence], stop - start, num_heads, DROPOUT_STREAM) >= chance.to(q.device)
            probabilities = probabilities * keep / (1.0 - chance.item())
        outputs.append((probabilities.to(v.dtype) @ values).transpose(0, 1))
    packed = torch.cat([q[:0], *outputs])
    return F.pad(packed, (0, 0, 0, 0, 0, num_tokens - packed.shape[0]))


def pool(
    hidden: Tensor,
    cu_seqlens: Tensor,
    *,
    pool_starts: Tensor | None = None,
    mode: str = "mean",
    norm_weight: Tensor | None = None,
    norm_eps: float = 1e-6,
    truncate_dim: int | None = None,
    normalize: bool = True,
    output_dtype: torch.dtype | None = None,
    ranges: Tensor | None = None,
) -> Tensor:
    """RMSNorm, mean over each sequence's pooled tokens, truncation, L2 norm, int8 steps; (T, E) -> (S, E)."""
    vectors = []
    for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        rows = hidden[begin:end]
        if norm_weight is not None:
            rows = rows / (rows.square().mean(-1, keepdim=True) + norm_eps).sqrt() * norm_weight
        rows = rows[0 if pool_starts is None else int(pool_starts[i]) :]
        if mode == "mean":
            vector = rows.mean(0)
        elif mode == "weighted_mean":
            weights = torch.arange(1, len(rows) + 1, dtype=rows.dtype, device=rows.device)
            vector = weights @ rows / weights.sum()
        else:
            vector = rows[-1 if mode == "last" else 0]
        vector = vector[:truncate_dim]
        vectors.append(vector / vector.norm() if normalize else vector)
    stacked = torch.stack(vectors)
    if ranges is not None:
        steps = (ranges[1] - ranges[0]) / 255
        levels = ((stacked - ranges[0]) / steps.where(steps != 0, 1)).floor()
        stacked = levels.clamp(0, 255) - 128
    return stacked.to(output_dtype or hidden.dtype)


def contrastive_loss(
    queries: Tensor,
    keys: Tensor,
    *,
    targets: Tensor | None = None,
    temperature: float | Tensor = 0.05,
    normalize: bool = True,
    symmetric: bool = False,
    groups: Tensor | None = None,
    dims: Sequence[int] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Tensor:
    """Cross-entropy of normalize(queries) @ normalize(keys).T / temperature; (N, E), (M, E) -> scalar.

    The meaning of every argument is `bivec.kernels.contrastive.contrastive_loss`'s; over a process group it is this
    function of the joined batch.
    """
    assert process_group is None
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    if targets is None:
        targets = torch.arange(num_queries, device=queries.device)
    losses = []
    for size in dims or [queries.shape[1]]:
        rows, columns = queries[:, :size], keys[:, :size]
        if normalize:
            rows, columns = F.normalize(rows, dim=1), F.normalize(columns, dim=1)
        scores = rows @ columns.T
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) / temperature
        if groups is not None:
            masked = (groups[None, :] == groups[targets][:, None]) | (groups < 0)[None, :]
            masked &= torch.arange(num_keys, device=keys.device) != targets[:, None]
            scores = scores.masked_fill(masked, float("-inf"))
        loss = F.cross_entropy(scores, targets)
        if symmetric:
            diagonal = torch.arange(num_queries, device=queries.device)
            loss = (loss + F.cross_entropy(scores[:, targets].T, diagonal)) / 2
        losses.append(loss)
    return torch.stack(losses).mean()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) * weight over the last dimension; (..., E), (E,) -> (..., E)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and its `rms_norm`; (..., E), (..., E), (E,) -> two of (..., E)."""
    total = x + residual
    return total, rms_norm(total, weight, eps)


def apply_rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The halves of each head turned by the angles of cos and sin (T, D / 2); (T, H, D), (T, G, D) -> the same."""
    turned = []
    for heads in (query, key):
        first, second = heads.to(cos.dtype).chunk(2, dim=-1)
        c, s = cos[:, None], sin[:, None]
        turned.append(torch.cat((first * c - second * s, second * c + first * s), dim=-1).to(heads.dtype))
    return turned[0], turned[1]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return F.silu(gate) * up


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """round(x * (448 / max(|x|))) in float8 (e4m3) and max(|x|) / 448 of each row; (T, E) -> (T, E), (T, 1)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = wide.abs().amax(-1, keepdim=True).clamp_min(2.0**-100)
    whole = torch.full_like(largest, 448.0)  # with a number torch divides by way of a reciprocal
    return (wide * (whole / largest)).to(torch.float8_e4m3fn), largest / whole


def quantized_rms_norm(x: Tensor, weight: Tensor, eps: float, *, add: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of the `rms_norm` of x, or of x + add, which x then holds; (T, E), (E,) -> (T, E), (T, 1)."""
    if add is not None:
        x += add
    return quantize_rows(rms_norm(x.to(torch.promote_types(x.dtype, torch.float32)), weight, eps))


def quantized_swiglu(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """`quantize_rows` of silu(gate) * up; twice (T, E) -> (T, E), (T, 1)."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return quantize_rows(swiglu(gate.to(wide), up.to(wide)))


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, rows: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Cross-entropy of hidden[rows] @ weight.T against targets; (T, E), (V, E), (N,) -> scalar."""
    logits = F.linear(hidden if rows is None else hidden[rows], weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets, reduction=reduction)


def _uniform(seed: Tensor, length: int, num_heads: int, stream: int) -> Tensor:
    """Numbers in [0, 1), (num_heads, length, length): word `key % 4` of counter (query, key // 4, head, stream)."""
    position = torch.arange(length, device=seed.device)
    head = torch.arange(num_heads, device=seed.device)
    shape = (num_heads, length, (length + 3) // 4)
    words = _philox(
        seed,
        position[None, :, None].expand(shape),
        position[None, None, : shape[2]].expand(shape),
        head[:, None, None].expand(shape),
        torch.full(shape, stream, device=seed.device),
    )
    bits = torch.stack(words, dim=-1).flatten(2)[..., :length]
    return (bits >> 8).to(torch.float32) * 2.0**-24


def _philox(seed: Tensor, c0: Tensor, c1: Tensor, c2: Tensor, c3: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 (Salmon et al., 2011) on int64 tensors that hold 32-bit words; the key is the 64-bit seed."""
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        high_a, low_a = _multiply_32(PHILOX_ROUND_A, c0)
        high_b, low_b = _multiply_32(PHILOX_ROUND_B, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + PHILOX_KEY_A) & 0xFFFFFFFF, (k1 + PHILOX_KEY_B) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _multiply_32(constant: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 × 32 bit product, by halves because int64 has no room for 64 unsigned bits."""
    upper, lower = constant * (words >> 16), constant * (words & 0xFFFF)
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & 0xFFFFFFFF


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    dropout_p: float = 0.0,
    seed: int | None = None,
) -> Tensor:
    """x Wᵀ + bias + scaling · (drop(x) Aᵀ) Bᵀ; (T, in) -> (T, out)."""
    threshold = round(dropout_p * 2**16)
    dropped = x
    if threshold:
        words = np.random.Philox(key=seed).random_raw(-(-x.numel() // 4)).astype("<u8")
        bits = torch.from_numpy(words.view("<u2")[: x.numel()].astype(np.int32)).view(x.shape)
        dropped = x * (bits >= threshold).to(x.device) / (1.0 - threshold / 2**16)
    return F.linear(x, weight, bias) + F.linear(F.linear(dropped, lora_a), lora_b) * scaling
