"""Compiling for a GPU that is not there: the part of Triton's driver that is asked, and launches that only compile.

TRITON_INTERPRET must not be set.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class _AbsentDevice:
    """The part of Triton's driver that compiling asks: which device is this?"""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, name: str) -> str:
        return name


@contextmanager
def absent_device(capability: int) -> Iterator[None]:
    """Triton believes in a device of this capability."""
    before = driver._active
    driver.set_active(_AbsentDevice(capability))
    try:
        yield
    finally:
        driver._active = before


@contextmanager
def collected_launches(capability: int) -> Iterator[list]:
    """Compile instead of launching, for a device of this capability; yields the list of compiled kernels."""
    launches: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        launches.append(run(self, *args, grid=grid, warmup=True, **kwargs))

    with absent_device(capability), mock.patch.object(JITFunction, "run", compile_only):
        yield launches
