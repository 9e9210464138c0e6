"""The one place where a backend is chosen: attention over packed sequences, and the CPU's linears for inference.

Shapes: T packed tokens, S sequences, H query heads, G key/value heads, D head dimension, B sequences of equal length L.
"""

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import batched
from ..kernels.attention.padded import varlen_attention as padded_attention
from .config import Window
from .cores import check_cores
from .packing import PackedBatch

ATTENTION_BACKENDS = ("triton", "varlen", "flash", "sdpa")


def choose_backend(attention: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """The attention backend for `attention` on a device: "auto", or one of `ATTENTION_BACKENDS`.

    `triton` is bivec's own kernel, `varlen` torch's FlashAttention over packed sequences, `flash` the flash-attn
    package's, `sdpa` torch's over groups of equal length, or `kernels/attention/padded.py` for training on the CPU and
    for random masks.

    Raises:
        ValueError: an explicit request that cannot be met; only "auto" chooses.
    """
    if attention == "auto":
        return "triton" if device.type == "cuda" and 16 <= head_dim <= 256 else "sdpa"
    if attention not in ATTENTION_BACKENDS:
        raise ValueError(f"attention must be auto or one of {', '.join(ATTENTION_BACKENDS)}, got {attention!r}")
    if attention != "sdpa" and device.type != "cuda":
        raise ValueError(f"attention {attention!r} needs a CUDA device, got {device}")
    if attention == "triton" and not 16 <= head_dim <= 256:
        raise ValueError(f"attention 'triton' needs a head dimension of 16 to 256, got {head_dim}")
    if attention in ("varlen", "flash") and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"attention {attention!r} needs bfloat16 or float16, got {dtype}")
    if attention == "varlen":
        if head_dim % 8 or head_dim > 256:
            raise ValueError(f"attention 'varlen' needs a head dimension of 8, 16, 24 ... 256, got {head_dim}")
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise ValueError("attention 'varlen' needs a GPU of capability 8.0 or more, got {}.{}".format(*capability))
    if attention == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise ValueError("attention 'flash' needs the flash-attn package: pip install 'bivec[flash]'")
    return attention


def choose_device(device: str | torch.device) -> torch.device:
    """`auto` is the first CUDA device, else the CPU, whose threads are checked."""
    name = str(device)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    wrong = f"device must be auto, cpu or cuda[:N], got {str(device)!r}"
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(wrong) from error
    if chosen.type not in ("cpu", "cuda"):
        raise ValueError(wrong)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} was asked for, but torch sees no CUDA device")
    if chosen.type == "cpu":
        check_cores()
    return chosen


def attention(
    query: torch.Tensor,  # (T, H, D)
    key: torch.Tensor,  # (T, G, D)
    value: torch.Tensor,  # (T, G, D)
    batch: PackedBatch,
    window: Window,
    backend: str,
    out: torch.Tensor | None = None,  # (T, H, D)
    *,
    dropout_p: float = 0.0,
    future_p: float = 1.0,
    seeds: torch.Tensor | None = None,  # int64 (S,)
    together: bool = True,
    tile_list: torch.Tensor | None = None,
    parts: Sequence[batched.Part] = (),
) -> torch.Tensor:
    """Attention of each sequence of `batch` within itself, `(T, H, D)`; differentiable unless `out` is given.

    Args:
        tile_list: what `list_tiles` gave for the batch, the same for all layers; else `triton` makes its own.
        parts: of `plan_batches` for the batch, the same for all layers: which sequences `sdpa` takes by
            `batched_attention`.
        together: whether `sdpa` may take sequences of one length in one call.
        dropout_p: the chance that an attention probability is dropped.
        future_p: the chance that a query is shown a key ahead of it, the same for all heads.
        seeds: one a sequence; what the two hide depends on it alone, and is the same with `triton` and `sdpa`.

    Raises:
        ValueError: `varlen` or `flash` is asked for random masks, or there are no seeds for them.
    """
    random = dropout_p > 0.0 or future_p < 1.0
    packed_attention: Callable[..., torch.Tensor]
    if backend == "triton":
        from ..kernels.attention import varlen_attention  # triton is there on Linux only

        packed_attention = partial(varlen_attention, tile_list=tile_list)
    elif backend in ("varlen", "flash"):
        if random:
            wrong = (
                f"dropout_p must be 0, got {dropout_p}" if dropout_p > 0.0 else f"future_p must be 1, got {future_p}"
            )
            raise ValueError(f"{wrong}: {backend} knows no seed of a sequence; attention must be triton or sdpa")
        without_seeds = _torch_varlen_attention if backend == "varlen" else _flash_attention
        output = without_seeds(query, key, value, batch, window)
        return output if out is None else out.copy_(output)
    elif random or (out is None and _trains_on_cpu(query, key, value)):
        packed_attention = padded_attention
    else:
        return _equal_lengths_attention(query, key, value, batch, window, out, together, parts)
    output = packed_attention(
        query,
        key,
        value,
        batch.cu_seqlens,
        batch.max_seqlen,
        window_size=window,
        dropout_p=dropout_p,
        future_p=future_p,
        seeds=seeds,
    )
    return output if out is None else out.copy_(output)


def list_tiles(batch: PackedBatch, backend: str) -> torch.Tensor | None:
    """What all layers of a pass give to `attention`: the kernel's work over the batch, where the backend is ours.

    It is made of the lengths on the device: a captured pass must make it anew in each replay.
    """
    if backend != "triton":
        return None
    from ..kernels.attention import list_tiles  # triton is there on Linux only

    return list_tiles(batch.cu_seqlens, batch.num_tokens)


def attends_in_batches(backend: str, like: torch.Tensor) -> bool:
    """Whether `sdpa` takes sequences of middling length by bfloat16 products in batches: where that is the dtype asked
    for, on a CPU that multiplies it."""
    on_cpu = backend == "sdpa" and like.device.type == "cpu" and like.dtype is torch.bfloat16
    return on_cpu and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def plan_batches(batch: PackedBatch, num_key_value_heads: int) -> list[batched.Part]:
    """What all layers of a pass give to `attention` where it attends in batches."""
    return batched.plan_batches(batch.seqlens, num_key_value_heads)


def _trains_on_cpu(*tensors: torch.Tensor) -> bool:
    """SDPA's backward is slow there, and training does not need a sequence to be bitwise the same in any batch."""
    requires_grad = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return requires_grad and tensors[0].device.type == "cpu"


def _torch_varlen_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: PackedBatch, window: Window
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # torch 2.11 groups heads unasked
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    # from torch 2.15 on cuDNN would come first, and whether it can depends on the longest sequence
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = varlen_attn(
            query,
            key,
            value,
            batch.cu_seqlens,
            batch.cu_seqlens,
            batch.max_seqlen,
            batch.max_seqlen,
            window_size=window,
            **grouped,
        )
    assert isinstance(output, torch.Tensor)  # and no log-sum-exp, which was not asked for
    return output


def _flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: PackedBatch, window: Window
) -> torch.Tensor:
    from flash_attn import flash_attn_varlen_func  # an optional package

    return flash_attn_varlen_func(
        query,
        key,
        value,
        cu_seqlens_q=batch.cu_seqlens,
        cu_seqlens_k=batch.cu_seqlens,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_k=batch.max_seqlen,
        window_size=window,
    )


def _equal_lengths_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    batch: PackedBatch,
    window: Window,
    out: torch.Tensor | None,
    together: bool,
    parts: Sequence[batched.Part],
) -> torch.Tensor:
    """What the plan holds in batches; one call for each run of neighbours of one length, or for each sequence."""
    outputs = []
    if parts:
        out = torch.empty_like(query) if out is None else out
        batched.batched_attention(query, key, value, parts, window, out)
    for first, count, length in batch.equal_length_runs:
        if parts and length in batched.LENGTHS:
            continue
        size = count if together else 1
        for start in range(first, first + count * length, size * length):
            rows = slice(start, start + size * length)
            q, k, v = (part[rows].unflatten(0, (size, length)) for part in (query, key, value))
            output = scaled_dot_product_attention(q, k, v, window).flatten(0, 1)
            if out is None:
                outputs.append(output)
            else:
                out[rows] = output
    if out is not None:
        return out
    return torch.cat(outputs) if outputs else torch.zeros_like(query)


def scaled_dot_product_attention(
    query: torch.Tensor,  # (B, L, H, D)
    key: torch.Tensor,  # (B, L, G, D)
    value: torch.Tensor,  # (B, L, G, D)
    window: Window,
) -> torch.Tensor:
    """Over sequences of one length; `(B, L, H, D)`."""
    length = query.shape[1]
    output = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=_window_mask(length, window, query.device),
        is_causal=_is_plain_causal(length, window),
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return output.transpose(1, 2)


def _is_plain_causal(length: int, window: Window) -> bool:
    left, right = window
    return right == 0 and (left < 0 or left >= length - 1)


def _window_mask(length: int, window: Window, device: torch.device) -> torch.Tensor | None:
    """Boolean `(L, L)`, true where the query (row) sees the key; None where SDPA needs no mask."""
    left, right = window
    sees_all = (left < 0 or left >= length - 1) and (right < 0 or right >= length - 1)
    if sees_all or _is_plain_causal(length, window):
        return None
    places = torch.arange(length, device=device)
    distance = places[None, :] - places[:, None]  # key minus query
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    return visible


def onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and takes float32 or bfloat16 on this processor; how fast, it does not say."""
    return torch.backends.mkldnn.is_available() and (
        dtype is torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


Activation = Literal["none", "silu"]


class PackedLinear:
    """`activation(x @ weight.T + bias)`, then `* multiply` or `+ add`, on the CPU, over a few fixed row counts.

    The weight is reordered once for oneDNN, where that is there, and what follows the product is done on its way to
    memory. There is no gradient.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None):
        self.bias = bias
        self.num_bytes = weight.numel() * weight.element_size()
        self.uses_onednn = onednn_multiplies(weight.dtype)
        # 256 is a hint of the number of rows; the result does not depend on it
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight, 256) if self.uses_onednn else weight

    def __call__(
        self,
        x: torch.Tensor,  # (rows, in)
        *,
        activation: Activation = "none",
        multiply: torch.Tensor | None = None,  # (rows, out)
        add: torch.Tensor | None = None,  # (rows, out)
    ) -> torch.Tensor:
        if not self.uses_onednn:
            y = F.linear(x, self.weight, self.bias)
            y = F.silu(y) if activation == "silu" else y
            y = y * multiply if multiply is not None else y
            return y + add if add is not None else y
        if multiply is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, multiply, self.weight, self.bias, "mul")
        if add is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, add, self.weight, self.bias, "add")
        name = "swish" if activation == "silu" else "none"
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, name, [], "")
