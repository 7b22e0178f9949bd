"""Work on items that several ranks ask for: each is done by one of them, and all have the result and its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hstu.parallel.mesh import Group


def each_on_one_rank(group: Group, items: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return what ``make`` gives for ``items`` [n], [n, H]; every rank of ``group`` has to call it.

    Each distinct item of all ranks is made by one rank, which gets the gradients of all.

    Args:
        group: The ranks.
        items: Ids, int64, each once.
        make: From ids [m] to [m, H].
    """
    if group.size == 1:
        return make(items)
    every = group.gather(items).unique()
    share = -(-every.numel() // group.size)
    made = make(every[group.rank * share : (group.rank + 1) * share])
    whole: Tensor = _Gather.apply(F.pad(made, (0, 0, 0, share - made.shape[0])), group)
    return whole[torch.searchsorted(every, items)]


class _Gather(torch.autograd.Function):
    """Joins the rows of ranks, as many of each; the gradient of a row is the sum of those of all ranks."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, group: Group) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(own) for _ in range(group.size)]
        dist.all_gather(parts, own.contiguous(), group=group.group)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group.group)
        return total.chunk(ctx.group.size)[ctx.group.rank], None
