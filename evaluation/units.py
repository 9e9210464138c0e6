"""The parts of an evaluation that are computed one after the other, and kept while the rest is not done.

An evaluation is read and checked as a whole, then each unit (a data set, a probing task) is scored. What is scored
stands in `OUTPUT.unfinished` until the report does: an interrupted evaluation goes on with `--resume` if model, data
and settings are the same.
"""

import json
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from ..engine.dtype_names import kept_dtype
from ..engine.encoder import Encoder
from ..engine.outputs import AtomicFile, refuse_existing
from .report import Report, Score, finite, read_score


class Scored(NamedTuple):
    """What a unit gave: its figures, statements that were verified, and notes."""

    scores: list[Score]
    checks: dict[str, bool] = {}  # noqa: RUF012  # never written to
    notes: list[str] = []  # noqa: RUF012  # the same


class Unit(NamedTuple):
    """A part of an evaluation.

    Attributes:
        name: of its data set.
        fingerprint: SHA-256 of its data as it is used.
        score: does the work.
    """

    name: str
    fingerprint: str
    score: Callable[[Encoder], Scored]


class Unfinished:
    """The units that an evaluation into `output` has scored so far.

    Args:
        resume: go on with what is there.
        overwrite: begin anew; with `resume`, where what is there was scored of another model, data or settings.
    Raises:
        FileExistsError: an interrupted evaluation is there, and neither was asked for.
    """

    def __init__(self, output: Path, *, resume: bool, overwrite: bool):
        self._path = output.with_name(f"{output.name}.unfinished")
        if self._path.exists() and not (resume or overwrite):
            raise FileExistsError(
                f"{self._path} is an interrupted evaluation: --resume goes on with it, --overwrite begins anew"
            )
        refuse_existing(self._path, _is_unfinished, overwrite=True)
        self._resume, self._overwrite = resume, overwrite
        self._content: dict[str, Any] = {}

    def dtype(self, asked: str) -> str:
        """The one to go on in: that of what is there where the same was asked for, as far as `asked` leaves it open."""
        if not (self._resume and self._path.exists()):
            return asked
        before = json.loads(self._path.read_text(encoding="utf-8"))
        return kept_dtype(asked, before["model"]["dtype"]) if before["settings"]["dtype"] == asked else asked

    def begin(self, report: Report) -> None:
        """Take over what is there.

        Raises:
            ValueError: it was scored of another model, with other settings or on other data, and is not to be
                overwritten; says which.
        """
        self._content = report.origin | {"units": {}}
        if not (self._resume and self._path.exists()):
            return
        before = json.loads(self._path.read_text(encoding="utf-8"))
        changed = [name for name in report.origin if before[name] != self._content[name]]
        if changed and self._overwrite:
            return
        if changed:
            raise ValueError(
                f"{self._path} was scored with another {' and '.join(changed)}: --overwrite begins anew, or name "
                "another output"
            )
        self._content = before

    def finished(self, name: str) -> Scored | None:
        """What a unit gave before the interruption; None where it was not scored."""
        unit = self._content["units"].get(name)
        if unit is None:
            return None
        return Scored([read_score(score) for score in unit["scores"]], unit["checks"], unit["notes"])

    def keep(self, name: str, scored: Scored) -> None:
        """Write down what a unit gave; where that fails a warning says so, since the work itself may yet succeed."""
        scores = [asdict(score) for score in scored.scores]
        self._content["units"][name] = finite({"scores": scores, "checks": scored.checks, "notes": scored.notes})
        try:
            self._write()
        except OSError as error:
            warnings.warn(f"{self._path}: what is scored so far cannot be kept: {error.strerror}", stacklevel=2)

    def _write(self) -> None:
        file = AtomicFile(self._path.with_name(f".{self._path.name}.partial"))
        try:
            file.handle.write(json.dumps(self._content, allow_nan=False).encode())
            file.finish()
            file.publish(self._path)
        finally:
            file.abort()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _is_unfinished(path: Path) -> bool:
    try:
        return json.loads(path.read_text(encoding="utf-8")).keys() == {"task", "model", "settings", "data", "units"}
    except (ValueError, AttributeError):
        return False
