"""A decoder layer whose matrix products are of float8 (e4m3), on GPUs of capability 8.9: weights have one scale an
output channel, made here of any float weights, and rows one scale each, made on the way by what computes them.

Products are `torch._scaled_mm` by rows, whose dimensions must be multiples of 16; what stands between them is bfloat16.
They add up in float32. torch's fast accumulation keeps sums in the tensor cores' own format of fewer bits instead
("lower accuracy because intermediate results will not periodically be promoted to a higher precision", cuBLAS on
CUBLASLT_MATMUL_DESC_FAST_ACCUM), and what that loses grows with the length of a row.
"""

from collections.abc import Sequence

import torch

from ..kernels.float8 import Float8Rows, quantize_rows, quantized_rms_norm, quantized_swiglu
from .config import ModelConfig
from .layers import CudaLayer
from .model import DecoderLayer

_MULTIPLE = 16


class Float8Linear:
    """A linear over rows in float8, its weight in float8.

    Args:
        name: of the linear, for errors.
        weight: floating point (N, K), any dtype.
        bias: bfloat16 (N,).
    Raises:
        ValueError: N or K is no multiple of 16.
    """

    def __init__(self, name: str, weight: torch.Tensor, bias: torch.Tensor | None):
        if weight.shape[0] % _MULTIPLE or weight.shape[1] % _MULTIPLE:
            raise ValueError(
                f"dtype float8 needs products whose sizes are multiples of {_MULTIPLE}, "
                f"but the weight of {name} is {tuple(weight.shape)}; use bfloat16"
            )
        values, scales = quantize_rows(weight)
        self.weight, self.scales = values.t(), scales.t()  # (K, N), column-major, and (1, N)
        self.bias = bias

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    def __call__(self, rows: Float8Rows, out: torch.Tensor | None = None) -> torch.Tensor:
        """(R, K) -> bfloat16 (R, N)."""
        values, scales = rows
        return torch._scaled_mm(
            values,
            self.weight,
            scale_a=scales,
            scale_b=self.scales,
            bias=self.bias,
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
            out=out,
        )


class Float8CudaLayer(CudaLayer):
    """As `CudaLayer`, in float8, gate and up in one product; norms, SwiGLU and attention's copy give rows in float8.

    Nothing of the model's own linears is kept.
    """

    def _fuse(self, layer: DecoderLayer) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.qkv = _linear("q_proj, k_proj and v_proj", attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = _linear("o_proj", attention.o_proj)
        self.gate_up = _linear("gate_proj and up_proj", mlp.gate_proj, mlp.up_proj)
        self.down = _linear("down_proj", mlp.down_proj)
        self.num_bytes = sum(linear.num_bytes for linear in (self.qkv, self.output, self.gate_up, self.down))

    @staticmethod
    def pass_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
        hidden, intermediate = config.hidden_size, config.intermediate_size
        attended = config.num_attention_heads * config.head_dim
        heads = attended + 2 * config.num_key_value_heads * config.head_dim
        rotated = attended + config.num_key_value_heads * config.head_dim
        kept = (hidden + heads) * dtype.itemsize
        in_attention = (rotated + 2 * attended) * dtype.itemsize
        rows_and_product = max(hidden, attended, intermediate) + 2 * intermediate * dtype.itemsize
        return kept + max(in_attention, attended * dtype.itemsize + rows_and_product)

    def _project_rows(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        self.qkv(quantized_rms_norm(hidden, self.input_norm, self.eps), out=out)

    def finish(self, hidden: torch.Tensor, attended: torch.Tensor, tiles: Sequence[slice]) -> None:
        for rows in tiles:
            total = hidden[rows]
            product = self.output(quantize_rows(attended[rows]))
            gate_up = self.gate_up(quantized_rms_norm(total, self.mlp_norm, self.eps, add=product))
            total += self.down(quantized_swiglu(*gate_up.tensor_split(2, dim=1)))


def _linear(name: str, *linears: torch.nn.Linear) -> Float8Linear:
    """Linears of one input as one, their outputs side by side."""
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    weight = torch.cat([linear.weight.detach() for linear in linears])
    return Float8Linear(name, weight, torch.cat(biases) if biases else None)
