"""What `fake_cuda.py` puts in the place of torch's and Triton's parts that ask for a device, while its block runs."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # the first tensor that requires a gradient would import it, and what it then finds is patched
from torch.overrides import TorchFunctionMode
from torch.utils import _foreach_utils
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from .device_counts import Counts
from .fake_cuda import CUDA, CudaTensor, FakeCuda, active, meta_kernels

_MEMORY = 141 * 10**9
# what autocast multiplies in its own dtype
_PRODUCTS = {
    torch.nn.functional.linear,
    torch.nn.functional.scaled_dot_product_attention,
    torch.matmul,
    torch.mm,
    torch.bmm,
    torch.addmm,
    torch.baddbmm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
    torch.Tensor.__rmatmul__,
}


class Stream:
    def __init__(self, *_, **__):
        self.device, self.device_index, self.cuda_stream = CUDA, 0, 0

    def wait_stream(self, stream: "Stream") -> None:
        pass

    def wait_event(self, event: "Event") -> None:
        pass

    def record_event(self, event: "Event | None" = None) -> "Event":
        return event or Event()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        active().hazard("sync", "Stream.synchronize")

    def is_capturing(self) -> bool:
        return active().capturing is not None


class Event:
    def __init__(self, *_, **__):
        pass

    def record(self, stream: Stream | None = None) -> None:
        pass

    def wait(self, stream: Stream | None = None) -> None:
        pass

    def query(self) -> bool:
        if active().capturing is not None:
            active().hazard("in a capture", "Event.query")
        return True

    def synchronize(self) -> None:
        active().hazard("sync", "Event.synchronize")

    def elapsed_time(self, end: "Event") -> float:
        return 1.0


class Graph:
    """A captured graph; `counts` is what each replay has the device do."""

    def __init__(self, *_, **__):
        self.counts = Counts()

    def capture_begin(self, *_, **__) -> None:
        active().capturing = self

    def capture_end(self) -> None:
        active().capturing = None

    def replay(self) -> None:
        active().note("graph replay", Counts(replays=1))

    def reset(self) -> None:
        self.counts = Counts()

    def pool(self) -> tuple[int, int]:
        return 0, 0


@contextmanager
def _capture(graph: Graph, *_, **__) -> Iterator[None]:
    graph.capture_begin()
    try:
        yield
    finally:
        graph.capture_end()


class Generator(torch.Generator):
    """On the host, wherever its numbers are for: on the device they have no values."""

    def __new__(cls, device: Any = "cpu") -> "Generator":
        return super().__new__(cls, "cpu")  # type: ignore[call-arg]


class _Block:
    """`torch.cuda.device`, `device_of` and `stream`: there is one of each."""

    def __init__(self, *_):
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Autocast(TorchFunctionMode):
    """Autocast for our tensors, which C++ does not take for ones on CUDA."""

    def __init__(self):
        super().__init__()
        self.casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _PRODUCTS and torch.is_autocast_enabled("cuda"):
            args = tuple(self._cast(value) for value in args)
        return func(*args, **kwargs or {})

    def _cast(self, value: Any) -> Any:
        dtype = torch.get_autocast_dtype("cuda")
        if not isinstance(value, CudaTensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self.casts:
            self.casts[id(value)] = value, value.to(dtype)
        return self.casts[id(value)][1]


def patches(fake: FakeCuda) -> Iterator[AbstractContextManager]:
    """Context managers, each of which replaces something and restores it."""
    major, minor = fake.capability
    properties = SimpleNamespace(
        name="a fake GPU",
        major=major,
        minor=minor,
        total_memory=_MEMORY,
        multi_processor_count=132,
        L2_cache_size=50 * 2**20,
        warp_size=32,
    )
    runtime: dict[str, Any] = {
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": _capture,
        "graph_pool_handle": lambda: (0, 0),
        "device": _Block,
        "device_of": _Block,
        "stream": _Block,
        "current_stream": Stream,
        "default_stream": Stream,
        "synchronize": lambda *_: fake.hazard("sync", "torch.cuda.synchronize"),
        "is_current_stream_capturing": lambda: fake.capturing is not None,
        "is_available": lambda: True,
        "is_bf16_supported": lambda including_emulation=True: major >= 8,
        "is_initialized": lambda: True,
        "init": lambda: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_name": lambda *_: properties.name,
        "get_device_capability": lambda *_: fake.capability,
        "get_device_properties": lambda *_: properties,
        "mem_get_info": lambda *_: (_MEMORY, _MEMORY),
        "manual_seed": lambda _: None,
        "manual_seed_all": lambda _: None,
        "_initialized": False,  # of the real one, whose random state nobody shall save
    }
    runtime |= {name: lambda *_: None for name in ("empty_cache", "reset_peak_memory_stats", "ipc_collect")}
    runtime |= {
        name: lambda *_: 0
        for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved")
    }
    for name, value in runtime.items():
        yield mock.patch.object(torch.cuda, name, value)
    accelerator: dict[str, Any] = {"is_available": lambda: True, "current_stream": Stream}
    for name, value in accelerator.items():
        yield mock.patch.object(torch.accelerator, name, value)
    for function in (JITFunction, InterpretedFunction):
        yield mock.patch.object(function, "run", _launch)
    for name, method in {"to": _to, "cuda": _cuda, "pin_memory": _pin_memory, "is_pinned": _is_pinned}.items():
        yield mock.patch.object(torch.Tensor, name, method)
    for module in (import_module("torch.optim.optimizer"), _foreach_utils):  # torch.optim hides the name
        types = [*module._foreach_supported_types, CudaTensor]
        yield mock.patch.object(module, "_foreach_supported_types", types)
    # a module that moves keeps its parameters, and those that are tied, by swapping what they are
    yield mock.patch.object(torch.__future__, "get_swap_module_params_on_conversion", return_value=True)
    yield mock.patch.object(torch._C, "_group_tensors_by_device_and_dtype", _group)
    autocast = _Autocast()
    yield autocast
    yield mock.patch.object(torch, "clear_autocast_cache", _clearing(autocast))
    yield mock.patch.object(torch, "Generator", Generator)


def _launch(kernel: Any, *args, grid: Any, warmup: bool, **options) -> None:
    active().launch(kernel, args, grid, options)


_torch_to, _group_in_torch = torch.Tensor.to, torch._C._group_tensors_by_device_and_dtype
_clear_autocast_cache = torch.clear_autocast_cache


def _to(tensor: torch.Tensor, *args, copy: bool = False, **kwargs) -> torch.Tensor:
    other = kwargs.pop("other", None) if not args else args[0]
    if isinstance(other, torch.Tensor):
        return _to(tensor, other.device, other.dtype, *args[1:], copy=copy, **kwargs)
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    if device is not None and device.type == "meta" and isinstance(tensor, CudaTensor):
        with meta_kernels():  # else it would be ours
            return torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
    moves = device is not None and not (device.type == "cuda" and isinstance(tensor, CudaTensor))  # C++ does not see it
    options: dict[str, Any] = {"device": device if moves else None, "dtype": dtype, "memory_format": memory_format}
    options = {name: value for name, value in options.items() if value is not None}
    if moves and device.type == "cuda":
        options["device"] = CUDA
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
            with active().in_this_thread():
                return _torch_to(tensor, **options, non_blocking=non_blocking, copy=copy)
    if not options:
        return tensor.clone() if copy else tensor
    return _torch_to(tensor, **options, non_blocking=non_blocking, copy=copy)


def _cuda(tensor: torch.Tensor, device: Any = None, non_blocking: bool = False) -> torch.Tensor:
    return _to(tensor, CUDA, non_blocking=non_blocking)


def _pin_memory(tensor: torch.Tensor, *_) -> torch.Tensor:
    if isinstance(tensor, CudaTensor):
        raise RuntimeError(f"cannot pin '{tensor.dtype}' only dense CPU tensors can be pinned")
    return tensor if active().is_pinned(tensor) else active().pin(tensor)


def _is_pinned(tensor: torch.Tensor, *_) -> bool:
    return active().is_pinned(tensor)


def _group(tensors: list, with_indices: bool = False) -> dict:
    groups = _group_in_torch(tensors, with_indices)
    return {(CUDA if device.type == "meta" else device, dtype): group for (device, dtype), group in groups.items()}


def _clearing(autocast: _Autocast):
    def clear() -> None:
        autocast.casts.clear()
        _clear_autocast_cache()

    return clear
