"""Every sample once per epoch, whatever the number of ranks; orders that change and can be repeated."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

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


class Pads(BatchLoader):
    """A sampler that repeats the first samples until ranks get equally many."""

    def epoch(self, epoch: int, first: int = 0) -> Iterator[Batch]:
        order = np.random.default_rng((self.seed, epoch)).permutation(len(self.split))
        order = np.resize(order, self.steps_per_epoch * self.global_batch_size)
        for rows in order.reshape(self.steps_per_epoch, -1):
            mine = rows[self.rank :: self.world_size]
            yield self.collate(self.dataset, self.split, mine, mine, 0)


@pytest.mark.parametrize(("kind", "options"), [(BatchLoader, {"drop_last": True}), (Pads, {})])
def test_dropped_and_repeated_samples_are_caught(
    dataset: SequenceDataset, kind: type[BatchLoader], options: dict[str, bool]
) -> None:
    with pytest.raises(AssertionError):
        assert_every_user_once(loaders(dataset, 2, 4, kind, **options))


@pytest.mark.parametrize(("world", "batch_size"), [(1, 5), (2, 4), (2, 20)])
def test_the_short_batch_is_dropped_on_request(dataset: SequenceDataset, world: int, batch_size: int) -> None:
    ranks, size = loaders(dataset, world, batch_size, shuffle=True, drop_last=True), world * batch_size
    whole = loaders(dataset, world, batch_size, shuffle=True)
    samples, epochs = 0, []
    for epoch in range(2):
        steps = global_batches(ranks, epoch)
        assert len(steps) == ranks[0].steps_per_epoch == USERS // size
        assert [[len(real_users(batch)) for batch in step] for step in steps] == [[batch_size] * world] * len(steps)
        kept = global_batches(whole, epoch)[: len(steps)]
        assert [[b.users.tolist() for b in s] for s in steps] == [[b.users.tolist() for b in s] for s in kept]
        for _ in steps:  # what a run counts: the epoch is over with its last whole batch
            epochs.append(samples // USERS)
            samples = ranks[0].after(samples)
    if epochs:
        assert epochs == [0] * (USERS // size) + [1] * (USERS // size) and samples == 2 * USERS
    assert ranks[0].skip_dropped(USERS - 1) == USERS and whole[0].skip_dropped(USERS - 1) == USERS - 1
    assert whole[0].after(USERS - 1) == USERS and whole[0].after(0) == min(size, USERS)


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
        late = global_batches(ranks, 2, first * ranks[0].global_batch_size)
        skipped = global_batches(ranks, 2)[first:]
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


@pytest.mark.parametrize(("before", "after"), [((1, 4), (2, 4)), ((2, 4), (1, 5)), ((2, 3), (3, 1)), ((1, 50), (2, 3))])
def test_another_number_of_ranks_and_batch_size_goes_on_at_the_same_sample(
    dataset: SequenceDataset, before: tuple[int, int], after: tuple[int, int]
) -> None:
    whole = order_of(loaders(dataset, 1, USERS)[0], 3)
    for steps in range(loaders(dataset, *before)[0].steps_per_epoch + 1):
        started = global_batches(loaders(dataset, *before), 3)[:steps]
        taken = min(USERS, steps * before[0] * before[1])
        rest = global_batches(loaders(dataset, *after), 3, taken)
        seen = [
            (int(i), user)
            for step in (*started, *rest)
            for batch in step
            for i, user in zip(batch.sample_ids.tolist(), batch.users.tolist(), strict=True)
            if user >= 0
        ]
        assert [user for _, user in sorted(seen)] == whole  # none lost, none repeated


@pytest.mark.parametrize("num_workers", [1, 3])
def test_batches_made_ahead_are_the_same_in_the_same_order(dataset: SequenceDataset, num_workers: int) -> None:
    for rank in range(2):
        plain, ahead = (loaders(dataset, 2, 2, num_workers=n)[rank] for n in (0, num_workers))
        for a, b in zip(plain.epoch(4, 4), ahead.epoch(4, 4), strict=True):
            assert a.users.tolist() == b.users.tolist() and a.labels.tolist() == b.labels.tolist()
            assert a.sample_ids.tolist() == b.sample_ids.tolist() and a.step == b.step
            assert a.features.values().tolist() == b.features.values().tolist()


def reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("reader")}


def test_few_batches_are_made_ahead_and_no_thread_outlives_its_consumer(dataset: SequenceDataset) -> None:
    made = []

    class Counts(Collator):
        def __call__(self, *args: object) -> Batch:
            made.append(1)
            return super().__call__(*args)  # type: ignore[arg-type]

    (loader,), before = loaders(dataset, 1, 1, num_workers=1), reader_threads()
    batches = replace(loader, collate=Counts(task="retrieval", max_history=5)).epoch(0)
    next(batches)
    next(batches)
    assert reader_threads() > before and 2 <= len(made) <= 2 + 2
    batches.close()  # what a break, an exception or Ctrl-C in the training loop comes to
    assert reader_threads() <= before and len(made) <= 2 + 2


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_an_error_in_a_worker_reaches_the_training_loop(dataset: SequenceDataset, num_workers: int) -> None:
    class Fails(Collator):
        def __call__(self, dataset: SequenceDataset, split: object, rows: object, ids: np.ndarray, step: int) -> Batch:
            if step == 2:
                raise ValueError("bad batch")
            return super().__call__(dataset, split, rows, ids, step)  # type: ignore[arg-type]

    (loader,), before = loaders(dataset, 1, 8, num_workers=num_workers), reader_threads()
    seen = []
    with pytest.raises(ValueError, match="^bad batch$"):
        seen.extend(batch.step for batch in replace(loader, collate=Fails(task="retrieval", max_history=5)).epoch(0))
    assert seen == [0, 1] and reader_threads() <= before and not multiprocessing.active_children()


def test_processes_leave_the_random_state_and_stopping_to_the_rank(dataset: SequenceDataset) -> None:
    (loader,) = loaders(dataset, 1, 4, num_workers=2)
    before = torch.get_rng_state()
    batches = loader.epoch(0)
    first = [next(batches), next(batches)]  # one of each process: both have started
    assert torch.equal(torch.get_rng_state(), before)
    readers = multiprocessing.active_children()
    assert len(readers) == 2
    for reader in readers:  # as Ctrl-C in a terminal and a scheduler do, which signal children too
        os.kill(reader.pid, signal.SIGINT)
        os.kill(reader.pid, signal.SIGTERM)
    assert [batch.step for batch in [*first, *batches]] == list(range(loader.steps_per_epoch))
    batches = loader.epoch(1)
    next(batches)
    batches.close()
    assert not multiprocessing.active_children()


def test_processes_end_with_a_rank_that_does_not_close_its_batches(dataset: SequenceDataset) -> None:
    def rank() -> None:
        (loader,) = loaders(dataset, 1, 4, num_workers=2)
        kept.append(loader.epoch(0))
        next(kept[0])

    kept: list[Iterator[Batch]] = []
    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    process.join(20)
    assert process.exitcode == 0


def test_a_reader_that_is_stuck_is_ended(dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    class Sleeps(Collator):
        def __call__(self, *args: object) -> Batch:
            if args[-1] == 1:
                time.sleep(600)
            return super().__call__(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    (loader,) = loaders(dataset, 1, 4, num_workers=2)
    batches = replace(loader, collate=Sleeps(task="retrieval", max_history=5)).epoch(0)
    next(batches)
    began = time.monotonic()
    batches.close()
    assert time.monotonic() - began < 100 and not multiprocessing.active_children()


def test_processes_die_with_a_killed_rank(dataset: SequenceDataset) -> None:
    (loader,) = loaders(dataset, 1, 4, num_workers=2)
    ours, theirs = multiprocessing.Pipe()

    def rank() -> None:
        batches = loader.epoch(0)
        next(batches)
        theirs.send([child.pid for child in multiprocessing.active_children()])
        time.sleep(600)

    process = multiprocessing.get_context("fork").Process(target=rank)
    process.start()
    readers = [psutil.Process(pid) for pid in ours.recv()]
    process.kill()
    process.join()
    _, alive = psutil.wait_procs(readers, timeout=60)
    assert len(readers) == 2 and not [one for one in alive if one.status() != psutil.STATUS_ZOMBIE]


def test_batches_are_pinned_when_asked_for(dataset: SequenceDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned = []
    monkeypatch.setattr(Batch, "pin_memory", lambda batch: pinned.append(batch.step) or batch)
    (loader,) = loaders(dataset, 1, 8, num_workers=1)
    assert len(list(loader.epoch(0))) == 3 and pinned == []
    assert len(list(replace(loader, pin_memory=True).epoch(0))) == 3 and pinned == [0, 1, 2]
