"""The embedding pass: the layers of `LlamaModel` with fused weights, over tiles of a few fixed numbers of rows.

Every matrix product has a fixed number of rows and every reduction belongs to one row or one sequence, so a text's
embedding is bitwise the same alone or beside any others. A pass of T tokens runs only the tiles that cover them; tile
sizes whose products do not agree bitwise with the largest's are dropped when the runner is made. On CUDA a pass is
captured as a graph, one for each number of rows.

Shapes: T packed tokens, R rows of all tiles of a pass, E hidden size, H query heads, D head dimension.
"""

import logging
from collections.abc import Sequence

import torch

from .config import Window
from .graphs import CapturedPasses, CudaCapture
from .layers import LAYERS, FusedLayer
from .model import LlamaModel
from .ops import attention
from .packing import PackedBatch
from .slabs import run_side_by_side

logger = logging.getLogger(__name__)

# on the CPU 512 rows reach the full rate and stay in cache, and 16 keep one short text cheap
TILES = {"cpu": (16, 64, 512), "cuda": (256, 512, 1024, 2048, 4096, 8192)}
# passes side by side on the CPU, no more because all need the interpreter between products: two lose 2 to 6 % to it
_PASSES_AT_ONCE = 8


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
        self._layer_form = LAYERS[self.device.type]
        self.layers = [self._layer_form(layer) for layer in model.layers]  # type: ignore[arg-type]  # a ModuleList forgets its type
        self._rotary_tables = model.rotary_tables
        self.tiles = self._agreeing_tiles(TILES[self.device.type])
        self.passes_at_once = self._agreeing_passes()
        # the other backends read lengths on the host
        captured = self.device.type == "cuda" and backend == "triton"
        self._captured = CapturedPasses(self._run, CudaCapture(self.device)) if captured else None

    @property
    def packed_bytes(self) -> int:
        """Bytes of the fused weights, which stand beside the model's own."""
        return sum(layer.num_bytes for layer in self.layers)

    def pass_bytes(self, num_tokens: int) -> int:
        """Bytes of activations that a pass of `num_tokens` tokens keeps at its peak, attention's own left out."""
        return num_tokens * self._layer_form.pass_bytes(self.config, self.dtype)

    @torch.inference_mode()
    def __call__(self, batch: PackedBatch, windows: Sequence[Window] | None = None) -> torch.Tensor:
        """Last hidden states `(T, E)` before the final norm, in the compute dtype.

        Args:
            windows: one a layer; default: the configuration's, bidirectional.
        """
        windows = windows or self.config.bidirectional_windows
        if self._captured is None or not batch.num_tokens:
            return self._run(batch, windows)
        return self._captured(batch, windows, capacity=self.cover(batch.num_tokens)[-1].stop)

    def _run(self, batch: PackedBatch, windows: Sequence[Window]) -> torch.Tensor:
        return self._through(self.layers, batch, windows)

    def _through(self, layers: Sequence[FusedLayer], batch: PackedBatch, windows: Sequence[Window]) -> torch.Tensor:
        num_tokens = batch.num_tokens
        tiles = self.cover(num_tokens)
        num_rows = tiles[-1].stop if tiles else 0
        hidden = torch.zeros(num_rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
        torch.index_select(self.embeddings, 0, batch.input_ids, out=hidden[:num_tokens])
        positions = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        positions[:num_tokens] = batch.positions
        angles = self._layer_form.angles(*self._rotary_tables(positions))
        heads = self._layer_form.new_heads(self.config, num_rows, like=hidden)
        attended = hidden.new_zeros(num_rows, self.config.num_attention_heads, self.config.head_dim)
        # where no row is without a token, as in a captured pass, a kernel's own output needs no copy
        out = attended[:num_tokens] if self.backend == "sdpa" or num_tokens < num_rows else None
        for layer, window in zip(layers, windows, strict=True):
            query, key, value = (part[:num_tokens] for part in layer.project(hidden, angles, heads, tiles))
            found = attention(query, key, value, batch, window, self.backend, out=out)
            layer.finish(hidden, (found if out is None else attended).flatten(1), tiles)
        return hidden[:num_tokens]

    def cover(self, num_tokens: int) -> list[slice]:
        """Row ranges of tiles that cover `num_tokens` rows: whole tiles first, then little of one left unused."""
        tiles: list[slice] = []
        start = 0
        while start < num_tokens:
            left = num_tokens - start
            if self.device.type == "cuda":  # many small products would not fill it
                size = min((tile for tile in self.tiles if tile >= left), default=self.tiles[-1])
            else:  # a large tile with up to two small ones' rows unused is faster than many small tiles
                size = max(tile for tile in self.tiles if tile == self.tiles[0] or left > tile - 2 * self.tiles[0])
            tiles.append(slice(start, start + size))
            start += size
        return tiles

    def _agreeing_tiles(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The tile sizes, ascending, at which a layer gives bitwise the rows that it gives at the largest."""
        largest = max(sizes)
        layer, config = self.layers[0], self.config
        generator = torch.Generator().manual_seed(0)
        states, attended = (
            torch.randn(largest, size, generator=generator).to(self.device, self.dtype)
            for size in (config.hidden_size, config.num_attention_heads * config.head_dim)
        )
        angles = self._layer_form.angles(*self._rotary_tables(torch.arange(largest, device=self.device)))

        def run(size: int) -> tuple[torch.Tensor, ...]:
            tiles = [slice(start, start + size) for start in range(0, largest, size)]
            heads = self._layer_form.new_heads(config, largest, like=states)
            projected = layer.project(states, angles, heads, tiles)
            hidden = states.clone()
            layer.finish(hidden, attended, tiles)
            return *projected, hidden

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
