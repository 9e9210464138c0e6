"""PEFT's LoRA linears computed by `kernels.lora`: the class of a layer changes, its parameters and their names do not.

    inject_adapter_in_model(LoraConfig(...), model)
    fuse_lora_layers(model)

Saving, merging, disabling and further adapters stay PEFT's. A layer that the kernel does not cover (DoRA and the other
variants, a merged or disabled adapter, autocast, several adapters that train) takes PEFT's own forward at that call.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

from ..kernels.lora import LoraLinear, lora_linears


class FusedLoraLinear(PeftLoraLinear):
    """PEFT's LoRA linear with `kernels.lora`'s forward and backward; made by `fuse_lora_layers`.

    Adapters of earlier stages, which no longer train, count as part of the base: they take no dropout. The mask's seed
    comes from torch's CPU generator, so `torch.manual_seed` and activation checkpointing repeat it.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not args and not kwargs:
            linear, dropout_p = _as_lora_linear(self, x)
            if linear is not None:
                return lora_linears(x, [linear], dropout_p=dropout_p, seed=_draw_seed(dropout_p))[0]
        return super().forward(x, *args, **kwargs)

    @staticmethod
    def forward_together(x: torch.Tensor, modules: Sequence[nn.Module]) -> tuple[torch.Tensor, ...]:
        """The outputs of linears that share the input x `(T, in)`, plain ones among them; their mask is one too."""
        linears, chances = [], set()
        for module in modules:
            linear, dropout_p = _as_lora_linear(module, x)
            if linear is None or module._forward_hooks or module._forward_pre_hooks:
                return tuple(module(x) for module in modules)
            linears.append(linear)
            if linear.lora_a is not None:
                chances.add(dropout_p)
        if len(chances) > 1:
            return tuple(module(x) for module in modules)
        dropout_p = chances.pop() if chances else 0.0
        return lora_linears(x, linears, dropout_p=dropout_p, seed=_draw_seed(dropout_p))


def fuse_lora_layers(model: nn.Module) -> int:
    """Let `kernels.lora` compute the LoRA linears that PEFT injected into `model`; returns how many there are.

    Raises:
        ValueError: the model has none.
    """
    for module in model.modules():
        if type(module) is PeftLoraLinear:
            module.__class__ = FusedLoraLinear
    count = sum(isinstance(module, FusedLoraLinear) for module in model.modules())
    if not count:
        raise ValueError(f"model must have LoRA linears of PEFT, {type(model).__name__} has none")
    return count


def _draw_seed(dropout_p: float) -> int | None:
    return int(torch.randint(2**63 - 1, (), device="cpu")) if dropout_p else None


def _as_lora_linear(module: nn.Module, x: torch.Tensor) -> tuple[LoraLinear | None, float]:
    """The module's tensors and its chance of dropout now; None where the kernel does not cover what it computes."""
    layer: Any = module if isinstance(module, FusedLoraLinear) else None
    base = module if layer is None else layer.base_layer
    if (
        type(base) is not nn.Linear
        or base._forward_hooks
        or base._forward_pre_hooks
        or base.weight.requires_grad
        or (base.bias is not None and base.bias.requires_grad)
        or base.weight.dtype != x.dtype
        or x.dim() != 2
        or torch.is_autocast_enabled(x.device.type)
    ):
        return None, 0.0
    if layer is None:
        return LoraLinear(base.weight, base.bias), 0.0
    if layer.disable_adapters or layer.merged or layer.fan_in_fan_out:
        return None, 0.0
    trained, frozen, dropout_p = None, [], 0.0
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        a, b, scaling = layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name]
        if name in layer.lora_variant or layer.lora_bias[name]:
            return None, 0.0
        if not (a.requires_grad or b.requires_grad):
            frozen.append((a, b, scaling))
            continue
        dropout = layer.lora_dropout[name]
        if trained is not None or not isinstance(dropout, nn.Dropout | nn.Identity):
            return None, 0.0
        trained = (a, b, scaling)
        dropout_p = dropout.p if dropout.training and isinstance(dropout, nn.Dropout) else 0.0
        if dropout_p >= 1.0:
            return None, 0.0
    a, b, scaling = trained or (None, None, 1.0)
    return LoraLinear(base.weight, base.bias, a, b, scaling, frozen), dropout_p
