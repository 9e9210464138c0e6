"""Who embeds the shards: this process, or several of this machine, each with an encoder of its own.

The parent hands shard numbers out and hears of each that is done; what is done stands on the disk, not in its memory.
A worker that dies ends the job, and a resumed job goes on where it ended.
"""

import faulthandler
import logging
import multiprocessing
import os
import re
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from .. import __version__
from ..engine.dtype_names import kept_dtype, leaves_open
from ..texts.rows import InputFile
from .folder import ShardOutput
from .manifest import Manifest
from .readers import Shard
from .settings import EmbedSettings
from .shards import Done, Progress, RowEncoder, Rows, embed_shards

# the next shard is read and tokenised while one is computed
_OUTSTANDING = 2
_GRACE_SECONDS = 20.0
# a pass of an 8B model takes minutes on a few slow cores
_SILENCE_SECONDS = 1800.0
_REPORT_SECONDS = 0.5

Load = Callable[[EmbedSettings], RowEncoder]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All that a worker is told; it can be pickled."""

    settings: EmbedSettings
    load: Load
    files: Sequence[InputFile]
    stamps: Sequence[tuple[int, int] | None]
    inputs: list[dict[str, Any]]
    shards: list[Shard]

    def in_dtype_of(self, manifest: Manifest) -> "Plan":
        """The plan in the dtype that a manifest says, as far as the settings leave it open."""
        asked = self.settings.dtype
        dtype = kept_dtype(asked, manifest.configuration["encoder"].get("dtype", asked))
        return replace(self, settings=replace(self.settings, dtype=dtype))

    def configuration(self) -> dict[str, Any]:
        """What the vectors depend on as far as the settings say it."""
        names = ("text_column", "id_column", "limit", "normalize", "truncate_dim", "precision")
        asked = {name: getattr(self.settings, name) for name in names}
        return {"bivec": __version__, **asked}


class Watchdog:
    """Ends this process, with every thread's traceback, when it has work and gets nowhere for half an hour.

    A driver or a file system that hangs raises nothing: without this the job would wait for ever. What is heard of a
    process that has ended is what is heard of one that was killed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._outstanding = 0
        self._last = 0.0

    def taken(self, number: int) -> int:
        """A shard was taken on."""
        with self._lock:
            self._outstanding += 1
            self._set()
        return number

    def progress(self) -> None:
        """Something was done; called often, so that most calls do nothing."""
        with self._lock:
            if time.monotonic() - self._last > _SILENCE_SECONDS / 100:
                self._set()

    def done(self) -> None:
        """A shard was; without one nothing is expected."""
        with self._lock:
            self._outstanding -= 1
            self._set()

    def _set(self) -> None:
        self._last = time.monotonic()
        if self._outstanding:
            faulthandler.dump_traceback_later(_SILENCE_SECONDS, exit=True, file=2)
        else:
            faulthandler.cancel_dump_traceback_later()


class ShardWorker:
    """Loads an encoder and embeds shards with it.

    Attributes:
        manifest: of the job as this worker would do it.
    """

    def __init__(self, plan: Plan):
        settings = plan.settings
        self._encoder = plan.load(settings)
        rows, dimension = rows_and_dimension(plan, self._encoder)
        identity = {"prompt": rows.prompt, "encoder": self._encoder.identity()}
        self.manifest = Manifest(plan.configuration() | identity, plan.inputs, plan.shards)
        provenance = provenance_of(plan, rows, self._encoder) | {"configuration": self.manifest.configuration}
        self._rows = rows
        self._output = ShardOutput(Path(settings.output), dimension, settings.precision, provenance)

    def run(self, numbers: Iterable[int], on_done: Callable[[Done], object], progress: Progress | None = None) -> None:
        """Embeds shards into the output folder; what is not done when it fails leaves nothing."""
        try:
            embed_shards(self._rows, numbers, self._encoder, self._output, on_done=on_done, progress=progress)
        finally:
            self._output.abort()

    def run_watched(
        self, numbers: Iterable[int], on_done: Callable[[Done], object], progress: Progress | None = None
    ) -> None:
        """`run` in a process that is there for it alone: it ends where nothing happens for too long."""
        watchdog = Watchdog()

        def done(done: Done) -> None:
            watchdog.done()
            on_done(done)

        def passed(num_texts: int, num_tokens: int) -> None:
            watchdog.progress()
            if progress is not None:
                progress(num_texts, num_tokens)

        try:
            self.run(map(watchdog.taken, numbers), done, passed)
        finally:
            faulthandler.cancel_dump_traceback_later()


def rows_and_dimension(plan: Plan, encoder: RowEncoder) -> tuple[Rows, int]:
    """What is read and how it is embedded, and the dimension of the written vectors; ValueError for `truncate_dim`."""
    settings = plan.settings
    if settings.instruction is not None:
        from ..engine.prompts import as_prompt  # torch comes with it, which a worker's environment must precede

        prompt = as_prompt(settings.instruction)
    else:
        prompt = encoder.prompts.get(encoder.default_prompt_name or "", "")
    dimension = encoder.get_embedding_dimension()
    if settings.truncate_dim is not None and not 1 <= settings.truncate_dim <= dimension:
        raise ValueError(f"truncate_dim must be from 1 to {dimension}, got {settings.truncate_dim}")
    rows = Rows(
        files=plan.files,
        shards=plan.shards,
        stamps=plan.stamps,
        text_column=settings.text_column,
        id_column=settings.id_column,
        on_error=settings.on_error,
        prompt=prompt,
        normalize=settings.normalize,
        truncate_dim=settings.truncate_dim,
        precision=settings.precision,
    )
    return rows, settings.truncate_dim or dimension


def provenance_of(plan: Plan, rows: Rows, encoder: RowEncoder) -> dict[str, Any]:
    """What stands in every output file's schema metadata."""
    names = ("model", "adapters", "pooling", "max_length", "device", "dtype", "attention")
    asked = {name: getattr(plan.settings, name) for name in names}
    return {**plan.configuration(), **asked, "prompt": rows.prompt, "encoder": encoder.describe()}


def in_this_process(
    plan: Plan,
    numbers: Sequence[int],
    on_ready: Callable[[Manifest], object],
    on_done: Callable[[Done], object],
    progress: Progress,
) -> None:
    """Embeds shards here; `on_ready` is called before the first, with the manifest."""
    worker = ShardWorker(plan)
    on_ready(worker.manifest)
    worker.run(numbers, on_done, progress)


def in_processes(
    plan: Plan,
    numbers: Sequence[int],
    on_ready: Callable[[Manifest], object],
    on_done: Callable[[Done], object],
    progress: Progress,
    num_workers: int,
) -> None:
    """Embeds shards in `num_workers` spawned processes; `on_ready` is called with each one's manifest.

    Where a dtype is to be measured the first worker does it, and the others load in what it found.

    Raises:
        ChildProcessError: a worker died.
        RowError, ValueError, OSError: as `embed_shards`, from the first worker that failed.
    """
    context = multiprocessing.get_context("spawn")
    connections: dict[Connection, Any] = {}
    ended: set[Connection] = set()
    environments = list(_environments(plan.settings.device, num_workers))
    measured = leaves_open(plan.settings.dtype) and "CUDA_VISIBLE_DEVICES" not in environments[0]
    at_first = 1 if measured else num_workers

    def start(plan: Plan, workers: range) -> None:
        for worker in workers:
            ours, theirs = context.Pipe()
            arguments = (theirs, plan, environments[worker], worker == 0)
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            connections[ours] = process

    try:
        start(plan, range(at_first))
        left = iter(numbers)
        while len(ended) < len(connections):
            for connection in wait([connection for connection in connections if connection not in ended]):
                assert isinstance(connection, Connection)
                message = _receive(connection, connections[connection])
                if message is None:
                    ended.add(connection)
                    continue
                if isinstance(message, BaseException):
                    raise message
                if isinstance(message, _Passed):
                    progress(message.num_texts, message.num_tokens)
                    continue
                if isinstance(message, Manifest):
                    on_ready(message)
                    start(plan.in_dtype_of(message), range(len(connections), num_workers))
                else:
                    on_done(message)
                for _ in range(_OUTSTANDING if isinstance(message, Manifest) else 1):
                    _send(connection, next(left, None))
    finally:
        for connection, process in connections.items():
            connection.close()
            if connection not in ended:
                process.terminate()
        for process in connections.values():
            process.join(_GRACE_SECONDS)
            if process.is_alive():
                process.kill()
                process.join()


def _receive(connection: Connection, process: Any) -> Any:
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        process.join(_GRACE_SECONDS)
        raise ChildProcessError(
            f"a worker (process {process.pid}) died with exit status {process.exitcode}; what is done is kept, "
            "and --resume goes on from there"
        ) from None


def _send(connection: Connection, number: int | None) -> None:
    try:
        connection.send(number)
    except (BrokenPipeError, ConnectionResetError):
        return  # it has died, or has ended, which the next message tells


def _work(connection: Connection, plan: Plan, environment: dict[str, str], is_first: bool) -> None:
    """A worker's whole life: ready, shards until there are no more, end."""
    logging.getLogger(f"{__package__.removesuffix('serving')}engine.lengths").disabled = not is_first  # said once
    os.environ.update(environment)  # before torch is imported
    for number in (signal.SIGINT, signal.SIGHUP):  # a terminal sends them to all; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _terminate)
    reporter = _Reporter(connection)
    try:
        worker = ShardWorker(plan)
        connection.send(worker.manifest)
        worker.run_watched(_numbers(connection), reporter.done, reporter.progress)
        connection.send(None)
    except Exception as error:
        error.add_note("in a worker:\n" + traceback.format_exc())
        try:
            connection.send(error)
        except OSError:
            return  # the parent is gone
        except Exception:  # an exception that cannot be pickled
            plain = RuntimeError(f"{type(error).__name__}: {error}")
            plain.add_note("in a worker:\n" + "".join(traceback.format_exception(error)))
            connection.send(plain)


class _Passed(NamedTuple):
    """Texts and tokens that a worker has embedded since it last said so."""

    num_texts: int
    num_tokens: int


class _Reporter:
    """Tells the parent what is done, from the thread that computes and the one that writes; passes twice a second."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._lock = threading.Lock()
        self._passed = _Passed(0, 0)
        self._last = 0.0

    def progress(self, num_texts: int, num_tokens: int) -> None:
        self._passed = _Passed(self._passed.num_texts + num_texts, self._passed.num_tokens + num_tokens)
        if time.monotonic() - self._last > _REPORT_SECONDS:
            with self._lock:
                self._connection.send(self._passed)
            self._passed, self._last = _Passed(0, 0), time.monotonic()

    def done(self, done: Done) -> None:
        with self._lock:
            self._connection.send(done)


def _numbers(connection: Connection) -> Iterator[int]:
    while (number := connection.recv()) is not None:
        yield number


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _environments(device: str, num_workers: int) -> Iterator[dict[str, str]]:
    """What sets each worker apart: the one GPU that it sees, or its part of the cores."""
    gpus = visible_gpus() if device in ("auto", "cuda") else []
    for worker in range(num_workers):
        if gpus:
            yield {"CUDA_VISIBLE_DEVICES": gpus[worker % len(gpus)]}
        else:
            yield {"OMP_NUM_THREADS": str(max(_num_cores() // num_workers, 1))}


def _num_cores() -> int:
    """As OMP_NUM_THREADS says, of whose list (a number a level of nesting) the first counts; else what there is."""
    told = re.match(r"\s*(\d+)\s*(,|$)", os.environ.get("OMP_NUM_THREADS", ""))
    return int(told[1]) if told and int(told[1]) else len(os.sched_getaffinity(0))


def visible_gpus() -> list[str]:
    """The GPUs of this process, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (named.split(",") if named else [str(index) for index in range(count)])[:count]
