"""The one harness behind every benchmark: interleaved repetitions, measured ceilings, one JSON document last.

    variants = {"ours": lambda: ours(x), "peer": lambda: peer(x), "other": "package other is not installed"}
    timings = measure(variants, rounds=15, device="cuda", flush_cache=True)
    rows = [timing.row() | {"speedup": ratio(timings["peer"], timing)} for timing in timings.values()]

`cases.py` writes the rows of one case after another.

A variant is a function without arguments; it builds its inputs beforehand. A variant given as a string is left out for
that reason, one that raises is left out for its error, and both stand in the result as `skipped`. On CUDA the time is
the device's, which is kept busy until the host has launched what is timed, so that slow launches count for nobody. What
a call takes from the host's side, launches and all, stands apart as `wall_s`.
"""

import argparse
import contextlib
import ctypes
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

FLUSH_BYTES = 256 * 2**20  # what triton's do_bench clears: larger than any last-level cache we meet
QUARTILES = ("median", "q25", "q75")
LEAD_SECONDS = (1e-3, 20e-3)  # that the device is kept busy before a call is timed, at least and at most
CYCLES_PER_SECOND = 2e9  # of a GPU's clock, about
WALL_CALLS = 3


@dataclass
class Timing:
    """Seconds of one variant, one number a round, and the memory that its last warm-up call took."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_growth_bytes: int | None = None  # above what was held before the call; None where it cannot be measured
    peak_bytes: int | None = None  # CUDA only: everything allocated by torch at the peak
    wall_s: float | None = None  # CUDA only: median of one call and waiting for it
    skipped: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.seconds) if self.seconds else math.nan

    def quartiles(self) -> dict[str, float | None]:
        return dict(zip(QUARTILES, _quartiles(self.seconds), strict=True))

    def row(self) -> dict:
        """The variant as one row of a report; times are None for a skipped variant."""
        return {
            "name": self.name,
            **{f"{quartile}_s": seconds for quartile, seconds in self.quartiles().items()},
            "min_s": min(self.seconds, default=None),
            "rounds": len(self.seconds),
            "wall_s": self.wall_s,
            "peak_growth_bytes": self.peak_growth_bytes,
            "peak_bytes": self.peak_bytes,
            "skipped": self.skipped,
        }


def measure(
    variants: Mapping[str, Callable[[], object] | str],
    *,
    rounds: int = 7,
    warmup: int = 2,
    reverse: bool = False,
    device: str | torch.device = "cpu",
    flush_cache: bool = False,
    calls: int = 1,
    pause: float = 0.0,
    clock: Callable[[], float] | None = None,
) -> dict[str, Timing]:
    """Time the variants one after another in every round (A B C A B C …), after warming each of them up.

    `reverse` turns the order round in every second round, `flush_cache` empties the caches before each repetition,
    `calls` repeats a short variant inside one repetition, `pause` sleeps that many seconds before each. On CUDA the
    time is that between two events, which the device meets after everything is launched; a `clock` given
    (time.perf_counter) means wall time there, both ends synchronised. The peak is of the last warm-up call, so
    compiling counts toward it where `warmup` is 1. Without rounds the variants are warmed up and no more.
    """
    device = torch.device(device)
    if warmup < 1 or calls < 1:
        raise ValueError(f"warmup and calls must be at least 1, got {warmup} and {calls}")
    if flush_cache and calls > 1:
        raise ValueError(f"flush_cache needs calls=1, got {calls}: later calls would find the cache warm")
    timings = {name: Timing(name) for name in variants}
    ready: dict[str, Callable[[], object]] = {}
    host_seconds: dict[str, float] = {}
    for name, variant in variants.items():
        if isinstance(variant, str):
            timings[name].skipped = variant
            continue
        with _errors_recorded(timings[name]):
            for _ in range(warmup - 1):
                variant()
            growth, peak, host_seconds[name] = _peak_memory(variant, device)
            timings[name].peak_growth_bytes, timings[name].peak_bytes = growth, peak
            ready[name] = variant
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if flush_cache else None
    for round_index in range(rounds):
        for name in reversed(list(ready)) if reverse and round_index % 2 else list(ready):
            if pause:
                time.sleep(pause)
            with _errors_recorded(timings[name]):
                if flush is not None:
                    flush.zero_()
                timings[name].seconds.append(_seconds(ready[name], device, calls, clock, calls * host_seconds[name]))
            if timings[name].skipped:
                del ready[name]
    if device.type == "cuda" and clock is None and rounds:
        for name, variant in ready.items():
            with _errors_recorded(timings[name]):
                walls = [_seconds(variant, device, 1, time.perf_counter) for _ in range(WALL_CALLS)]
                timings[name].wall_s = statistics.median(walls)
    return timings


def ratio(baseline: Timing, variant: Timing) -> dict | None:
    """How many times faster than `baseline`: quartiles of the rounds' own ratios, so that a slow spell cancels."""
    if not baseline.seconds or not variant.seconds or baseline.skipped or variant.skipped:
        return None
    ratios = [b / v for b, v in zip(baseline.seconds, variant.seconds, strict=True)]
    return dict(zip(QUARTILES, _quartiles(ratios), strict=True))


def cuda_graph(variant: Callable[[], object]) -> Callable[[], None]:
    """`variant` captured once: the returned function replays it, which leaves the launches' cost on the host out."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            variant()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        variant()
    return graph.replay


def compose(name: str, rows: Sequence[dict], *, machine: dict, **facts) -> dict:
    """A benchmark's result as JSON can hold it."""
    return json_values({"benchmark": name, "arguments": sys.argv[1:], "machine": machine, **facts, "rows": list(rows)})


def print_document(document: dict) -> None:
    """A table of its rows on stderr, and all of it as one line of JSON on stdout."""
    print(table(document["rows"]), file=sys.stderr, flush=True)
    print(json.dumps(document, ensure_ascii=False, allow_nan=False), flush=True)


def report(name: str, rows: Sequence[dict], *, machine: dict, output: Path | None = None, **facts) -> dict:
    """Print a whole result, which `output` gets too."""
    document = compose(name, rows, machine=machine, **facts)
    if output is not None:
        write_document(output, document)
    print_document(document)
    return document


def write_document(path: Path, document: dict) -> None:
    """The document in place of what was there: whoever reads it, or dies meanwhile, finds one of the two whole."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def table(rows: Sequence[dict]) -> str:
    """`rows` as aligned text: the keys that any row fills, in order of appearance."""
    keys = list(dict.fromkeys(key for row in rows for key in row if _text(row[key])))
    lines = [keys, *([_text(row.get(key)) for key in keys] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that the benchmark runs, no more")
    parser.add_argument("--rounds", type=int, help="interleaved repetitions of every variant")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, help="write the JSON document here; go on with what it lacks")
    parser.add_argument("--budget-seconds", type=float, help="begin no case that would not end within so many")
    # a suite's, which lets several processes compile at once: --rounds 0 measures nothing
    parser.add_argument("--share", type=_share, metavar="I/N", help="every N-th case, from the I-th on")
    return parser


def num_rounds(arguments: argparse.Namespace, default: int, quick: int = 2) -> int:
    """Those asked for, none included, or what is usual."""
    if arguments.rounds is not None:
        return arguments.rounds
    return quick if arguments.quick else default


def compiles_only(arguments: argparse.Namespace) -> bool:
    """Whether nothing is measured, so that peers which compile nothing may be left out."""
    return arguments.rounds == 0


def _share(text: str) -> tuple[int, int]:
    place, count = map(int, text.split("/"))
    return place, count


def error_text(error: Exception) -> str:
    """The reason that stands in a result: the error's type and first line (torch's go on for pages)."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:500]}"


@contextlib.contextmanager
def _errors_recorded(timing: Timing):
    try:
        yield
    except Exception as error:
        timing.skipped = error_text(error)
        timing.seconds.clear()


def _seconds(
    variant: Callable[[], object],
    device: torch.device,
    calls: int,
    clock: Callable[[], float] | None,
    host_seconds: float = 0.0,
) -> float:
    if device.type == "cuda" and clock is None:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        least, most = LEAD_SECONDS
        # the device reaches the first event when the host has launched what lies before the second
        torch.cuda._sleep(int(min(max(2 * host_seconds, least), most) * CYCLES_PER_SECOND))
        begin.record()
        for _ in range(calls):
            variant()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / calls
    clock = clock or time.perf_counter
    _synchronize(device)
    start = clock()
    for _ in range(calls):
        variant()
    _synchronize(device)
    return (clock() - start) / calls


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak_memory(variant: Callable[[], object], device: torch.device) -> tuple[int | None, int | None, float]:
    """One call's peak above what was held before it, (CUDA) the peak itself, and seconds until the host had it back."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = time.perf_counter()
        variant()
        seconds = time.perf_counter() - start
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        return peak - held, peak, seconds
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator keeps would hide what the call takes
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the kernel's high-water mark to the present size
        before = _resident_bytes("VmRSS")
    except OSError:
        variant()
        return None, None, 0.0
    variant()
    return max(_resident_bytes("VmHWM") - before, 0), None, 0.0


def _resident_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def _quartiles(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    """In the order of QUARTILES."""
    if len(values) < 2:
        return (values[0],) * 3 if values else (None, None, None)
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return median, low, high


def json_values(value):
    """What JSON can hold: NaN and infinity become null, whatever else is foreign becomes text."""
    if isinstance(value, dict):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return json_values(value.item())
    return value if value is None or isinstance(value, bool | int) else str(value)


def _text(value) -> str:
    if value is None:
        return ""
    if isinstance(value, dict) and "median" in value:
        return _text(value["median"])
    return f"{value:.4g}" if isinstance(value, float) else " ".join(str(value).split())[:80]
