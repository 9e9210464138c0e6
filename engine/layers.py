"""One decoder layer for inference, in the form that suits the device: its weights fused, and the order of its steps.

A layer's work falls in two: `project`, up to the heads that attention takes, and `finish`, all that follows it. Both go
over `tiles`, ranges of rows, because every matrix product has one of a few fixed numbers of rows.

Shapes: R rows of all tiles together, E hidden size, H query heads, G key/value heads, D head dimension.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import nn
from torch.nn import functional as F

from ..kernels import float8
from ..kernels.norm import rms_norm
from ..kernels.rotary import apply_rotary
from ..kernels.swiglu import swiglu
from .config import ModelConfig
from .float8 import Float8Linear
from .int8 import Int8Linear, QuantizedRows, quantize_rows, silu_
from .model import Attention, DecoderLayer
from .ops import PackedLinear

Linear = TypeVar("Linear", PackedLinear, Int8Linear)
Heads = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # query (R, H, D), key (R, G, D) and value (R, G, D)


class FusedLayer(ABC):
    """What `Runner` needs of a layer, and what every form keeps of it."""

    num_bytes: int  # of weights that stand beside the model's own
    hidden_dtype: torch.dtype | None = None  # of hidden states; None: the embeddings'

    def __init__(self, layer: DecoderLayer):
        attention = layer.self_attn
        self.num_heads = attention.q_proj.out_features // attention.head_dim
        self.num_key_value_heads = attention.k_proj.out_features // attention.head_dim
        self.input_norm = layer.input_layernorm.weight.detach()
        self.mlp_norm = layer.post_attention_layernorm.weight.detach()
        self.eps = layer.input_layernorm.eps

    @staticmethod
    @abstractmethod
    def angles(cos: torch.Tensor, sin: torch.Tensor) -> Any:
        """What `project` takes to rotate R rows, of float32 `(R, D / 2)` tables."""

    @staticmethod
    @abstractmethod
    def new_heads(config: ModelConfig, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """Room for the heads `(R, H + 2 G, D)` of one layer after another."""

    @staticmethod
    @abstractmethod
    def pass_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        """Bytes of activations a row that a pass keeps at its peak, attention's own left out."""

    @abstractmethod
    def project(self, hidden: torch.Tensor, angles: Any, heads: torch.Tensor, tiles: Sequence[slice]) -> Heads:
        """From hidden states `(R, E)` to attention's inputs, in `heads` or beside it."""

    @abstractmethod
    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, tiles: Sequence[slice]) -> None:
        """The rest of the layer, in place on `hidden` `(R, E)`: output projection, residual, norm, SwiGLU, residual."""


class _OnCpu(FusedLayer, Generic[Linear]):
    """What the CPU's forms share: q, k and v in one product; a tile stays in cache.

    The halves of each query and key head are interleaved, which no dot product of the two sees: rotary embedding is
    then one product of complex numbers. It gives float32, and torch's attention is faster in that than in bfloat16.
    """

    linear: type[Linear]

    def __init__(self, layer: DecoderLayer):
        super().__init__(layer)
        attention, mlp = layer.self_attn, layer.mlp
        head_dim = attention.head_dim
        weights, biases = _query_key_value(attention)
        weights[:2] = [_interleave(weight, head_dim) for weight in weights[:2]]
        biases[:2] = [_interleave(bias, head_dim) for bias in biases[:2]]
        self.qkv: Linear = self.linear(torch.cat(weights), torch.cat(biases) if biases else None)
        self.output: Linear = self.linear(*_weight_and_bias(attention.o_proj))
        self.gate: Linear = self.linear(*_weight_and_bias(mlp.gate_proj))
        self.up: Linear = self.linear(*_weight_and_bias(mlp.up_proj))
        self.down: Linear = self.linear(*_weight_and_bias(mlp.down_proj))
        self.num_bytes = sum(part.num_bytes for part in (self.qkv, self.output, self.gate, self.up, self.down))
        norms = _head_norms(attention)
        self.head_norms = norms and (_interleave(norms[0], head_dim), _interleave(norms[1], head_dim))

    @staticmethod
    def angles(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return torch.complex(cos, sin)

    @staticmethod
    def new_heads(config: ModelConfig, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(num_rows, _num_all_heads(config), config.head_dim, dtype=torch.float32)

    @staticmethod
    def pass_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        states = config.hidden_size + config.num_attention_heads * config.head_dim  # and what attention gives
        return states * dtype.itemsize + _num_all_heads(config) * config.head_dim * torch.float32.itemsize

    def project(self, hidden: torch.Tensor, angles: torch.Tensor, heads: torch.Tensor, tiles: Sequence[slice]) -> Heads:
        num_rotated = self.num_heads + self.num_key_value_heads
        for rows in tiles:
            tile = heads[rows]
            self._write_heads(hidden[rows], tile.flatten(1))
            rotated = tile[:, :num_rotated]
            if self.head_norms is not None:
                for part, norm in zip(rotated.tensor_split([self.num_heads], dim=1), self.head_norms, strict=True):
                    part.copy_(rms_norm(part, norm, self.eps))
            torch.view_as_complex(rotated.unflatten(-1, (-1, 2))).mul_(angles[rows, None])
        query, key, value = heads.tensor_split([self.num_heads, num_rotated], dim=1)
        return query, key, value

    @abstractmethod
    def _write_heads(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """q, k and v of some rows, not yet rotated, into float32 `(rows, (H + 2 G) D)`."""


class CpuLayer(_OnCpu[PackedLinear]):
    """SwiGLU and residuals are done as products are written."""

    linear = PackedLinear

    def _write_heads(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(self.qkv(rms_norm(hidden, self.input_norm, self.eps)))

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, tiles: Sequence[slice]) -> None:
        for rows in tiles:
            total = self.output(attended[rows], add=hidden[rows])
            normed = rms_norm(total, self.mlp_norm, self.eps)
            gated = self.up(normed, multiply=self.gate(normed, activation="silu"))
            hidden[rows] = self.down(gated, add=total)


class Int8Layer(_OnCpu[Int8Linear]):
    """Products are of eight-bit rows and weights (`int8.py`); all between them is float32.

    A row's scale goes past whatever a factor of the row does not change: RMSNorm's own factor only joins it, and what
    multiplies the gate need not be scaled before it is quantised again.
    """

    hidden_dtype = torch.float32
    linear = Int8Linear

    def __init__(self, layer: DecoderLayer):
        super().__init__(layer)
        # copies, because a file is in memory as long as anything of it
        self.input_norm = self.input_norm.to(torch.float32, copy=True)
        self.mlp_norm = self.mlp_norm.to(torch.float32, copy=True)

    def _write_heads(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        rows = self._normed(hidden, self.input_norm)
        _add_bias(torch.mul(self.qkv(rows.values), rows.scales, out=out), self.qkv.bias)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, tiles: Sequence[slice]) -> None:
        for rows in tiles:
            total = _add_linear(hidden[rows], self.output, quantize_rows(attended[rows]))
            normed = self._normed(total, self.mlp_norm)
            gate = _add_bias(self.gate(normed.values).mul_(normed.scales), self.gate.bias)
            up, up_scales = self.up(normed.values), normed.scales
            if self.up.bias is not None:
                up, up_scales = up.mul_(up_scales).add_(self.up.bias), torch.ones_like(up_scales)
            gated = silu_(gate).mul_(up)
            values, scales = quantize_rows(gated, out=gated)
            _add_linear(total, self.down, QuantizedRows(values, scales.mul_(up_scales)), out=hidden[rows])

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> QuantizedRows:
        """RMSNorm, quantised."""
        norms = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
        factors = norms.square_().mul_(1 / hidden.shape[1]).add_(self.eps).rsqrt_()
        weighted = hidden * weight
        values, scales = quantize_rows(weighted, out=weighted)
        return QuantizedRows(values, scales.mul_(factors))


def _add_linear(
    total: torch.Tensor, linear: Int8Linear, rows: QuantizedRows, out: torch.Tensor | None = None
) -> torch.Tensor:
    """`total` plus what the linear makes of the rows, float32 `(R, N)`."""
    return _add_bias(torch.addcmul(total, linear(rows.values), rows.scales, out=out), linear.bias)


def _add_bias(rows: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return rows if bias is None else rows.add_(bias)


class CudaLayer(FusedLayer):
    """q, k and v in one product, residuals added by the products, norm, rotary and SwiGLU a Triton kernel each."""

    def __init__(self, layer: DecoderLayer):
        super().__init__(layer)
        self.head_norms = _head_norms(layer.self_attn)
        self._fuse(layer)

    def _fuse(self, layer: DecoderLayer) -> None:
        """Take the linears' weights."""
        attention, mlp = layer.self_attn, layer.mlp
        weights, biases = _query_key_value(attention)
        self.qkv_weight = torch.cat(weights)
        self.qkv_bias = torch.cat(biases) if biases else None
        self.output_weight, self.output_bias = _weight_and_bias(attention.o_proj)
        self.gate_weight, self.gate_bias = _weight_and_bias(mlp.gate_proj)
        self.up_weight, self.up_bias = _weight_and_bias(mlp.up_proj)
        self.down_weight, self.down_bias = _weight_and_bias(mlp.down_proj)
        self.num_bytes = self.qkv_weight.nbytes  # the others are the model's own

    @staticmethod
    def angles(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return cos, sin

    @staticmethod
    def new_heads(config: ModelConfig, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        return like.new_empty(num_rows, _num_all_heads(config), config.head_dim)

    @staticmethod
    def pass_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        attended = config.num_attention_heads * config.head_dim
        rotated = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
        in_attention = _num_all_heads(config) * config.head_dim + rotated + 2 * attended
        in_mlp = _num_all_heads(config) * config.head_dim + attended + config.hidden_size + 3 * config.intermediate_size
        return (config.hidden_size + max(in_attention, in_mlp)) * dtype.itemsize

    def project(
        self,
        hidden: torch.Tensor,
        angles: tuple[torch.Tensor, torch.Tensor],
        heads: torch.Tensor,
        tiles: Sequence[slice],
    ) -> Heads:
        for rows in tiles:
            self._project_rows(hidden[rows], heads[rows].flatten(1))
        num_rotated = self.num_heads + self.num_key_value_heads
        query, key, value = heads.tensor_split([self.num_heads, num_rotated], dim=1)
        if self.head_norms is not None:
            query, key = (
                rms_norm(part, norm, self.eps) for part, norm in zip((query, key), self.head_norms, strict=True)
            )
        query, key = apply_rotary(query, key, *angles)
        return query, key, value

    def _project_rows(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """The heads of rows `(R, E)`, not yet rotated, into `out` `(R, (H + 2 G) D)`."""
        normed = rms_norm(hidden, self.input_norm, self.eps)
        if self.qkv_bias is None:
            torch.mm(normed, self.qkv_weight.t(), out=out)
        else:
            torch.addmm(self.qkv_bias, normed, self.qkv_weight.t(), out=out)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, tiles: Sequence[slice]) -> None:
        for rows in tiles:
            total = hidden[rows]
            _add_product(total, attended[rows], self.output_weight, self.output_bias)
            normed = rms_norm(total, self.mlp_norm, self.eps)
            gate = F.linear(normed, self.gate_weight, self.gate_bias)
            up = F.linear(normed, self.up_weight, self.up_bias)
            _add_product(total, swiglu(gate, up), self.down_weight, self.down_bias)


class Float8Layer(CudaLayer):
    """As `CudaLayer` with products of float8 rows and weights (`float8.py`), gate and up in one; the rest is bfloat16.

    Norm and SwiGLU give their rows in float8, and attention's are copied into it. These products add to nothing: that
    of attention is added to the hidden states by the norm that reads them.
    """

    def __init__(self, layer: DecoderLayer):
        super().__init__(layer)
        self.input_norm, self.mlp_norm = self.input_norm.float(), self.mlp_norm.float()

    def _fuse(self, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _float8_linear("q_proj, k_proj and v_proj", attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = _float8_linear("o_proj", attention.o_proj)
        self.gate_up = _float8_linear("gate_proj and up_proj", mlp.gate_proj, mlp.up_proj)
        self.down = _float8_linear("down_proj", mlp.down_proj)
        self.num_bytes = sum(linear.num_bytes for linear in (self.qkv, self.output, self.gate_up, self.down))

    @staticmethod
    def pass_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        attended, intermediate = config.num_attention_heads * config.head_dim, config.intermediate_size
        rotated = attended + config.num_key_value_heads * config.head_dim
        in_mlp = attended * dtype.itemsize + 2 * intermediate * dtype.itemsize + max(config.hidden_size, intermediate)
        beside = config.hidden_size + _num_all_heads(config) * config.head_dim
        return beside * dtype.itemsize + max((rotated + 2 * attended) * dtype.itemsize, in_mlp)

    def _project_rows(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        self.qkv(float8.quantized_rms_norm(hidden, self.input_norm, self.eps), out=out)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, tiles: Sequence[slice]) -> None:
        for rows in tiles:
            total = hidden[rows]
            product = self.output(float8.quantize_rows(attended[rows]))
            gate_up = self.gate_up(float8.quantized_rms_norm(total, self.mlp_norm, self.eps, add=product))
            total += self.down(float8.quantized_swiglu(*gate_up.tensor_split(2, dim=1)))


def _float8_linear(name: str, *linears: nn.Linear) -> Float8Linear:
    """Linears of one input as one, their outputs side by side."""
    weights, biases = zip(*map(_weight_and_bias, linears), strict=True)
    present = [bias for bias in biases if bias is not None]
    return Float8Linear(name, torch.cat(weights), torch.cat(present) if present else None)


def _add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """`total += x @ weight.T + bias`, the sum taken before the product is rounded."""
    total.addmm_(x, weight.t())
    if bias is not None:
        total += bias


def _weight_and_bias(linear: nn.Linear) -> tuple[torch.Tensor, torch.Tensor | None]:
    return linear.weight.detach(), None if linear.bias is None else linear.bias.detach()


def _query_key_value(attention: Attention) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The three projections' weights, and their biases if they have them."""
    parts = [_weight_and_bias(linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)]
    return [weight for weight, _ in parts], [bias for _, bias in parts if bias is not None]


def _head_norms(attention: Attention) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The norms' weights of query and key heads, where the model has them."""
    if not hasattr(attention, "q_norm"):
        return None
    return attention.q_norm.weight.detach(), attention.k_norm.weight.detach()


def _interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows `(heads D, ...)` of a weight or bias with each head's halves interleaved: 0, D / 2, 1, D / 2 + 1, ..."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def _num_all_heads(config: ModelConfig) -> int:
    return config.num_attention_heads + 2 * config.num_key_value_heads


# by device, or by products of eight bits, which are of one device alone
LAYERS: dict[str, type[FusedLayer]] = {"cpu": CpuLayer, "cuda": CudaLayer, "int8": Int8Layer, "float8": Float8Layer}


def layer_form(device: torch.device, products: str) -> type[FusedLayer]:
    """The form of a layer for a device and `ComputeDtype.products`."""
    return LAYERS.get(products, LAYERS[device.type])
