"""Negatives are functions of the seed and of who the samples are, and uniform where they say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.models.negatives import POOL_SIZE, NegativeSampler, random_columns

CHI_SQUARE_999 = {9: 27.9, 99: 148.2, 499: 602.0}  # quantile 0.999 by degrees of freedom


def assert_uniform(drawn: Tensor, bound: int) -> None:
    counts = np.bincount(drawn.flatten().numpy(), minlength=bound)
    assert len(counts) == bound
    expected = drawn.numel() / bound
    assert ((counts - expected) ** 2 / expected).sum() < CHI_SQUARE_999[bound - 1]


@pytest.mark.parametrize("bound", [10, 100, 500])
@pytest.mark.parametrize("keys", [torch.arange(500), torch.arange(500) * 2**20, 2**50 + 7 * torch.arange(500)])
def test_columns_are_uniform(keys: Tensor, bound: int) -> None:
    columns = random_columns(keys, 200, bound, seed=5)
    assert_uniform(columns, bound)
    # Also over tokens at one place, over pairs of neighbours, and from seed to seed.
    assert_uniform(torch.stack([random_columns(keys, 4, bound, seed=s)[:, 3] for s in range(100)]), bound)
    if bound == 10:
        assert_uniform(columns[:, :-1] * 10 + columns[:, 1:], 100)
        assert_uniform(columns[:-1] * 10 + columns[1:], 100)


def test_a_sampler_that_never_draws_the_last_item_is_caught() -> None:
    columns = random_columns(torch.arange(500), 200, 99, seed=5)
    with pytest.raises(AssertionError):
        assert_uniform(columns, 100)
    with pytest.raises(AssertionError):
        assert_uniform(columns.clamp(max=98) + (columns == 0).long() * 99, 100)


def test_each_row_is_a_function_of_seed_and_key_alone() -> None:
    keys = torch.tensor([5, 2**60, 9, -(2**20), 5])
    whole = random_columns(keys, 30, 1000, seed=3)
    assert torch.equal(whole[0], whole[4])
    for row, key in enumerate(keys):
        assert torch.equal(random_columns(key[None], 30, 1000, seed=3)[0], whole[row])
    assert not torch.equal(random_columns(keys, 30, 1000, seed=4), whole)
    assert len({tuple(row) for row in whole[:4].tolist()}) == 4
    assert torch.equal(random_columns(keys, 10, 1000, seed=3), whole[:, :10])
    assert random_columns(keys[:0], 3, 0, seed=3).shape == (0, 3)


def sampler(strategy: str, num_items: int = 50, num_negatives: int = 6, seed: int = 1) -> NegativeSampler:
    return NegativeSampler(strategy, num_items, num_negatives, seed)  # type: ignore[arg-type]


LABELS = torch.tensor([9, 3, 9, 9, 40, 3])


def test_in_batch_pool_is_the_distinct_labels_of_all_ranks() -> None:
    one = sampler("in_batch")
    assert one.pool(LABELS, 0).tolist() == [3, 9, 40]
    one.gather = lambda ids: torch.cat([ids, torch.tensor([3, 7])])
    assert one.pool(LABELS, 0).tolist() == [3, 7, 9, 40]
    assert sampler("in_batch", num_negatives=-1).columns(LABELS, 3) is None
    assert sampler("in_batch").columns(LABELS, 3).shape == (6, 6)  # type: ignore[union-attr]


def test_full_softmax_takes_the_catalogue_whatever_the_number_of_negatives() -> None:
    assert sampler("all", num_items=20_000).pool(LABELS, 4).tolist() == list(range(20_000))
    assert sampler("all").columns(LABELS, 50) is None


def test_uniform_pool_of_a_large_catalogue() -> None:
    large = sampler("uniform", num_items=10**6)
    pools = [large.pool(LABELS, step) for step in range(3)]
    for step, pool in enumerate(pools):
        assert pool.dtype == torch.int64 and len(set(pool.tolist())) == pool.numel() <= POOL_SIZE
        assert pool.numel() > 0.99 * POOL_SIZE and int(pool.min()) >= 0 and int(pool.max()) < 10**6
        # The same on every rank: neither labels nor the global generator matter.
        torch.manual_seed(step)
        assert torch.equal(large.pool(LABELS[:1], step), pool)
    assert not torch.equal(pools[0], pools[1])
    assert not torch.equal(sampler("uniform", num_items=10**6, seed=2).pool(LABELS, 0), pools[0])
    assert sampler("uniform", num_items=POOL_SIZE).pool(LABELS, 0).numel() == POOL_SIZE


def test_uniform_negatives_of_a_large_catalogue_are_uniform_over_it() -> None:
    items = 10 * POOL_SIZE
    large = sampler("uniform", num_items=items, num_negatives=20)
    drawn = []
    for step in range(30):
        pool = large.pool(LABELS, step)
        columns = large.columns(torch.arange(200) + 1000 * step, pool.numel())
        assert columns is not None
        drawn.append(pool[columns])
    assert_uniform(torch.stack(drawn) * 10 // items, 10)
