"""The embedding pass: the layers of `LlamaModel` with fused weights, over tiles of a few fixed numbers of rows.

Every matrix product has a fixed number of rows and every reduction belongs to one row or one sequence, so a text's
embedding is bitwise the same alone or beside any others. A pass of T tokens runs only the tiles that cover them; tile
sizes whose products do not agree bitwise with the largest's are dropped when the runner is made.

Shapes: T packed tokens, R rows of a tile, E hidden size, H query heads, G key/value heads, D head dimension.
"""

import logging
from collections.abc import Sequence

import torch

from . import ops
from .config import Window
from .model import DecoderLayer, LlamaModel, apply_rotary, rms_norm
from .packing import PackedBatch

logger = logging.getLogger(__name__)

# on the CPU 512 rows reach the full rate and stay in cache, and 16 keep one short text cheap
TILES = {"cpu": (16, 64, 512), "cuda": (256, 2048, 8192)}


class FusedLayer:
    """One decoder layer for inference: q, k and v in one product; norms, rotary and SwiGLU beside theirs."""

    def __init__(self, layer: DecoderLayer):
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weight = torch.cat([projection.weight.detach() for projection in projections])
        biases = [projection.bias.detach() for projection in projections if projection.bias is not None]
        self.qkv = ops.PackedLinear(weight, torch.cat(biases) if biases else None)
        self.output, self.gate, self.up, self.down = (
            ops.PackedLinear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
            for linear in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self.input_norm = layer.input_layernorm.weight.detach()
        self.mlp_norm = layer.post_attention_layernorm.weight.detach()
        self.eps = layer.input_layernorm.eps
        self.q_norm = attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None
        self.k_norm = attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None


class Runner:
    """Runs packed batches through fused layers, without gradient.

    Args:
        model: on its device, in its compute dtype, adapters merged.
        backend: of attention, from `ops.choose_backend`.
    """

    def __init__(self, model: LlamaModel, backend: str):
        self.config = model.config
        self.backend = backend
        self.embeddings = model.embed_tokens.weight.detach()
        self.device, self.dtype = self.embeddings.device, self.embeddings.dtype
        self.layers = [FusedLayer(layer) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList forgets its type
        self._rotary_tables = model.rotary_tables
        self.tiles = self._agreeing_tiles(TILES[self.device.type])

    @property
    def packed_bytes(self) -> int:
        """Bytes of the fused weights, which stand beside the model's own."""
        linears = [x for layer in self.layers for x in (layer.qkv, layer.output, layer.gate, layer.up, layer.down)]
        return sum(linear.num_bytes for linear in linears)

    def pass_bytes(self, num_tokens: int) -> int:
        """Bytes of activations that a pass of `num_tokens` tokens keeps at its peak, attention's own left out."""
        config = self.config
        heads = 2 * (config.num_attention_heads + config.num_key_value_heads)  # q, k, v and what attention gives
        return num_tokens * (config.hidden_size + heads * config.head_dim) * self.dtype.itemsize

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch, windows: Sequence[Window] | None = None) -> torch.Tensor:
        """Last hidden states `(T, E)` before the final norm, in the compute dtype.

        Args:
            windows: one a layer; default: the configuration's, bidirectional.
        """
        tiles = self._cover(batch.num_tokens)
        num_rows = tiles[-1].stop if tiles else 0
        hidden = torch.zeros(num_rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
        torch.index_select(self.embeddings, 0, batch.input_ids, out=hidden[: batch.num_tokens])
        positions = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        positions[: batch.num_tokens] = batch.positions
        cos, sin = self._rotary_tables(positions)
        config = self.config
        num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        heads = torch.empty(num_rows, num_heads, config.head_dim, dtype=self.dtype, device=self.device)
        attended = torch.zeros(num_rows, self.layers[0].output.in_features, dtype=self.dtype, device=self.device)
        for layer, window in zip(self.layers, windows or config.bidirectional_windows, strict=True):
            for rows in tiles:
                heads[rows] = self._project(layer, hidden[rows], cos[rows], sin[rows])
            self._attend(heads[: batch.num_tokens], attended[: batch.num_tokens], batch, window)
            for rows in tiles:
                hidden[rows] = self._finish(layer, hidden[rows], attended[rows])
        return hidden[: batch.num_tokens]

    def _project(self, layer: FusedLayer, hidden: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """From a tile's hidden states `(R, E)` to its rotated query, key and value heads `(R, H + 2 G, D)`."""
        qkv = layer.qkv(rms_norm(hidden, layer.input_norm, layer.eps)).unflatten(-1, (-1, self.config.head_dim))
        num_heads, num_key_value_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        rotated, value = qkv.split([num_heads + num_key_value_heads, num_key_value_heads], dim=1)
        if layer.q_norm is not None and layer.k_norm is not None:
            query, key = rotated.split([num_heads, num_key_value_heads], dim=1)
            rotated = torch.cat((rms_norm(query, layer.q_norm, layer.eps), rms_norm(key, layer.k_norm, layer.eps)), 1)
        return torch.cat((apply_rotary(rotated, cos, sin), value), dim=1)

    def _attend(self, heads: torch.Tensor, attended: torch.Tensor, batch: PackedBatch, window: Window) -> None:
        """Attention within each sequence, from `(T, H + 2 G, D)` into `attended` `(T, H D)`."""
        num_heads, num_key_value_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        query, key, value = heads.split([num_heads, num_key_value_heads, num_key_value_heads], dim=1)
        ops.attention(query, key, value, batch, window, self.backend, out=attended.view_as(query))

    def _finish(self, layer: FusedLayer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of a layer for one tile, `(R, E)`: output projection, residual, norm, SwiGLU, residual."""
        hidden = layer.output(attended, add=hidden)
        normed = rms_norm(hidden, layer.mlp_norm, layer.eps)
        gated = layer.up(normed, multiply=layer.gate(normed, activation="silu"))
        return layer.down(gated, add=hidden)

    def _cover(self, num_tokens: int) -> list[slice]:
        """Row ranges of tiles that cover `num_tokens` rows: whole tiles first, then little of one left unused."""
        tiles: list[slice] = []
        start = 0
        while start < num_tokens:
            left = num_tokens - start
            # a large tile with up to two small ones' rows unused is faster than many small tiles
            size = max(tile for tile in self.tiles if tile == self.tiles[0] or left > tile - 2 * self.tiles[0])
            tiles.append(slice(start, start + size))
            start += size
        return tiles

    def _agreeing_tiles(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The tile sizes, ascending, at which a layer gives bitwise the rows that it gives at the largest."""
        largest = max(sizes)
        layer = self.layers[0]
        generator = torch.Generator().manual_seed(0)
        hidden, attended = (
            torch.randn(largest, size, generator=generator).to(self.device, self.dtype)
            for size in (self.config.hidden_size, layer.output.in_features)
        )
        cos, sin = self._rotary_tables(torch.arange(largest, device=self.device))

        def run(size: int) -> tuple[torch.Tensor, torch.Tensor]:
            tiles = [slice(start, start + size) for start in range(0, largest, size)]
            projected = [self._project(layer, hidden[rows], cos[rows], sin[rows]) for rows in tiles]
            return torch.cat(projected), torch.cat(
                [self._finish(layer, hidden[rows], attended[rows]) for rows in tiles]
            )

        expected = run(largest)
        agreeing = [size for size in sizes if all(map(torch.equal, run(size), expected))]
        for size in sorted(set(sizes) - set(agreeing)):
            logger.warning(
                "tiles of %d rows do not agree bitwise with those of %d rows and are not used", size, largest
            )
        return tuple(sorted(agreeing))
