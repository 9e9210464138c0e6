"""What `bivec embed` may not touch: whatever is there, whatever it is told and wherever it ends.

Every file that was there before, and that an earlier run did not write, is there afterwards, byte for byte.
"""

import errno
import json
import os
import re
import signal
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bivec import cli_shared
from bivec.engine import outputs
from bivec.serving import job, shards
from bivec.serving.job import run
from bivec.serving.settings import EmbedSettings
from bivec.texts.rows import RowError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")

FOREIGN = {"file": "a.py", "line": 3, "reason": "why", "author": "me"}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(job, "ROWS_PER_SHARD", 10)
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 5)


@pytest.fixture
def embed(stub):
    """embed(folder, output, **settings): folder/in/a.jsonl, 30 rows of which one fails, into folder/output."""

    def embed(folder: Path, output: str, encoder=None, load=None, **changes):
        settings = {"inputs": [str(folder / "in" / "a.jsonl")], "on_error": "skip", "device": "cpu", **changes}
        output = str(folder / output) + "/" * output.endswith("/")
        settings = EmbedSettings(output=output, model="stub", **settings)
        return run(settings, load or (lambda _: encoder or stub.StubEncoder()))

    return embed


def make_input(folder: Path) -> None:
    (folder / "in").mkdir(parents=True)
    lines = [json.dumps({"text": "<none>" if n == 17 else f"text {n}"}) + "\n" for n in range(30)]
    (folder / "in" / "a.jsonl").write_text("".join(lines))


def write(path: Path, text: str = "precious") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def link(path: Path, target: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def pipe(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)


def foreign_parquet(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"id": ["a"], "embedding": [[1.0]]}), path)


def with_a_column_added(path: Path) -> None:
    """What somebody has made of ours; it keeps our provenance."""
    table = pq.read_table(path)
    pq.write_table(table.append_column("label", pa.array(range(len(table)))), path)


# the output, and what is done before, with `precious` and `precious.parquet` beside it
REFUSED = {
    "a foreign file": ("out.parquet", lambda f, embed: foreign_parquet(f / "out.parquet")),
    "an own file with a column added": (
        "out.parquet",
        lambda f, embed: (embed(f, "out.parquet"), with_a_column_added(f / "out.parquet")),
    ),
    "an empty file": ("out.parquet", lambda f, embed: write(f / "out.parquet", "")),
    "foreign errors of a file": (
        "out.parquet",
        lambda f, embed: write(f / "out.parquet.errors.jsonl", json.dumps(FOREIGN)),
    ),
    "foreign errors of a folder": ("out", lambda f, embed: write(f / "out.errors.jsonl", json.dumps(FOREIGN))),
    "empty errors of a folder": ("out", lambda f, embed: write(f / "out.errors.jsonl", "")),
    "foreign errors of an own folder": (
        "out",
        lambda f, embed: (embed(f, "out"), write(f / "out.errors.jsonl", json.dumps(FOREIGN))),
    ),
    "an own folder where errors go": ("out", lambda f, embed: embed(f, "out.errors.jsonl/")),
    "a link to a file": ("out.parquet", lambda f, embed: link(f / "out.parquet", "precious.parquet")),
    "a link to an own file": (
        "out.parquet",
        lambda f, embed: (embed(f, "own.parquet"), link(f / "out.parquet", "own.parquet")),
    ),
    "a link to nothing": ("out.parquet", lambda f, embed: link(f / "out.parquet", "nothing")),
    "a folder's link to nothing": ("out", lambda f, embed: link(f / "out", "nothing")),
    "a link as the partial file": ("out.parquet", lambda f, embed: link(f / ".out.parquet.partial", "precious")),
    "a link as the partial errors": (
        "out.parquet",
        lambda f, embed: link(f / ".out.parquet.errors.jsonl.partial", "precious"),
    ),
    "a pipe as the partial file": ("out.parquet", lambda f, embed: pipe(f / ".out.parquet.partial")),
    "a link as the lock": ("out", lambda f, embed: link(f / "out" / "_shards" / "lock", "../../precious")),
    "a pipe as the lock": ("out", lambda f, embed: pipe(f / "out" / "_shards" / "lock")),
    "a link to a folder of records": (
        "out",
        lambda f, embed: (write(f / "other" / "00000.json"), link(f / "out" / "_shards", "../other")),
    ),
    "foreign parts": ("out", lambda f, embed: foreign_parquet(f / "out" / "part-00000.parquet")),
    "foreign records": ("out", lambda f, embed: write(f / "out" / "_shards" / "00001.json", "{}")),
    "a foreign manifest": ("out", lambda f, embed: write(f / "out" / "_manifest.json", '{"name": "my web page"}')),
    "a foreign file in an own folder": (
        "out",
        lambda f, embed: (embed(f, "out"), write(f / "out" / "_shards" / "thesis.tex")),
    ),
    "a foreign part in an own folder": (
        "out",
        lambda f, embed: (embed(f, "out"), foreign_parquet(f / "out" / "part-00007.parquet")),
    ),
    "an input": ("in/a.jsonl/", lambda f, embed: None),
    "the input folder": ("in", lambda f, embed: None),
    "within the input folder": ("in/out", lambda f, embed: None),
}


def surroundings(folder: Path) -> dict[str, object]:
    """Every file, link and pipe below `folder` and what it holds; locks, which hold who has them, left out."""
    found: dict[str, object] = {}
    for parent, folders, names in os.walk(folder):
        for name in [*names, *(name for name in folders if os.path.islink(os.path.join(parent, name)))]:
            path = Path(parent, name)
            if path.is_symlink():
                found[str(path.relative_to(folder))] = os.readlink(path)
            elif path.is_fifo():
                found[str(path.relative_to(folder))] = "a pipe"
            elif name != "lock":
                found[str(path.relative_to(folder))] = path.read_bytes()
    return found


@pytest.mark.parametrize("place", REFUSED)
def test_what_bivec_did_not_write_is_refused_before_the_model_loads(embed, tmp_path, place):
    """At once, with each option, and nothing is left behind either."""

    def not_loaded(_):
        raise AssertionError("the model must not be loaded")

    output, make = REFUSED[place]
    make_input(tmp_path)
    for name in ("precious", "precious.parquet"):
        write(tmp_path / name)
    make(tmp_path, embed)
    before = surroundings(tmp_path)
    options = [{}, {"overwrite": True}, {"resume": True}, {"shard": "0/2"}]
    for option in options[:2] if output.endswith(".parquet") else options:
        with pytest.raises((FileExistsError, ValueError)) as caught:
            embed(tmp_path, output, load=not_loaded, inputs=[str(tmp_path / "in")], **option)
        assert str(tmp_path) in str(caught.value)
        assert surroundings(tmp_path) == before


@pytest.fixture
def run_with_fault(embed, stub, exit_code, monkeypatch):
    """run_with_fault(fault, folder, output, **options): embeds until the fault ends it, which is asserted."""

    def no_model(_):
        raise OSError("no such model")

    def run_with_fault(fault, folder, output, **options):
        if fault is None:
            embed(folder, output, **options)
        elif isinstance(fault, signal.Signals):
            status = exit_code(lambda: embed_with_signal(embed, stub.StubEncoder(), fault, folder, output, **options))
            assert status == (-fault if fault == signal.SIGKILL else 128 + fault)
        elif fault == "bad row":
            with pytest.raises(RowError):
                embed(folder, output, **options, on_error="fail")
        elif fault == "missing column":
            with pytest.raises(ValueError, match=r'no column \'title\'|text_column was "text", is "title"'):
                embed(folder, output, **options, text_column="title")
        elif fault == "missing model":
            with pytest.raises(OSError, match="no such model"):
                embed(folder, output, **options, load=no_model)
        elif fault == "full disk":
            with monkeypatch.context() as patch:
                patch.setattr(outputs, "open_locked", on_full_disk(outputs.open_locked))
                with pytest.raises(OSError, match="No space left"):
                    embed(folder, output, **options)

    return run_with_fault


def on_full_disk(open_locked):
    """`open_locked` of files for which there is no more room after some bytes, wherever they are written."""
    num_bytes = [0]

    class FullDisk:
        def __init__(self, handle):
            self._handle = handle

        def __getattr__(self, name):
            return getattr(self._handle, name)

        def write(self, data) -> int:
            num_bytes[0] += len(data)
            if num_bytes[0] > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._handle.write(data)

    return lambda path, **options: FullDisk(open_locked(path, **options))


def embed_with_signal(embed, encoder, number, folder, output, **options):
    """As the command does, and the signal comes with the second call of the encoder."""
    encode, calls = encoder.encode_tokenized, []

    def encode_tokenized(*arguments, **named):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return encode(*arguments, **named)

    encoder.encode_tokenized = encode_tokenized
    with cli_shared.one_line_errors():
        embed(folder, output, encoder=encoder, **options)


FAULTS = ["bad row", "missing column", "missing model", "full disk"]
FAULTS += [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL, None]


def half_an_own_folder(folder, embed):
    embed(folder, "out")
    for name in ("out/part-00001.parquet", "out/_shards/00002.json", "out.errors.jsonl"):
        (folder / name).unlink()


@pytest.mark.parametrize("fault", FAULTS, ids=str)
@pytest.mark.parametrize(
    ("output", "make", "option"),
    [
        ("out.parquet", lambda f, embed: None, {}),
        ("out.parquet", lambda f, embed: embed(f, "out.parquet"), {"overwrite": True}),
        ("out", lambda f, embed: None, {}),
        ("out", lambda f, embed: embed(f, "out"), {"overwrite": True}),
        ("out", half_an_own_folder, {"overwrite": True}),
        ("out", half_an_own_folder, {"resume": True}),
    ],
)
def test_a_run_leaves_what_it_did_not_write(embed, run_with_fault, tmp_path, output, make, option, fault):
    """Wherever it ends; and of a file that was to be overwritten all is left, unless the run succeeds."""
    make_input(tmp_path)
    make(tmp_path, embed)
    for name in ("precious.parquet", "out.txt", "errors.jsonl", ".errors.jsonl.partial", "out.parquet.bak"):
        write(tmp_path / name)
    link(tmp_path / "in" / "link", "../precious.parquet")
    before = surroundings(tmp_path)
    run_with_fault(fault, tmp_path, output, **option)
    after = surroundings(tmp_path)
    own = re.compile(rf"{output}(\.errors\.jsonl|/.*)?")
    at_once = fault in ("missing column", "missing model")
    kept_whole = at_once or (output == "out.parquet" and fault is not None)
    for name, content in before.items():
        assert after.get(name) == content or (own.fullmatch(name) and not kept_whole), name
    left = {name for name in after if not own.fullmatch(name)} - before.keys()
    killed = {".out.parquet.partial", ".out.parquet.errors.jsonl.partial"} if output == "out.parquet" else set()
    assert left == (killed if fault == signal.SIGKILL else set())
    assert fault == signal.SIGKILL or not [name for name in after.keys() - before.keys() if name.endswith(".partial")]


@pytest.mark.parametrize("name", ["out.parquet", "out.parquet.errors.jsonl", "out.errors.jsonl"])
def test_what_somebody_else_writes_at_the_output_meanwhile_is_kept(embed, stub, tmp_path, name):
    make_input(tmp_path)
    path, output = tmp_path / name, name.removesuffix(".errors.jsonl")

    class Meanwhile(stub.StubEncoder):
        def get_embedding_dimension(self):
            path.write_text("precious")
            return super().get_embedding_dimension()

    with pytest.raises(FileExistsError, match=r"exists; --overwrite replaces it|nothing that this command wrote"):
        embed(tmp_path, output, encoder=Meanwhile())
    assert path.read_text() == "precious"
    assert not list(tmp_path.glob(".*"))
    if output.endswith(".parquet"):  # what was computed is not lost; a folder keeps its shards
        assert len(pq.read_table(tmp_path / "out-1.parquet")) == 29
        assert len((tmp_path / "out-1.parquet.errors.jsonl").read_text().splitlines()) == 1


def test_an_own_errors_file_needs_overwrite_too(embed, tmp_path):
    make_input(tmp_path)
    for output in ("out.parquet", "out"):
        embed(tmp_path, output)
        os.rename(tmp_path / output, tmp_path / f"moved-{output}")
        errors = (tmp_path / f"{output}.errors.jsonl").read_bytes()
        with pytest.raises(FileExistsError, match=r"errors\.jsonl exists; --overwrite replaces it"):
            embed(tmp_path, output, limit=5)
        assert (tmp_path / f"{output}.errors.jsonl").read_bytes() == errors
        embed(tmp_path, output, limit=5, overwrite=True)
        assert not (tmp_path / f"{output}.errors.jsonl").exists()
