"""Which items stand as negatives: functions of the seed and of who the samples are, never of the rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hstu.data.reader import Histories
from hstu.data.splits import Split
from hstu.ops import host_to_device
from hstu.ops.loops import compiled_loops_for, run_shares, shares_of

POOL_SIZE = 8192
"""Negatives of a larger catalogue are drawn from a pool of at most this many items, new for each step."""
_UNDER_WAY = 8  # steps that a pipeline has begun at once, at most
_NOTHING = 1 << 60  # more than any sample and item together
_CACHED = 1 << 15  # numbers scrambled at once, so that they stay in cache


def _mix(x: Tensor) -> Tensor:
    """Scramble int64 in place (the finaliser of splitmix64, Steele et al. 2014; products wrap around)."""
    x.bitwise_xor_(x >> 30 & 0x3FFFFFFFF).mul_(-4658895280553007687)
    x.bitwise_xor_(x >> 27 & 0x1FFFFFFFFF).mul_(-7723592293110705685)
    return x.bitwise_xor_(x >> 31 & 0x1FFFFFFFF)


def random_bits(keys: Tensor, count: int, seed: int) -> Tensor:
    """Draw [len(keys), count] int64 in [0, 2**62), each row a function of (seed, its key) alone."""
    drawn = _mix(keys * 0x9E3779B1 + seed)[:, None] + torch.arange(count, device=keys.device) * 0x632BE5AB
    for rows in drawn.split(max(1, _CACHED // max(1, count))):
        _mix(rows).bitwise_and_(2**62 - 1)
    return drawn


def random_columns(keys: Tensor, count: int, bound: int | Tensor, seed: int) -> Tensor:
    """Draw [len(keys), count] int64 in [0, bound), each row a function of (seed, its key) alone; bound < 2**31."""
    if isinstance(bound, int) and compiled_loops_for(torch.empty(0, device=keys.device)):
        return _compiled_columns(keys.contiguous(), count, bound, seed)
    bits = random_bits(keys, -(-count // 2), seed)
    halves = torch.stack([bits & (2**31 - 1), bits >> 31], 2).flatten(1)
    return halves.mul_(bound).bitwise_right_shift_(31)[:, :count]


def _compiled_columns(keys: Tensor, count: int, bound: int, seed: int) -> Tensor:
    from hstu.ops.numba_draws import columns

    drawn = keys.new_empty(len(keys), count)
    shares = shares_of(drawn.numel())
    run_shares(shares, lambda share: columns(keys.numpy(), bound, seed, drawn.numpy(), share, shares))
    return drawn


def random_uniform(keys: Tensor, count: int, seed: int) -> Tensor:
    """Draw [len(keys), count] float64 in [0, 1), each row a function of (seed, its key) alone."""
    return (random_bits(keys, count, seed) >> 9).double() / 2**53


class NegativeSampler:
    """Draws the pool of a batch, and each label token's negatives from it.

    Args:
        strategy: ``"all"``: the pool is the catalogue. ``"uniform"``: items with equal probability.
            ``"log_uniform"``: the item of popularity rank r (from 0) with probability
            log((r + 2) / (r + 1)) / log(n + 1). ``"in_batch"``: the distinct labels of the global batch.
        num_items: Size of the catalogue, n.
        num_negatives: Per label token; -1: the whole pool.
        seed: Of the run.
    """

    def __init__(
        self,
        strategy: Literal["all", "uniform", "log_uniform", "in_batch"],
        num_items: int,
        num_negatives: int,
        seed: int,
    ) -> None:
        self.strategy, self.num_items, self.num_negatives, self.seed = strategy, num_items, num_negatives, seed
        #: Joins the label ids of all ranks; ``parallelize`` sets it.
        self.gather: Callable[[Tensor], Tensor] = lambda ids: ids
        #: Rows of a table that has one only for items that were met; ``parallelize`` sets it.
        self.num_rows = 0
        #: From some of them to the items that have them, ahead of anything else, and to how many these are; likewise.
        self.holders: Callable[[Tensor], tuple[Tensor, Tensor]] = lambda rows: (rows, torch.tensor(rows.numel()))
        self._pools: dict[int, tuple[Tensor, Tensor]] = {}  # of the steps that a pipeline may have under way
        self.counts: Tensor | None = None

    def set_counts(self, counts: Tensor) -> None:
        """Tell how often each item is a label in training, [n] int64; needed for ``log_uniform`` and ``log_q``."""
        self.counts = counts
        self.by_popularity = counts.argsort(descending=True, stable=True)
        self.rank = self.by_popularity.argsort()

    def pool(self, labels: Tensor, step: int) -> Tensor:
        """Return the ids of the pool of global batch ``step``, [P] int64, the same on every rank.

        They are distinct, unless drawn log-uniformly from a large catalogue, or from items that have a row.
        """
        if self.strategy == "in_batch":
            return self.gather(labels).unique()
        if self.strategy == "uniform" and self.num_rows:
            return self._with_row(step, labels.device)[0]
        if self.strategy == "all" or self.num_items <= POOL_SIZE:
            return torch.arange(self.num_items, device=labels.device)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        if self.strategy == "log_uniform":
            uniform = torch.rand(POOL_SIZE, generator=generator, dtype=torch.float64)
            return self._log_uniform(host_to_device(uniform, labels.device))
        drawn = torch.randint(self.num_items, (POOL_SIZE,), generator=generator)
        return host_to_device(drawn.unique(), labels.device)

    def drawable(self, pool: Tensor, step: int) -> int | Tensor:
        """Return how many of the ``pool`` of ``step``, from the first on, may be drawn from."""
        return self._pools[step][1] if self.strategy == "uniform" and self.num_rows else pool.numel()

    def _with_row(self, step: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return items that have a row when ``step`` is first asked for, repeated up to [P], and how many they are.

        Before there is one they are of the catalogue.
        """
        if step not in self._pools:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
            rows = torch.arange(self.num_rows)
            if self.num_rows > POOL_SIZE:
                rows = torch.randint(self.num_rows, (POOL_SIZE,), generator=generator).unique()
            others = host_to_device(torch.randint(self.num_items, rows.shape, generator=generator), device)
            ids, number = self.holders(host_to_device(rows, device))
            ids = ids[torch.arange(len(ids), device=device) % number.clamp(min=1)]
            pool = torch.where(number > 0, ids, others), torch.where(number > 0, number, len(ids))
            self._pools = {s: p for s, p in self._pools.items() if step - _UNDER_WAY < s < step} | {step: pool}
        elif device.type == "cuda":
            for x in self._pools[step]:  # made on the stream of a pipeline's copies
                x.record_stream(torch.cuda.current_stream(device))
        return self._pools[step]

    def columns(self, keys: Tensor, pool_size: int | Tensor) -> Tensor | None:
        """Return each label token's places in the pool, [L, num_negatives] int64, or None for all of it.

        Args:
            keys: [L] int64, an identity of each label token that does not depend on the rank.
            pool_size: What may be drawn, P or what ``drawable`` says.
        """
        if self.num_negatives == -1 or self.strategy == "all":
            return None
        if self.strategy == "log_uniform" and self.num_items <= POOL_SIZE:
            return self._log_uniform(random_uniform(keys, self.num_negatives, self.seed))
        return random_columns(keys, self.num_negatives, pool_size, self.seed)

    def log_q(self, ids: Tensor) -> Tensor:
        """Return the logarithm of how probable items ``ids`` are as negatives, up to a constant, float32."""
        assert self.counts is not None, "set_counts was not called"
        if self.strategy == "log_uniform":
            return torch.log1p(1 / (self.rank[ids].double() + 1)).log().float()
        assert self.strategy == "in_batch", "other strategies draw all items with one probability"
        return self.counts[ids].clamp(min=1).double().log().float()

    def _log_uniform(self, uniform: Tensor) -> Tensor:
        """Turn numbers in [0, 1) into item ids."""
        assert self.counts is not None, "set_counts was not called"
        rank = torch.exp(uniform * math.log(self.num_items + 1)).long() - 1
        return self.by_popularity[rank.clamp(0, self.num_items - 1)]


def _distinct_first(values: Tensor) -> Tensor:
    """Return the distinct ``values`` [n] in order, and ``_NOTHING`` behind them up to [n], so that no size is asked."""
    ordered = values.sort().values
    return torch.where(ordered.diff(prepend=ordered[:1] - 1) != 0, ordered, _NOTHING).sort().values


def count_items(dataset: Histories, split: Split) -> Tensor:
    """Return how often each item is one of the events of ``split`` that carry a loss, [items] int64."""
    counts = np.zeros(dataset.schema.item.vocab_size or 0, np.int64)
    for start in range(0, len(split), POOL_SIZE):
        rows = slice(start, start + POOL_SIZE)
        stop = split.stop[rows]
        first = np.zeros_like(stop) if split.first is None else split.first[rows]
        counts += np.bincount(dataset.gather(split.users[rows], first, stop).items, minlength=counts.size)
    return torch.from_numpy(counts)


def other_item(
    keys: Tensor, samples: Tensor, items: Tensor, owner: Tensor, num_items: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Draw for each label token an item that its sample or its user does not hold, all of them with one probability.

    Args:
        keys: [L] int64, an identity of each label token that does not depend on the rank.
        samples: [L] int64, the sample of each label token.
        items: [E] int64, what the samples, or their users, hold.
        owner: [E] int64, the sample of each of ``items``.
        num_items: Size of the catalogue.
        seed: Of the run.

    Returns:
        Ids [L] int64, and whether there is such an item [L] bool.
    """
    held = _distinct_first(owner * num_items + items)
    owner, items = held // num_items, held % num_items
    starts = torch.searchsorted(owner, samples)
    # Free items below the i-th held one, x_i: x_i - i. The u-th free item comes after all held ones with that <= u.
    free_below = items - (torch.arange(owner.numel(), device=owner.device) - torch.searchsorted(owner, owner))
    free_below = free_below.masked_fill(held == _NOTHING, 0)
    num_held = torch.searchsorted(owner, samples, right=True) - starts
    free = num_items - num_held
    drawn = random_bits(keys, 1, seed).squeeze(1) % free.clamp(min=1)
    width = num_items + 1
    below = torch.searchsorted(owner * width + free_below, samples * width + drawn, right=True) - starts
    return (drawn + below).clamp(max=num_items - 1), free > 0
