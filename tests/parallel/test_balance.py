"""Dealing samples to ranks by work."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hstu.config import NetworkArgs
from hstu.data.collate import Collator
from hstu.data.loader import BatchLoader
from hstu.data.splits import leave_one_out
from hstu.parallel.balance import balance, sample_costs
from tests.samples import make_dataset

NETWORK = NetworkArgs(num_layers=2, hidden_size=64, num_attention_heads=2, kv_channels=32, value_channels=16)


def zipf_lengths(count: int, seed: int, exponent: float = 1.1, longest: int = 4096) -> np.ndarray:
    return np.minimum(np.random.default_rng(seed).zipf(exponent, count) + 8, longest)


def loads(costs: np.ndarray, owned: list[np.ndarray]) -> np.ndarray:
    return np.array([costs[places].sum() for places in owned])


@pytest.mark.parametrize(("exponent", "longest", "batch"), [(1.1, 4096, 32), (1.3, 512, 32), (1.3, 4096, 128)])
def test_most_loaded_of_eight_ranks_is_within_five_percent_of_the_mean(
    exponent: float, longest: int, batch: int
) -> None:
    for seed in range(20):
        costs = sample_costs(zipf_lengths(8 * batch, seed, exponent, longest), NETWORK)
        balanced, counted = (
            loads(costs, balance(costs, 8)),
            loads(costs, [np.arange(r, costs.size, 8) for r in range(8)]),
        )
        assert balanced.max() <= 1.05 * balanced.mean()
        assert counted.max() > 1.05 * counted.mean(), "spreading by count would pass the same check"


@pytest.mark.parametrize(("samples", "ranks"), [(0, 3), (1, 4), (7, 3), (64, 8)])
def test_every_sample_has_one_owner(samples: int, ranks: int) -> None:
    owned = balance(sample_costs(zipf_lengths(samples, 1), NETWORK), ranks)
    assert len(owned) == ranks
    assert sorted(np.concatenate(owned).tolist()) == list(range(samples))


def test_samples_without_work_are_spread() -> None:
    assert [places.size for places in balance(np.zeros(8), 4)] == [2, 2, 2, 2]


def test_cost_counts_each_token_and_each_visible_pair() -> None:
    one, two = sample_costs(np.array([1, 2]), NETWORK)
    per_pair = two - 2 * one  # two tokens see three pairs, twice one token sees two
    products = 64 * 2 * (2 * 32 + 2 * 16) + 2 * 16 * 64  # multiply-adds of u, v, q, k and of the output
    assert one == pytest.approx(3 * 2 * products + per_pair)
    assert per_pair == 2 * 2 * (32 + 16) + 2 * 2 * (3 * 32 + 2 * 16)


def test_ranks_of_a_balanced_loader_share_the_same_global_batches(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "data", [3 + (7 * i) % 40 for i in range(50)])
    collate = Collator(task="retrieval", max_history=100)
    split = leave_one_out(dataset.lengths)["train"]

    def users(by_cost: bool) -> list[list[set[int]]]:
        ranks = [
            BatchLoader(
                dataset=dataset, split=split, collate=collate, batch_size=6, rank=rank, world_size=3, shuffle=True,
                balance=(lambda events, count: balance(sample_costs(events, NETWORK), count)) if by_cost else None,
            )
            for rank in range(3)
        ]  # fmt: skip
        return [
            [set(batch.users.tolist()) - {-1} for batch in step]
            for step in zip(*(r.epoch(0) for r in ranks), strict=True)
        ]

    by_count, by_work = users(False), users(True)
    assert [set.union(*step) for step in by_count] == [set.union(*step) for step in by_work]
    assert by_count != by_work
    assert all(sum(map(len, step)) == len(set.union(*step)) for step in by_work), "nobody comes twice"
