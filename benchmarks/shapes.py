"""Named Llama shapes: a random checkpoint of each, its linears' arithmetic, and the best rate these run at here."""

import gzip
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from ..engine.int8 import Int8Linear
from .timing import FLUSH_BYTES, error_text, measure


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float
    tied: bool

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out, in) of one layer's linears as an encoder runs them: q/k/v and gate/up are one product each."""
        queries, keys = self.num_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return [
            (queries + 2 * keys, self.hidden_size),
            (self.hidden_size, queries),
            (2 * self.intermediate_size, self.hidden_size),
            (self.hidden_size, self.intermediate_size),
        ]

    @property
    def flops_per_token(self) -> int:
        """Of all layers' linears; the head is not run to embed, attention is left out."""
        return 2 * self.num_layers * sum(rows * columns for rows, columns in self.linears)


SHAPES = {
    "quick": Shape(128, 384, 2, 4, 2, 32, 1e4, True),
    "135M": Shape(576, 1536, 30, 9, 3, 64, 1e4, True),  # SmolLM-135M
    "1B": Shape(2048, 8192, 16, 32, 8, 64, 5e5, True),  # Llama-3.2-1B, without its scaled rope
    "8B": Shape(4096, 14336, 32, 32, 8, 128, 5e5, False),  # Llama-3-8B
}


def write_checkpoint(
    shape: Shape, folder: str | Path, texts: list[str], *, tokenizer: str | Path | None = None, device: str = "cpu"
) -> None:
    """Save a Llama of this shape, random (normal, standard deviation 0.02, seed 0), in bfloat16 as most are published.

    `tokenizer` is a tokenizer.json (.gz) or a folder that holds one; without it a small one is trained on `texts`.
    """
    from transformers import AutoModelForCausalLM, LlamaConfig

    fast = _load_tokenizer(tokenizer) if tokenizer else _train_tokenizer(texts)
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=1e-5,
        tie_word_embeddings=shape.tied,
        initializer_range=0.02,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def linear_rates(shape: Shape, dtype: torch.dtype, device: str | torch.device, *, rounds: int = 4) -> dict:
    """Best measured FLOP/s of the linears alone, `best` over the ways tried: the ceiling of the whole encoder.

    Every layer has weights of its own up to four times what a cache holds, so that they come from memory as in a model.
    """
    device = torch.device(device)
    columns_of = sum(rows * columns for rows, columns in shape.linears)
    num_layers = min(shape.num_layers, math.ceil(FLUSH_BYTES / (columns_of * dtype.itemsize)))
    sizes = shape.linears * num_layers
    if dtype == torch.int8:
        weights = [torch.randint(-127, 128, size, dtype=torch.int8) for size in sizes]
    else:
        weights = [torch.randn(size, device=device).to(dtype) * 0.02 for size in sizes]
    rates: dict = {"best": None}
    for rows in (8192,) if device.type == "cuda" else (256, 1024):
        inputs = {columns: torch.randn(rows, columns, device=device).to(dtype) for _, columns in shape.linears}
        ways: dict[str, Callable | str] = {}
        if dtype == torch.int8:
            ways[f"prepacked, {rows} rows"] = _prepacked_int8(weights, inputs)
        else:
            ways[f"plain, {rows} rows"] = _all_linears(F.linear, weights, inputs)
            if device.type == "cpu":
                ways[f"prepacked, {rows} rows"] = _prepacked(weights, inputs, rows)
        for name, timing in measure(ways, rounds=rounds, warmup=1, device=device).items():
            flops = 2 * rows * num_layers * columns_of
            rates[name] = timing.skipped or flops / min(timing.seconds)
    rates["best"] = max((rate for rate in rates.values() if isinstance(rate, float)), default=None)
    return rates


def _all_linears(linear: Callable, weights: list, inputs: dict[int, torch.Tensor], widths=None) -> Callable[[], None]:
    widths = widths or [weight.shape[1] for weight in weights]

    @torch.inference_mode()
    def run() -> None:
        for weight, width in zip(weights, widths, strict=True):
            linear(inputs[width], weight)

    return run


def _prepacked(weights: list[torch.Tensor], inputs: dict[int, torch.Tensor], rows: int) -> Callable[[], None] | str:
    """The same products on weights that oneDNN has laid out for so many rows."""
    try:
        with torch.inference_mode():
            packed = [torch.ops.mkldnn._reorder_linear_weight(weight, rows) for weight in weights]
    except (AttributeError, RuntimeError) as error:
        return error_text(error)

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")

    return _all_linears(linear, packed, inputs, widths=[weight.shape[1] for weight in weights])


def _prepacked_int8(weights: list[torch.Tensor], inputs: dict[int, torch.Tensor]) -> Callable[[], None] | str:
    """Products of rows and weights that are eight bits already, without what quantises rows."""
    rows = {columns: (x.int() + 128).to(torch.uint8) for columns, x in inputs.items()}
    try:
        with torch.inference_mode():
            packed = [Int8Linear(weight, None) for weight in weights]
    except (AttributeError, RuntimeError) as error:
        return error_text(error)

    def linear(x: torch.Tensor, weight: Int8Linear) -> torch.Tensor:
        return weight(x)

    return _all_linears(linear, packed, rows, widths=[weight.shape[1] for weight in weights])


def _load_tokenizer(path: str | Path):
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    path = Path(path)
    path = path / "tokenizer.json" if path.is_dir() else path
    text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text(encoding="utf-8")
    special = {token["content"] for token in json.loads(text)["added_tokens"] if token["special"]}
    missing = {"<s>", "</s>"} - special
    if missing:
        raise ValueError(f"tokenizer {path} must have the special tokens <s> and </s>, lacks {sorted(missing)}")
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(text), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def _train_tokenizer(texts: list[str], vocab_size: int = 8192):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
