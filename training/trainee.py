"""What is trained: a packed Llama over a frozen base with earlier adapters, and a fresh adapter, or all its weights."""

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ..engine import ops
from ..engine.adapter_config import read_adapter_config
from ..engine.adapter_export import base_reference, write_adapter
from ..engine.adapters import add_adapter, stack_adapters, take_out
from ..engine.checkpoints import ADAPTER_FILES, Checkpoint, resolve
from ..engine.config import ModelConfig, load_config
from ..engine.json_files import read_object
from ..engine.lora import fuse_lora_layers
from ..engine.model import LanguageModel, LlamaModel
from ..engine.run_folder import EARLIER, RunDescription
from ..engine.tokens import TextTokenizer, copy_tokenizer, load_tokenizer
from ..engine.weights import load_model, save_tensors
from .masking import mask_token_id
from .settings import MntpSettings, PretrainSettings, TrainingSettings

ADAPTER = "default"  # PEFT's name of the adapter in training


@dataclass
class Trainee:
    """A model in training.

    Attributes:
        network: `LanguageModel` where a stage needs logits or every weight is trained, else `LlamaModel`.
        parameters: what is trained, float32, by a name that checkpoints keep.
        dtype: of the computation.
        adapter: the configuration of the adapter in training; None when every weight is.
        adapter_prefix: what its tensors' names begin with in its file, as its configuration's patterns know them.
    """

    network: LanguageModel | LlamaModel
    parameters: dict[str, nn.Parameter]
    config: ModelConfig
    checkpoint: Checkpoint
    tokenizer: TextTokenizer
    device: torch.device
    dtype: torch.dtype
    backend: str
    adapter: LoraConfig | None
    adapter_prefix: str
    earlier: tuple[Path, ...]

    @property
    def model(self) -> LlamaModel:
        return self.network.model if isinstance(self.network, LanguageModel) else self.network

    @property
    def head(self) -> torch.Tensor:
        """Weight of the language-model head, (V, E)."""
        assert isinstance(self.network, LanguageModel)
        return self.network.lm_head.weight

    def save(self, folder: Path, description: RunDescription) -> None:
        """Write the run's files; `bivec.json` comes last, so its presence says that the others are complete."""
        folder.mkdir(parents=True, exist_ok=True)
        if self.adapter is None:
            self._save_checkpoint(folder)
        else:
            for place, source in enumerate(self.earlier, start=1):
                target = folder / EARLIER / str(place)
                target.mkdir(parents=True, exist_ok=True)
                for name in ADAPTER_FILES:
                    shutil.copyfile(source / name, target / name)
            state = get_peft_model_state_dict(self.model, adapter_name=ADAPTER, save_embedding_layers=False)
            tensors = {f"{self.adapter_prefix}{name}": tensor.detach().cpu() for name, tensor in state.items()}
            write_adapter(folder, self.adapter, tensors, base_reference(self.checkpoint))
        description.write(folder)

    def _save_checkpoint(self, folder: Path) -> None:
        values = read_object(self.checkpoint.base / "config.json")
        for key in ("torch_dtype", "auto_map"):  # the code that it names is not copied
            values.pop(key, None)
        values |= {"dtype": "float32", "model_type": self.config.model_type}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        copy_tokenizer(self.checkpoint.tokenizer, folder)
        tensors = {name: parameter.detach().cpu() for name, parameter in self.network.named_parameters()}
        save_tensors(tensors, folder / "model.safetensors")


def load_trainee(settings: TrainingSettings, device: torch.device, checkpoint: Checkpoint | None = None) -> Trainee:
    """Load the settings' model and make its trained part; the fresh adapter depends on the seed alone.

    Args:
        checkpoint: what `settings.model` resolves to, if that is known.
    Raises:
        ValueError, FileNotFoundError: naming the field or file and what was expected.
    """
    dtype, _ = ops.choose_dtype(settings.dtype, device)
    if dtype is torch.float16:
        raise ValueError("dtype must be float32 or bfloat16 for training, float16's range is too small for gradients")
    checkpoint = checkpoint or resolve(settings.model)
    config = load_config(checkpoint.base)
    for name in ("max_length", "block_size"):
        length = getattr(settings, name, None) or 0
        if length > config.max_position_embeddings:
            raise ValueError(
                f"{name} must be at most the model's {config.max_position_embeddings} positions, got {length}"
            )
    draws_masks = settings.attention_dropout or settings.mask_schedule == "annealed"
    if settings.attention in ("varlen", "flash") and draws_masks:
        raise ValueError(
            f"attention {settings.attention!r} cannot draw the masks of attention_dropout or mask_schedule annealed"
        )
    backend = ops.choose_backend(settings.attention, device, dtype, config.head_dim)
    tokenizer = TextTokenizer(load_tokenizer(checkpoint.tokenizer, config.vocab_size), settings.max_length)
    if isinstance(settings, MntpSettings):
        mask_token_id(tokenizer.hugging_face, settings.mask_token)  # before the weights, and all texts' tokens
    has_head = settings.full_finetuning or settings.predicts_tokens
    kind: type[LanguageModel | LlamaModel] = LanguageModel if has_head else LlamaModel
    if isinstance(settings, PretrainSettings) and settings.random_weights:
        network = kind(config)
        _randomize(network, checkpoint.base, settings.seed)
    else:
        weights_dtype = torch.float32 if settings.full_finetuning else dtype
        network = load_model(kind, checkpoint.base, weights_dtype, config)
    network.requires_grad_(False)
    inner = network.model if isinstance(network, LanguageModel) else network
    earlier, adapter, prefix = checkpoint.adapters, None, ""
    if settings.full_finetuning:
        if earlier:
            raise ValueError(f"full_finetuning needs a model without adapters, {settings.model} has {len(earlier)}")
        network.requires_grad_(True)
    else:
        continued = None
        if settings.continue_adapter:
            if not earlier:
                raise ValueError(f"continue_adapter needs a model with an adapter, {settings.model} has none")
            *rest, continued = earlier
            earlier = tuple(rest)
        adapter, prefix = _add_adapters(inner, earlier, continued, settings)
    if getattr(settings, "train_head", False):
        assert isinstance(network, LanguageModel)
        if config.tie_word_embeddings:
            raise ValueError("train_head needs a head of its own; this model's is tied to its embeddings")
        network.lm_head.weight = nn.Parameter(network.lm_head.weight.float())
    network.to(device).train()
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    return Trainee(
        network, parameters, config, checkpoint, tokenizer, device, dtype, backend, adapter, prefix, tuple(earlier)
    )


def _add_adapters(
    model: LlamaModel, earlier: tuple[Path, ...], continued: Path | None, settings: TrainingSettings
) -> tuple[LoraConfig, str]:
    """Earlier adapters frozen, and one in training: `continued`, or a fresh one whose B is zero.

    Returns its configuration, and what its tensors' names begin with in its file.
    """
    names, prefix = stack_adapters(model, earlier), ""
    if continued is not None:
        config = read_adapter_config(continued)
        if config.use_dora:
            raise ValueError(f"continue_adapter cannot train DoRA, which {continued} uses")
        config.inference_mode = False
        config.lora_dropout = settings.lora_dropout
        prefix = add_adapter(model, ADAPTER, continued, config)
        take_out(model, ADAPTER, config.init_lora_weights, names)
    else:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")  # stacking is what we want
            linears = {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, nn.Linear)}
            linears |= {name.rpartition(".")[2] for name, part in model.named_modules() if isinstance(part, LoraLayer)}
            for name in settings.target_modules:
                if name not in linears:
                    known = ", ".join(sorted(name for name in linears if name.endswith("_proj")))
                    raise ValueError(f"target_modules must be among {known}, got {name!r}")
            config = LoraConfig(
                r=settings.lora_r,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                target_modules=list(settings.target_modules),
            )
            inject_adapter_in_model(config, model, adapter_name=ADAPTER)
    torch.manual_seed(settings.seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([name for name in (*names, ADAPTER) if name in module.lora_A])
            for pair in (module.lora_A, module.lora_B):
                for name, linear in pair.items():
                    linear.float().requires_grad_(name == ADAPTER)
            if ADAPTER in module.lora_A and continued is None:
                module.reset_lora_parameters(ADAPTER, True)  # anew in float32, where the base may have 16 bits
    fuse_lora_layers(model)
    return config, prefix


def _randomize(network: nn.Module, base: Path, seed: int) -> None:
    """Weights as transformers makes a Llama's: normal with `initializer_range`, biases zero, norms one."""
    deviation = float(read_object(base / "config.json").get("initializer_range", 0.02))
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.Linear | nn.Embedding) and name == "weight":
                parameter.data.normal_(0.0, deviation, generator=generator)
            else:
                parameter.data.fill_(0.0 if name == "bias" else 1.0)
