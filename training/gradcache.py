"""Exact gradients of a loss over more vectors than one pass can hold: GradCache (Gao et al., arXiv 2101.06983).

All slabs are embedded without gradient, the loss gives the gradient of every vector, and each slab runs again with its
part of it. The same masks are drawn both times, so the result is that of one pass over everything.
"""

from collections.abc import Callable, Sequence

import torch


def backpropagate(
    slabs: Sequence[Sequence[int]],
    embed: Callable[[int], torch.Tensor],
    loss_of: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Leave the parameters' gradients of `loss_of(vectors)` and return the loss, detached.

    One slab takes one pass; more take two each, the first without gradient.

    Args:
        slabs: places of each slab's vectors among all.
        embed: the vectors `(places, E)` of a slab, the same whenever it is called.
        loss_of: a scalar from all vectors in order of their places.
    """
    if len(slabs) == 1:
        loss = loss_of(_in_order(slabs, [embed(0)]))
        loss.backward()
        return loss.detach()
    with torch.no_grad():
        vectors = _in_order(slabs, [embed(place) for place in range(len(slabs))])
    vectors.requires_grad_()
    loss = loss_of(vectors)
    loss.backward()
    gradients = vectors.grad
    assert gradients is not None
    for place, places in enumerate(slabs):
        embed(place).backward(gradients[list(places)])
    return loss.detach()


def _in_order(slabs: Sequence[Sequence[int]], parts: Sequence[torch.Tensor]) -> torch.Tensor:
    joined = torch.cat(list(parts))
    places = torch.tensor([place for slab in slabs for place in slab], device=joined.device)
    return torch.empty_like(joined).index_copy(0, places, joined)
