"""Declared features from files to batches: each value stands with its event or user, and nothing comes too early."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hstu.data import SequenceDataset, Sequences, Split, leave_one_out
from hstu.data.batch import Batch
from hstu.data.collate import Collator
from hstu.data.reader import Histories
from hstu.data.requests import Requests
from hstu.data.seen import met_values
from hstu.data.values import Sets, Values, count, insert, missing, take
from tests.samples import declared_features, make_dataset

LENGTHS = (3, 4, 12, 7, 5)
EVENTS = ("device", "price", "place", "tags", "watched", "ending", "marks")
USERS = ("income", "face", "likes")
LATE = ("watched", "ending", "marks")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "small", LENGTHS, declared=declared_features())


def collate(collator: Collator, dataset: Histories, split: str, rows: list[int] | None = None) -> Batch:
    chosen = leave_one_out(dataset.lengths)[split]
    numbers = np.arange(len(chosen)) if rows is None else np.array(rows, np.int64)
    return collator(dataset, chosen, numbers, numbers + 100, 3)


def listed(values: Values) -> list:
    """Values as a list, with NaN as None."""
    if isinstance(values, Sets):
        return [part.tolist() for part in np.split(values.ids, values.offsets[1:-1])] if count(values) else []
    if values.ndim == 1:
        return values.tolist()
    return [None if np.isnan(row).any() else row.tolist() for row in values]


def of_batch(batch: Batch, name: str) -> list:
    """The values of a feature in a batch, as a list."""
    if name in batch.numbers:
        return listed(batch.numbers[name].numpy())
    if name not in batch.set_lengths:
        lengths = batch.lengths(name) if name in USERS else torch.ones_like(batch.ids(name))
        found = [part.tolist() for part in batch.ids(name).split(lengths.tolist())]
        return found if name in USERS else sum(found, [])
    return [part.tolist() for part in batch.ids(name).split(batch.set_lengths[name].tolist())]


def test_values_are_taken_and_inserted_alike() -> None:
    sets = Sets(np.array([0, 2, 2, 5]), np.array([7, 8, 1, 2, 3]))
    assert listed(sets) == [[7, 8], [], [1, 2, 3]]
    assert listed(take(sets, np.array([2, 0, 1, 2]))) == [[1, 2, 3], [7, 8], [], [1, 2, 3]]
    assert listed(insert(sets, np.array([0, 4]), Sets(np.array([0, 0, 1]), np.array([9])))) == [
        *([], [7, 8], [], [1, 2, 3], [9])
    ]
    device, price, tags = (f for f in declared_features() if f.name in ("device", "price", "tags"))
    assert listed(missing(device, 2)) == [5, 5] and listed(missing(price, 1)) == [None]
    assert listed(missing(tags, 2)) == [[], []] and listed(take(sets, np.empty(0, np.int64))) == []


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(("task", "candidates"), [("ranking", 0), ("ranking", 3), ("retrieval", 0)])
def test_values_are_those_of_a_loop_over_users(
    dataset: SequenceDataset, split: str, task: str, candidates: int
) -> None:
    collator = Collator(
        task=task,  # type: ignore[arg-type]
        max_history=4,
        max_candidates=candidates,
        contexts=("age",),
        user_features=USERS,
        event_features=(*EVENTS, "request"),
    )
    batch = collate(collator, dataset, split)
    keys = ["age", "item", "action", "device", "tags", "ending", "marks", "request", "likes"]
    assert batch.features.keys() == keys and [*batch.numbers] == ["price", "place", "watched", "income", "face"]
    assert [*batch.set_lengths] == ["tags", "marks"]
    expected: dict[str, list] = {name: [] for name in (*EVENTS, *USERS, "request")}
    for user, kept, asked in zip(batch.users, batch.lengths("item"), batch.num_candidates, strict=True):
        stop = np.array([LENGTHS[user] - 2 * (split == "train")])
        found = dataset.gather(user[None].numpy(), stop - kept.numpy(), stop, tuple(expected))
        late = int(asked) if split == "train" else 1
        for name, values in (found.of_users | found.of_events).items():
            expected[name] += listed(values)
            if name in LATE:
                (feature,) = (f for f in dataset.schema.features if f.name == name)
                expected[name][len(expected[name]) - late :] = listed(missing(feature, late))
    assert {name: of_batch(batch, name) for name in expected} == expected
    assert any(None in expected[name] for name in ("price", "income")) and [] in expected["tags"]
    assert (batch.numbers["place"].shape, batch.numbers["face"].shape) == ((len(batch.ids("item")), 2), (5, 3))
    assert batch.numbers["price"].dtype == torch.float32 and batch.set_lengths["tags"].dtype == torch.int64
    total = dict(zip(batch.features.keys(), batch.features.length_per_key(), strict=True))
    assert all(int(batch.lengths(name).sum()) == total[name] for name in keys)
    assert torch.equal(batch.set_lengths["tags"].sum(), batch.lengths("tags").sum())


class Perturbed:
    """A data set in which the values of ``name`` are others at the last ``number`` events of each user."""

    def __init__(self, dataset: SequenceDataset, name: str, number: int) -> None:
        self.schema, self.lengths = dataset.schema, dataset.lengths
        self.dataset, self.name, self.number = dataset, name, number

    def gather(self, users: np.ndarray, start: np.ndarray, stop: np.ndarray, features: tuple[str, ...]) -> Sequences:
        found = self.dataset.gather(users, start, stop, features)
        first = np.repeat(np.cumsum(found.lengths) - found.lengths, found.lengths)
        place = np.repeat(start, found.lengths) + np.arange(len(first)) - first
        lost = place >= np.repeat(self.lengths[users], found.lengths) - self.number
        values = found.of_events[self.name]
        if isinstance(values, Sets):
            other: Values = Sets(np.arange(lost.sum() + 1), np.full(lost.sum(), 3))
        else:
            other = np.full((lost.sum(), *values.shape[1:]), 2, values.dtype)
        kept = take(values, np.flatnonzero(~lost))
        return replace(found, of_events=found.of_events | {self.name: insert(kept, np.flatnonzero(lost), other)})


@pytest.mark.parametrize("name", EVENTS)
@pytest.mark.parametrize(("split", "candidates"), [("train", 2), ("test", 2), ("test", 0)])
def test_what_is_known_only_after_a_request_is_no_input(
    dataset: SequenceDataset, name: str, split: str, candidates: int
) -> None:
    collator = Collator(task="ranking", max_history=9, max_candidates=candidates, event_features=EVENTS)
    # Of the training samples the last two events before those held out are candidates.
    changed = Perturbed(dataset, name, 4 if split == "train" else 1)
    batches = [collate(collator, source, split, rows=[2, 3, 4]) for source in (dataset, changed)]
    values = [of_batch(batch, name) for batch in batches]
    assert (values[0] == values[1]) == (name in LATE)
    for other in EVENTS:
        assert other == name or of_batch(batches[0], other) == of_batch(batches[1], other)
    # In the history it is one: the same change an event earlier is seen.
    earlier = collate(collator, Perturbed(dataset, name, 5 if split == "train" else 2), split, rows=[2, 3, 4])
    assert of_batch(earlier, name) != values[0]


def test_a_rank_without_samples_has_all_features(dataset: SequenceDataset) -> None:
    collator = Collator(task="retrieval", max_history=4, contexts=("age",), user_features=USERS, event_features=EVENTS)
    batches = [collate(collator, dataset, "train", rows=rows) for rows in ([], [0, 1])]
    for batch in batches:
        assert batch.features.keys() == batches[1].features.keys() and [*batch.numbers] == [*batches[1].numbers]
        assert [*batch.set_lengths] == ["tags", "marks"]
    empty = batches[0]
    assert empty.features.length_per_key() == [0] * 8 and int(empty.set_lengths["tags"].numel()) == 0
    assert empty.numbers["price"].shape == (0, 1) and empty.numbers["place"].shape == (0, 2)
    assert empty.numbers["face"].shape == (1, 3) and bool(empty.numbers["face"].isnan().all())


def test_features_stay_with_their_events_in_a_sample_of_the_history(dataset: SequenceDataset) -> None:
    whole = Collator(task="ranking", max_history=9, max_candidates=1, event_features=EVENTS)
    drawn = replace(whole, sampling_ratio=0.5)
    batches = [collate(collator, dataset, "train", rows=[2, 3, 4]) for collator in (whole, drawn)]
    # Times differ within a user, so that an event is known by its user and time.
    known = [
        {
            (int(user), int(time)): place
            for place, (user, time) in enumerate(
                zip(batch.users.repeat_interleave(batch.lengths("item")), batch.timestamps, strict=True)
            )
        }
        for batch in batches
    ]
    assert len(known[0]) == len(batches[0].timestamps) and 3 < len(known[1]) < len(known[0])
    for name in EVENTS:
        values = [of_batch(batch, name) for batch in batches]
        assert values[1] == [values[0][known[0][event]] for event in known[1]]


def test_a_request_has_the_features_that_it_gives(dataset: SequenceDataset) -> None:
    users, tags = np.array([2, 0, 2]), Sets(np.array([0, 1, 1, 3]), np.array([4, 5, 0]))
    asked: dict[str, Values] = {"price": np.array([[1.0], [2.0], [np.nan]], np.float32), "tags": tags}
    requests = Requests(dataset, users, np.array([7, 8, 9]), features=asked)
    split: Split = requests.split
    collator = Collator(
        task="ranking",
        max_history=50,
        max_candidates=1,
        user_features=("likes",),
        event_features=("device", "price", "tags"),
    )
    rows = np.array([2, 0, 1])
    batch = collator(requests, split, rows, rows, 0)
    ends = batch.lengths("item").cumsum(0) - 1
    assert batch.ids("item")[ends].tolist() == [9, 7, 8]
    assert [of_batch(batch, "price")[end] for end in ends] == [None, [1.0], [2.0]]
    assert [of_batch(batch, "tags")[end] for end in ends] == [[5, 0], [4], []]
    assert [of_batch(batch, "device")[end] for end in ends] == [5, 5, 5]
    found = dataset.gather(users[rows], np.zeros(3, np.int64), dataset.lengths[users[rows]], ("tags", "likes"))
    history = [tags for place, tags in enumerate(of_batch(batch, "tags")) if place not in ends.tolist()]
    assert history == listed(found.of_events["tags"]) and of_batch(batch, "likes") == listed(found.of_users["likes"])


def test_features_follow_a_batch_wherever_it_goes(dataset: SequenceDataset) -> None:
    batch = collate(
        Collator(task="retrieval", max_history=4, user_features=USERS, event_features=EVENTS), dataset, "train"
    )
    copy = batch.to(torch.device("cpu"))
    for name in (*EVENTS, *USERS):
        assert of_batch(copy, name) == of_batch(batch, name)
    away = batch.to(torch.device("meta"))
    assert {value.device.type for value in (*away.numbers.values(), *away.set_lengths.values())} == {"meta"}
    assert [*batch.with_pool(torch.tensor([1])).numbers] == [*batch.numbers]


def test_features_of_items_are_read_with_the_vocabulary(dataset: SequenceDataset, tmp_path: Path) -> None:
    shapes = {name: dataset.item_features(name) for name in ("brand", "weight", "genres", "image")}
    assert shapes["brand"].shape == (50,) and shapes["weight"].shape == (50, 1) and shapes["image"].shape == (50, 3)
    assert isinstance(shapes["genres"], Sets) and count(shapes["genres"]) == 50
    assert dataset.vocabulary("tags").tolist() == dataset.vocabulary("likes").tolist() == list(range(6))


def test_categories_that_training_never_met_are_unknown_afterwards(tmp_path: Path) -> None:
    declared = [replace(f, vocab_size=60) if f.name == "device" else f for f in declared_features()]
    dataset = make_dataset(tmp_path / "small", LENGTHS, declared=declared)
    collator = Collator(task="retrieval", max_history=6, event_features=EVENTS)
    splits = leave_one_out(dataset.lengths)
    met = met_values(dataset, splits["train"], collator)
    assert set(met) == {"device", "ending", "tags", "marks"}
    # Of the longest history training sees the most recent 7 events, and of no event the one that is held out.
    seen = [
        dataset.gather(np.array([u]), np.array([max(0, n - 2 - 7)]), np.array([n - 2]), ("device",)).of_events["device"]
        for u, n in enumerate(LENGTHS)
    ]
    assert set(np.flatnonzero(met["device"])) == set(np.concatenate(seen).tolist()) - {60}
    later = replace(collator, met_values=met)
    known = np.array(of_batch(collate(collator, dataset, "test"), "device"))
    found = np.array(of_batch(collate(later, dataset, "test"), "device"))
    assert (found == np.where(met["device"][known], known, 60)).all() and (found != known).any()
    before, after = (collate(one, dataset, "train") for one in (collator, later))
    assert torch.equal(before.features.values(), after.features.values())


def test_members_that_training_never_met_leave_their_sets(dataset: SequenceDataset) -> None:
    collator = Collator(task="retrieval", max_history=6, event_features=EVENTS, user_features=("likes", "face"))
    train = leave_one_out(dataset.lengths)["train"]
    met, users = met_values(dataset, train, collator), np.unique(train.users)
    own = dataset.gather(users, np.zeros_like(users), np.zeros_like(users), ("likes",)).of_users["likes"]
    assert isinstance(own, Sets) and set(np.flatnonzero(met["likes"])) == set(own.ids.tolist()) and not met["likes"][-1]
    some = {name: np.array([False, True, True, False, True, True, False]) for name in ("likes", "tags")}
    plain, found = (collate(one, dataset, "test") for one in (collator, replace(collator, met_values=some)))
    for name in ("likes", "tags"):
        lengths = plain.set_lengths["tags"] if name == "tags" else plain.lengths("likes")
        sets = [own.tolist() for own in plain.ids(name).split(lengths.tolist())]
        expected = [[member for member in own if member not in (0, 3)] for own in sets]
        lengths = found.set_lengths["tags"] if name == "tags" else found.lengths("likes")
        assert [own.tolist() for own in found.ids(name).split(lengths.tolist())] == expected != sets
