"""What README.md and docs/ say of bivec: its Python runs, its commands have the options, its fields and files exist."""

import inspect
import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bivec import Encoder, cli
from bivec.training import STAGES

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
WHICH = ("model", "adapters")
OTHERS = ("llm2vec", "sentence_transformers", "mteb")  # what is shown of theirs, or needs their data


@pytest.fixture(params=PAGES, ids=lambda path: path.stem)
def path(request) -> Path:
    return request.param


@pytest.fixture
def page(path) -> str:
    return path.read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return [block for kind, block in BLOCK.findall(page) if kind == language]


def options(command: str) -> set[str]:
    """The long options of `bivec COMMAND`; `train` has those of every stage."""
    name, _, stage = command.partition(" ")
    if name == "train":
        kinds = [STAGES[stage]] if stage in STAGES else STAGES.values()
        names = {field.name for kind in kinds for field in fields(kind)}
        return {f"--{name.replace('_', '-')}" for name in names | {"recipe", "help"}}
    found = CliRunner().invoke(cli.app, [*command.split(), "--help"])
    assert found.exit_code == 0, command
    return set(re.findall(r"--[a-z][a-z-]*", found.output))


def test_python_runs(page, tiny_llama_folder, monkeypatch):
    """With one small model in the place of every published one, and with the arguments that there are."""
    load, signature = Encoder.from_pretrained, inspect.signature(Encoder.from_pretrained)

    def from_pretrained(*arguments, **named):
        given = signature.bind(*arguments, **named).arguments
        return load(tiny_llama_folder, **{name: value for name, value in given.items() if name not in WHICH})

    monkeypatch.setattr(Encoder, "from_pretrained", from_pretrained)
    namespace: dict = {}
    for block in blocks(page, "python"):
        code = compile(block, "docs", "exec")
        if not re.search(rf"^(from|import) ({'|'.join(OTHERS)})\b", block, re.MULTILINE):
            exec(code, namespace)


def commands(page: str) -> list[tuple[str, list[str]]]:
    """`("train mntp", ["--recipe", ...])` of each bivec command in a block."""
    text = "\n".join(blocks(page, "")).replace("\\\n", " ")
    found = re.findall(r"(?:^bivec|-m bivec\.cli) ((?:train |evaluate |benchmark )?[a-z]+)(.*)$", text, re.MULTILINE)
    return [(command, re.findall(r" (--[a-z_-]+)", rest)) for command, rest in found]


def test_commands_have_their_options(page):
    for command, given in commands(page):
        assert set(given) <= options(command), command
    names = ("", "embed", "export", "inspect", "train", "evaluate sts", "evaluate ner", "benchmark embed")
    known = set.union(*map(options, names))
    for text in re.findall(r"`([^`]*)`", re.sub(BLOCK, "", page)):
        text = re.sub("^.*-m bivec.cli", "bivec", text, flags=re.DOTALL)
        named = re.match(r"bivec ((?:train |evaluate |benchmark )?[a-z]+)", text)
        given = set(re.findall(r"(?:^|\s)(--[a-z_-]+)", text))
        assert given <= (options(named[1]) if named else known), text


def test_fields_of_training_exist():
    """In the second column of the table of configurations."""
    page = (ROOT / "docs" / "migrating.md").read_text(encoding="utf-8")
    known = {field.name for stage in STAGES.values() for field in fields(stage)} | {"bert", "all_mask"}
    table = re.search(r"^\| [^|]*configuration \| field.*?\n\n", page, re.MULTILINE | re.DOTALL)
    assert table is not None
    rows = [line.split("|")[2] for line in table[0].splitlines()[2:] if line]
    named = {name for row in rows for name in re.findall(r"`([a-z_]+)`", row)}
    assert len(named) > 12
    assert named <= known


def test_files_that_are_linked_exist(path, page):
    for target in re.findall(r"\]\(([^)#]+)\)", page):
        if "://" not in target:
            assert (path.parent / target).is_file(), target
    names = set(re.findall(r"\]\[([^\]]+)\]", page))
    assert names <= set(re.findall(r"^\[([^\]]+)\]: https://", page, re.MULTILINE))
    for recipe in re.findall(r"(recipes/\S+\.yaml)", page):
        assert (ROOT / recipe).is_file(), recipe


def test_modules_that_are_named_exist(page):
    for name in re.findall(r"`(bivec(?:\.[A-Za-z_]+)+)`", page):
        module, _, attribute = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute), name
