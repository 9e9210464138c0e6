"""Every Triton kernel as it is launched, compiled without a GPU: registers, spills, shared memory, main loop.

    python -m bivec.benchmarks.launched_kernels                     # CUDA paths and benchmarks, three architectures
    python -m bivec.benchmarks.launched_kernels --of paths --capability 90 --match llama-8B
    python -m bivec.benchmarks.launched_kernels --of tests          # whatever `pytest -m gpu` launches
    python -m bivec.benchmarks.launched_kernels --write tests/kernels/launched.json

The launches are those of `launches.py`: the project's own code on a fake device. Triton's own binder says what each is
specialised on (types, strides and sizes that are one or divide by 16, aligned pointers, constants), and each distinct
one is compiled once, on all cores. What `sass.py` reads of the machine code stands in a row. A row is named after
the first case of its source that launches it so; where one kernel is launched in several ways they are numbered. The
last line is one JSON document. TRITON_INTERPRET must not be set; another Triton is taken from a folder that stands
first on PYTHONPATH. Triton keeps what it compiled in TRITON_CACHE_DIR.
"""

import argparse
import collections
import hashlib
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import triton

from . import launches, sass
from .absent_device import absent_device
from .device_counts import Launch


class Kernel(NamedTuple):
    """A launch to compile.

    Attributes:
        name: of its row.
        source: that launches it; what the tests launch is compiled and not read.
        capability: of the device, 90 for 9.0.
        signature: what it is specialised on, in words.
    """

    name: str
    source: str
    capability: int
    signature: str
    launch: Launch


def _compile(launch: Launch) -> Any:
    """Triton's compiled kernel of a launch, for the device that it believes in."""
    return launch.kernel.run(grid=launch.grid, warmup=True, **launch.arguments, **launch.options)


def specialised(launch: Launch) -> str:
    """What Triton specialises a launch on: of each parameter its type and `16` where it divides by that, or its value.

    Nothing is compiled; a launch that this process has compiled before is not asked about.
    """
    asked: list[dict] = []

    def ask(*, compile: dict, **_) -> bool:
        asked.append(compile)
        return True  # that it need not be compiled

    with mock.patch.object(triton.knobs.runtime, "jit_cache_hook", ask):
        _compile(launch)
    (found,) = asked
    constants, (attributes,) = found["constants"], found["configs"]
    words = []
    for place, (name, kind) in enumerate(found["signature"].items()):
        if (place,) in constants:
            words.append(f"{name}={constants[place,]}")
        else:
            words.append(f"{name}:{kind}" + (" 16" if attributes.get((place,)) else ""))
    words += [f"{name}={value}" for name, value in sorted(launch.options.items())]
    return ", ".join(words)


def collect(source: str, capability: int) -> list[Kernel]:
    """The distinct launches of a source (`paths`, `benchmarks`, `tests`)."""
    numbers: collections.Counter[str] = collections.Counter()
    found: dict[tuple[str, str], Kernel] = {}
    cases = list(launches.SOURCES[source](divmod(capability, 10)))  # the fake device's block must have ended
    for case, made in cases:
        with absent_device(capability):
            for launch in made:
                kernel = launch.name.strip("_")
                signature = specialised(launch)
                if (kernel, signature) not in found:
                    name = f"sm_{capability} {source}, {case}: {kernel}"
                    numbers[name] += 1
                    name += f" {numbers[name]}" if numbers[name] > 1 else ""
                    found[kernel, signature] = Kernel(name, source, capability, signature, launch)
    return list(found.values())


_kernels: list[Kernel] = []  # of this process and of its forks


def _row(place: int) -> dict:
    kernel = _kernels[place]
    try:
        with absent_device(kernel.capability):
            compiled = _compile(kernel.launch)
        row = {"shared_bytes": compiled.metadata.shared}
        if kernel.source != "tests":
            row = _resources(compiled.asm["cubin"], compiled.metadata.shared)
    except Exception as error:
        row = {"error": f"{type(error).__name__}: {error}"}
    return row


def _resources(cubin: bytes, shared_bytes: int) -> dict:
    """Those of `sass.py`, kept beside what Triton compiled."""
    content = hashlib.sha256(cubin + Path(sass.__file__).read_bytes()).hexdigest()
    path = Path(triton.knobs.cache.dir, f"resources-{content}-{shared_bytes}.json")
    if path.exists():
        return json.loads(path.read_text())
    row = sass.resources(cubin, shared_bytes)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        file.write(json.dumps(row))
    os.replace(file.name, path)
    return row


def _identity(kernel: Kernel) -> tuple:
    return kernel.source == "tests", kernel.capability, kernel.launch.name, kernel.signature


def compile_all(kernels: Iterable[Kernel], workers: int) -> Iterator[tuple[Kernel, dict]]:
    """The row of each, `{"error": ...}` of one that does not compile; the same launch is compiled once."""
    kernels = list(kernels)
    first: dict[tuple, int] = {}
    for place, kernel in enumerate(kernels):
        first.setdefault(_identity(kernel), place)
    _kernels[:] = kernels
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        results = dict(zip(first.values(), pool.map(_row, first.values()), strict=True))
    for kernel in kernels:
        yield kernel, results[first[_identity(kernel)]]


def signatures(kernels: Iterable[Kernel]) -> dict[str, str]:
    """By name, those of Hopper: the others' differ in tiles alone."""
    return {kernel.name: kernel.signature for kernel in kernels if kernel.capability == 90}


def write_table(path: Path, kernels: list[Kernel], rows: dict[str, dict], sources: list[str], whole: bool) -> None:
    """Merge rows, without their zeros, and signatures; `whole` takes out what these sources no longer launch."""
    table: dict[str, dict] = json.loads(path.read_text()) if path.exists() else {}
    scopes = {(f"sm_{kernel.capability}", source) for kernel in kernels for source in sources}
    figures = {name: {key: value for key, value in row.items() if value} for name, row in rows.items()}
    parts: dict[str, dict] = {"signatures": signatures(kernels), triton.__version__: figures}
    for part, entries in parts.items():
        kept = table.setdefault(part, {})
        if whole:
            kept = {name: row for name, row in kept.items() if tuple(name.split(",")[0].split()) not in scopes}
        table[part] = kept | entries
    parts_text = []
    for part, entries in sorted(table.items()):
        lines = [f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in sorted(entries.items())]
        parts_text.append(f"  {json.dumps(part)}: {{\n" + ",\n".join(lines) + "\n  }")
    path.write_text("{\n" + ",\n".join(parts_text) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", nargs="+", default=["paths", "benchmarks"], choices=list(launches.SOURCES))
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--match", default="", help="compile only rows whose names match this regular expression")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--table", type=Path, help="print in what rows are worse than those of this table")
    parser.add_argument("--write", type=Path, help="merge rows and signatures into this table")
    arguments = parser.parse_args()
    started = time.monotonic()
    kernels = [
        kernel
        for capability in arguments.capability
        for source in arguments.of
        for kernel in collect(source, capability)
    ]
    chosen = [kernel for kernel in kernels if re.search(arguments.match, kernel.name)]
    collected = time.monotonic()
    accepted = json.loads(arguments.table.read_text()).get(triton.__version__, {}) if arguments.table else {}
    rows: dict[str, dict] = {}
    for kernel, row in compile_all(chosen, arguments.workers):
        rows[kernel.name] = row
        print(f"{kernel.name}: " + "  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
        if "error" not in row and kernel.name in accepted and (reasons := sass.worse(row, accepted[kernel.name])):
            print(f"    worse: {'; '.join(reasons)}")
    seconds = {"collecting": round(collected - started, 1), "compiling": round(time.monotonic() - collected, 1)}
    failed = [name for name, row in rows.items() if "error" in row]
    if arguments.write is not None and not failed:
        write_table(arguments.write, kernels, rows, arguments.of, whole=not arguments.match)
    document = {"triton": triton.__version__, "seconds": seconds, "signatures": signatures(kernels), "kernels": rows}
    print(json.dumps(document))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
