"""What is trained: a packed Llama over a frozen base with earlier adapters, and a fresh adapter, or all its weights."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from torch import nn

from ..engine.adapter_export import base_reference, write_adapter
from ..engine.adapters import add_adapter, inject_adapter, stack_adapters, take_out
from ..engine.checkpoints import ADAPTER_FILES, Checkpoint
from ..engine.config import ModelConfig
from ..engine.json_files import read_object
from ..engine.lora import fuse_lora_layers
from ..engine.model import LanguageModel, LlamaModel
from ..engine.run_folder import EARLIER, RunDescription
from ..engine.tokens import TextTokenizer, copy_tokenizer
from ..engine.weights import load_model, save_tensors
from .preparation import Prepared
from .settings import PretrainSettings

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


def load_trainee(prepared: Prepared) -> Trainee:
    """Load a model's weights and make its trained part; the fresh adapter depends on the seed alone.

    Raises:
        ValueError, FileNotFoundError: naming the file and what was expected.
    """
    settings, checkpoint, config = prepared.settings, prepared.checkpoint, prepared.config
    has_head = settings.full_finetuning or settings.predicts_tokens
    kind: type[LanguageModel | LlamaModel] = LanguageModel if has_head else LlamaModel
    if isinstance(settings, PretrainSettings) and settings.random_weights:
        network = kind(config)
        _randomize(network, checkpoint.base, settings.seed)
    else:
        weights_dtype = torch.float32 if settings.full_finetuning else prepared.dtype
        network = load_model(kind, checkpoint.base, weights_dtype, config)
    network.requires_grad_(settings.full_finetuning)
    adapter, prefix = None, ""
    if not settings.full_finetuning:
        adapter, prefix = _add_adapters(network.model if isinstance(network, LanguageModel) else network, prepared)
    if getattr(settings, "train_head", False):
        assert isinstance(network, LanguageModel)
        network.lm_head.weight = nn.Parameter(network.lm_head.weight.float())
    network.to(prepared.device).train()
    parameters = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    return Trainee(
        network=network,
        parameters=parameters,
        config=config,
        checkpoint=checkpoint,
        tokenizer=prepared.tokenizer,
        device=prepared.device,
        dtype=prepared.dtype,
        backend=prepared.backend,
        adapter=adapter,
        adapter_prefix=prefix,
        earlier=prepared.earlier,
    )


def _add_adapters(model: LlamaModel, prepared: Prepared) -> tuple[LoraConfig, str]:
    """Earlier adapters frozen, and one in training: `continued`, or a fresh one whose B is zero.

    Returns its configuration, and what its tensors' names begin with in its file.
    """
    settings = prepared.settings
    names, prefix = stack_adapters(model, prepared.earlier), ""
    if prepared.continued is not None:
        folder, config = prepared.continued
        config.inference_mode = False
        config.lora_dropout = settings.lora_dropout
        prefix = add_adapter(model, ADAPTER, folder, config)
        take_out(model, ADAPTER, config.init_lora_weights, names)
    else:
        config = LoraConfig(
            r=settings.lora_r,
            lora_alpha=settings.lora_alpha,
            lora_dropout=settings.lora_dropout,
            target_modules=list(settings.target_modules),
        )
        inject_adapter(model, ADAPTER, config)
    torch.manual_seed(settings.seed)
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter([name for name in (*names, ADAPTER) if name in module.lora_A])
            for pair in (module.lora_A, module.lora_B):
                for name, linear in pair.items():
                    linear.float().requires_grad_(name == ADAPTER)
            if ADAPTER in module.lora_A and prepared.continued is None:
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
