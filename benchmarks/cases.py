"""A benchmark's cases: each is written as it finishes, so that a killed run goes on where it was, within a budget.

    results = Results("attention", arguments, describe_machine(device))
    status = results.run([Case("uniform 64", lambda: rows_of_it(), num_bytes=2e9), ...])

The JSON document of `--output` is written anew, in one step, after every case. A later call with the same `--output`
leaves out the cases that stand in it; one of other code, another device or other arguments is refused. A case is not
begun when the longest of the last three says that it will not fit into `--budget-seconds`, nor when its estimate does
not fit into memory. One that fails is a row with its reason, and so is one that ended the process twice.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .timing import compose, error_text, json_values, print_document, write_document

DEVICE_LOST = 3  # the exit status that asks for a new process: after a kernel's fault nothing runs in the old one
ATTEMPTS = 2  # at a case that ended its process
SHARE_OF_MEMORY = 0.9
# what may differ between two calls of one run
_OF_A_CALL = ("output", "budget_seconds", "share")
_OF_THE_CODE = ("source", "python", "packages", "device_name", "cpu", "onednn_max_cpu_isa", "threads")


@dataclass(frozen=True)
class Case:
    """A piece of a benchmark that is measured whole or not at all.

    Args:
        name: what tells it from the others of its benchmark.
        run: returns its rows.
        num_bytes: device memory that it takes, by estimate.
    """

    name: str
    run: Callable[[], list[dict]]
    num_bytes: float = 0.0


class Results:
    """The document of a benchmark, of this call and of those before it.

    Args:
        name: the benchmark's.
        arguments: parsed by `timing.argument_parser`.
        machine: from `machine.describe_machine`.
        facts: what else stands in the document.

    Raises:
        ValueError: `--output` holds a result of other code, another machine or other arguments.
    """

    def __init__(self, name: str, arguments: argparse.Namespace, machine: dict, **facts):
        self._begun_at = time.monotonic()
        self._output: Path | None = arguments.output
        self._budget: float | None = arguments.budget_seconds
        self._share: tuple[int, int] | None = arguments.share
        self._device = torch.device(arguments.device)
        asked = {key: str(value) for key, value in sorted(vars(arguments).items()) if key not in _OF_A_CALL}
        state: dict = {"cases": {}, "attempts": {}, "left_out": {}, "finished": False}
        self.document = compose(name, [], machine=machine, asked=asked, **state, **facts)
        if self._output is not None and self._output.exists():
            earlier = _read(self._output)
            _require_same(self._output, earlier, self.document)
            # each call's ceilings are measured anew: another card of the same name may run at another clock
            calls = [*earlier.get("earlier_calls", []), earlier["machine"]]
            kept = {key: earlier[key] for key in ("cases", "attempts", "rows")}
            self.document = earlier | self.document | kept | {"earlier_calls": calls}

    def run(self, cases: Sequence[Case]) -> int:
        """Runs what is not done yet, prints everything, and returns the exit status: 0, or DEVICE_LOST."""
        if self._share is not None:
            cases = cases[self._share[0] :: self._share[1]]
        status = 0
        for case in cases:
            if case.name in self.document["cases"]:
                continue
            reason = self._why_not(case)
            if reason is not None and "budget" in reason:
                self.document["left_out"][case.name] = reason
                continue
            print(case.name, file=sys.stderr, flush=True)
            started = time.monotonic()
            rows = [self._unmeasured(case, reason)] if reason else self._rows(case)
            seconds = time.monotonic() - started
            self.document["rows"] += json_values(rows)
            self.document["cases"][case.name] = round(seconds, 3)
            self._write()
            if not _alive(self._device):
                status = DEVICE_LOST
                break
        self.document["finished"] = not status and not self.document["left_out"]
        self._write()
        print_document(self.document)
        return status

    def add(self, **facts) -> None:
        """Put `facts` into the document: what a later case, or call, needs of an earlier one."""
        self.document |= json_values(facts)

    def _why_not(self, case: Case) -> str | None:
        if self._budget is not None:
            left = self._budget - (time.monotonic() - self._begun_at)
            expected = max(list(self.document["cases"].values())[-3:], default=0.0)
            if expected > left:
                return f"the budget of {self._budget:g} s has {max(left, 0):.0f} s left, a case takes {expected:.0f} s"
        free = free_bytes(self._device)
        if case.num_bytes > SHARE_OF_MEMORY * free:
            return f"needs about {case.num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        tried = self.document["attempts"].get(case.name, 0)
        return f"ended its process {tried} times" if tried >= ATTEMPTS else None

    def _rows(self, case: Case) -> list[dict]:
        self.document["attempts"][case.name] = self.document["attempts"].get(case.name, 0) + 1
        self._write()
        try:
            rows = case.run()
        except Exception as error:  # a case that cannot be measured stands in the result with its reason
            rows = [self._unmeasured(case, error_text(error))]
        gc.collect()
        if self._device.type == "cuda" and _alive(self._device):
            torch.cuda.empty_cache()
        return rows

    def _unmeasured(self, case: Case, reason: str) -> dict:
        print(f"{case.name}: {reason}", file=sys.stderr, flush=True)
        return {"case": case.name, "name": "all", "skipped": reason}

    def _write(self) -> None:
        if self._output is not None:
            write_document(self._output, self.document)


def free_bytes(device: torch.device) -> int:
    """Memory that the device has left, with what torch holds of it without use."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return sys.maxsize


def _alive(device: torch.device) -> bool:
    """Whether the device still answers this process: after an illegal access it never does."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        torch.ones(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _read(path: Path) -> dict:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document["cases"], dict) or not isinstance(document["attempts"], dict):
            raise TypeError("cases and attempts must be objects")
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} must be a result that can go on, or not exist: {error_text(error)}") from error
    return document


def _require_same(path: Path, earlier: dict, now: dict) -> None:
    differing = [key for key in ("benchmark", "asked") if earlier.get(key) != now[key]]
    differing += [key for key in _OF_THE_CODE if earlier["machine"].get(key) != now["machine"].get(key)]
    if differing:
        raise ValueError(f"{path} holds a result of another {', '.join(differing)}: give another --output")
