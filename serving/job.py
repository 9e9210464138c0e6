"""The embedding job: check all that can be checked, load the model, then read, embed and write a window at a time.

Every row that is read is either written or failed. With `on_error="fail"` the first failure ends the job and leaves no
output; with `"skip"` failures go to `OUT.errors.jsonl` and the job goes on.
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any, Literal, Protocol

import numpy as np
from tqdm import tqdm

from .. import __version__
from ..engine.input_files import find_files
from ..engine.row_files import BadRow, RowError
from .readers import Row, check_rows, read_rows
from .writers import EmbeddingOutput

# texts are packed by length within a window, so it is large; long texts end it earlier, so that memory stays flat
_WINDOW_ROWS = 8192
_WINDOW_CHARACTERS = 2**25


@dataclass(frozen=True, kw_only=True)
class EmbedSettings:
    """What to embed, with which model and how; the fields are the options of `bivec embed`.

    `instruction=None` takes the model's own default prompt where it has one, as `Encoder.encode` does.
    """

    inputs: Sequence[str]
    output: str
    model: str
    adapters: Sequence[str] = ()
    text_column: str = "text"
    id_column: str | None = None
    instruction: str | None = None
    pooling: str | None = None
    max_length: int = 512
    normalize: bool = False
    truncate_dim: int | None = None
    precision: Literal["float32", "float16", "int8"] = "float32"
    device: str = "auto"
    dtype: str = "auto"
    attention: str = "auto"
    limit: int | None = None
    on_error: Literal["fail", "skip"] = "fail"
    overwrite: bool = False


class RowEncoder(Protocol):
    """The part of `Encoder` that a job uses."""

    prompts: dict[str, str]
    default_prompt_name: str | None

    def get_embedding_dimension(self) -> int: ...

    def describe(self) -> dict[str, Any]: ...

    def encode_rows(
        self,
        texts: Sequence[str],
        *,
        prompt: str,
        normalize_embeddings: bool,
        truncate_dim: int | None,
        precision: Any,
        progress: Callable[[int, int], object] | None,
    ) -> tuple[np.ndarray, list[str | None], int]: ...


@dataclass
class Summary:
    """What a job did: `num_read == num_written + num_failed`."""

    output: str
    num_read: int = 0
    num_written: int = 0
    num_failed: int = 0
    num_tokens: int = 0
    seconds: float = 0.0  # from the first text read to the output in place, without loading the model
    unreadable: list[BadRow] = field(default_factory=list)  # files, or what was left of them, that count as one failure

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        rates = f"{self.num_written / seconds:,.0f} texts/s, {self.num_tokens / seconds:,.0f} tokens/s"
        return (
            f"read {self.num_read:,} = written {self.num_written:,} + failed {self.num_failed:,} "
            f"in {self.seconds:,.1f} s ({rates}): {self.output}"
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


def run(settings: EmbedSettings, load: Callable[[EmbedSettings], RowEncoder] = load_encoder) -> Summary:
    """Embeds `settings.inputs` into `settings.output`; on any exception, an interrupt too, no output is left.

    Raises:
        RowError: a bad row with `on_error="fail"`: `file:line: reason`.
        ValueError, FileNotFoundError, FileExistsError: inputs or an output that cannot work, before the model loads.
        OSError: the disk is full, or the like.
    """
    if settings.limit is not None and settings.limit < 1:
        raise ValueError(f"limit must be at least 1, got {settings.limit}")
    on_terminal = sys.stderr.isatty()
    files = find_files(settings.inputs)
    with EmbeddingOutput(settings.output, overwrite=settings.overwrite) as output:
        output.check_inputs(files)
        with tqdm(desc="checking", unit=" rows", unit_scale=True, leave=False, disable=not on_terminal) as bar:
            num_rows = check_rows(
                files,
                text_column=settings.text_column,
                id_column=settings.id_column,
                limit=settings.limit,
                on_error=settings.on_error,
                progress=bar.update,
            )
        encoder = load(settings)
        prompt = settings.instruction
        if prompt is None:
            prompt = encoder.prompts.get(encoder.default_prompt_name or "", "")
        dimension = encoder.get_embedding_dimension()
        if settings.truncate_dim is not None:
            if not 1 <= settings.truncate_dim <= dimension:
                raise ValueError(f"truncate_dim must be from 1 to {dimension}, got {settings.truncate_dim}")
            dimension = settings.truncate_dim
        output.begin(dimension, settings.precision, _provenance(settings, prompt, encoder))
        rows = read_rows(files, text_column=settings.text_column, id_column=settings.id_column)
        summary = Summary(settings.output)
        start = time.perf_counter()
        with tqdm(total=num_rows, desc="embedding", unit=" texts", disable=not on_terminal) as bar:
            for window in _windows(islice(rows, num_rows)):
                _embed_window(window, settings, prompt, encoder, output, summary, bar)
        output.commit()
        summary.seconds = time.perf_counter() - start
    return summary


def _windows(rows: Iterable[Row | BadRow]) -> Iterator[list[Row | BadRow]]:
    window: list[Row | BadRow] = []
    num_characters = 0
    for row in rows:
        window.append(row)
        num_characters += len(row.text) if isinstance(row, Row) else 0
        if len(window) == _WINDOW_ROWS or num_characters >= _WINDOW_CHARACTERS:
            yield window
            window, num_characters = [], 0
    if window:
        yield window


def _embed_window(
    window: list[Row | BadRow],
    settings: EmbedSettings,
    prompt: str,
    encoder: RowEncoder,
    output: EmbeddingOutput,
    summary: Summary,
    bar: tqdm,
) -> None:
    num_tokens_before = summary.num_tokens
    running = [0]

    def progress(num_texts: int, num_tokens: int) -> None:
        running[0] += num_tokens
        rate = (num_tokens_before + running[0]) / max(bar.format_dict["elapsed"], 1e-9)
        bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        bar.update(num_texts)

    good = [row for row in window if isinstance(row, Row)]
    vectors, reasons, num_tokens = encoder.encode_rows(
        [row.text for row in good],
        prompt=prompt,
        normalize_embeddings=settings.normalize,
        truncate_dim=settings.truncate_dim,
        precision=settings.precision,
        progress=progress,
    )
    finite = np.isfinite(vectors).all(axis=1)
    reasons = [
        reason or (None if ok else "its vector is not finite") for reason, ok in zip(reasons, finite, strict=True)
    ]
    outcome = iter(reasons)
    for row in window:
        if isinstance(row, Row):
            reason = next(outcome)
            if reason is None:
                continue
            row = BadRow(row.file, row.line, reason)
        if settings.on_error == "fail":
            raise RowError(str(row))
        output.fail(row)
        summary.num_failed += 1
        if row.rest_lost:
            summary.unreadable.append(row)
    kept = np.array([reason is None for reason in reasons], dtype=bool)
    output.write([row.id for row, keep in zip(good, kept, strict=True) if keep], vectors[kept])
    summary.num_read += len(window)
    summary.num_written += int(kept.sum())
    summary.num_tokens += num_tokens
    bar.update(summary.num_read - bar.n)  # bad rows count as read


def _provenance(settings: EmbedSettings, prompt: str, encoder: RowEncoder) -> dict[str, Any]:
    asked = asdict(settings)
    for name in ("inputs", "output", "instruction", "overwrite", "on_error"):
        del asked[name]
    return {"bivec": __version__, **asked, "prompt": prompt, "encoder": encoder.describe()}
