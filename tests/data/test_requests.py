"""A request is a history and one event more, whatever window is cut out of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from hstu.data.reader import SequenceDataset
from hstu.data.request_files import HistoryColumns, read_histories
from hstu.data.requests import Requests
from hstu.data.seen import seen_before
from tests.samples import make_dataset
from tests.tiny import write_tiny


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return SequenceDataset.open(write_tiny(tmp_path_factory.mktemp("requests") / "tiny", num_users=30))


def test_windows_are_those_of_the_longer_sequence(dataset: SequenceDataset):
    rng = np.random.default_rng(0)
    users, asked = rng.integers(30, size=50), rng.integers(120, size=50)
    late = dataset.time_range()[1] + 5
    requests = Requests(dataset, users, asked, late)
    assert np.array_equal(requests.lengths, dataset.lengths[users] + 1)
    rows = rng.integers(50, size=400)
    start = rng.integers(requests.lengths[rows] + 1)
    stop = start + rng.integers(requests.lengths[rows] - start + 1)
    found = requests.gather(rows, start, stop)
    ends = np.cumsum(found.lengths)
    assert np.array_equal(found.lengths, stop - start) and np.array_equal(found.users, rows)
    assert found.actions is not None and found.times is not None
    for sample, row in enumerate(rows):
        user = users[[row]]
        whole = dataset.gather(user, np.zeros(1, int), dataset.lengths[user])
        here = slice(ends[sample] - found.lengths[sample], ends[sample])
        window = slice(start[sample], stop[sample])
        for values, history, extra in (
            (found.items, whole.items, asked[row]),
            (found.actions, whole.actions, 0),
            (found.times, whole.times, late),
        ):
            assert np.array_equal(values[here], np.append(history, extra)[window])
        assert found.contexts["segment"][sample] == whole.contexts["segment"][0]


def test_without_a_time_each_request_follows_its_users_last_event(dataset: SequenceDataset):
    users = np.array([3, 0])
    found = Requests(dataset, users).gather(np.arange(2), dataset.lengths[users], dataset.lengths[users] + 1)
    last = dataset.gather(users, dataset.lengths[users] - 1, dataset.lengths[users])
    assert np.array_equal(found.times, last.times) and found.items.tolist() == [0, 0]


def test_a_request_before_an_event_is_refused(dataset: SequenceDataset):
    latest = dataset.time_range()[1]
    users = np.arange(30)
    Requests(dataset, users, time=latest)
    with pytest.raises(ValueError, match=f"the request time {latest - 1} lies before"):
        Requests(dataset, users, time=latest - 1)


def test_contexts_that_a_model_does_not_read_need_no_column(dataset: SequenceDataset):
    columns = HistoryColumns(
        user="who", item="what", time="when", action="did", contexts=(), use_actions=False, has_unknown=True
    )
    frame = pl.DataFrame({"who": ["b", "a", "b"], "what": dataset.vocabulary("item_id")[[3, 1, 2]], "when": [9, 5, 7]})
    found, users = read_histories(dataset.path / "h.csv", frame, dataset, columns)
    events = found.gather(np.arange(2), np.zeros(2, int), found.lengths)
    assert users.to_list() == ["b", "a"] and events.items.tolist() == [2, 3, 1] and events.times is not None
    assert events.times.tolist() == [7, 9, 5] and events.contexts["segment"].tolist() == [0, 0]


def test_seen_is_the_whole_history_before_the_target(dataset: SequenceDataset):
    requests = Requests(dataset, np.array([4, 7]))
    rows, items = seen_before(requests, requests.split, torch.tensor([1, 0]))
    for place, user in enumerate((7, 4)):
        history = dataset.gather(np.array([user]), np.zeros(1, int), dataset.lengths[[user]]).items
        assert items[rows == place].tolist() == history.tolist()


def test_slates_hold_every_pair_once(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "small", [3, 0, 5, 2])
    users, items = np.array([2, 0, 2, 2, 1, 2, 0]), np.arange(10, 17)
    slates = Requests(dataset, users, items, 2 * 10**9).slates(3)
    assert slates.number.tolist() == [1, 1, 2]  # of users 0, 1, 2
    assert slates.rows(np.arange(3), 0).tolist() == [0, 1, 2] and slates.rows(np.arange(3), 1).tolist() == [4, 5, 3]
    asked = slates.requests.split.asked
    assert asked is not None and asked.tolist() == [2, 1, 3, 1, 0, 0, 0]
    for row, (user, pairs) in enumerate([(0, [1, 6]), (1, [4]), (2, [0, 2, 3]), (2, [5]), (0, []), (1, []), (2, [])]):
        assert slates.pairs_of(np.array([row])).tolist() == pairs
        rows, length = np.array([row]), dataset.lengths[[user]]
        found = slates.requests.gather(rows, np.zeros(1, np.int64), length + len(pairs))
        history = dataset.gather(np.array([user]), np.zeros(1, np.int64), length)
        assert found.items.tolist() == [*history.items, *items[pairs]]
        assert found.times is not None and found.times[len(history.items) :].tolist() == [2 * 10**9] * len(pairs)
        if len(pairs) == 3:  # any part of it
            part = slates.requests.gather(rows, length + 1, length + 2)
            assert part.items.tolist() == [items[2]]
            part = slates.requests.gather(rows, length - 1, length + 1)
            assert part.items.tolist() == [history.items[-1], items[0]]
