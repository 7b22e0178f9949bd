"""Negatives are functions of the seed and of who the samples are, and uniform where they say so."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hstu.data import leave_one_out
from hstu.models.negatives import POOL_SIZE, NegativeSampler, count_items, other_item, random_columns
from hstu.ops.loops import torch_only
from tests.samples import make_dataset

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


@pytest.mark.parametrize(("rows", "count", "bound"), [(0, 3, 7), (5, 1, 9), (700, 7, 12_345), (9, 130, 2**31 - 1)])
def test_compiled_loops_draw_the_same(rows: int, count: int, bound: int) -> None:
    keys = torch.randint(-(2**62), 2**62, (rows,), generator=torch.Generator().manual_seed(0))
    found = random_columns(keys, count, bound, seed=2**42 + 3)
    with torch_only():
        assert torch.equal(random_columns(keys, count, bound, seed=2**42 + 3), found)


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


# Popularity, and items that the user has not

COUNTS = torch.tensor([5, 0, 40, 7, 7, 100, 1, 2, 30, 3])


@pytest.mark.parametrize("num_items", [10, POOL_SIZE + 2000])
def test_log_uniform_negatives_follow_the_rank_of_popularity(num_items: int) -> None:
    popular = sampler("log_uniform", num_items=num_items, num_negatives=100)
    counts = torch.zeros(num_items, dtype=torch.int64)
    counts[-10:] = COUNTS + 1
    popular.set_counts(counts)
    drawn = []
    for step in range(8):
        pool = popular.pool(LABELS, step)
        columns = popular.columns(torch.arange(400) + 1000 * step, pool.numel())
        assert columns is not None
        drawn.append(pool[columns])
    share = torch.bincount(torch.cat(drawn).flatten(), minlength=num_items).double() / torch.cat(drawn).numel()
    order = [num_items - 10 + i for i in (5, 2, 8, 3, 4, 0, 9, 7, 6, 1)]  # of two as popular, the lower id
    wanted = [math.log((r + 2) / (r + 1)) / math.log(num_items + 1) for r in range(10)]
    assert share[order].tolist() == pytest.approx(wanted, abs=0.006)
    log_q = popular.log_q(torch.tensor(order))
    assert (log_q - log_q[0]).tolist() == pytest.approx([math.log(w / wanted[0]) for w in wanted], abs=1e-5)


def test_in_batch_negatives_are_as_probable_as_labels_are_frequent() -> None:
    batch = sampler("in_batch", num_items=10)
    batch.set_counts(COUNTS)
    log_q = batch.log_q(torch.tensor([5, 2, 1]))
    assert log_q.exp().tolist() == pytest.approx([100, 40, 1])


def test_items_are_counted_over_the_samples_of_a_split(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "small", [5, 3, 7], num_items=6)
    events = dataset.gather(np.arange(3), np.zeros(3, np.int64), np.array([5, 3, 7])).items
    train = np.concatenate([events[:3], events[5:6], events[8:13]])
    found = count_items(dataset, leave_one_out(dataset.lengths)["train"])
    assert found.tolist() == np.bincount(train, minlength=6).tolist()


def test_the_one_negative_is_any_item_but_the_users_own() -> None:
    own = [[3, 0, 3, 9, 4], [], list(range(10)), list(range(9)), [7]]
    items = torch.tensor([i for sample in own for i in sample])
    owner = torch.tensor([b for b, sample in enumerate(own) for _ in sample])
    samples = torch.arange(5).repeat_interleave(4000)
    keys = torch.arange(20_000)
    drawn, live = other_item(keys, samples, items, owner, 10, seed=3)
    for b, held in enumerate(own):
        free = sorted(set(range(10)) - set(held))
        counts = torch.bincount(drawn[samples == b], minlength=10).tolist()
        assert bool((live[samples == b] == bool(free)).all())
        if free:
            assert [i for i, count in enumerate(counts) if count] == free
            assert max(abs(counts[i] - 4000 / len(free)) for i in free) < 5 * (4000 / len(free)) ** 0.5
    again = other_item(keys[5:9], samples[5:9], items, owner, 10, seed=3)[0]
    assert torch.equal(again, drawn[5:9])
    assert other_item(keys[:0], samples[:0], items[:0], owner[:0], 10, seed=3)[0].numel() == 0
