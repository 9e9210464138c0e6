"""OpenVINO, the fastest peer on a CPU: the same Llama converted, in its floats and as NNCF quantises it.

Texts go through it by length, a padded batch after another, over a few streams at a time; what is padded sees nothing
and is not pooled. NNCF's static int8 takes its scales from a calibration set; it is asked as its guide for transformers
says: `nncf.quantize(model_type=TRANSFORMER)`, all else as it comes.
"""

import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import nn

from .contender import Contender, Encode
from .timing import error_text

PEER = "OpenVINO"
BATCH_SIZES = (4, 8, 16)
CALIBRATION_TEXTS = 128  # that are not timed
_FLOATS = {"float32": "f32", "bfloat16": "bf16"}

Model = Any  # openvino.Model; the package is optional


def openvino(folder: str, max_length: int, calibration: Sequence[str]) -> list[Contender]:
    """float32, bfloat16 and static int8 beside either, in every number of streams and batch size that is tried."""
    contenders = []
    for family, floats, convert in (
        ("float32", "float32", lambda: converted(folder)),
        ("bfloat16", "bfloat16", lambda: converted(folder)),
        ("int8", "float32", lambda: quantized(folder, max_length, tuple(calibration))),
        ("int8", "bfloat16", lambda: quantized(folder, max_length, tuple(calibration))),
    ):
        threads = torch.get_num_threads()
        dtype = f"int8+{floats}" if family == "int8" else floats
        beside = f"{floats} beside, " if family == "int8" else ""
        models: Callable[[int], _Compiled] | str
        try:
            _require(floats)
            models = functools.cache(functools.partial(_Compiled, convert(), floats))
            tokenizer = _tokenizer(folder)
        except Exception as error:
            models = error_text(error)
        for streams, size in product(sorted({1, threads}), BATCH_SIZES):
            name = f"{PEER} {family}, {beside}{_streams(streams)}, batch {size}"
            encode = models if isinstance(models, str) else _encode(models, streams, tokenizer, size, max_length)
            contenders.append(Contender(name, dtype, encode))
    return contenders


def _streams(count: int) -> str:
    return "1 stream" if count == 1 else f"{count} streams"


def _tokenizer(folder: str):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def _require(floats: str) -> None:
    import openvino

    can = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if floats == "bfloat16" and "BF16" not in can:
        raise ValueError(f"OpenVINO computes no bfloat16 here, only {', '.join(can)}")
    # its oneDNN, a copy of its own, reads the variable too, and then multiplies bfloat16 by a reference: for minutes
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "")
    if floats == "bfloat16" and limit in ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"):
        raise ValueError(f"ONEDNN_MAX_CPU_ISA={limit} leaves OpenVINO no bfloat16 but a reference's")


class _MeanPooled(nn.Module):
    """transformers' Llama, every token seeing every other, and the mean of a text's states."""

    def __init__(self, llama: nn.Module):
        super().__init__()
        self.llama = llama

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        # four dimensions are taken as they are: no causal mask is added
        hidden = (1.0 - attention_mask[:, None, None, :].float()) * -1e9
        places = torch.arange(input_ids.shape[1])[None]
        output = self.llama(input_ids=input_ids, attention_mask=hidden, position_ids=places, use_cache=False)
        weights = attention_mask[..., None].float()
        return (output.last_hidden_state * weights).sum(1) / weights.sum(1)


@functools.lru_cache(maxsize=2)  # the timed model and the trained one
def converted(folder: str) -> Model:
    """`folder` in float32, any batch size and length: `input_ids`, `attention_mask` to mean vectors."""
    import openvino
    from transformers import AutoModel

    llama = AutoModel.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    llama.config.is_causal = False
    example = {"input_ids": torch.arange(3, 21).view(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    inputs = [(name, [-1, -1], openvino.Type.i64) for name in example]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing fixes what does not depend on the texts, and says so at length
        return openvino.convert_model(_MeanPooled(llama.eval()), example_input=example, input=inputs)


@functools.lru_cache(maxsize=2)  # the timed model and the trained one
def quantized(folder: str, max_length: int, calibration: tuple[str, ...]) -> Model:
    """`converted(folder)` with weights and activations in eight bits, by the statistics of `calibration`."""
    if not calibration:
        raise ValueError("there are no texts to calibrate with beside the timed ones")
    import nncf

    ids = _tokenizer(folder)(list(calibration), truncation=True, max_length=max_length)["input_ids"]
    data = nncf.Dataset([padded([row]) for row in ids])
    model = converted(folder).clone()
    return nncf.quantize(model, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(ids))


def padded(rows: Sequence[Sequence[int]]) -> dict[str, np.ndarray]:
    """Token ids as one batch: `input_ids` and `attention_mask`, int64 `(rows, longest)`."""
    shape = len(rows), max(map(len, rows))
    batch = {name: np.zeros(shape, np.int64) for name in ("input_ids", "attention_mask")}
    for place, row in enumerate(rows):
        batch["input_ids"][place, : len(row)] = row
        batch["attention_mask"][place, : len(row)] = 1
    return batch


class _Compiled:
    """A model for so many streams, that share torch's number of threads."""

    def __init__(self, model: Model, floats: str, streams: int):
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": _FLOATS[floats],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": streams,
        }
        self.model = openvino.Core().compile_model(model, "CPU", settings)
        self.queue = openvino.AsyncInferQueue(self.model, self.model.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS"))


def _encode(models: Callable[[int], _Compiled], streams: int, tokenizer, batch_size: int, max_length: int) -> Encode:
    def encode(texts: list[str]) -> np.ndarray:
        queue = models(streams).queue
        ids = tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]
        order = sorted(range(len(ids)), key=lambda place: -len(ids[place]))
        vectors: dict[int, np.ndarray] = {}

        def keep(request, places: list[int]) -> None:
            vectors.update(zip(places, request.get_output_tensor(0).data.copy(), strict=True))

        queue.set_callback(keep)
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            queue.start_async(padded([ids[place] for place in places]), places)
        queue.wait_all()
        return np.stack([vectors[place] for place in range(len(texts))])

    return encode


def description(folder: str, max_length: int, calibration: Sequence[str]) -> dict:
    """The version, and what float32 and int8 models multiply with, by name and how often; or why it is not there."""
    try:
        import openvino

        models = {"float32": converted(folder), "int8": quantized(folder, max_length, tuple(calibration))}
        found = {name: _implementations(model) for name, model in models.items()}
        return {"version": openvino.get_version(), "implementations": found}
    except Exception as error:
        return {"skipped": error_text(error)}


def _implementations(model: Model) -> dict[str, int]:
    compiled = _Compiled(model, "float32", 1).model
    compiled(padded([[3, 4, 5, 6]]))  # some are chosen when the first batch comes
    found: Counter[str] = Counter()
    for operation in compiled.get_runtime_model().get_ordered_ops():
        facts = operation.get_rt_info()
        if facts["layerType"].astype(str) in ("FullyConnected", "MatMul"):
            found[facts["primitiveType"].astype(str)] += 1
    return dict(found)
