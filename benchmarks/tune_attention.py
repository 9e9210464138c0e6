"""Tile sizes of the attention kernels, measured on the GPU at hand: the present ones against their neighbours.

    bivec benchmark tune-attention --output tune.json --budget-seconds 540      # as often as there are seconds
    bivec benchmark tune-attention --output tune.json --install
    python -m bivec.benchmarks.tune_attention --compile-only --capability 90 --head-dim 128 --mask plain
    TRITON_INTERPRET=1 python -m bivec.benchmarks.tune_attention --quick --device cpu --output tune.json

A neighbour differs from the present tile by a factor of two in a side or two, in warps or by a pipeline stage. All are
compiled beforehand, on all cores; which spill, take more shared memory than the device has, or are further from float64
than truth.py allows, have no time. The others are timed in turns, forward or backward as a whole. A row of the table
takes a tile that is faster over all its cases; the table is written beside `--output`, as OUTPUT.tiles.json, and in
place of the package's with `--install`. What was measured stands in `--output` and is not measured again.
"""

import argparse
import functools
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import get_context

import torch

from ..kernels.attention import operator, tiles
from ..kernels.attention.tile_list import TILE_ROWS
from ..kernels.attention.tiles import AttentionTiles, Tiles
from ..kernels.ragged import INTERPRETED
from . import sass
from .attention import Truth, computed, directions, real_lengths
from .attention_peers import Attention, Prepared, bivec
from .cases import Case, Results
from .machine import describe_machine
from .timing import argument_parser, error_text, measure, num_rounds, report

# the tile's name in the table, and the compiled kernel's
KERNELS = {
    "forward": "_attention_fwd_kernel",
    "backward_dq": "_attention_bwd_dq_kernel",
    "backward_dkv": "_attention_bwd_dkv_kernel",
    "short_forward": "_attention_short_fwd_kernel",
    "short_backward": "_attention_short_bwd_kernel",
}
WINDOWS = {"plain": [(-1, -1)], "window": [(-1, 0), (128, 128)]}  # of the table's kinds of masks
HEADS = {64: (32, 8), 96: (32, 8), 128: (32, 8), 256: (16, 4)}
# block_m, block_n and warps times, stages plus
MOVES = (
    (0.5, 1, 0.5, 0),
    (0.5, 1, 1, 0),
    (2, 1, 1, 0),
    (2, 1, 2, 0),
    (1, 2, 1, 0),
    (1, 0.5, 1, 0),
    (0.5, 2, 1, 0),
    (2, 0.5, 1, 0),
    (2, 0.5, 0.5, 0),
    (1, 1, 0.5, 0),
    (1, 1, 2, 0),
    (1, 1, 1, 1),
    (1, 1, 1, -1),
)
WORTH = 0.98  # of the present tile's time at most: less would be noise
SHARED_KIB = {80: 163, 86: 99, 90: 227, 120: 99}  # that a block can have, from this capability on


@dataclass(frozen=True)
class Row:
    """A row of the table, and the head dimensions that it is measured at."""

    name: str
    head_dims: tuple[int, ...]
    mask: str
    present: AttentionTiles


def neighbours(kernel: str, present: AttentionTiles, most: int) -> list[Tiles]:
    """The present tile, and those beside it that the kernel can take."""
    tile: Tiles = getattr(present, kernel)
    found = [tile]
    for m, n, warps, stages in MOVES:
        near = Tiles(
            int(tile.block_m * m), int(tile.block_n * n), int(tile.num_warps * warps), tile.num_stages + stages
        )
        if near not in found and _fits(kernel, near, present.short):
            found.append(near)
    return found[:most]


def _fits(kernel: str, tile: Tiles, short: int) -> bool:
    if min(tile.block_m, tile.block_n) < 16 or tile.block_m * tile.block_n > 128 * 128:
        return False
    # Hopper's products are of four warps
    if tile.num_warps not in ((1,) if INTERPRETED else (4, 8)) or not 1 <= tile.num_stages <= 4:
        return False
    if kernel.startswith("short"):
        return tile.block_n >= short
    return TILE_ROWS % (tile.block_n if kernel == "backward_dkv" else tile.block_m) == 0


@contextmanager
def used(given: AttentionTiles) -> Iterator[None]:
    """Attention is launched with these tiles."""
    before = operator.attention_tiles
    operator.attention_tiles = lambda *_: given
    try:
        yield
    finally:
        operator.attention_tiles = before


def compile_variant(capability: int, head_dim: int, mask: str, kernel: str, given: AttentionTiles) -> dict | str:
    """The kernel's resources, or why it has none; for a process of its own. Launches find it in Triton's cache."""
    from .absent_device import collected_launches  # it asks for Triton, compiling

    num_heads, num_kv_heads = HEADS[head_dim]
    q = torch.empty(256, num_heads, head_dim, dtype=torch.bfloat16)
    k, v = (torch.empty(256, num_kv_heads, head_dim, dtype=torch.bfloat16) for _ in range(2))
    lse = torch.empty(num_heads, 256)
    cu_seqlens, tile_list = torch.zeros(5, dtype=torch.int32), torch.zeros(8, 4, dtype=torch.int32)
    last = (cu_seqlens, tile_list, *WINDOWS[mask][-1], 0.125, 0.0, 1.0, None, None)
    try:
        with used(given), collected_launches(capability) as launches:
            if "forward" in kernel:
                operator.attention_forward(q, k, v, *last)
            else:
                operator.attention_backward(q, q, k, v, q, lse, *last)
        compiled = next(launch for launch in launches if launch.metadata.name == KERNELS[kernel])
        return sass.resources(compiled.asm["cubin"], compiled.metadata.shared)
    except Exception as error:  # a tile that cannot be compiled has no time
        return error_text(error)


def refusal(compiled: dict | str | None, capability: int) -> str | None:
    """Why a compiled kernel has no time, or None; a kernel of None was not compiled."""
    if compiled is None or isinstance(compiled, str):
        return compiled
    if compiled["spilled_bytes"]:
        return f"spills {compiled['spilled_bytes']} bytes"
    room = SHARED_KIB[max((known for known in SHARED_KIB if known <= capability), default=86)] * 1024
    if compiled["shared_bytes"] > room:
        return f"takes {compiled['shared_bytes']} bytes of shared memory, there are {room}"
    return None


def compile_all(rows: list[Row], kernels: list[str], capability: int, most: int, jobs: int) -> dict[str, dict | str]:
    """Every variant by `variant_name`."""
    wanted = {
        variant_name(head_dim, row.mask, kernel, tile): (
            capability,
            head_dim,
            row.mask,
            kernel,
            chosen(row, kernel, tile),
        )
        for row in rows
        for kernel in kernels
        for head_dim in row.head_dims
        for tile in neighbours(kernel, row.present, most)
    }
    with ProcessPoolExecutor(min(jobs, len(wanted)), mp_context=get_context("spawn")) as pool:
        running = {name: pool.submit(compile_variant, *arguments) for name, arguments in wanted.items()}
        return {name: compiled.result() for name, compiled in running.items()}


def variant_name(head_dim: int, mask: str, kernel: str, tile: Tiles) -> str:
    return f"D{head_dim} {mask} {kernel} {tile_name(tile)}"


def tile_name(tile: Tiles) -> str:
    return f"{tile.block_m}x{tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"


def workloads(kernel: str, row: Row, dtype: torch.dtype, quick: bool) -> list[Attention]:
    """What a kernel is timed at: one length and a mix; what it leaves to another is not there."""
    short, windows = row.present.short, WINDOWS[row.mask]
    if kernel.startswith("short"):
        windows = windows[:1]  # the others are wider than a short sequence
        mix = tuple(length for length in ((5, 16, 9) if quick else real_lengths(65536)) if length <= short)
        lengths = {"short mix": mix, f"uniform {short}": (short,) * (2 if quick else 65536 // short)}
    elif quick:
        lengths = {"mix": (20, 33)}
    else:
        lengths = {"uniform 4096": (4096,) * 4, "real mix": tuple(n for n in real_lengths(65536) if n > short)}
    return [
        Attention(f"D{head_dim}, {label}, window {window}", given, *_heads(head_dim), head_dim, dtype, window)
        for head_dim in row.head_dims
        for label, given in lengths.items()
        for window in windows
        if given
    ]


def _heads(head_dim: int) -> tuple[int, int]:
    return HEADS.get(head_dim, (2, 1))


class Tuner:
    """Tunes the rows of a table on one device.

    Args:
        capability: the device's, as 90; 0 of the interpreter.
        compiled: what `compile_all` gave; empty where nothing is compiled.
        most: variants of a kernel.
    """

    def __init__(
        self,
        device: torch.device,
        capability: int,
        compiled: dict[str, dict | str],
        *,
        rounds: int,
        most: int,
        quick: bool,
    ):
        self._device, self._capability, self._compiled = device, capability, compiled
        self._rounds, self._most, self._quick = rounds, most, quick
        self._dtype = torch.float32 if INTERPRETED else torch.bfloat16

    def measure(self, row: Row, kernel: str) -> list[dict]:
        """A row of the result for each variant of a kernel and workload."""
        variants = neighbours(kernel, row.present, self._most)
        refused = {tile: self._refusal(row, kernel, tile) for tile in variants}
        found: list[dict] = []
        for workload in workloads(kernel, row, self._dtype, self._quick):
            inputs = workload.inputs(self._device)
            calls: dict[str, Callable[[], object] | str] = {
                tile_name(tile): refused[tile] or _timed(workload, inputs, kernel, chosen(row, kernel, tile))
                for tile in variants
            }
            timings = measure(calls, rounds=self._rounds, device=self._device, flush_cache=self._device.type == "cuda")
            facts = {"row": row.name, "kernel": kernel, "workload": workload.name}
            found += [facts | {"tile": list(tile)} | timings[tile_name(tile)].row() for tile in variants]
        return found

    def _refusal(self, row: Row, kernel: str, tile: Tiles) -> str | None:
        for head_dim in row.head_dims:
            compiled = self._compiled.get(variant_name(head_dim, row.mask, kernel, tile))
            reason = None if tile == getattr(row.present, kernel) else refusal(compiled, self._capability)
            reason = reason or self._wrong(row, kernel, tile, head_dim)
            if reason is not None:
                return reason
        return None

    def _wrong(self, row: Row, kernel: str, tile: Tiles, head_dim: int) -> str | None:
        lengths = (1, 17, 33) if self._quick else (1, 17, 63, 64, 65, 130, 300)
        for window in WINDOWS[row.mask]:
            case = Attention("ragged", lengths, *_heads(head_dim), head_dim, self._dtype, window)
            inputs = case.inputs(self._device)
            try:
                with used(chosen(row, kernel, tile)):
                    _, reason = Truth(case, inputs).judge(computed(_prepared(case, inputs)))
            except Exception as error:  # what cannot be launched has no time
                return error_text(error)
            if reason is not None:
                return reason
        return None


def chosen(row: Row, kernel: str, tile: Tiles) -> AttentionTiles:
    """The row's present tiles but for one."""
    return AttentionTiles(**row.present._asdict() | {kernel: tile})


def _prepared(case: Attention, inputs: list[torch.Tensor]) -> Prepared:
    prepared = bivec(case, inputs)
    assert isinstance(prepared, Prepared)
    return prepared


def _timed(case: Attention, inputs: list[torch.Tensor], kernel: str, tiles: AttentionTiles) -> Callable[[], object]:
    run = directions(_prepared(case, inputs))["forward" if "forward" in kernel else "backward"]

    def call() -> object:
        with used(tiles):
            return run()

    return call


def tuned(rows: list[Row], measured: list[dict]) -> dict[str, AttentionTiles]:
    """The rows with the tiles that were fastest: by the geometric mean of their shares of the present tile's time."""
    found: dict[str, AttentionTiles] = {}
    for row in rows:
        best = row.present
        for kernel in KERNELS:
            present = list(getattr(row.present, kernel))
            seconds: dict[tuple[int, ...], dict[str, float | None]] = {}
            for one in measured:
                if (one.get("row"), one.get("kernel")) == (row.name, kernel):
                    seconds.setdefault(tuple(one["tile"]), {})[one["workload"]] = one["median_s"]
            base = seconds.pop(tuple(present), {})
            shares = {
                tile: statistics.geometric_mean([own[name] / base[name] for name in base])  # type: ignore[operator]
                for tile, own in seconds.items()
                if base and all(own.get(name) and base[name] for name in base)
            }
            fastest = min(shares, key=shares.__getitem__, default=None)
            if fastest is not None and shares[fastest] <= WORTH:
                best = AttentionTiles(**best._asdict() | {kernel: Tiles(*fastest)})
                change = f"{present} -> {list(fastest)}, {shares[fastest]:.3f} of its time"
                print(f"{row.name} {kernel}: {change}", file=sys.stderr, flush=True)
        found[row.name] = best
    return found


def rows_of(head_dims: list[int], masks: list[str], capability: tuple[int, int] | None) -> list[Row]:
    """The table's rows for a device; of the interpreter, for which there is none, one of its own a mask."""
    if capability is None:
        return [Row(f"interpreter 32-bit D16 {mask}", (16,), mask, tiles.INTERPRETER) for mask in masks]
    found = []
    for mask in masks:
        by_row: dict[int, list[int]] = {}
        for head_dim in head_dims:
            by_row.setdefault(max(64, tiles.padded_head_dim(head_dim)), []).append(head_dim)
        for block_d, dims in by_row.items():
            name = tiles.row_name(block_d, torch.bfloat16, capability, mask)
            found.append(Row(name, tuple(dims), mask, tiles.load_table()[name]))
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--head-dim", type=int, nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--mask", nargs="+", choices=list(WINDOWS), default=list(WINDOWS))
    parser.add_argument("--kernel", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--most", type=int, default=1 + len(MOVES), help="variants of a kernel, the present one first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    parser.add_argument("--install", action="store_true", help="write the package's own table")
    parser.add_argument("--compile-only", action="store_true", help="print what the variants become, without a GPU")
    parser.add_argument("--capability", type=int, help="with --compile-only: 80, 90, 100, ...")
    arguments = parser.parse_args(argv)
    if arguments.compile_only:
        return _compile_only(arguments)
    device = torch.device(arguments.device)
    if device.type != "cuda" and not INTERPRETED:
        raise ValueError("--device cpu needs Triton's interpreter: set TRITON_INTERPRET=1")
    if arguments.install and device.type != "cuda":
        raise ValueError(f"--install needs tiles that were measured on a GPU, got --device {device}")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    number = 10 * capability[0] + capability[1] if capability else 0
    rows = rows_of(arguments.head_dim, arguments.mask, capability)
    install, jobs = arguments.install, arguments.jobs
    del arguments.install, arguments.jobs  # which make no other result
    results = Results("tune-attention", arguments, describe_machine(device, dtypes=()))
    if number and "compiled" not in results.document:
        results.add(compiled=compile_all(rows, arguments.kernel, number, arguments.most, jobs))
    settings = {"rounds": num_rounds(arguments, 9), "most": arguments.most, "quick": arguments.quick}
    tuner = Tuner(device, number, results.document.get("compiled", {}), **settings)
    cases = [
        Case(f"{row.name} {kernel}", functools.partial(tuner.measure, row, kernel))
        for row in rows
        for kernel in arguments.kernel
    ]
    status = results.run(cases)
    found = tuned(rows, results.document["rows"])
    if arguments.output is not None:
        table = tiles.load_table() | found if number else found
        tiles.write_table(table, arguments.output.with_suffix(".tiles.json"))
    if install:
        tiles.write_table(tiles.load_table() | found)
    return status


def _compile_only(arguments: argparse.Namespace) -> int:
    if INTERPRETED or arguments.capability is None:
        raise ValueError("--compile-only needs --capability, and TRITON_INTERPRET unset")
    capability = arguments.capability
    rows = rows_of(arguments.head_dim, arguments.mask, divmod(capability, 10))
    compiled = compile_all(rows, arguments.kernel, capability, arguments.most, arguments.jobs)
    found = [
        {"name": name, "refused": refusal(row, capability)} | (row if isinstance(row, dict) else {})
        for name, row in compiled.items()
    ]
    report("tune-attention", found, machine={"capability": capability}, output=arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
