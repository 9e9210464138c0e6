"""Several processes on one job: all of them are heard of, and what one does when it dies or hangs loses nothing."""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from bivec import cli_shared
from bivec.serving import manifest, workers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals")


def test_two_workers_and_one_that_is_killed(start, texts, tmp_path):
    """What one worker wrote, two did alike, and after the death of one of them a resumed job."""
    texts.write_text(texts.read_text().replace("text 33\n", "text 33 <die once>\n").replace("0\n", "0 <long>\n"))
    environment = {"DIED": str(tmp_path / "died")}
    process = start(texts, "--output", tmp_path / "out", "--workers", 2, pause_at=0, **environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "died with exit status -9; what is done is kept, and --resume goes on" in err
    assert err.count("\n") == 1
    for name, options in {"out": ["--resume", "--workers", 2], "two": ["--workers", 2], "one": []}.items():
        process = start(texts, "--output", tmp_path / name, *options, pause_at=0, **environment)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert "written 50 (5 cut at --max-length) + failed 0" in out or name == "out"
    assert pq.read_table(tmp_path / "one").equals(pq.read_table(tmp_path / "two"))
    assert pq.read_table(tmp_path / "one").equals(pq.read_table(tmp_path / "out"))
    assert pq.read_table(tmp_path / "one").num_rows == 50


def test_what_the_first_worker_measures_holds_for_all(start, texts, tmp_path):
    process = start(texts, "--output", tmp_path / "out", "--workers", 3, pause_at=0, MEASURED=str(tmp_path / "made"))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert manifest.Manifest.read(tmp_path / "out").configuration["encoder"]["dtype"] == "bfloat16"
    assert pq.read_table(tmp_path / "out").num_rows == 50


def test_workers_tell_of_each_pass(start, texts, tmp_path):
    process = start(texts, "--output", tmp_path / "out", "--workers", 2, pause_at=0, SHOW_PASSES="1")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    passes = [line.split()[1:] for line in out.splitlines() if line.startswith("pass ")]
    assert [sum(map(int, column)) for column in zip(*passes, strict=True)] == [50, 150]


def test_passes_are_told_twice_a_second(monkeypatch):
    now, told = [10.0], []
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    reporter = workers._Reporter(SimpleNamespace(send=told.append))
    for seconds in (0.0, 0.1, 0.3, 0.2, 0.1):
        now[0] += seconds
        reporter.progress(1, 10)
    reporter.done("a shard")
    assert told == [(1, 10), (3, 30), "a shard"]


def test_a_worker_that_hangs(start, texts, tmp_path):
    """It ends itself and says where it stood, and a resumed job goes on."""
    texts.write_text(texts.read_text().replace("text 33\n", "text 33 <hang once>\n"))
    given = (texts, "--output", tmp_path / "out", "--workers", 2)
    environment = {"DIED": str(tmp_path / "hung")}
    process = start(*given, pause_at=0, SILENCE="5", **environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Timeout (0:00:05)!" in err
    assert "in hang" in err
    assert "died with exit status 1; what is done is kept, and --resume goes on" in err
    process = start(*given, "--resume", pause_at=0, **environment)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert pq.read_table(tmp_path / "out").num_rows == 50


def test_a_worker_that_is_slow_is_left_alone(monkeypatch):
    """What the watchdog asks of the interpreter, call by call."""
    calls, now = [], [0.0]
    monkeypatch.setattr(workers.faulthandler, "dump_traceback_later", lambda *_, **__: calls.append("set"))
    monkeypatch.setattr(workers.faulthandler, "cancel_dump_traceback_later", lambda: calls.append("cancelled"))
    monkeypatch.setattr(workers.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(workers, "_SILENCE_SECONDS", 100.0)
    watchdog = workers.Watchdog()
    for step, seconds in [("taken", 0), ("progress", 0.5), ("progress", 2), ("taken", 0), ("done", 50), ("done", 0)]:
        now[0] += seconds
        getattr(watchdog, step)(*([7] if step == "taken" else []))
    watchdog.progress()
    assert calls == ["set", "set", "set", "set", "cancelled"]


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers in /proc")
def test_a_terminal_that_closes_reaches_the_workers_too(start, texts, tmp_path):
    """They go on until the parent ends them, and so remove what is not done."""
    process = start(texts, "--output", tmp_path / "out", "--workers", 2, pause_at=2)
    while process.poll() is None and not list((tmp_path / "out").rglob("*.parquet.partial")):
        time.sleep(0.01)
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (129, "")
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_what_ends_a_command_ends_it_once():
    """A second signal does not interrupt the clean-up; a SIGHUP that nohup has put aside stays so."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    cleaned_up = []

    def work():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            cleaned_up.append(True)

    with pytest.raises(SystemExit) as caught, cli_shared.one_line_errors():
        work()
    assert (caught.value.code, cleaned_up) == (143, [True])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli_shared.one_line_errors():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before[1])


@pytest.mark.parametrize(
    ("value", "cores"),
    [("6", 3), ("6,2", 3), (" 6 , 2,1", 3), ("1", 1), ("", 4), ("0", 4), ("many", 4), ("-2", 4), ("2.5", 4)],
)
def test_workers_share_the_cores(monkeypatch, value, cores):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert list(workers._environments("cpu", 2)) == [{"OMP_NUM_THREADS": str(cores)}] * 2


def test_a_workers_bad_row_is_one_line(start, tmp_path):
    (tmp_path / "in.txt").write_text("fine\n" * 15 + "<none>\n" + "fine\n" * 15)
    process = start(tmp_path / "in.txt", "--output", tmp_path / "out", "--workers", 2, pause_at=0)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (1, f"error: {tmp_path}/in.txt:16: it leaves no token\n")


@pytest.mark.slow
def test_ray_with_a_worker_that_is_killed(start, texts, tmp_path):
    pytest.importorskip("ray")
    texts.write_text(texts.read_text().replace("text 33\n", "text 33 <die once>\n"))
    for name, options in {"ray": ["--ray", "local", "--workers", 2], "one": []}.items():
        process = start(texts, "--output", tmp_path / name, *options, pause_at=0, DIED=str(tmp_path / "died"))
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err
        assert (tmp_path / "died").exists()
    assert pq.read_table(tmp_path / "one").equals(pq.read_table(tmp_path / "ray"))
