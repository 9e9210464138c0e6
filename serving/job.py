"""The embedding job: check all that can be checked, load the model, then read, embed and write.

Every row that is read is either written or failed. With `on_error="fail"` the first failure ends the job; with `"skip"`
failures go to `OUT.errors.jsonl` and the job goes on. A job into one file leaves all of it or nothing; one into a
folder keeps the shards that are done and can be resumed (`manifest.py`).
"""

import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tqdm import tqdm

from ..engine.outputs import naming, refuse_inputs
from ..texts.files import find_files
from ..texts.rows import BadRow, InputFile
from . import manifest
from .folder import OutputFolder
from .manifest import Manifest
from .readers import ROWS_PER_SHARD, Shard, check_rows, fingerprint
from .settings import EmbedSettings
from .shards import Done, FileShards, RowEncoder, embed_shards, stamp
from .workers import Load, Plan, in_processes, in_this_process, provenance_of, rows_and_dimension, visible_gpus
from .writers import OutputFile, errors_path


@dataclass
class Summary:
    """What this run did: `num_read == num_written + num_failed`."""

    output: str
    num_read: int = 0
    num_written: int = 0
    num_failed: int = 0
    num_cut: int = 0  # of those written: they have more tokens than max_length
    num_tokens: int = 0
    num_shards_before: int = 0  # that were done when this run began
    num_shards_left: int = 0  # that other runs have to do, with `shard`
    seconds: float = 0.0  # from the first text read to the output in place, without loading the model
    unreadable: list[BadRow] = field(default_factory=list)  # that count as one failure, though more rows may be lost

    def add(self, done: Done) -> None:
        """Counts a shard."""
        self.num_read += done.num_written + len(done.bad_rows)
        self.num_written += done.num_written
        self.num_failed += len(done.bad_rows)
        self.num_cut += done.num_cut
        self.num_tokens += done.num_tokens
        self.unreadable += [row for row in done.bad_rows if row.more_lost]

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        rates = f"{self.num_written / seconds:,.0f} texts/s, {self.num_tokens / seconds:,.0f} tokens/s"
        cut = f" ({self.num_cut:,} cut at --max-length)" if self.num_cut else ""
        before = f"; shards done before: {self.num_shards_before:,}" if self.num_shards_before else ""
        left = f"; shards of other shares not done yet: {self.num_shards_left:,}" if self.num_shards_left else ""
        return (
            f"read {self.num_read:,} = written {self.num_written:,}{cut} + failed {self.num_failed:,} "
            f"in {self.seconds:,.1f} s ({rates}): {self.output}{before}{left}"
        )


def load_encoder(settings: EmbedSettings) -> RowEncoder:
    """`Encoder.from_pretrained` with the job's settings; torch is imported only now."""
    from ..engine.encoder import Encoder

    return Encoder.from_pretrained(
        settings.model,
        adapters=list(settings.adapters),
        pooling=settings.pooling,
        max_length=settings.max_length,
        device=settings.device,
        dtype=settings.dtype,
        attention=settings.attention,
    )


def run(
    settings: EmbedSettings,
    load: Load = load_encoder,
    before_loading: Callable[[], object] = lambda: None,
) -> Summary:
    """Embeds `settings.inputs` into `settings.output`.

    Args:
        load: makes the encoder, once a worker; with several it must be a module's function.
        before_loading: called once all that needs no model is checked.
    Raises:
        RowError: a bad row with `on_error="fail"`: `file:line: reason`.
        ValueError, FileNotFoundError, FileExistsError: settings, inputs or an output that cannot work, before the model
            loads; ValueError also where a job to resume was begun otherwise, with a line a field.
        OSError: the disk is full, an input vanished, a worker died, or the like.
    """
    if Path(settings.output).name in ("", ".."):
        raise ValueError(f"output must be the name of a file or folder, got {settings.output!r}")
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"limit must be at least 1, got {settings.limit}")
    if settings.workers is not None and settings.workers < 1:
        raise ValueError(f"workers must be at least 1, got {settings.workers}")
    if settings.overwrite and (settings.resume or settings.shard):
        raise ValueError("--overwrite must not be given with --resume or --shard, which keep what is done")
    files = find_files(settings.inputs)
    _refuse_inputs(settings, files)
    job = _embed_into_file if Path(settings.output).suffix == ".parquet" else _embed_into_folder
    with naming(Path(settings.output)):
        return job(settings, files, load, before_loading)


def _refuse_inputs(settings: EmbedSettings, files: Sequence[InputFile]) -> None:
    """Raises ValueError where the output would overwrite an input, or be an input of the same command given again."""
    output = Path(settings.output)
    folders = [Path(item) for item in settings.inputs if os.path.isdir(item)]
    # a folder that lies elsewhere, behind a link, too
    reached = {file.path.parent for file in files if any(folder in file.path.parents for folder in folders)}
    paths = [file.path for file in files]
    given: list[str | Path] = [*settings.inputs, *paths, *sorted(reached)]
    for path in (output, manifest.part_path(output, 0)):
        refuse_inputs(path, given)
    refuse_inputs(errors_path(output), given if settings.on_error == "skip" else paths)


def _embed_into_file(
    settings: EmbedSettings, files: list[InputFile], load: Load, before_loading: Callable[[], object]
) -> Summary:
    for option in ("resume", "shard", "ray"):
        if getattr(settings, option):
            raise ValueError(f"--{option} needs a folder as the output; {settings.output} is one file, all or nothing")
    if (settings.workers or 1) > 1:
        raise ValueError(f"--workers needs a folder as the output; {settings.output} is one file")
    with OutputFile(settings.output, overwrite=settings.overwrite) as output:
        plan = _plan(settings, files, list(map(stamp, files)), load, inputs=[])
        before_loading()
        encoder = load(settings)
        rows, dimension = rows_and_dimension(plan, encoder)
        output.begin(dimension, settings.precision, provenance_of(plan, rows, encoder))
        summary = Summary(settings.output)
        with _Progress(plan, summary) as progress:
            progress.start()
            numbers = range(len(plan.shards))
            embed_shards(
                rows, numbers, encoder, FileShards(output), on_done=progress.on_done, progress=progress.on_pass
            )
            output.commit()
    return summary


def _embed_into_folder(
    settings: EmbedSettings, files: list[InputFile], load: Load, before_loading: Callable[[], object]
) -> Summary:
    share = None if settings.shard is None else _parse_share(settings.shard)
    with OutputFolder(settings.output, overwrite=settings.overwrite, resume=settings.resume, share=share) as folder:
        stamps = list(map(stamp, files))
        inputs = fingerprint(files)
        earlier = None if settings.overwrite else Manifest.read(folder.path)
        plan = _plan(settings, files, stamps, load, inputs, earlier.shards if earlier else None)
        if earlier:
            plan = plan.in_dtype_of(earlier)
        first, step = share or (0, 1)
        mine = range(first, len(plan.shards), step)
        if earlier:
            earlier.refuse_changes(folder.path, Manifest(plan.configuration(), inputs, plan.shards))
            pending = _not_done(folder.path, plan, mine)
        else:
            pending = list(mine)
        before_loading()
        summary = Summary(settings.output, num_shards_before=len(mine) - len(pending))
        begun = False

        def on_ready(found: Manifest) -> None:
            nonlocal begun
            if settings.overwrite and not begun:
                folder.clear()
            found.create(folder.path)
            if not begun:
                manifest.remove_orphans(folder.path, pending)
                progress.start()
            begun = True

        def embed(plan: Plan) -> None:
            if settings.ray is not None:
                from .ray import on_ray

                on_ray(plan, pending, on_ready, progress.on_done, address=settings.ray, num_workers=settings.workers)
            elif (num_workers := _num_workers(settings, len(pending))) > 1:
                in_processes(plan, pending, on_ready, progress.on_done, progress.on_pass, num_workers)
            else:
                in_this_process(plan, pending, on_ready, progress.on_done, progress.on_pass)

        with _Progress(plan, summary, pending) as progress:
            again = None
            try:
                embed(plan)
            except ValueError:
                # another share may have begun the job meanwhile, in what is faster where that one runs
                now = None if begun or settings.overwrite else Manifest.read(folder.path)
                if now is None or plan.in_dtype_of(now) == plan:
                    raise
                again = plan.in_dtype_of(now)
            if again is not None:  # the error is gone by now, and the encoder that it held
                embed(again)
            done = [manifest.is_done(folder.path, n, shard.num_rows) for n, shard in enumerate(plan.shards)]
            summary.num_shards_left = done.count(False)
            if all(done):
                manifest.write_errors(folder.path, plan.shards)
    return summary


def _not_done(folder: Path, plan: Plan, numbers: Sequence[int]) -> list[int]:
    """Those of `numbers` that are to be done, also again: a file that is not what was written is told in a warning."""
    found = {number: manifest.read_record(folder, number, plan.shards[number].num_rows) for number in numbers}
    done = {number: record for number, record in found.items() if record is not None}
    num_bytes = sum(record.num_bytes for record in done.values())
    shown = {"unit": "B", "unit_scale": True, "leave": False, "disable": not sys.stderr.isatty()}
    with tqdm(desc="checking what is done", total=num_bytes, **shown) as bar:
        changed = manifest.changed_shards(folder, done, bar.update)
    if changed:
        names = ", ".join(manifest.part_path(folder, number).name for number in changed[:5])
        warnings.warn(
            f"{folder}: not as written, and done again: {names}{', …' * (len(changed) > 5)} ({len(changed)})",
            stacklevel=2,
        )
    kept = done.keys() - set(changed)
    return [number for number in numbers if number not in kept]


def _plan(
    settings: EmbedSettings,
    files: list[InputFile],
    stamps: list[tuple[int, int] | None],
    load: Load,
    inputs: list[dict],
    shards: list[Shard] | None = None,
) -> Plan:
    """Reads all rows once, unless a manifest has told the shards."""
    if shards is None:
        with tqdm(desc="checking", unit=" rows", unit_scale=True, leave=False, disable=not sys.stderr.isatty()) as bar:
            shards = check_rows(
                files,
                text_column=settings.text_column,
                id_column=settings.id_column,
                limit=settings.limit,
                on_error=settings.on_error,
                rows_per_shard=ROWS_PER_SHARD,
                progress=bar.update,
            )
    return Plan(settings=settings, load=load, files=files, stamps=stamps, inputs=inputs, shards=shards)


def _parse_share(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"shard must be I/N with I from 0 to N - 1, got {text!r}")
    return int(found[1]), int(found[2])


def _num_workers(settings: EmbedSettings, num_pending: int) -> int:
    """As many as asked for, by default one a visible GPU; never more than there are shards."""
    if settings.workers is not None:
        return min(settings.workers, num_pending)
    if settings.device not in ("auto", "cuda") or num_pending < 2:
        return 1
    return min(len(visible_gpus()) or 1, num_pending)


class _Progress:
    """Counts into the summary, times the work, and shows it on a terminal."""

    def __init__(self, plan: Plan, summary: Summary, numbers: Sequence[int] | None = None):
        self._summary = summary
        chosen = range(len(plan.shards)) if numbers is None else numbers
        num_rows = sum(plan.shards[number].num_rows for number in chosen)
        self._bar = tqdm(total=num_rows, desc="embedding", unit=" texts", disable=not sys.stderr.isatty())
        self._num_tokens = 0
        self._start: float | None = None

    def on_pass(self, num_texts: int, num_tokens: int) -> None:
        self._num_tokens += num_tokens
        self._show()
        self._bar.update(num_texts)

    def on_done(self, done: Done) -> None:
        self._summary.add(done)
        self._num_tokens = max(self._num_tokens, self._summary.num_tokens)
        self._show()
        self._bar.update(max(self._summary.num_read - self._bar.n, 0))  # bad rows and texts that stand twice, too

    def _show(self) -> None:
        rate = self._num_tokens / max(self._bar.format_dict["elapsed"], 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)

    def start(self) -> None:
        """The model is loaded: from here on time counts."""
        self._start = time.perf_counter()
        self._bar.unpause()  # its rates too

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self._start is not None:
            self._summary.seconds = time.perf_counter() - self._start
