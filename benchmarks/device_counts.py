"""What the host has a device do, counted operator by operator; `fake_cuda.py` and `counts.py` go by these rules.

- `kernels`: one for each ATen operator that computes, a fused one such as `addmm` too, and one for each Triton launch.
  Views, allocations and metadata are none, and neither is an operator whose outputs are all empty. Some of torch's
  operators launch several kernels (a sort, an embedding's gradient, a long `_foreach_`): these count one here.
- `fills`: tensors set to one value. `copies`: between host and device, and within the device, strided ones too.
- `bytes`: each tensor that an operator takes is read once, and each that it makes or changes is written once; expanded
  dimensions count once. A gather (embedding, `index_select`) reads what it writes, a scatter writes what it reads. Each
  tensor that a Triton kernel loads from is read once and each that it stores to is written once, whole (so attention's
  kernels for short and for long sequences count all sequences each); of a kernel whose programs return at once unless a
  flag is set, the flags.
"""

import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves

from .triton_accesses import accesses

_REPOSITORY = Path(__file__).resolve().parents[1]
_OWN_FILES = {"fake_cuda.py", "fake_cuda_runtime.py", "fake_products.py", "device_counts.py", "triton_accesses.py"}
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
_METADATA = {"set_", "record_stream", "is_same_size", "lift", "lift_fresh", "_assert_tensor_metadata"}
_FILLS = {"zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
_FILLS |= {"zero_", "fill_", "scalar_tensor"}
_GATHERS = {"embedding", "index_select", "gather", "index"}
_SCATTERS = {"index_put", "index_copy", "index_add", "scatter", "scatter_add"}

_RETURN_AT_ONCE = {"_contrastive_repair_kernel": "flags_ptr"}


@dataclass(frozen=True)
class Counts:
    """What the host had the device do; what stands in a captured graph is one of `replays` and nothing else."""

    kernels: int = 0
    triton: int = 0  # of the kernels
    fills: int = 0
    copies: int = 0
    replays: int = 0
    bytes: int = 0

    @property
    def launches(self) -> int:
        return self.kernels + self.fills + self.copies + self.replays

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel; `kernel.run(grid=grid, warmup=True, **arguments, **options)` compiles it.

    Attributes:
        kernel: what `@triton.jit` made.
        arguments: every parameter by name, constants too, as given.
        grid: programs along each axis.
        options: what is given beside parameters: num_warps, num_stages.
        place: of the launch, `file:line function`.
    """

    kernel: Any
    arguments: dict[str, Any]
    grid: tuple[int, ...]
    options: dict[str, Any]
    place: str

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    @property
    def counts(self) -> Counts:
        tensors = {name: value for name, value in self.arguments.items() if isinstance(value, torch.Tensor)}
        if self.name in _RETURN_AT_ONCE:
            tensors = {name: value for name, value in tensors.items() if name == _RETURN_AT_ONCE[self.name]}
        num_bytes = sum(
            bytes_of(tensors[name] for name in names & set(tensors)) for names in accesses(self.kernel, self.arguments)
        )
        return Counts(kernels=1, triton=1, bytes=num_bytes)


class Hazard(NamedTuple):
    """What makes the host wait for the device, or what a capture does not survive.

    `kind` is "sync", "copy to host", "pageable copy" or "in a capture"; `place` is `file:line function`.
    """

    kind: str
    operator: str
    place: str


@dataclass
class Section:
    """What happened within a `with` block; what is captured is in all but the counts."""

    counts: Counts = field(default_factory=Counts)
    hazards: list[Hazard] = field(default_factory=list)
    launches: list[Launch] = field(default_factory=list)  # Triton's
    operators: Counter[str] = field(default_factory=Counter)  # all that launch, by name
    places: Counter[str] = field(default_factory=Counter)  # the same, by `file:line function: name`


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Of different tensors, each element in memory once."""
    found = {}
    for tensor in tensors:
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
        place = (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tensor.shape, tensor.stride())
        found[place] = torch.Size(sizes).numel() * tensor.element_size()
    return sum(found.values())


def operator_counts(func: Any, args: tuple, kwargs: dict[str, Any], outputs: Any) -> Counts | None:
    """What an ATen operator comes to; None for one that launches nothing."""
    name = func._schema.name.removeprefix("aten::")
    if name in _ALLOCATIONS or name in _METADATA:
        return None
    inputs = {argument.name for argument in func._schema.arguments if not argument.is_out}
    read = _tensors((args, {key: value for key, value in kwargs.items() if key in inputs}))
    made = _tensors(outputs)
    changed = _changed(func, args, kwargs)
    storages = {tensor.untyped_storage()._cdata for tensor in read + changed}
    fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in storages]
    written = changed + fresh
    if (made and not written) or (written and not any(tensor.numel() for tensor in written)):
        return None  # a view, or nothing to do
    if name in _FILLS:
        return Counts(fills=1, bytes=bytes_of(written))
    if name == "clone":
        return Counts(copies=1, bytes=bytes_of(read) + bytes_of(written))
    if name in _GATHERS:
        num_bytes = 2 * bytes_of(written) + bytes_of(read[1:])
    elif name.removesuffix("_") in _SCATTERS:
        num_bytes = 2 * bytes_of(read[1:]) + 2 * bytes_of(fresh)
    else:
        num_bytes = bytes_of(read) + bytes_of(written)
    return Counts(kernels=1, bytes=num_bytes)


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor) and leaf.is_cuda]


def _changed(func: Any, args: tuple, kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among its arguments that an operator writes into."""
    changed = []
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = kwargs.get(argument.name) if argument.kwarg_only or place >= len(args) else args[place]
            changed += _tensors(value)
    return changed


_files: dict[str, str | None] = {}


def place_of_call() -> str:
    """`file:line function` of the innermost call in the repository."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if name not in _files:
            path = Path(name).resolve()
            inside = path.is_relative_to(_REPOSITORY) and path.name not in _OWN_FILES
            _files[name] = path.relative_to(_REPOSITORY).as_posix() if inside else None
        if _files[name] is not None:
            return f"{_files[name]}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back  # type: ignore[assignment]
    return "?"
