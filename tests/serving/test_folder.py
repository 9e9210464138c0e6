"""The folder of a job: who may write it, what of it is believed, and which places it may not have."""

import json
import os
import signal
import sys
import warnings
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from bivec.serving import job, shards
from bivec.serving.job import run
from bivec.serving.settings import EmbedSettings

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="forks")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(job, "ROWS_PER_SHARD", 10)
    monkeypatch.setattr(shards, "_WINDOW_ROWS", 5)


@pytest.fixture
def embed(stub, tmp_path):
    """embed(**settings): 30 rows of which one fails, into tmp_path/out, which with them is there before."""

    def embed(encoder=None, load=None, **changes):
        settings = {"inputs": [str(tmp_path / "in" / "a.jsonl")], "output": str(tmp_path / "out"), "model": "stub"}
        settings = EmbedSettings(**{**settings, "on_error": "skip", "device": "cpu", **changes})
        return run(settings, load or (lambda _: encoder or stub.StubEncoder()))

    make_input(tmp_path)
    return embed


def make_input(folder: Path) -> None:
    (folder / "in").mkdir(parents=True)
    lines = [json.dumps({"text": "<none>" if n == 17 else f"text {n}"}) + "\n" for n in range(30)]
    (folder / "in" / "a.jsonl").write_text("".join(lines))


def contents(folder: Path) -> dict[str, bytes]:
    paths = [*folder.glob("out*/*.parquet"), *folder.glob("out*.jsonl")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def not_loaded(_):
    raise AssertionError("the model must not be loaded")


@pytest.mark.parametrize("number", [0, 2])
def test_a_shard_with_a_flipped_byte_is_done_again(embed, tmp_path, number):
    embed()
    before = contents(tmp_path)
    part = tmp_path / "out" / f"part-{number:05d}.parquet"
    damaged = bytearray(part.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    part.write_bytes(damaged)
    with pytest.warns(UserWarning, match=rf"out: not as written, and done again: {part.name} \(1\)$") as told:
        summary = embed(resume=True)
    assert (summary.num_read, summary.num_shards_before, len(told)) == (10, 2, 1)
    assert contents(tmp_path) == before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert embed(resume=True).num_read == 0


def edit(tmp_path, **changes) -> None:
    path = tmp_path / "out" / "_manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": [[0, [0, 0], 10], [0, [20, 420], 10]]},
        {"shards": [[0, [0, 0], 10], [0, [10, 170], 5], [0, [20, 420], 10]]},
        {"shards": [[0, [0, 0], 10], [0, [0, 0], 10], [0, [20, 420], 10]]},
        {"shards": []},
        {"shards": 7},
        {"shards": [[0, 0, 0]]},
        {"inputs": [3]},
        {"configuration": None},
        {"sha256": None},
    ],
)
def test_a_manifest_that_was_edited_is_not_believed(embed, tmp_path, changes):
    embed()
    before = contents(tmp_path)
    edit(tmp_path, **changes)
    for option in ({"resume": True}, {"shard": "0/2"}):
        with pytest.raises(ValueError, match=r"_manifest\.json was changed since the job began; --overwrite begins"):
            embed(load=not_loaded, **option)
    assert contents(tmp_path) == before
    embed(overwrite=True)
    assert contents(tmp_path) == before


def test_a_manifest_that_is_laid_out_otherwise_is_the_same(embed, tmp_path):
    embed()
    edit(tmp_path)
    assert embed(resume=True).num_read == 0


def test_a_manifest_of_another_format_is_refused(embed, tmp_path):
    embed()
    edit(tmp_path, format=1)
    with pytest.raises(ValueError, match="has format 1, this version of bivec reads 3"):
        embed(resume=True)


@pytest.mark.parametrize(
    "text", ["", "3", "null", "[]", '"x"', "{}", '{"format": 2}', "{", "\udcff", "[" * 10**5, '{"a":' * 10**5, "NaN"]
)
def test_a_manifest_that_is_none_is_one_line(embed, tmp_path, text):
    """Also with --overwrite: whose it is nobody knows."""
    embed()
    (tmp_path / "out" / "_manifest.json").write_text(text, errors="surrogateescape")
    before = contents(tmp_path)
    for option in ({}, {"resume": True}, {"overwrite": True}, {"shard": "0/2"}):
        with pytest.raises(ValueError, match=r"_manifest\.json is damaged, or bivec did not write it") as caught:
            embed(load=not_loaded, **option)
        assert "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_a_shard_whose_record_is_none_is_done_again(embed, tmp_path):
    embed()
    before = contents(tmp_path)
    path = tmp_path / "out" / "_shards" / "00001.json"
    record = json.loads(path.read_text())
    assert (record["num_written"], len(record["bad_rows"])) == (9, 1)
    values = (None, "x", -1, [1], {"a": 1}, [[1, 2, 3, 4, 5]])
    malformed = [{name: value} for name in record if name != "num_tokens" for value in values]
    texts = ["", "3", "null", "[]", "{}", "[" * 10**5, "\udcff", json.dumps(record | {"more": 1})]
    for text in [*texts, *(json.dumps(record | changes) for changes in malformed)]:
        path.write_text(text, errors="surrogateescape")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            summary = embed(resume=True)
        assert (summary.num_read, summary.num_written) == (10, 9), text
        assert contents(tmp_path) == before


def test_a_place_where_no_errors_file_can_be_made_needs_none(embed, tmp_path, monkeypatch):
    """As in a folder that is mounted: what stands beside it is another's."""
    (tmp_path / ".out.errors.jsonl.partial").mkdir()
    embed(limit=10)
    assert pq.read_table(tmp_path / "out").num_rows == 10


def test_a_job_killed_while_it_clears_an_earlier_one_is_overwritten_again(embed, exit_code, tmp_path):
    for point in range(1, 1000):
        embed(overwrite=True)

        def killed(point=point):
            unlink, calls = os.unlink, []

            def counted(*arguments, **named):
                calls.append(None)
                if len(calls) == point:
                    os.kill(os.getpid(), signal.SIGKILL)
                unlink(*arguments, **named)

            os.unlink = counted
            embed(overwrite=True)

        if exit_code(killed) == 0:
            break
    assert point >= 8  # three parts and records, the errors, the manifest
    embed(overwrite=True)
    assert pq.read_table(tmp_path / "out").num_rows == 29


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("in", "in/out"),
        ("in", "in/out.parquet"),
        ("in", "in/deep/out"),
        ("in/*", "in/out.parquet"),
        ("in/*/*.parquet", "in/out"),
        ("in/**", "in/deep/out"),
        ("in/**/*.parquet", "in/out"),
        ("in/*.jsonl", "in/out.parquet"),  # its errors file
        ("i*", "in"),
        ("in", "linked"),
        ("in", "elsewhere/out"),
    ],
)
def test_an_output_that_the_same_command_would_read_is_refused_at_once(tmp_path, monkeypatch, given, output):
    """Otherwise it begins, and cannot be resumed: its inputs are others then."""
    for name in ("in/a.jsonl", "in/deep/a.jsonl", "in/b.parquet", "in/deep/b.parquet", "elsewhere/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / "link").symlink_to("../elsewhere")
    (tmp_path / "linked").symlink_to("in/deep")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").touch()
    for inputs in ([given], [str(tmp_path / given)]):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(
            ValueError, match=r": the output (lies within|would be found by|would overwrite) the input "
        ):
            run(EmbedSettings(inputs=inputs, output=output, model="stub", on_error="skip"), None)
        assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "output"),
    [
        ("in/a*.jsonl", "in/out"),
        ("in/a.jsonl", "in/out.parquet"),
        ("in/*/a.jsonl", "in/out"),
        ("i[n]/**/a*l", "in/out"),
    ],
)
def test_an_output_beside_the_inputs_is_not_refused(embed, tmp_path, given, output):
    make_input(tmp_path / "in")
    for _ in range(2):
        embed(output=str(tmp_path / output), inputs=[str(tmp_path / given)], overwrite=True)
    if output == "in/out":
        assert embed(output=str(tmp_path / output), inputs=[str(tmp_path / given)], resume=True).num_read == 0


def test_no_errors_file_is_thought_of_where_a_bad_row_ends_the_job(embed, tmp_path):
    for _ in range(2):
        embed(
            inputs=[str(tmp_path / "in" / "*.jsonl")],
            output=str(tmp_path / "in" / "out.parquet"),
            on_error="fail",
            limit=10,
            overwrite=True,
        )


def test_shares_of_two_counts_at_once_are_refused(embed, stub, tmp_path):
    """Shard 1 belongs to 1/2 and to 1/3: one would remove what the other has just finished."""
    done = []

    class Other(stub.StubEncoder):
        def get_embedding_dimension(self):
            if not done:
                done.append(embed(shard="0/2"))
                with pytest.raises(FileExistsError, match=r"in 2 shares, not 3 \(process \d+ on "):
                    embed(shard="1/3")
            return super().get_embedding_dimension()

    embed(shard="1/2", encoder=Other())
    assert done[0].num_shards_left == 1
    (tmp_path / "out" / "part-00001.parquet").unlink()
    assert embed(shard="1/3").num_read == 10
    assert pq.read_table(tmp_path / "out").num_rows == 29
