"""Vectors to disk, whole or not at all.

A file is written under a temporary name in its final folder, flushed to the disk, and only then renamed: under the
final name stands the complete file or what stood there before. The temporary name is fixed and locked for as long as it
is written, so what a killed run left is taken over by the next one, and a second run on the same output is refused.

    OUT.parquet          one file; it appears when the last row is in
    OUT/part-00000.parquet, …    a folder of shards of a fixed number of rows; each appears when it is full
    OUT….errors.jsonl    beside either: the bad rows as {"file", "line", "reason"}; absent when there are none
"""

import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from ..engine.row_files import BadRow, InputFile

ROWS_PER_SHARD = 100_000
_SHARD = re.compile(r"part-\d{5,}\.parquet")
_PARTIAL_SHARD = ".part.partial"


class _AtomicFile:
    """`handle` is a temporary file that `publish` renames to its final name; until then `abort` leaves no trace."""

    def __init__(self, temporary: Path):
        self.temporary = temporary
        self.handle: BinaryIO = _open_locked(temporary)

    def finish(self) -> None:
        self.handle.flush()
        os.fsync(self.handle.fileno())

    def publish(self, final: Path) -> None:
        os.replace(self.temporary, final)
        sync_folder(final.parent)
        self.handle.close()

    def is_pending(self) -> bool:
        """Whether it is neither published nor aborted, also in the middle of an interrupted `publish`."""
        try:
            return not self.handle.closed and _same_file(self.handle, self.temporary)
        except FileNotFoundError:
            return False

    def abort(self) -> None:
        if self.is_pending():
            self.temporary.unlink()
        with suppress(OSError):  # what is still buffered may not fit on the disk
            self.handle.close()


def _open_locked(path: Path) -> BinaryIO:
    while True:
        handle = open(path, "ab")  # noqa: SIM115 (kept open by the caller); not truncated before the lock is ours
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(handle, path):
                handle.truncate(0)
                return handle
        except BlockingIOError:
            handle.close()
            raise FileExistsError(f"{path}: another run is writing this output") from None
        except FileNotFoundError:
            pass  # the run that had the lock has just published the file: take the free name
        handle.close()


def _same_file(handle: BinaryIO, path: Path) -> bool:
    return os.path.samestat(os.fstat(handle.fileno()), os.stat(path))


def sync_folder(folder: Path) -> None:
    """Makes the names in `folder` (renames, removals) durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class EmbeddingOutput:
    """A Parquet file (`path` ends in `.parquet`) or a folder of them, with the columns `id` and `embedding`.

    Made before the model loads: it refuses what it may not overwrite and opens its temporary files, which shows that
    the place is writable. Then `begin` once, `write` and `fail` in any order, `commit` once. Leaving the `with` block
    without a commit removes everything that this run wrote; what it was to overwrite is kept, except in a folder, whose
    shards are removed by `begin` (old and new shards must not stand side by side).

    Raises:
        FileExistsError: the output exists and `overwrite` is false, or another run is writing it.
        FileNotFoundError: the folder to write in does not exist.
        ValueError: the name is neither `.parquet` nor a folder's, or the folder holds files that bivec did not write.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False, rows_per_shard: int = ROWS_PER_SHARD):
        given = os.fspath(path)
        self.path = Path(given)
        self.is_folder = self.path.suffix != ".parquet"
        self.errors_path = self.path.with_name(f"{self.path.name}.errors.jsonl")
        self._check(given, overwrite)
        self._rows_per_shard = rows_per_shard if self.is_folder else None
        self._published: list[Path] = []
        self._num_in_shard = self._num_failed = 0
        self._writer: Any = None  # pyarrow.parquet.ParquetWriter
        self._made_folder = self.is_folder and not self.path.exists()
        if self._made_folder:
            self.path.mkdir()
        self._file: _AtomicFile | None = None
        try:
            self._file = _AtomicFile(self._temporary())
            self._errors = _AtomicFile(self.path.with_name(f".{self.errors_path.name}.partial"))
        except BaseException:
            if self._file is not None:
                self._file.abort()
            self._remove_made_folder()
            raise

    def _check(self, given: str, overwrite: bool) -> None:
        if not self.path.name:
            raise ValueError(f"the output must be a .parquet file or a folder, got {given!r}")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{given}: the folder {str(self.path.parent)!r} does not exist")
        if not self.is_folder and self.path.is_dir():
            raise FileExistsError(f"{given} is a folder: name a file, or a folder without .parquet")
        if self.is_folder and not self.path.is_dir():
            if self.path.exists():
                raise FileExistsError(f"{given} exists and is not a folder; a file's name must end in .parquet")
            if self.path.suffix and not given.endswith(os.sep):
                raise ValueError(
                    f"{given}: a file's name must end in .parquet, a folder's with such a name in {os.sep!r}"
                )
        if self.is_folder:
            names = set(os.listdir(self.path)) - {_PARTIAL_SHARD} if self.path.is_dir() else set()
            occupied = bool(names)
            foreign = sorted(name for name in names if not _SHARD.fullmatch(name))
            if foreign and overwrite:
                raise ValueError(
                    f"{given}: not overwritten: it holds files that bivec did not write, as {foreign[0]!r}"
                )
        else:
            occupied = self.path.exists()
        if occupied and not overwrite:
            raise FileExistsError(f"{given} exists; --overwrite replaces it")

    def _temporary(self) -> Path:
        return self.path / _PARTIAL_SHARD if self.is_folder else self.path.with_name(f".{self.path.name}.partial")

    def check_inputs(self, files: Sequence[InputFile]) -> None:
        """Raises ValueError where an input is the output or stands in it."""
        output = self.path.resolve()
        for file in files:
            source = file.path.resolve()
            if (
                source == output
                or source == self.errors_path.resolve()
                or (self.is_folder and output in source.parents)
            ):
                raise ValueError(f"{self.path}: the output would overwrite the input {file.path}")

    def begin(self, dimension: int, precision: str, provenance: Mapping[str, Any]) -> None:
        """Fixes the columns: `embedding` is a list of `dimension` numbers of type `precision` (float32, float16, int8).

        `provenance` is kept as JSON under the key `bivec` of every file's schema metadata.
        """
        import pyarrow as pa

        elements = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
        if precision not in elements:
            raise ValueError(f"precision must be one of {', '.join(elements)}, got {precision!r}")
        self._dimension, self._precision, element = dimension, precision, elements[precision]
        metadata = {"bivec": json.dumps(provenance, ensure_ascii=False)}
        columns = [pa.field("id", pa.string(), False), pa.field("embedding", pa.list_(element, dimension), False)]
        self._schema = pa.schema(columns, metadata)
        if self.is_folder:
            for name in filter(_SHARD.fullmatch, os.listdir(self.path)):
                (self.path / name).unlink()
            sync_folder(self.path)
        self._open_writer()

    def _open_writer(self) -> None:
        import pyarrow.parquet as pq

        assert self._file is not None
        # floats do not compress; a dictionary is what makes an int8 one byte (Parquet's smallest integer has four)
        with self._named():
            self._writer = pq.ParquetWriter(
                self._file.handle,
                self._schema,
                compression="none",
                use_dictionary=["embedding.list.element"] if self._precision == "int8" else False,
                write_statistics=["id"],
            )
        self._num_in_shard = 0

    def write(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Adds rows: `vectors` is `(len(ids), dimension)` of the announced precision.

        Raises:
            OSError: the disk is full, or the like; the output is then to be left without a commit.
        """
        if vectors.shape != (len(ids), self._dimension) or vectors.dtype != self._precision:
            raise ValueError(
                f"vectors must be {self._precision} of shape {(len(ids), self._dimension)}, "
                f"got {vectors.dtype} {vectors.shape}"
            )
        start = 0
        while start < len(ids):
            if self._num_in_shard == self._rows_per_shard:
                self._next_shard()
            stop = len(ids)
            if self._rows_per_shard is not None:
                stop = min(stop, start + self._rows_per_shard - self._num_in_shard)
            with self._named():
                self._write_group(ids[start:stop], vectors[start:stop])
            self._num_in_shard += stop - start
            start = stop

    @contextmanager
    def _named(self) -> Iterator[None]:
        """A full disk's error does not say where: name the output."""
        try:
            yield
        except OSError as error:
            if error.errno is None or error.filename is not None:
                raise
            raise OSError(error.errno, os.strerror(error.errno), str(self.path)) from error

    def _write_group(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        import pyarrow as pa

        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        embeddings = pa.FixedSizeListArray.from_arrays(flat, self._dimension)
        self._writer.write_batch(pa.record_batch([pa.array(ids, pa.string()), embeddings], schema=self._schema))

    def _next_shard(self) -> None:
        assert self._file is not None
        self._finish_file()
        self._publish_file()
        self._file = _AtomicFile(self._temporary())
        self._open_writer()

    def _finish_file(self) -> None:
        assert self._file is not None
        with self._named():
            self._writer.close()
            self._writer = None
            self._file.finish()

    def _publish_file(self) -> None:
        assert self._file is not None
        final = self.path / f"part-{len(self._published):05d}.parquet" if self.is_folder else self.path
        self._published.append(final)
        self._file.publish(final)

    def fail(self, row: BadRow) -> None:
        """Adds a bad row to the errors file."""
        line = json.dumps({"file": row.file, "line": row.line, "reason": row.reason})
        with self._named():
            self._errors.handle.write(line.encode() + b"\n")
        self._num_failed += 1

    def commit(self) -> None:
        """Publishes the errors file, or removes an older run's, and then, last, the (last) Parquet file."""
        self._finish_file()
        with self._named():
            self._errors.finish()
        if self._num_failed:
            self._errors.publish(self.errors_path)
        else:
            self._errors.abort()
            self.errors_path.unlink(missing_ok=True)
        self._publish_file()
        self._file = None

    def abort(self) -> None:
        """Removes what this run wrote; nothing after a commit."""
        file, self._file = self._file, None
        if file is None or (self._published and not self.is_folder and not file.is_pending()):
            return
        if self._writer is not None:
            self._writer.is_open = False  # so that no footer is written when it is collected
            self._writer = None
        if self._num_failed and not self._errors.is_pending():
            self.errors_path.unlink(missing_ok=True)
        self._errors.abort()
        file.abort()
        if self.is_folder:
            for path in self._published:
                path.unlink(missing_ok=True)
            self._remove_made_folder()

    def _remove_made_folder(self) -> None:
        if self._made_folder:
            with suppress(OSError):  # someone else has put a file there
                self.path.rmdir()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()
