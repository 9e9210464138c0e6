"""A job into a folder: what it is, fixed when it begins, and which of its shards are done.

    OUT/_manifest.json           configuration, inputs, shards and their SHA-256; written once, by whoever comes first
    OUT/_shards/00012.json       the record of shard 12: counts, bad rows, size and SHA-256 of its file
    OUT/part-00012.parquet       the shard; it appears after its record, so no reader sees a file that is not on record
    OUT.errors.jsonl             the bad rows of all records, in order, once all shards are done

A shard is done when its record and its file are there; a resumed job also hashes the file. Everything else that a
killed run leaves is removed or written again. No file is written by two processes, so workers and machines need no lock
to say what they have done.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..engine.outputs import AtomicFile, naming, refuse_existing
from ..texts.rows import BadRow, Start
from .readers import Shard
from .writers import error_lines, errors_path, is_own_errors

_FORMAT = 3
MANIFEST = "_manifest.json"
SHARDS = "_shards"


@dataclass(frozen=True)
class Manifest:
    """What a job computes, from what, in which shards.

    Attributes:
        configuration: all that the vectors depend on, as JSON has it.
        inputs: `readers.fingerprint` of the input files, in order.
    """

    configuration: dict[str, Any]
    inputs: list[dict[str, Any]]
    shards: list[Shard]

    @property
    def num_rows(self) -> int:
        return sum(shard.num_rows for shard in self.shards)

    @classmethod
    def read(cls, folder: Path) -> "Manifest | None":
        """The manifest of an output folder, or None.

        Raises:
            ValueError: it is of another version of bivec, or is not as it was written.
        """
        values = load(folder)
        if values is None:
            return None
        path = folder / MANIFEST
        if values["format"] != _FORMAT:
            raise ValueError(f"{path} has format {values['format']}, this version of bivec reads {_FORMAT}")
        if values.pop("sha256", None) != _digest(values):
            raise ValueError(f"{path} was changed since the job began; --overwrite begins the job again")
        shards = [Shard(file, Start(*start), num_rows) for file, start, num_rows in values["shards"]]
        return cls(values["configuration"], values["inputs"], shards)

    def create(self, folder: Path) -> None:
        """Writes it unless there is one; raises ValueError, with a line a field, where that one differs."""
        with naming(folder):
            file = AtomicFile(folder / SHARDS / "manifest.partial", wait=True)
            try:
                if not (folder / MANIFEST).exists():
                    values = {"format": _FORMAT, **asdict(self)}
                    values["sha256"] = _digest(values)
                    file.handle.write(json.dumps(values, indent=1, ensure_ascii=False).encode() + b"\n")
                    file.finish()
                    file.publish(folder / MANIFEST)
            finally:
                file.abort()
        found = Manifest.read(folder)
        assert found is not None
        found.refuse_changes(folder, self)

    def refuse_changes(self, folder: Path, other: "Manifest") -> None:
        """Raises ValueError if `other` differs, naming each field with what it was and is.

        Fields that `other.configuration` lacks are passed over, so that some can be compared before the model loads.
        """
        compared = {name: value for name, value in self.configuration.items() if name in other.configuration}
        was, now = _fields(compared, self), _fields(other.configuration, other)
        lines = [
            f"{name} was {was.get(name, 'absent')}, is {now.get(name, 'absent')}"
            for name in sorted(was.keys() | now.keys())
            if was.get(name) != now.get(name)
        ]
        if lines:
            raise ValueError(f"{folder} was begun otherwise, and --overwrite begins it again:\n  " + "\n  ".join(lines))


def load(folder: Path) -> dict[str, Any] | None:
    """What the manifest of an output folder holds, or None; whether it is as it was written, `Manifest.read` says.

    Raises:
        ValueError: it is no manifest, or one that is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or not values.keys() >= {"format", "configuration", "inputs", "shards"}:
        raise ValueError(f"{path} is damaged, or bivec did not write it: nothing is written beside it")
    return values


def _digest(values: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says, however it is laid out."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _fields(configuration: dict[str, Any], found: Manifest) -> dict[str, str]:
    """Each field's name and its value as a diff shows it."""
    inputs = found.inputs
    fields = {name: json.dumps(value, ensure_ascii=False) for name, value in _flat(configuration, "")}
    fields |= {f"input {file['name']}": f"{file['bytes']} bytes, {file['sha256'][:16]}" for file in inputs}
    fields["order of inputs"] = ", ".join(file["name"] for file in inputs)
    fields["shards"] = f"{len(found.shards)} of {found.shards[0].num_rows} rows"
    return fields


def _flat(values: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


@dataclass(frozen=True)
class Record:
    """What became of one shard: `num_written + len(bad_rows)` rows were read, `num_cut` of those written were cut."""

    num_written: int
    num_cut: int
    num_tokens: int
    bad_rows: list[BadRow]
    num_bytes: int
    sha256: str


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def partial_path(folder: Path, number: int) -> Path:
    return folder / SHARDS / f"{number:05d}.parquet.partial"


def record_path(folder: Path, number: int) -> Path:
    return folder / SHARDS / f"{number:05d}.json"


def file_digest(path: Path) -> tuple[int, str]:
    """Size and SHA-256 of a file."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return stream.tell(), digest


def write_record(folder: Path, number: int, record: Record) -> None:
    """Puts a shard on record, durably."""
    path = record_path(folder, number)
    file = AtomicFile(path.with_suffix(".json.partial"))
    try:
        file.handle.write(json.dumps(asdict(record), ensure_ascii=False).encode() + b"\n")
        file.finish()
        file.publish(path)
    finally:
        file.abort()


def read_record(folder: Path, number: int, num_rows: int) -> Record | None:
    """The record of a shard that is done; None where the record or the file is missing or is not whole.

    Args:
        num_rows: of the shard.
    """
    try:
        values = json.loads(record_path(folder, number).read_bytes())
        record = Record(**(values | {"bad_rows": [BadRow(*row) for row in values["bad_rows"]]}))
        counted = record.num_written + len(record.bad_rows) == num_rows
        counted &= record.num_cut in range(record.num_written + 1)
        return record if counted and part_path(folder, number).stat().st_size == record.num_bytes else None
    except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
        return None


def is_done(folder: Path, number: int, num_rows: int) -> bool:
    return read_record(folder, number, num_rows) is not None


def changed_shards(folder: Path, records: Mapping[int, Record], progress: Callable[[int], object]) -> list[int]:
    """Those of the shards on record whose file is not what was written; `progress` is called with bytes read."""
    changed = []
    for number, record in records.items():
        if file_digest(part_path(folder, number)) != (record.num_bytes, record.sha256):
            changed.append(number)
        progress(record.num_bytes)
    return changed


def write_errors(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes the errors file from the records of all shards, or removes it if there are none; again does no harm.

    Raises:
        FileExistsError: bivec did not write the errors file that is there.
    """

    def bad_rows() -> Iterator[list[BadRow]]:
        for number, shard in enumerate(shards):
            record = read_record(folder, number, shard.num_rows)
            if record is None:
                raise FileNotFoundError(f"{part_path(folder, number)} was removed while the job ran")
            yield record.bad_rows

    final = errors_path(folder)
    refuse_existing(final, is_own_errors, overwrite=True)
    if not any(bad_rows()):
        final.unlink(missing_ok=True)
        return
    with naming(folder):
        file = AtomicFile(final.with_name(f".{final.name}.partial"), wait=True)
        try:
            for rows in bad_rows():
                file.handle.write(error_lines(rows))
            file.finish()
            file.publish(final)
        finally:
            file.abort()


def remove_orphans(folder: Path, numbers: Sequence[int]) -> None:
    """Removes what killed runs left of shards that are not done."""
    for number in numbers:
        for path in (part_path(folder, number), record_path(folder, number)):
            if path.exists():
                os.unlink(path)
        for path in (partial_path(folder, number), record_path(folder, number).with_suffix(".json.partial")):
            if path.exists():
                AtomicFile(path).abort()
