"""For every test: without a GPU the Triton kernels are interpreted, and slow tests run only when they are asked for."""

import os

import torch

# triton reads it when it is imported, which whatever a test module imports may do first
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(config, items):
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]
