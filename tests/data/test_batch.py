"""The batch: its features, the pool beside them, copies."""

from __future__ import annotations

import pytest
import torch

from hstu.data.batch import POOL, Batch, keyed_features


@pytest.fixture
def batch() -> Batch:
    lengths = torch.tensor([[1, 1, 1], [2, 0, 3], [1, 0, 3]])
    return Batch(
        features=keyed_features(["age", "item", "action"], torch.arange(12), lengths, [3, 5, 4]),
        item="item",
        label_events=torch.tensor([1, 4]),
        labels=torch.tensor([7, 8]),
        num_candidates=torch.tensor([1, 0, 0]),
        timestamps=torch.arange(5),
        users=torch.tensor([4, 5, 6]),
        sample_ids=torch.tensor([0, 1, 2]),
        step=9,
    )


def test_ids_and_lengths_of_each_feature(batch: Batch) -> None:
    assert batch.ids("age").tolist() == [0, 1, 2] and batch.ids("item").tolist() == [3, 4, 5, 6, 7]
    assert batch.ids("action").tolist() == [8, 9, 10, 11] and batch.lengths("item").tolist() == [2, 0, 3]
    assert batch.num_samples == 3


@pytest.mark.parametrize("pool", [[], [3], [9, 2, 44, 1, 5, 6, 7]])
def test_the_pool_stands_beside_the_features_and_changes_none(batch: Batch, pool: list[int]) -> None:
    joined = batch.with_pool(torch.tensor(pool, dtype=torch.int64))
    assert joined.features.keys() == [*batch.features.keys(), POOL]
    assert joined.ids(POOL).tolist() == pool and joined.ids(POOL).dtype == torch.int64
    assert joined.features.length_per_key() == [3, 5, 4, len(pool)]
    names = batch.features.keys()
    for name in names:
        assert torch.equal(joined.ids(name), batch.ids(name))
        assert torch.equal(joined.lengths(name), batch.lengths(name))
    assert torch.equal(joined.label_events, batch.label_events) and joined.step == 9
    assert POOL not in names


def test_sizes_are_known_without_reading_the_lengths(batch: Batch) -> None:
    # On a device, splitting by key would wait for it otherwise.
    assert batch.features.length_per_key_or_none() == [3, 5, 4]


def test_a_copy_has_everything(batch: Batch) -> None:
    copy = batch.to(torch.device("cpu"))
    assert copy.features.length_per_key() == [3, 5, 4]
    for name in ("label_events", "labels", "num_candidates", "timestamps", "users", "sample_ids"):
        assert torch.equal(getattr(copy, name), getattr(batch, name))
    assert (copy.item, copy.step) == ("item", 9)
    assert batch.to(torch.device("meta")).labels.device.type == "meta"
    assert batch.to(torch.device("meta")).features.values().device.type == "meta"


def test_other_labels(batch: Batch) -> None:
    relabelled = batch.with_labels(torch.tensor([0]), torch.tensor([5]))
    assert relabelled.labels.tolist() == [5] and relabelled.label_events.tolist() == [0]
    assert relabelled.features is batch.features and relabelled.num_events == 5
