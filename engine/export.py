"""A model as one folder: its adapters merged, for bivec, transformers, sentence-transformers and what reads theirs."""

import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError

from .adapters import load_merged
from .checkpoints import Checkpoint, resolve
from .config import BIDIRECTIONAL, load_config
from .dtypes import DTYPES
from .export_config import exported_config
from .export_tokenizer import check_tokenizer, write_json, write_tokenizer
from .lengths import text_length
from .model import LlamaModel
from .modules import LEGACY_MODES, MAX_LENGTH_FILE, MODES
from .outputs import open_folder
from .prompts import PROMPTS_FILE, document_prompt, model_prompts
from .run_folder import POOLINGS, RUN_FILE, RunDescription
from .tokens import TextTokenizer, load_tokenizer

_FILES = re.compile(
    r"(config|tokenizer|tokenizer_config|modules|(1_Pooling|2_Normalize)/config|model\.safetensors\.index)\.json"
    rf"|tokenizer\.model|model(-\d+-of-\d+)?\.safetensors|{PROMPTS_FILE}|{MAX_LENGTH_FILE}|{RUN_FILE}"
)


def export(
    model: str | Path,
    output: str | Path,
    *,
    adapters: str | Path | Sequence[str | Path] = (),
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "bfloat16",
    normalize: bool = False,
) -> None:
    """Merge a model's adapters and write it to a new folder.

    The configuration says `is_causal: false`, which transformers (5.3 or newer) heeds, so `AutoModel` and
    `SentenceTransformer` give bidirectional states; older versions would silently be causal. There is no
    language-model head: what was merged is an encoder.

    Args:
        model, adapters, pooling, max_length: as in `Encoder.from_pretrained`.
        output: a folder that does not exist or is empty; it appears whole or not at all.
        dtype: of the weights; each is the float32 sum of base and adapters, rounded once.
        normalize: whether every vector has length 1 (a Normalize module), as it has where the model itself says so.
    Raises:
        ValueError, FileNotFoundError, FileExistsError: naming the argument or file and what was expected.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    checkpoint = resolve(model, adapters)
    config = load_config(checkpoint.base)
    run = replace(checkpoint.description, stage="export", base_model=None, earlier=())
    run = replace(run, pooling=pooling or run.pooling, normalize=normalize or run.normalize)
    if run.pooling not in POOLINGS:
        raise ValueError(f"pooling must be one of {', '.join(POOLINGS)}, got {run.pooling!r}")
    if run.window != BIDIRECTIONAL:
        raise ValueError(f"{model} sees the window {run.window}; only a bidirectional model can be exported")
    if any(run.template):
        raise ValueError(
            f"{model} puts texts into the chat template {run.template!r:.200}, which no other reader can be told; use "
            "it as it is, or export its adapters with --adapter-only"
        )
    prompts, default_prompt = _exported_prompts(checkpoint, run)
    max_length = text_length(checkpoint, config, max_length)
    tokenizer = TextTokenizer.described(load_tokenizer(checkpoint.tokenizer, config.vocab_size), max_length, run)

    inputs = [checkpoint.base, checkpoint.tokenizer, *checkpoint.adapters]
    with open_folder(Path(output), inputs, _FILES) as folder:
        write_tokenizer(
            tokenizer.hugging_face,
            folder,
            # where it is prompts alone that count, their last spaces count too
            prompts=None if run.counts_prompt_alone else prompts.values(),
            max_length=max_length,
            vocab_size=config.vocab_size,
        )
        # transformers asks it for the kind of model before it reads the tokenizer
        write_json(folder / "config.json", {"model_type": config.model_type})
        written = load_tokenizer(folder, config.vocab_size)
        write_json(folder / "config.json", exported_config(config, written, dtype=dtype, pooling=run.pooling))
        check_tokenizer(tokenizer, written, prompts, counted=run.pooling != "last")
        if (checkpoint.tokenizer / "tokenizer.model").is_file():  # llama.cpp's converter looks for it
            shutil.copyfile(checkpoint.tokenizer / "tokenizer.model", folder / "tokenizer.model")
        if prompts:
            write_json(folder / PROMPTS_FILE, {"prompts": prompts, "default_prompt_name": default_prompt})
        _write_modules(folder, config.hidden_size, run, max_length)
        run.write(folder)
        _write_weights(load_merged(checkpoint, config, torch.float32).to(DTYPES[dtype]), folder)


def _exported_prompts(checkpoint: Checkpoint, run: RunDescription) -> tuple[dict[str, str], str | None]:
    """Prompts by name and the default's name, such that sentence-transformers takes the same for queries and documents.

    Raises:
        ValueError: there is a prompt, and sentence-transformers would pool a text after it otherwise than bivec.
    """
    prompts, default = model_prompts(checkpoint)
    if "document" not in prompts and document_prompt(prompts):
        prompts["document"] = document_prompt(prompts)
    for name, prompt in prompts.items():
        if prompt and run.pooling == "weighted_mean" and not run.pools_prompt:
            raise ValueError(
                f"pooling 'weighted_mean' cannot be exported with the prompt {name!r} ({prompt!r}): "
                "sentence-transformers' weights begin with the prompt's tokens, bivec's with the text's; use the model "
                "as it is, or export it with another pooling"
            )
    return prompts, default


def _write_weights(llama: LlamaModel, folder: Path) -> None:
    """Safetensors, with the mode of any other new file: it makes them for their owner alone."""
    try:
        save_torch_state_dict(dict(llama.named_parameters()), folder, max_shard_size="5GB")
    except SafetensorError as error:
        raise OSError(f"the weights cannot be written to {folder}: {error}") from error
    mode = (folder / "config.json").stat().st_mode
    for path in folder.glob("*.safetensors"):
        path.chmod(mode)


def _write_modules(folder: Path, width: int, run: RunDescription, max_length: int) -> None:
    """sentence-transformers' description of how states become vectors, in the spelling that other readers know too."""
    paths = {"Transformer": "", "Pooling": "1_Pooling"} | ({"Normalize": "2_Normalize"} if run.normalize else {})
    modules = [
        {"idx": place, "name": str(place), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for place, (kind, path) in enumerate(paths.items())
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / MAX_LENGTH_FILE, {"max_seq_length": max_length, "do_lower_case": False})
    modes = {key: MODES[mode] == run.pooling for key, mode in LEGACY_MODES.items() if mode in MODES}
    # the last token is the same with the prompt, which need not be counted then
    included = {"include_prompt": run.pools_prompt or run.pooling == "last"}
    (folder / "1_Pooling").mkdir()
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": width, **modes, **included})
    if run.normalize:
        (folder / "2_Normalize").mkdir()  # with a file in it, or git and the hub would lose it
        write_json(folder / "2_Normalize" / "config.json", {"module_input_name": "sentence_embedding"})
