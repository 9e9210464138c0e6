"""llama.cpp through llama-cpp-python, its weights in eight bits: q8_0, a float16 scale for each 32 of a row."""

import tempfile
from pathlib import Path

import numpy as np
import torch

from ..engine.gguf_export import export_gguf
from .contender import Contender, Encode
from .timing import error_text

FAMILY = "llama.cpp q8_0"
# a text has to fit into one; its attention is over all texts of one, so that larger is not always faster
BATCH_TOKENS = (512, 1024, 2048)


def llama_cpp(folder: str, max_length: int) -> list[Contender]:
    """A text a call, and several in batches of so many tokens."""
    sizes = [size for size in BATCH_TOKENS if size >= max_length] or [max_length]
    settings = [("a text a call", sizes[0]), *((f"{size} tokens a batch", size) for size in sizes)]
    try:
        load = _exported(folder)
    except Exception as error:
        return [Contender(f"{FAMILY}, {name}", "q8_0", error_text(error)) for name, _ in settings]
    return [Contender(f"{FAMILY}, {name}", "q8_0", _encode(load, name, size)) for name, size in settings]


def system_info() -> str:
    """The instruction sets that the bindings were built with, or why they are not there."""
    try:
        import llama_cpp

        return llama_cpp.llama_print_system_info().decode()
    except Exception as error:
        return error_text(error)


def _exported(folder: str):
    """What loads the model with a number of tokens a batch; its file is kept until then."""
    import llama_cpp

    room = tempfile.TemporaryDirectory()
    path = Path(room.name, "model.gguf")
    export_gguf(folder, path, pooling="mean", dtype="q8_0")
    threads = torch.get_num_threads()

    def load(size: int):
        assert room  # the folder lives as long as this function
        sizes = {"n_ctx": size, "n_batch": size, "n_ubatch": size, "n_threads": threads, "n_threads_batch": threads}
        return llama_cpp.Llama(str(path), embedding=True, verbose=False, **sizes)

    return load


def _encode(load, name: str, size: int) -> Encode:
    models: list = []  # loaded by the first call

    def encode(texts: list[str]) -> np.ndarray:
        if not models:
            models.append(load(size))
        embed = models[0].embed
        vectors = [embed(text) for text in texts] if name == "a text a call" else embed(texts)
        return np.array(vectors, dtype=np.float32)

    return encode
