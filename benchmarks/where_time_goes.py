"""Where a token's time goes on the CPU: microseconds of one core, by what they are spent on, a row a dtype.

    python -m bivec.benchmarks.where_time_goes --tokenizer tokenizer.json.gz --output where-time-goes-after.json

Texts go from strings to vectors several times undisturbed, and once under torch's profiler, which gives the shares;
what no operator takes, Python and waiting for the other pass, is `rest`. Where the activation is done as a product is
written, it counts as that. oneDNN's own timer, in a call of its own, says what its primitives take in it.
"""

import argparse
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

from bivec import Encoder

from .breakdown import GROUPS, core_seconds
from .embed import choose_texts, describe_texts
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .shapes import SHAPES, write_checkpoint
from .texts import DATA
from .timing import argument_parser, error_text, num_rounds, report

DTYPES = ("float32", "bfloat16", "int8")


def main(argv: list[str] | None = None) -> int:
    arguments = dtypes_parser(__doc__).parse_args(argv)
    if torch.device(arguments.device).type != "cpu":
        raise ValueError(f"--device must be cpu, got {arguments.device}: a GPU's kernels are told by `benchmark embed`")
    shape = "quick" if arguments.quick else arguments.shape
    num_texts = arguments.num_texts or (24 if arguments.quick else 256)
    mix, texts = choose_texts(arguments.texts, arguments.data, arguments.synthetic, num_texts)
    others = BusyElsewhere()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(SHAPES[shape], folder, texts, tokenizer=arguments.tokenizer)
        lengths, _ = describe_texts(folder, texts, 512)
        rounds = num_rounds(arguments, 5)
        rows = [_row(folder, dtype, texts, int(lengths["total"]), rounds) for dtype in arguments.dtypes]
    busy = others.cores()
    facts = {"shape": shape, "mix": mix, "tokens": lengths, "cores_busy_elsewhere": busy}
    report("where_time_goes", rows, machine=describe_machine(), output=arguments.output, **facts)
    warn_if_disturbed(busy)
    return 0


def dtypes_parser(description: str | None) -> argparse.ArgumentParser:
    """The options of a benchmark of several dtypes of one shape over a mix of texts."""
    parser = argument_parser(description)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), help="default: %(default)s")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json[.gz] or its folder; else one is trained here")
    parser.add_argument("--texts", type=Path, help="a text a line, may end in .gz; else a mix of real ones from --data")
    parser.add_argument("--data", type=Path, default=DATA, help="holds wiki/*.gz, tatoeba/*.gz (default: %(default)s)")
    parser.add_argument("--synthetic", action="store_true", help="made-up texts, which need no data")
    parser.add_argument("--num-texts", type=int)
    return parser


def _row(folder: str, dtype: str, texts: list[str], num_tokens: int, rounds: int) -> dict:
    """One dtype's microseconds of a core a token: in all, and by group."""
    try:
        encoder = Encoder.from_pretrained(folder, dtype=dtype, device="cpu")
    except ValueError as error:  # the processor has no such products
        return {"name": dtype, "skipped": error_text(error)}

    def run() -> object:
        return encoder.encode(texts, show_progress_bar=False)

    run()
    seconds = []
    for _ in range(max(rounds, 1)):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    # at its best: a neighbour only ever adds
    core_us = min(seconds) * torch.get_num_threads() / num_tokens * 1e6
    spent = core_seconds(run, encoder)
    timed = onednn_seconds(run)
    row = {"name": dtype, "dtype": encoder.compute_dtype.name, "tokens_per_s": num_tokens / min(seconds)}
    row |= {"us_per_token": core_us}
    row |= {group: core_us * spent[group] / sum(spent.values()) for group in GROUPS}
    row["onednn_us_per_token"] = sum(timed.values()) / num_tokens * 1e6
    return row | {"onednn": {name: value / num_tokens * 1e6 for name, value in timed.items()}, "skipped": None}


_EXECUTED = re.compile(r"onednn_verbose,v\d,primitive,exec,cpu,(\w+),([^,]+),.*,([\d.e+-]+)$")


def onednn_seconds(run: Callable[[], object]) -> dict[str, float]:
    """What oneDNN's timer gives the primitives of a call, each thread's own, by kind and implementation.

    They are printed on the process's standard output, which is a file meanwhile.
    """
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile("w+") as file:
        os.dup2(file.fileno(), 1)
        try:
            with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
                run()
        finally:
            os.dup2(kept, 1)
            os.close(kept)
        file.seek(0)
        return parse_verbose(file.read())


def parse_verbose(text: str) -> dict[str, float]:
    """Seconds by kind and implementation of the executions that oneDNN printed, the most first."""
    found: defaultdict[str, float] = defaultdict(float)
    for match in filter(None, map(_EXECUTED.match, text.splitlines())):
        kind, implementation, milliseconds = match.groups()
        found[f"{kind} {implementation}"] += float(milliseconds) / 1e3
    return dict(sorted(found.items(), key=lambda item: -item[1]))


if __name__ == "__main__":
    sys.exit(main())
