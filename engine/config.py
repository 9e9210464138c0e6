"""What a Hugging Face `config.json` asks of the engine; whatever the engine does not do is refused by name.

Both spellings are read: that of published checkpoints (`rope_theta` and `rope_scaling`) and that of transformers 5
(`rope_parameters`). Defaults for absent keys are those of transformers' configuration classes.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .json_files import read_object

if TYPE_CHECKING:
    import torch

# window of one layer, as flash-attention writes it: (tokens seen to the left, tokens seen to the right), -1 for all
Window = tuple[int, int]
BIDIRECTIONAL: Window = (-1, -1)
CAUSAL: Window = (-1, 0)

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
# Llama without the causal mask, as NVIDIA publishes and trains it
LLAMA_BIDIREC = "llama_bidirec"
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

# classes of remote code that only leave the causal mask out, by auto class: LLM2Vec's, in merged saves, and NVIDIA's,
# from its file on the hub or NeMo Automodel's; a repository may stand before each
_KNOWN_CLASSES = {
    "AutoModel": (
        r"(McGill-NLP/[\w.-]+--)?modeling_(llama_encoder\.Llama|mistral_encoder\.Mistral)EncoderModel",
        r"(nvidia/[\w.-]+--)?(llama_bidirectional_)?model\.LlamaBidirectionalModel",
    ),
    "AutoConfig": (r"(nvidia/[\w.-]+--)?(llama_bidirectional_)?model\.LlamaBidirectionalConfig",),
}

# far beyond what exists, and small enough that a product of two is a tensor's size
_LARGEST = 2**24
_MOST_LAYERS = 4096
_MOST_POSITIONS = 2**31 - 1


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta` and, for `linear` and `llama3`, how its frequencies are scaled."""

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def inverse_frequencies(self, head_dim: int) -> "torch.Tensor":
        """Angular frequencies in radians per token, float32 `(head_dim / 2,)`.

        `llama3` is the rule of Llama 3.1: wavelengths beyond the original context are divided by `factor`, short
        ones are kept, those between are interpolated.
        """
        import torch  # here, as it takes longer to import than it takes to look at a folder's files

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
    values = read_object(path)
    try:
        return parse_config(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_config(values: dict) -> ModelConfig:
    """The `ModelConfig` of a configuration dictionary; raises ValueError naming the key that cannot be met."""
    _check_remote_code(values.get("auto_map"))
    model_type = values.get("model_type")
    if model_type == LLAMA_BIDIREC:
        model_type = "llama"
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {', '.join((*MODEL_TYPES, LLAMA_BIDIREC))}, got {model_type!r}")
    for key, neutral in _UNSUPPORTED_KEYS.items():
        if values.get(key) not in neutral:
            raise ValueError(f"{key} is not supported, got {values[key]!r:.80}")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act must be silu, got {values['hidden_act']!r:.80}")

    hidden_size = _integer(values, "hidden_size")
    num_layers = _integer(values, "num_hidden_layers", most=_MOST_LAYERS)
    num_heads = _integer(values, "num_attention_heads")
    num_key_value_heads = _integer(values, "num_key_value_heads", num_heads if model_type == "llama" else None)
    if num_heads % num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads must divide num_attention_heads ({num_heads}), got {num_key_value_heads}"
        )
    if model_type != "qwen3" and values.get("head_dim") is None and hidden_size % num_heads:
        raise ValueError(f"num_attention_heads must divide hidden_size ({hidden_size}), got {num_heads}")
    head_dim = _integer(values, "head_dim", 128 if model_type == "qwen3" else hidden_size // num_heads)
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embedding, got {head_dim}")
    if num_heads * head_dim > _LARGEST:
        raise ValueError(f"num_attention_heads times head_dim must be at most {_LARGEST}, got {num_heads * head_dim}")
    attention_bias = _flag(values, "attention_bias") and model_type in ("llama", "qwen3")
    return ModelConfig(
        model_type=model_type,
        vocab_size=_integer(values, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_integer(values, "intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        rms_norm_eps=_positive({"rms_norm_eps": 1e-6} | values, "rms_norm_eps"),
        max_position_embeddings=_integer(values, "max_position_embeddings", most=_MOST_POSITIONS),
        rope=_parse_rope(values),
        tie_word_embeddings=_flag(values, "tie_word_embeddings"),
        qkv_bias=attention_bias or model_type == "qwen2",
        output_bias=attention_bias,
        mlp_bias=_flag(values, "mlp_bias") and model_type == "llama",
        qk_norm=model_type == "qwen3",
        sliding_windows=_parse_sliding_windows(values, model_type, num_layers),
    )


def _check_remote_code(auto_map: object) -> None:
    """Refuse what only code beside the weights could compute; the known classes are computed here, no code is run."""
    if not auto_map:
        return
    for kind, name in auto_map.items() if isinstance(auto_map, dict) else [("auto_map", auto_map)]:
        known = _KNOWN_CLASSES.get(kind, ())
        if not isinstance(name, str) or not any(re.fullmatch(pattern, name) for pattern in known):
            raise ValueError(
                f"auto_map asks for remote code ({kind}: {name!r:.80}); bivec runs none, convert the checkpoint"
            )


def _parse_rope(values: dict) -> Rope:
    # in transformers rope_scaling replaces rope_parameters, theta included
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(scaling, dict):
        raise ValueError(f"rope_parameters must be an object, got {scaling!r:.80}")
    nested = next((key for key, value in scaling.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise ValueError(f"rope_parameters must hold for all layers, got some of their own for {nested!r:.80}")
    theta = _positive({"rope_theta": 10000.0} | _present(values) | _present(scaling), "rope_theta")
    rope_type = scaling.get("rope_type") or scaling.get("type") or "default"
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_TYPES)}, got {rope_type!r:.80}")
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor is not supported, got {scaling['partial_rotary_factor']!r:.80}")
    if rope_type == "default":
        return Rope(theta=theta)
    factor = _positive(scaling, "factor")
    if rope_type == "linear":
        return Rope(theta=theta, rope_type=rope_type, factor=factor)
    low, high = _positive(scaling, "low_freq_factor"), _positive(scaling, "high_freq_factor")
    if low >= high:
        raise ValueError(f"low_freq_factor must be less than high_freq_factor ({high:g}), got {low:g}")
    # the key beside rope_parameters comes before the one inside, as in transformers
    original = {"original_max_position_embeddings": values.get("max_position_embeddings")}
    original |= _present(scaling) | _present(values)
    return Rope(
        theta=theta,
        rope_type=rope_type,
        factor=factor,
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_integer(original, "original_max_position_embeddings", most=_MOST_POSITIONS),
    )


def _parse_sliding_windows(values: dict, model_type: str, num_layers: int) -> tuple[int | None, ...]:
    if model_type == "llama":
        # LlamaConfig has no such key: transformers ignores it there, so a window would change the model
        return (None,) * num_layers
    window = values.get("sliding_window", 4096)
    if not _flag(values, "use_sliding_window") and model_type != "mistral":
        window = None
    if window is not None:
        window = _integer({"sliding_window": window}, "sliding_window", most=_MOST_POSITIONS)
    layer_types = values.get("layer_types")
    if layer_types is None:
        first = 0 if model_type == "mistral" else _integer(values, "max_window_layers", 28, least=0)
        return tuple(window if layer >= first else None for layer in range(num_layers))
    if not isinstance(layer_types, list) or len(layer_types) != num_layers:
        raise ValueError(f"layer_types must hold {num_layers} entries, got {layer_types!r:.80}")
    unknown = [kind for kind in layer_types if kind not in ("sliding_attention", "full_attention")]
    if unknown:
        raise ValueError(f"layer_types must be full_attention or sliding_attention, got {unknown[0]!r:.80}")
    if window is None and "sliding_attention" in layer_types:
        raise ValueError("layer_types asks for sliding_attention, but there is no sliding_window")
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _narrower(first: int, second: int) -> int:
    """The smaller of two bounds of a window, where -1 is none."""
    return max(first, second) if min(first, second) < 0 else min(first, second)


def _present(values: dict) -> dict:
    return {key: value for key, value in values.items() if value is not None}


def _integer(values: dict, key: str, default: int | None = None, *, least: int = 1, most: int = _LARGEST) -> int:
    """`values[key]`, or the default where the key is absent or null and there is one."""
    value = default if values.get(key) is None else values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{key} must be {kind}, got {value!r:.80}")
    if value > most:
        raise ValueError(f"{key} must be at most {most}, got {value}")
    return value


def _positive(values: dict, key: str) -> float:
    value: Any = values.get(key)
    # a bound below infinity: a Python integer may be larger than any float
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"{key} must be a positive number, got {value!r:.80}")
    return float(value)


def _flag(values: dict, key: str) -> bool:
    value = values.get(key)
    if not isinstance(value, bool | None):
        raise ValueError(f"{key} must be true or false, got {value!r:.80}")
    return bool(value)
