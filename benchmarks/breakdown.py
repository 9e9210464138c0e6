"""Where the time of a call goes: operators on the CPU, in all its threads, or kernels on a CUDA device."""

import time
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.profiler import _ExperimentalConfig as ProfilerConfig  # without it other threads are not seen

NUM_ROWS = 12


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
