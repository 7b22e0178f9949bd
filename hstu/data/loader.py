"""Which samples form the global batch of a step, and which of them a rank gets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hstu.data.batch import Batch
from hstu.data.collate import Collator
from hstu.data.reader import SequenceDataset
from hstu.data.splits import Split


@dataclass(frozen=True, kw_only=True)
class BatchLoader:
    """Batches as a function of (seed, epoch, step, global batch size) alone, dealt to ranks.

    Nothing has to be saved to resume but the number of the step; the last batch of an epoch may be
    short, and a rank may get no sample of it.
    """

    dataset: SequenceDataset
    split: Split
    collate: Collator
    batch_size: int
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    shuffle: bool = False

    @property
    def global_batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.batch_size * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        """Global batches that hold every sample once."""
        return -(-len(self.split) // self.global_batch_size)

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        """Yield this rank's share of the global batches ``first``, ``first + 1``, ... of ``epoch``."""
        order = np.arange(len(self.split))
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split))
        for index in range(first, self.steps_per_epoch):
            begin = index * self.global_batch_size
            rows = order[begin : begin + self.global_batch_size]
            # Dealt one by one, so that ranks differ by at most one sample.
            places = np.arange(rows.size)[self.rank :: self.world_size]
            ids = epoch * len(self.split) + begin + places
            yield self.collate(self.dataset, self.split, rows[places], ids, epoch * self.steps_per_epoch + index)
