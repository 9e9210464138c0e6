"""`attn_implementation="bivec"` for any transformers model: padded batches are packed, attended and spread out again.

    from bivec.kernels.attention.transformers import register_with_transformers
    register_with_transformers()
    model = AutoModel.from_pretrained(..., attn_implementation="bivec")

`B` rows, `L` tokens a row, `H` query heads, `G` key/value heads, `D` head dimension. Shapes stay fixed and no length
is read back: the slab holds all `B * L` tokens, real ones first, and what the padding leaves over is its tail.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from . import varlen_attention

# leaves of transformers' mask functions that are windows; any other is evaluated, which waits for the device
KNOWN_WINDOWS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay.<locals>.inner_mask",
    "sliding_window_bidirectional_overlay.<locals>.inner_mask",
)


def register_with_transformers(name: str = "bivec") -> None:
    """Register `varlen_attention` with transformers (5 or newer) as attention and as mask implementation `name`."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *_,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **__,
) -> Tensor | None:
    """The (B, L) padding mask as it came: window and direction reach the attention function by themselves.

    Raises ValueError for masks that a window and padding cannot say, such as blocks or several sequences to a row.
    """
    if mask_function is not None and any(leaf.__qualname__ not in KNOWN_WINDOWS for leaf in _leaves(mask_function)):
        queries = torch.arange(q_offset, q_offset + q_length, device=device)
        keys = torch.arange(kv_offset, kv_offset + kv_length, device=device)
        if not _is_window(mask_function, batch_size, queries, keys):
            raise ValueError(
                "attention_mask must be padding with a causal, bidirectional or sliding window for "
                f'attn_implementation="bivec", got a mask built from {mask_function.__qualname__}'
            )
    return None if attention_mask is None else attention_mask[:, -kv_length:]


def _is_window(mask_function: Callable, batch_size: int, queries: Tensor, keys: Tensor) -> bool:
    """Whether every row of the batch sees the keys within two bounds of each query, whatever the function is called."""
    rows = torch.arange(batch_size, device=queries.device)[:, None, None, None]
    visible = mask_function(rows, torch.zeros_like(rows[:1]), queries[:, None], keys)
    distance = (keys - queries[:, None]).expand(batch_size, 1, -1, -1)  # (B, 1, Q, K)
    visible = visible.expand_as(distance)
    seen = distance[visible]
    return seen.numel() > 0 and torch.equal(visible, (distance >= seen.min()) & (distance <= seen.max()))


def _leaves(mask_function: Callable) -> Iterator[Callable]:
    if mask_function.__qualname__ != "and_masks.<locals>.and_mask":
        yield mask_function
        return
    for cell in mask_function.__closure__ or ():
        for part in cell.cell_contents:
            yield from _leaves(part)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention function: (B, H, L, D), (B, G, L, D), (B, G, L, D) -> (B, L, H, D), None.

    Fewer queries than keys (decoding with a cache) stand at the end of their row. Raises ValueError for what the kernel
    does not compute: soft caps, attention sinks, position biases, masks that are not padding.
    """
    for name in ("softcap", "s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f'{name} must be None for attn_implementation="bivec", got {type(kwargs[name]).__name__}')
    batch_size, _, q_length, head_dim = query.shape
    kv_length, value_dim = key.shape[2], value.shape[3]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(getattr(module, "config", None), "is_causal", True)
    if q_length > kv_length or (q_length < kv_length and not is_causal):
        raise ValueError(
            'query must be as long as key for attn_implementation="bivec", or causal and shorter: '
            f"got {q_length} queries and {kv_length} keys"
        )
    if attention_mask is not None and attention_mask.shape != (batch_size, kv_length):
        raise ValueError(
            f"attention_mask must be ({batch_size}, {kv_length}) padding, got {tuple(attention_mask.shape)}"
        )

    before = kv_length - q_length
    if before:
        query = F.pad(query, (0, 0, before, 0))
    if value_dim != head_dim:
        value = F.pad(value, (0, head_dim - value_dim))
    q, k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))  # (B * L, H or G, D)
    if attention_mask is None:
        place = None
        cu_seqlens = torch.arange(batch_size + 1, dtype=torch.int32, device=q.device) * kv_length
    else:
        real = attention_mask.bool()
        place, cu_seqlens = _packed_places(real)
        q, k, v = (torch.zeros_like(tensor).index_copy(0, place, tensor) for tensor in (q, k, v))

    left = -1 if sliding_window is None else sliding_window - 1
    out = varlen_attention(
        q,
        k,
        v,
        cu_seqlens,
        kv_length,
        window_size=(left, 0 if is_causal else left),
        softmax_scale=scaling,
        dropout_p=dropout,
        seeds=torch.randint(2**62, (batch_size,), device=q.device) if dropout > 0.0 else None,
    )
    if place is not None:
        out = out[place]
    out = out.unflatten(0, (batch_size, kv_length))
    return out[:, before:, :, :value_dim].contiguous(), None


def _packed_places(real: Tensor) -> tuple[Tensor, Tensor]:
    """Where each of the B * L tokens goes, real ones first and in order, and the bounds of the rows (B + 1,)."""
    flat = real.flatten()
    num_real = flat.sum()
    place = torch.where(flat, flat.cumsum(0) - 1, num_real + (~flat).cumsum(0) - 1)
    return place, F.pad(real.sum(dim=1).cumsum(0), (1, 0)).to(torch.int32)
