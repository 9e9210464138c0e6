"""How arguments are refused: what came, in words, and conditions on a tensor's contents."""

import torch
from torch import Tensor


def describe(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def require(condition: Tensor, message: str) -> None:
    """ValueError unless `condition` holds; on a device, for which nothing waits, and while compiling an assertion."""
    if condition.device.type == "cpu" and not torch.compiler.is_compiling():
        if not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)
