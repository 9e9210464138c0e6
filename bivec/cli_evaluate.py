"""`bivec evaluate`: a command for each kind of task, the comparison of two results, and a page of many."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import DEFAULT_MODEL
from .cli_shared import (
    Adapters,
    Attention,
    Device,
    Dtype,
    MaxLength,
    Model,
    Pooling,
    echo,
    one_line_errors,
    printable,
    warn_of_default,
)

evaluation = typer.Typer(
    name="evaluate",
    help="Measure a model on plain files: similarity, classification, words and their tags, generation, anisotropy.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

MaskWindow = Annotated[
    Literal["bidirectional", "causal"] | None, typer.Option("--window", help="The mask. Default: the model's own.")
]
Data = Annotated[str, typer.Option(help="Folder of the task's files; of texts also one file.")]
ReportFile = Annotated[str | None, typer.Option(help="JSON file for the result, read by bivec evaluate compare.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with an evaluation that was interrupted.")]
Seeds = Annotated[int, typer.Option(min=1, help="How many shuffles or draws, where the task has some.")]

ProbedLayers = Annotated[
    Literal["last", "all"], typer.Option(help="Which layers are read; last has the embeddings beside it.")
]
ReadOutChoice = Annotated[
    Literal["token", "previous", "both", "all"] | None,
    typer.Option(
        help="Where a word is read: its tokens, those before, both. Default: all three; the model's own for "
        "--protocol llm2vec."
    ),
]
SubTokensChoice = Annotated[
    Literal["mean", "first", "last"], typer.Option(help="Which of a word's tokens its state is of.")
]
OnErrorChoice = Annotated[
    Literal["fail", "skip"],
    typer.Option(help="Whether a malformed part of the data is left out, and counted."),
]


@evaluation.command("sts")
@evaluation.command("classification")
def evaluate_labelled(
    context: typer.Context,
    data: Data,
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    pooling: Pooling = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    window: MaskWindow = None,
    output: ReportFile = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    seeds: Seeds = 3,
    split: Annotated[Literal["dev", "test"], typer.Option(help="What is scored; select models on dev.")] = "test",
    baseline: Annotated[bool, typer.Option("--baseline", help="Score TF-IDF and the token average beside it.")] = False,
    on_error: OnErrorChoice = "fail",
) -> None:
    """Score embeddings against labels.

    sts: correlation of cosines with people's scores; files NAME-train, -dev, -test (.csv, .tsv).
    classification: accuracy of a logistic regression; files NAME.train, .dev, .test, or NAME.all; NAME.txt, also .gz,
    of SentEval's probing tasks; MRPC's pairs.

    Example: bivec evaluate sts --model runs/simcse --data stsb --split dev --output simcse.json
    """
    _evaluate(context)


@evaluation.command("generation")
@evaluation.command("anisotropy")
def evaluate_unlabelled(
    context: typer.Context,
    data: Data,
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    window: MaskWindow = None,
    output: ReportFile = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    seeds: Seeds = 3,
    num_texts: Annotated[int, typer.Option(min=2, help="Texts that are drawn, the same for every model.")] = 500,
) -> None:
    """Examine a model on texts that it was not trained on, in .txt or .jsonl.

    generation: perplexity and repetition under the causal mask, before and after training.
    anisotropy: how alike hidden states are in each layer, and under both masks.

    Example: bivec evaluate generation --model runs/mntp --data held-out.txt --output mntp.json
    """
    _evaluate(context)


@evaluation.command("chunking")
@evaluation.command("pos")
@evaluation.command("ner")
def evaluate_tagging(
    context: typer.Context,
    data: Data,
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    window: MaskWindow = None,
    output: ReportFile = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    seeds: Seeds = 3,
    split: Annotated[Literal["dev", "test"], typer.Option(help="What is scored; select models on dev.")] = "test",
    layers: ProbedLayers = "last",
    read_out: ReadOutChoice = None,
    sub_tokens: SubTokensChoice = "mean",
    protocol: Annotated[
        Literal["bivec", "llm2vec"],
        typer.Option(help="How the probe is trained; llm2vec: as published, with its faults, and one seed."),
    ] = "bivec",
    on_error: OnErrorChoice = "fail",
) -> None:
    """Tag words by a linear probe on frozen states: token accuracy, and F1 of whole spans.

    A word's state is read at its own tokens, at the ones before (where a model trained with mntp puts it), or at both.
    Beside the model stand each word's most frequent tag, probes trained on shuffled labels, and layer 0, which knows
    a word but not its sentence: a model must beat them to know anything of the context.

    Files of sentences, split as NAME-train, -dev, -test (also valid, testa, testb; .gz), a word a line:

    chunking: word POS chunk (CoNLL-2000, CoNLL-2003), or word chunk.
    pos: these, .conllu, or word POS.
    ner: word POS chunk entity (CoNLL-2003), word POS entity, or word entity (WNUT-17).

    Example: bivec evaluate chunking --model runs/mntp --data conll2000 --output mntp.json
    """
    _evaluate(context)


@evaluation.command("words")
def evaluate_words(
    context: typer.Context,
    data: Data,
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    window: MaskWindow = None,
    output: ReportFile = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    layers: ProbedLayers = "last",
    read_out: Annotated[
        Literal["token", "previous", "both", "all"],
        typer.Option(help="Read a word at its tokens, at the positions before them, or at both."),
    ] = "all",
    sub_tokens: SubTokensChoice = "mean",
    on_error: OnErrorChoice = "fail",
) -> None:
    """Correlate cosines of words' vectors with people's scores.

    Each .txt, .tsv and .csv in the folder (.gz too) is a data set: two words and a score a row, as SimLex-999 and
    WordSim-353; or SCWS's ratings.txt, where each word is read in its context and beside it alone.

    Masked next-token prediction puts what it knows of a word at the position before it: --read-out compares the two.
    Beside the model stand its token embeddings without a layer, and TF-IDF of characters, which knows spelling alone.

    Example: bivec evaluate words --model runs/mntp --data word-sim --layers all --output words.json
    """
    _evaluate(context)


@evaluation.command("probing")
def evaluate_probing(
    context: typer.Context,
    data: Data,
    model: Model = str(DEFAULT_MODEL),
    adapter: Adapters = None,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    attention: Attention = "auto",
    window: MaskWindow = None,
    output: ReportFile = None,
    overwrite: Overwrite = False,
    resume: Resume = False,
    seeds: Seeds = 3,
    layers: ProbedLayers = "last",
    read_out: ReadOutChoice = None,
    sub_tokens: SubTokensChoice = "mean",
    protocol: Annotated[
        Literal["bivec", "feng2025"],
        typer.Option(help="feng2025: as published, words that were learned are tested; last layer, read at the token."),
    ] = "bivec",
    on_error: OnErrorChoice = "fail",
) -> None:
    """Probe what a word's frozen state tells of its meaning and its sentence.

    The lexical-semantic tasks of Feng et al. (2025) in the released layout, or some of them: animacy and class of verb
    from each position of a sentence, lexical aspect, concreteness, sensorimotor norms, Word-in-Context.

    Beside the model stand probes trained on shuffled labels, the word as a text of its own, the most frequent class,
    and layer 0, which knows a word but not its sentence. No probe is tested on a word that it learned from.

    Example: bivec evaluate probing --model runs/mntp --data semantic-probing/data --output mntp.json
    """
    _evaluate(context)


def _evaluate(context: typer.Context) -> None:
    """Run the task that the command is called, whose options are the settings' fields."""
    settings: dict[str, Any] = dict(context.params)
    adapters = tuple(settings.pop("adapter") or ())
    with one_line_errors():
        from .evaluation.report import table
        from .evaluation.tasks import EvaluateSettings, evaluate

        warn_of_default(settings["model"])
        found = EvaluateSettings(task=context.info_name, adapters=adapters, **settings)  # type: ignore[arg-type]
        evaluate(found, show=lambda report: echo("\n".join(table(report))))


@evaluation.command()
def compare(
    first: Annotated[Path, typer.Argument(metavar="A.json", help="A result of bivec evaluate --output.")],
    second: Annotated[Path, typer.Argument(metavar="B.json", help="Another of the same task and data.")],
    output: Annotated[Path | None, typer.Option(help="Draw them too: a .png, .svg or .pdf.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier picture.")] = False,
) -> None:
    """Print two results with their differences.

    Differences are B minus A, on the same bootstrap resamples of the same texts.

    Example: bivec evaluate compare base.json simcse.json --output comparison.png
    """
    with one_line_errors():
        from .engine.outputs import open_output
        from .evaluation import comparison
        from .evaluation.report import Report, dtype_labels

        reports = Report.read(first), Report.read(second)
        labels = dtype_labels(reports)
        names = (first.stem + labels[0], second.stem + labels[1])
        found = comparison.compare(*reports)
        echo("\n".join(comparison.table(found, names)))
        if output is not None:
            with open_output(output, [first, second], overwrite=overwrite, is_own=comparison.is_picture) as publish:
                publish(comparison.draw(found.rows, names, output))


@evaluation.command()
def report(
    results: Annotated[
        list[str], typer.Argument(metavar="[NAME=]RESULT.json...", help="Results, each under its model's name.")
    ],
    output: Annotated[Path, typer.Option(help="A .md of tables, or a .html with pictures beside them.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier report.")] = False,
) -> None:
    """Write tables and pictures of any number of results: several models, tasks and runs.

    A row is called as its file is, or, where that is the task's name, as its folder: base/ner.json is base. With NAME=
    before them, several runs of one task become one row: their mean, and each run's own figure.

    Example: bivec evaluate report base/*.json simcse=run1/sts.json simcse=run2/sts.json --output report.html
    """
    with one_line_errors():
        from .engine.outputs import open_output
        from .evaluation import pages
        from .evaluation.pages_results import read_results

        pages.check_name(output)
        found = read_results(results)
        files = [result.path for result in found]
        with open_output(output, files, overwrite=overwrite, is_own=pages.is_page) as publish:
            publish(printable(pages.render(found, output)).encode())
