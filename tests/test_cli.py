"""The command as a user meets it: help at once, mistakes in one line, the main job from start to end."""

import json
import re
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import bivec
from bivec import cli
from bivec.engine.run_folder import RunDescription
from bivec.serving import job

PASSAGES = Path(__file__).parents[1] / "examples" / "passages.txt"


def command(*arguments) -> subprocess.CompletedProcess:
    program = "import sys; from bivec.cli import main; sys.argv[0] = 'bivec'; main()"
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def invoke(*arguments):
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["embed", "--help"], ["inspect", "-h"], ["evaluate", "sts", "--help"], ["--version"], []],
)
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys; from bivec.cli import app\n"
        "heavy = {'torch', 'transformers', 'pyarrow', 'numpy', 'tqdm', 'rich', 'sklearn', 'scipy', 'matplotlib'}\n"
        f"try: app({arguments!r})\n"
        "finally: print(heavy & set(sys.modules), file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stderr.splitlines()[-1] == "set()"


def test_help_answers_within_half_a_second():
    """Of processor time: the wall clock would measure whoever else uses the machine."""

    def seconds() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert command("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime

    assert min(seconds() for _ in range(3)) < 0.5


def test_help_teaches_with_an_example_of_each_command():
    assert "embed" in invoke("--help").output
    assert "inspect" in invoke("--help").output
    assert "bivec embed examples/passages.txt --output embeddings.parquet" in invoke("embed", "--help").output
    assert "bivec inspect --model" in invoke("inspect", "--help").output
    for name in ("sts", "classification", "generation", "anisotropy", "compare"):
        assert name in invoke("evaluate", "--help").output
        assert "Example: bivec evaluate" in invoke("evaluate", name, "--help").output


def test_version():
    assert invoke("--version").output == f"bivec {bivec.__version__}\n"


@pytest.mark.parametrize(
    ("name", "content", "arguments", "status", "message"),
    [
        ("missing.txt", None, [], 2, "missing.txt: no such file or folder"),
        ("in.json", b"{}", [], 2, "in.json: unknown extension"),
        ("in.jsonl", b'{"title": "a"}\n', [], 2, "in.jsonl: no column 'text'; its columns are 'title'"),
        ("in.jsonl", b'{"id": 1, "text": "a"}\n' * 2, ["--id-column", "id"], 2, "'1' is at "),
        ("in.txt", b"", [], 1, "in.txt: the file is empty"),
        ("in.txt", b"a\n\xff\n", [], 1, "in.txt:2: invalid UTF-8: byte 0xff at position 1"),
        ("in.jsonl", b'{"text": "a"}\n{"text": "b', [], 1, "in.jsonl:2: truncated last line?"),
        ("in.csv", b"text,n\na,1\nb\n", [], 1, "in.csv:3: 1 fields, but the header has 2"),
        ("in.txt", b"a\n", ["--output", "nowhere/out.parquet"], 2, "the folder 'nowhere' does not exist"),
    ],
)
def test_a_mistake_is_one_line_and_a_status(tmp_path, monkeypatch, name, content, arguments, status, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(job, "load_encoder", lambda _: pytest.fail("the model must not be loaded"))
    if content is not None:
        Path(name).write_bytes(content)
    found = invoke("embed", name, "--output", "out.parquet", *arguments)
    assert found.exit_code == status
    assert found.stdout == ""
    assert found.stderr.startswith(f"error: {message}" if message.startswith(name) else "error: ")
    assert message in found.stderr
    assert found.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ([name] if content is not None else [])


@pytest.mark.parametrize(
    "arguments",
    [["--precision", "float8"], ["--on-error", "ignore"], ["--limit", "0"], ["--pooling", "max"], ["--workers", "2"]],
)
def test_a_wrong_option_is_refused(tmp_path, arguments):
    found = invoke("embed", PASSAGES, "--output", tmp_path / "out.parquet", *arguments)
    assert found.exit_code == 2
    assert arguments[0] in found.stderr
    assert list(tmp_path.iterdir()) == []


def code_of_bivec(line: str):
    """A function of one line that stands in a module of bivec."""
    namespace = {"__name__": "bivec.any"}
    exec(f"def load(_): {line}", namespace)
    return namespace["load"]


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("raise ValueError('wrong')", 2, "wrong"),
        ("raise RuntimeError('it failed')", 1, "it failed"),
        ("raise FileNotFoundError(2, 'No such file', 'a.bin')", 2, "a.bin: No such file"),
        ("raise OSError(28, 'No space left', 'a.bin')", 1, "a.bin: No space left"),
        ("bytearray(2**62)", 1, "out of memory"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        (
            "raise TypeError('a\\nbug')",
            70,
            "internal error: TypeError: a bug (in bivec.any:1); --traceback shows where",
        ),
        # the innermost frame is bivec's own, but bivec did not mean it
        ("int('x')", 70, "internal error: ValueError: invalid literal for int() with base 10: 'x' (in bivec.any:1)"),
        ("__import__('textwrap').wrap('a', 0)", 70, "internal error: ValueError: invalid width 0 (must be > 0) (in "),
    ],
)
def test_whatever_is_raised_is_one_line_and_a_status(tmp_path, monkeypatch, line, status, message):
    monkeypatch.setattr(job, "load_encoder", code_of_bivec(line))
    found = invoke("embed", PASSAGES, "--output", tmp_path / "out.parquet", "--model", "m")
    assert (found.exit_code, found.stdout) == (status, "")
    assert found.stderr.startswith(f"error: {message}")
    assert found.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("before", [True, False])
def test_a_traceback_is_shown_on_request(tmp_path, monkeypatch, before):
    monkeypatch.setattr(job, "load_encoder", code_of_bivec("raise TypeError('a bug')"))
    arguments = ["embed", PASSAGES, "--output", tmp_path / "out.parquet", "--model", "m"]
    found = invoke("--traceback", *arguments) if before else invoke(*arguments, "--traceback")
    assert found.exit_code == 70
    assert found.stderr.startswith("Traceback (most recent call last):\n")
    assert found.stderr.endswith("\nTypeError: a bug\nerror: internal error: TypeError: a bug (in bivec.any:1)\n")
    assert "Traceback" not in invoke(*arguments).stderr


def test_lines_of_one_message_cannot_pass_for_others(tmp_path):
    found = invoke(
        "embed", "no\nerror: \x1b]0;title\x07\x9b31m\u202etxt\udcff.txt", "--output", tmp_path / "out.parquet"
    )
    message = "no\n  error: \\u001b]0;title\\u0007\\u009b31m\\u202etxt\\udcff.txt: no such file or folder\n"
    assert (found.exit_code, found.stderr) == (2, f"error: {message}")


def test_warnings_are_shown_without_controls(capsys, monkeypatch):
    monkeypatch.setattr(cli, "app", lambda: warnings.warn("\x1b[31mred\nerror: all is lost", stacklevel=1))
    monkeypatch.setattr(warnings, "showwarning", None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        cli.main()
    assert capsys.readouterr().err == "warning: \\u001b[31mred\n  error: all is lost\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "."], "output must be the name of a file or folder, got '.'"),
        (["--output", ""], "output must be the name of a file or folder, got ''"),
        (["--output", "/"], "output must be the name of a file or folder, got '/'"),
        (["--output", "a/.."], "output must be the name of a file or folder, got 'a/..'"),
        (["--device", "gpu"], "device must be auto, cpu or cuda[:N], got 'gpu'"),
        (["--device", "cpu:-1"], "device must be auto, cpu or cuda[:N], got 'cpu:-1'"),
        (["--model", "a:b"], "a:b is no folder, and cannot be a hub id (owner/name)"),
    ],
)
def test_what_can_name_nothing_is_refused(tmp_path, monkeypatch, tiny_llama_folder, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = ["--output", "out.parquet", "--model", tiny_llama_folder, *arguments]
    found = invoke("embed", PASSAGES, *given)
    assert (found.exit_code, found.stderr) == (2, f"error: {message}\n")
    assert list(tmp_path.iterdir()) == []


def test_the_default_model_is_announced_for_what_it_is(tmp_path, monkeypatch):
    def load(settings):
        raise FileNotFoundError(f"{settings.model} is not here")

    monkeypatch.setattr(job, "load_encoder", load)
    found = invoke("embed", PASSAGES, "--output", tmp_path / "out.parquet")
    note, error = found.stderr.splitlines()
    assert note.startswith("note: the default model is a demonstration of 4 million parameters")
    assert error == f"error: {bivec.DEFAULT_MODEL} is not here"
    found = invoke("embed", PASSAGES, "--output", tmp_path / "out.parquet", "--model", "other")
    assert found.stderr == "error: other is not here\n"


def test_embed_a_real_model(tiny_llama_folder, tmp_path):
    output = tmp_path / "embeddings.parquet"
    found = command("embed", PASSAGES, "--output", output, "--model", tiny_llama_folder, "--dtype", "float32")
    assert found.returncode == 0, found.stderr
    texts = PASSAGES.read_text(encoding="utf-8").splitlines()
    assert found.stdout.startswith(f"read {len(texts)} = written {len(texts)} + failed 0 in ")
    assert found.stdout.count("\n") == 1

    table = pq.read_table(output)
    encoder = bivec.Encoder.from_pretrained(tiny_llama_folder, dtype="float32")
    assert table["id"].to_pylist() == [f"passages.txt:{line}" for line in range(1, len(texts) + 1)]
    assert np.array_equal(np.array(table["embedding"].to_pylist(), np.float32), encoder.encode(texts))
    assert json.loads(table.schema.metadata[b"bivec"])["model"] == str(tiny_llama_folder)


def test_lost_lines_are_warned_of(tiny_llama_folder, tmp_path):
    content = b'text,n\n"no,1\na,"2"\nb,2\n' + b'"two\nlines"\n' * 20 + b'c,3\n"open,4\n' + b"lost,5\n" * 9
    (tmp_path / "in.csv").write_bytes(content)
    arguments = ["--output", tmp_path / "out", "--model", tiny_llama_folder, "--on-error", "skip"]
    found = invoke("embed", tmp_path / "in.csv", *arguments)
    assert found.exit_code == 0
    assert found.stdout.startswith("read 24 = written 2 + failed 22 in ")
    lines = found.stderr.splitlines()
    assert lines[0].startswith(f"warning: {tmp_path}/in.csv:2: invalid CSV: ")
    assert lines[0].endswith("; a quote makes one row of all lines from here to 3")
    assert lines[-1] == "warning: 2 more of the kind; all stand in the errors file"
    assert len(lines) == 21
    assert "never closed: all lines to the file's last, 55, are lost" in (tmp_path / "out.errors.jsonl").read_text()


def test_embed_options_are_those_of_encode(tiny_llama_folder, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"body": "one text"}\n{"body": "another one"}\n')
    options = ["--instruction", "find:", "--normalize", "--truncate-dim", "16", "--precision", "float16"]
    options += ["--pooling", "last", "--max-length", "12", "--text-column", "body", "--dtype", "float32"]
    output = tmp_path / "out"
    found = invoke("embed", tmp_path / "in.jsonl", "--output", output, "--model", tiny_llama_folder, *options)
    assert found.exit_code == 0, found.stderr
    encoder = bivec.Encoder.from_pretrained(tiny_llama_folder, pooling="last", max_length=12, dtype="float32")
    vectors = encoder.encode(
        ["one text", "another one"], prompt="find: ", normalize_embeddings=True, truncate_dim=16, precision="float16"
    )
    assert np.array_equal(np.array(pq.read_table(output)["embedding"].to_pylist(), np.float16), vectors)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_runs_instruction_is_applied_or_announced(tiny_llama_folder, tmp_path, symmetric):
    """Documents that were trained without it get none, and stderr says so; what is given is joined as in training."""
    run = tmp_path / "run"
    shutil.copytree(tiny_llama_folder, run)
    RunDescription("supervised", None, instruction="find:", symmetric_instruction=symmetric).write(run)
    encoder = bivec.Encoder.from_pretrained(run, dtype="float32")
    texts = PASSAGES.read_text(encoding="utf-8").splitlines()

    def embed(name, *options):
        output = tmp_path / name
        found = invoke("embed", PASSAGES, "--output", output, "--model", run, "--dtype", "float32", *options)
        assert found.exit_code == 0, found.stderr
        return found.stderr, np.array(pq.read_table(output)["embedding"].to_pylist(), np.float32)

    note, unasked = embed("unasked.parquet")
    assert ("note: this run was trained with 'find:' before its queries" in note) == (not symmetric)
    assert ("note: this run" in invoke("inspect", "--model", run).stderr) == (not symmetric)
    assert np.array_equal(unasked, encoder.encode(texts, prompt="find: " if symmetric else ""))
    note, asked = embed("asked.parquet", "--instruction", "find:")
    assert "note: this run" not in note
    assert np.array_equal(asked, encoder.encode_query(texts))
    assert not np.array_equal(asked, encoder.encode(texts, prompt=""))


def test_inspect(tiny_llama_folder):
    found = invoke("inspect", "--model", tiny_llama_folder)
    assert found.exit_code == 0, found.stderr
    lines = found.output.splitlines()
    pooling = next(line for line in lines if line.lstrip().startswith("pooling"))
    assert pooling.split() == ["pooling", "mean"]
    description = json.loads(invoke("inspect", "--model", tiny_llama_folder, "--dtype", "float32", "--json").output)
    assert description == json.loads(
        json.dumps(bivec.Encoder.from_pretrained(tiny_llama_folder, dtype="float32").describe(), default=str)
    )
    options = ("--dtype", "bfloat16", "--max-length", "40")
    lines = invoke("inspect", "--model", tiny_llama_folder, *options).stdout.splitlines()
    cost = next(line for line in lines if line.lstrip().startswith("cosine with float32"))
    assert re.fullmatch(
        r"least (0|1)\.\d{4}, median (0|1)\.\d{4} \(24 built-in sentences\)", cost.split("  ")[-1].strip()
    )


def test_export(tiny_llama_folder, tmp_path):
    found = invoke("export", "--model", tiny_llama_folder, "--pooling", "last", "--output", tmp_path / "out")
    assert (found.exit_code, found.stdout) == (0, f"{tmp_path / 'out'}\n"), found.stderr
    assert bivec.Encoder.from_pretrained(tmp_path / "out").pooling == "last"
    again = invoke("export", "--model", tiny_llama_folder, "--output", tmp_path / "out")
    assert (again.exit_code, again.stderr) == (2, f"error: {tmp_path / 'out'} exists and is no empty folder\n")


def test_an_export_is_found_where_the_readers_look(tiny_llama_folder, tmp_path, monkeypatch):
    """A shell leaves the tilde of `--output=~/out` as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    found = invoke("export", "--model", tiny_llama_folder, "--output=~/out")
    assert (found.exit_code, found.stdout) == (0, f"{tmp_path / 'out'}\n"), found.stderr


def test_the_table_is_aligned():
    description = {"model": {"name": "x\n\x1b[2J", "hidden size": 64}, "prompts": {}, "self-test": "passed"}
    assert list(cli._table(description)) == [
        "model",
        "  name         x\\n\\u001b[2J",
        "  hidden size  64",
        "prompts        none",
        "self-test      passed",
    ]
