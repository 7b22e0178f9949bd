"""Which events of a user a sample holds, which of them carry a label, and what the label is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hstu.config import DatasetArgs
from hstu.data import SequenceDataset, Split, leave_one_out, make_splits
from hstu.data.batch import Batch
from hstu.data.collate import Collator
from tests.samples import label_mask, make_dataset

LENGTHS = (3, 4, 12, 7, 5)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS)


def collate(collator: Collator, dataset: SequenceDataset, split: str | Split, rows: list[int] | None = None) -> Batch:
    chosen = leave_one_out(dataset.lengths)[split] if isinstance(split, str) else split
    numbers = np.arange(len(chosen)) if rows is None else np.array(rows, np.int64)
    return collator(dataset, chosen, numbers, numbers + 100, 3)


def user_events(dataset: SequenceDataset, user: int, stop: int) -> SimpleNamespace:
    got = dataset.gather(np.array([user]), np.array([0]), np.array([stop]))
    assert got.actions is not None and got.times is not None
    return SimpleNamespace(items=got.items, actions=got.actions, times=got.times, contexts=got.contexts)


def parts(values: torch.Tensor, lengths: torch.Tensor) -> list[np.ndarray]:
    return [part.numpy() for part in values.split(lengths.tolist())]


def check(batch: Batch, dataset: SequenceDataset, collator: Collator, split: str) -> None:
    """Compare with a loop over users, written from the definition."""
    stops = {"train": -2, "valid": -1, "test": 0}
    training, ranking = split == "train", collator.task == "ranking"
    item_parts = parts(batch.ids("item"), batch.lengths("item"))
    mask_parts, time_parts = (parts(x, batch.lengths("item")) for x in (label_mask(batch), batch.timestamps))
    names = batch.features.keys()
    action_parts = parts(batch.ids("action"), batch.lengths("action")) if "action" in names else None
    labels = batch.labels.tolist()
    for b, user in enumerate(batch.users.tolist()):
        events = user_events(dataset, user, LENGTHS[user] + stops[split])
        all_events = len(events.items)
        if not ranking:
            wanted, candidates = collator.max_history + 1, 0
        elif collator.max_candidates and training:
            wanted = collator.max_history + collator.max_candidates
            candidates = max(min(collator.max_candidates, all_events - 1, wanted - 1), int(all_events == 1))
        else:
            wanted, candidates = collator.max_history + 1, int(collator.max_candidates > 0)
        kept = min(wanted, all_events)
        items, actions, times = (x[-kept:] for x in (events.items, events.actions, events.times))
        assert item_parts[b].tolist() == items.tolist()
        assert time_parts[b].tolist() == times.tolist()
        assert int(batch.num_candidates[b]) == candidates
        if action_parts is not None:
            assert action_parts[b].tolist() == actions[: kept - candidates].tolist()
        if ranking:
            labelled = range(kept - candidates, kept) if candidates else range(kept if training else 0)
            if not candidates and not training:
                labelled = range(kept - 1, kept)
            expected = [int(actions[t]) for t in labelled]
        else:
            labelled = range(kept - 1) if training else range(kept - 2, kept - 1)
            expected = [int(items[t + 1]) for t in labelled]
        assert np.flatnonzero(mask_parts[b]).tolist() == list(labelled)
        assert labels[: len(expected)] == expected
        del labels[: len(expected)]
        for name, ids in events.contexts.items():
            assert batch.ids(name)[b] == ids[0] and batch.lengths(name)[b] == 1
    assert labels == []


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("max_history", [1, 4, 50])
@pytest.mark.parametrize(("task", "candidates"), [("ranking", 0), ("ranking", 3), ("ranking", 9), ("retrieval", 0)])
def test_events_labels_and_masks(
    dataset: SequenceDataset, split: str, max_history: int, task: str, candidates: int
) -> None:
    collator = Collator(
        task=task,  # type: ignore[arg-type]
        max_history=max_history,
        max_candidates=candidates,
        contexts=("country", "age"),
    )
    batch = collate(collator, dataset, split)
    assert batch.features.keys() == ["country", "age", "item", "action"]
    assert batch.sample_ids.tolist() == [100, 101, 102, 103, 104] and batch.step == 3
    assert int(batch.lengths("item").max()) <= collator.max_events
    check(batch, dataset, collator, split)


class KeepsOldest:
    """The fault of trap 2, around a data set."""

    def __init__(self, dataset: SequenceDataset) -> None:
        self.dataset, self.schema = dataset, dataset.schema

    def gather(self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, features: tuple[str, ...]) -> object:
        return self.dataset.gather(users, np.zeros_like(start), stop - start, features)


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_keeping_the_oldest_events_is_caught(dataset: SequenceDataset, task: str) -> None:
    collator = Collator(task=task, max_history=4, contexts=("country", "age"))  # type: ignore[arg-type]
    rows = np.arange(len(LENGTHS))
    batch = collator(KeepsOldest(dataset), leave_one_out(dataset.lengths)["test"], rows, rows, 0)  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        check(batch, dataset, collator, "test")


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_the_held_out_events_never_reach_a_training_sample(dataset: SequenceDataset, task: str) -> None:
    batch = collate(Collator(task=task, max_history=50), dataset, "train")  # type: ignore[arg-type]
    assert batch.lengths("item").tolist() == [length - 2 for length in LENGTHS]


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("candidates", [0, 2])
def test_actions_of_candidates_are_labels_and_not_inputs(dataset: SequenceDataset, split: str, candidates: int) -> None:
    batch = collate(Collator(task="ranking", max_history=9, max_candidates=candidates), dataset, split)
    assert torch.equal(batch.lengths("action"), batch.lengths("item") - batch.num_candidates)
    labelled = torch.stack([part.sum() for part in label_mask(batch).split(batch.lengths("item").tolist())])
    if candidates:
        assert torch.equal(labelled, batch.num_candidates) and bool((labelled > 0).all())


def short_users(tmp_path: Path, stops: list[int]) -> tuple[SequenceDataset, Split]:
    dataset = make_dataset(tmp_path / "short", [max(3, stop) for stop in stops])
    split = Split(name="train", users=np.arange(len(stops)), stop=np.array(stops, np.int64))
    return dataset, split


@pytest.mark.parametrize("candidates", [0, 1, 5])
def test_users_with_no_one_and_two_events_in_ranking(tmp_path: Path, candidates: int) -> None:
    dataset, split = short_users(tmp_path, [1, 2, 0, 1])
    collator = Collator(task="ranking", max_history=4, max_candidates=candidates, contexts=("age",))
    batch = collate(collator, dataset, split)
    assert batch.lengths("item").tolist() == [1, 2, 0, 1]
    # A single event is a candidate without history; of two, one stays history.
    assert batch.num_candidates.tolist() == ([0, 0, 0, 0] if candidates == 0 else [1, 1, 0, 1])
    assert label_mask(batch).tolist() == ([True] * 4 if candidates == 0 else [True, False, True, True])
    assert batch.lengths("age").tolist() == [1, 1, 1, 1]


def test_users_with_no_one_and_two_events_in_retrieval(tmp_path: Path) -> None:
    dataset, split = short_users(tmp_path, [1, 2, 0, 1])
    batch = collate(Collator(task="retrieval", max_history=4), dataset, split)
    assert label_mask(batch).tolist() == [False, True, False, False]
    assert batch.labels.tolist() == [int(batch.ids("item")[2])]


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_samples_without_events_keep_their_contexts(tmp_path: Path, task: str) -> None:
    dataset, split = short_users(tmp_path, [0, 0])
    batch = collate(Collator(task=task, max_history=4, contexts=("age",)), dataset, split)  # type: ignore[arg-type]
    assert batch.num_samples == 2 and batch.labels.numel() == 0
    assert batch.lengths("age").tolist() == [1, 1] and batch.ids("age").numel() == 2
    assert batch.lengths("item").tolist() == [0, 0] and batch.ids("item").numel() == 0


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
@pytest.mark.parametrize("candidates", [0, 2])
def test_no_rows_make_one_sample_without_anything(dataset: SequenceDataset, task: str, candidates: int) -> None:
    collator = Collator(
        task=task,  # type: ignore[arg-type]
        max_history=4,
        max_candidates=candidates if task == "ranking" else 0,
        contexts=("country", "age"),
    )
    batch = collate(collator, dataset, "train", [])
    assert batch.num_samples == 1 and batch.users.tolist() == [-1]
    assert batch.features.values().numel() == 0 and batch.labels.numel() == 0
    assert batch.features.lengths().tolist() == [0, 0, 0, 0]
    assert batch.features.keys() == ["country", "age", "item", "action"]  # as every other batch
    assert batch.with_pool(torch.tensor([4, 2])).lengths("__pool__").tolist() == [2]


def test_features_that_are_not_used_stay_away(tmp_path: Path, dataset: SequenceDataset) -> None:
    assert collate(Collator(task="retrieval", max_history=4, use_actions=False), dataset, "train").features.keys() == [
        "item"
    ]
    bare = make_dataset(tmp_path / "bare", LENGTHS, num_actions=None, with_time=False, contexts=())
    batch = collate(Collator(task="retrieval", max_history=4), bare, "train")
    assert batch.features.keys() == ["item"] and not batch.timestamps.any()


def test_ranking_without_actions_names_the_data_set(tmp_path: Path) -> None:
    bare = make_dataset(tmp_path / "bare", LENGTHS, num_actions=None)
    with pytest.raises(ValueError, match="'small' has no action feature"):
        collate(Collator(task="ranking", max_history=4), bare, "train")


BIG = np.array([2**24 + 1, 2**24 + 2, 2**40 + 1, 2**40 + 3, 2**40 + 5, 2**53 + 1, 2**24 + 3])


def assert_ids_survive(batch: Batch, expected: np.ndarray) -> None:
    assert batch.ids("item").dtype == torch.int64
    assert batch.ids("item").tolist() == expected.tolist()
    assert batch.labels.tolist() == expected[1:].tolist()


def test_large_ids_survive_disk_collation_pool_and_copies(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "big", [len(BIG)], num_items=2**53 + 2, items=BIG)
    split = Split(name="train", users=np.array([0]), stop=np.array([len(BIG)]))
    batch = collate(Collator(task="retrieval", max_history=10), dataset, split)
    assert_ids_survive(batch, BIG)
    with_pool = batch.with_pool(torch.tensor([2**40 + 7])).to(torch.device("cpu"))
    assert_ids_survive(with_pool, BIG)
    assert with_pool.ids("__pool__").tolist() == [2**40 + 7]


def test_ids_through_float32_are_caught(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "big", [len(BIG)], num_items=2**53 + 2, items=BIG)
    dataset._columns["item"] = BIG.astype(np.float32).astype(np.int64)  # the fault
    split = Split(name="train", users=np.array([0]), stop=np.array([len(BIG)]))
    with pytest.raises(AssertionError):
        assert_ids_survive(collate(Collator(task="retrieval", max_history=10), dataset, split), BIG)


def split_items(batch: Batch) -> list[list[int]]:
    return [part.tolist() for part in parts(batch.ids("item"), batch.lengths("item"))]


WINDOWS = [
    (None, None),
    (None, -1),
    (None, -3),
    (-2, None),
    (-4, -1),
    (0, 3),
    (2, None),
    (1, 2),
    (None, 100),
    (-100, 4),
]


@pytest.mark.parametrize(("start", "end"), WINDOWS)
@pytest.mark.parametrize("split", ["train", "valid", "test"])
@pytest.mark.parametrize("max_history", [2, 50])
@pytest.mark.parametrize(("task", "candidates"), [("ranking", 0), ("ranking", 3), ("retrieval", 0)])
def test_the_window_of_history_is_a_slice_by_index(
    dataset: SequenceDataset,
    start: int | None,
    end: int | None,
    split: str,
    max_history: int,
    task: str,
    candidates: int,
) -> None:
    collator = Collator(
        task=task,  # type: ignore[arg-type]
        max_history=max_history,
        max_candidates=candidates,
        history_start=start,
        history_end=end,
    )
    batch = collate(collator, dataset, split)
    labels, stops = batch.labels.tolist(), leave_one_out(dataset.lengths)[split].stop
    for b, stop in enumerate(stops.tolist()):
        events = user_events(dataset, b, stop)
        targets = 1 if split != "train" else min(candidates, max(stop - 1, min(stop, 1)))
        kept = max_history + (split == "train" and candidates == 0)
        history = list(range(stop - targets))[start:end][-kept:]
        seen = history + list(range(stop - targets, stop))
        assert split_items(batch)[b] == events.items[seen].tolist()
        action_inputs = seen[: len(seen) - targets] if candidates else seen
        assert parts(batch.ids("action"), batch.lengths("action"))[b].tolist() == events.actions[action_inputs].tolist()
        if task == "retrieval":
            wanted = seen[1:] if split == "train" else seen[-1:] if len(seen) > 1 else []
            expected = events.items[wanted].tolist()
        else:
            expected = events.actions[seen if split == "train" and not candidates else seen[-targets:]].tolist()
        assert labels[: len(expected)] == expected
        del labels[: len(expected)]
    assert labels == []


def thinned(dataset: SequenceDataset, ids: np.ndarray, rows: np.ndarray, **options: object) -> Batch:
    options = {"task": "retrieval", "max_history": 50, "sampling_ratio": 0.5, **options}
    return Collator(**options)(dataset, leave_one_out(dataset.lengths)["train"], rows, ids, 0)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    # Items that tell their place, so that a subset tells what was kept.
    lengths = [300, 40, 3, 120]
    items = np.concatenate([np.arange(length) for length in lengths])
    return make_dataset(tmp_path_factory.mktemp("data") / "long", lengths, items=items, num_items=300)


def test_a_share_of_the_history_is_kept_in_order(long: SequenceDataset) -> None:
    rows = np.arange(4)
    for ratio in (0.2, 0.5, 0.9):
        batches = [thinned(long, rows + 4 * epoch, rows, sampling_ratio=ratio, max_history=500) for epoch in range(40)]
        kept = sum(batch.ids("item").numel() for batch in batches) / (40 * (long.lengths - 2).sum())
        assert kept == pytest.approx(ratio, abs=0.02)  # four standard deviations
        for batch in batches:
            assert all(items == sorted(set(items)) for items in split_items(batch))
            assert torch.equal(batch.lengths("action"), batch.lengths("item"))
            labels = [item for items in split_items(batch) for item in items[1:]]
            assert batch.labels.tolist() == labels  # the next event that was kept


def test_what_is_kept_depends_on_seed_sample_and_epoch_alone(long: SequenceDataset) -> None:
    rows = np.arange(4)
    together = split_items(thinned(long, rows, rows))
    alone = [split_items(thinned(long, rows[[b]], rows[[b]]))[0] for b in (3, 0, 1, 2)]
    assert together == alone[1:] + alone[:1]
    assert split_items(thinned(long, rows + 4, rows)) != together
    assert split_items(thinned(long, rows, rows, seed=2**31 - 1)) != together
    # Two samples of one length do not lose the same places.
    a, b = split_items(thinned(long, np.array([5, 6]), np.array([0, 0])))
    assert a != b


def test_thinning_spares_candidates_and_evaluation(long: SequenceDataset) -> None:
    rows = np.arange(4)
    options = {"task": "ranking", "max_candidates": 5, "max_history": 50}
    thin, whole = (thinned(long, rows, rows, sampling_ratio=ratio, **options) for ratio in (0.01, 1.0))
    assert thin.labels.tolist() == whole.labels.tolist() and thin.ids("item").numel() < whole.ids("item").numel()
    assert torch.equal(thin.num_candidates, whole.num_candidates)
    splits = leave_one_out(long.lengths)
    for name in ("valid", "test"):
        sampling, plain = (Collator(sampling_ratio=ratio, **options) for ratio in (0.01, 1.0))  # type: ignore[arg-type]
        a, b = (c(long, splits[name], rows, rows, 0) for c in (sampling, plain))
        assert a.ids("item").tolist() == b.ids("item").tolist() and a.labels.tolist() == b.labels.tolist()


def test_no_rows_can_be_thinned(long: SequenceDataset) -> None:
    none = np.zeros(0, np.int64)
    assert thinned(long, none, none).ids("item").numel() == 0


@pytest.mark.parametrize(("task", "candidates"), [("ranking", 0), ("ranking", 4), ("retrieval", 0)])
def test_some_actions_are_inputs_and_never_targets(dataset: SequenceDataset, task: str, candidates: int) -> None:
    plain = Collator(task=task, max_history=50, max_candidates=candidates)  # type: ignore[arg-type]
    masked = replace(plain, actions_without_loss=(1, 3))
    a, b = (collate(collator, dataset, "train") for collator in (plain, masked))
    assert torch.equal(a.features.values(), b.features.values())  # inputs stay
    events = dataset.gather(np.arange(len(LENGTHS)), np.zeros(len(LENGTHS), np.int64), dataset.lengths - 2)
    assert events.actions is not None and events.items.tolist() == a.ids("item").tolist()
    predicted = np.flatnonzero(label_mask(a).numpy()) + (task == "retrieval")
    wanted = predicted[~np.isin(events.actions[predicted], (1, 3))]
    assert 0 < wanted.size < predicted.size
    assert (np.flatnonzero(label_mask(b).numpy()) + (task == "retrieval")).tolist() == wanted.tolist()
    assert b.labels.tolist() == (events.items if task == "retrieval" else events.actions)[wanted].tolist()


@pytest.mark.parametrize("task", ["ranking", "retrieval"])
def test_evaluation_scores_every_target_whatever_its_action(dataset: SequenceDataset, task: str) -> None:
    plain = Collator(task=task, max_history=50)  # type: ignore[arg-type]
    masked = replace(plain, actions_without_loss=(0, 1, 2, 3))
    for name in ("valid", "test"):
        a, b = (collate(collator, dataset, name) for collator in (plain, masked))
        assert torch.equal(label_mask(a), label_mask(b)) and a.labels.numel() == len(LENGTHS)
    assert collate(masked, dataset, "train").labels.numel() == 0


@pytest.mark.parametrize(("task", "candidates"), [("ranking", 0), ("ranking", 3), ("retrieval", 0)])
@pytest.mark.parametrize("protocol", ["leave_one_out", "windows"])
def test_with_a_stride_every_training_event_has_one_label(
    tmp_path: Path, task: str, candidates: int, protocol: str
) -> None:
    lengths = (3, 1, 12, 7, 30)
    numbered = make_dataset(tmp_path / "numbered", lengths, num_items=sum(lengths), items=np.arange(sum(lengths)))
    options = {"protocol": "windows", "num_windows": 2} if protocol == "windows" else {}
    args = DatasetArgs(dataset_name="numbered", max_history_seqlen=6, max_num_candidates=candidates, **options)
    whole, split = (make_splits(replace(args, train_stride=k), numbered)["train"] for k in (None, 3))
    collator = Collator(task=task, max_history=6, max_candidates=candidates)  # type: ignore[arg-type]
    batch = collate(collator, numbered, split)
    following = 1 if task == "retrieval" else 0
    labelled = batch.ids("item")[label_mask(batch).nonzero().squeeze(1) + following].tolist()
    begin = np.cumsum(lengths) - lengths
    first = np.zeros(len(whole), np.int64) if whole.first is None else whole.first
    wanted = {
        int(begin[user]) + place
        for user, start, stop in zip(whole.users, first, whole.stop, strict=True)
        for place in range(max(start, following), stop)
    }
    if candidates:  # the first event of a sequence stays history if there are others
        labelled, wanted = [item for item in labelled if item not in begin], wanted - set(begin.tolist())
    assert sorted(labelled) == sorted(wanted)
    # Before its own events a sample shows up to six more, all of its user's past.
    for items, mask in zip(
        batch.ids("item").split(batch.lengths("item").tolist()),
        label_mask(batch).split(batch.lengths("item").tolist()),
        strict=True,
    ):
        assert items.diff().eq(1).all() and mask.sum() <= 3 and len(items) <= 6 + max(1, candidates)


def test_events_before_the_first_with_a_loss_are_inputs_whatever_is_visible(dataset: SequenceDataset) -> None:
    split = Split(name="train", users=np.array([2]), stop=np.array([10]), first=np.array([6]))
    events = user_events(dataset, 2, 10)
    for hidden, labels in ((0, 4), (2, 2), (5, 0)):
        collator = Collator(task="ranking", max_history=50, history_end=-hidden or None)
        batch = collate(collator, dataset, split)
        assert batch.ids("item").tolist() == events.items[: 10 - hidden].tolist()
        assert label_mask(batch).tolist() == [False] * (10 - hidden - labels) + [True] * labels
    thin = collate(Collator(task="ranking", max_history=50, sampling_ratio=0.5), dataset, split)
    assert label_mask(thin).tolist() == (thin.timestamps >= int(events.times[6])).tolist()
    assert not label_mask(thin).all()
