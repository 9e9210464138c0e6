"""The job with a stub for the model: rows in order, counts that add up, and nothing left behind."""

import json
import os
import signal
import sys
import time
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bivec.serving import job, shards
from bivec.serving.job import run
from bivec.serving.settings import EmbedSettings
from bivec.texts.rows import RowError


@pytest.fixture
def embed(stub, tmp_path):
    """embed(*inputs, **settings) -> summary; the output is tmp_path/out.parquet unless named."""

    def embed(*inputs, encoder=None, **arguments):
        arguments = {"output": str(tmp_path / "out.parquet"), "model": "stub", **arguments}
        chosen = EmbedSettings(inputs=[str(path) for path in inputs], **arguments)
        return run(chosen, lambda _: encoder or stub.StubEncoder())

    return embed


def vectors_by_id(path) -> dict[str, list]:
    table = pq.read_table(path)
    ids = table["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, table["embedding"].to_pylist(), strict=True))


def not_loaded(_):
    raise AssertionError("the model must not be loaded")


@pytest.mark.parametrize("window", [1, 7, 50, 8192])
@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_vectors_belong_to_their_texts_in_input_order(embed, stub, texts, tmp_path, monkeypatch, window, name):
    monkeypatch.setattr(shards, "_WINDOW_ROWS", window)
    summary = embed(texts, output=str(tmp_path / name))
    assert (summary.num_read, summary.num_written, summary.num_failed, summary.num_tokens) == (50, 50, 0, 150)
    found = vectors_by_id(tmp_path / name)
    assert list(found) == [f"in.txt:{n + 1}" for n in range(50)]
    assert list(found.values()) == [stub.vector_of(f"text {n}").tolist() for n in range(50)]
    assert sorted(os.listdir(tmp_path)) == sorted([name, "in.txt"])


def test_long_texts_end_a_window_early(embed, stub, texts, monkeypatch):
    monkeypatch.setattr(shards, "_WINDOW_CHARACTERS", 13)
    encoder = stub.StubEncoder()
    embed(texts, encoder=encoder)
    assert {len(call["texts"]) for call in encoder.calls[:-1]} == {2, 3}


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_texts_that_are_cut_are_counted_wherever_they_stand(embed, tmp_path, monkeypatch, name):
    """Also one that stands there twice, in another window or shard; one that has no vector is failed, not cut."""
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 3)
    monkeypatch.setattr(job, "ROWS_PER_SHARD", 7)
    lines = ["<long> a", "short", "<long> a", "<long> b", "<long> <none>", "<long> a", "x", "<long> <nan>", "<long> b"]
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in lines))
    summary = embed(tmp_path / "in.txt", output=str(tmp_path / name), on_error="skip")
    assert (summary.num_written, summary.num_failed, summary.num_cut) == (7, 2, 5)
    assert str(summary).startswith("read 9 = written 7 (5 cut at --max-length) + failed 2 in ")
    if name == "out":
        records = [json.loads(path.read_text()) for path in sorted((tmp_path / "out" / "_shards").glob("*.json"))]
        assert [record["num_cut"] for record in records] == [4, 1]


def test_the_bars_rate_leaves_out_what_loading_took(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with job._Progress(SimpleNamespace(shards=[]), job.Summary("out")) as progress:
        time.sleep(0.5)
        progress.start()
        progress.on_pass(1, 1000)
        rate = progress._bar.postfix
    assert rate.endswith(" tokens/s")
    assert int(rate.partition(" ")[0].replace(",", "")) > 2000


def test_settings_reach_the_encoder_and_the_provenance(embed, stub, texts, tmp_path):
    encoder = stub.StubEncoder()
    embed(
        texts,
        encoder=encoder,
        instruction="as:",
        pooling="mean",
        normalize=True,
        truncate_dim=5,
        precision="int8",
        adapters=["a", "b"],
    )
    assert (encoder.calls[0]["prompt"], encoder.calls[0]["normalize"]) == ("as: ", True)
    schema = pq.read_schema(tmp_path / "out.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: int8>[5]"
    assert vectors_by_id(tmp_path / "out.parquet")["in.txt:3"] == stub.vector_of("as: text 2")[:5].tolist()
    provenance = json.loads(schema.metadata[b"bivec"])
    expected = {"model": "stub", "adapters": ["a", "b"], "prompt": "as: ", "pooling": "mean", "max_length": None}
    expected |= {"normalize": True, "truncate_dim": 5, "precision": "int8", "dtype": "auto", "attention": "auto"}
    assert expected.items() <= provenance.items()
    assert provenance["encoder"] == {"model": {"name": "stub"}}
    assert provenance["bivec"].count(".") == 2


def test_the_models_own_prompt_is_the_default_and_an_empty_one_overrides_it(embed, stub, texts, tmp_path):
    encoder = stub.StubEncoder()
    encoder.default_prompt_name = "search"
    embed(texts, encoder=encoder)
    embed(texts, encoder=encoder, instruction="", overwrite=True)
    assert [call["prompt"] for call in encoder.calls] == ["find: ", ""]


def test_several_inputs_an_id_column_and_a_limit(embed, stub, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"k": 5, "t": "five"}\n{"k": "x", "t": "ex"}\n')
    (tmp_path / "b.csv").write_text("t,k\nsix,6\nseven,7\n")
    embed(tmp_path / "a.jsonl", tmp_path / "b.csv", text_column="t", id_column="k", limit=3)
    found = vectors_by_id(tmp_path / "out.parquet")
    assert found == {"5": stub.vector_of("five").tolist(), "x": stub.vector_of("ex").tolist()} | {
        "6": stub.vector_of("six").tolist()
    }
    assert list(found) == ["5", "x", "6"]


BAD = b"one\n\nbad \xff\n<nan>\n<none>\nlast\n"


def test_skip_writes_the_good_rows_and_lists_the_bad(embed, stub, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 2)
    path = tmp_path / "in.txt"
    path.write_bytes(BAD)
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    summary = embed(path, tmp_path / "torn.parquet", on_error="skip")
    assert (summary.num_read, summary.num_written, summary.num_failed) == (7, 2, 5)
    assert "read 7 = written 2 + failed 5" in str(summary)
    assert [row.file for row in summary.unreadable] == [str(tmp_path / "torn.parquet")]
    assert vectors_by_id(tmp_path / "out.parquet") == {
        "in.txt:1": stub.vector_of("one").tolist(),
        "in.txt:6": stub.vector_of("last").tolist(),
    }
    errors = [json.loads(line) for line in (tmp_path / "out.parquet.errors.jsonl").read_text().splitlines()]
    assert [(error["line"], error["reason"]) for error in errors[:4]] == [
        (2, "the text is empty"),
        (3, "invalid UTF-8: byte 0xff at position 5"),
        (4, "its vector is not finite"),
        (5, "it leaves no token"),
    ]
    assert (errors[4]["file"], errors[4]["line"]) == (str(tmp_path / "torn.parquet"), None)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_vector_that_is_not_finite_is_never_written(embed, tmp_path, precision):
    (tmp_path / "in.txt").write_text("<nan>\nfine\n")
    with pytest.raises(RowError, match=r"in\.txt:1: its vector is not finite"):
        embed(tmp_path / "in.txt", precision=precision)
    embed(tmp_path / "in.txt", precision=precision, on_error="skip")
    (vector,) = vectors_by_id(tmp_path / "out.parquet").values()
    assert np.isfinite(np.array(vector)).all()


def test_all_rows_failing_makes_an_empty_output_and_says_so(embed, tmp_path):
    (tmp_path / "in.txt").write_text("\n<none>\n")
    summary = embed(tmp_path / "in.txt", on_error="skip")
    assert (summary.num_read, summary.num_written, summary.num_failed) == (2, 0, 2)
    assert pq.read_table(tmp_path / "out.parquet").num_rows == 0


@settings(max_examples=30, derandomize=True, deadline=None)
@given(
    st.lists(st.sampled_from(["a text", "", "   ", "<nan>", "<none>", None]), min_size=1, max_size=20),
    st.integers(1, 8),
    st.integers(1, 25),
)
def test_read_is_written_plus_failed(stub, tmp_path_factory, rows, window, limit):
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(shards, "_WINDOW_ROWS", window)
        (folder / "in.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
        chosen = EmbedSettings(
            inputs=[str(folder / "in.jsonl")],
            output=str(folder / "out.parquet"),
            model="stub",
            on_error="skip",
            limit=limit,
        )
        summary = run(chosen, lambda _: stub.StubEncoder())
    good = [f"in.jsonl:{line}" for line, row in enumerate(rows[:limit], start=1) if row == "a text"]
    assert list(vectors_by_id(folder / "out.parquet")) == good
    assert summary.num_read == len(rows[:limit]) == summary.num_written + summary.num_failed
    errors = folder / "out.parquet.errors.jsonl"
    lines = [json.loads(line)["line"] for line in errors.read_text().splitlines()] if errors.exists() else []
    assert lines == [line for line, row in enumerate(rows[:limit], start=1) if row != "a text"]


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_fail_stops_at_the_first_bad_row_before_the_model_loads(texts, tmp_path, name):
    with texts.open("ab") as stream:
        stream.write(b"\n\n")
    chosen = EmbedSettings(inputs=[str(texts)], output=str(tmp_path / name), model="stub")
    with pytest.raises(RowError) as caught:
        run(chosen, not_loaded)
    assert str(caught.value) == f"{texts}:51: the text is empty"
    assert os.listdir(tmp_path) == ["in.txt"]


def test_fail_on_a_row_that_only_the_encoder_refuses_leaves_no_file(embed, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 2)
    (tmp_path / "in.txt").write_text("a\nb\nc\n<none>\n")
    with pytest.raises(RowError, match=r"in\.txt:4: it leaves no token$"):
        embed(tmp_path / "in.txt")
    assert os.listdir(tmp_path) == ["in.txt"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"inputs": ["missing.txt"]}, FileNotFoundError, "no such file"),
        ({"inputs": ["bad.jsonl"]}, ValueError, r"no column 'text'; its columns are 'id', 'title'"),
        ({"inputs": ["bad.jsonl"], "text_column": "title", "id_column": "id"}, ValueError, "must be unique"),
        ({"inputs": ["bad.jsonl"], "text_column": "title", "id_column": "key"}, ValueError, "no column 'key'"),
        ({"output": "missing/out.parquet"}, FileNotFoundError, "does not exist"),
        ({"output": "old.parquet"}, FileExistsError, "exists; --overwrite replaces it"),
        ({"output": "old.parquet", "overwrite": True}, FileExistsError, "it is nothing that this command wrote"),
        ({"output": "old.txt", "overwrite": True}, FileExistsError, "is not a folder"),
        ({"output": "in.txt", "overwrite": True}, ValueError, "the output would overwrite the input"),
        ({"output": "/proc/self/out.parquet"}, OSError, "/proc/self"),
        ({"limit": 0}, ValueError, "limit must be at least 1, got 0"),
    ],
)
def test_what_cannot_work_is_refused_before_the_model_loads(texts, tmp_path, arguments, error, message):
    (tmp_path / "bad.jsonl").write_text('{"id": 1, "title": "a"}\n{"id": 1, "title": "b"}\n')
    for name in ("old.parquet", "old.txt"):
        (tmp_path / name).write_bytes(b"precious")
    before = sorted(os.listdir(tmp_path))
    arguments = {"inputs": [texts.name], "output": "out.parquet", "model": "stub", **arguments}
    arguments["inputs"] = [str(tmp_path / name) for name in arguments["inputs"]]
    arguments["output"] = str(tmp_path / arguments["output"])
    with pytest.raises(error, match=message):
        run(EmbedSettings(**arguments), not_loaded)
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / "old.parquet").read_bytes() == b"precious"


def test_a_truncation_beyond_the_vector_is_refused_before_old_shards_are_removed(embed, texts, tmp_path):
    embed(texts, output=str(tmp_path / "out"))
    with pytest.raises(ValueError, match="truncate_dim must be from 1 to 8, got 9"):
        embed(texts, output=str(tmp_path / "out"), overwrite=True, truncate_dim=9)
    assert pq.read_table(tmp_path / "out").num_rows == 50


def test_an_input_that_vanishes_after_the_check_is_a_failure_with_its_name(stub, texts, tmp_path):
    def load(_):
        texts.unlink()
        return stub.StubEncoder()

    with pytest.raises(OSError, match=r"in\.txt: the file was changed or removed after it was checked"):
        run(EmbedSettings(inputs=[str(texts)], output=str(tmp_path / "out.parquet"), model="stub"), load)
    assert os.listdir(tmp_path) == []


def test_kill_9_leaves_nothing_under_the_final_name_and_the_next_run_cleans_up(start, texts, tmp_path):
    name = "out.parquet"
    process = start(texts, "--output", tmp_path / name, pause_at=3)
    process.kill()
    process.communicate()
    assert not list(tmp_path.rglob("*.parquet")), "a file under a final name"
    assert list(tmp_path.rglob(".*.partial")), "the kill came too late to show anything"
    process = start(texts, "--output", tmp_path / name, pause_at=0)
    out, _ = process.communicate()
    assert process.returncode == 0
    assert out.startswith("read 50 = written 50 + failed 0 in ")
    assert len(vectors_by_id(tmp_path / name)) == 50
    assert sorted(os.listdir(tmp_path)) == sorted(["in.txt", name])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_an_interrupt_removes_temporary_files(start, texts, tmp_path, number, status):
    name = "out.parquet"
    process = start(texts, "--output", tmp_path / name, pause_at=3)
    before = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == status
    assert time.monotonic() - before < 10
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["in.txt"]


@pytest.mark.parametrize("target", ["out.parquet", "out"])
def test_names_and_surroundings_change_no_row(start, stub, tmp_path, target):
    """Spaces, other scripts and links in paths; a locale without UTF-8, a time zone, a mask that hides from others."""
    folder = tmp_path / "a folder" / "Grüße 世界"
    folder.mkdir(parents=True)
    lines = [f"München 北京 {n}" for n in range(30)]
    (folder / "a [b] {c} *.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    surroundings = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "TZ": "Pacific/Chatham"}
    umask = os.umask(0o077)
    try:
        given = (folder / "a [b] {c} *.txt", "--output", folder / "link" / target)
        process = start(*given, pause_at=0, **surroundings)
        assert process.wait(60) == 0, process.communicate()[1]
    finally:
        os.umask(umask)
    found = vectors_by_id(tmp_path / "elsewhere" / target)
    assert found == {f"a [b] {{c}} *.txt:{n + 1}": stub.vector_of(line).tolist() for n, line in enumerate(lines)}
    assert (tmp_path / "elsewhere" / target).stat().st_mode & 0o077 == 0


def test_two_runs_on_one_output(start, texts, tmp_path):
    first = start(texts, "--output", tmp_path / "out.parquet", pause_at=1)
    second = start(texts, "--output", tmp_path / "out.parquet", pause_at=0)
    _, err = second.communicate()
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert err.startswith("error: ")
    assert "another run is writing this output" in err


@pytest.mark.parametrize("on_terminal", [True, False])
def test_progress_only_on_a_terminal(embed, texts, capsys, monkeypatch, on_terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    with texts.open("ab") as stream:
        stream.write(b"\nlast\n")
    embed(texts, on_error="skip")
    _, err = capsys.readouterr()
    if on_terminal:
        assert "52/52 [" in err  # a bad row is done with, too
        assert "texts/s" in err
        assert "tokens/s" in err
    else:
        assert err == ""
