"""The command line: `bivec embed`, `train`, `evaluate`, `benchmark`, `export`, `inspect`.

Nothing heavy is imported before a command runs.
"""

import json
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer

from . import DEFAULT_MODEL, __version__

app = typer.Typer(
    name="bivec",
    help="Turn a pretrained Llama into a text encoder, and embed text by the million.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # rich takes longer to import than the help takes to print
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

evaluation = typer.Typer(
    name="evaluate",
    help="Measure a model on plain files: similarity, classification, generation, anisotropy.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(evaluation)

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
MaxLength = Annotated[int, typer.Option(min=1, help="Tokens a text is cut to.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option(help="Of the computation: auto, float32, bfloat16 or float16.")]
Attention = Annotated[str, typer.Option(help="Attention backend: auto or one by name; see bivec inspect.")]
MaskWindow = Annotated[
    Literal["bidirectional", "causal"] | None, typer.Option("--window", help="The mask. Default: the model's own.")
]
Data = Annotated[str, typer.Option(help="Folder of the task's files; of texts also one file.")]
ReportFile = Annotated[str | None, typer.Option(help="JSON file for the result, read by bivec evaluate compare.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many shuffles or draws, where the task has some.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bivec {__version__}")
        raise typer.Exit


@app.callback()
def bivec(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


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
        typer.Option(help="Put before every text; attended to, but not pooled. Default: the model's own prompt."),
    ] = None,
    pooling: Pooling = None,
    max_length: MaxLength = 512,
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
    with _one_line_errors():
        from .serving import job

        summary = job.run(
            job.EmbedSettings(
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
            before_loading=lambda: _warn_of_default(model),
        )
        for row in summary.unreadable:
            typer.echo(f"warning: {row}", err=True)
        typer.echo(str(summary))


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
    with _one_line_errors():
        from .training import read_settings, train

        typer.echo(str(train(read_settings(stage, fields or []))))


@evaluation.command("sts")
@evaluation.command("classification")
def evaluate_labelled(
    context: typer.Context,
    data: Data,
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    pooling: Pooling = None,
    max_length: MaxLength = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    window: MaskWindow = None,
    output: ReportFile = None,
    seeds: Seeds = 3,
    split: Annotated[Literal["dev", "test"], typer.Option(help="What is scored; select models on dev.")] = "test",
    baseline: Annotated[bool, typer.Option("--baseline", help="Score TF-IDF beside it: words, characters.")] = False,
) -> None:
    """Score embeddings against labels.

    sts: correlation of cosines with people's scores; files NAME-train, -dev, -test (.csv, .tsv).
    classification: accuracy of a logistic regression; files NAME.train, .dev, .test, or NAME.all.

    Example: bivec evaluate sts --model runs/simcse --data stsb --split dev --output simcse.json
    """
    _evaluate(
        task=context.info_name,
        data=data,
        model=model,
        adapters=tuple(adapter or ()),
        pooling=pooling,
        max_length=max_length,
        device=device,
        dtype=dtype,
        attention=attention,
        window=window,
        output=output,
        seeds=seeds,
        split=split,
        baseline=baseline,
    )


@evaluation.command("generation")
@evaluation.command("anisotropy")
def evaluate_unlabelled(
    context: typer.Context,
    data: Data,
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    max_length: MaxLength = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    window: MaskWindow = None,
    output: ReportFile = None,
    seeds: Seeds = 3,
    num_texts: Annotated[int, typer.Option(min=2, help="Texts that are drawn, the same for every model.")] = 500,
) -> None:
    """Examine a model on texts that it was not trained on, in .txt or .jsonl.

    generation: perplexity and repetition under the causal mask, before and after training.
    anisotropy: how alike hidden states are in each layer, and under both masks.

    Example: bivec evaluate generation --model runs/mntp --data held-out.txt --output mntp.json
    """
    _evaluate(
        task=context.info_name,
        data=data,
        model=model,
        adapters=tuple(adapter or ()),
        max_length=max_length,
        device=device,
        dtype=dtype,
        attention=attention,
        window=window,
        output=output,
        seeds=seeds,
        num_texts=num_texts,
    )


def _evaluate(**settings: Any) -> None:
    with _one_line_errors():
        from .evaluation.report import table
        from .evaluation.tasks import EvaluateSettings, evaluate

        _warn_of_default(settings["model"])
        typer.echo("\n".join(table(evaluate(EvaluateSettings(**settings)))))


@evaluation.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A result of bivec evaluate --output.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another of the same task and data.")],
    output: Annotated[Path, typer.Option(help="The picture, .png, .svg or .pdf.")] = Path("comparison.png"),
) -> None:
    """Print two results with their differences, and draw them.

    Differences are B minus A, on the same bootstrap resamples of the same texts.

    Example: bivec evaluate compare base.json simcse.json --output comparison.png
    """
    with _one_line_errors():
        from .evaluation import comparison
        from .evaluation.report import Report

        rows = comparison.compare(Report.read(first), Report.read(second))
        typer.echo("\n".join(comparison.table(rows, (first.stem, second.stem))))
        comparison.draw(rows, (first.stem, second.stem), output)


@app.command(context_settings={"ignore_unknown_options": True, "help_option_names": []})
def benchmark(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)] = "",
    options: Annotated[
        list[str] | None, typer.Argument(metavar="--OPTION VALUE...", help="Its own; bivec benchmark NAME --help.")
    ] = None,
) -> None:
    """Measure bivec against eager PyTorch and its peers, side by side in one run.

    NAME is attention, contrastive, pooling, fusions, lora, embed, job or train; all, for these at sizes that suit the
    device; or report, for the tables of results.

    Example: bivec benchmark embed --quick --output embed.json
    """
    if name in ("", "-h", "--help"):
        typer.echo(context.get_help())
        raise typer.Exit(0 if name else 2)
    with _one_line_errors():
        from .benchmarks import suite

        raise typer.Exit(suite.run(name, options or []))


@app.command("export")
def export_model(
    output: Annotated[str, typer.Option(help="A new folder.")],
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    pooling: Pooling = None,
    max_length: MaxLength = 512,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Of the written weights.")
    ] = "bfloat16",
) -> None:
    """Merge a model's adapters and write one folder, for bivec, transformers, sentence-transformers and their kin.

    Example: bivec export --model runs/supervised --output encoder
    """
    with _one_line_errors():
        from .engine.export import export

        export(model, output, adapters=adapter or [], pooling=pooling, max_length=max_length, dtype=dtype)
        typer.echo(output)


@app.command()
def inspect(
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    pooling: Pooling = None,
    max_length: MaxLength = 512,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print what a model is, and what was chosen for it and why.

    Architecture, mask, backend, dtype, memory, and whether the mask's self-test passed.

    Example: bivec inspect --model HuggingFaceTB/SmolLM-135M
    """
    with _one_line_errors():
        from .engine.encoder import Encoder

        _warn_of_default(model)
        encoder = Encoder.from_pretrained(
            model,
            adapters=adapter or [],
            pooling=pooling,
            max_length=max_length,
            device=device,
            dtype=dtype,
            attention=attention,
        )
        description = encoder.describe()
        if as_json:
            typer.echo(json.dumps(description, indent=2, ensure_ascii=False, default=str))
        else:
            typer.echo("\n".join(_table(description)))


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
    width = max((len(name) for name, _ in rows), default=0)
    for name, value in rows:
        yield f"{name:{width}}  {value}".rstrip()


def _warn_of_default(model: str) -> None:
    if model == str(DEFAULT_MODEL):
        typer.echo(
            "note: the default model is a demonstration of 4 million parameters: its vectors are fit for trying bivec, "
            "not for search. Choose another with --model.",
            err=True,
        )


@contextmanager
def _one_line_errors() -> Iterator[None]:
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
        from .engine.row_files import RowError

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


def main() -> None:
    """The entry point of the `bivec` command."""
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    app()


if __name__ == "__main__":
    main()
