"""The command line: `bivec embed`, `train`, `evaluate`, `benchmark`, `export`, `inspect`.

Nothing heavy is imported before a command runs.
"""

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from shlex import quote
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from . import DEFAULT_MODEL, __version__
from .cli_evaluate import evaluation
from .cli_shared import (
    Adapters,
    Attention,
    Device,
    Dtype,
    MaxLength,
    Model,
    Pooling,
    echo,
    note_instruction,
    one_line_errors,
    printable,
    show_tracebacks,
    warn,
    warn_of_default,
)

_MAX_WARNINGS = 20


class _Commands(TyperGroup):
    def parse_args(self, context: Any, arguments: list[str]) -> list[str]:
        """--traceback counts wherever it stands: behind the command that has just failed is where one adds it."""
        if "--traceback" in arguments:
            arguments = ["--traceback", *(argument for argument in arguments if argument != "--traceback")]
        return super().parse_args(context, arguments)


app = typer.Typer(
    name="bivec",
    cls=_Commands,
    help="Turn a pretrained Llama into a text encoder, and embed text by the million.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich takes longer to import than the help takes to print
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(evaluation)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bivec {__version__}")
        raise typer.Exit


@app.callback()
def bivec(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    traceback: Annotated[
        bool, typer.Option("--traceback", help="Show where an error comes from; also behind any command.")
    ] = False,
) -> None:
    show_tracebacks(traceback)


@app.command()
def embed(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="INPUT",
            help="A .txt (a text a line), .jsonl, .csv (all also .gz) or .parquet file, a folder, or a quoted pattern.",
        ),
    ],
    output: Annotated[
        str, typer.Option(help="One .parquet file, or a folder of shards. Columns: id and embedding, in input order.")
    ],
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    text_column: Annotated[str, typer.Option(help="Column or key of the text.")] = "text",
    id_column: Annotated[
        str | None, typer.Option(help="Column or key of a unique id, string or integer. Default: FILE:LINE.")
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(
            help="Put before every text, a space between unless it ends with white space; attended to, not pooled. "
            "Default: the model's own default prompt; of a run, the instruction if documents had it too."
        ),
    ] = None,
    pooling: Pooling = None,
    max_length: MaxLength = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Scale every vector to length 1.")] = False,
    truncate_dim: Annotated[int | None, typer.Option(min=1, help="Keep the first N dimensions only.")] = None,
    precision: Annotated[
        Literal["float32", "float16", "int8"], typer.Option(help="Of the written vectors.")
    ] = "float32",
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Read the first N rows only.")] = None,
    on_error: Annotated[
        Literal["fail", "skip"],
        typer.Option(help="A bad row ends the job without output, or goes to OUTPUT.errors.jsonl."),
    ] = "fail",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that embed. Default: one a visible GPU, one on the CPU.")
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Do shards I, I+N, ... of a folder; other machines do the others."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS|local", help="Embed on a Ray cluster that shares the file system.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a folder's job where it ended.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")] = False,
) -> None:
    """Embed the texts of files into Parquet.

    Example: bivec embed examples/passages.txt --output embeddings.parquet

    A file appears under its name only when it is complete. A job into a folder can be killed at any time: --resume
    goes on with the shards that are not done, or says what has changed since.
    """
    with one_line_errors():
        from .serving import job
        from .serving.settings import EmbedSettings

        def before_loading() -> None:
            warn_of_default(model)
            if instruction is None:
                note_instruction(model, adapter)

        summary = job.run(
            EmbedSettings(
                inputs=inputs,
                output=output,
                model=model,
                adapters=adapter or [],
                text_column=text_column,
                id_column=id_column,
                instruction=instruction,
                pooling=pooling,
                max_length=max_length,
                normalize=normalize,
                truncate_dim=truncate_dim,
                precision=precision,
                device=device,
                dtype=dtype,
                attention=attention,
                workers=workers,
                shard=shard,
                ray=ray,
                limit=limit,
                on_error=on_error,
                resume=resume,
                overwrite=overwrite,
            ),
            job.load_encoder,
            before_loading=before_loading,
        )
        for row in summary.unreadable[:_MAX_WARNINGS]:
            warn(row)
        if len(summary.unreadable) > _MAX_WARNINGS:
            warn(f"{len(summary.unreadable) - _MAX_WARNINGS:,} more of the kind; all stand in the errors file")
        echo(str(summary))


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def train(
    context: typer.Context,
    stage: Annotated[
        str, typer.Argument(metavar="STAGE", help="pretrain, mntp, simcse or supervised.", show_default=False)
    ] = "",
    fields: Annotated[
        list[str] | None, typer.Argument(metavar="--FIELD VALUE...", help="Settings; bivec train STAGE --help.")
    ] = None,
) -> None:
    """Train a stage of LLM2Vec's recipe: pretrain, mntp, simcse or supervised.

    Example: bivec train mntp --model HuggingFaceTB/SmolLM-135M --data texts.txt --output runs/mntp

    bivec train STAGE --help lists every field; --recipe FILE.yaml reads them from a file.
    """
    if stage in ("", "-h", "--help"):
        typer.echo(context.get_help())
        raise typer.Exit(0 if stage else 2)
    if "PYTORCH_ALLOC_CONF" not in os.environ:
        # passes differ in size: without it memory is left in pieces; torch reads it when CUDA is first used
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    with one_line_errors():
        from .training import read_settings, train

        echo(str(train(read_settings(stage, fields or []))))


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def benchmark(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)] = "",
    options: Annotated[
        list[str] | None, typer.Argument(metavar="--OPTION VALUE...", help="Its own; bivec benchmark NAME --help.")
    ] = None,
) -> None:
    """Measure bivec against eager PyTorch and its peers, side by side in one run.

    NAME is attention, contrastive, pooling, fusions, lora, embed, job or train; all, for these on a CPU; gpu, for
    everything on a GPU, the most telling first; where-time-goes and model-memory, for a token's microseconds and for
    bytes and load time in each dtype; smoke, for operators against float64; tiles, for capacities that agree; float8,
    for it beside bfloat16; report, for the tables of results; tune-attention or fastest-attention, for what is chosen
    on a GPU.

    Example: bivec benchmark embed --quick --output embed.json
    """
    if name in ("", "-h", "--help"):
        typer.echo(context.get_help())
        raise typer.Exit(0 if name else 2)
    with one_line_errors():
        from .benchmarks import suite

        raise typer.Exit(suite.run(name, options or []))


@app.command("export")
def export_model(
    output: Annotated[str, typer.Option(help="A new folder, or a new file of --format gguf.")],
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    pooling: Pooling = None,
    max_length: MaxLength = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "q8_0"] | None,
        typer.Option(
            help="Of the written weights; q8_0 (8 bits) of --format gguf alone. "
            "Default: bfloat16, of an adapter alone float32."
        ),
    ] = None,
    normalize: Annotated[bool, typer.Option("--normalize", help="Every vector gets length 1.")] = False,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="Write the adapters' sum as one adapter in PEFT's format.")
    ] = False,
    format: Annotated[
        Literal["folder", "gguf"], typer.Option(help="For transformers and its kin, or one file for llama.cpp.")
    ] = "folder",
) -> None:
    """Merge a model's adapters and write one folder, for bivec, transformers, sentence-transformers and their kin.

    Which of them give bivec's vectors is said on stderr; bivec inspect --readers says how.
    With --format gguf, one file for llama.cpp; what differs there is said on stderr.

    Example: bivec export --model runs/supervised --output encoder
    """
    with one_line_errors():
        output = os.path.expanduser(output)  # as --model is, by which the readers are asked of it
        options: dict[str, Any] = {"adapters": adapter or [], "pooling": pooling, "max_length": max_length}
        options["normalize"] = normalize
        if adapter_only and format == "gguf":
            raise ValueError("--adapter-only writes PEFT's format, so it does not go with --format gguf")
        if adapter_only:
            from .engine.adapter_export import export_adapter

            export_adapter(model, output, dtype=dtype or "float32", **options)
            return echo(output)
        if format == "gguf":
            from .engine.gguf_export import export_gguf

            export_gguf(model, output, dtype=dtype or "bfloat16", **options)
            return echo(output)
        from .engine.export import export
        from .engine.readers import readers

        export(model, output, dtype=dtype or "bfloat16", **options)
        echo(output)
        for verdict in readers(output):
            echo(str(verdict), err=True)
        echo(f"commands: bivec inspect --readers --model {quote(output)}", err=True)


@app.command()
def inspect(
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    pooling: Pooling = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    readers: Annotated[
        bool,
        typer.Option("--readers", help="Print which libraries and servers give a folder's vectors, and how, instead."),
    ] = False,
) -> None:
    """Print what a model is, and what was chosen for it and why.

    Architecture, mask, backend, dtype, memory, and whether the mask's self-test passed. With --readers: whether
    transformers, sentence-transformers, vLLM, TEI and llama.cpp read the folder, by what command, or why not.

    What a dtype other than float32 costs is said as cosines of built-in sentences' vectors with float32's. For that the
    model is loaded again, in float32, after the first has gone from memory: time for both, room for the larger.

    Example: bivec inspect --model HuggingFaceTB/SmolLM-135M
    """
    with one_line_errors():
        if readers:
            _print_readers(model, adapter or [], as_json)
            return
        from .engine.agreement import describe_with_cost
        from .engine.encoder import Encoder

        warn_of_default(model)
        note_instruction(model, adapter)
        load = partial(Encoder.from_pretrained, model, adapters=adapter or [], pooling=pooling, device=device)
        description = describe_with_cost(load, dtype=dtype, attention=attention, max_length=max_length)
        if as_json:
            echo(json.dumps(description, indent=2, ensure_ascii=False, default=str))
        else:
            echo("\n".join(_table(description)))


def _print_readers(model: str, adapters: list[str], as_json: bool) -> None:
    from .engine.readers import readers

    if adapters:
        raise ValueError("--readers judges a folder as it is; export the adapters with it, then judge what was written")
    verdicts = readers(model)
    if as_json:
        echo(json.dumps([asdict(verdict) for verdict in verdicts], indent=2, ensure_ascii=False))
        return
    for verdict in verdicts:
        echo(f"{verdict.reader}: {verdict.verdict}")
        for line in (*verdict.reasons, *verdict.notes):
            echo(f"  {line}")
        # at the margin, where it can be copied
        echo(f"\n{verdict.command}\n" if verdict.command else "")


def _table(description: dict[str, Any]) -> Iterator[str]:
    """Names left, values right, in one column each; a part's entries stand indented below its name."""
    rows: list[tuple[str, str]] = []

    def add(entries: dict[str, Any], indent: str) -> None:
        for name, value in entries.items():
            if isinstance(value, dict) and value:
                rows.append((f"{indent}{name}", ""))
                add(value, indent + "  ")
            else:
                shown = ", ".join(map(str, value)) if isinstance(value, list | tuple | dict) else str(value)
                rows.append((f"{indent}{name}", shown or "none"))

    add(description, "")
    rows = [(printable(name), printable(value).replace("\n", "\\n")) for name, value in rows]
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        yield f"{name:{width}}  {value}".rstrip()


def main() -> None:
    """The entry point of the `bivec` command."""
    warnings.showwarning = lambda message, *_: warn(message)
    app()


if __name__ == "__main__":
    main()
