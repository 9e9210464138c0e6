"""An embedding job, from texts on the disk to vectors on the disk: bivec against sentence-transformers.

    python -m bivec.benchmarks.job --shape 135M --tokenizer tokenizer.json.gz --output job-135M.json
    python -m bivec.benchmarks.job --quick

Each job reads a text a line and writes Parquet; models are loaded before. bivec writes a folder of shards that survives
a crash at any moment, the peer one file and no more. Two costs are taken apart:

- `durable_share`: seconds in syncing, renaming, hashing and writing records and manifest, of the job's;
- `unused_rows`: rows of slabs that hold no token, of those that do, the price of batch invariance.
"""

import argparse
import contextlib
import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..engine.encoder import Encoder
from ..engine.packing import PackedBatch
from ..engine.runner import Runner
from ..serving import job
from ..serving.folder import ShardOutput
from ..serving.manifest import Manifest
from ..serving.settings import EmbedSettings
from .cases import Case, Results
from .contender import throughput
from .embed import choose_texts, describe_texts
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .sentence_transformers_peer import PEER, load_sentence_transformer
from .shapes import SHAPES, linear_rates, write_checkpoint
from .texts import DATA
from .timing import argument_parser, measure, num_rounds, ratio

# sentence-transformers as it comes, and a setting that wins sweeps of `benchmarks/embed.py` or is likely to
PEERS = {
    "cpu": {"float32, batch 32": ("float32", 32), "bfloat16, batch 8": ("bfloat16", 8)},
    "cuda": {"bfloat16, batch 128": ("bfloat16", 128)},  # float32 would take minutes
}


class Costs:
    """What jobs spend on being durable and on being invariant, counted while they run."""

    def __init__(self) -> None:
        self.durable_seconds = 0.0
        self.num_tokens = self.num_rows = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            durable: list[tuple[Any, str]] = [(ShardOutput, "end_shard"), (Manifest, "create"), (Encoder, "identity")]
            for owner, name in [*durable, (job, "fingerprint"), (job.manifest, "write_errors")]:
                stack.enter_context(mock.patch.object(owner, name, self._clocked(getattr(owner, name))))
            stack.enter_context(mock.patch.object(Runner, "__call__", self._counting(Runner.__call__)))
            yield

    def _clocked(self, function: Callable) -> Callable:
        def clocked(*arguments, **named):
            start = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                self.durable_seconds += time.perf_counter() - start

        return clocked

    def _counting(self, function: Callable) -> Callable:
        def counting(runner: Runner, batch: PackedBatch, *arguments):
            self.num_tokens += batch.num_tokens
            self.num_rows += sum(tile.stop - tile.start for tile in runner.cover(batch.num_tokens))
            return function(runner, batch, *arguments)

        return counting


def peer_job(model: Any, batch_size: int, source: Path, target: Path) -> None:
    """What a user of sentence-transformers writes: lines in, one Parquet file out."""
    texts = source.read_text(encoding="utf-8").splitlines()
    vectors = model.encode(texts, batch_size=batch_size, show_progress_bar=False)
    embeddings = pa.FixedSizeListArray.from_arrays(pa.array(np.asarray(vectors, np.float32).ravel()), vectors.shape[1])
    pq.write_table(pa.table({"id": pa.array(range(len(texts))), "embedding": embeddings}), target)


def bivec_job(encoder: Encoder, source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    job.run(EmbedSettings(inputs=[str(source)], output=str(target), model="given"), lambda _: encoder)


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json[.gz] or its folder; else one is trained here")
    parser.add_argument("--data", type=Path, default=DATA, help="holds wiki/*.gz and tatoeba/*.gz")
    parser.add_argument("--num-texts", type=int)
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    results = Results("job", arguments, describe_machine(device))
    return results.run([Case("job", lambda: run_job(arguments, device, results))])


def run_job(arguments: argparse.Namespace, device: torch.device, results: Results) -> list[dict]:
    shape_name = "quick" if arguments.quick else arguments.shape
    num_texts = arguments.num_texts or (24 if arguments.quick else 512 if device.type == "cpu" else 32768)
    mix, texts = choose_texts(None, arguments.data, arguments.quick, num_texts)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "texts.txt"
        source.write_text("".join(" ".join(text.split()) + "\n" for text in texts), encoding="utf-8")
        write_checkpoint(SHAPES[shape_name], folder / "model", texts, tokenizer=arguments.tokenizer, device=str(device))
        encoder = Encoder.from_pretrained(folder / "model", device=str(device))
        lengths, _ = describe_texts(str(folder / "model"), texts, encoder.max_length)
        variants: dict[str, Callable[[], None] | str] = {"bivec": lambda: bivec_job(encoder, source, folder / "out")}
        dtypes = {"bivec": encoder.dtype}
        for name, (dtype, batch_size) in PEERS[device.type].items():
            dtypes[f"{PEER} {name}"] = getattr(torch, dtype)
            model = load_sentence_transformer(str(folder / "model"), dtype, "sdpa", device, encoder.max_length)
            job_of_peer = functools.partial(peer_job, model, batch_size, source, folder / "peer.parquet")
            variants[f"{PEER} {name}"] = model if isinstance(model, str) else job_of_peer
        others = BusyElsewhere()
        rounds = num_rounds(arguments, 3)
        timings = measure(variants, rounds=rounds, warmup=1, device=device, clock=time.perf_counter)
        disturbance = others.cores()
        costs, start = Costs(), time.perf_counter()
        with costs.counted():
            bivec_job(encoder, source, folder / "out")
        seconds = time.perf_counter() - start
    shape = SHAPES[shape_name]
    rates = {dtype: linear_rates(shape, dtype, device)["best"] for dtype in set(dtypes.values())}
    rows = []
    for name, timing in timings.items():
        row = timing.row() | throughput(timing, lengths, shape.flops_per_token, rates[dtypes[name]])
        if name != "bivec" and not timing.skipped:
            row["bivec_speedup"] = ratio(timing, timings["bivec"])
        rows.append(row)
    results.add(
        shape=shape_name,
        mix=mix,
        tokenizer=str(arguments.tokenizer or "trained on the texts"),
        tokens=lengths,
        durable_share=costs.durable_seconds / seconds,
        unused_rows=costs.num_rows / costs.num_tokens - 1,
        cores_busy_elsewhere=disturbance,
    )
    warn_if_disturbed(disturbance)
    return rows


if __name__ == "__main__":
    sys.exit(main())
