"""Vectors to disk, whole or not at all.

A file is written under a temporary name in its final folder, flushed to the disk, and only then renamed: under the
final name stands the complete file or what stood there before. The temporary name is fixed and locked for as long as it
is written, so what a killed run left is taken over by the next one, and a second run on the same output is refused.

    OUT.parquet                 it appears when the last row is in; a folder of shards: `folder.py`
    OUT.parquet.errors.jsonl    beside it: the bad rows as {"file", "line", "reason"}; absent when there are none
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from os.path import lexists
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..engine.outputs import AtomicFile, naming, refuse_existing
from ..texts.rows import BadRow

_COLUMNS = ["id", "embedding"]
_PROVENANCE = b"bivec"  # the key of the schema's metadata by which a file is known as ours
_MAX_ERROR_BYTES = 2**20  # a foreign file may be one endless line


class EmbeddingFile:
    """One Parquet file with the columns `id` and `embedding`, under a temporary name until `publish`."""

    def __init__(self, temporary: Path):
        self._file = AtomicFile(temporary)
        self._writer: Any = None  # pyarrow.parquet.ParquetWriter

    @property
    def temporary(self) -> Path:
        return self._file.temporary

    def begin(self, dimension: int, precision: str, provenance: Mapping[str, Any]) -> None:
        """Fixes the columns: `embedding` is a list of `dimension` numbers of type `precision` (float32, float16, int8).

        `provenance` is kept as JSON under the key `bivec` of the file's schema metadata.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        elements = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}
        if precision not in elements:
            raise ValueError(f"precision must be one of {', '.join(elements)}, got {precision!r}")
        self._dimension, self._precision, element = dimension, precision, elements[precision]
        types = (pa.string(), pa.list_(element, dimension))
        columns = [pa.field(name, kind, nullable=False) for name, kind in zip(_COLUMNS, types, strict=True)]
        self._schema = pa.schema(columns, {_PROVENANCE: json.dumps(provenance, ensure_ascii=False)})
        # floats do not compress; a dictionary is what makes an int8 one byte (Parquet's smallest integer has four)
        self._writer = pq.ParquetWriter(
            self._file.handle,
            self._schema,
            compression="none",
            use_dictionary=["embedding.list.element"] if precision == "int8" else False,
            write_statistics=["id"],
        )

    def write(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """Adds rows: `vectors` is `(len(ids), dimension)` of the announced precision."""
        import pyarrow as pa

        if vectors.shape != (len(ids), self._dimension) or vectors.dtype != self._precision:
            raise ValueError(
                f"vectors must be {self._precision} of shape {(len(ids), self._dimension)}, "
                f"got {vectors.dtype} {vectors.shape}"
            )
        if not len(ids):
            return
        flat = pa.array(np.ascontiguousarray(vectors).reshape(-1))
        embeddings = pa.FixedSizeListArray.from_arrays(flat, self._dimension)
        self._writer.write_batch(pa.record_batch([pa.array(ids, pa.string()), embeddings], schema=self._schema))

    def finish(self) -> None:
        """Writes the footer and flushes all to the disk."""
        self._writer.close()
        self._writer = None
        self._file.finish()

    def publish(self, final: Path) -> None:
        self._file.publish(final)

    def is_pending(self) -> bool:
        return self._file.is_pending()

    def abort(self) -> None:
        if self._writer is not None:
            self._writer.is_open = False  # so that no footer is written when it is collected
            self._writer = None
        self._file.abort()


def is_own_file(path: Path) -> bool:
    """Whether `path` is a Parquet file as `EmbeddingFile` writes it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError):  # no Parquet file
        return False
    return schema.names == _COLUMNS and _PROVENANCE in (schema.metadata or {})


def error_lines(rows: Iterable[BadRow]) -> bytes:
    """Bad rows as the errors file has them."""
    entries = ({"file": row.file, "line": row.line, "reason": row.reason} for row in rows)
    return "".join(json.dumps(entry) + "\n" for entry in entries).encode()


def is_own_errors(path: Path) -> bool:
    """Whether `path` holds bad rows as `error_lines` gives them, at least one, and nothing else."""
    num_rows = 0
    try:
        with path.open("rb") as stream:
            while line := stream.readline(_MAX_ERROR_BYTES):
                entry = json.loads(line)
                own = isinstance(entry, dict) and list(entry) == ["file", "line", "reason"]
                if not own or json.dumps(entry).encode() + b"\n" != line:
                    return False
                num_rows += 1
    except (ValueError, RecursionError):  # no JSON
        return False
    return num_rows > 0


def errors_path(output: Path) -> Path:
    return output.with_name(f"{output.name}.errors.jsonl")


class OutputFile:
    """A Parquet file and, beside it, the errors.

    Made before the model loads: it refuses what it may not overwrite and opens its temporary files, which shows that
    the place is writable. Then `begin` once, `write` and `fail` in any order, `commit` once. Leaving the `with` block
    without a commit removes everything that this run wrote; what it was to overwrite is kept.

    Raises:
        FileExistsError: the output or its errors file exists, and bivec did not write it or `overwrite` is false; or
            another run is writing it.
        FileNotFoundError: the folder to write in does not exist.
    """

    def __init__(self, path: str | os.PathLike[str], *, overwrite: bool = False):
        self.path = Path(path)
        self.errors_path = errors_path(self.path)
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"{path}: the folder {str(self.path.parent)!r} does not exist")
        if self.path.is_dir():
            raise FileExistsError(f"{path} is a folder: name a file, or a folder without .parquet")
        self._overwrite = overwrite
        self._num_failed = 0
        self._file: EmbeddingFile | None = EmbeddingFile(self.path.with_name(f".{self.path.name}.partial"))
        try:
            self._errors = AtomicFile(self.path.with_name(f".{self.errors_path.name}.partial"))
        except BaseException:
            self._file.abort()
            raise
        try:
            self._refuse_existing()
        except BaseException:
            self.abort()
            raise

    def _refuse_existing(self) -> None:
        refuse_existing(self.path, is_own_file, overwrite=self._overwrite)
        refuse_existing(self.errors_path, is_own_errors, overwrite=self._overwrite)

    def begin(self, dimension: int, precision: str, provenance: Mapping[str, Any]) -> None:
        """As `EmbeddingFile.begin`."""
        assert self._file is not None
        with naming(self.path):
            self._file.begin(dimension, precision, provenance)

    def write(self, ids: Sequence[str], vectors: np.ndarray) -> None:
        """As `EmbeddingFile.write`; raises OSError when the disk is full: leave the output without a commit then."""
        assert self._file is not None
        with naming(self.path):
            self._file.write(ids, vectors)

    def fail(self, row: BadRow) -> None:
        """Adds a bad row to the errors file."""
        with naming(self.path):
            self._errors.handle.write(error_lines([row]))
        self._num_failed += 1

    def commit(self) -> None:
        """Publishes the errors file, or removes an older run's, and then, last, the Parquet file.

        Raises:
            FileExistsError: somebody has put a file there since, which stays; the vectors are published beside it.
        """
        assert self._file is not None
        with naming(self.path):
            self._file.finish()
            self._errors.finish()
        try:
            self._refuse_existing()
        except FileExistsError as error:
            beside = (self.path.with_stem(f"{self.path.stem}-{number}") for number in count(1))
            self.path = next(path for path in beside if not (lexists(path) or lexists(errors_path(path))))
            self.errors_path = errors_path(self.path)
            self._publish()
            raise FileExistsError(f"{error}; so what was computed is in {self.path}") from error
        self._publish()

    def _publish(self) -> None:
        assert self._file is not None
        if self._num_failed:
            self._errors.publish(self.errors_path)
        else:
            self._errors.abort()
            self.errors_path.unlink(missing_ok=True)
        self._file.publish(self.path)
        self._file = None

    def abort(self) -> None:
        """Removes what this run wrote; nothing after a commit."""
        file, self._file = self._file, None
        if file is None or (self._errors.handle.closed and not file.is_pending()):
            return
        if self._errors.stands_at(self.errors_path):
            self.errors_path.unlink()
        self._errors.abort()
        file.abort()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.abort()
