"""`config.json` of an exported folder: the shape that is computed here, in the keys of every reader.

It is written anew: what else the base's file holds (code to run, a quantization that was undone, a causal mask, a
language model's stop tokens) is no part of the encoder and would mislead whoever reads it.
"""

from typing import Any

import transformers

from .config import ModelConfig, Rope

_ARCHITECTURES = {"llama": "LlamaModel", "mistral": "MistralModel", "qwen2": "Qwen2Model", "qwen3": "Qwen3Model"}
# the poolings of vLLM's LlamaBidirectionalModel and of NVIDIA's llama_bidirec
_POOLING = {"mean": "avg", "first": "cls", "last": "last"}


def exported_config(
    config: ModelConfig, tokenizer: transformers.PreTrainedTokenizerBase, *, dtype: str, pooling: str
) -> dict[str, Any]:
    """The contents of `config.json`, every size spelled out: readers' defaults differ.

    transformers, sentence-transformers, vLLM and llama.cpp become bidirectional by `is_causal`, text-embeddings-
    inference by `use_bidirectional_attention` (a Qwen 2 by `is_causal`); neither heeds the other's.

    Args:
        tokenizer: as it was written; its special tokens are the configuration's.
        dtype: of the weights.
    Raises:
        ValueError: transformers would compute something else.
    """
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "is_causal": False,
        "use_bidirectional_attention": True,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        **_rope(config.rope),
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        **_sliding_windows(config),
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        # one number each: text-embeddings-inference reads no list
        **{f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")},
        "dtype": dtype,
    }
    if config.model_type == "llama" and pooling in _POOLING:
        values["pooling"] = _POOLING[pooling]
    return values


def _rope(rope: Rope) -> dict[str, Any]:
    """`rope_parameters` of transformers 5, and what readers knew before: `rope_theta`, and `rope_scaling` if any.

    transformers takes `rope_scaling` where both are there, and adds the theta beside it: the same. Without it
    text-embeddings-inference would compute an unscaled rope, and say nothing; with it, it refuses a Llama.
    """
    scaling: dict[str, Any] = {"rope_type": rope.rope_type}
    if rope.rope_type != "default":
        scaling["factor"] = rope.factor
    if rope.rope_type == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling["original_max_position_embeddings"] = rope.original_max_position_embeddings
    values = {"rope_theta": rope.theta, "rope_parameters": {"rope_theta": rope.theta, **scaling}}
    return values if rope.rope_type == "default" else values | {"rope_scaling": scaling}


def _sliding_windows(config: ModelConfig) -> dict[str, Any]:
    """The layers that see a window only: of a Mistral all or none, of a Qwen any."""
    if config.model_type == "llama":
        return {}
    windows = config.sliding_windows
    window = next((window for window in windows if window is not None), None)
    if config.model_type == "mistral":
        if len(set(windows)) > 1:
            raise ValueError(
                "layer_types gives some layers of a mistral a sliding window, which transformers would give to all; "
                "it cannot be exported"
            )
        return {"sliding_window": window}
    return {
        "use_sliding_window": window is not None,
        "sliding_window": window,
        "max_window_layers": windows.index(window) if window is not None else len(windows),
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }
