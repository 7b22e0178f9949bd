"""Process groups: one process or many, CPU or GPU, the same code."""

from __future__ import annotations

import hashlib
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
class Group:
    """Some of the ranks, this one among them.

    Attributes:
        rank: Place of this rank in the group.
        size: Number of its ranks.
        group: For tensors on the device.
    """

    rank: int
    size: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, group: dist.ProcessGroup) -> Group:
        """Describe ``group``."""
        return cls(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group)


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's place among all, and the groups it talks to: world = data x context x tensor.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: Number of processes.
        device: Where this rank computes.
        host_group: All ranks, for tensors in host memory.
        data: Ranks that hold different samples.
        context: Ranks that hold different tokens of the same samples.
        tensor: Ranks that hold different parts of the same weights, for the same tokens.
        tokens: Ranks that hold different tokens, data x context: what is summed over all tokens is summed here.
        token_host_group: The same ranks as ``tokens``, for tensors in host memory.
    """

    rank: int
    world_size: int
    device: torch.device
    host_group: dist.ProcessGroup
    data: Group
    context: Group
    tensor: Group
    tokens: Group
    token_host_group: dist.ProcessGroup

    @classmethod
    @contextmanager
    def create(cls) -> Iterator[Mesh]:
        """Join the job that torchrun describes, or make a job of one process; leave it at the end.

        All ranks are data ranks until ``with_degrees`` says otherwise.
        """
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
            yield cls._describe(device, dist.new_group(backend="gloo"), 1, 1)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    def with_degrees(self, context: int, tensor: int) -> Mesh:
        """Return the mesh of these degrees; the rest of the ranks are data ranks.

        Raises:
            ValueError: if the number of ranks is no multiple of ``context * tensor``.
        """
        if (context, tensor) == (self.context.size, self.tensor.size):
            return self
        if self.world_size % (context * tensor):
            raise ValueError(
                f"ContextParallelArgs.context_parallel_size = {context} times "
                f"TensorModelParallelArgs.tensor_model_parallel_size = {tensor} does not divide the {self.world_size} "
                "rank(s) of this job: start a multiple of it with torchrun, or set the sizes to 1"
            )
        parallel_state.destroy_model_parallel()
        return self._describe(self.device, self.host_group, context, tensor)

    @classmethod
    def _describe(cls, device: torch.device, host_group: dist.ProcessGroup, context: int, tensor: int) -> Mesh:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, context_parallel_size=context, create_gloo_process_groups=True
        )
        return cls(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            host_group=host_group,
            data=Group.of(parallel_state.get_data_parallel_group()),
            context=Group.of(parallel_state.get_context_parallel_group()),
            tensor=Group.of(parallel_state.get_tensor_model_parallel_group()),
            tokens=Group.of(parallel_state.get_data_parallel_group(with_context_parallel=True)),
            token_host_group=parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
        )

    @property
    def degrees(self) -> list[int]:
        """Numbers of data, context and tensor ranks."""
        return [self.data.size, self.context.size, self.tensor.size]

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks that hold different tokens, in place; returns ``values``."""
        if self.tokens.size > 1:
            dist.all_reduce(values, group=self._token_group(values))
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Join the rows of the ranks that hold different tokens, in rank order; they may be unequal in number."""
        if self.tokens.size == 1:
            return values
        group, count = self._token_group(values), torch.tensor([values.shape[0]], device=values.device)
        counts = [torch.empty_like(count) for _ in range(self.tokens.size)]
        dist.all_gather(counts, count, group=group)
        sizes = [int(c) for c in counts]
        padded = values.new_zeros(max(sizes), *values.shape[1:])
        padded[: values.shape[0]] = values
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])

    def exchange(self, values: Tensor, counts: list[int]) -> tuple[Tensor, list[int]]:
        """Send the first ``counts[0]`` rows of ``values`` to rank 0, the next ``counts[1]`` to rank 1, and so on.

        Returns:
            The rows that this rank was sent, in the order of the ranks, and how many came from each.
        """
        if self.world_size == 1:
            return values, counts
        sent = torch.tensor(counts, device=values.device)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent)
        sizes = got.tolist()
        received = values.new_empty(sum(sizes), *values.shape[1:])
        dist.all_to_all_single(received, values.contiguous(), sizes, counts)
        return received, sizes

    def _token_group(self, values: Tensor) -> dist.ProcessGroup:
        return self.tokens.group if values.is_cuda else self.token_host_group

    def broadcast(self, value: Any, *, rank: int = 0) -> Any:
        """Return the ``value`` of ``rank`` (a picklable object) on every rank."""
        box = [value]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=rank, group=self.host_group)
        return box[0]

    def share(self, make: Callable[[], Tensor], size: int) -> Tensor:
        """Run ``make`` on rank 0; the [size] int64 in host memory it returns, or its exception, reaches every rank."""
        box: list[Tensor] = []
        self.on_main(lambda: box.append(make()))
        values = box[0] if box else torch.empty(size, dtype=torch.int64)
        if self.world_size > 1:
            dist.broadcast(values, 0, group=self.host_group)
        return values

    def on_main(self, action: Callable[[], Any], *, rank: int = 0) -> Any:
        """Run ``action`` on ``rank`` while the others wait; its result, or its exception, reaches every rank."""
        outcome: Any = None
        if self.rank == rank:
            try:
                outcome = action()
            except Exception as error:
                outcome = _Failure(error)
        outcome = self.broadcast(outcome, rank=rank)
        if isinstance(outcome, _Failure):
            raise outcome.error
        return outcome

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` holds on some rank."""
        raised = torch.tensor(int(flag))
        if self.world_size > 1:
            dist.all_reduce(raised, group=self.host_group)
        return bool(raised)

    def is_first_to_tell(self, mistake: str) -> bool:
        """Return whether this rank is to print ``mistake``: one that has it is, rank 0 if it has it soon.

        Not a collective operation: the other ranks may be anywhere.
        """
        store, key = self._told(), hashlib.sha256(mistake.encode()).hexdigest()
        deadline = time.monotonic() + (0 if self.is_main else 3)
        try:
            store.set("any", "")
            while not store.check([key]) and time.monotonic() < deadline:
                time.sleep(0.05)
            return bool(store.add(key, 1) == 1)
        except RuntimeError:  # the store is gone
            return True

    def is_told(self) -> bool:
        """Return whether a rank has ended with a mistake, which the others then notice by its absence."""
        try:
            return bool(self._told().check(["any"]))
        except RuntimeError:
            return False

    def _told(self) -> dist.Store:
        return dist.PrefixStore("told", dist.distributed_c10d._get_default_store())

    def set_timeout(self, seconds: float) -> None:
        """Let a collective operation on any group wait for other ranks so long at most."""
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.host_group)
