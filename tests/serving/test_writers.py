"""The output is whole or not there, whatever goes wrong and wherever."""

import errno
import io
import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bivec.engine import outputs
from bivec.serving.writers import OutputFile
from bivec.texts.rows import BadRow


def rows(start: int, stop: int, precision: str = "float32", dimension: int = 3):
    numbers = np.arange(start * dimension, stop * dimension).reshape(-1, dimension) % 101 - 50
    return [f"id {n}" for n in range(start, stop)], numbers.astype(precision)


def write(path, *windows, precision="float32", failed=(), **arguments) -> None:
    with OutputFile(path, **arguments) as output:
        output.begin(3, precision, {"model": "stub", "prompt": "häh: "})
        for start, stop in windows:
            output.write(*rows(start, stop, precision))
        for row in failed:
            output.fail(row)
        output.commit()


def check(table: pa.Table, stop: int, precision: str = "float32") -> None:
    ids, vectors = rows(0, stop, precision)
    assert table.column_names == ["id", "embedding"]
    assert table["id"].to_pylist() == ids
    kind = {"float32": pa.float32(), "float16": pa.float16(), "int8": pa.int8()}[precision]
    assert table.schema.field("embedding").type.equals(pa.list_(kind, 3))
    assert np.array(table["embedding"].to_pylist()).tolist() == vectors.astype(float).tolist()


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
def test_a_file_holds_ids_vectors_and_provenance(tmp_path, precision):
    path = tmp_path / "out.parquet"
    write(path, (0, 4), (4, 4), (4, 9), precision=precision)
    check(pq.read_table(path), 9, precision)
    assert json.loads(pq.read_schema(path).metadata[b"bivec"]) == {"model": "stub", "prompt": "häh: "}
    assert os.listdir(tmp_path) == ["out.parquet"]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_no_rows_make_a_file_with_the_right_columns(tmp_path):
    write(tmp_path / "out.parquet")
    check(pq.read_table(tmp_path / "out.parquet"), 0)


def test_int8_takes_one_byte_a_number(tmp_path):
    vectors = np.random.default_rng(0).integers(-127, 128, (4000, 256), dtype=np.int8)
    with OutputFile(tmp_path / "out.parquet") as output:
        output.begin(256, "int8", {})
        output.write([str(n) for n in range(4000)], vectors)
        output.commit()
    assert (tmp_path / "out.parquet").stat().st_size < 1.1 * vectors.nbytes


def test_bad_rows_are_listed_beside_the_output(tmp_path):
    failed = [BadRow("dir/a.jsonl", 7, "invalid JSON: „x“"), BadRow("b.parquet", None, "the file is empty", True)]
    for name in ("out.parquet", "other.parquet"):
        write(tmp_path / name, (0, 2), failed=failed)
        lines = (tmp_path / f"{name}.errors.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [
            {"file": "dir/a.jsonl", "line": 7, "reason": "invalid JSON: „x“"},
            {"file": "b.parquet", "line": None, "reason": "the file is empty"},
        ]
        write(tmp_path / name, (0, 2), overwrite=True)
        assert not (tmp_path / f"{name}.errors.jsonl").exists()


def test_an_existing_output_is_refused_and_overwritten_by_request(tmp_path):
    name = "out.parquet"
    write(tmp_path / name, (0, 20))
    with pytest.raises(FileExistsError, match=f"{name} exists; --overwrite replaces it"):
        OutputFile(tmp_path / name)
    write(tmp_path / name, (0, 6), overwrite=True)
    check(pq.read_table(tmp_path / name), 6)
    assert sorted(os.listdir(tmp_path)) == [name]


def test_a_file_stays_until_its_replacement_is_complete(tmp_path):
    path = tmp_path / "out.parquet"
    write(path, (0, 5), failed=[BadRow("a.txt", 1, "old")])
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with OutputFile(path, overwrite=True) as output:
        output.begin(3, "float32", {})
        output.write(*rows(0, 2))
        output.fail(BadRow("a.txt", 1, "new"))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("missing/out.parquet", FileNotFoundError, "the folder '.*missing' does not exist"),
        ("file.txt/out.parquet", FileNotFoundError, "the folder '.*file.txt' does not exist"),
        ("folder.parquet", FileExistsError, "is a folder"),
    ],
)
def test_an_output_that_cannot_be_is_refused(tmp_path, name, error, message):
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(error, match=message):
        OutputFile(tmp_path / name)
    assert sorted(os.listdir(tmp_path)) == ["file.txt", "folder.parquet"]


def test_a_place_that_is_not_writable_is_found_out_at_once():
    with pytest.raises(OSError, match="/proc/self"):
        OutputFile("/proc/self/out.parquet")


def test_an_errors_file_that_somebody_else_put_there_outlives_a_run_that_fails(tmp_path):
    with OutputFile(tmp_path / "out.parquet") as output:
        output.begin(3, "float32", {})
        output.fail(BadRow("a.txt", 1, "x"))
        (tmp_path / ".out.parquet.errors.jsonl.partial").unlink()
        (tmp_path / "out.parquet.errors.jsonl").write_text("precious")
    assert os.listdir(tmp_path) == ["out.parquet.errors.jsonl"]


def test_a_second_run_on_the_same_output_is_refused(tmp_path):
    name = "out.parquet"
    with OutputFile(tmp_path / name) as first:
        with pytest.raises(FileExistsError, match="another run is writing this output"):
            OutputFile(tmp_path / name)
        first.begin(3, "float32", {})
        first.write(*rows(0, 3))
        first.commit()
    check(pq.read_table(tmp_path / name), 3)


def test_a_name_published_while_it_is_being_locked_is_not_truncated(tmp_path, monkeypatch):
    """The window between opening the temporary file and locking it: the run that held it publishes it just then."""
    path, real_flock, calls = tmp_path / "out.parquet", outputs.fcntl.flock, []
    temporary = tmp_path / ".out.parquet.partial"
    temporary.write_bytes(b"complete")

    def flock(handle, flags):
        if not calls:
            os.replace(temporary, path)
        calls.append(flags)
        real_flock(handle, flags)

    monkeypatch.setattr(outputs.fcntl, "flock", flock)
    handle = outputs.open_locked(temporary)
    handle.write(b"mine")
    handle.close()
    assert (path.read_bytes(), temporary.read_bytes(), len(calls)) == (b"complete", b"mine", 2)


def test_vectors_of_another_kind_than_announced_are_refused(tmp_path):
    with OutputFile(tmp_path / "out.parquet") as output:
        output.begin(3, "float32", {})
        for vectors in (np.zeros((1, 4), np.float32), np.zeros((2, 3), np.float32), np.zeros((1, 3))):
            with pytest.raises(ValueError, match="vectors must be float32 of shape"):
                output.write(["a"], vectors)


JOB = {"windows": [(0, 5), (5, 12)], "failed": [BadRow("a.txt", 1, "x")]}


def run_job(path) -> None:
    write(path, *JOB["windows"], failed=JOB["failed"])


def test_a_disk_that_is_full_at_any_write_leaves_nothing(tmp_path, monkeypatch):
    name = "out.parquet"
    budget = [0]

    class FullDisk(io.FileIO):
        def write(self, data) -> int:
            if budget[0] == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            budget[0] -= 1
            return super().write(data)

    monkeypatch.setattr(outputs, "open_locked", lambda path, **_: FullDisk(path, "wb"))
    for num_writes in range(1000):
        budget[0] = num_writes
        caught = None
        try:
            run_job(tmp_path / name)
        except OSError as error:
            caught = error
        if caught is None:
            break
        assert (caught.errno, caught.filename) == (errno.ENOSPC, str(tmp_path / name))
        assert os.listdir(tmp_path) == []
    assert num_writes > 5
    check(pq.read_table(tmp_path / name), 12)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["replace", "fsync", "unlink"])
def test_an_interrupt_at_any_step_leaves_all_or_nothing(tmp_path, monkeypatch, call, after):
    name = "out.parquet"
    real = getattr(os, call)
    for step in range(1000):
        num_calls = [0]

        def interrupted(*arguments, step=step, num_calls=num_calls):
            num_calls[0] += 1
            if num_calls[0] != step + 1:
                return real(*arguments)
            if after:
                real(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(os, call, interrupted)
        try:
            run_job(tmp_path / name)
            done = True
        except KeyboardInterrupt:
            done = False
        monkeypatch.setattr(os, call, real)
        left = sorted(os.listdir(tmp_path))
        if done or left:
            assert left == sorted([name, f"{name}.errors.jsonl"])
            check(pq.read_table(tmp_path / name), 12)
        if done:
            break
        if left:
            (tmp_path / f"{name}.errors.jsonl").unlink()
            os.rename(tmp_path / name, tmp_path.with_name(f"{tmp_path.name}-{step}-{name}"))
    assert step >= (0 if call == "unlink" else 2)
