"""A model as one folder: its adapters merged, for bivec, transformers, sentence-transformers and what reads theirs."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict

from .adapters import load_merged
from .checkpoints import resolve
from .config import BIDIRECTIONAL, load_config
from .json_files import read_object
from .ops import DTYPES
from .prompts import model_prompts
from .run_folder import RunDescription
from .tokens import copy_tokenizer, own_max_length

# sentence-transformers' name of each pooling mode
_POOLING = {"mean": "mean_tokens", "weighted_mean": "weightedmean_tokens", "last": "lasttoken", "first": "cls_token"}


def export(
    model: str | Path,
    output: str | Path,
    *,
    adapters: str | Path | Sequence[str | Path] = (),
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "bfloat16",
) -> None:
    """Merge a model's adapters and write it to a new folder.

    The configuration says `is_causal: false`, which transformers (5.3 or newer) heeds, so `AutoModel` and
    `SentenceTransformer` give bidirectional states; older versions would silently be causal. There is no
    language-model head: what was merged is an encoder.

    Args:
        model, adapters, pooling, max_length: as in `Encoder.from_pretrained`.
        output: a folder that does not exist or is empty; it appears whole or not at all.
        dtype: of the weights; each is the float32 sum of base and adapters, rounded once.
    Raises:
        ValueError, FileNotFoundError, FileExistsError: naming the argument or file and what was expected.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is not empty")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    checkpoint = resolve(model, adapters)
    config = load_config(checkpoint.base)
    run = checkpoint.run
    pooling = pooling or (run.pooling if run else "mean")
    if pooling not in _POOLING:
        raise ValueError(f"pooling must be one of {', '.join(_POOLING)}, got {pooling!r}")
    if run is not None and run.window != BIDIRECTIONAL:
        raise ValueError(f"{model} sees the window {run.window}; only a bidirectional model can be exported")
    llama = load_merged(checkpoint, config, torch.float32).to(DTYPES[dtype])

    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        save_torch_state_dict(dict(llama.named_parameters()), temporary, max_shard_size="5GB")
        _write_config(checkpoint.base, temporary, dtype)
        _write_tokenizer(checkpoint.tokenizer, temporary)
        prompts, default_prompt = model_prompts(checkpoint)
        if prompts:
            found = {"prompts": prompts, "default_prompt_name": default_prompt}
            _write_json(temporary / "config_sentence_transformers.json", found)
        if max_length is None:
            max_length = own_max_length(checkpoint.tokenizer)
        _write_modules(temporary, config.hidden_size, pooling, min(max_length, config.max_position_embeddings))
        RunDescription(
            stage="export",
            base_model=None,
            pooling=pooling,
            instruction=run.instruction if run else "",
            symmetric_instruction=run.symmetric_instruction if run else False,
            readout_shift=run.readout_shift if run else 0,
        ).write(temporary)
        _open_to_readers(temporary)
        if output.exists():
            output.rmdir()
        temporary.replace(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_config(base: Path, folder: Path, dtype: str) -> None:
    values = read_object(base / "config.json")
    values.pop("torch_dtype", None)
    architectures = [name.replace("ForCausalLM", "Model") for name in values.get("architectures") or []]
    _write_json(folder / "config.json", values | {"architectures": architectures, "dtype": dtype, "is_causal": False})


def _write_tokenizer(source: Path, folder: Path) -> None:
    """The tokenizer's files; one that cannot pad gets a padding token, without which peers refuse it."""
    copy_tokenizer(source, folder)
    path = folder / "tokenizer_config.json"
    values = read_object(path) if path.is_file() else {}
    if values.get("pad_token") is None:
        end = values.get("eos_token") or values.get("bos_token")
        if end is not None:
            _write_json(path, values | {"pad_token": end})


def _write_modules(folder: Path, width: int, pooling: str, max_length: int) -> None:
    """sentence-transformers' description of how states become vectors."""
    paths = {"Transformer": "", "Pooling": "1_Pooling"}
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(paths.items())
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_length, "do_lower_case": False})
    modes = {f"pooling_mode_{name}": mode == pooling for mode, name in _POOLING.items()}
    (folder / "1_Pooling").mkdir()
    _write_json(
        folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes, "include_prompt": False}
    )


def _open_to_readers(folder: Path) -> None:
    """Safetensors makes its files for their owner alone; give them the mode of any other new file."""
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
