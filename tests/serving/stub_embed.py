"""`bivec embed …` with a stub for the model: a text's vector is its hash. Run as a script by the tests that kill it.

A text with "<die once>" kills its process unless the file that DIED names is there, which it makes; one with "<hang
once>" never comes to an end. With PAUSE_AT=n it prints "paused" at the n-th call of `encode_tokenized` and waits to be
killed. A worker may be silent for SILENCE seconds. With SHOW_PASSES each pass that the job hears of is printed. With
MEASURED dtypes are measured: bfloat16 is faster for whoever makes the file of that name, and float32 for all others.
"""

import hashlib
import os
import signal
import sys
import time
from typing import NamedTuple

import numpy as np

DIMENSION = 8


def vector_of(text: str) -> np.ndarray:
    """Eight whole numbers from -127 to 127: exact in every precision."""
    digest = hashlib.blake2b(text.encode(), digest_size=DIMENSION).digest()
    return np.maximum(np.frombuffer(digest, dtype=np.int8), -127).astype(np.float32)


class Text(NamedTuple):
    prompt: str
    text: str
    cut: bool


class StubEncoder:
    """What a job uses of `Encoder`. "<nan>" in a text makes its vector not finite, "<none>" leaves it none; a text with
    "<long>" is cut."""

    def __init__(self, dtype: str | None = None):
        self.dtype = dtype
        self.prompts = {"search": "find: "}
        self.default_prompt_name: str | None = None
        self.calls: list[dict] = []

    def get_embedding_dimension(self) -> int:
        return DIMENSION

    def describe(self) -> dict:
        return {"model": {"name": "stub"}}

    def identity(self) -> dict:
        return {"base": "stub", "libraries": {"stub": "1"}} | ({"dtype": self.dtype} if self.dtype else {})

    def tokenize_rows(self, texts, *, prompt):
        return [Text(prompt, text, "<long>" in text) for text in texts]

    def encode_tokenized(self, tokenized, *, normalize_embeddings, truncate_dim, precision, progress):
        texts = [text.text for text in tokenized]
        prompt = tokenized[0].prompt if tokenized else ""
        self.calls.append({"texts": texts, "prompt": prompt, "normalize": normalize_embeddings})
        if len(self.calls) == int(os.environ.get("PAUSE_AT", 0)):
            print("paused", flush=True)
            for _ in range(6000):  # a signal just before a sleep is seen only after it
                time.sleep(0.01)
        for fault, bring in {"<die once>": die, "<hang once>": hang}.items():
            if any(fault in text for text in texts) and not os.path.exists(os.environ["DIED"]):
                open(os.environ["DIED"], "x").close()
                bring()
        vectors = np.zeros((len(texts), DIMENSION), dtype=np.float32)
        for row, text in enumerate(texts):
            vectors[row] = np.nan if "<nan>" in text else vector_of(prompt + text)
        with np.errstate(invalid="ignore"):
            vectors = vectors[:, :truncate_dim].astype(precision)
        if progress is not None:
            progress(len(texts), 3 * len(texts))
        reasons = ["it leaves no token" if "<none>" in text else None for text in texts]
        return vectors, reasons, 3 * len(texts)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    while True:
        time.sleep(1)


def measure() -> str:
    try:
        open(os.environ["MEASURED"], "x").close()
    except FileExistsError:
        return "float32"
    return "bfloat16"


def load(settings) -> StubEncoder:
    from bivec.serving import shards, workers

    shards._WINDOW_ROWS = 2  # in every worker
    workers._SILENCE_SECONDS = float(os.environ.get("SILENCE", 60))
    workers._REPORT_SECONDS = -1.0  # every pass
    if "MEASURED" not in os.environ:
        return StubEncoder()
    return StubEncoder(measure() if settings.dtype == "auto" else settings.dtype)


if __name__ == "__main__":
    from bivec import cli
    from bivec.serving import job

    job.ROWS_PER_SHARD = int(os.environ.get("ROWS_PER_SHARD", 10))
    job.load_encoder = load
    if "SHOW_PASSES" in os.environ:
        job._Progress.on_pass = lambda _, num_texts, num_tokens: print("pass", num_texts, num_tokens)
    sys.argv[0] = "bivec"
    cli.main()
