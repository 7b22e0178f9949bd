"""Which items stand as negatives: functions of the seed and of who the samples are, never of the rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

POOL_SIZE = 8192
"""Uniform negatives are drawn from a pool of at most this many items, new for each step."""


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 (the finaliser of splitmix64, Steele et al. 2014; products wrap around)."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * -4658895280553007687
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * -7723592293110705685
    return x ^ (x >> 31 & 0x1FFFFFFFF)


def random_columns(keys: Tensor, count: int, bound: int, seed: int) -> Tensor:
    """Draw [len(keys), count] int64 in [0, bound), each row a function of (seed, its key) alone."""
    lanes = torch.arange(count, device=keys.device)
    return _mix(_mix(keys * 0x9E3779B1 + seed)[:, None] + lanes * 0x632BE5AB).bitwise_and(2**62 - 1) % bound


class NegativeSampler:
    """Draws the pool of a batch, and each label token's negatives from it.

    Args:
        strategy: ``"all"``: the pool is the catalogue. ``"uniform"``: items with equal probability.
            ``"in_batch"``: the distinct labels of the global batch.
        num_items: Size of the catalogue.
        num_negatives: Per label token; -1: the whole pool.
        seed: Of the run.
    """

    def __init__(
        self, strategy: Literal["all", "uniform", "in_batch"], num_items: int, num_negatives: int, seed: int
    ) -> None:
        self.strategy, self.num_items, self.num_negatives, self.seed = (
            strategy,
            num_items,
            num_negatives,
            seed,
        )
        #: Joins the label ids of all ranks; ``parallelize`` sets it.
        self.gather: Callable[[Tensor], Tensor] = lambda ids: ids

    def pool(self, labels: Tensor, step: int) -> Tensor:
        """Return the ids of the pool of global batch ``step``, [P] int64, distinct, the same on every rank."""
        if self.strategy == "in_batch":
            return self.gather(labels).unique()
        if self.strategy == "all" or self.num_items <= POOL_SIZE:
            return torch.arange(self.num_items, device=labels.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn = torch.randint(self.num_items, (POOL_SIZE,), generator=generator)
        return drawn.unique().to(labels.device)

    def columns(self, keys: Tensor, pool_size: int) -> Tensor | None:
        """Return each label token's places in the pool, [L, num_negatives] int64, or None for all of it.

        Args:
            keys: [L] int64, an identity of each label token that does not depend on the rank.
            pool_size: P.
        """
        if self.num_negatives == -1 or self.strategy == "all":
            return None
        return random_columns(keys, self.num_negatives, pool_size, self.seed)
