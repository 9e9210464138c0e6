"""How CUDA multiplies matrices while a pass is launched or captured, so that tiles of few rows have the bits of many.

For few rows cuBLAS divides a long K among programs (split-K) and adds up their parts, in another order than one program
does. torch can forbid it, through cuBLASLt only, in settings that it has once a process. They are changed while a pass
is launched, and then are again what they were: a captured pass keeps what it was captured with.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

Products = Callable[[], AbstractContextManager[None]]

_SETTINGS = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")

_lock = threading.Lock()
_inside = 0  # threads and calls; the first changes the settings, and the last puts them back
_restore: Callable[[], None]


@contextmanager
def without_split_k() -> Iterator[None]:
    """bfloat16 and float16 products are of cuBLASLt, and add up K in one order; float32 ones are of cuBLASLt.

    Other threads' products in the meantime are too.

    Raises:
        RuntimeError: this torch has no cuBLASLt.
    """
    global _inside, _restore
    with _lock:
        if _inside == 0:
            _restore = _change()
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _restore()


def _change() -> Callable[[], None]:
    matmul = torch.backends.cuda.matmul
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k", True)) for name in _SETTINGS}
    library = torch.backends.cuda.preferred_blas_library()

    def restore() -> None:
        for name, setting in before.items():
            setattr(matmul, name, setting)
        torch.backends.cuda.preferred_blas_library(library)

    torch.backends.cuda.preferred_blas_library("cublaslt")
    for name in _SETTINGS:
        setattr(matmul, name, (False, False))
    return restore


# by the type of device, and tried in this order until no tile is lost; the words are for logs and `bivec inspect`
PRODUCTS: dict[str, dict[str, Products]] = {
    "cpu": {"as torch is set": nullcontext},
    "cuda": {"as torch is set": nullcontext, "by cuBLASLt without split-K": without_split_k},
}
