"""Has training diverged? Such weights are neither a checkpoint nor a result.

Three signs, none of which needs a limit of our own: a weight that is no finite number; an adapter so large that the
base beneath it is lost to rounding once the two are merged; and states that are not finite, or that a token of the text
does not change any more, which is what refuses a model when it is loaded.
"""

import math

import numpy as np
import torch
from peft.tuners.lora import LoraLayer

from ..engine.config import Window
from ..engine.selftest import probe
from ..engine.tokens import Tokenized
from .mask_schedule import MaskNow
from .passes import Passes
from .trainee import ADAPTER, Trainee


@torch.no_grad()
def find_divergence(passes: Passes, window: Window) -> str | None:
    """What is wrong with a trainee's weights, in words; None where nothing is.

    Args:
        window: the mask it is trained for.
    """
    trainee = passes.trainee
    return not_finite(trainee) or _drowned(trainee) or _blind(passes, trainee.config.windows(window))


def not_finite(trainee: Trainee) -> str | None:
    """The first trained weight with NaN or infinity, in words."""
    for name, parameter in trainee.parameters.items():
        if not torch.isfinite(parameter).all():
            return f"{name} holds NaN or infinity"
    return None


def _drowned(trainee: Trainee) -> str | None:
    """The first linear whose weight is less than what rounding takes from the sum that its adapter makes with it."""
    roundoff = torch.finfo(trainee.dtype).eps / 2
    for name, module in trainee.model.named_modules():
        if not isinstance(module, LoraLayer) or ADAPTER not in module.lora_A:
            continue
        a = module.lora_A[ADAPTER].weight.double()  # (r, in)
        b = module.lora_B[ADAPTER].weight.double()  # (out, r)
        added = abs(module.scaling[ADAPTER]) * ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt().item()  # of b @ a
        base = torch.linalg.vector_norm(module.get_base_layer().weight, dtype=torch.float32).item()
        if not math.isfinite(added) or 0 < base < added * roundoff:
            return f"the adapter of {name} has a norm of {added:.3g}, in which the base's {base:.3g} is lost"
    return None


def _blind(passes: Passes, windows: tuple[Window, ...]) -> str | None:
    """Whether the states are finite and see what the windows show them, as the self-test at load asks."""
    trainee = passes.trainee
    text, changed, place = probe(trainee.config, windows)
    states = []
    for ids in (text, changed):
        slab = passes.slab([Tokenized(ids, 0)], [0], 0, np.zeros(1, dtype=np.int64))
        hidden_states = passes.hidden_states(slab, MaskNow(windows), dropout=False)
        states.append(trainee.model.norm(hidden_states)[: len(text)])
    if not all(torch.isfinite(state).all() for state in states):
        return "the model's states are not finite"
    if torch.equal(states[0][place], states[1][place]):
        return "the model's states do not depend on the text any more"
    return None
