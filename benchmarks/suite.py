"""Every benchmark by name, all of them on a CPU, and what results say.

    bivec benchmark attention --help
    bivec benchmark all --output results       # a CPU's; `bivec benchmark gpu` is a GPU's
    bivec benchmark report results

Each of all runs in a process of its own and leaves NAME.json in the output folder. What stands there is not measured
again, so a suite that was killed goes on at the case where it was.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

from tqdm import tqdm

from ..cli_shared import echo
from .texts import DATA
from .timing import table

BENCHMARKS = ("attention", "contrastive", "pooling", "fusions", "lora", "embed", "job", "train")
OTHERS = (
    "where-time-goes",
    "model-memory",
    "float8",
    "smoke",
    "tiles",
    "gpu",
    "tune-attention",
    "fastest-attention",
)
# attention's kernels do not run on a CPU
_ON_CPU = tuple(name for name in BENCHMARKS if name != "attention")
_WITH_TEXTS = ("embed", "job", "train")


def run(name: str, argv: list[str]) -> int:
    """Runs benchmark `name`, or `all`, or `report`, with its own options; the exit status.

    Raises:
        ValueError: there is none of that name.
    """
    if name == "all":
        return _run_all(argv)
    if name == "report":
        return _report(argv)
    if name not in (*BENCHMARKS, *OTHERS):
        raise ValueError(f"NAME must be one of {', '.join((*BENCHMARKS, *OTHERS))}, all, report, got {name!r}")
    return importlib.import_module(f"..{name.replace('-', '_')}", __name__).main(argv)


def _run_all(argv: list[str]) -> int:
    parser = _parser("all", __doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that the benchmarks run, no more")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json[.gz] or its folder; else one is trained here")
    parser.add_argument("--data", type=Path, default=DATA, help="holds wiki/*.gz and tatoeba/*.gz")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in (bar := tqdm(_ON_CPU, unit="benchmark", disable=not sys.stderr.isatty())):
        bar.set_postfix_str(name)
        command = [sys.executable, "-m", f"bivec.benchmarks.{name}", "--device", "cpu"]
        command += ["--quick"] if arguments.quick else []
        if name in _WITH_TEXTS:
            command += ["--data", arguments.data]
            command += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
        begun = time.monotonic()
        output = arguments.output / f"{name}.json"
        status = subprocess.call([*map(str, command), "--output", str(output)], stdout=subprocess.DEVNULL)
        if status:
            failed.append(name)
        print(f"{name}: exit status {status} after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if failed:
        print(f"error: of {len(_ON_CPU)} benchmarks {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _report(argv: list[str]) -> int:
    parser = _parser("report", "Print the tables of results, each with the machine that it was measured on.")
    parser.add_argument("results", type=Path, nargs="+", help="JSON files, or folders of them")
    arguments = parser.parse_args(argv)
    for path in [file for given in arguments.results for file in (sorted(given.glob("*.json")) or [given])]:
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(document, dict) and "benchmark" not in document:
                continue  # an evaluation's result
            machine = document["machine"]
            packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items() if version)
            measured_on = f"{machine['device']}, {machine['cpu']}, {machine['utc'][:10]}, {packages}"
            rows = table(document["rows"])
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"{path} must be what `bivec benchmark --output` wrote: {reason}") from error
        echo(f"## {path.stem}\n\n{measured_on}\n\n{rows}\n")
    return 0


def _parser(name: str, description: str | None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        f"bivec benchmark {name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
