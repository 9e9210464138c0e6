"""Whatever a command is told and however it ends: what was there before and is not its own output is there still.

Every command that writes, over places that its output may have, with and without --overwrite and --resume, where the
disk is full and where it is killed at a touch of the disk: each file that existed before is compared byte for byte.
"""

import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bivec import cli

TEXTS = ("the quick brown fox", "a lazy dog sees it", "many sequences", "the batch holds them", "over it jumps", "fox")
SIMPLE = ("--device", "cpu", "--dtype", "float32", "--max-length", "16")


class Room:
    """A folder with a model, data, a user's own files, and one command that writes to `output`."""

    def __init__(self, folder: Path, base: Path, command: str):
        self.folder, self.command = folder, command
        self.data = folder / "data"
        self.data.mkdir()
        (self.data / "texts.txt").write_text("".join(text + "\n" for text in TEXTS))
        pairs = "".join(f"{text},{TEXTS[-1 - place]},{place}\n" for place, text in enumerate(TEXTS))
        for split in ("train", "test"):
            (self.data / f"small-{split}.csv").write_text(pairs)
        self.model = folder / "model"
        shutil.copytree(base, self.model)
        (folder / "thesis.txt").write_text("years of work\n")
        (folder / "results").mkdir()
        (folder / "results" / "thesis.txt").write_text("more years of work\n")
        (folder / "reports").mkdir()
        self.output = folder / ("out.parquet" if command == "embed-file" else "out.json" if command == "sts" else "out")

    @property
    def arguments(self) -> list[str]:
        model, output = ["--model", str(self.model)], ["--output", str(self.output)]
        texts = str(self.data / "texts.txt")
        return {
            "embed-file": ["embed", texts, *model, *output, *SIMPLE],
            "embed-folder": ["embed", str(self.data / "texts.txt"), *model, *output, *SIMPLE],
            "train": ["train", "simcse", *model, "--data", texts, *output, *SIMPLE, "--max-steps", "2",
                      "--batch-size", "4", "--save-steps", "1", "--target-modules", "q_proj"],
            "export": ["export", *model, *output, "--dtype", "float32", "--max-length", "16"],
            "sts": ["evaluate", "sts", "--data", str(self.data), *model, *output, *SIMPLE],
        }[self.command]  # fmt: skip

    def run(self, *flags: str):
        return CliRunner().invoke(cli.app, [*self.arguments, *flags])

    def files(self) -> dict[str, bytes | str]:
        """Every file below the folder with its content, every link with its target."""
        found: dict[str, bytes | str] = {}
        for parent, folders, names in os.walk(self.folder):
            for path in (Path(parent, name) for name in [*names, *folders]):
                name = str(path.relative_to(self.folder))
                if path.is_symlink():
                    found[name] = os.readlink(path)
                elif path.is_file():
                    found[name] = path.read_bytes()
        return found


COMMANDS = {
    "embed-file": ["--overwrite"],
    "embed-folder": ["--overwrite", "--resume"],
    "train": ["--overwrite", "--resume"],
    "export": [],
    "sts": ["--overwrite"],
}


@pytest.fixture
def make_room(tmp_path, tiny_llama_folder):
    def make(command: str) -> Room:
        folder = tmp_path / "room"
        folder.mkdir()
        return Room(folder, tiny_llama_folder, command)

    return make


def own_and_foreign(room: Room) -> None:
    """An output of the command's own, and in it, or beside it under a name near to its own, what is not."""
    result = room.run()
    assert result.exit_code == 0, result.output
    if room.output.is_dir():
        (room.output / "thesis.txt").write_text("the thesis again\n")
        (room.output / "chapters").mkdir()
        (room.output / "chapters" / "1.txt").write_text("the first\n")


def not_a_run_but_alike(room: Room) -> None:
    room.output.mkdir()
    for name in ("log.jsonl", "config.json", "model.safetensors", "adapter_config.json", "part-00000.parquet"):
        (room.output / name).write_text(f"a {name} of somebody else\n")
    (room.output / "checkpoints").mkdir()
    (room.output / "checkpoints" / "step-1").mkdir()
    (room.output / "checkpoints" / "step-1" / "thesis.txt").write_text("in the checkpoints\n")


def input_within(room: Room) -> None:
    room.output.mkdir()
    shutil.move(room.data, room.output / "data")
    room.data = room.output / "data"


# what stands where the output is to go
PLACES = {
    "nothing": lambda room: None,
    "a file": lambda room: room.output.write_text("somebody's file\n"),
    "an empty file": lambda room: room.output.write_text(""),
    "a folder": lambda room: shutil.copytree(room.folder / "results", room.output),
    "files alike": not_a_run_but_alike,
    "its own, and others": own_and_foreign,
    "errors beside it": lambda room: Path(f"{room.output}.errors.jsonl").write_text("notes of mine\n"),
    "a link to a file": lambda room: room.output.symlink_to(room.folder / "thesis.txt"),
    "a link to a folder": lambda room: room.output.symlink_to(room.folder / "results"),
    "a link to nothing": lambda room: room.output.symlink_to(room.folder / "absent"),
    "a link as its temporary file": lambda room: room.output.with_name(f".{room.output.name}.partial").symlink_to(
        room.folder / "thesis.txt"
    ),
    "the data": lambda room: setattr(room, "output", room.data / "texts.txt"),
    "the data's folder": lambda room: setattr(room, "output", room.data),
    "within the data's folder": lambda room: setattr(room, "output", room.data / room.output.name),
    "the model": lambda room: setattr(room, "output", room.model),
    "within the model": lambda room: setattr(room, "output", room.model / room.output.name),
    "the weights": lambda room: setattr(room, "output", room.model / "model.safetensors"),
    "around the data": input_within,
    "around all": lambda room: setattr(room, "output", room.folder),
}


@pytest.mark.parametrize("flag", ["", "--overwrite", "--resume"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_lost_whatever_stands_where_the_output_goes(make_room, command, place, flag):
    if flag and flag not in COMMANDS[command]:
        pytest.skip(f"{command} has no {flag}")
    room = make_room(command)
    PLACES[place](room)
    before = room.files()
    own = own_files(room, before, place)
    result = room.run(*filter(None, [flag]))
    after = room.files()
    assert result.exit_code in (0, 1, 2), result.output
    lost = {name for name, content in before.items() if after.get(name) != content} - own
    assert not lost, (result.exit_code, result.output)
    if place == "nothing":
        assert result.exit_code == 0, result.output
        assert set(after) > set(before)


def own_files(room: Room, before: dict, place: str) -> set[str]:
    """What the command itself has written before."""
    if place != "its own, and others":
        return set()
    return {
        name for name in before if name.startswith(room.output.name) and "thesis" not in name and "1.txt" not in name
    }


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("flag", ["", "--overwrite"])
def test_nothing_is_lost_where_the_disk_is_full(make_room, command, flag, monkeypatch):
    room = make_room(command)
    if flag:
        if flag not in COMMANDS[command]:
            pytest.skip(f"{command} has no {flag}")
        assert room.run().exit_code == 0
    before = room.files()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    result = room.run(*filter(None, [flag]))
    monkeypatch.undo()
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.output
    assert str(room.output.name) in result.output  # it says where
    after = room.files()
    others = {name: content for name, content in before.items() if not name.startswith(room.output.name)}
    assert {name: after.get(name) for name in others} == others
    assert room.run(*filter(None, [flag or ("--resume" if "--resume" in COMMANDS[command] else "")])).exit_code == 0


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("num_bytes", [0, 600, 40_000])
def test_nothing_is_lost_where_a_file_cannot_grow(make_room, command, num_bytes):
    """A limit that every writer meets, those of libraries too."""
    room = make_room(command)
    before = room.files()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        result = room.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    after = room.files()
    assert {name: after.get(name) for name in before} == before
    assert result.exit_code == 1 or (result.exit_code == 0 and num_bytes), result.output
    if result.exit_code:
        assert "File too large" in result.output
        assert str(room.output.name) in result.output


@pytest.mark.parametrize("command", COMMANDS)
def test_nothing_is_lost_where_it_is_killed(make_room, command, monkeypatch, exit_code):
    """Killed at touches of the disk, a dozen over the whole run, each time on what the kill before it has left."""
    room = make_room(command)
    calls = room.folder / "reports" / "calls"
    before = room.files()
    flags = COMMANDS[command][-1:]  # --resume where there is one, else --overwrite

    def touched(at: int) -> None:
        number = 0

        def counted(function):
            def call(*arguments, **keywords):
                nonlocal number
                number += 1
                if number == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                with calls.open("a") as file:
                    file.write(".")
                return function(*arguments, **keywords)

            return call

        for name in ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync"):
            monkeypatch.setattr(os, name, counted(getattr(os, name)))
        raise SystemExit(room.run(*flags if at else []).exit_code)

    assert exit_code(lambda: touched(0)) == 0
    total = len(calls.read_text())
    calls.unlink()
    assert total > 1
    for at in sorted({1 + total * part // 12 for part in range(12)}):
        exit_code(lambda at=at: touched(at))
        calls.unlink(missing_ok=True)
        after = room.files()
        assert {name: after.get(name) for name in before} == before
