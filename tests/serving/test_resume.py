"""A job into a folder, killed anywhere and resumed, gives the rows of one that was not: all of them, once, bitwise.

Jobs run in forks of this process with a stub for the model, so that hundreds of them are a matter of seconds.
"""

import errno
import gc
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bivec.engine import outputs
from bivec.serving import folder, job, manifest, shards, writers
from bivec.serving.job import run
from bivec.serving.settings import EmbedSettings
from bivec.texts.rows import RowError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

LINES = [f"text {n % 23}" for n in range(40)]
LINES[7] = "<none>"
LINES[31] = "<nan>"
CUT_SHARDS = list(enumerate((12, 12, 12, 4)))


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(job, "ROWS_PER_SHARD", 12)
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 5)


@pytest.fixture
def settings(tmp_path) -> EmbedSettings:
    """Four shards over two files, with two bad rows and texts that stand there twice."""
    for name, lines in (("a.txt", LINES[:17]), ("b.txt", LINES[17:])):
        (tmp_path / name).write_text("".join(f"{line}\n" for line in lines))
    inputs = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    return EmbedSettings(inputs=inputs, output=str(tmp_path / "out"), model="stub", device="cpu", on_error="skip")


@pytest.fixture
def embed(stub):
    def embed(settings: EmbedSettings, **changes):
        return run(replace(settings, **changes), lambda _: stub.StubEncoder())

    return embed


def contents(settings: EmbedSettings) -> tuple[list, str]:
    """All rows as a sorted list, vectors as bits, and the errors file."""
    output = Path(settings.output)
    rows = []
    for path in output.glob("*.parquet"):
        table = pq.read_table(path)
        vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
        rows += list(zip(table["id"].to_pylist(), (vector.tobytes() for vector in vectors), strict=True))
    return sorted(rows), writers.errors_path(output).read_text()


@pytest.fixture
def uninterrupted(embed, settings):
    whole = replace(settings, output=settings.output + "-whole")
    embed(whole)
    found = contents(whole)
    assert len(found[0]) == 38
    assert [json.loads(line)["line"] for line in found[1].splitlines()] == [8, 15]
    return found


def check_resumes(embed, settings, uninterrupted) -> None:
    embed(settings, resume=True)
    assert contents(settings) == uninterrupted
    names = {path.name for path in (Path(settings.output) / manifest.SHARDS).iterdir()}
    assert names == {"lock", *(f"{number:05d}.json" for number in range(4))}
    assert not list(Path(settings.output).parent.glob(".*.partial"))


def touch_counted(monkeypatch, at_call) -> None:
    """Call `at_call(number, what, arguments)` before each write, sync, rename and removal of a job."""
    number = [0]

    def counted(name, function):
        def call(*arguments, **options):
            number[0] += 1
            at_call(number[0], name, arguments)
            return function(*arguments, **options)

        return call

    class Handle:
        """A file whose writes are touches."""

        def __init__(self, handle):
            self._handle = handle
            self.write = counted("write", handle.write)

        def __getattr__(self, name):
            return getattr(self._handle, name)

    def open_locked(path, **options):
        return Handle(original(path, **options))

    original = outputs.open_locked
    monkeypatch.setattr(outputs, "open_locked", open_locked)
    for name in ("fsync", "replace", "unlink"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))


def test_killed_at_every_touch_of_the_disk(embed, settings, uninterrupted, monkeypatch, tmp_path, exit_code):
    calls = tmp_path / "calls"

    def count():
        touch_counted(monkeypatch, lambda number, name, _: calls.open("a").write(f"{name}\n"))
        embed(settings, output=settings.output + "-counted")

    assert exit_code(count) == 0
    points = calls.read_text().splitlines()
    assert {"write", "fsync", "replace"} <= set(points)
    # manifest, four files, four records, errors: each is synced, renamed, and its folder synced
    assert points.count("replace") == 10
    assert points.count("fsync") >= 20
    for point in range(1, len(points) + 1):
        shutil.rmtree(settings.output, ignore_errors=True)
        writers.errors_path(Path(settings.output)).unlink(missing_ok=True)

        def run_until(point=point):
            def kill(number, name, _):
                if number == point:
                    os.kill(os.getpid(), signal.SIGKILL)

            touch_counted(monkeypatch, kill)
            embed(settings)

        assert exit_code(run_until) == -signal.SIGKILL
        for path in Path(settings.output).glob("*.parquet"):  # what a reader sees is whole and on record
            shard = int(path.stem.removeprefix("part-"))
            assert manifest.is_done(Path(settings.output), shard, num_rows=12 if shard < 3 else 4)
        check_resumes(embed, settings, uninterrupted)


def test_work_that_is_done_is_not_done_again(embed, stub, settings, uninterrupted):
    embed(settings)
    for name in ("part-00002.parquet", "_shards/00001.json"):
        (Path(settings.output) / name).unlink()
    encoder = stub.StubEncoder()
    summary = run(replace(settings, resume=True), lambda _: encoder)
    assert (summary.num_read, summary.num_shards_before) == (24, 2)
    assert "shards done before: 2" in str(summary)
    assert {text for call in encoder.calls for text in call["texts"]} <= set(LINES[12:36])
    assert contents(settings) == uninterrupted


def test_shards_add_up_to_the_texts_that_are_cut(embed, settings):
    """Each on record, whoever has done it; a resumed job counts what it does itself."""
    Path(settings.inputs[1]).write_text("".join(f"{line} <long>\n" for line in LINES[17:]))
    settings = replace(settings, resume=True)
    embed(replace(settings, shard="0/2", resume=False))
    (Path(settings.output) / "part-00002.parquet").unlink()
    resumed = embed(settings)
    records = [manifest.read_record(Path(settings.output), number, num_rows) for number, num_rows in CUT_SHARDS]
    assert [record.num_cut for record in records] == [0, 7, 11, 4]
    assert resumed.num_cut == 22


def test_a_shard_that_is_not_on_record_is_removed_before_work_begins(embed, settings, monkeypatch):
    embed(settings)
    (Path(settings.output) / "_shards/00001.json").unlink()
    (Path(settings.output) / "_shards/00003.parquet.partial").write_text("half")

    def no_work(*_, **__):
        raise OSError("no work today")

    monkeypatch.setattr(folder.ShardOutput, "begin_shard", no_work)
    with pytest.raises(OSError, match="no work"):
        embed(settings, resume=True)
    assert sorted(path.name for path in Path(settings.output).glob("*.parquet")) == [
        "part-00000.parquet",
        "part-00002.parquet",
        "part-00003.parquet",
    ]


def test_texts_are_embedded_once_a_shard(stub, settings):
    encoder = stub.StubEncoder()
    run(settings, lambda _: encoder)
    texts = [text for call in encoder.calls for text in call["texts"]]
    assert len(texts) == sum(len(set(LINES[start : start + 12])) for start in range(0, 40, 12))


def test_a_torn_record_or_file_is_not_done(embed, settings, uninterrupted):
    embed(settings)
    record = Path(settings.output) / "_shards/00000.json"
    record.write_bytes(record.read_bytes()[:20])
    with (Path(settings.output) / "part-00003.parquet").open("ab") as file:
        file.truncate(100)
    check_resumes(embed, settings, uninterrupted)


def test_refuses_a_changed_configuration_with_a_line_a_field(embed, stub, settings, uninterrupted):
    embed(settings)
    with pytest.raises(ValueError, match="was begun otherwise") as caught:
        embed(settings, resume=True, precision="int8", normalize=True)
    assert str(caught.value).splitlines()[1:] == [
        "  normalize was false, is true",
        '  precision was "float32", is "int8"',
    ]
    with pytest.raises(ValueError, match='prompt was "", is "find: "'):
        embed(settings, resume=True, instruction="find: ")
    other = stub.StubEncoder()
    other.identity = lambda: {"base": "another", "libraries": {}}
    with pytest.raises(ValueError, match="was begun otherwise") as caught:
        run(replace(settings, resume=True), lambda _: other)
    assert str(caught.value).splitlines()[1:] == [
        '  encoder.base was "stub", is "another"',
        '  encoder.libraries.stub was "1", is absent',
    ]
    assert contents(settings) == uninterrupted


def test_refuses_changed_removed_or_reordered_inputs(embed, settings, tmp_path):
    embed(settings)
    with pytest.raises(ValueError, match=r"order of inputs was a\.txt, b\.txt, is b\.txt, a\.txt"):
        embed(settings, resume=True, inputs=settings.inputs[::-1])
    with pytest.raises(ValueError, match=r"input b\.txt was \d+ bytes, \w+, is absent"):
        embed(settings, resume=True, inputs=settings.inputs[:1])
    text = (tmp_path / "b.txt").read_text()
    (tmp_path / "b.txt").write_text(text.replace("text 5", "text 6"))  # of the same size
    with pytest.raises(ValueError, match=r"input b\.txt was "):
        embed(settings, resume=True)
    (tmp_path / "b.txt").write_text(text)
    os.utime(tmp_path / "b.txt", (0, 0))
    assert embed(settings, resume=True).num_read == 0


def test_an_input_that_changes_or_vanishes_while_it_is_read(embed, stub, settings, tmp_path, uninterrupted):
    text = (tmp_path / "b.txt").read_text()

    def changed(change):
        def load(_):
            change()
            return stub.StubEncoder()

        with pytest.raises(OSError, match=r"b\.txt: the file was changed or removed after it was checked"):
            run(replace(settings, resume=True), load)
        assert [path.name for path in Path(settings.output).glob("*.parquet")] == ["part-00000.parquet"]
        (tmp_path / "b.txt").write_text(text)

    changed(lambda: (tmp_path / "b.txt").write_text(text.replace("text 1", "longer 1")))
    changed((tmp_path / "b.txt").unlink)
    check_resumes(embed, settings, uninterrupted)


def test_a_full_disk_at_any_write_keeps_what_is_done(embed, settings, uninterrupted, monkeypatch, tmp_path):
    for point in range(1, 1000):
        shutil.rmtree(settings.output, ignore_errors=True)
        writers.errors_path(Path(settings.output)).unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            writes = [0]

            def full(_, name, __, writes=writes, point=point):
                writes[0] += name == "write"
                if writes[0] >= point and name in ("write", "fsync"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            touch_counted(patch, full)
            caught = None
            try:
                embed(settings)
            except OSError as error:
                caught = error
        if caught is None:
            break
        assert (caught.errno, caught.filename) == (errno.ENOSPC, settings.output)
        check_resumes(embed, settings, uninterrupted)
    assert point > 20
    assert contents(settings) == uninterrupted


def test_a_bad_row_in_the_middle_ends_the_job_and_a_resumed_one_may_skip_it(embed, settings, uninterrupted):
    with pytest.raises(RowError, match=r"a\.txt:8: it leaves no token"):
        embed(settings, on_error="fail")
    with pytest.raises(FileExistsError, match="--resume continues it, --overwrite replaces it"):
        embed(settings)
    check_resumes(embed, settings, uninterrupted)


def test_resume_begins_where_nothing_is(embed, settings, uninterrupted, tmp_path):
    check_resumes(embed, settings, uninterrupted)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("dear")
    for option in ({"resume": True}, {"overwrite": True}, {"shard": "0/2"}):
        with pytest.raises(FileExistsError, match=r"it holds what bivec did not write, as '.*thesis\.tex'"):
            embed(settings, output=str(tmp_path / "other"), **option)
    assert os.listdir(tmp_path / "other") == ["thesis.tex"]
    (tmp_path / "old").mkdir()
    (tmp_path / "out" / "part-00000.parquet").rename(tmp_path / "old" / "part-00000.parquet")
    with pytest.raises(FileExistsError, match="no manifest to resume from"):
        embed(settings, output=str(tmp_path / "old"), resume=True)
    embed(settings, output=str(tmp_path / "old"), overwrite=True)


def test_shares_apart_make_the_whole(embed, settings, uninterrupted):
    first = embed(settings, shard="1/2")
    assert (first.num_read, first.num_shards_left) == (16, 2)
    assert "shards of other shares not done yet: 2" in str(first)
    assert not writers.errors_path(Path(settings.output)).exists()
    second = embed(settings, shard="0/2")
    assert (second.num_read, second.num_shards_left) == (24, 0)
    assert contents(settings) == uninterrupted
    with pytest.raises(ValueError, match="precision was"):
        embed(settings, shard="1/2", precision="int8")


def test_a_job_goes_on_in_the_dtype_that_it_was_begun_in(stub, settings, uninterrupted):
    """Whatever is measured to be faster by then; another one that is asked for is refused."""
    asked = []

    def embed(measured, **changes):
        def load(settings):
            asked.append(settings.dtype)
            return stub.StubEncoder({"auto": measured, "int8": f"int8+{measured}"}.get(settings.dtype, settings.dtype))

        run(replace(settings, **changes), load)

    for dtype, written in {"auto": "bfloat16", "int8": "int8+bfloat16"}.items():
        embed("bfloat16", dtype=dtype, overwrite=True)
        for again in (dtype, "auto", written):
            (Path(settings.output) / "part-00002.parquet").unlink()
            embed("float32", dtype=again, resume=True)
            assert contents(settings) == uninterrupted
        assert asked == [dtype, written, written, written]
        asked.clear()
        with pytest.raises(ValueError, match=f'encoder.dtype was "{re.escape(written)}", is "float32"'):
            embed("bfloat16", dtype="float32", resume=True)
        asked.clear()


def test_a_share_goes_on_in_the_dtype_of_one_that_began_meanwhile(stub, settings, uninterrupted):
    """Its encoder in another one is gone before the next is loaded."""
    asked, loaded = [], []

    def share(number, measured, meanwhile=lambda: None):
        def load(settings):
            asked.append(settings.dtype)
            meanwhile()
            gc.collect()
            assert not any(encoder() for encoder in loaded)
            encoder = stub.StubEncoder(measured if settings.dtype == "auto" else settings.dtype)
            loaded.append(weakref.ref(encoder))
            return encoder

        run(replace(settings, shard=f"{number}/2"), load)

    def first():
        if asked == ["auto"]:
            share(0, "bfloat16")

    share(1, "float32", first)
    assert asked == ["auto", "auto", "bfloat16"]
    assert contents(settings) == uninterrupted


@pytest.mark.parametrize("shard", ["2/2", "a", "0/0", "-1/2", "1"])
def test_a_share_is_i_of_n(embed, settings, shard):
    with pytest.raises(ValueError, match="shard must be I/N with I from 0 to N - 1, got "):
        embed(settings, shard=shard)


def test_shares_at_once_and_the_last_writes_the_errors(embed, settings, uninterrupted, fork):
    children = [fork(lambda share=share: embed(settings, shard=f"{share}/3")) for share in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert contents(settings) == uninterrupted


def test_two_jobs_on_one_output(embed, settings):
    with folder.OutputFolder(settings.output) as _:
        for option in ({}, {"shard": "0/2"}):
            with pytest.raises(FileExistsError, match=rf"another run is writing .*process {os.getpid()} on "):
                embed(settings, **option)
    with folder.OutputFolder(settings.output, share=(0, 2)) as _:
        with pytest.raises(FileExistsError, match="another run is writing this output"):
            embed(settings, resume=True)
        with pytest.raises(FileExistsError, match="another run is writing this output"):
            embed(settings, shard="0/2")
        embed(settings, shard="1/2")


def test_duplicate_ids_are_found_before_the_model_loads_and_leave_nothing(settings, tmp_path):
    lines = [json.dumps({"id": n % 30, "text": "x"}) + "\n" for n in range(32)]
    (tmp_path / "c.jsonl").write_text("".join(lines))
    chosen = replace(settings, inputs=[str(tmp_path / "c.jsonl")], id_column="id")
    with pytest.raises(ValueError, match=r"'0' is at .*c\.jsonl:1 and at .*c\.jsonl:31; '1' is at "):
        run(chosen, lambda _: pytest.fail("the model must not be loaded"))
    assert not Path(settings.output).exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_signal_keeps_what_is_done(start, texts, tmp_path, number, status, workers):
    process = start(texts, "--output", tmp_path / "out", "--workers", workers, pause_at=8)
    before = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert time.monotonic() - before < 10
    assert "Traceback" not in err
    done = len(list((tmp_path / "out").glob("*.parquet")))
    assert 0 < done < 5
    assert not list((tmp_path / "out").rglob("*.partial"))
    out, err = start(texts, "--output", tmp_path / "out", "--resume", pause_at=0).communicate()
    assert f"shards done before: {done}" in out, err


def test_ray_that_is_not_installed(embed, settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r'--ray needs Ray: pip install "bivec\[ray\]"'):
        embed(settings, ray="local")


@pytest.mark.parametrize("option", [{"resume": True}, {"shard": "0/2"}, {"ray": "local"}, {"workers": 2}])
def test_one_file_is_written_by_one_run(embed, settings, option, tmp_path):
    with pytest.raises(ValueError, match=rf"--{next(iter(option))} needs a folder as the output"):
        embed(settings, output=str(tmp_path / "out.parquet"), **option)


def test_ten_random_kills_of_the_real_encoder(tiny_llama_folder, settings, tmp_path, exit_code, fork):
    lines = [f"number {n} of many texts that are " + "long " * (n % 40) for n in range(120)]
    (tmp_path / "c.txt").write_text("".join(f"{line}\n" for line in lines))
    real = replace(settings, inputs=[str(tmp_path / "c.txt")], model=str(tiny_llama_folder), dtype="float32")
    whole = replace(real, output=str(tmp_path / "whole"))
    start = time.monotonic()
    assert exit_code(lambda: run(whole)) == 0
    seconds = time.monotonic() - start
    generator = random.Random(0)
    kills = 0
    while kills < 10:
        child = fork(lambda: run(replace(real, resume=True)))
        time.sleep(seconds * generator.uniform(0.2, 1.0))
        os.kill(child, signal.SIGKILL)
        kills += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        if len(list(Path(real.output).glob("*.parquet"))) == 10:
            shutil.rmtree(real.output)
    assert exit_code(lambda: run(replace(real, resume=True))) == 0
    assert rows_of(real) == rows_of(whole)
    assert len(rows_of(whole)) == 120


def rows_of(settings: EmbedSettings) -> list:
    table = pq.read_table(settings.output)
    vectors = table["embedding"].combine_chunks().flatten().to_numpy().reshape(len(table), -1)
    return sorted(zip(table["id"].to_pylist(), (vector.tobytes() for vector in vectors), strict=True))
