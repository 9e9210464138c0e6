"""The folder that a job writes its shards into: what may be there, who may write, and how a shard comes to be done."""

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from ..engine.outputs import lock_output, naming, open_locked, refuse_existing, refuse_foreign_files, sync
from ..texts.rows import BadRow
from . import manifest
from .manifest import MANIFEST, SHARDS, Record
from .writers import EmbeddingFile, errors_path, is_own_errors, is_own_file

_PART = re.compile(r"part-(\d{5,})\.parquet")
_UNBEGUN = re.compile(rf"{_PART.pattern}|{SHARDS}/(lock(-\d+-of-\d+)?|manifest\.partial)")
_BEGUN = re.compile(
    rf"{_UNBEGUN.pattern}|{re.escape(MANIFEST)}|{SHARDS}/\d{{5,}}\.(json|json\.partial|parquet\.partial)"
)


class OutputFolder:
    """An output folder, held by this job: alone, or as one of several `shards` of it.

    Made before the model loads: it refuses what it may not overwrite, and takes its lock, which shows that the place
    is writable. What is done stays when the `with` block is left; if the job had not begun, a folder made for it goes.

    Args:
        share: `(I, N)`, if other processes write the other N - 1 shares of the same job.
    Raises:
        FileExistsError: the folder holds a job and neither `resume` nor `overwrite` is asked for, or what bivec did not
            write, or another run is writing it.
        FileNotFoundError: the folder to make it in does not exist.
        ValueError: the name is not a folder's, or the job's manifest is damaged.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        overwrite: bool = False,
        resume: bool = False,
        share: tuple[int, int] | None = None,
    ):
        given = os.fspath(path)
        self.path = Path(given)
        self.errors_path = errors_path(self.path)
        self._share = share
        self._check(given, overwrite, resume or share is not None)
        self._made = not self.path.exists()
        self._locks: list[BinaryIO] = []
        try:
            (self.path / SHARDS).mkdir(parents=True, exist_ok=True)
            self._lock()
        except BaseException:
            self._leave()
            raise

    def _check(self, given: str, overwrite: bool, resume: bool) -> None:
        if not self.path.name:
            raise ValueError(f"the output must be a .parquet file or a folder, got {given!r}")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{given}: the folder {str(self.path.parent)!r} does not exist")
        if self.path.is_dir():
            self._refuse_foreign_files()
        elif os.path.lexists(self.path):
            raise FileExistsError(f"{given} exists and is not a folder; a file's name must end in .parquet")
        elif self.path.suffix and not given.endswith(os.sep):
            raise ValueError(f"{given}: a file's name must end in .parquet, a folder's with such a name in {os.sep!r}")
        names = set(os.listdir(self.path)) - {SHARDS} if self.path.is_dir() else set()
        begun = MANIFEST in names
        if names and not overwrite:
            if not resume:
                raise FileExistsError(f"{given} exists; {'--resume continues it, ' * begun}--overwrite replaces it")
            if not begun:
                raise FileExistsError(f"{given} has no manifest to resume from; --overwrite replaces it")
        refuse_existing(self.errors_path, is_own_errors, overwrite=overwrite or begun)

    def _refuse_foreign_files(self) -> None:
        """A shard is known as bivec's by its record or, where that is lost, by what it says of itself."""

        def is_own(path: Path) -> bool:
            part = _PART.fullmatch(path.name)
            return not part or manifest.record_path(self.path, int(part[1])).exists() or is_own_file(path)

        try:
            refuse_foreign_files(self.path, _UNBEGUN, is_own)
        except FileExistsError:
            if manifest.load(self.path) is None:  # looked for last: other shares may have just begun
                raise
            refuse_foreign_files(self.path, _BEGUN, is_own)

    def _lock(self) -> None:
        names = ["lock"] if self._share is None else ["lock", "lock-{}-of-{}".format(*self._share)]
        for name in names:
            path = self.path / SHARDS / name
            shared = self._share is not None and name == "lock"
            self._locks.append(lock_output(self.path, path, shared=shared))
        if self._share is not None:
            self._refuse_other_shares(self._share[1])

    def _refuse_other_shares(self, count: int) -> None:
        """Shares of one count have no shard in common; those of two counts do."""
        for path in sorted((self.path / SHARDS).glob("lock-*-of-*")):
            other = int(path.name.rpartition("-")[2])
            if other != count:
                try:
                    open_locked(path, shared=True).close()
                except FileExistsError:
                    raise FileExistsError(
                        f"{self.path}: another run is writing this output in {other} shares, not {count} "
                        f"({path.read_text(encoding='utf-8')})"
                    ) from None

    def clear(self) -> None:
        """Removes an earlier job, its manifest last: with it, what is left is still known as bivec's."""
        self._refuse_foreign_files()
        for name in filter(_PART.fullmatch, os.listdir(self.path)):
            (self.path / name).unlink()
        for path in (self.path / SHARDS).iterdir():
            if not path.name.startswith("lock"):
                path.unlink()
        refuse_existing(self.errors_path, is_own_errors, overwrite=True)
        self.errors_path.unlink(missing_ok=True)
        for folder in (self.path, self.path / SHARDS):
            sync(folder)
        (self.path / MANIFEST).unlink(missing_ok=True)
        sync(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        unused = self._made and self._share is None and not (self.path / MANIFEST).exists()
        if unused and (self._locks or not (self.path / SHARDS / "lock").exists()):
            with suppress(OSError):  # someone else has put a file there
                (self.path / SHARDS / "lock").unlink(missing_ok=True)
                (self.path / SHARDS).rmdir()
                self.path.rmdir()
        for lock in self._locks:
            lock.close()


class ShardOutput:
    """Writes shards into a folder: `begin_shard`, `write` and `fail`, `end_shard`, and again."""

    def __init__(self, folder: Path, dimension: int, precision: str, provenance: Mapping[str, Any]):
        self._folder = folder
        self._columns = (dimension, precision, provenance)
        self._file: EmbeddingFile | None = None

    def begin_shard(self, number: int) -> None:
        self._number = number
        self._num_written = 0
        self._bad_rows: list[BadRow] = []
        with naming(self._folder):
            self._file = EmbeddingFile(manifest.partial_path(self._folder, number))
            self._file.begin(*self._columns)

    def write(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """As `EmbeddingFile.write`."""
        assert self._file is not None
        with naming(self._folder):
            self._file.write(ids, vectors)
        self._num_written += len(ids)

    def fail(self, row: BadRow) -> None:
        """Adds a bad row to the shard's record."""
        self._bad_rows.append(row)

    def end_shard(self, num_tokens: int, num_cut: int) -> None:
        """Makes the shard done: its file synced, its record in place, then the file under its name."""
        assert self._file is not None
        with naming(self._folder):
            self._file.finish()
            digest = manifest.file_digest(self._file.temporary)
            record = Record(self._num_written, num_cut, num_tokens, self._bad_rows, *digest)
            manifest.write_record(self._folder, self._number, record)
            self._file.publish(manifest.part_path(self._folder, self._number))
        self._file = None

    def abort(self) -> None:
        """Removes the file of a shard that is not done."""
        if self._file is not None:
            self._file.abort()
            self._file = None
