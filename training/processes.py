"""The processes of a run: who takes which rows, and sums over all of them. One process needs no collective."""

import itertools
from collections.abc import Iterable

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn


class Processes:
    """What a training step needs of accelerate: this process's share, and deterministic sums."""

    def __init__(self, accelerator: Accelerator):
        self.rank = accelerator.process_index
        self.world_size = accelerator.num_processes
        self.group: dist.ProcessGroup | None = dist.group.WORLD if self.world_size > 1 else None
        self._hosts = self.group  # for what the hosts know: summed on the device they would wait for it
        if self.group is not None and accelerator.device.type == "cuda":
            self._hosts = dist.new_group(backend="gloo")

    def share(self, count: int) -> slice:
        """This process's contiguous part of `count` rows; parts differ by one row at most."""
        return self.shares(count)[self.rank]

    def shares(self, count: int) -> list[slice]:
        """Every process's part, in order of rank."""
        bounds = [count * rank // self.world_size for rank in range(self.world_size + 1)]
        return [slice(*pair) for pair in itertools.pairwise(bounds)]

    def sum(self, *values: float) -> list[float]:
        """Each value summed over the processes, float64, which waits for the other hosts but for no device."""
        if self.group is None:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self._hosts)
        return total.tolist()

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum every gradient over the processes in one collective; a parameter without one counts as zero."""
        if self.group is None:
            return
        parameters = list(parameters)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat, group=self.group)
        parts = flat.split([gradient.numel() for gradient in gradients])
        for parameter, part in zip(parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
