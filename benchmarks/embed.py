"""Embedding from strings: bivec beside its peers, on the same checkpoint and the same texts.

    python -m bivec.benchmarks.embed --shape 135M --tokenizer tokenizer.json.gz --output embed-135M.json
    ONEDNN_MAX_CPU_ISA=AVX512_CORE python -m bivec.benchmarks.embed ... --output embed-135M-no-bf16.json
    python -m bivec.benchmarks.embed --quick

The checkpoint is random, of a named shape. bivec runs as it comes, in float32 and in int8. Beside it run, where they
are installed, sentence-transformers at its defaults (float32, batch 32), and the fastest setting of each dtype of
sentence-transformers, OpenVINO and llama.cpp, which a sweep in the same run finds. All have torch's number of threads.
`pip install 'bivec[bench]'` brings sentence-transformers, openvino and nncf; `pip install llama-cpp-python` builds
llama.cpp for the processor. A peer that is not there is a row with the reason.

Tokens are those of the texts, padding never counts. Beside each speed stand the cosine of the timed vectors with
sentence-transformers' in float32, the least and the median, how many vectors are not finite, and Spearman's correlation
on STS-B's dev split of bivec's default model through the same code, where --data has stsb/. A speed-up of bivec is
reported only where its vectors agree; where they do not, the exit status is 1. A peer's speed is reported whatever its
vectors are. On CUDA float32 is too slow to be timed and gives the reference of a few hundred texts alone.
Few texts flatter bivec: the fewer there are, the more padding is in a sorted batch of 32.

ONEDNN_MAX_CPU_ISA holds torch's and OpenVINO's oneDNN alike to the instructions named, and stands in the result:
with AVX512_CORE float32 is the faster float, as on some processors anyway, and there is no fast int8;
with AVX512_CORE_VNNI there is.
"""

import argparse
import functools
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from . import llama_cpp_peer, openvino_peer
from .breakdown import breakdown
from .cases import Case, Results
from .contender import OURS, Contender, agreement, throughput
from .embed_quality import similarity_scores
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .sentence_transformers_peer import (
    DEFAULT,
    PEER,
    causal_control,
    load_sentence_transformer,
    sentence_transformers,
)
from .shapes import SHAPES, Shape, linear_rates, write_checkpoint
from .texts import DATA, read_lines, real_mix, synthetic_mix, token_counts
from .timing import Timing, argument_parser, error_text, measure, num_rounds, ratio

LATENCY_TOKENS = 12
REFERENCE_TEXTS = 256  # that float32 embeds on CUDA
SHARE_SWEPT = {"cpu": 4, "cuda": 2}  # one text of so many


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json[.gz] or its folder; else one is trained here")
    parser.add_argument("--texts", type=Path, help="a text a line, may end in .gz; else a mix of real ones from --data")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="holds wiki/*.gz, tatoeba/*.gz and stsb/ (default: %(default)s)"
    )
    parser.add_argument("--synthetic", action="store_true", help="made-up texts, which need no data")
    parser.add_argument("--num-texts", type=int)
    parser.add_argument("--max-length", type=int, default=512)
    arguments = parser.parse_args(argv)
    shape_name = "quick" if arguments.quick else arguments.shape
    device = torch.device(arguments.device)
    on_cuda = device.type == "cuda"
    num_texts = arguments.num_texts or (24 if arguments.quick else 8192 if on_cuda else 256)
    mix, texts = choose_texts(arguments.texts, arguments.data, arguments.synthetic, num_texts)
    calibration = calibration_texts(arguments, texts)

    from transformers.utils import logging

    logging.disable_progress_bar()
    others = BusyElsewhere()
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(SHAPES[shape_name], folder, texts, tokenizer=arguments.tokenizer, device=str(device))
        lengths, short = describe_texts(folder, texts, arguments.max_length)
        results = Results(
            "embed",
            arguments,
            describe_machine(device),
            shape=shape_name,
            mix=mix,
            tokenizer=str(arguments.tokenizer or "trained on the texts"),
            tokens=lengths,
            max_length=arguments.max_length,
        )
        rounds = num_rounds(arguments, 7 if on_cuda else 3)
        comparison = Comparison(
            results, SHAPES[shape_name], folder, texts, short, calibration, device, arguments.max_length, rounds
        )
        ours, peers = comparison.model_bytes
        # a call that goes on loads at its last case what the first ones would have loaded
        late = ours + peers if "sweep" in results.document["cases"] else 0.0
        status = results.run(
            [
                Case("alone", comparison.alone, ours),
                Case("sweep", comparison.sweep, peers),
                Case(
                    "similarity",
                    lambda: comparison.similarity(arguments.data / "stsb", 40 if arguments.quick else None),
                ),
                Case("side by side", lambda: comparison.side_by_side(5 if arguments.quick else 40), late),
            ]
        )
    warn_if_disturbed(others.cores())
    disagreeing = any(row.get("agrees") is not None and row["refused"] for row in results.document["rows"])
    return status or int(disagreeing)


class Comparison:
    """The benchmark's cases. Models are loaded when the first case asks for them."""

    def __init__(
        self,
        results: Results,
        shape: Shape,
        folder: str,
        texts: list[str],
        short: str,
        calibration: list[str],
        device: torch.device,
        max_length: int,
        rounds: int,
    ):
        self.results, self.shape, self.folder = results, shape, folder
        self.texts, self.short, self.calibration = texts, short, calibration
        self.device, self.max_length, self.rounds = device, max_length, rounds
        self.lengths: dict = results.document["tokens"]
        # wall time from strings to numpy, on CUDA too
        self.clocked = functools.partial(measure, device=device, clock=time.perf_counter)

    @property
    def model_bytes(self) -> tuple[float, float]:
        """An estimate for CUDA: ours, with fused weights beside the model's own and in eight bits; the peers'."""
        if self.device.type != "cuda":
            return 0.0, 0.0
        parameters = self.shape.flops_per_token / 2 * 1.1
        return (2 * 2 + 1) * parameters + 2**33, (4 + 2 + 2) * parameters + 2**32

    def ours(self, folder: str | Path) -> list[Contender]:
        """bivec in its own choice of dtype, in eight bits and, where it takes no half a minute, in float32."""
        choices = ("auto", "float8") if self.device.type == "cuda" else ("auto", "float32", "int8")
        return [load_bivec(str(folder), choice, self.device, self.max_length) for choice in choices]

    def peers(self, folder: str | Path) -> list[Contender]:
        """Every peer in every setting that the sweep tries; most load when they are first called."""
        found = sentence_transformers(str(folder), self.device, self.max_length)
        if self.device.type == "cpu":
            found += openvino_peer.openvino(str(folder), self.max_length, self.calibration)
            found += llama_cpp_peer.llama_cpp(str(folder), self.max_length)
        return found

    @functools.cached_property
    def loaded(self) -> list[Contender]:
        return self.ours(self.folder)

    def finalists(self, folder: str | Path) -> list[Contender]:
        """The peer's defaults, and the fastest setting of each family in the sweep; why there is none of a family."""
        rows = self.results.document.get("sweep", [])
        fastest: dict[str, dict] = {}
        for row in sorted(rows, key=lambda row: row["median_s"] or float("inf")):
            fastest.setdefault(row["name"].partition(",")[0], row)
        names = {DEFAULT, *(row["name"] for row in fastest.values())}
        return [peer for peer in self.peers(folder) if peer.name in names]

    @functools.cached_property
    def entrants(self) -> list[Contender]:
        return self.finalists(self.folder) + self.loaded

    @functools.cached_property
    def rates(self) -> dict:
        """Of the linears alone, by dtype, as they are met."""
        return {}

    def rate(self, entrant: Contender) -> float | None:
        products = entrant.products
        if isinstance(entrant.encode, str) or not hasattr(torch, products):  # no dtype of torch's has a known rate
            return None
        if products not in self.rates:
            self.rates[products] = linear_rates(self.shape, getattr(torch, products), self.device)
            self.results.add(linear_rates=self.rates)
        return self.rates[products].get("best")

    def alone(self) -> list[dict]:
        """What bivec spends its time in, and its speed with nobody beside it; no comparison."""
        first = self.loaded[0]
        timing = self.clocked({first.name: first.variant(self.texts)}, rounds=min(self.rounds, 3), warmup=2)[first.name]
        speed = throughput(timing, self.lengths, self.shape.flops_per_token, self.rate(first))
        latency = self.clocked({first.name: first.variant([self.short])}, rounds=min(self.rounds, 20), warmup=3)
        spent = None
        if callable(first.encode):
            spent = breakdown(functools.partial(first.encode, self.texts), self.device)
        found = timing.row() | speed | {"latency_s": latency[first.name].quartiles()}
        self.results.add(alone=found, breakdown_of_bivec=spent)
        return []

    def sweep(self) -> list[dict]:
        """Every setting of every peer but the defaults, once, over a share of the texts; the same texts warm it up."""
        few = self.texts[: max(len(self.texts) // SHARE_SWEPT[self.device.type], 1)]
        rows = []
        swept = [peer for peer in self.peers(self.folder) if peer.name != DEFAULT]
        while swept:  # one after another, so that a model is held no longer than it is swept
            peer = swept.pop(0)
            rows += [timing.row() for timing in self.clocked({peer.name: peer.variant(few)}, rounds=1).values()]
            print(f"  {peer.name}: {rows[-1]['skipped'] or rows[-1]['median_s']}", file=sys.stderr, flush=True)
        self.results.add(sweep=rows)
        if self.device.type == "cpu":
            described = openvino_peer.description(self.folder, self.max_length, self.calibration)
            self.results.add(llama_cpp=llama_cpp_peer.system_info(), openvino=described)
        return []

    def similarity(self, data: Path, num_pairs: int | None) -> list[dict]:
        """bivec's default model, through every finalist and ours, on pairs that people have scored."""
        from bivec import DEFAULT_MODEL

        contenders = [*self.finalists(DEFAULT_MODEL), *self.ours(DEFAULT_MODEL)]
        self.results.add(similarity=similarity_scores(contenders, data, DEFAULT, num_pairs))
        return []

    def side_by_side(self, latency_rounds: int) -> list[dict]:
        others = BusyElsewhere()
        entrants = self.entrants
        latencies = self.clocked({e.name: e.variant([self.short]) for e in entrants}, rounds=latency_rounds, warmup=3)
        vectors: dict[str, np.ndarray] = {}  # of the very calls that are timed
        timings = self.clocked({e.name: e.variant(self.texts, vectors) for e in entrants}, rounds=self.rounds, warmup=1)
        busy = others.cores()
        model = load_sentence_transformer(self.folder, "float32", "sdpa", self.device, self.max_length)
        if self.device.type == "cuda" and not isinstance(model, str):  # too slow to be timed, or to be made of all
            first = self.texts[:REFERENCE_TEXTS]
            vectors[DEFAULT] = model.encode(first, batch_size=32, show_progress_bar=False)
        reference = vectors.get(DEFAULT)
        control = causal_control(model, self.texts, reference)
        best, best_latency = fastest(timings), fastest(latencies)
        peers = {e.family: timings[e.name] for e in entrants if not e.is_ours and e.name != DEFAULT}
        similarity = self.results.document.get("similarity", {})
        rows = []
        for entrant in entrants:
            timing, latency = timings[entrant.name], latencies[entrant.name]
            row = timing.row() | {"dtype": entrant.dtype}
            row |= throughput(timing, self.lengths, self.shape.flops_per_token, self.rate(entrant))
            row["latency_s"] = latency.quartiles()
            row |= agreement(entrant, vectors.get(entrant.name), reference, control)
            row["stsb_dev_spearman"] = similarity.get(entrant.name, {}).get("spearman")
            if row["refused"] is None:
                row["speedup_over_default"] = ratio(timings[DEFAULT], timing) if DEFAULT in timings else None
                row["speedup_over_best"] = ratio(best, timing)
                row["latency_over_peer"] = ratio(latency, best_latency)
                if entrant.is_ours:
                    row |= {f"speedup_over {family}": ratio(peer, timing) for family, peer in peers.items()}
            rows.append(row)
        self.results.add(
            causal_control_cosine=control,
            cores_busy_elsewhere=busy,
            best_peer=best.name,
            best_peer_latency=best_latency.name,
        )
        return rows


def fastest(timings: dict[str, Timing]) -> Timing:
    """sentence-transformers' best setting among those measured; without any, a timing that was skipped."""
    ran = [timing for name, timing in timings.items() if name.startswith(PEER) and not timing.skipped]
    return min(ran, key=lambda timing: timing.median, default=Timing("none", skipped=f"{PEER} did not run"))


def choose_texts(file: Path | None, data: Path, synthetic: bool, count: int, seed: int = 0) -> tuple[str, list[str]]:
    """What the texts are, for the result, and the texts."""
    if file is not None:
        texts = [line for line in read_lines(file) if line.strip()][:count]
        return str(file), texts
    if not synthetic:
        try:
            return "real: 1/2 Wikipedia sentences, 1/4 Wikipedia paragraphs, 1/4 Tatoeba", real_mix(count, data, seed)
        except FileNotFoundError as error:
            print(f"{error}; made-up texts are used", file=sys.stderr)
            return f"SYNTHETIC, because {data} holds no texts", synthetic_mix(count, seed)
    return "synthetic", synthetic_mix(count, seed)


def calibration_texts(arguments: argparse.Namespace, texts: list[str]) -> list[str]:
    """Texts of the same mix that are none of the timed ones; there may be too few in a file."""
    count = openvino_peer.CALIBRATION_TEXTS
    if arguments.texts is not None:
        others = choose_texts(arguments.texts, arguments.data, arguments.synthetic, len(texts) + count)[1][len(texts) :]
    else:
        others = choose_texts(None, arguments.data, arguments.synthetic, count, seed=1)[1]
    return [text for text in others if text not in set(texts)]


def describe_texts(folder: str, texts: list[str], max_length: int) -> tuple[dict, str]:
    """The texts' token counts, and a text of exactly LATENCY_TOKENS tokens made of their words."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    words = " ".join(texts).split()
    short = ""
    for word in words:
        longer = f"{short} {word}".strip()
        num_tokens = len(tokenizer(longer)["input_ids"])
        if num_tokens <= LATENCY_TOKENS:
            short = longer
        if num_tokens == LATENCY_TOKENS:
            return token_counts(texts, tokenizer, max_length)[1], short
    raise ValueError(f"the texts' words make no text of {LATENCY_TOKENS} tokens")


def load_bivec(folder: str, choice: str, device: torch.device, max_length: int) -> Contender:
    """bivec with `choice` as its dtype."""
    name = f"{OURS} {choice}"
    try:
        from bivec import Encoder

        encoder = Encoder.from_pretrained(folder, dtype=choice, device=str(device), max_length=max_length)
    except Exception as error:
        return Contender(name, choice, error_text(error))
    return Contender(name, encoder.compute_dtype.name, lambda texts: encoder.encode(texts, show_progress_bar=False))


if __name__ == "__main__":
    sys.exit(main())
