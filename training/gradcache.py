"""Exact gradients of a loss over more vectors than one pass can hold: GradCache (Gao et al., arXiv 2101.06983).

All slabs are embedded without gradient, the loss gives the gradient of every vector, and each slab runs again with its
part of it. The same masks are drawn both times, so the result is that of one pass over everything.
"""

from collections.abc import Callable, Sequence

import torch


def backpropagate(
    counts: Sequence[int],
    places: torch.Tensor,
    embed: Callable[[int], torch.Tensor],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Leave the parameters' gradients of `loss_of(vectors)` and return the loss, detached.

    One slab takes one pass; more take two each, the first without gradient. Nothing waits for the device.

    Args:
        counts: vectors of each slab.
        places: int64 (N,) on the vectors' device: the places, among all, of the first slab's vectors, then of the
            second's, and so on.
        embed: the vectors `(count, E)` of a slab, the same whenever it is called.
        loss_of: a scalar from all vectors in order of their places.
    """
    if len(counts) == 1:
        loss = loss_of(in_order([embed(0)], places))
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        vectors = in_order([embed(slab) for slab in range(len(counts))], places)
    vectors.requires_grad_()
    loss = loss_of(vectors)
    loss.backward()
    gradients = vectors.grad
    assert gradients is not None
    for slab, gradient in enumerate(gradients.index_select(0, places).split(list(counts))):
        embed(slab).backward(gradient)
    return loss.detach()


def in_order(parts: Sequence[torch.Tensor], places: torch.Tensor) -> torch.Tensor:
    """The rows of all parts, the first one at `places[0]`."""
    joined = torch.cat(list(parts))
    return torch.empty_like(joined).index_copy(0, places, joined)
