"""The arithmetic of a pass: the dtype of its matrix products, and of all that stands between them."""

from dataclasses import dataclass

import torch

from .config import ModelConfig
from .dtype_names import FLOATS, NAMES, QUANTIZED
from .int8 import check_products
from .ops import onednn_multiplies
from .rates import product_rates

DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in FLOATS}

_FLOAT8_CAPABILITY = (8, 9)
# as fast as float32 must be to be worth its memory; far from it, as processors are, the choice is ever the same
_CLEARLY = 1.15


@dataclass(frozen=True)
class ComputeDtype:
    """What `choose_dtype` chose.

    Attributes:
        products: dtype of the operands of the model's matrix products: a key of `DTYPES`, `int8` or `float8`.
        floats: of the weights that are no product's and of the hidden states.
        reason: why it was chosen.
    """

    products: str
    floats: torch.dtype
    reason: str

    @property
    def is_quantized(self) -> bool:
        """Whether products are of eight bits, with scales."""
        return self.products in QUANTIZED

    @property
    def name(self) -> str:
        """What `choose_dtype` takes to choose the same again, on any machine: `bfloat16`, `int8+bfloat16`."""
        return f"{self.products}+{str(self.floats).removeprefix('torch.')}" if self.is_quantized else self.products


def choose_dtype(dtype: str | torch.dtype, device: torch.device, config: ModelConfig) -> ComputeDtype:
    """`auto` is bfloat16; on a CPU where float32 is measured to be clearly faster float32, on an old GPU float16.

    `int8` (CPU) and `float8` (CUDA, capability 8.9) have floats beside them: those named, as in `int8+bfloat16`, else
    those that `auto` would be.

    Raises:
        ValueError: a dtype that is none of `NAMES`, or one that the device does not compute in.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in NAMES:
        raise ValueError(f"dtype must be one of {', '.join(NAMES)}, got {str(dtype)!r}")
    products, _, floats = name.partition("+")
    _check_device(products, device)
    if name in DTYPES:
        return ComputeDtype(name, DTYPES[name], "asked for")
    if floats:
        return ComputeDtype(products, DTYPES[floats], "asked for")
    if products == "float8":
        return ComputeDtype("float8", torch.bfloat16, "asked for; every GPU with float8 has bfloat16")
    fastest = _fastest(device, config)
    if name == "auto":
        return fastest
    return ComputeDtype(products, fastest.floats, f"asked for; beside it {fastest.name}: {fastest.reason}")


def _check_device(products: str, device: torch.device) -> None:
    if products == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 needs a CUDA device; on the CPU use float32 or bfloat16")
    if products == "int8" and device.type != "cpu":
        raise ValueError(f"dtype int8 needs the CPU, got the device {device}; on CUDA use float8")
    if products == "int8":
        check_products()
    if products == "float8":
        if device.type != "cuda":
            raise ValueError(f"dtype float8 needs a CUDA device, got the device {device}; on the CPU use int8")
        capability = torch.cuda.get_device_capability(device)
        if capability < _FLOAT8_CAPABILITY:
            raise ValueError(
                "dtype float8 needs a GPU of capability {}.{} or more, got {}.{} ({})".format(
                    *_FLOAT8_CAPABILITY, *capability, torch.cuda.get_device_name(device)
                )
            )


def _fastest(device: torch.device, config: ModelConfig) -> ComputeDtype:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return ComputeDtype("bfloat16", torch.bfloat16, "the GPU multiplies bfloat16 natively")
        return ComputeDtype("float16", torch.float16, "the GPU multiplies float16 but not bfloat16 natively")
    if not onednn_multiplies(torch.bfloat16):
        return ComputeDtype("float32", torch.float32, "oneDNN does not multiply bfloat16 on this processor")
    float32, bfloat16 = product_rates(config)
    if float32 > _CLEARLY * bfloat16:
        return ComputeDtype("float32", torch.float32, f"measured {_rates(float32)}, bfloat16 {bfloat16:,.0f}")
    memory = ", and float32 takes twice the memory" if float32 > bfloat16 else ""
    return ComputeDtype("bfloat16", torch.bfloat16, f"measured {_rates(bfloat16)}, float32 {float32:,.0f}{memory}")


def _rates(rate: float) -> str:
    return f"{rate:,.0f} GFLOP/s on one core"
