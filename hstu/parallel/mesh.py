"""Process groups: one process or many, CPU or GPU, the same code."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


@dataclass(frozen=True)
class _Failure:
    error: Exception


def _join() -> tuple[dist.Store, int, int]:
    """Return a store, this rank and the number of ranks, as torchrun's environment describes them.

    torchrun keeps one store through all restarts of a job, whose old keys would send ranks to dead peers: rank 0
    names each attempt, and every rank makes sure that it has heard the rank 0 of its own.
    """
    store, rank, world_size = next(dist.rendezvous("env://"))
    name, others = uuid.uuid4().hex, range(1, world_size)
    if rank == 0:
        heard = False
        while not heard:
            names = [store.get(f"rank/{other}").decode() for other in others]
            store.set("attempt", ",".join([name, *names]))
            heard = not names or store.check([f"{name}/{other}" for other in others])
            time.sleep(0 if heard else 0.02)
        return dist.PrefixStore(name, store), rank, world_size
    store.set(f"rank/{rank}", name)
    while True:
        attempt, *names = store.get("attempt").decode().split(",")
        if name in names:
            store.set(f"{attempt}/{rank}", "")
            return dist.PrefixStore(attempt, store), rank, world_size
        time.sleep(0.02)


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
            store, rank, world_size = _join()
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
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

    def is_told(self, text: str) -> bool:
        """Return whether rank 0 has said ``text`` here; on rank 0 itself this says it. Asked when a rank fails.

        Not a collective operation: the other ranks may be anywhere.
        """
        store = dist.PrefixStore("told", dist.distributed_c10d._get_default_store())
        if self.is_main:
            store.set("0", text)
            return False
        try:
            store.wait(["0"], timedelta(seconds=3))
            return bool(store.get("0").decode() == text)
        except RuntimeError:  # rank 0 has nothing to say, or is gone
            return False

    def set_timeout(self, seconds: float) -> None:
        """Let a collective operation on any group wait for other ranks so long at most."""
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.host_group)
