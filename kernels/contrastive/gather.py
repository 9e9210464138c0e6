"""Keys of every process for the contrastive loss: one collective forward, one backward, after a tiny one that compares
numbers.

`M` keys of each process, the same number everywhere, `W` processes.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class _GatherKeys(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keys: Tensor, groups: Tensor | None, process_group: dist.ProcessGroup):
        ctx.process_group = process_group
        payload = keys.contiguous().view(torch.uint8)  # (M, bytes), so that the groups travel along
        if groups is not None:
            payload = torch.cat([payload, groups[:, None].contiguous().view(torch.uint8)], dim=1)
        gathered = _all_gather(payload, process_group)
        key_bytes = keys.shape[1] * keys.element_size()
        all_keys = gathered[:, :key_bytes].contiguous().view(keys.dtype)
        if groups is None:
            return all_keys, None
        all_groups = gathered[:, key_bytes:].contiguous().view(torch.int64)[:, 0]
        ctx.mark_non_differentiable(all_groups)
        return all_keys, all_groups

    @staticmethod
    def backward(ctx, *gradients):
        gradient = gradients[0].contiguous()
        group = ctx.process_group
        num_keys = gradient.shape[0] // dist.get_world_size(group)
        if gradient.is_cuda and dist.get_backend(group) != "gloo":
            own = gradient.new_empty((num_keys, gradient.shape[1]))
            dist.reduce_scatter_tensor(own, gradient, group=group)
            return own, None, None
        summed = gradient.clone()  # gloo has no reduce-scatter
        dist.all_reduce(summed, group=group)
        rank = dist.get_rank(group)
        return summed[rank * num_keys : (rank + 1) * num_keys].clone(), None, None


def shapes_by_rank(queries: Tensor, keys: Tensor, groups: Tensor | None, process_group: dist.ProcessGroup) -> Tensor:
    """int64 (W, 3): each process's number of queries, of keys, and bytes that it sends for a key and its group."""
    key_bytes = keys.shape[1] * keys.element_size() + (0 if groups is None else groups.element_size())
    # filled on the device: a copy from the host would wait for it
    numbers = (queries.shape[0], keys.shape[0], key_bytes)
    own = [torch.full((1, 1), number, dtype=torch.int64, device=keys.device) for number in numbers]
    return _all_gather(torch.cat(own, dim=1), process_group)


def gather_keys(keys: Tensor, groups: Tensor | None, process_group: dist.ProcessGroup) -> tuple[Tensor, Tensor | None]:
    """(M, E) and (M,) of each process -> (W * M, E) and (W * M,) in order of rank; gradients are summed over ranks."""
    return _GatherKeys.apply(keys, groups, process_group)


def combine_columns(column_lse: Tensor, is_positive: Tensor, process_group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Every process's log-sum-exp (W * M,) of the same columns made one, and the columns that are anyone's positive."""
    both = torch.stack([column_lse, is_positive.float()])[None]
    gathered = _all_gather(both, process_group)  # (W, 2, W * M)
    return gathered[:, 0].logsumexp(0), gathered[:, 1].amax(0) > 0


def _all_gather(rows: Tensor, process_group: dist.ProcessGroup) -> Tensor:
    world_size = dist.get_world_size(process_group)
    gathered = rows.new_empty((world_size * rows.shape[0], *rows.shape[1:]))
    dist.all_gather_into_tensor(gathered, rows, group=process_group)
    return gathered
