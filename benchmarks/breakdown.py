"""Where the time of a call goes: operators on the CPU, in all its threads, or kernels on a CUDA device."""

import contextlib
import functools
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from torch.profiler import _ExperimentalConfig as ProfilerConfig  # without it other threads are not seen

from ..engine import layers, ops

if TYPE_CHECKING:
    from ..engine.encoder import Encoder

NUM_ROWS = 12
GROUPS = (
    "tokenisation",
    "products",
    "quantising and scaling",
    "norm",
    "rotary",
    "attention",
    "activation",
    "packing and copies",
    "rest",
)
_RANGE = "bivec "
_PRODUCTS = ("_linear_pointwise", "qlinear_pointwise", "mm", "addmm", "linear")
_SCALING = ("mul", "mul_", "addcmul", "add_")


def breakdown(run: Callable[[], object], device: torch.device) -> dict:
    """One call of `run`, profiled.

    Returns:
        `wall_s`; `work_s`, the seconds in all operators or kernels together, so that on CUDA the device waited for the
        host during what is left of `wall_s`; and `parts`, the costliest of them, with calls and share of `work_s`.
    """
    kind = DeviceType.CUDA if device.type == "cuda" else DeviceType.CPU
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, experimental_config=ProfilerConfig(profile_all_threads=True)) as profiled:
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        wall = time.perf_counter() - start
    events = [event for event in profiled.key_averages() if event.device_type == kind]
    seconds = {
        event.key: (event.self_device_time_total if kind == DeviceType.CUDA else event.self_cpu_time_total) / 1e6
        for event in events
    }
    work = sum(seconds.values())
    costliest = sorted(events, key=lambda event: -seconds[event.key])[:NUM_ROWS]
    parts = [
        {"name": event.key, "calls": event.count, "share": seconds[event.key] / work}
        for event in costliest
        if seconds[event.key]
    ]
    return {"wall_s": wall, "work_s": work, "parts": parts}


def core_seconds(run: Callable[[], object], encoder: "Encoder") -> dict[str, float]:
    """Seconds of a core by what one call of `run` spends them on, all of `GROUPS`; they sum to cores × wall time.

    Operators do not say what they are for. They are told apart by the functions of the engine that call them, which are
    ranges of the profile meanwhile, and by name; `rest` is what is no operator: Python, and waiting.
    """
    activities = [ProfilerActivity.CPU]
    with contextlib.ExitStack() as stack:
        for owner, attribute, name in _ranges(encoder):
            within = _in_range(getattr(owner, attribute), name)
            stack.enter_context(mock.patch.object(owner, attribute, within))
        config = ProfilerConfig(profile_all_threads=True)
        profiled = stack.enter_context(profile(activities=activities, record_shapes=True, experimental_config=config))
        start = time.perf_counter()
        run()
        wall = time.perf_counter() - start
    spent = dict.fromkeys(GROUPS, 0.0)
    for event in profiled.events():
        spent[_group(event)] += event.self_cpu_time_total / 1e6
    work = sum(seconds for group, seconds in spent.items() if group != "rest")
    spent["rest"] = max(torch.get_num_threads() * wall - work, 0.0)
    return spent


def _ranges(encoder: "Encoder") -> list[tuple[Any, str, str]]:
    """Functions, by where they are looked up, and what is done in them."""
    form = type(encoder.runner.layers[0])
    found = [
        (type(encoder._tokenizer), "__call__", "tokenisation"),
        (ops, "attention", "attention"),
        (form, "project", "project"),
        (form, "finish", "finish"),
    ]
    if encoder.compute_dtype.is_quantized:
        return [*found, (form, "_normed", "norm"), (layers, "quantize_rows", "quantising and scaling")]
    return [*found, (layers, "rms_norm", "norm")]


def _in_range(function: Callable, name: str) -> Callable:
    @functools.wraps(function)
    def within(*arguments, **keywords):
        with record_function(_RANGE + name):
            return function(*arguments, **keywords)

    return within


def _group(event) -> str:
    """Of an operator, or of a range itself."""
    if event.name.startswith(_RANGE):
        return "tokenisation" if event.name == _RANGE + "tokenisation" else "rest"
    parent = event.cpu_parent
    while parent is not None and not parent.name.startswith(_RANGE):
        parent = parent.cpu_parent
    place = parent.name.removeprefix(_RANGE) if parent is not None else ""
    if place in GROUPS:  # whatever is done in it
        return place
    name = event.name.rpartition("::")[2]
    if name in _PRODUCTS:
        return "products"
    if name.startswith("silu"):
        return "activation"
    if place == "project" and name == "mul_":
        return "rotary"
    if place == "finish" and name == "mul_" and event.input_shapes[0] == event.input_shapes[1]:
        return "activation"  # the gate times what it lets through
    return "quantising and scaling" if place and name in _SCALING else "packing and copies"
