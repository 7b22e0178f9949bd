"""Process groups: one process or many, CPU or GPU, the same code."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class _Failure:
    error: Exception


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's place among all, and the groups it talks to.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: Number of processes.
        device: Where this rank computes.
        data_group: Ranks that hold different samples (data x context); Megatron-Core built it.
        host_group: All ranks, for tensors in host memory.
    """

    rank: int
    world_size: int
    device: torch.device
    data_group: dist.ProcessGroup
    host_group: dist.ProcessGroup

    @classmethod
    @contextmanager
    def create(cls) -> Iterator[Mesh]:
        """Join the job that torchrun describes, or make a job of one process; leave it at the end."""
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            yield cls(
                rank=dist.get_rank(),
                world_size=dist.get_world_size(),
                device=device,
                data_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                host_group=dist.new_group(backend="gloo"),
            )
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place; returns ``values``."""
        if self.world_size > 1:
            dist.all_reduce(values, group=self.data_group if values.is_cuda else self.host_group)
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Join the rows of all ranks in rank order; they may be unequal in number."""
        if self.world_size == 1:
            return values
        count = torch.tensor([values.shape[0]], device=values.device)
        group = self.data_group if values.is_cuda else self.host_group
        counts = [torch.empty_like(count) for _ in range(self.world_size)]
        dist.all_gather(counts, count, group=group)
        sizes = [int(c) for c in counts]
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: values.shape[0]] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's ``value`` (a small picklable object) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0, group=self.host_group)
        return box[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Run ``action`` on rank 0 while the others wait; its result, or its exception, reaches every rank."""
        outcome: Any = None
        if self.is_main:
            try:
                outcome = action()
            except Exception as error:
                outcome = _Failure(error)
        outcome = self.broadcast(outcome)
        if isinstance(outcome, _Failure):
            raise outcome.error
        return outcome

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` holds on some rank."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.world_size > 1 else flag

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.host_group)
