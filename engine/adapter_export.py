"""A model's whole chain of adapters as one PEFT folder, beside which bivec finds how its vectors are made.

PEFT knows one adapter a folder. A sum of LoRA products is again one: their A stacked by rows, their B by columns, each
times its scaling, so that PEFT's own is 1 everywhere. What PiSSA and OLoRA took out of the base is one product more.

A module's name in the folder is that in transformers' `AutoModel`, as in the runs of `bivec train`. The same module has
another in `AutoModelForCausalLM`, on which PEFT would leave the adapter out with a warning.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ..kernels.pooling import POOLING_MODES
from .adapter_config import ADAPTER_CONFIG, RESIDUAL_INITS
from .adapters import WRAPPER, add_adapters, initial_factors
from .checkpoints import ADAPTER_FILES, Checkpoint, resolve
from .config import ModelConfig, load_config
from .dtypes import DTYPES
from .export_tokenizer import check_tokenizer, write_json, write_tokenizer
from .lengths import text_length
from .model import LlamaModel
from .modules import MAX_LENGTH_FILE, PROMPTS_FILE
from .outputs import open_folder
from .prompts import read_prompts
from .run_folder import RUN_FILE
from .tokens import TextTokenizer, load_tokenizer
from .weights import load_model, save_tensors

_WRITTEN = (*ADAPTER_FILES, RUN_FILE, PROMPTS_FILE, MAX_LENGTH_FILE, "tokenizer.json", "tokenizer_config.json")
_OWN_NAMES = "|".join(map(re.escape, _WRITTEN))
# and the names that files have until they are whole: safetensors' own are .tmp and six letters
_FILES = re.compile(rf"{_OWN_NAMES}|\.({_OWN_NAMES})\.tmp|\.tmp\w+")

Factors = tuple[torch.Tensor, torch.Tensor]  # B (out, r) and A (r, in), float32


def export_adapter(
    model: str | Path,
    output: str | Path,
    *,
    adapters: str | Path | Sequence[str | Path] = (),
    pooling: str | None = None,
    max_length: int | None = None,
    dtype: str = "float32",
    normalize: bool = False,
) -> None:
    """Write the sum of a model's adapters to a new folder: one LoRA of its base, in PEFT's format.

    `PeftModel.from_pretrained(AutoModel.from_pretrained(BASE), OUTPUT)` gives its states where the base's configuration
    says `is_causal: false`. bivec loads the folder with the same window, pooling, instruction, prompts and tokenizer,
    and so, but for rounding, the same vectors.

    Args:
        model, adapters, pooling, max_length: as in `Encoder.from_pretrained`.
        output: a folder that does not exist or is empty; it appears whole or not at all.
        dtype: of the written factors.
        normalize: whether every vector has length 1, in bivec, as it has where the model itself says so.
    Raises:
        ValueError, FileNotFoundError, FileExistsError: naming the argument or file and what was expected; also where
            there are no adapters, or one that is no sum of products (DoRA).
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if pooling not in (None, *POOLING_MODES):
        raise ValueError(f"pooling must be one of {', '.join(POOLING_MODES)}, got {pooling!r}")
    checkpoint = resolve(model, adapters)
    if not checkpoint.adapters:
        raise ValueError(f"{model} has no adapter that could be exported alone; export it without --adapter-only")
    base = base_reference(checkpoint)
    run = replace(checkpoint.description, stage="export", base_model=base, earlier=())
    run = replace(run, pooling=pooling or run.pooling, normalize=normalize or run.normalize)

    config = load_config(checkpoint.base)
    max_length = text_length(checkpoint, config, max_length)
    # what stands around a text is made of the tokens that are compared without it
    tokenizer = TextTokenizer(load_tokenizer(checkpoint.tokenizer, config.vocab_size), max_length)

    inputs = [checkpoint.base, checkpoint.tokenizer, *checkpoint.adapters]
    with open_folder(Path(output), inputs, _FILES) as folder:
        write_tokenizer(
            tokenizer.hugging_face, folder, prompts=None, max_length=max_length, vocab_size=config.vocab_size
        )
        check_tokenizer(tokenizer, load_tokenizer(folder, config.vocab_size), {}, counted=False)
        write_json(folder / MAX_LENGTH_FILE, {"max_seq_length": max_length, "do_lower_case": False})
        prompts, default_prompt = read_prompts(checkpoint.tokenizer)
        if prompts:
            write_json(folder / PROMPTS_FILE, {"prompts": prompts, "default_prompt_name": default_prompt})
        llama, factors = _sum_of_products(checkpoint, config)
        lora = _adapter_config(llama, {name: len(a) for name, (_, a) in factors.items()})
        tensors = {}
        for name, (b, a) in factors.items():
            tensors[f"{name}.lora_A.weight"] = a.to(DTYPES[dtype])
            tensors[f"{name}.lora_B.weight"] = b.to(DTYPES[dtype])
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{name} is not finite in {dtype}; dtype float32 has the widest range")
        write_adapter(folder, lora, tensors, base)
        run.write(folder)


def write_adapter(folder: Path, config: LoraConfig, tensors: Mapping[str, torch.Tensor], base: str) -> None:
    """PEFT's two files of an adapter of `base`; `tensors` by their names in the model that PEFT sees."""
    config.base_model_name_or_path = base
    config.inference_mode = True
    if isinstance(config.target_modules, set):
        config.target_modules = sorted(config.target_modules)  # the same file in every process
    config.save_pretrained(str(folder))
    save_tensors({f"{WRAPPER}{name}": tensor for name, tensor in tensors.items()}, folder / ADAPTER_FILES[1])


def base_reference(checkpoint: Checkpoint) -> str:
    """A checkpoint's base, as another process on this machine finds it: a hub id or an absolute path."""
    name = checkpoint.base_name
    is_folder = name.startswith(".") or Path(name).expanduser().is_dir()  # the former beside the adapter that names it
    return str(checkpoint.base.resolve()) if is_folder else name


@torch.no_grad()
def _sum_of_products(checkpoint: Checkpoint, config: ModelConfig) -> tuple[LlamaModel, dict[str, Factors]]:
    """A checkpoint's model with its adapters, and by a linear's name the factors of all that they add to its weight."""
    with torch.device("meta"):  # the sum needs no weights, unless an adapter began as a part of them
        llama = LlamaModel(config)
    names, inits = add_adapters(llama, checkpoint.adapters)
    weights = None
    if any(init in RESIDUAL_INITS for init in inits):
        weights = load_model(LlamaModel, checkpoint.base, torch.float32, config)
    factors = {}
    for path, module in llama.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        b, a = torch.empty(module.out_features, 0), torch.empty(0, module.in_features)
        for name, init, folder in zip(names, inits, checkpoint.adapters, strict=True):
            if name not in module.lora_A:
                continue
            if name in module.lora_magnitude_vector:
                raise ValueError(
                    f"{folder / ADAPTER_CONFIG}: use_dora is no sum of low-rank products; "
                    "export the merged model, without --adapter-only"
                )
            if weights is not None and init in RESIDUAL_INITS:
                weight = weights.get_parameter(f"{path}.weight") + b @ a
                left, right = initial_factors(module, name, init, weight)
                b, a = torch.cat([b, -left], 1), torch.cat([a, right])
            b = torch.cat([b, module.scaling[name] * module.lora_B[name].weight], 1)
            a = torch.cat([a, module.lora_A[name].weight])
        factors[path] = b, a
    return llama, factors


def _adapter_config(llama: nn.Module, ranks: Mapping[str, int]) -> LoraConfig:
    """Of an adapter with scaling 1; modules are named by their last name where all of that name are adapted."""
    last = {name.rpartition(".")[2] for name in ranks}
    alike = {name for name, _ in llama.named_modules() if name.rpartition(".")[2] in last}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: own for name, own in ranks.items() if own != rank}
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=list(last if alike == ranks.keys() else ranks),
    )
