"""Everybody who computes attention over sequences of unequal length: ours, eager, SDPA, varlen, Flex, flash-attn.

A peer prepares its own inputs (padding, block masks) from the packed ones and returns a function of them, or the
reason why it cannot run. Preparing is never timed. `T` packed tokens, `H` query heads, `G` key/value heads, `D` head
dimension.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..kernels.attention import varlen_attention

EAGER, FLEX = "eager, padded", "flex, document mask"
EAGER_BYTES = 24 * 2**30  # scores that the eager version may hold


@dataclass(frozen=True)
class Attention:
    """One case: what to attend, in packed form."""

    name: str
    lengths: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    window_size: tuple[int, int] = (-1, -1)
    dropout_p: float = 0.0

    @property
    def num_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def scores(self) -> int:
        """Visible (query, key) pairs of one head."""
        total = 0
        for length in self.lengths:
            position = torch.arange(length)
            left, right = (length if bound < 0 else bound for bound in self.window_size)
            first, last = (position - left).clamp(min=0), (position + right).clamp(max=length - 1)
            total += int((last - first + 1).sum())
        return total

    def flops(self, direction: str) -> float:
        """Two products forward and five backward, of visible scores only."""
        forward = 4.0 * self.scores * self.num_heads * self.head_dim
        return forward * {"forward": 1.0, "backward": 2.5, "both": 3.5}[direction]

    def least_bytes(self, direction: str) -> float:
        """Every input read once and every output written once."""
        row = self.head_dim * self.dtype.itemsize * self.num_tokens
        forward = row * (2 * self.num_heads + 2 * self.num_kv_heads)
        backward = row * (4 * self.num_heads + 4 * self.num_kv_heads)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]

    def inputs(self, device: torch.device) -> list[Tensor]:
        generator = torch.Generator(device).manual_seed(0)  # a host's would take minutes
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads, self.num_heads)
        shapes = [(self.num_tokens, count, self.head_dim) for count in heads]
        return [torch.randn(shape, generator=generator, device=device).to(self.dtype) for shape in shapes]


@dataclass
class Prepared:
    """A peer's own inputs, the function of them, and the way back to packed rows."""

    inputs: list[Tensor]  # q, k, v as leaves, and the upstream gradient
    attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    unpack: Callable[[Tensor], Tensor]


Peer = Callable[[Attention, list[Tensor]], Prepared | str]


def _bounds(case: Attention, device: torch.device) -> Tensor:
    return torch.tensor([0, *case.lengths]).cumsum(0).to(device, torch.int32)


def _packed(inputs: list[Tensor], attend: Callable) -> Prepared:
    return Prepared(inputs, attend, lambda packed: packed)


def bivec(case: Attention, inputs: list[Tensor]) -> Prepared:
    cu_seqlens, longest = _bounds(case, inputs[0].device), max(case.lengths)
    seeds = torch.arange(len(case.lengths), device=cu_seqlens.device)
    settings: dict = {"window_size": case.window_size, "dropout_p": case.dropout_p, "seeds": seeds}
    return _packed(inputs, lambda q, k, v: varlen_attention(q, k, v, cu_seqlens, longest, **settings))


def torch_varlen(case: Attention, inputs: list[Tensor]) -> Prepared | str:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return "torch.nn.attention.varlen is not in this torch"
    if case.dropout_p:
        return "has no dropout"
    accepted = inspect.signature(varlen_attn).parameters
    cu_seqlens, longest = _bounds(case, inputs[0].device), max(case.lengths)
    settings: dict = {"enable_gqa": case.num_heads != case.num_kv_heads} if "enable_gqa" in accepted else {}
    if "window_size" in accepted:
        settings["window_size"] = case.window_size
    elif case.window_size == (-1, 0):
        settings["is_causal"] = True
    elif case.window_size != (-1, -1):
        return "has no window in this torch"
    # without that argument its kernels take groups all the same
    return _packed(inputs, lambda q, k, v: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **settings))


def flash_attn(case: Attention, inputs: list[Tensor]) -> Prepared | str:
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError:
        return "package flash-attn is not installed"
    cu_seqlens, longest = _bounds(case, inputs[0].device), max(case.lengths)
    settings = {"window_size": case.window_size, "dropout_p": case.dropout_p}
    return _packed(
        inputs,
        lambda q, k, v: flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **settings),
    )


def flex(case: Attention, inputs: list[Tensor], compiled: bool = True, backend: str = "inductor") -> Prepared | str:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if case.dropout_p:
        return "has no dropout"
    if compiled:
        torch.compiler.reset()
        # beyond the limit it would run unfused without a word
        torch._dynamo.config.fail_on_recompile_limit_hit = True
        # a backward that is repeated needs what it would give away
        torch._functorch.config.donated_buffer = False
    device, num_tokens = inputs[0].device, case.num_tokens
    document = torch.repeat_interleave(torch.tensor(case.lengths)).to(device)
    left, right = (num_tokens if bound < 0 else bound for bound in case.window_size)

    def mask(batch, head, query, key):
        return (document[query] == document[key]) & (key >= query - left) & (key <= query + right)

    make = torch.compile(create_block_mask, backend=backend) if compiled else create_block_mask
    block_mask = make(mask, None, None, num_tokens, num_tokens, device=str(device))
    function = torch.compile(flex_attention, dynamic=False, backend=backend) if compiled else flex_attention
    grouped = case.num_heads != case.num_kv_heads
    batched = [tensor.transpose(0, 1)[None].contiguous() for tensor in inputs]
    return Prepared(
        batched,
        lambda q, k, v: function(q, k, v, block_mask=block_mask, enable_gqa=grouped),
        lambda output: output[0].transpose(0, 1),
    )


def _padded(case: Attention, inputs: list[Tensor], attend: Callable) -> Prepared:
    """Rows of one length, (S, H, L, D); `attend` takes q, k, v and a mask (S, 1, L, L) or None."""
    lengths, longest = case.lengths, max(case.lengths)
    padded = [
        torch.nn.utils.rnn.pad_sequence(tensor.split(lengths), batch_first=True).transpose(1, 2).contiguous()
        for tensor in inputs
    ]
    device = inputs[0].device
    real = torch.arange(longest, device=device) < torch.tensor(lengths, device=device)[:, None]
    mask = None
    if min(lengths) < longest or case.window_size not in ((-1, -1), (-1, 0)):
        ahead = torch.arange(longest, device=device) - torch.arange(longest, device=device)[:, None]
        left, right = (longest if bound < 0 else bound for bound in case.window_size)
        # padding attends to itself alone, so that no row is empty
        mask = ((ahead >= -left) & (ahead <= right) & real[:, None, :] | (ahead == 0))[:, None]
    return Prepared(padded, lambda q, k, v: attend(q, k, v, mask), lambda output: output.transpose(1, 2)[real])


def eager(case: Attention, inputs: list[Tensor]) -> Prepared | str:
    """Padded, as eager models do it: scores in memory, softmax in float32."""
    held = len(case.lengths) * case.num_heads * max(case.lengths) ** 2 * 12
    if held > EAGER_BYTES:
        return f"its scores would take {held / 2**30:.0f} GiB"
    group_size, causal = case.num_heads // case.num_kv_heads, case.window_size == (-1, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = k.repeat_interleave(group_size, dim=1), v.repeat_interleave(group_size, dim=1)
        scores = q @ k.mT * case.head_dim**-0.5
        if mask is None and causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if mask is not None:
            scores = scores.masked_fill(~mask, float("-inf"))
        return F.dropout(scores.float().softmax(dim=-1).to(v.dtype), case.dropout_p) @ v

    return _padded(case, inputs, attend)


def sdpa(case: Attention, inputs: list[Tensor], backend: SDPBackend | None) -> Prepared:
    grouped, causal = case.num_heads != case.num_kv_heads, case.window_size == (-1, 0)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        settings: dict[str, Any] = {
            "attn_mask": mask,
            "dropout_p": case.dropout_p,
            "is_causal": causal and mask is None,
        }
        if backend is None:
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **settings)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=grouped, **settings)

    return _padded(case, inputs, attend)


def peers(device: torch.device) -> dict[str, Peer]:
    """By name, ours first. On a CPU, SDPA has one backend and Flex is not compiled."""
    known: dict[str, Peer] = {"bivec": bivec, EAGER: eager}
    if device.type == "cuda":
        known["SDPA flash, padded"] = lambda case, inputs: sdpa(case, inputs, SDPBackend.FLASH_ATTENTION)
        known["SDPA cuDNN, padded"] = lambda case, inputs: sdpa(case, inputs, SDPBackend.CUDNN_ATTENTION)
    known["SDPA as torch chooses, padded"] = lambda case, inputs: sdpa(case, inputs, None)
    known["torch varlen"] = torch_varlen
    known[FLEX] = lambda case, inputs: flex(case, inputs, compiled=device.type == "cuda")
    known["flash-attn varlen"] = flash_attn
    return known
