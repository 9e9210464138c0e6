"""What a Hugging Face `config.json` asks of the engine; whatever the engine does not do is refused by name.

Both spellings are read: that of published checkpoints (`rope_theta` and `rope_scaling`) and that of transformers 5
(`rope_parameters`). Defaults for absent keys are those of transformers' configuration classes.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch

# window of one layer, as flash-attention writes it: (tokens seen to the left, tokens seen to the right), -1 for all
Window = tuple[int, int]
BIDIRECTIONAL: Window = (-1, -1)
CAUSAL: Window = (-1, 0)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3")

# keys of related architectures that change the arithmetic; their neutral values are harmless
_UNSUPPORTED_KEYS: dict[str, tuple] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1, 1.0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "embedding_multiplier": (None, 1, 1.0),
    "residual_multiplier": (None, 1, 1.0),
    "attention_multiplier": (None,),
    "logits_scaling": (None, 1, 1.0),
    "attention_chunk_size": (None,),
    "no_rope_layers": (None, []),
    "clip_qkv": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
}


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta` and, for `linear` and `llama3`, how its frequencies are scaled."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """Angular frequencies in radians per token, float32 `(head_dim / 2,)`.

        `llama3` is the rule of Llama 3.1: wavelengths beyond the original context are divided by `factor`, short
        ones are kept, those between are interpolated.
        """
        frequencies = 1.0 / (self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim))
        if self.rope_type == "linear":
            return frequencies / self.factor
        if self.rope_type == "llama3":
            turns = self.original_max_position_embeddings * frequencies / (2 * math.pi)  # within the original context
            kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            kept = kept.clamp(0.0, 1.0)
            return (1 - kept) * frequencies / self.factor + kept * frequencies
        return frequencies


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a packed Llama. Sizes in elements; `sliding_windows` holds one entry a layer, None for none."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Rope
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]

    @property
    def bidirectional_windows(self) -> tuple[Window, ...]:
        """Each layer's window as an encoder: all tokens, or those within distance `w` (inclusive)."""
        return tuple(BIDIRECTIONAL if w is None else (w, w) for w in self.sliding_windows)

    @property
    def causal_windows(self) -> tuple[Window, ...]:
        """Each layer's window as a language model: the token itself and what is before it (within distance < w)."""
        return tuple((-1, 0) if w is None else (w - 1, 0) for w in self.sliding_windows)

    def windows(self, window: Window) -> tuple[Window, ...]:
        """One window a layer: `window`, narrowed where the architecture itself slides one."""
        if window == CAUSAL:
            return self.causal_windows
        return tuple(
            (_narrower(window[0], left), _narrower(window[1], right)) for left, right in self.bidirectional_windows
        )

    @property
    def linear_flops_per_token(self) -> int:
        """Floating-point operations of the decoder's matrix products for one token; attention itself is not counted."""
        attention = self.hidden_size * self.head_dim * 2 * (self.num_attention_heads + self.num_key_value_heads)
        return 2 * self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)


def load_config(folder: str | Path) -> ModelConfig:
    """Read `folder/config.json`.

    Raises:
        ValueError: the file asks for something that the engine does not do, or lacks a size.
        FileNotFoundError: there is no such file.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a checkpoint folder holds config.json and *.safetensors")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(values).__name__}")
    try:
        return parse_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(values: dict) -> ModelConfig:
    """The `ModelConfig` of a configuration dictionary; raises ValueError naming the key that cannot be met."""
    if values.get("auto_map"):
        raise ValueError(
            f"auto_map asks for remote code ({values['auto_map']}); bivec runs none, convert the checkpoint"
        )
    model_type = values.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join(MODEL_TYPES)}, got {model_type!r}")
    for key, neutral in _UNSUPPORTED_KEYS.items():
        if values.get(key) not in neutral:
            raise ValueError(f"{key} is not supported, got {values[key]!r}")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be silu, got {values['hidden_act']!r}")

    hidden_size = _positive_int(values, "hidden_size")
    num_layers = _positive_int(values, "num_hidden_layers")
    num_heads = _positive_int(values, "num_attention_heads")
    default_heads = {"num_key_value_heads": num_heads} if model_type == "llama" else {}
    num_key_value_heads = _positive_int(default_heads | _present(values), "num_key_value_heads")
    if num_heads % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads must divide num_attention_heads ({num_heads}), got {num_key_value_heads}"
        )
    default_head_dim = 128 if model_type == "qwen3" else hidden_size // num_heads
    head_dim = _positive_int({"head_dim": default_head_dim} | _present(values), "head_dim")
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embedding, got {head_dim}")
    attention_bias = bool(values.get("attention_bias", False)) and model_type in ("llama", "qwen3")
    return ModelConfig(
        model_type=model_type,
        vocab_size=_positive_int(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive_int(values, "intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=float(values.get("rms_norm_eps", 1e-6)),
        max_position_embeddings=_positive_int(values, "max_position_embeddings"),
        rope=_parse_rope(values),
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=bool(values.get("mlp_bias", False)) and model_type == "llama",
        qk_norm=model_type == "qwen3",
        sliding_windows=_parse_sliding_windows(values, model_type, num_layers),
    )


def _parse_rope(values: dict) -> Rope:
    theta = values.get("rope_theta")
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_parameters must be an object, got {scaling!r}")
    theta = float(scaling.get("rope_theta") or theta or 10000.0)
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r}")
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor is not supported, got {scaling['partial_rotary_factor']!r}")
    if rope_type == "default":
        return Rope(theta=theta)
    if rope_type == "linear":
        return Rope(theta=theta, rope_type=rope_type, factor=_positive_float(scaling, "factor"))
    original = scaling.get("original_max_position_embeddings") or values.get("original_max_position_embeddings")
    return Rope(
        theta=theta,
        rope_type=rope_type,
        factor=_positive_float(scaling, "factor"),
        low_freq_factor=_positive_float(scaling, "low_freq_factor"),
        high_freq_factor=_positive_float(scaling, "high_freq_factor"),
        original_max_position_embeddings=int(original or values["max_position_embeddings"]),
    )


def _parse_sliding_windows(values: dict, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    if model_type == "llama":
        # LlamaConfig has no such key: transformers ignores it there, so a window would change the model
        return (None,) * num_layers
    window = values.get("sliding_window", 4096)
    if model_type != "mistral" and not values.get("use_sliding_window", False):
        window = None
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"sliding_window must be a positive integer or null, got {window!r}")
    if model_type == "mistral":
        if len(set(values.get("layer_types") or ())) > 1:
            raise ValueError(f"layer_types of mistral must not alternate, got {values['layer_types']}")
        return (window,) * num_layers
    layer_types = values.get("layer_types")
    if layer_types is None:
        first = values.get("max_window_layers", 28)
        layer_types = ["sliding_attention" if i >= first else "full_attention" for i in range(num_layers)]
    if len(layer_types) != num_layers:
        raise ValueError(f"layer_types must hold {num_layers} entries, got {len(layer_types)}")
    unknown = set(layer_types) - {"sliding_attention", "full_attention"}
    if unknown:
        raise ValueError(f"layer_types must be full_attention or sliding_attention, got {sorted(unknown)}")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _narrower(first: int, second: int) -> int:
    """The smaller of two bounds of a window, where -1 is none."""
    return max(first, second) if min(first, second) < 0 else min(first, second)


def _present(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def _positive_int(values: dict, key: str) -> int:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be a positive integer, got {value!r}")
    return value


def _positive_float(values: dict, key: str) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise ValueError(f"rope scaling needs {key} as a positive number, got {value!r}")
    return float(value)
