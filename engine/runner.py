"""The embedding pass: the layers of `LlamaModel` with fused weights, over tiles of a few fixed numbers of rows.

Every matrix product has a fixed number of rows and every reduction belongs to one row or one sequence, so a text's
embedding is bitwise the same alone or beside any others. A pass of T tokens runs only the tiles that cover them. What
this relies upon is checked when the runner is made: tile sizes whose products do not agree bitwise with the largest's
are dropped, attention that does not agree takes sequences one by one, and where more cores than one give other bits, a
pass has one. On CUDA a pass is captured as a graph, one for each number of rows.

Shapes: T packed tokens, R rows of all tiles of a pass, E hidden size, H query heads, D head dimension.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from ..kernels.attention.batched import LENGTHS
from . import ops
from .attention_check import differing_lengths
from .config import Window
from .cores import check_cores, on_cores
from .dtype_names import QUANTIZED
from .graphs import CapturedPasses, CudaCapture
from .layers import FusedLayer, layer_form
from .model import DecoderLayer, LlamaModel
from .packing import PackedBatch
from .products import PRODUCTS, Products

logger = logging.getLogger(__name__)

# on the CPU 512 rows reach the full rate and stay in cache, and 16 keep one short text cheap; eight-bit products are
# short, and more rows make fewer calls
TILES = {"cpu": (16, 64, 512), "int8": (16, 64, 256, 1024), "cuda": (256, 512, 1024, 2048, 4096, 8192)}
# passes side by side on the CPU, no more because all need the interpreter between products: two lose 2 to 6 % to it
_PASSES_AT_ONCE = 8


class Runner:
    """Runs packed batches through fused layers, without gradient.

    Args:
        model: on its device, in its float dtype, adapters merged.
        backend: of attention, from `ops.choose_backend`.
        windows: one a layer, what passes run with unless told otherwise; default the configuration's, bidirectional.
        products: `ComputeDtype.products`; default the model's own dtype.
        layers: the model's, each taken when the one before it is in its inference form; default those it holds.

    Attributes:
        tiles: numbers of rows, ascending, that products have.
        passes_at_once: how many may share the CPU, an equal part of the cores each.
        dtype: of hidden states.
        eight_bits: the dtype of products where that is one of eight bits, else empty.
        in_batches: whether attention takes sequences of middling length by `batched_attention`.
        one_by_one: why attention takes each sequence by itself; empty where those of one length share a call.
        one_core: why a pass computes on one core; empty where their number changes no bit.
        products: how matrices are multiplied and why, see products.py.
    """

    def __init__(
        self,
        model: LlamaModel,
        backend: str,
        windows: Sequence[Window] | None = None,
        *,
        products: str = "",
        layers: Iterable[DecoderLayer] | None = None,
    ):
        self.config = model.config
        self.backend = backend
        self.windows = windows or self.config.bidirectional_windows
        self.embeddings = model.embed_tokens.weight.detach()
        self.device = self.embeddings.device
        self.eight_bits = products if products in QUANTIZED else ""
        self._layer_form = layer_form(self.device, products)
        self.dtype = self._layer_form.hidden_dtype or self.embeddings.dtype
        self.layers = [self._layer_form(layer) for layer in layers or model.layers]  # type: ignore[arg-type]  # a ModuleList forgets its type
        self._rotary_tables, self._final_norm = model.rotary_tables, model.norm
        on_cpu = self.device.type == "cpu"
        if on_cpu:
            check_cores(computing=True)
        all_cores = torch.get_num_threads() if on_cpu else 1
        self.passes_at_once = min(all_cores, _PASSES_AT_ONCE)
        self.tiles = TILES.get(products, TILES[self.device.type])
        self.in_batches = ops.attends_in_batches(backend, self.embeddings)
        self.one_by_one = self.one_core = ""
        self._tried = {1}  # numbers of cores
        self._try_cores(sorted({all_cores, all_cores // self.passes_at_once} - {1}))
        self._products: Products = nullcontext
        self.products = self._choose_products()
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
        """Last hidden states `(T, E)` before the final norm, in `dtype`.

        Threads may call with CUDA streams of their own; a batch is of the stream that is the current one.

        Args:
            windows: one a layer; default the runner's.
        """
        windows = windows or self.windows
        if self._captured is None or not batch.num_tokens:
            with self._cores():
                return self._run(batch, windows)
        return self._captured(batch, windows, capacity=self.cover(batch.num_tokens)[-1].stop)

    def all_hidden_states(self, batch: PackedBatch, windows: Sequence[Window] | None = None) -> Iterator[torch.Tensor]:
        """The embeddings, then each layer's output `(T, E)`, the last one after the final norm, one at a time.

        Their number and order are those of transformers' `output_hidden_states`; arguments as in a call.
        """
        steps = self._steps(self.layers, batch, windows or self.windows)
        for place in range(len(self.layers) + 1):
            # not beyond a yield, where another pass of this thread may take its turn
            with torch.inference_mode(), self._cores(), self._products():
                hidden = next(steps)
                states = self._final_norm(hidden) if place == len(self.layers) else hidden.clone()
            yield states

    def pass_sizes(self, num_tokens: int) -> list[int]:
        """Rows of the passes, ascending, that batches of up to `num_tokens` tokens take."""
        sizes: list[int] = []
        while not sizes or sizes[-1] < num_tokens:
            sizes.append(self.cover(sizes[-1] + 1 if sizes else 1)[-1].stop)
        return sizes

    def forget_graphs(self) -> None:
        """Give back the memory that captured passes keep; they are captured again when they are needed."""
        if self._captured is not None:
            self._captured.forget()

    @property
    def cores_each(self) -> int | None:
        """Cores of a pass that runs beside others; None: an equal part of all."""
        return 1 if self.one_core else None

    def _cores(self) -> AbstractContextManager[None]:
        """Those that a pass may have: all, or one; a number of them that is new since the load is tried first."""
        if self.device.type == "cpu" and not self.one_core and torch.get_num_threads() not in self._tried:
            self._try_cores([torch.get_num_threads()])
        return on_cores(1) if self.one_core else nullcontext()

    def _run(self, batch: PackedBatch, windows: Sequence[Window]) -> torch.Tensor:
        with self._products():
            return self._through(self.layers, batch, windows)

    def _through(self, layers: Sequence[FusedLayer], batch: PackedBatch, windows: Sequence[Window]) -> torch.Tensor:
        *_, hidden = self._steps(layers, batch, windows)
        return hidden

    def _steps(
        self, layers: Sequence[FusedLayer], batch: PackedBatch, windows: Sequence[Window]
    ) -> Iterator[torch.Tensor]:
        """The hidden states `(T, E)` before the first layer and after each, in the same memory each time."""
        num_tokens = batch.num_tokens
        tiles = self.cover(num_tokens)
        num_rows = tiles[-1].stop if tiles else 0
        if num_rows == num_tokens:  # as in a captured pass
            hidden, positions = self.embeddings.index_select(0, batch.input_ids).to(self.dtype), batch.positions
        else:
            hidden = torch.zeros(num_rows, self.config.hidden_size, dtype=self.dtype, device=self.device)
            hidden[:num_tokens] = self.embeddings.index_select(0, batch.input_ids)
            positions = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
            positions[:num_tokens] = batch.positions
        angles = self._layer_form.angles(*self._rotary_tables(positions))
        heads = self._layer_form.new_heads(self.config, num_rows, like=hidden)
        # a kernel's own output needs no copy where it has all rows
        attended = out = None
        if self.backend == "sdpa" or num_tokens < num_rows:
            attended = hidden.new_zeros(num_rows, self.config.num_attention_heads, self.config.head_dim)
            out = attended[:num_tokens]
        settings: dict[str, Any] = {
            "together": not self.one_by_one,
            "tile_list": ops.list_tiles(batch, self.backend),
            "parts": ops.plan_batches(batch, self.config.num_key_value_heads) if self.in_batches else (),
        }
        yield hidden[:num_tokens]
        for layer, window in zip(layers, windows, strict=True):
            query, key, value = (part[:num_tokens] for part in layer.project(hidden, angles, heads, tiles))
            found = ops.attention(query, key, value, batch, window, self.backend, out=out, **settings)
            layer.finish(hidden, (found if attended is None else attended).flatten(1), tiles)
            yield hidden[:num_tokens]

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

    def _try_cores(self, several: Sequence[int]) -> None:
        if self.backend == "sdpa":
            self._check_attention(several)
        if several and not self.one_core:
            self.one_core = self._pass_differs(several)
        self._tried.update(several)

    def _check_attention(self, several: Sequence[int]) -> None:
        """Notes what changes a sequence's attention: others in the same call, more cores than one."""
        if self.in_batches:
            differing = set().union(*self._differing_lengths(several, in_batches=True))
            if differing:
                self.in_batches = False
                logger.warning(
                    "attention in batches over %s tokens has other bits in company than alone, or on several cores: "
                    "torch's own is taken",
                    _some(differing),
                )
        taken = LENGTHS if self.in_batches else ()
        in_company, on_several = self._differing_lengths(several, in_batches=False, but=taken)
        if in_company:
            self.one_by_one = f"attention over {_some(in_company)} tokens has other bits among equals than alone"
            logger.warning("%s: sequences are attended one by one", self.one_by_one)
        if on_several:
            self.one_core = (
                f"attention over {_some(on_several)} tokens has other bits on {several[-1]} cores than on one"
            )
            logger.warning("%s: passes run on one core each", self.one_core)

    def _differing_lengths(self, several: Sequence[int], **which: Any) -> tuple[set[int], set[int]]:
        dtype = self._layer_form.new_heads(self.config, 0, like=self.embeddings).dtype
        return differing_lengths(self.config, self.windows, dtype, several, **which)

    @torch.inference_mode()
    def _pass_differs(self, several: Sequence[int]) -> str:
        """What the number of cores changes in a pass through one layer that has every tile, or nothing.

        Its heads are looked at too: rows that are quantised next mostly hide what has changed before.
        """
        num_tokens = sum(self.tiles)
        tokens = torch.randint(self.config.vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0))
        lengths = tokens.split(min(40, self.config.max_position_embeddings))
        batch = PackedBatch.from_sequences([part.tolist() for part in lengths], device=self.device)

        largest = max(self.tiles)
        states = torch.randn(largest, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        states = states.to(self.dtype)
        heads = self._layer_form.new_heads(self.config, largest, like=states)

        def run(cores: int) -> tuple[torch.Tensor, ...]:
            with on_cores(cores):
                angles = self._layer_form.angles(*self._rotary_tables(torch.arange(largest)))
                projected = self.layers[0].project(states, angles, heads, [slice(0, largest)])
                hidden = self._through(self.layers[:1], batch, self.windows[:1])
                return hidden, *(part.clone() for part in projected)

        expected = run(1)
        if all(all(map(torch.equal, run(cores), expected)) for cores in several):
            return ""
        found = f"a pass has other bits on {several[-1]} cores than on one"
        logger.warning("%s: passes run on one core each", found)
        return found

    def _choose_products(self) -> str:
        """Keep the tile sizes that agree, and the first way to multiply that keeps most; what is kept and why."""
        sizes, largest = self.tiles, max(self.tiles)
        (given, as_given), *others = PRODUCTS[self.device.type].items()
        self.tiles = self._agreeing_tiles(sizes, as_given)
        why, lost = given, sorted(set(sizes) - set(self.tiles))
        for name, products in others if lost else ():
            try:
                found = self._agreeing_tiles(sizes, products)
            except RuntimeError as error:  # torch has no such setting, or the library no such product
                logger.warning("products cannot be computed %s: %s", name, error)
                continue
            if len(found) > len(self.tiles):
                self.tiles, self._products = found, products
                why = f"{name}: {given}, tiles of {_some(lost)} rows do not agree with those of {largest}"
                logger.warning("products are computed %s", why)
        if not self.tiles:
            raise RuntimeError(f"self-test: a layer over {largest} rows does not give the same bits twice")
        for size in sorted(set(sizes) - set(self.tiles)):
            logger.warning(
                "tiles of %d rows do not agree bitwise with those of %d rows and are not used", size, largest
            )
        return why

    @torch.inference_mode()
    def _agreeing_tiles(self, sizes: Sequence[int], products: Products) -> tuple[int, ...]:
        """The tile sizes, ascending, at which a layer gives bitwise the rows that it gives at the largest.

        None where the largest does not give the same twice.
        """
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
            with self._cores(), products():
                projected = layer.project(states, angles, heads, tiles)
                hidden = states.clone()
                layer.finish(hidden, attended, tiles)
            return *projected, hidden

        expected = run(largest)
        if any(part.isnan().any() for part in expected):
            raise ValueError("the first layer gives NaN: its weights or numbers of the configuration are wrong")
        agreeing = [size for size in sizes if all(map(torch.equal, run(size), expected))]
        return tuple(sorted(agreeing)) if largest in agreeing else ()


def _some(lengths: Collection[int]) -> str:
    first = ", ".join(map(str, sorted(lengths)[:4]))
    return first if len(lengths) <= 4 else f"{first} … {max(lengths)}"
