"""What all commands share: options, and errors that are one line."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, NoReturn

import typer

from . import DEFAULT_MODEL

Model = Annotated[
    str,
    typer.Option(
        help="Hub id or folder: a Llama, Mistral, Qwen2 or Qwen3, an adapter of one, or a training run.",
        show_default="a small demonstration encoder that comes with bivec",
    ),
]
Adapters = Annotated[
    list[str] | None, typer.Option("--adapter", help="LoRA adapter, hub id or folder; repeat to stack, in order.")
]
Pooling = Annotated[
    Literal["mean", "weighted_mean", "last", "first"] | None,
    typer.Option(help="How a text's token states become one vector. Default: the training run's own, else mean."),
]
MaxLength = Annotated[
    int | None, typer.Option(min=1, help="Tokens a text is cut to. Default: an exported model's own, else 512.")
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="Of the computation: auto, float32, bfloat16 or float16.")]
Attention = Annotated[str, typer.Option(help="Attention backend: auto or one by name; see bivec inspect.")]


def warn_of_default(model: str) -> None:
    if model == str(DEFAULT_MODEL):
        typer.echo(
            "note: the default model is a demonstration of 4 million parameters: its vectors are fit for trying bivec, "
            "not for search. Choose another with --model.",
            err=True,
        )


def note_instruction(model: str, adapters: list[str] | None) -> None:
    """Says of a run that was trained with an instruction before queries alone that no text gets it unasked."""
    from .engine.prompts import unused_instruction

    instruction = unused_instruction([model, *(adapters or [])])
    if instruction is not None:
        typer.echo(
            f"note: this run was trained with {instruction!r} before its queries; texts get it by --instruction or "
            "encode_query, documents need none.",
            err=True,
        )


@contextmanager
def one_line_errors() -> Iterator[None]:
    """A user's mistake becomes one line and a status: 2 for arguments and files, 1 for a bad row or a failing disk."""
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt:
        _exit("interrupted", 130)
    except OSError as error:
        wrong_path = isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError)
        named = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error)
        _exit(named, 2 if wrong_path else 1)
    except ValueError as error:
        if not _is_ours(error):
            raise
        from .texts.rows import RowError

        _exit(str(error), 1 if isinstance(error, RowError) else 2)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _is_ours(error: BaseException) -> bool:
    """Whether bivec itself raised `error`: a ValueError from inside a library is a bug and shows its traceback."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback is not None and traceback.tb_frame.f_globals.get("__name__", "").startswith("bivec.")


def _exit(message: str, status: int) -> NoReturn:
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(status)


def _terminate(*_: object) -> NoReturn:
    raise SystemExit(143)  # unwinds through the job, which removes its temporary files
