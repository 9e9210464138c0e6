"""What all commands share: options, what is printed, and errors that are one line."""

import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Literal, NoReturn

import typer

from . import DEFAULT_MODEL

_ENDING = (signal.SIGTERM, signal.SIGHUP)
INTERNAL_ERROR = 70  # the status that sysexits.h gives a program's own fault

# what a terminal obeys instead of showing: C0 but the line feed, DEL, C1, marks of direction and of lines; and lone
# surrogates, as which the bytes of file names stand that are not UTF-8
_CONTROLS = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_tracebacks = False  # whether --traceback was given

Model = Annotated[
    str,
    typer.Option(
        help="Hub id or folder: a Llama, Mistral, Qwen2 or Qwen3, an adapter of one, or a training run.",
        show_default="a small demonstration encoder that comes with bivec",
    ),
]
Adapters = Annotated[
    list[str] | None,
    typer.Option("--adapter", help="LoRA adapter or training run, hub id or folder; repeat to stack, in order."),
]
Pooling = Annotated[
    Literal["mean", "weighted_mean", "last", "first"] | None,
    typer.Option(help="How a text's token states become one vector. Default: the training run's own, else mean."),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        min=1, help="Tokens a text is cut to. Default: an exported model's own, else 512, or the model's positions."
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="Of the computation: auto, float32, bfloat16 or float16; of eight-bit weights and states: int8 (CPU) or "
        "float8 (CUDA)."
    ),
]
Attention = Annotated[
    str, typer.Option(help="Attention backend: auto, triton, varlen, flash or sdpa; bivec inspect says which and why.")
]


def echo(text: str, *, err: bool = False) -> None:
    """Print to stdout, or stderr: the one way by which commands print what may hold names out of files."""
    typer.echo(printable(text), err=err)


def warn(message: object) -> None:
    _tell("warning", str(message))


def printable(text: str) -> str:
    r"""`text` with control characters as `\u001b`, which JSON reads back; lines stay lines."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def warn_of_default(model: str) -> None:
    if model == str(DEFAULT_MODEL):
        _tell(
            "note",
            "the default model is a demonstration of 4 million parameters: its vectors are fit for trying bivec, "
            "not for search. Choose another with --model.",
        )


def note_instruction(model: str, adapters: list[str] | None) -> None:
    """Says of a run that was trained with an instruction before queries alone that no text gets it unasked."""
    from .engine.prompts import unused_instruction

    instruction = unused_instruction([model, *(adapters or [])])
    if instruction is not None:
        _tell(
            "note",
            f"this run was trained with {instruction!r} before its queries; texts get it by --instruction or "
            "encode_query, documents need none.",
        )


def show_tracebacks(wanted: bool) -> None:
    """Whether errors are preceded by their traceback, from here on."""
    global _tracebacks
    _tracebacks = wanted


@contextmanager
def one_line_errors() -> Iterator[None]:
    """The boundary of every command: whatever is raised becomes one line on stderr and an exit status.

    2: an argument or a file is wrong. 1: a bad row, a failing disk, a training that failed, memory that does not
    suffice. 130: interrupted. `INTERNAL_ERROR`: a bug; the line tells where.
    """
    # not what `nohup` has set to be ignored
    caught = [number for number in _ENDING if signal.getsignal(number) != signal.SIG_IGN]
    previous = {number: signal.signal(number, _terminate) for number in caught}
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt:
        _tell("error", "interrupted")
        raise typer.Exit(130) from None
    except Exception as error:
        message, status = _judge(error)
        if _tracebacks:
            from traceback import format_exception

            echo("".join(format_exception(error)).rstrip("\n"), err=True)
        _tell("error", message)
        raise typer.Exit(status) from error
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _judge(error: Exception) -> tuple[str, int]:
    """What to say of an error, and the exit status."""
    from .texts.rows import RowError

    message = str(error)
    if isinstance(error, OSError):
        wrong_path = isinstance(error, FileNotFoundError | FileExistsError | NotADirectoryError | IsADirectoryError)
        if error.filename and error.strerror:
            message = f"{error.filename}: {error.strerror}"
        return message or type(error).__name__, 2 if wrong_path else 1
    if isinstance(error, RowError):
        return message, 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported for it
        return f"out of memory: {_one_line(message)}".removesuffix(": "), 1
    place, meant = _place(error)
    if meant and isinstance(error, ValueError):
        return message, 2
    if meant and type(error) is RuntimeError:
        return message, 1
    hint = "" if _tracebacks else "; --traceback shows where"
    return f"internal error: {type(error).__name__}: {_one_line(message)} (in {place}){hint}", INTERNAL_ERROR


def _place(error: Exception) -> tuple[str, bool]:
    """The innermost line of bivec that `error` passed, and whether a `raise` there made it: then it was meant so."""
    import dis

    place, meant = "unknown", False
    traceback = error.__traceback__
    while traceback is not None:
        frame = traceback.tb_frame
        module = frame.f_globals.get("__name__", "")
        meant = False
        if module.startswith("bivec.") and module != __name__:
            place = f"{module}:{traceback.tb_lineno}"
            # a ValueError out of a library's or the interpreter's compiled code has its innermost frame here too
            meant = dis.opname[frame.f_code.co_code[traceback.tb_lasti]] == "RAISE_VARARGS"
        traceback = traceback.tb_next
    return place, meant


def _one_line(message: str) -> str:
    return " ".join(message.split())


def _tell(kind: str, message: str) -> None:
    """One line, or several of which all but the first are indented: none can pass for another message."""
    echo(f"{kind}: " + message.replace("\n", "\n  "), err=True)


def _terminate(number: int, _: object) -> NoReturn:
    for further in _ENDING:  # a terminal that closes sends more than one, and what is cleaned up must not be cut short
        signal.signal(further, signal.SIG_IGN)
    raise SystemExit(128 + number)  # unwinds through the job, which removes its temporary files
