"""The project's CUDA code on a machine without one: what it launches, what it copies, and where its host would wait.

    with FakeCuda() as fake:
        runner = Runner(model.to("cuda"), "triton")
        with fake.section() as section:
            runner(batch)
    print(section.counts, section.hazards)

Tensors on `cuda:0` have a shape, a dtype, strides and a place in their storage, and no data: in Python's eyes they are
on the device, in C++'s they are meta tensors, so that indexing, autograd and the optimizers run as they are and ask for
no device guard. Tensors on the CPU are real. Custom operators run their own bodies, and Triton's kernels are noted down
instead of launched. What is counted, and by which rules, is in `device_counts.py`; torch's and Triton's parts that ask
for a device are those of `fake_cuda_runtime.py` until the block ends. A real CUDA device is left alone.

What the host reads of the device is made up: checks find what sound numbers would give (`any` false, `all` true, equal
tensors), other numbers are one, arrays are zeros.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .device_counts import Counts, Hazard, Launch, Section, bytes_of, operator_counts, place_of_call
from .fake_products import scaled_product, typed_product

CUDA, META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten


class _Inside(threading.local):
    value = False  # while torch computes shapes, when ours are meta tensors for Python too


_inside = _Inside()


class CudaTensor(torch.Tensor):
    """A tensor on the fake device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    answer: Any = None  # what the host reads of it, where that can be known

    @staticmethod
    def __new__(cls, elem: torch.Tensor) -> "CudaTensor":
        return torch.Tensor._make_subclass(cls, elem, False, device_for_backend_keys=CUDA)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # type: ignore[override]
        return active().dispatch(func, args, kwargs or {})

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return META if _inside.value else CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return not _inside.value

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return _inside.value

    def get_device(self) -> int:
        return 0

    def data_ptr(self) -> int:
        """As the caching allocator would place it: storages begin at multiples of 512."""
        return self.untyped_storage()._cdata * 512 + self.storage_offset() * self.element_size()

    def tolist(self) -> Any:
        active().hazard("sync", "tolist")
        return torch.zeros(self.shape, dtype=self.dtype).tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    def record_stream(self, stream: Any) -> None:
        pass

    def __repr__(self, **_) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"


class _Mode(TorchDispatchMode):
    # while a mode of this kind is active torch does not initialise the device that a factory names
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self, fake: "FakeCuda"):
        super().__init__()
        self.fake = fake

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.fake.dispatch(func, args, kwargs or {})


_active: list["FakeCuda"] = []


def active() -> "FakeCuda":
    """The one whose block is running."""
    if not _active:
        raise RuntimeError("a tensor of FakeCuda is used outside of its block")
    return _active[0]


class FakeCuda:
    """A context in which `cuda:0` is a device that computes nothing, and what it is asked is counted and judged.

    Args:
        capability: of the device, which tiles and dtypes depend on.

    Attributes:
        total: the section of everything in the block.
        capturing: the graph that takes what is launched, if any.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0)):
        self.capability = capability
        self.total = Section()
        self.capturing: Any = None
        self._sections = [self.total]
        self._pinned: dict[int, torch.Tensor] = {}  # kept, so that no other memory has its address
        self._undo = ExitStack()

    def __enter__(self) -> "FakeCuda":
        from .fake_cuda_runtime import patches  # it takes names from here

        if _active:
            raise RuntimeError("FakeCuda is active already")
        with ExitStack() as undo:
            undo.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
            torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") makes its copy where we see it
            for patch in patches(self):
                undo.enter_context(patch)
            _active.append(self)
            undo.callback(_active.clear)
            undo.enter_context(_Mode(self))
            self._undo = undo.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._undo.close()

    @property
    def triton(self) -> list[Launch]:
        return self.total.launches

    @property
    def hazards(self) -> list[Hazard]:
        return self.total.hazards

    @property
    def counts(self) -> Counts:
        return self.total.counts

    @contextmanager
    def section(self, section: Section | None = None) -> Iterator[Section]:
        """What happens within the block, in all threads; added to a section that is given."""
        section = section or Section()
        self._sections.append(section)
        try:
            yield section
        finally:
            self._sections = [other for other in self._sections if other is not section]

    def in_this_thread(self) -> TorchDispatchMode:
        """A block for another thread than the context's: a mode is one thread's."""
        return _Mode(self)

    def hazard(self, kind: str, operator: str) -> None:
        place = place_of_call()
        for section in self._sections:
            section.hazards.append(Hazard(kind, operator, place))
        if self.capturing is not None and kind != "in a capture":
            self.hazard("in a capture", operator)

    def note(self, name: str, counts: Counts, launch: Launch | None = None) -> None:
        """One thing that the device is to do."""
        place = place_of_call() if launch is None else launch.place
        if self.capturing is not None:
            self.capturing.counts += counts
        for section in self._sections:
            section.operators[name] += 1
            section.places[f"{place}: {name}"] += 1
            if self.capturing is None:
                section.counts += counts
            if launch is not None:
                section.launches.append(launch)

    def launch(self, kernel: Any, args: tuple, grid: Any, options: dict[str, Any]) -> None:
        """What `kernel[grid](*args, **options)` comes to; raises TypeError and ValueError as the launch would."""
        names = list(kernel.arg_names)
        given = dict(zip(names, args, strict=False))
        given |= {name: options.pop(name) for name in names if name in options}
        defaults = {p.name: p.default for p in getattr(kernel, "params", ()) if p.has_default}
        missing = [name for name in names if name not in given and name not in defaults]
        if missing:
            raise TypeError(f"{kernel.fn.__name__} is launched without {', '.join(missing)}")
        arguments = {name: given[name] if name in given else defaults[name] for name in names}
        for name, value in arguments.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor):
                raise ValueError(
                    f"Pointer argument {name} of {kernel.fn.__name__} cannot be accessed from Triton (cpu)"
                )
        programs = grid(arguments) if callable(grid) else grid
        programs = tuple(programs) if isinstance(programs, tuple | list) else (programs,)
        # others than autograd's own, which may write in place only what nobody else holds
        arguments = {
            name: _alias(value) if isinstance(value, CudaTensor) else value for name, value in arguments.items()
        }
        launch = Launch(kernel, arguments, programs, options, place_of_call())
        if all(programs):
            self.note(launch.name, launch.counts, launch)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a tensor on the host in memory that counts as pinned."""
        pinned = tensor.detach().clone()
        self._pinned[pinned.untyped_storage().data_ptr()] = pinned
        return pinned

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return not isinstance(tensor, CudaTensor) and tensor.untyped_storage().data_ptr() in self._pinned

    def dispatch(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """Any operator, below autograd."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # C++ knows ours as meta
        for_device = any(isinstance(leaf, torch.device) and leaf.type in ("cuda", "meta") for leaf in leaves)
        if not for_device and not any(isinstance(tensor, CudaTensor) for tensor in tensors):
            return self._on_host(func, args, kwargs)
        if func in _OWN:
            return _OWN[func](self, *args, **kwargs)
        if func.namespace not in ("aten", "prim", "prims"):
            return self._custom(func, args, kwargs)
        if func.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
            with _Mode(self):  # in inference mode they come whole
                return func.decompose(*args, **kwargs)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            args = (args[0], self._indices(func, args[1]), *args[2:])
        elif any(tensor.dim() and not isinstance(tensor, CudaTensor) for tensor in tensors):
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
        outputs = _shapes_of(func, args, kwargs)
        if isinstance(outputs, CudaTensor) and func._schema.name in ("aten::any", "aten::all"):
            outputs.answer = func._schema.name == "aten::all"
        counts = operator_counts(func, args, kwargs, outputs)
        if counts is not None:
            self.note(func._schema.name.removeprefix("aten::"), counts)
        return outputs

    def _on_host(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if kwargs.get("pin_memory"):
            return self.pin(func(*args, **kwargs | {"pin_memory": False}))
        return func(*args, **kwargs)

    def _custom(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A custom operator's own body, as the dispatcher would choose it for CUDA tensors."""
        for key in (torch._C.DispatchKey.CUDA, torch._C.DispatchKey.CompositeExplicitAutograd):
            if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key):
                with _Mode(self):
                    return func._op_dk(key, *args, **kwargs)
        raise NotImplementedError(f"{func} has no kernel for CUDA")

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        self._transfer(source, target, non_blocking)
        if not isinstance(target, CudaTensor):
            target.fill_(target.dtype is torch.bool)
        return target

    def _to_copy(self, source: torch.Tensor, *, non_blocking: bool = False, **kwargs) -> torch.Tensor:
        device = kwargs.get("device")
        if device is not None and device.type == "cpu":
            target = torch.empty(source.shape, dtype=kwargs.get("dtype") or source.dtype)
            return self._copy(self.pin(target) if non_blocking else target, source, non_blocking)
        target = _shapes_of(aten._to_copy.default, (source,), kwargs)
        self._transfer(source, target, non_blocking)
        return target

    def _transfer(self, source: torch.Tensor, target: torch.Tensor, non_blocking: bool) -> None:
        if not target.numel():
            return
        from_host, to_host = (not isinstance(tensor, CudaTensor) for tensor in (source, target))
        if to_host and not (non_blocking and self.is_pinned(target)):
            self.hazard("copy to host", "copy_")
        elif from_host and not (non_blocking and self.is_pinned(source)):
            self.hazard("pageable copy", "copy_")
        elif (from_host or to_host) and self.capturing is not None:
            self.hazard("in a capture", "copy_")
        num_bytes = sum(bytes_of([tensor]) for tensor in (source, target) if isinstance(tensor, CudaTensor))
        if from_host or to_host or source.dtype == target.dtype:
            self.note("copy_", Counts(copies=1, bytes=num_bytes))
        else:
            self.note("copy_ into another dtype", Counts(kernels=1, bytes=num_bytes))

    def _indices(self, func: Any, indices: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
        """Places for masks, which the host would have to count, and copies of what is on the host."""
        name = func._schema.name.removeprefix("aten::")
        found: list[torch.Tensor | None] = []
        for index in indices:
            if index is not None and not isinstance(index, CudaTensor):
                self.hazard("pageable copy", name)
                index = _new(index.shape, index.dtype)
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                self.hazard("sync", f"{name} by a mask")
                found += [_new((index.numel(),), torch.int64) for _ in range(index.dim())]
            else:
                found.append(index)
        return found

    def _item(self, tensor: torch.Tensor) -> Any:
        self.hazard("sync", "item")
        answer = getattr(tensor, "answer", None)
        return torch.ones((), dtype=tensor.dtype).item() if answer is None else answer

    def _equal(self, first: torch.Tensor, second: torch.Tensor) -> bool:
        self.hazard("sync", "equal")
        return first.shape == second.shape

    def _nonzero(self, tensor: torch.Tensor) -> torch.Tensor:
        self.hazard("sync", "nonzero")
        return _new((tensor.numel(), tensor.dim()), torch.int64)

    def _masked_select(self, tensor: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        self.hazard("sync", "masked_select")
        return _new((torch.broadcast_shapes(tensor.shape, mask.shape).numel(),), tensor.dtype)

    def _repeat_interleave(self, repeats: torch.Tensor, *, output_size: int | None = None) -> torch.Tensor:
        if output_size is None:
            self.hazard("sync", "repeat_interleave")
        else:
            self.note("repeat_interleave", Counts(kernels=1, bytes=bytes_of([repeats]) + 8 * output_size))
        return _new((repeats.numel() if output_size is None else output_size,), torch.int64)


# operators that are more than a computation on the device; where the host must know a size, everything counts as true
_OWN: dict[Any, Callable] = {
    aten.copy_.default: FakeCuda._copy,
    aten._to_copy.default: FakeCuda._to_copy,
    aten.mm.dtype_out: typed_product,
    aten.addmm.dtype_out: typed_product,
    aten._scaled_mm.default: scaled_product,
    aten._scaled_mm.out: scaled_product,
    aten._local_scalar_dense.default: FakeCuda._item,
    aten.equal.default: FakeCuda._equal,
    aten.nonzero.default: FakeCuda._nonzero,
    aten.masked_select.default: FakeCuda._masked_select,
    aten.repeat_interleave.Tensor: FakeCuda._repeat_interleave,
    aten.is_pinned.default: lambda *_: False,
}


@contextmanager
def meta_kernels() -> Iterator[None]:
    """Operators on our tensors run torch's meta kernels."""
    with torch._C._DisableTorchDispatch(), torch._C._PreserveDispatchKeyGuard():
        torch._C._set_meta_in_tls_dispatch_include(True)
        _inside.value = True
        try:
            yield
        finally:
            _inside.value = False


def _shapes_of(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An operator's outputs: itself where it writes in place."""

    def on_meta(value: Any) -> Any:
        if isinstance(value, torch.device) and value.type == "cuda":
            return META
        return value.to(META) if isinstance(value, torch.Tensor) and value.device.type == "cpu" else value

    def as_ours(value: Any) -> Any:
        return CudaTensor(value) if isinstance(value, torch.Tensor) and not isinstance(value, CudaTensor) else value

    with meta_kernels():
        args, kwargs = tree_map(on_meta, (args, kwargs))
        return tree_map(as_ours, func(*args, **kwargs))


def _new(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return _shapes_of(aten.empty.memory_format, (list(shape),), {"dtype": dtype, "device": META})


def _alias(tensor: CudaTensor) -> CudaTensor:
    with meta_kernels():
        return CudaTensor(tensor)
