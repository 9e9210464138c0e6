"""Room behind the rows of a matrix: columns of its memory that are no part of it, for what reads the rows to write to.

A product over a row and what was written behind it is then one (`lora/stack.py`), and no row is copied for it.
"""

from torch import Tensor


def empty_with_room(like: Tensor, shape: tuple[int, ...], room: int) -> Tensor:
    """An uninitialised tensor whose rows, in the last dimension, have `room` columns behind them.

    It is no view: autograd refuses the gradient of a custom function's result that is one and is written to.
    """
    if not room:
        return like.new_empty(shape)
    buffer = like.new_empty((*shape[:-1], shape[-1] + room))
    return like.new_empty(0).set_(buffer.untyped_storage(), 0, shape, buffer.stride())


def with_room(x: Tensor, num_columns: int) -> Tensor | None:
    """x (T, E) and the columns behind its rows as one, (T, E + num_columns); None where its memory has none."""
    num_rows, size = x.shape
    last = x.storage_offset() + (num_rows - 1) * x.stride(0) + size + num_columns
    if num_rows == 0 or x.stride(0) < size + num_columns or last * x.element_size() > x.untyped_storage().nbytes():
        return None
    return x.as_strided((num_rows, size + num_columns), x.stride())
