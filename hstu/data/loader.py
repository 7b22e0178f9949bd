"""Which samples form the global batch of a step, which of them a rank gets, and who makes it ahead of time."""

from __future__ import annotations

import ctypes
import itertools
import signal
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.util import Finalize
from typing import Any, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from hstu.data.batch import Batch
from hstu.data.collate import Collator
from hstu.data.reader import Histories
from hstu.data.splits import Split

_Place = TypeVar("_Place")


@dataclass(frozen=True, kw_only=True)
class BatchLoader:
    """Batches as a function of (seed, epoch, first sample, global batch size) alone, spread over ranks.

    The order of an epoch depends on (seed, epoch) only. Nothing has to be saved to resume but the number of
    samples taken; another number of ranks goes on at the same sample. The last batch of an epoch may be
    short, and a rank may get no sample of it.

    The global batch of a step is ``micro_batches`` batches of each rank, which come one after another.

    Attributes:
        num_workers: 0 makes each batch when it is asked for, 1 in a thread ahead of the step, which costs the least
            (benchmarks/reader.py, workers), more in so many processes, for steps that one reader cannot keep up with.
        pin_memory: Put batches into page-locked memory, from which a GPU copies while it computes.
        micro_batches: Batches of a rank in one step.
        drop_last: Leave out the last global batch of an epoch if it is short.
        balance: From the events of each sample [n] and the number of ranks to the samples of each rank; None spreads
            one by one.
    """

    dataset: Histories
    split: Split
    collate: Collator
    batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    drop_last: bool = False
    seed: int = 0
    shuffle: bool = False
    num_workers: int = 0
    pin_memory: bool = False
    balance: Callable[[np.ndarray, int], list[np.ndarray]] | None = None

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.batch_size * self.world_size * self.micro_batches

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""
        return self.steps_from(0)

    def steps_from(self, first: int) -> int:
        """Return the global batches of an epoch from its sample number ``first`` on."""
        left = len(self.split) - first
        return left // self.global_batch_size if self.drop_last else -(-left // self.global_batch_size)

    def after(self, samples: int) -> int:
        """Return the samples of all epochs that are done with after ``samples`` of them and one global batch."""
        end = (samples // len(self.split) + 1) * len(self.split)
        return self.skip_dropped(min(samples + self.global_batch_size, end))

    def skip_dropped(self, samples: int) -> int:
        """Return ``samples`` of all epochs, or the end of their epoch if only what it leaves out is left of it."""
        epoch, first = divmod(samples, len(self.split))
        return samples if self.steps_from(first) else (epoch + 1) * len(self.split)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield this rank's share of the global batches of ``epoch``, from its sample number ``first`` on.

        Each step is ``micro_batches`` of them.
        """
        order = None
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split))

        def make(place: tuple[int, int]) -> Batch:
            begin, micro = place
            end = min(begin + self.global_batch_size, len(self.split))
            places = np.arange(begin, end)
            rows = places if order is None else order[places]
            mine = self._share(rows, micro)
            places, rows = places[mine], rows[mine]
            step = epoch * self.steps_per_epoch + begin // self.global_batch_size
            batch = self.collate(self.dataset, self.split, rows, epoch * len(self.split) + places, step)
            return batch.pin_memory() if pin_here else batch

        # A process cannot pin for another one.
        pin_here = self.pin_memory and self.num_workers <= 1
        begins = range(first, len(self.split), self.global_batch_size)[: self.steps_from(first)]
        places = itertools.product(begins, range(self.micro_batches))
        if self.num_workers > 1:
            return _from_processes(make, list(places), self.num_workers, self.pin_memory)
        return _in_order(make, places, self.num_workers)

    def _share(self, rows: np.ndarray, micro: int) -> np.ndarray:
        """Return which of the samples ``rows`` of a global batch are in this rank's batch number ``micro``."""
        place, shares = micro * self.world_size + self.rank, self.world_size * self.micro_batches
        if self.balance is None or shares == 1:
            # One by one, so that ranks differ by at most one sample.
            return np.arange(place, rows.size, shares)
        events = np.minimum(self.split.stop[rows], self.collate.max_events)
        return self.balance(events, shares)[place]


def _in_order(make: Callable[[_Place], Batch], places: Iterable[_Place], threads: int) -> Iterator[Batch]:
    """Yield ``make`` of each place in order, up to two of them made ahead by a thread, if there is one."""
    if threads == 0:
        yield from map(make, places)
        return
    executor = ThreadPoolExecutor(1, thread_name_prefix="reader")
    pending: deque[Future[Batch]] = deque()
    try:
        for place in places:
            pending.append(executor.submit(make, place))
            if len(pending) > 2:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also when the consumer stops early: no thread is left behind
        executor.shutdown(cancel_futures=True)


class _Made(Dataset[Batch | ValueError]):
    """What worker processes index: a place gives its batch."""

    def __init__(self, make: Callable[[tuple[int, int]], Batch]) -> None:
        self._make = make

    def __getitem__(self, place: tuple[int, int]) -> Batch | ValueError:
        try:
            return self._make(place)
        except ValueError as mistake:  # DataLoader would wrap what the user is to read
            return mistake


def _from_processes(
    make: Callable[[tuple[int, int]], Batch], places: list[tuple[int, int]], processes: int, pin_memory: bool
) -> Iterator[Batch]:
    """Yield ``make`` of each place in order, two of them made ahead by each of ``processes``."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"This DataLoader will create \d+ worker processes")  # as configured
        batches = iter(
            DataLoader(
                _Made(make),
                batch_size=None,
                sampler=places,
                num_workers=processes,
                prefetch_factor=2,
                pin_memory=pin_memory,
                worker_init_fn=_become_reader,
                multiprocessing_context="fork",  # shares the mapped columns and sends nothing
                generator=torch.Generator(),  # or it would draw from the one that a resumed run depends on
            )
        )
    # At exit it runs before multiprocessing closes its queues (10) and waits for readers, which ignore SIGTERM.
    stop = Finalize(None, _end, (batches,), exitpriority=20)
    try:
        for batch in batches:
            if isinstance(batch, ValueError):
                raise batch
            yield batch
    finally:
        stop()


def _end(batches: Any) -> None:
    """End the readers, those too that are stuck."""
    batches._shutdown_workers()
    for reader in batches._workers:
        if reader.is_alive():
            reader.kill()
            reader.join()


def _become_reader(_: int) -> None:
    """Leave stopping to the rank, and end with it whatever happens: a reader shares its lock and its sockets."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
