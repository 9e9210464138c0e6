"""What LLM2Vec itself computes, for `test_llm2vec_vectors.py`: two small stacks, and the vectors that it gives them.

Run with LLM2Vec's own code (github.com/McGill-NLP/llm2vec at 312adcf) in an environment that it works with:

    pip install llm2vec transformers==4.44.2 peft==0.12.0 safetensors numpy
    python tests/engine/llm2vec_vectors.py tests/engine/llm2vec_vectors.json

All files of the stacks are written here, with weights from numpy's `RandomState`, whose numbers no release changes.
"""

import json
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LLAMA_2, LLAMA_3 = "LLM2Vec-Llama-2-7b-chat-hf", "LLM2Vec-Meta-Llama-3-8B-Instruct"
# what LLM2Vec chooses a template by
BASES = {LLAMA_2: "meta-llama/Llama-2-7b-chat-hf", LLAMA_3: "meta-llama/Meta-Llama-3-8B-Instruct"}
STAGES = ("mntp", "mntp-supervised")
INSTRUCTION = "find what answers it:"
# each begins with a word that is one token alone and behind a space: else LLM2Vec, which counts the tokens of the text
# alone, pools some of the instruction's
TEXTS = [
    "the quick fox",
    "the dog \n",
    "Fox, 7 dogs!",
    "dog naïve café",
    "the quick brown fox, the lazy dog " * 4,
]

_WORDS = ("the", "quick", "brown", "fox", "Fox", "dog", "find", "what", "INST", "user")
_LAYERS, _HIDDEN, _INNER, _HEADS, _KEY_VALUE_HEADS, _RANK = 2, 32, 48, 4, 2, 4
_LINEARS = {
    "self_attn.q_proj": (_HIDDEN, _HIDDEN),
    "self_attn.k_proj": (_HIDDEN * _KEY_VALUE_HEADS // _HEADS, _HIDDEN),
    "self_attn.v_proj": (_HIDDEN * _KEY_VALUE_HEADS // _HEADS, _HIDDEN),
    "self_attn.o_proj": (_HIDDEN, _HIDDEN),
    "mlp.gate_proj": (_INNER, _HIDDEN),
    "mlp.up_proj": (_INNER, _HIDDEN),
    "mlp.down_proj": (_HIDDEN, _INNER),
}


def write_stack(folder: Path, stack: str) -> Path:
    """Write base, MNTP and supervised adapter as folders of `folder`; returns that of the supervised one."""
    tokenizer, settings = _sentencepiece() if stack == LLAMA_2 else _byte_level()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(tokenizer["model"]["vocab"]) + len(tokenizer["added_tokens"]),
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _KEY_VALUE_HEADS,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    base, mntp, supervised = folder / "base", *(folder / f"{stack}-{stage}" for stage in STAGES)
    for place in (base, mntp, supervised):
        place.mkdir(parents=True)
    for place in (base, mntp):
        _write(place / "tokenizer.json", tokenizer)
        _write(place / "tokenizer_config.json", settings)
    _write(base / "config.json", config)
    classes = {"AutoModel": "modeling_llama_encoder.LlamaEncoderModel"}
    _write(mntp / "config.json", config | {"_name_or_path": BASES[stack], "auto_map": classes})
    normal = np.random.RandomState(0).normal
    shapes = {f"layers.{layer}.{name}": shape for layer in range(_LAYERS) for name, shape in _LINEARS.items()}
    weights = {f"model.{name}.weight": normal(0, 0.2, shape) for name, shape in shapes.items()}
    for name in ("model.embed_tokens", "lm_head"):
        weights[f"{name}.weight"] = normal(0, 0.2, (config["vocab_size"], _HIDDEN))
    norms = [f"layers.{layer}.{name}_layernorm" for layer in range(_LAYERS) for name in ("input", "post_attention")]
    for name in (*norms, "norm"):
        weights[f"model.{name}.weight"] = normal(1, 0.2, _HIDDEN)
    _save(base / "model.safetensors", weights)
    for place in (mntp, supervised):
        factors = {}
        for name, (rows, columns) in shapes.items():
            factors[f"base_model.model.{name}.lora_A.weight"] = normal(0, 0.2, (_RANK, columns))
            factors[f"base_model.model.{name}.lora_B.weight"] = normal(0, 0.1, (rows, _RANK))
        _save(place / "adapter_model.safetensors", factors)
        adapter = {
            "auto_mapping": {
                "base_model_class": "LlamaBiModel",
                "parent_library": "llm2vec.models.bidirectional_llama",
            },
            "base_model_name_or_path": str(base.resolve()),
            "bias": "none",
            "inference_mode": True,
            "lora_alpha": 2 * _RANK,
            "lora_dropout": 0.05,
            "peft_type": "LORA",
            "r": _RANK,
            "target_modules": [name.rpartition(".")[2] for name in _LINEARS],
            "task_type": None,
        }
        _write(place / "adapter_config.json", adapter)
    return supervised


def _sentencepiece() -> tuple[dict, dict]:
    """As Llama 2's: spaces are `▁`, one more stands in front, what is unknown falls apart into bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁[]/:,!.", *_letters()]
    model = _bpe(tokens, "▁") | {
        "unk_token": "<unk>",
        "fuse_unk": True,
        "byte_fallback": True,
    }
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, spaces]}
    return _tokenizer(model, ["<unk>", "<s>", "</s>"], normalizer=normalizer)


def _byte_level() -> tuple[dict, dict]:
    """As Llama 3's: bytes, and special tokens that make up its template."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = (byte for byte in range(256) if byte not in printable)
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    special = ["<unk>", "<s>", "</s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    model = _bpe([*special[:3], *(letters[byte] for byte in range(256))], "Ġ")
    split = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return _tokenizer(model, special, pre_tokenizer=split)


def _letters() -> list[str]:
    return [chr(place) for first, last in ("az", "AZ", "09") for place in range(ord(first), ord(last) + 1)]


def _bpe(tokens: list[str], space: str) -> dict:
    """A vocabulary in which each word is one token, alone and behind a space."""
    begun = dict.fromkeys((word[:place], word[place]) for word in _WORDS for place in range(1, len(word)))
    merges = [*begun, *((space, word) for word in _WORDS)]
    tokens = [*tokens, *("".join(pair) for pair in merges)]
    return {
        "type": "BPE",
        "vocab": {token: place for place, token in enumerate(tokens)},
        "merges": [" ".join(pair) for pair in merges],
    }


def _tokenizer(model: dict, special: list[str], **parts: dict) -> tuple[dict, dict]:
    """`tokenizer.json`, which puts BOS before a text, and `tokenizer_config.json`."""
    vocabulary = model["vocab"]
    places = [vocabulary.get(token, len(vocabulary) + place - 3) for place, token in enumerate(special)]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    bos = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": place, "content": token} | plain for place, token in zip(places, special, strict=True)],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": None,
        "model": model,
    }
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return description | parts, settings


def _write(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")


def _save(path: Path, tensors: dict[str, np.ndarray]) -> None:
    save_file({name: tensor.astype(np.float32) for name, tensor in tensors.items()}, path, metadata={"format": "pt"})


def _main(output: str) -> None:
    import tempfile

    import torch
    import transformers
    from llm2vec import LLM2Vec

    vectors = {}
    for stack in BASES:
        with tempfile.TemporaryDirectory() as folder:
            supervised = write_stack(Path(folder), stack)
            mntp = supervised.parent / f"{stack}-{STAGES[0]}"
            for stage, upper in (("mntp", None), ("mntp-supervised", str(supervised))):
                model = LLM2Vec.from_pretrained(str(mntp), peft_model_name_or_path=upper, torch_dtype=torch.float32)
                for instruction in ("", INSTRUCTION):
                    pairs = [[instruction, text] for text in TEXTS]
                    found = model.encode(pairs, convert_to_numpy=True, show_progress_bar=False)
                    vectors[f"{stack}-{stage} {instruction}".strip()] = [[round(float(x), 6) for x in v] for v in found]
    made_by = f"llm2vec 312adcf, transformers {transformers.__version__}, torch {torch.__version__}"
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in vectors.items())
    Path(output).write_text(f'{{\n  "made_by": {json.dumps(made_by)},\n{lines}\n}}\n')


if __name__ == "__main__":
    _main(sys.argv[1])
