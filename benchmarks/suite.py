"""Every benchmark by name, all of them at the sizes that suit the device, and what their results say.

    bivec benchmark all --output results

Each runs in a process of its own and leaves NAME.json in the output folder. One whose result is there is not run again,
so a suite that was killed goes on where it was.
"""

import argparse
import importlib
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ..cli_shared import echo
from .texts import DATA
from .timing import table

BENCHMARKS = ("attention", "contrastive", "pooling", "fusions", "lora", "embed", "job", "train")
OTHERS = ("tune-attention", "fastest-attention")
_WITH_TEXTS = ("embed", "job", "train")
# of results' names; what a larger model would take too long for is made smaller
_STEPS: dict[str, dict[str, list[str]]] = {
    "cpu": {name: [] for name in BENCHMARKS},
    "cuda": {
        **{name: [] for name in BENCHMARKS if name not in _WITH_TEXTS},
        "embed-1B": ["--shape", "1B", "--rounds", "5"],
        "job-1B": ["--shape", "1B"],
        "train-1B": ["--shape", "1B"],
        "embed-8B": ["--shape", "8B", "--num-texts", "1024", "--rounds", "3"],
    },
}


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
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json[.gz] or its folder; else one is trained here")
    parser.add_argument("--data", type=Path, default=DATA, help="holds wiki/*.gz and tatoeba/*.gz")
    parser.add_argument("--output", type=Path, required=True, help="folder for the results")
    arguments = parser.parse_args(argv)
    arguments.output.mkdir(parents=True, exist_ok=True)
    left = {
        step: options
        for step, options in _STEPS[arguments.device].items()
        if not (arguments.output / f"{step}.json").exists()
    }
    failed = []
    for step, options in (bar := tqdm(left.items(), unit="benchmark", disable=not sys.stderr.isatty())):
        bar.set_postfix_str(step)
        name = step.partition("-")[0]
        command = [sys.executable, "-m", f"bivec.benchmarks.{name}", *options, "--device", arguments.device]
        command += ["--quick"] if arguments.quick else []
        if name in _WITH_TEXTS:
            command += ["--data", arguments.data]
            command += ["--tokenizer", arguments.tokenizer] if arguments.tokenizer else []
        begun = time.monotonic()
        partial = arguments.output / f".{step}.json"
        status = subprocess.call([*map(str, command), "--output", str(partial)], stdout=subprocess.DEVNULL)
        if partial.exists():
            partial.rename(arguments.output / f"{step}.json")
        if status:
            failed.append(step)
        print(f"{step}: exit status {status} after {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
    if failed:
        print(f"error: of {len(left)} benchmarks {len(failed)} failed: {', '.join(failed)}", file=sys.stderr)
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
