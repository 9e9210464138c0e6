"""The embedding pass: the layers of `LlamaModel` with fused weights, over tiles of a few fixed numbers of rows.

Every matrix product has a fixed number of rows and every reduction belongs to one row or one sequence, so a text's
embedding is bitwise the same alone or beside any others. A pass of T tokens runs only the tiles that cover them; tile
sizes whose products do not agree bitwise with the largest's are dropped when the runner is made.

Shapes: T packed tokens, R rows of a tile, E hidden size, H query heads, G key/value heads, D head dimension.
"""

import logging
from collections.abc import Sequence

import torch

from .config import Window
from .model import DecoderLayer, LlamaModel, rms_norm
from .ops import PackedLinear, attention
from .packing import PackedBatch
from .slabs import run_side_by_side

logger = logging.getLogger(__name__)

# on the CPU 512 rows reach the full rate and stay in cache, and 16 keep one short text cheap
TILES = {"cpu": (16, 64, 512), "cuda": (256, 2048, 8192)}
# passes side by side on the CPU, no more because all need the interpreter between products: two lose 2 to 6 % to it
_PASSES_AT_ONCE = 8


class FusedLayer:
    """One decoder layer for inference: q, k and v in one product, SwiGLU and residuals done as products are written.

    The halves of each query and key head are interleaved, which no dot product of the two sees: rotary embedding is
    then one product of complex numbers.
    """

    def __init__(self, layer: DecoderLayer):
        attention, mlp = layer.self_attn, layer.mlp
        head_dim = attention.head_dim
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        weights = [projection.weight.detach() for projection in projections]
        biases = [projection.bias.detach() for projection in projections if projection.bias is not None]
        weights[:2] = [_interleave(weight, head_dim) for weight in weights[:2]]
        biases[:2] = [_interleave(bias, head_dim) for bias in biases[:2]]
        self.qkv = PackedLinear(torch.cat(weights), torch.cat(biases) if biases else None)
        self.output, self.gate, self.up, self.down = (
            PackedLinear(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())
            for linear in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)
        )
        self.input_norm = layer.input_layernorm.weight.detach()
        self.mlp_norm = layer.post_attention_layernorm.weight.detach()
        self.eps = layer.input_layernorm.eps
        self.head_norms: tuple[torch.Tensor, torch.Tensor] | None = None
        if hasattr(attention, "q_norm"):
            norms = (attention.q_norm.weight.detach(), attention.k_norm.weight.detach())
            self.head_norms = (_interleave(norms[0], head_dim), _interleave(norms[1], head_dim))


def _interleave(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows `(heads D, ...)` of a weight or bias with each head's halves interleaved: 0, D / 2, 1, D / 2 + 1, ..."""
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


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
        # rotary embedding gives float32, and on the CPU torch's attention is faster in it than in bfloat16
        self._heads_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        self.tiles = self._agreeing_tiles(TILES[self.device.type])
        self.passes_at_once = self._agreeing_passes()

    @property
    def packed_bytes(self) -> int:
        """Bytes of the fused weights, which stand beside the model's own."""
        linears = [x for layer in self.layers for x in (layer.qkv, layer.output, layer.gate, layer.up, layer.down)]
        return sum(linear.num_bytes for linear in linears)

    def pass_bytes(self, num_tokens: int) -> int:
        """Bytes of activations that a pass of `num_tokens` tokens keeps at its peak, attention's own left out."""
        config = self.config
        states = config.hidden_size + config.num_attention_heads * config.head_dim  # and what attention gives
        heads = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
        return num_tokens * (states * self.dtype.itemsize + heads * self._heads_dtype.itemsize)

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch, windows: Sequence[Window] | None = None) -> torch.Tensor:
        """Last hidden states `(T, E)` before the final norm, in the compute dtype.

        Args:
            windows: one a layer; default: the configuration's, bidirectional.
        """
        return self._through(self.layers, batch, windows or self.config.bidirectional_windows)

    def _through(self, layers: Sequence[FusedLayer], batch: PackedBatch, windows: Sequence[Window]) -> torch.Tensor:
        tiles = self.cover(batch.num_tokens)
        num_rows = tiles[-1].stop if tiles else 0
        hidden = torch.zeros(num_rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
        torch.index_select(self.embeddings, 0, batch.input_ids, out=hidden[: batch.num_tokens])
        positions = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        positions[: batch.num_tokens] = batch.positions
        rotations = torch.complex(*self._rotary_tables(positions))
        config = self.config
        num_heads = config.num_attention_heads + 2 * config.num_key_value_heads
        heads = torch.empty(num_rows, num_heads, config.head_dim, dtype=self._heads_dtype, device=self.device)
        attended = torch.zeros(num_rows, self.layers[0].output.in_features, dtype=self.dtype, device=self.device)
        for layer, window in zip(layers, windows, strict=True):
            for rows in tiles:
                self._project(layer, hidden[rows], rotations[rows], heads[rows])
            self._attend(heads[: batch.num_tokens], attended[: batch.num_tokens], batch, window)
            for rows in tiles:
                hidden[rows] = self._finish(layer, hidden[rows], attended[rows])
        return hidden[: batch.num_tokens]

    def _project(self, layer: FusedLayer, hidden: torch.Tensor, rotations: torch.Tensor, heads: torch.Tensor) -> None:
        """From a tile's hidden states `(R, E)` to its query, key and value heads, into `heads` `(R, H + 2 G, D)`.

        Args:
            rotations: complex64 `(R, D / 2)`, each token's angles.
        """
        qkv = layer.qkv(rms_norm(hidden, layer.input_norm, layer.eps)).view(heads.shape)
        wide = heads if heads.dtype is torch.float32 else torch.empty_like(heads, dtype=torch.float32)
        wide.copy_(qkv)
        num_heads = self.config.num_attention_heads
        rotated = wide[:, : num_heads + self.config.num_key_value_heads]
        if layer.head_norms is not None:
            for part, norm in zip((rotated[:, :num_heads], rotated[:, num_heads:]), layer.head_norms, strict=True):
                part.copy_(rms_norm(part, norm, layer.eps))
        torch.view_as_complex(rotated.unflatten(-1, (-1, 2))).mul_(rotations[:, None])
        if wide is not heads:
            heads.copy_(wide)

    def _attend(self, heads: torch.Tensor, attended: torch.Tensor, batch: PackedBatch, window: Window) -> None:
        """Attention within each sequence, from `(T, H + 2 G, D)` into `attended` `(T, H D)`."""
        num_heads, num_key_value_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        query, key, value = heads.split([num_heads, num_key_value_heads, num_key_value_heads], dim=1)
        attention(query, key, value, batch, window, self.backend, out=attended.view_as(query))

    def _finish(self, layer: FusedLayer, hidden: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The rest of a layer for one tile, `(R, E)`: output projection, residual, norm, SwiGLU, residual."""
        hidden = layer.output(attended, add=hidden)
        normed = rms_norm(hidden, layer.mlp_norm, layer.eps)
        gated = layer.up(normed, multiply=layer.gate(normed, activation="silu"))
        return layer.down(gated, add=hidden)

    def cover(self, num_tokens: int) -> list[slice]:
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
        rotations = torch.complex(*self._rotary_tables(torch.arange(largest, device=self.device)))
        num_heads = layer.qkv.out_features // self.config.head_dim

        def run(size: int) -> tuple[torch.Tensor, torch.Tensor]:
            heads = torch.empty(largest, num_heads, self.config.head_dim, dtype=self._heads_dtype, device=self.device)
            finished = torch.empty_like(hidden)
            for start in range(0, largest, size):
                rows = slice(start, start + size)
                self._project(layer, hidden[rows], rotations[rows], heads[rows])
                finished[rows] = self._finish(layer, hidden[rows], attended[rows])
            return heads, finished

        expected = run(largest)
        agreeing = [size for size in sizes if all(map(torch.equal, run(size), expected))]
        for size in sorted(set(sizes) - set(agreeing)):
            logger.warning(
                "tiles of %d rows do not agree bitwise with those of %d rows and are not used", size, largest
            )
        return tuple(sorted(agreeing))

    def _agreeing_passes(self) -> int:
        """How many passes may share the CPU, a few cores each, if the bits are those of a pass on all cores."""
        cores = torch.get_num_threads()
        at_once = min(cores, _PASSES_AT_ONCE)
        if self.device.type != "cpu" or at_once == 1:
            return 1
        lengths = [length for length in (1, 12, 40, 40, 415) if length <= self.config.max_position_embeddings]
        tokens = torch.randint(self.config.vocab_size, (sum(lengths),), generator=torch.Generator().manual_seed(0))
        batch = PackedBatch.from_sequences([part.tolist() for part in tokens.split(lengths)])

        @torch.inference_mode()
        def run(_: int) -> torch.Tensor:
            return self._through(self.layers[:1], batch, self.config.bidirectional_windows[:1])

        (shared,) = run_side_by_side(run, [0], at_once=1, cores_each=cores // at_once)
        if torch.equal(shared, run(0)):
            return at_once
        logger.warning("a pass on %d of %d cores does not agree bitwise with one on all", cores // at_once, cores)
        return 1
