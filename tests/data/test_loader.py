"""Every sample once per epoch, whatever the number of ranks; orders that change and can be repeated."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu.data import SequenceDataset, leave_one_out
from hstu.data.batch import Batch
from hstu.data.collate import Collator
from hstu.data.loader import BatchLoader
from tests.samples import make_dataset

USERS = 23


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", [3 + i % 5 for i in range(USERS)])


def loaders(
    dataset: SequenceDataset, world: int, batch_size: int, kind: type[BatchLoader] = BatchLoader, **options: object
) -> list[BatchLoader]:
    options = {"seed": 1, "shuffle": True, **options}
    return [
        kind(
            dataset=dataset,
            split=leave_one_out(dataset.lengths)["train"],
            collate=Collator(task="retrieval", max_history=5),
            batch_size=batch_size,
            rank=rank,
            world_size=world,
            **options,  # type: ignore[arg-type]
        )
        for rank in range(world)
    ]


def real_users(batch: Batch) -> list[int]:
    return [user for user in batch.users.tolist() if user >= 0]


def global_batches(ranks: list[BatchLoader], epoch: int, first: int = 0) -> list[list[Batch]]:
    return [list(step) for step in zip(*(loader.epoch(epoch, first) for loader in ranks), strict=True)]


def assert_every_user_once(ranks: list[BatchLoader], epoch: int = 0) -> None:
    seen = Counter(user for step in global_batches(ranks, epoch) for batch in step for user in real_users(batch))
    assert seen == Counter(range(USERS))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(("world", "batch_size"), [(1, 8), (2, 4), (3, 4), (2, 11), (3, 11), (1, 23), (3, 50)])
def test_every_sample_exactly_once(dataset: SequenceDataset, world: int, batch_size: int, shuffle: bool) -> None:
    ranks = loaders(dataset, world, batch_size, shuffle=shuffle)
    assert_every_user_once(ranks)
    steps = global_batches(ranks, 0)
    assert len(steps) == ranks[0].steps_per_epoch == -(-USERS // (world * batch_size))
    for step in steps[:-1]:
        assert [len(real_users(batch)) for batch in step] == [batch_size] * world
    sizes = [len(real_users(batch)) for batch in steps[-1]]
    assert max(sizes) - min(sizes) <= 1


def test_a_rank_with_nothing_still_gets_a_batch(dataset: SequenceDataset) -> None:
    ranks = loaders(dataset, 2, 11)  # 22 samples, then one
    last = global_batches(ranks, 0)[-1]
    assert [len(real_users(batch)) for batch in last] == [1, 0]
    assert last[1].num_samples == 1 and last[1].labels.numel() == 0
    assert_every_user_once(ranks)


class Drops(BatchLoader):
    """A loader that leaves out the short last batch."""

    @property
    def steps_per_epoch(self) -> int:
        return len(self.split) // self.global_batch_size


class Pads(BatchLoader):
    """A sampler that repeats the first samples until ranks get equally many."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split))
        order = np.resize(order, self.steps_per_epoch * self.global_batch_size)
        for rows in order.reshape(self.steps_per_epoch, -1):
            mine = rows[self.rank :: self.world_size]
            yield self.collate(self.dataset, self.split, mine, mine, 0)


@pytest.mark.parametrize("kind", [Drops, Pads])
def test_dropped_and_repeated_samples_are_caught(dataset: SequenceDataset, kind: type[BatchLoader]) -> None:
    with pytest.raises(AssertionError):
        assert_every_user_once(loaders(dataset, 2, 4, kind))


def order_of(loader: BatchLoader, epoch: int) -> list[int]:
    return [user for batch in loader.epoch(epoch) for user in real_users(batch)]


def assert_orders_differ(loader: BatchLoader) -> None:
    orders = [order_of(loader, epoch) for epoch in range(4)]
    for a, b in itertools.combinations([*orders, list(range(USERS))], 2):
        assert a != b


def test_order_changes_with_the_epoch_and_the_seed_and_can_be_repeated(dataset: SequenceDataset) -> None:
    (loader,) = loaders(dataset, 1, 8)
    assert_orders_differ(loader)
    again = replace(loader)
    assert [order_of(loader, epoch) for epoch in (3, 0)] == [order_of(again, epoch) for epoch in (3, 0)]
    assert order_of(replace(loader, seed=2), 0) != order_of(loader, 0)
    assert order_of(replace(loader, shuffle=False), 5) == list(range(USERS))


class Cycles(BatchLoader):
    """The fault of trap 7: one order for ever."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        return super().epoch(0, first)


def test_one_order_for_ever_is_caught(dataset: SequenceDataset) -> None:
    with pytest.raises(AssertionError):
        assert_orders_differ(loaders(dataset, 1, 8, Cycles)[0])


@pytest.mark.parametrize("world", [2, 3, 6])
@pytest.mark.parametrize("epoch", [0, 3])
def test_the_global_batch_does_not_depend_on_the_number_of_ranks(
    dataset: SequenceDataset, world: int, epoch: int
) -> None:
    one = global_batches(loaders(dataset, 1, 6), epoch)
    many = global_batches(loaders(dataset, world, 6 // world), epoch)
    for (whole,), dealt in zip(one, many, strict=True):
        expected = dict(zip(whole.sample_ids.tolist(), whole.users.tolist(), strict=True))
        found = {i: u for b in dealt for i, u in zip(b.sample_ids.tolist(), b.users.tolist(), strict=True) if u >= 0}
        assert found == expected
        assert {batch.step for batch in dealt} == {whole.step}


def test_identities_and_steps_are_never_used_twice(dataset: SequenceDataset) -> None:
    ranks = loaders(dataset, 2, 5)
    epochs = [global_batches(ranks, epoch) for epoch in range(3)]
    ids = [i for e in epochs for step in e for b in step for i in b.sample_ids[b.users >= 0].tolist()]
    assert len(ids) == len(set(ids)) == 3 * USERS
    steps = [step[0].step for e in epochs for step in e]
    assert steps == list(range(3 * ranks[0].steps_per_epoch))


@pytest.mark.parametrize("world", [1, 2])
def test_starting_late_equals_skipping(dataset: SequenceDataset, world: int) -> None:
    ranks = loaders(dataset, world, 4)
    for first in range(ranks[0].steps_per_epoch + 1):
        late, skipped = global_batches(ranks, 2, first), global_batches(ranks, 2)[first:]
        assert len(late) == len(skipped)
        for a, b in zip(late, skipped, strict=True):
            for x, y in zip(a, b, strict=True):
                assert x.users.tolist() == y.users.tolist() and x.sample_ids.tolist() == y.sample_ids.tolist()
                assert x.labels.tolist() == y.labels.tolist() and x.step == y.step


def test_evaluation_splits_keep_their_order(dataset: SequenceDataset, tmp_path: Path) -> None:
    splits = leave_one_out(dataset.lengths)
    (loader,) = loaders(dataset, 1, 8, shuffle=False)
    for name in ("valid", "test"):
        assert order_of(replace(loader, split=splits[name]), 0) == list(range(USERS))
