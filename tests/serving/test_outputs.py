"""What `bivec embed` may not touch: whatever is there, whatever it is told and wherever it ends.

Every file that was there before, and that an earlier run did not write, is there afterwards, byte for byte.
"""

import errno
import io
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


def foreign_parquet(path: Path, like: Path | None = None) -> None:
    """Vectors of somebody else, or ours with a column that somebody has added, which keeps our provenance."""
    if like is None:
        pq.write_table(pa.table({"id": ["a"], "embedding": [[1.0]]}), path)
    else:
        table = pq.read_table(like)
        pq.write_table(table.append_column("label", pa.array(range(len(table)))), path)


def foreign_folder(folder: Path) -> None:
    (folder / "_shards").mkdir(parents=True)
    foreign_parquet(folder / "part-00000.parquet")


# what stands at the output before, by name: each takes the folder and `embed`, and gives the output's name
def foreign_file(folder, embed):
    foreign_parquet(folder / "out.parquet")
    return "out.parquet"


def own_file_with_a_column_added(folder, embed):
    embed(folder, "out.parquet")
    foreign_parquet(folder / "out.parquet", like=folder / "out.parquet")
    return "out.parquet"


def empty_file(folder, embed):
    (folder / "out.parquet").touch()
    return "out.parquet"


def foreign_errors_beside_a_file(folder, embed):
    (folder / "out.parquet.errors.jsonl").write_text(json.dumps(FOREIGN) + "\n")
    return "out.parquet"


def foreign_errors_beside_a_folder(folder, embed):
    (folder / "out.errors.jsonl").write_text(json.dumps(FOREIGN) + "\n")
    return "out"


def empty_errors_beside_a_folder(folder, embed):
    (folder / "out.errors.jsonl").touch()
    return "out"


def link_to_a_file(folder, embed):
    (folder / "precious.parquet").write_text("precious")
    (folder / "out.parquet").symlink_to("precious.parquet")
    return "out.parquet"


def link_to_an_own_file(folder, embed):
    embed(folder, "precious.parquet")
    (folder / "out.parquet").symlink_to("precious.parquet")
    return "out.parquet"


def link_to_nothing(folder, embed):
    (folder / "out.parquet").symlink_to("nothing")
    return "out.parquet"


def link_to_nothing_for_a_folder(folder, embed):
    (folder / "out").symlink_to("nothing")
    return "out"


def link_as_a_temporary_file(folder, embed):
    (folder / "precious").write_text("precious")
    (folder / ".out.parquet.partial").symlink_to("precious")
    return "out.parquet"


def link_as_the_errors_temporary_file(folder, embed):
    (folder / "precious").write_text("precious")
    (folder / ".out.parquet.errors.jsonl.partial").symlink_to("precious")
    return "out.parquet"


def pipe_as_a_temporary_file(folder, embed):
    os.mkfifo(folder / ".out.parquet.partial")
    return "out.parquet"


def link_as_the_lock(folder, embed):
    (folder / "precious").write_text("precious")
    (folder / "out" / "_shards").mkdir(parents=True)
    (folder / "out" / "_shards" / "lock").symlink_to(folder / "precious")
    return "out"


def pipe_as_the_lock(folder, embed):
    (folder / "out" / "_shards").mkdir(parents=True)
    os.mkfifo(folder / "out" / "_shards" / "lock")
    return "out"


def link_to_a_folder_of_shards(folder, embed):
    (folder / "precious").mkdir()
    (folder / "precious" / "00000.json").write_text("precious")
    (folder / "out").mkdir()
    (folder / "out" / "_shards").symlink_to(folder / "precious")
    return "out"


def foreign_parts(folder, embed):
    foreign_folder(folder / "out")
    return "out"


def foreign_records(folder, embed):
    (folder / "out" / "_shards").mkdir(parents=True)
    for number in range(3):
        (folder / "out" / "_shards" / f"{number:05d}.json").write_text('{"num_rows": 10}')
    return "out"


def foreign_manifest(folder, embed):
    (folder / "out").mkdir()
    (folder / "out" / "_manifest.json").write_text('{"name": "my web page"}')
    return "out"


def foreign_file_in_an_own_folder(folder, embed):
    embed(folder, "out")
    (folder / "out" / "_shards" / "thesis.tex").write_text("dear")
    return "out"


def foreign_part_in_an_own_folder(folder, embed):
    embed(folder, "out")
    foreign_parquet(folder / "out" / "part-00007.parquet")
    return "out"


def the_input(folder, embed):
    return "in/a.jsonl/"


def the_input_folder(folder, embed):
    return "in"


def in_the_input_folder(folder, embed):
    return "in/out"


def own_file(folder, embed):
    embed(folder, "out.parquet")
    return "out.parquet"


def own_folder(folder, embed):
    embed(folder, "out")
    return "out"


def half_an_own_folder(folder, embed):
    embed(folder, "out")
    for name in ("part-00001.parquet", "_shards/00002.json"):
        (folder / "out" / name).unlink()
    (folder / "out.errors.jsonl").unlink()
    return "out"


def own_file_at_a_folders_errors(folder, embed):
    embed(folder, "out.errors.jsonl/")
    return "out"


REFUSED = [
    foreign_file,
    own_file_with_a_column_added,
    empty_file,
    foreign_errors_beside_a_file,
    foreign_errors_beside_a_folder,
    empty_errors_beside_a_folder,
    link_to_a_file,
    link_to_an_own_file,
    link_to_nothing,
    link_to_nothing_for_a_folder,
    link_as_a_temporary_file,
    link_as_the_errors_temporary_file,
    pipe_as_a_temporary_file,
    link_as_the_lock,
    pipe_as_the_lock,
    link_to_a_folder_of_shards,
    foreign_parts,
    foreign_records,
    foreign_manifest,
    foreign_file_in_an_own_folder,
    foreign_part_in_an_own_folder,
    the_input,
    the_input_folder,
    in_the_input_folder,
    own_file_at_a_folders_errors,
]
OWN = [own_file, own_folder, half_an_own_folder]


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


@pytest.mark.parametrize("place", REFUSED, ids=lambda place: place.__name__)
def test_what_bivec_did_not_write_is_refused_before_the_model_loads(embed, tmp_path, place):
    """At once, with each option, and nothing is left behind either."""

    def not_loaded(_):
        raise AssertionError("the model must not be loaded")

    make_input(tmp_path)
    output = place(tmp_path, embed)
    inputs = [str(tmp_path / "in")]
    before = surroundings(tmp_path)
    for option in ({}, {"overwrite": True}, {"resume": True}, {"shard": "0/2"}):
        if output.endswith(".parquet") and not option.keys() <= {"overwrite"}:
            continue
        with pytest.raises((FileExistsError, ValueError)) as caught:
            embed(tmp_path, output, load=not_loaded, inputs=inputs, **option)
        assert str(tmp_path) in str(caught.value)
        assert surroundings(tmp_path) == before


def embed_with_full_disk(embed, monkeypatch, folder, output, **options):
    num_bytes = [0]

    class FullDisk:
        """A file for which there is no more room after some bytes, wherever they are written."""

        def __init__(self, handle):
            self._handle = handle

        def __getattr__(self, name):
            return getattr(self._handle, name)

        def write(self, data) -> int:
            num_bytes[0] += len(data)
            if num_bytes[0] > 2000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._handle.write(data)

    real = outputs.open_locked
    with monkeypatch.context() as patch:
        patch.setattr(outputs, "open_locked", lambda path, **named: FullDisk(real(path, **named)))
        with pytest.raises(OSError, match="No space left"):
            embed(folder, output, **options)


def embed_with_signal(embed, stub, exit_code, number, folder, output, **options):
    encoder = stub.StubEncoder()
    encode, calls = encoder.encode_tokenized, []

    def encode_tokenized(*arguments, **named):
        calls.append(None)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return encode(*arguments, **named)

    def action():
        with cli_shared.one_line_errors():
            embed(folder, output, encoder=encoder, **options)

    encoder.encode_tokenized = encode_tokenized
    return exit_code(action)


@pytest.mark.parametrize("place", OWN, ids=lambda place: place.__name__)
def test_a_run_that_fails_leaves_what_it_did_not_write(embed, stub, exit_code, tmp_path, monkeypatch, place):
    """Each fault with each option; of a file all is left, of a folder what is not the job's."""

    def no_model(_):
        raise OSError("no such model")

    def bad_row(folder, output, **options):
        with pytest.raises(RowError):
            embed(folder, output, **options, on_error="fail")

    def missing_column(folder, output, **options):
        with pytest.raises(ValueError, match="no column 'title'"):
            embed(folder, output, **options, text_column="title")

    def missing_model(folder, output, **options):
        with pytest.raises(OSError, match="no such model"):
            embed(folder, output, **options, load=no_model)

    def full_disk(folder, output, **options):
        embed_with_full_disk(embed, monkeypatch, folder, output, **options)

    def terminated(folder, output, **options):
        assert embed_with_signal(embed, stub, exit_code, signal.SIGTERM, folder, output, **options) == 143

    def hung_up(folder, output, **options):
        assert embed_with_signal(embed, stub, exit_code, signal.SIGHUP, folder, output, **options) == 129

    def killed(folder, output, **options):
        assert embed_with_signal(embed, stub, exit_code, signal.SIGKILL, folder, output, **options) == -signal.SIGKILL

    def succeeded(folder, output, **options):
        embed(folder, output, **options)

    faults = [bad_row, missing_column, missing_model, full_disk, terminated, hung_up, killed, succeeded]
    options = [{"overwrite": True}, {"resume": True}] if place is half_an_own_folder else [{"overwrite": True}]
    for fault in faults:
        for option in options:
            folder = tmp_path / f"{fault.__name__} {'-'.join(option)}"
            make_input(folder)
            output = place(folder, embed)
            for name in ("precious.parquet", "out.txt", ".out.errors.jsonl", "errors.jsonl"):
                (folder / name).write_text("precious")
            (folder / "in" / "link").symlink_to(folder / "precious.parquet")
            before = surroundings(folder)
            monkeypatch.setattr(sys, "stderr", io.StringIO())
            if fault is missing_column and option == {"resume": True}:
                with pytest.raises(ValueError, match='text_column was "text", is "title"'):
                    missing_column_resumed(embed, folder, output)
            else:
                fault(folder, output, **option)
            after = surroundings(folder)
            own = re.compile(rf"{output}(\.errors\.jsonl|/.*)?")
            failed_early = fault in (missing_column, missing_model)
            for name, content in before.items():
                is_kept = not own.fullmatch(name) or failed_early or (place is own_file and fault is not succeeded)
                assert not is_kept or after[name] == content, (fault, option, name)
            left = {name for name in after if name not in before and not own.fullmatch(name)}
            partial = {".out.parquet.partial", ".out.parquet.errors.jsonl.partial"}
            assert left == (partial if fault is killed and place is own_file else set()), (fault, option)
            assert place is own_file or not any(".partial" in name for name in after) or fault is killed


def missing_column_resumed(embed, folder, output):
    embed(folder, output, resume=True, text_column="title")


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
