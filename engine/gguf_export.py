"""A model as one GGUF file, its adapters merged, for llama.cpp and what is built on it.

The file says that attention is not causal and how tokens are pooled, which llama.cpp heeds. What it cannot say is the
program's: llama.cpp knows no prompts and would pool them, cuts no texts, and gives vectors of length 1 or not as asked.
"""

import importlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .adapters import load_merged
from .checkpoints import Checkpoint, resolve
from .config import BIDIRECTIONAL, ModelConfig, Rope, load_config
from .gguf_tokenizer import tokenizer_keys
from .lengths import within_positions
from .model import LlamaModel
from .outputs import open_file
from .prompts import model_prompts
from .tokens import TextTokenizer, load_tokenizer

# names in llama.cpp: of architectures (Mistral is Llama there), of pooling modes, of files of each dtype
_ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_POOLING = {"mean": "MEAN", "first": "CLS", "last": "LAST"}
_DTYPES = {
    "float32": ("F32", "ALL_F32"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "float16": ("F16", "MOSTLY_F16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_LARGEST_FLOAT16 = 65504.0


def export_gguf(
    model: str | Path,
    output: str | Path,
    *,
    adapters: str | Path | Sequence[str | Path] = (),
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "bfloat16",
    normalize: bool = False,
) -> None:
    """Merge a model's adapters and write it to a new file.

    Warns of prompts, which have to be put before texts by whoever sends them, and of texts whose tokens differ in
    llama.cpp.

    Args:
        model, adapters, pooling: as in `Encoder.from_pretrained`; weighted_mean is none of llama.cpp's.
        output: a file that does not exist; it appears whole or not at all.
        max_length: the file's context length; default: what the model can take, at most the tokens in which a sliding
            window shows all.
        dtype: float32, bfloat16, float16 or q8_0 (8 bits, and a float16 scale for each 32 of a row) of the matrices;
            vectors stay float32. Rows of other lengths than multiples of 32 are float16 in a q8_0 file.
        normalize: must be false: llama.cpp's programs are asked to (`--embd-normalize`).
    Raises:
        ValueError, FileNotFoundError, FileExistsError: naming the argument, the file or the field that does not fit.
    """
    gguf = _gguf()
    if normalize:
        raise ValueError(
            "normalize cannot be said in a GGUF file: llama.cpp's programs normalise when they are asked to"
        )
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
    checkpoint = resolve(model, adapters)
    config = load_config(checkpoint.base)
    if max_length is not None:
        within_positions(max_length, max_length, config.max_position_embeddings)
    run = checkpoint.description
    pooling = pooling or run.pooling
    if pooling not in _POOLING:
        raise ValueError(f"pooling must be one of {', '.join(_POOLING)} in a GGUF file, got {pooling!r}")
    if run.window != BIDIRECTIONAL:
        raise ValueError(f"{model} sees the window {run.window}; only a bidirectional model can be exported")
    if not run.pools_special_tokens and pooling != "last":
        raise ValueError(f"{model} does not pool special tokens, which llama.cpp does; it cannot be a GGUF file")
    if any(run.template):
        raise ValueError(f"{model} puts a chat template around texts, which a GGUF file cannot tell llama.cpp")
    _check_prompts(checkpoint, pools_prompt=pooling == "last" or run.pools_prompt)
    try:
        of_model = _model_keys(config, max_length)
    except ValueError as error:
        raise ValueError(f"{checkpoint.base / 'config.json'} cannot be written as GGUF: {error}") from error
    loaded = load_tokenizer(checkpoint.tokenizer, config.vocab_size)
    tokenizer = TextTokenizer(loaded, of_model["context_length"]).hugging_face
    try:
        keys, caveats = tokenizer_keys(tokenizer, config.vocab_size)
    except ValueError as error:
        raise ValueError(
            f"the tokenizer of {checkpoint.tokenizer} cannot be written as GGUF: {error}; export the model as a folder"
        ) from error
    if caveats:
        warnings.warn(f"llama.cpp gives other tokens to texts that {' or '.join(caveats)}", stacklevel=2)
    of_model |= {"attention.causal": False, "pooling_type": int(gguf.PoolingType[_POOLING[pooling]])}
    keys |= {f"{_ARCHITECTURES[config.model_type]}.{key}": value for key, value in of_model.items()}
    keys |= {"general.file_type": int(gguf.LlamaFileType[_DTYPES[dtype][1]])}
    keys |= {"general.quantization_version": gguf.GGML_QUANT_VERSION}
    inputs = [checkpoint.base, checkpoint.tokenizer, *checkpoint.adapters]
    with open_file(Path(output), inputs) as path:
        _write(gguf, path, keys, load_merged(checkpoint, config, torch.float32), dtype)


def _gguf() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ValueError(f"a GGUF file needs the package gguf: pip install 'bivec[gguf]' ({error})") from error


def _check_prompts(checkpoint: Checkpoint, *, pools_prompt: bool) -> None:
    """Warn of prompts by name; raises ValueError where one stands before every text and is not pooled."""
    prompts, default = model_prompts(checkpoint)
    prompts = {name: prompt for name, prompt in prompts.items() if prompt}
    if default in prompts and not pools_prompt:
        raise ValueError(
            f"{checkpoint.name} puts {prompts[default]!r} before every text and does not pool it; llama.cpp would, so "
            "a GGUF file could not give its vectors: use `bivec export` as a folder"
        )
    if prompts:
        does = "as the model does" if pools_prompt else "which the model does not do: vectors of such texts differ"
        listed = ", ".join(f"{name} {prompt!r}" for name, prompt in prompts.items())
        warnings.warn(f"put prompts before texts yourself ({listed}); llama.cpp pools them, {does}", stacklevel=3)


def _model_keys(config: ModelConfig, max_length: int | None) -> dict[str, Any]:
    """Sizes and rotary embedding, in llama.cpp's words; raises ValueError where it would compute something else."""
    qwen = config.model_type.startswith("qwen")
    if config.model_type == "qwen2" and config.num_attention_heads * config.head_dim != config.hidden_size:
        raise ValueError(f"head_dim must be hidden_size / num_attention_heads in Qwen2, got {config.head_dim}")
    if qwen and (config.output_bias or config.rope.rope_type == "llama3"):
        found = "attention_bias" if config.output_bias else "rope_type llama3"
        raise ValueError(f"{found} is not supported in {config.model_type}")
    shown = [config.max_position_embeddings, *(window for window in config.sliding_windows if window is not None)]
    rope = config.rope
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": rope.factor}
    return {
        "context_length": min(shown if max_length is None else [*shown, max_length]),
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": rope.theta,
        "vocab_size": config.vocab_size,
        **(linear if rope.rope_type == "linear" else {}),
    }


def _tensors(gguf: Any, llama: LlamaModel) -> dict[str, torch.Tensor]:
    """The weights under llama.cpp's names, in its layout."""
    config = llama.config
    architecture = _ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[architecture.upper()], config.num_hidden_layers)
    tensors = {}
    for name, tensor in llama.named_parameters():
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            # rotary embedding turns neighbours in its Llama; here, and in its Qwen, numbers half a head apart
            tensor = tensor.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).flatten(0, 2)
        tensors[names.get_name(f"model.{name}", (".weight", ".bias"))] = tensor.detach()
    if config.rope.rope_type == "llama3":
        unscaled = Rope(theta=config.rope.theta).inverse_frequencies(config.head_dim)
        tensors["rope_freqs.weight"] = unscaled / config.rope.inverse_frequencies(config.head_dim)
    return tensors


def _write(gguf: Any, path: Path, keys: dict[str, Any], llama: LlamaModel, dtype: str) -> None:
    """Write the keys, then one tensor after the other."""
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[llama.config.model_type])
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for key, value in keys.items():
        adders.get(type(value), writer.add_array)(key, value)
    tensors = _tensors(gguf, llama)
    kinds = {name: _kind(gguf, name, tensor, dtype) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
        writer.add_tensor_info(name, tensor.shape, np.dtype(np.float32), tensor.numel() // block * size, kinds[name])
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():
            writer.write_tensor_data(gguf.quantize(tensor.contiguous().numpy(), kinds[name]))
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(f"the weights cannot be written to {path}: {error}") from error  # numpy names no file
    finally:
        writer.close()


def _kind(gguf: Any, name: str, tensor: torch.Tensor, dtype: str) -> Any:
    """The type of a tensor in the file; raises ValueError where it has too little range."""
    kinds = gguf.GGMLQuantizationType
    if tensor.ndim == 1:
        return kinds.F32
    kind = kinds.F16 if dtype == "q8_0" and tensor.shape[-1] % 32 else kinds[_DTYPES[dtype][0]]
    if kind == kinds.F16 and (largest := float(tensor.abs().max())) > _LARGEST_FLOAT16:
        raise ValueError(f"{name} holds {largest:g}, too large for float16: choose float32 or bfloat16")
    return kind
