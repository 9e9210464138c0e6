"""The LoRA linears on the GPU: W, A and B of linears that share an input stand in one matrix, and a product is one.

    matrix = [[W, sB], [A, 0]]             (O + R, E + R)
    low    = x @ A.T                       (T, R); the trained part sees drop(x)
    y      = [x | low] @ [W | sB].T        one product; `low` is written into the columns that follow x's in memory
    grad_x = grad_y @ W + drop((grad_y @ sB) @ A)

The linears' own weights are views of the matrix, so none is in memory twice, and an adapter is cast to the weights'
dtype when it has changed, not in each pass. Under dropout `kernels.py` reads x, and reads and writes grad_x, once.

`T` packed tokens, `E` input features, `O` output features of all linears, `R` the adapters' ranks, each rounded up to
`UNIT`; what pads them is zero.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..room import with_room
from . import LoraLinear, padded_rank, room_behind
from .kernels import add_grad_x, grad_a, low_rank

# of any optimizer: fused ones write without changing a tensor's version
_num_steps = 0


def _count_step(*_) -> None:
    global _num_steps
    _num_steps += 1


register_optimizer_step_post_hook(_count_step)


class _Adapter(NamedTuple):
    """An adapter's place in the matrix."""

    rows: slice  # its linear's, of W and of sB
    columns: slice  # of `low`, without what pads them


class _Written(NamedTuple):
    """What an adapter in the matrix was written from; the tensors are views, which see later writes."""

    a: Tensor
    b: Tensor
    versions: tuple[int, int, int]
    scale: float


class LoraStack:
    """Frozen linears that share an input, and their adapters, for repeated calls of `lora_linears`.

    linears     as `lora_linears` takes them; their weights are copied

    Attributes:
        weights: views (out, E) of the copies, to stand in place of the linears' own.
        num_columns: `R`, columns behind x's own that make a forward product one (`room` of `lora_linears`).
    """

    def __init__(self, linears: Sequence[LoraLinear]):
        first = linears[0].weight
        self.size = first.shape[1]
        self.outs = [linear.weight.shape[0] for linear in linears]
        ends = [sum(self.outs[: place + 1]) for place in range(len(linears))]
        self.rows = [slice(end - out, end) for end, out in zip(ends, self.outs, strict=True)]
        self.layout = _layout(linears)
        self.adapters, self.num_trained, self.num_columns = [], 0, 0
        for place, rank, trained in self.layout:
            start = self.num_columns
            self.adapters.append(_Adapter(self.rows[place], slice(start, start + rank)))
            self.num_columns += padded_rank(rank)
            self.num_trained += padded_rank(rank) if trained else 0
        room = room_behind(self.size, [rank for _, rank, _ in self.layout])
        buffer = first.new_zeros((ends[-1] + self.num_columns, self.size + room))
        self.matrix = buffer[:, : self.size + self.num_columns]
        self.a = self.matrix[ends[-1] :, : self.size]  # (R, E)
        self.b = self.matrix[: ends[-1], self.size :]  # (O, R)
        self.w = self.matrix[: ends[-1], : self.size]  # (O, E)
        self.weights = [self.w[rows] for rows in self.rows]
        for weight, linear in zip(self.weights, linears, strict=True):
            weight.copy_(linear.weight.detach())
        self._written: list[_Written | None] = [None] * len(self.adapters)

    def __deepcopy__(self, memo) -> None:
        """A copy of a model makes a stack of its own weights."""

    def has_adapter(self, rows: slice) -> bool:
        """Whether a linear among these rows has an adapter."""
        return any(rows.start <= adapter.rows.start < rows.stop for adapter in self.adapters)

    def holds(self, linears: Sequence[LoraLinear]) -> bool:
        """Whether these are the linears of this stack: their weights its views, their adapters of its ranks."""
        return (
            len(linears) == len(self.weights)
            and all(_same_memory(linear.weight, own) for linear, own in zip(linears, self.weights, strict=True))
            and _layout(linears) == self.layout
        )

    @torch.no_grad()
    def update(self, linears: Sequence[LoraLinear]) -> None:
        """Take over the adapters that were written to since, or replaced, and those in training once a step."""
        for place, (a, b, scale) in enumerate(_adapters(linears)):
            written = self._written[place]
            versions = a._version, b._version, _num_steps if a.requires_grad or b.requires_grad else 0
            if (
                written is not None
                and (written.versions, written.scale) == (versions, scale)
                and _same_memory(written.a, a)
                and _same_memory(written.b, b)
            ):
                continue
            rows, columns = self.adapters[place]
            self.a[columns].copy_(a)
            torch.mul(b, scale, out=self.b[rows, columns])
            self._written[place] = _Written(a.detach(), b.detach(), versions, scale)


def _adapters(linears: Sequence[LoraLinear]) -> list[tuple[Tensor, Tensor, float]]:
    """Those in training come first."""
    trained = [
        (one.lora_a, one.lora_b, one.scaling) for one in linears if one.lora_a is not None and one.lora_b is not None
    ]
    return trained + [adapter for linear in linears for adapter in linear.frozen]


def _layout(linears: Sequence[LoraLinear]) -> list[tuple[int, int, bool]]:
    """Linear, rank and whether it trains, of each of `_adapters`."""
    trained = [(place, one.lora_a.shape[0], True) for place, one in enumerate(linears) if one.lora_a is not None]
    return trained + [(place, a.shape[0], False) for place, one in enumerate(linears) for a, _, _ in one.frozen]


def _same_memory(tensor: Tensor, other: Tensor) -> bool:
    return (
        tensor.untyped_storage()._cdata == other.untyped_storage()._cdata
        and tensor.storage_offset() == other.storage_offset()
        and tensor.shape == other.shape
        and tensor.stride() == other.stride()
        and tensor.dtype == other.dtype
    )


class _Call(NamedTuple):
    stack: LoraStack
    biases: list[Tensor | None]
    scales: list[float]  # of the adapters in training
    dropout_threshold: int
    seed: int | None
    kept_scale: float  # of what dropout keeps
    room: int


class _StackedLinears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, call: _Call, *trained: Tensor):
        """`trained`: the A's and then the B's of the adapters in training, for their gradients alone."""
        stack = call.stack
        x = x if x.stride(1) == 1 else x.contiguous()
        wide = with_room(x, stack.num_columns) if call.room >= stack.num_columns > 0 else None
        low = x.new_empty((x.shape[0], stack.num_columns)) if wide is None else wide[:, stack.size :]
        bits = None
        if call.dropout_threshold:
            assert call.seed is not None
            bits = low_rank(x, stack.a, low, stack.num_trained, call.dropout_threshold, call.seed, call.kept_scale)
            torch.autograd.graph.increment_version(low)
        elif stack.num_columns:
            torch.mm(x, stack.a.T, out=low)
        outputs = []
        for rows, bias in zip(stack.rows, call.biases, strict=True):
            if wide is not None and stack.has_adapter(rows):
                outputs.append(torch.nn.functional.linear(wide, stack.matrix[rows], bias))
                continue
            outputs.append(torch.nn.functional.linear(x, stack.w[rows], bias))
            if stack.has_adapter(rows):
                outputs[-1].addmm_(low, stack.b[rows].T)
        ctx.call, ctx.dtypes = call, [tensor.dtype for tensor in trained]
        # a view of an input is made anew: autograd would take the one of this pass for a change of the input
        ctx.save_for_backward(x, low if wide is None else None, bits, stack.matrix)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs):
        call, (x, low, bits, _) = ctx.call, ctx.saved_tensors
        stack, num_trained = call.stack, call.stack.num_trained
        if low is None:
            wide = with_room(x, stack.num_columns)
            assert wide is not None
            low = wide[:, stack.size :]
        needs_x, _, *needs = ctx.needs_input_grad
        count = len(needs) // 2
        needs_a, needs_b = any(needs[:count]), any(needs[count:])
        runs = _runs(grad_outputs, stack.rows)
        adapted = [(grad, rows) for grad, rows in runs if stack.has_adapter(rows)]
        grad_x = _sum_of_products((grad, stack.w[rows]) for grad, rows in runs) if needs_x else None
        grads: list[Tensor | None] = [None] * len(needs)
        if adapted and (needs_x or needs_a):
            # what a linear has no part in is zero in its columns of B: the sum is exact
            grad_low = _sum_of_products((grad, stack.b[rows]) for grad, rows in adapted)  # (T, R)
            if grad_x is not None and bits is not None:
                add_grad_x(grad_x, grad_low, stack.a, bits, num_trained, call.kept_scale)
            elif grad_x is not None:
                grad_x.addmm_(grad_low, stack.a)
        if needs_a:
            if bits is not None:
                stacked = grad_a(x, grad_low, bits, num_trained, call.kept_scale)
            else:
                stacked = _wide_product(grad_low[:, :num_trained].T, x)
            for place in range(count):
                if needs[place]:
                    grads[place] = stacked[stack.adapters[place].columns].to(ctx.dtypes[place])
        if needs_b:
            for grad, run in adapted:
                product = _wide_product(grad.T, low[:, :num_trained])
                for place, (rows, columns) in enumerate(stack.adapters[:count]):
                    if needs[count + place] and run.start <= rows.start < run.stop:
                        part = product[rows.start - run.start : rows.stop - run.start, columns]
                        grads[count + place] = torch.mul(part, call.scales[place]).to(ctx.dtypes[count + place])
        return grad_x, None, *grads


def _runs(grads: Sequence[Tensor], rows: Sequence[slice]) -> list[tuple[Tensor, slice]]:
    """The gradients and their linears' rows, those that lie side by side in memory as one."""
    runs = [(grads[0], rows[0])]
    for grad, own in zip(grads[1:], rows[1:], strict=True):
        before, its = runs[-1]
        if (
            grad.untyped_storage()._cdata == before.untyped_storage()._cdata
            and grad.storage_offset() == before.storage_offset() + before.shape[1]
            and grad.stride() == before.stride()
            and grad.stride(1) == 1
            and grad.stride(0) >= before.shape[1] + grad.shape[1]
        ):
            both = before.as_strided((grad.shape[0], before.shape[1] + grad.shape[1]), grad.stride())
            runs[-1] = both, slice(its.start, own.stop)
        else:
            runs.append((grad, own))
    return runs


def _sum_of_products(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    total = None
    for a, b in pairs:
        total = a @ b if total is None else total.addmm_(a, b)
    assert total is not None
    return total


def _wide_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, of 16-bit matrices in float32 where the device can."""
    if a.is_cuda and a.element_size() == 2:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a @ b


def stacked_lora_linears(
    x: Tensor,
    linears: Sequence[LoraLinear],
    stack: LoraStack | None,
    *,
    dropout_threshold: int,
    seed: int | None,
    kept_scale: float,
    room: int,
) -> tuple[Tensor, ...]:
    """`lora_linears` of checked arguments, on a GPU."""
    stack = stack or LoraStack(linears)
    if dropout_threshold and x.dtype == torch.float64:
        raise ValueError("x must be float32 or of 16 bits for dropout on a GPU, got float64")
    stack.update(linears)
    trained = [linear for linear in linears if linear.lora_a is not None]
    call = _Call(
        stack,
        [linear.bias for linear in linears],
        [linear.scaling for linear in trained],
        dropout_threshold if trained else 0,
        seed,
        kept_scale,
        room,
    )
    with torch.autocast(x.device.type, enabled=False):
        return _StackedLinears.apply(
            x, call, *(linear.lora_a for linear in trained), *(linear.lora_b for linear in trained)
        )
