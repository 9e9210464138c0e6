"""The arithmetic of a pass: the dtype of its matrix products, and of all that stands between them."""

from dataclasses import dataclass

import torch

from .config import ModelConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class ComputeDtype:
    """What `choose_dtype` chose.

    Attributes:
        products: dtype of the operands of the model's matrix products, a key of `DTYPES`.
        floats: of the weights that are no product's and of the hidden states.
        reason: why it was chosen.
    """

    products: str
    floats: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """What `choose_dtype` takes to choose the same again, on any machine."""
        return self.products


def choose_dtype(dtype: str | torch.dtype, device: torch.device, config: ModelConfig) -> ComputeDtype:
    """`auto` is bfloat16 where the hardware multiplies it natively, else float32.

    Raises:
        ValueError: a dtype that is none of `DTYPES`, or one that the device does not compute in.
    """
    if dtype == "auto":
        return ComputeDtype(*_fastest(device))
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    if name == "float16" and device.type == "cpu":
        raise ValueError("dtype float16 needs a CUDA device; on the CPU use float32 or bfloat16")
    return ComputeDtype(name, DTYPES[name], "asked for")


def _fastest(device: torch.device) -> tuple[str, torch.dtype, str]:
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16", torch.bfloat16, "the GPU multiplies bfloat16 natively"
        return "float16", torch.float16, "the GPU multiplies float16 but not bfloat16 natively"
    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        return "bfloat16", torch.bfloat16, "the processor has AVX512-BF16 or AMX"
    return "float32", torch.float32, "the processor has neither AVX512-BF16 nor AMX"
