"""Embedding from strings: bivec against sentence-transformers, on the same checkpoint and the same texts.

    python -m bivec.benchmarks.embed --shape 135M --tokenizer tokenizer.json.gz --output embed-135M.json
    python -m bivec.benchmarks.embed --quick

The checkpoint is random, of a named shape. sentence-transformers runs at its defaults (float32, batch 32) and at its
best setting, the faster of the two that win a sweep in the same run; its model is made bidirectional and shown to be.
On CUDA float32 is too slow to be timed and gives the reference of a few hundred texts alone.
Tokens are those of the texts, padding never counts. A speed-up is reported only where the timed vectors agree with
sentence-transformers' in float32; where they do not, the exit status is 1. Few texts flatter bivec: the fewer there
are, the more padding is in a sorted batch of 32.
"""

import functools
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .breakdown import breakdown
from .cases import Case, Results
from .machine import BusyElsewhere, describe_machine, warn_if_disturbed
from .shapes import SHAPES, Shape, linear_rates, write_checkpoint
from .texts import DATA, read_lines, real_mix, synthetic_mix, token_counts
from .timing import Timing, argument_parser, error_text, measure, num_rounds, ratio

PEER = "sentence-transformers"
DEFAULT = f"{PEER} float32, batch 32"
# of every text's vector with the reference's, seen from the reference's mean: what all texts share must not count
LEAST_COSINE = {"float32": 0.99999, "float16": 0.9999, "bfloat16": 0.995}
LATENCY_TOKENS = 12
REFERENCE_TEXTS = 256  # that float32 embeds on CUDA

Encode = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class Contender:
    """One way to embed texts, or the reason why it is not there."""

    name: str
    dtype: str
    encode: Encode | str
    batch_size: int | None = None

    def variant(self, texts: list[str], vectors: dict[str, np.ndarray] | None = None) -> Callable[[], None] | str:
        """What the harness times; the vectors of its last call are left in `vectors`."""
        if isinstance(self.encode, str):
            return self.encode
        encode = self.encode

        def run() -> None:
            result = encode(texts)
            if vectors is not None:
                vectors[self.name] = result

        return run


def main(argv: list[str] | None = None) -> int:
    parser = argument_parser(__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="135M")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer.json[.gz] or its folder; else one is trained here")
    parser.add_argument("--texts", type=Path, help="a text a line, may end in .gz; else a mix of real ones from --data")
    parser.add_argument(
        "--data", type=Path, default=DATA, help="holds wiki/*.gz and tatoeba/*.gz (default: %(default)s)"
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
        comparison = Comparison(results, SHAPES[shape_name], folder, texts, short, device, arguments.max_length, rounds)
        ours, peers = comparison.model_bytes
        # a call that goes on loads at its last case what the first ones would have loaded
        late = ours + peers if "sweep" in results.document["cases"] else 0.0
        status = results.run(
            [
                Case("alone", comparison.alone, ours),
                Case("sweep", comparison.sweep, peers),
                Case("side by side", lambda: comparison.side_by_side(5 if arguments.quick else 40), late),
            ]
        )
    warn_if_disturbed(others.cores())
    disagreeing = any(row.get("least_cosine") is not None and row["refused"] for row in results.document["rows"])
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
        device: torch.device,
        max_length: int,
        rounds: int,
    ):
        self.results, self.shape, self.folder = results, shape, folder
        self.texts, self.short, self.device, self.max_length, self.rounds = texts, short, device, max_length, rounds
        self.lengths: dict = results.document["tokens"]
        # wall time from strings to numpy, on CUDA too
        self.clocked = functools.partial(measure, device=device, clock=time.perf_counter)

    @property
    def model_bytes(self) -> tuple[float, float]:
        """An estimate for CUDA: ours, with fused weights beside the model's own; the peers' three."""
        if self.device.type != "cuda":
            return 0.0, 0.0
        parameters = self.shape.flops_per_token / 2 * 1.1
        return 2 * 2 * parameters + 2**33, (4 + 2 + 2) * parameters + 2**32

    @functools.cached_property
    def ours(self) -> list[Contender]:
        """bivec in its own choice of dtype and, where it takes no half a minute, in float32."""
        choices = ("auto",) if self.device.type == "cuda" else ("auto", "float32")
        return [load_bivec(self.folder, choice, self.device, self.max_length) for choice in choices]

    @functools.cached_property
    def models(self) -> dict:
        return load_peer_models(self.folder, self.device, self.max_length)

    @functools.cached_property
    def rates(self) -> dict:
        """Of the linears alone, by dtype, as they are met."""
        return {}

    def rate(self, dtype: str) -> float | None:
        if dtype not in self.rates:
            self.rates[dtype] = linear_rates(self.shape, getattr(torch, dtype), self.device)
            self.results.add(linear_rates=self.rates)
        return self.rates[dtype].get("best")

    def alone(self) -> list[dict]:
        """What bivec spends its time in, and its speed with nobody beside it; no comparison."""
        first = self.ours[0]
        timing = self.clocked({first.name: first.variant(self.texts)}, rounds=min(self.rounds, 3), warmup=2)[first.name]
        speed = throughput(timing, self.lengths, self.shape.flops_per_token, self.rate(first.dtype))
        latency = self.clocked({first.name: first.variant([self.short])}, rounds=min(self.rounds, 20), warmup=3)
        spent = None
        if callable(first.encode):
            spent = breakdown(functools.partial(first.encode, self.texts), self.device)
        found = timing.row() | speed | {"latency_s": latency[first.name].quartiles()}
        self.results.add(alone=found, breakdown_of_bivec=spent)
        return []

    def sweep(self) -> list[dict]:
        half = self.texts[: max(len(self.texts) // 2, 1)]
        swept = [peer for peer in peer_contenders(self.models, self.device) if peer.name != DEFAULT]
        timings = self.clocked({peer.name: peer.variant(half) for peer in swept}, rounds=1, warmup=1)
        self.results.add(sweep=[timing.row() for timing in timings.values()])
        return []

    def side_by_side(self, latency_rounds: int) -> list[dict]:
        others = BusyElsewhere()
        swept = [row for row in self.results.document.get("sweep", []) if not row["skipped"]]
        finalists = [row["name"] for row in sorted(swept, key=lambda row: row["median_s"])[:2]]
        peers = peer_contenders(self.models, self.device)
        entrants = [peer for peer in peers if peer.name in (DEFAULT, *finalists)] + self.ours
        latencies = self.clocked({e.name: e.variant([self.short]) for e in entrants}, rounds=latency_rounds, warmup=3)
        vectors: dict[str, np.ndarray] = {}  # of the very calls that are timed
        timings = self.clocked({e.name: e.variant(self.texts, vectors) for e in entrants}, rounds=self.rounds, warmup=1)
        if self.device.type == "cuda":
            vectors |= self._reference()
        best, best_latency = fastest(timings), fastest(latencies)
        busy = others.cores()
        control = causal_control(self.models["float32", "sdpa"], self.texts, vectors.get(DEFAULT))
        rows = []
        for entrant in entrants:
            timing, latency = timings[entrant.name], latencies[entrant.name]
            rate = None if isinstance(entrant.encode, str) else self.rate(entrant.dtype)
            row = timing.row() | {"dtype": entrant.dtype}
            row |= throughput(timing, self.lengths, self.shape.flops_per_token, rate)
            row["latency_s"] = latency.quartiles()
            row |= agreement(entrant, vectors, control)
            if row["refused"] is None:
                row["speedup_over_default"] = ratio(timings[DEFAULT], timing) if DEFAULT in timings else None
                row["speedup_over_best"] = ratio(best, timing)
                row["latency_over_peer"] = ratio(latency, best_latency)
            rows.append(row)
        self.results.add(
            causal_control_cosine=control,
            cores_busy_elsewhere=busy,
            best_peer=best.name,
            best_peer_latency=best_latency.name,
        )
        return rows

    def _reference(self) -> dict[str, np.ndarray]:
        """The peer's float32 vectors of the first texts: on CUDA too slow to be timed, or to be made of all."""
        model = self.models["float32", "sdpa"]
        if isinstance(model, str):
            return {}
        return {DEFAULT: model.encode(self.texts[:REFERENCE_TEXTS], batch_size=32, show_progress_bar=False)}


def fastest(timings: dict[str, Timing]) -> Timing:
    """sentence-transformers' best setting among those measured; without any, a timing that was skipped."""
    ran = [timing for name, timing in timings.items() if name.startswith(PEER) and not timing.skipped]
    return min(ran, key=lambda timing: timing.median, default=Timing("none", skipped=f"{PEER} did not run"))


def choose_texts(file: Path | None, data: Path, synthetic: bool, count: int) -> tuple[str, list[str]]:
    """What the texts are, for the result, and the texts."""
    if file is not None:
        texts = [line for line in read_lines(file) if line.strip()][:count]
        return str(file), texts
    if not synthetic:
        try:
            return "real: 1/2 Wikipedia sentences, 1/4 Wikipedia paragraphs, 1/4 Tatoeba", real_mix(count, data)
        except FileNotFoundError as error:
            print(f"{error}; made-up texts are used", file=sys.stderr)
            return f"SYNTHETIC, because {data} holds no texts", synthetic_mix(count)
    return "synthetic", synthetic_mix(count)


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
    name = f"bivec {choice}"
    try:
        from bivec import Encoder

        encoder = Encoder.from_pretrained(folder, dtype=choice, device=str(device), max_length=max_length)
    except Exception as error:
        return Contender(name, choice, error_text(error))
    dtype = str(encoder.dtype).removeprefix("torch.")
    return Contender(name, dtype, lambda texts: encoder.encode(texts, show_progress_bar=False))


def load_peer_models(folder: str, device: torch.device, max_length: int) -> dict:
    """sentence-transformers' model, or the reason why there is none, by dtype and attention."""
    kinds = [("float32", "sdpa"), ("bfloat16", "sdpa")]
    if device.type == "cuda":
        kinds.append(("bfloat16", "flash_attention_2"))  # with it, sentence-transformers leaves padding out
    return {kind: load_sentence_transformer(folder, *kind, device, max_length) for kind in kinds}


def peer_contenders(models: dict, device: torch.device) -> list[Contender]:
    """sentence-transformers in every setting that the sweep tries, and at its defaults."""
    if device.type == "cuda":
        batch_sizes = {"float32": (), "bfloat16": (32, 128, 512)}
    else:
        batch_sizes = {"float32": (8, 16, 32), "bfloat16": (4, 8, 16, 32)}
    return [
        Contender(
            f"{PEER} {dtype}, batch {size}" + ("" if attention == "sdpa" else f", {attention}"),
            dtype,
            _peer_encode(model, size),
            size,
        )
        for (dtype, attention), model in models.items()
        for size in batch_sizes[dtype]
    ]


def _peer_encode(model, batch_size: int) -> Encode | str:
    if isinstance(model, str):
        return model
    return lambda texts: model.encode(texts, batch_size=batch_size, show_progress_bar=False)


def load_sentence_transformer(folder: str, dtype: str, attention: str, device: torch.device, max_length: int):
    """The checkpoint as a bidirectional SentenceTransformer with mean pooling, or the reason why there is none."""
    try:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        transformer = Transformer(
            folder,
            max_seq_length=max_length,
            model_kwargs={"dtype": getattr(torch, dtype), "attn_implementation": attention},
        )
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        model = SentenceTransformer(modules=[transformer, pooling], device=str(device))
        # given through config_kwargs it is dropped without a word (6.2), so it is set where the layers read it
        model[0].auto_model.config.is_causal = False
        if not sees_future(model):
            return "the model stayed causal with is_causal=False"
    except Exception as error:
        return error_text(error)
    return model


@torch.inference_mode()
def sees_future(model) -> bool:
    """Whether the first token's state changes with the last token."""
    llama = model[0].auto_model
    ids = torch.arange(3, 11, device=llama.device)[None]
    changed = ids.clone()
    changed[0, -1] = 11
    masks = torch.ones_like(ids)
    first, second = (llama(input_ids=x, attention_mask=masks).last_hidden_state[0, 0].float() for x in (ids, changed))
    return bool((first - second).abs().max() > 1e-4 * first.abs().max())


def causal_control(model, texts: list[str], reference: np.ndarray | None, count: int = 32) -> float | None:
    """The median cosine of the same model's causal vectors: what a wrong mask gives, well below LEAST_COSINE."""
    if reference is None:
        return None
    config = model[0].auto_model.config
    config.is_causal = True
    try:
        causal = model.encode(texts[:count], show_progress_bar=False)
    finally:
        config.is_causal = False
    return float(np.median(centred_cosines(causal, reference[:count], reference.mean(0))))


def centred_cosines(vectors: np.ndarray, reference: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """Each text's cosine with the reference's vector of it, both seen from `centre`."""
    a, b = (np.asarray(x, dtype=np.float64) - centre for x in (vectors, reference))
    return (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def agreement(entrant: Contender, vectors: dict[str, np.ndarray], control: float | None) -> dict:
    """The least of the texts' cosines with the reference, and why no speed-up may be reported, or None."""
    if entrant.name not in vectors:
        return {"least_cosine": None, "refused": "did not run"}
    if DEFAULT not in vectors or control is None:
        return {"least_cosine": None, "refused": f"nothing to compare with: {DEFAULT} did not run"}
    reference, least = vectors[DEFAULT], LEAST_COSINE[entrant.dtype]
    cosine = float(centred_cosines(vectors[entrant.name][: len(reference)], reference, reference.mean(0)).min())
    refused = None
    if not cosine >= least:
        refused = f"vectors disagree: cosine {cosine:.6f}, at least {least} is required"
    elif not control < least:
        refused = f"the check is blind: a causal mask gives cosine {control:.6f}, {least} is required"
    return {"least_cosine": cosine, "refused": refused}


def throughput(timing: Timing, lengths: dict, flops_per_token: int, linear_rate: float | None) -> dict:
    """Texts/s and tokens/s of the median round, and the share of the linears' own best rate that this is."""
    if timing.skipped:
        return {}
    tokens_per_s = lengths["total"] / timing.median
    return {
        "texts_per_s": lengths["texts"] / timing.median,
        "tokens_per_s": tokens_per_s,
        "share_of_linears": tokens_per_s * flops_per_token / linear_rate if linear_rate else None,
    }


if __name__ == "__main__":
    sys.exit(main())
