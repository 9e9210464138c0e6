"""PEFT's LoRA linears computed by `kernels.lora`: the class of a layer changes, its parameters and their names do not.

    inject_adapter_in_model(LoraConfig(...), model)
    fuse_lora_layers(model)

On a GPU the weights of linears that share an input, and of one with an adapter, are views of a `LoraStack`, made when
they are first computed, and again where something has put other weights in their place. Adapters may be changed by an
optimizer of torch and by whatever torch counts as a write (`load_state_dict`, `copy_`), not in place through `.data`.

Saving, merging, disabling and further adapters stay PEFT's. A layer that the kernel does not cover (DoRA and the other
variants, a merged or disabled adapter, autocast, several adapters that train) takes PEFT's own forward at that call.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

from ..kernels.lora import LoraLinear, lora_linears, room_behind

if TYPE_CHECKING:
    from ..kernels.lora.stack import LoraStack


class FusedLoraLinear(PeftLoraLinear):
    """PEFT's LoRA linear with `kernels.lora`'s forward and backward; made by `fuse_lora_layers`.

    Adapters of earlier stages, which no longer train, count as part of the base: they take no dropout. The mask's seed
    comes from torch's CPU generator, so `torch.manual_seed` and activation checkpointing repeat it.
    """

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if not args and not kwargs:
            linear, dropout_p = _as_lora_linear(self, x)
            if linear is not None:
                return _compute(x, [self], [linear], dropout_p, 0)[0]
        return super().forward(x, *args, **kwargs)

    @staticmethod
    def forward_together(x: torch.Tensor, modules: Sequence[nn.Module], room: int = 0) -> tuple[torch.Tensor, ...]:
        """The outputs of linears that share the input x `(T, in)`, plain ones among them; their mask is one too.

        Args:
            room: columns of memory behind x that may be written to, at best `room_together`.
        """
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
        return _compute(x, modules, linears, chances.pop() if chances else 0.0, room)

    @staticmethod
    def room_together(modules: Sequence[nn.Module]) -> int:
        """Columns of memory behind the input of these linears that spare passes over their outputs; 0 on the CPU."""
        layers: list[Any] = [module for module in modules if isinstance(module, FusedLoraLinear)]
        if not layers or not _stacks_on(layers[0].base_layer.weight.device):
            return 0
        ranks = [layer.r[name] for layer in layers for name in layer.active_adapters if name in layer.lora_A]
        return room_behind(layers[0].in_features, ranks)


def _stacks_on(device: torch.device) -> bool:
    """Where passes over memory cost more than calls."""
    return device.type == "cuda"


def _compute(
    x: torch.Tensor, modules: Sequence[nn.Module], linears: list[LoraLinear], dropout_p: float, room: int
) -> tuple[torch.Tensor, ...]:
    stack = None
    if _stacks_on(x.device):
        stack = _stack(modules, linears)
        linears = [linear._replace(weight=weight) for linear, weight in zip(linears, stack.weights, strict=True)]
    return lora_linears(x, linears, dropout_p=dropout_p, seed=_draw_seed(dropout_p), stack=stack, room=room)


def _stack(modules: Sequence[nn.Module], linears: Sequence[LoraLinear]) -> "LoraStack":
    """That of these modules, of which it is the only memory of their weights."""
    from ..kernels.lora.stack import LoraStack  # needs triton

    keeper: Any = next(module for module in modules if isinstance(module, FusedLoraLinear))
    stack = keeper.__dict__.get("_lora_stack")
    if stack is None or not stack.holds(linears):
        stack = keeper.__dict__["_lora_stack"] = LoraStack(linears)
        for module, weight in zip(modules, stack.weights, strict=True):
            getattr(module, "base_layer", module).weight.data = weight
    return stack


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
