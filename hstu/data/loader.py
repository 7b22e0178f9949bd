"""Which samples form the global batch of a step, which of them a rank gets, and who makes it ahead of time."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from hstu.data.batch import Batch
from hstu.data.collate import Collator
from hstu.data.reader import SequenceDataset
from hstu.data.splits import Split

_Place = TypeVar("_Place")


@dataclass(frozen=True, kw_only=True)
class BatchLoader:
    """Batches as a function of (seed, epoch, first sample, global batch size) alone, dealt to ranks.

    The order of an epoch depends on (seed, epoch) only. Nothing has to be saved to resume but the number of
    samples taken; another number of ranks goes on at the same sample. The last batch of an epoch may be
    short, and a rank may get no sample of it.

    The global batch of a step is ``micro_batches`` batches of each rank, which come one after another.

    Attributes:
        num_workers: Threads that make batches ahead, in order; 0 makes each when it is asked for. Not processes:
            their batches have to be sent, which cost an interpreter-bound step of 26.5 ms 5.2 ms more, a thread
            1.3 ms (benchmarks/reader.py, workers).
        pin_memory: Put batches into page-locked memory, from which a GPU copies while it computes.
        micro_batches: Batches of a rank in one step.
        deal: From the events of each sample [n] and the number of ranks to the samples of each rank; None deals
            one by one.
    """

    dataset: SequenceDataset
    split: Split
    collate: Collator
    batch_size: int
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    seed: int = 0
    shuffle: bool = False
    num_workers: int = 0
    pin_memory: bool = False
    deal: Callable[[np.ndarray, int], list[np.ndarray]] | None = None

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.batch_size * self.world_size * self.micro_batches

    @property
    def steps_per_epoch(self) -> int:
        """Global batches that hold every sample once."""
        return -(-len(self.split) // self.global_batch_size)

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
            return batch.pin_memory() if self.pin_memory else batch

        begins = range(first, len(self.split), self.global_batch_size)
        return _ahead(make, itertools.product(begins, range(self.micro_batches)), self.num_workers)

    def _share(self, rows: np.ndarray, micro: int) -> np.ndarray:
        """Return which of the samples ``rows`` of a global batch are in this rank's batch number ``micro``."""
        place, shares = micro * self.world_size + self.rank, self.world_size * self.micro_batches
        if self.deal is None or shares == 1:
            # One by one, so that ranks differ by at most one sample.
            return np.arange(place, rows.size, shares)
        events = np.minimum(self.split.stop[rows], self.collate.max_events)
        return self.deal(events, shares)[place]


def _ahead(make: Callable[[_Place], Batch], places: Iterable[_Place], num_workers: int) -> Iterator[Batch]:
    """Yield ``make`` of each place in order, up to ``2 * num_workers`` of them made ahead."""
    if num_workers == 0:
        yield from map(make, places)
        return
    executor = ThreadPoolExecutor(num_workers, thread_name_prefix="reader")
    pending: deque[Future[Batch]] = deque()
    try:
        for place in places:
            pending.append(executor.submit(make, place))
            if len(pending) > 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:  # also when the consumer stops early: no thread is left behind
        executor.shutdown(cancel_futures=True)
