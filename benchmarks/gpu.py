"""The first hour on a GPU: is everything right, then how fast, the most telling first, at most nine minutes a call.

    bivec benchmark gpu --output results                  # again with the same folder: goes on where it was
    bivec benchmark gpu --output results --quick --device cpu    # the whole flow without a GPU, in minutes

On a machine that is lent for a short time, from a checkout or a copy of one:

1. Copy the repository, and a folder with wiki/*.gz and tatoeba/*.gz for `--data`: without it the texts are made up,
   and the result says so. Where the copy has no .git, say what it is: `export BIVEC_COMMIT=$(git rev-parse HEAD)`.
2. Set what outlives a call and keeps memory whole:
       export TRITON_CACHE_DIR=/tmp/triton TORCHINDUCTOR_CACHE_DIR=/tmp/inductor
       export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
3. `python -m bivec.cli benchmark gpu --output results --data DATA`: kernels are compiled by several processes first (a
   hundred or two, at one to three seconds of a core each), then every operator is compared with float64, then measured.
4. `python -m pytest -m gpu -n 12 --maxfail=40 -q`, then 3 again, as often as there is time: what stands in the folder
   is not measured again, and what was being measured when a call ended is begun anew.
5. `tar czf results.tgz results`; `bivec benchmark report results` prints every table.

The last lines say what was found, a line each, beside the goals; they stand in findings.txt too. Every part is a
process of its own with a log beside its result; a fault of the device ends it, not the call. Results of other code,
arguments or devices are refused: give such a run another folder.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .cases import DEVICE_LOST
from .findings import findings
from .texts import DATA

STARTUP_SECONDS = 15.0  # of a process until its first case
COMPILE_SECONDS = 100.0  # at most, for all kernels ahead of measuring
COMPILERS = 12


@dataclass(frozen=True)
class Step:
    """A benchmark as a process: its result's name, its module, its options.

    Args:
        seconds: that it may take while others wait; they are given back what it leaves.
        compiles: whether its kernels are compiled ahead by several processes.
        with_texts: whether it takes --data and --tokenizer.
    """

    name: str
    module: str
    options: tuple[str, ...] = ()
    seconds: float = 60.0
    compiles: bool = False
    with_texts: bool = False


STEPS = (
    Step("smoke", "smoke", seconds=90, compiles=True),
    Step("attention", "attention", ("--rounds", "9"), seconds=110, compiles=True),
    Step("contrastive", "contrastive", seconds=60, compiles=True),
    Step("fusions", "fusions", ("--rounds", "9"), seconds=50, compiles=True),
    Step("lora", "lora", ("--rounds", "9"), seconds=40, compiles=True),
    Step("pooling", "pooling", ("--rounds", "9"), seconds=40, compiles=True),
    Step("tiles", "tiles", seconds=60),
    Step("float8", "float8", seconds=60),
    Step("embed-1B", "embed", ("--shape", "1B", "--num-texts", "4096", "--rounds", "3"), seconds=120, with_texts=True),
    Step("train-1B", "train", ("--shape", "1B", "--rounds", "5"), seconds=110, with_texts=True),
    Step("tune-attention", "tune_attention", ("--head-dim", "64", "128"), seconds=200),
    Step("job-1B", "job", ("--shape", "1B", "--num-texts", "8192"), seconds=120, with_texts=True),
    Step("embed-8B", "embed", ("--shape", "8B", "--num-texts", "1024", "--rounds", "3"), seconds=300, with_texts=True),
)
# a quick run has one of a kind, and what a CPU has too
QUICK_LEFT_OUT = ("float8", "tune-attention", "job-1B", "embed-8B")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "bivec benchmark gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="folder for the results")
    parser.add_argument("--budget-seconds", type=float, default=540.0, help="of this call (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="small shapes: shows that everything runs, no more")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json[.gz] or its folder; else one is trained here")
    parser.add_argument("--data", type=Path, default=DATA, help="holds wiki/*.gz and tatoeba/*.gz")
    parser.add_argument(
        "--steps", nargs="+", choices=[step.name for step in STEPS], metavar="STEP", help="these alone, in this order"
    )
    parser.add_argument("--compile", metavar="I/N", help=argparse.SUPPRESS)  # what a process that compiles is given
    arguments = parser.parse_args(argv)
    if arguments.compile:
        return _compile_share(arguments)
    if arguments.output is None:
        parser.error("--output is needed")
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device: --quick --device cpu shows that everything runs")
    return Run(arguments, time.monotonic()).all()


class Run:
    """One call: the steps that are not done, until its time is over."""

    def __init__(self, arguments: argparse.Namespace, begun_at: float):
        self.arguments = arguments
        self.output: Path = arguments.output
        self.deadline = begun_at + arguments.budget_seconds
        self.steps = [step for step in STEPS if _exists(step)]
        if arguments.steps:
            by_name = {step.name: step for step in STEPS}
            self.steps = [by_name[name] for name in arguments.steps]
        elif arguments.quick:
            self.steps = [step for step in self.steps if step.name not in QUICK_LEFT_OUT]
        self.failed: dict[str, int] = {}

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def all(self) -> int:
        self.output.mkdir(parents=True, exist_ok=True)
        waiting = [step for step in self.steps if not self.done(step)]
        if self.arguments.device.startswith("cuda"):
            self.compile_ahead([step for step in waiting if step.compiles])
        for generous in (False, True):  # first everybody's share, then whoever has cases left
            for step in waiting:
                if self.left > STARTUP_SECONDS and not self.done(step) and step.name not in self.failed:
                    self.run(step, self.left if generous else min(step.seconds + STARTUP_SECONDS, self.left))
        lines = findings(self.output)
        (self.output / "findings.txt").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        undone = [step.name for step in self.steps if not self.done(step)]
        print("", *lines, sep="\n")
        if self.failed:
            print(f"failed: {', '.join(f'{name} (exit status {code})' for name, code in self.failed.items())}")
        if undone:
            print(f"left for another call with --output {self.output}: {', '.join(undone)}")
        sys.stdout.flush()
        return 1 if self.failed else 0

    def done(self, step: Step) -> bool:
        """Whether every case of the step stands in its result."""
        try:
            return bool(json.loads(self.path(step).read_text(encoding="utf-8"))["finished"])
        except (OSError, ValueError, LookupError, TypeError):
            return False

    def path(self, step: Step) -> Path:
        return self.output / f"{step.name}.json"

    def run(self, step: Step, seconds: float) -> None:
        """The step's process, again where it lost the device, killed where it outlasts its time by far."""
        begun = time.monotonic()
        status: int | None = DEVICE_LOST
        while status == DEVICE_LOST and self.left > STARTUP_SECONDS:
            left = seconds - (time.monotonic() - begun)
            options = ["--budget-seconds", f"{max(left - STARTUP_SECONDS, 1):.0f}", "--output", str(self.path(step))]
            status = self._process(step, options, min(1.5 * left, self.left))
        if status not in (0, DEVICE_LOST, None):
            self.failed[step.name] = status
            lines = self._log(step).read_text(encoding="utf-8", errors="replace").splitlines()
            print(*(f"    {line[:300]}" for line in lines[-4:]), sep="\n", flush=True)
        state = "done" if self.done(step) else "killed at its time" if status is None else "not done"
        print(f"{step.name}: {state}, {time.monotonic() - begun:.0f} s, {self.left:.0f} s left", flush=True)

    def _log(self, step: Step) -> Path:
        return self.output / f"{step.name}.log"

    def _process(self, step: Step, options: Sequence[str], timeout: float) -> int | None:
        """The exit status, None where it was killed."""
        command = [
            sys.executable,
            "-m",
            f"bivec.benchmarks.{step.module}",
            *options,
            *step_options(step, self.arguments),
        ]
        with self._log(step).open("a", encoding="utf-8") as log:
            child = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=log, env=environment(step, self.arguments.device)
            )
            return _wait(child, timeout)

    def compile_ahead(self, steps: Sequence[Step]) -> None:
        """All kernels of the steps, by processes that share Triton's cache and measure nothing."""
        if not steps or self.left < COMPILE_SECONDS:
            return
        begun, count = time.monotonic(), min(COMPILERS, len(os.sched_getaffinity(0)))
        command = [sys.executable, "-m", "bivec.benchmarks.gpu", "--device", self.arguments.device]
        command += ["--quick"] if self.arguments.quick else []
        command += ["--steps", *(step.name for step in steps)]
        with (self.output / "compile.log").open("a", encoding="utf-8") as log:
            children = [
                subprocess.Popen(
                    [*command, "--compile", f"{place}/{count}"],
                    stdout=subprocess.DEVNULL,
                    stderr=log,
                    env=environment(steps[0], self.arguments.device),
                )
                for place in range(count)
            ]
            statuses = [_wait(child, begun + COMPILE_SECONDS - time.monotonic()) for child in children]
        late = sum(status is None for status in statuses)
        print(f"compiled in {time.monotonic() - begun:.0f} s by {count} processes, {late} ended before they were done")


def step_options(step: Step, arguments: argparse.Namespace) -> list[str]:
    """A step's own options and those of the call: a quick run has quick rounds."""
    options = ["--device", arguments.device]
    if arguments.quick:
        options += ["--quick", *(["--no-compile"] if step.module == "fusions" and arguments.device == "cpu" else [])]
    else:
        options += step.options
    if step.with_texts:
        options += ["--data", str(arguments.data)]
        options += ["--tokenizer", str(arguments.tokenizer)] if arguments.tokenizer else []
    return options


def environment(step: Step, device: str) -> dict[str, str]:
    """Of a step's process: unless somebody said otherwise, memory that does not fragment, output at once.

    On a CPU the kernels are interpreted where nothing else can run them.
    """
    found = {"PYTHONUNBUFFERED": "1", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | os.environ
    found["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    if device == "cpu":
        found.pop("TRITON_INTERPRET", None)
        if step.module in ("smoke", "attention"):
            found["TRITON_INTERPRET"] = "1"
    return found


def _compile_share(arguments: argparse.Namespace) -> int:
    """Each step's share of cases, run once and not timed."""
    for step in STEPS:
        if step.name in arguments.steps:
            module = importlib.import_module(f"..{step.module}", __name__)
            options = [*step_options(step, arguments), "--rounds", "0", "--share", arguments.compile]
            with contextlib.suppress(SystemExit):  # an option that a step does not know must not keep the others
                module.main(options)
    return 0


def _wait(child: subprocess.Popen, timeout: float) -> int | None:
    """Its exit status; None where it had to be killed."""
    try:
        return child.wait(max(timeout, 0.1))
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
        return None


def _exists(step: Step) -> bool:
    return importlib.util.find_spec(f"bivec.benchmarks.{step.module}") is not None


if __name__ == "__main__":
    sys.exit(main())
