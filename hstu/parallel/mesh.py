"""The ranks and their groups: one process or many, CPU or GPU, the same code."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from hstu.interrupt import Stopped, requested
from hstu.parallel.rendezvous import join

#: Leaves the job of :meth:`Mesh.of_process`, when the interpreter ends or somebody closes it.
KEPT = contextlib.ExitStack()
atexit.register(KEPT.close)
_current: Mesh | None = None


@dataclass(frozen=True)
class _Failure:
    error: Exception


@dataclass(frozen=True, kw_only=True)
class Group:
    """Some of the ranks, this one among them, and what they do together: every one of them has to call it.

    Attributes:
        rank: Place of this rank in the group.
        size: Number of its ranks.
        group: For tensors on the device.
        host_group: The same ranks, for tensors in host memory; None where nothing there is exchanged.
    """

    rank: int
    size: int
    group: dist.ProcessGroup
    host_group: dist.ProcessGroup | None = None

    @classmethod
    def of(cls, group: dist.ProcessGroup, host_group: dist.ProcessGroup | None = None) -> Group:
        """Describe ``group``."""
        return cls(rank=dist.get_rank(group), size=dist.get_world_size(group), group=group, host_group=host_group)

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the ranks, in place; returns ``values``."""
        if self.size > 1:
            dist.all_reduce(values, group=self._group_of(values))
        return values

    def gather(self, values: Tensor) -> Tensor:
        """Join the rows of the ranks, in their order; they may be unequal in number."""
        if self.size == 1:
            return values
        group, count = self._group_of(values), torch.tensor([values.shape[0]], device=values.device)
        counts = [torch.empty_like(count) for _ in range(self.size)]
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
        if self.size == 1:
            return values, counts
        sent = torch.tensor(counts, device=values.device)
        got = torch.empty_like(sent)
        dist.all_to_all_single(got, sent, group=self.group)
        sizes = got.tolist()
        received = values.new_empty(sum(sizes), *values.shape[1:])
        dist.all_to_all_single(received, values.contiguous(), sizes, counts, group=self.group)
        return received, sizes

    def broadcast(self, value: Any, *, rank: int = 0) -> Any:
        """Return the ``value`` of ``rank`` (a picklable object) on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, group_src=rank, group=self.host_group)
        return box[0]

    def any(self, flag: bool) -> bool:
        """Return whether ``flag`` holds on some rank."""
        raised = torch.tensor(int(flag))
        if self.size > 1:
            dist.all_reduce(raised, group=self._group_of(raised))
        return bool(raised)

    def _group_of(self, values: Tensor) -> dist.ProcessGroup:
        if values.is_cuda:
            return self.group
        assert self.host_group is not None, "a group for the device alone"
        return self.host_group


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """This process's place among all, and the groups it talks to: world = data x context x tensor.

    Attributes:
        rank: 0 .. world_size - 1.
        world_size: Number of processes.
        device: Where this rank computes.
        world: All ranks.
        data: Ranks with different samples.
        context: Ranks with different tokens of the same samples.
        tensor: Ranks with different parts of the same weights, for the same tokens.
        tokens: Ranks with different tokens, data x context: what is summed over all tokens is summed here.
    """

    rank: int
    world_size: int
    device: torch.device
    world: Group
    data: Group
    context: Group
    tensor: Group
    tokens: Group

    @classmethod
    @contextlib.contextmanager
    def create(cls) -> Iterator[Mesh]:
        """Join the job that torchrun describes, or make a job of one process; leave it at the end.

        All ranks are data ranks until ``with_degrees`` says otherwise. Where there is a mesh already, it is that one.
        """
        global _current
        if _current is not None:
            yield _current
            return
        cuda = torch.cuda.is_available()
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        if "RANK" in os.environ:
            store, rank, world_size = join()
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        try:
            assert dist.group.WORLD is not None
            world = Group.of(dist.group.WORLD, dist.new_group(backend="gloo"))
            _current = cls._describe(device, world, 1, 1)
            yield _current
        finally:
            _current = None
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()

    @classmethod
    def of_process(cls) -> Mesh:
        """Return the mesh of this interpreter, which joins its job at the first call and leaves it when it ends.

        Raises:
            ValueError: if somebody else's process groups are here.
        """
        if _current is None:
            if dist.is_initialized():
                raise ValueError("torch.distributed is in use in this process; call destroy_process_group() first")
            return KEPT.enter_context(cls.create())
        return _current

    def with_degrees(self, context: int, tensor: int) -> Mesh:
        """Return the mesh of these degrees; the rest of the ranks are data ranks.

        Raises:
            ValueError: if the number of ranks is no multiple of ``context * tensor``.
        """
        # Megatron-Core's groups are global: those of another mesh may have been made since this one was.
        made = parallel_state.get_context_parallel_world_size(), parallel_state.get_tensor_model_parallel_world_size()
        if (context, tensor) == (self.context.size, self.tensor.size) == made:
            return self
        if self.world_size % (context * tensor):
            raise ValueError(
                f"ContextParallelArgs.context_parallel_size = {context} times "
                f"TensorModelParallelArgs.tensor_model_parallel_size = {tensor} does not divide the {self.world_size} "
                "rank(s) of this job: start a multiple of it with torchrun, or set the sizes to 1"
            )
        parallel_state.destroy_model_parallel()
        return self._describe(self.device, self.world, context, tensor)

    @classmethod
    def _describe(cls, device: torch.device, world: Group, context: int, tensor: int) -> Mesh:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, context_parallel_size=context, create_gloo_process_groups=True
        )
        return cls(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            device=device,
            world=world,
            data=Group.of(parallel_state.get_data_parallel_group()),
            context=Group.of(parallel_state.get_context_parallel_group()),
            tensor=Group.of(parallel_state.get_tensor_model_parallel_group()),
            tokens=Group.of(
                parallel_state.get_data_parallel_group(with_context_parallel=True),
                parallel_state.get_data_parallel_group_gloo(with_context_parallel=True),
            ),
        )

    @property
    def degrees(self) -> list[int]:
        """Numbers of data, context and tensor ranks."""
        return [self.data.size, self.context.size, self.tensor.size]

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and talks to the terminal."""
        return self.rank == 0

    def share(self, make: Callable[[], Tensor], size: int) -> Tensor:
        """Run ``make`` on rank 0; the [size] int64 in host memory it returns, or its exception, reaches every rank."""
        box: list[Tensor] = []
        self.on_main(lambda: box.append(make()))
        values = box[0] if box else torch.empty(size, dtype=torch.int64)
        if self.world_size > 1:
            dist.broadcast(values, 0, group=self.world.host_group)
        return values

    def on_main(self, action: Callable[[], Any], *, rank: int = 0) -> Any:
        """Run ``action`` on ``rank`` while the others wait; its result, or its exception, reaches every rank."""
        outcome: Any = None
        if self.rank == rank:
            try:
                outcome = action()
            except Exception as error:
                outcome = _Failure(error)
        outcome = self.world.broadcast(outcome, rank=rank)
        if isinstance(outcome, _Failure):
            raise outcome.error
        return outcome

    def obey_signals(self) -> None:
        """Raise ``Stopped`` on every rank if a signal asked some rank to end."""
        if self.world.any(requested() is not None):
            raise Stopped(requested() or signal.SIGTERM)

    def set_timeout(self, seconds: float) -> None:
        """Let a collective operation on any group wait for other ranks so long at most."""
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.world.host_group)
