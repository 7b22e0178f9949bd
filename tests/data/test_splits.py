from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from hstu.config import ConfigError, DatasetArgs
from hstu.data import SequenceDataset, Split, leave_one_out, make_splits
from hstu.data.splits import time_quantiles
from tests.samples import make_dataset

LENGTHS = (3, 1, 12, 7, 5, 20, 4)


def test_last_event_tests_and_last_but_one_validates() -> None:
    lengths = np.array([3, 10, 4])
    splits = leave_one_out(lengths)
    assert list(splits) == ["train", "valid", "test"]
    np.testing.assert_array_equal(splits["train"].stop, [1, 8, 2])
    np.testing.assert_array_equal(splits["valid"].stop, [2, 9, 3])
    np.testing.assert_array_equal(splits["test"].stop, lengths)
    for name, split in splits.items():
        assert split.name == name and len(split) == 3
        np.testing.assert_array_equal(split.users, [0, 1, 2])


def test_users_with_too_few_events_train_and_are_not_scored(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        splits = leave_one_out(np.array([2, 5, 0, 1, 3]))
    assert samples(splits["train"]) == [(0, 2), (1, 3), (3, 1), (4, 1)]
    assert samples(splits["valid"]) == [(1, 4), (4, 2)] and samples(splits["test"]) == [(1, 5), (4, 3)]
    assert "3 of 5 users have fewer than 3 events: they are not scored (--min_user_events 3" in caplog.text
    with pytest.raises(ValueError, match="valid split .* is empty: no user has 3 events"):
        leave_one_out(np.array([2, 1]))


def args(**fields: object) -> DatasetArgs:
    return DatasetArgs(dataset_name="small", max_history_seqlen=6, **fields)  # type: ignore[arg-type]


def timed(folder: Path, largest: int, seed: int = 0) -> tuple[SequenceDataset, list[list[int]]]:
    """A data set whose times are drawn from ``[0, largest)``: many ties, within users and between them."""
    rng = np.random.default_rng(seed)
    per_user = [sorted(rng.integers(largest, size=length).tolist()) for length in LENGTHS]
    times = np.array([time for user in per_user for time in user])
    return make_dataset(folder / f"{largest}-{seed}", LENGTHS, times=times), per_user


def samples(split: Split) -> list[tuple[int, int]]:
    return sorted(zip(split.users.tolist(), split.stop.tolist(), strict=True))


def expected_temporal(per_user: list[list[int]], valid_from: int, test_from: int) -> dict[str, list[tuple[int, int]]]:
    """From the definition, one event at a time."""
    train = [(user, sum(t < valid_from for t in times)) for user, times in enumerate(per_user)]
    valid, test = [], []
    for user, times in enumerate(per_user):
        for place, time in enumerate(times):
            if place > 0 and time >= valid_from:
                (valid if time < test_from else test).append((user, place + 1))
    return {"train": [sample for sample in train if sample[1]], "valid": valid, "test": test}


@pytest.mark.parametrize("largest", [3, 10, 10**9])
@pytest.mark.parametrize("seed", range(4))
def test_temporal_equals_its_definition_with_ties(tmp_path: Path, largest: int, seed: int) -> None:
    dataset, per_user = timed(tmp_path, largest, seed)
    cuts = (largest // 3, largest * 2 // 3)
    splits = make_splits(args(protocol="temporal", temporal_cuts=cuts), dataset)
    assert {name: samples(split) for name, split in splits.items()} == expected_temporal(per_user, *cuts)
    assert all(split.name == name and split.stop.dtype == np.int64 for name, split in splits.items())
    # No event that validates or tests is ever trained on, and none is a target twice.
    trained = {(user, place) for user, stop in samples(splits["train"]) for place in range(stop)}
    targets = [(user, stop - 1) for name in ("valid", "test") for user, stop in samples(splits[name])]
    assert len(targets) == len(set(targets)) and not trained & set(targets)


def test_a_shortened_evaluation_takes_a_fair_sample_of_the_targets(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "long", [200] * 20)
    test, again = (make_splits(args(protocol="temporal"), dataset)["test"] for _ in range(2))
    assert np.array_equal(test.users, again.users) and np.array_equal(test.stop, again.stop)
    quarter = len(test) // 4
    assert np.unique(test.users[:quarter]).size > 15 > np.unique(np.sort(test.users)[:quarter]).size


@pytest.mark.parametrize("largest", [2, 7, 10**9])
@pytest.mark.parametrize("share", [0.01, 0.5, 0.8, 0.99])
def test_time_quantile_is_the_first_time_with_that_share_before_it(tmp_path: Path, largest: int, share: float) -> None:
    dataset, per_user = timed(tmp_path, largest)
    ordered = sorted(time for times in per_user for time in times)

    def before(time: int) -> float:
        return sum(t < time for t in ordered) / len(ordered)

    (found,) = time_quantiles(dataset, (share,))
    assert before(found) >= share and before(found - 1) < share


def test_temporal_quantiles_are_cuts(tmp_path: Path) -> None:
    dataset, per_user = timed(tmp_path, 10**6)
    splits = make_splits(args(protocol="temporal", temporal_quantiles=(0.5, 0.75)), dataset)
    cuts = time_quantiles(dataset, (0.5, 0.75))
    assert {name: samples(split) for name, split in splits.items()} == expected_temporal(per_user, *cuts)


def test_empty_windows_and_missing_times_are_refused(tmp_path: Path) -> None:
    dataset, _ = timed(tmp_path, 10)
    for cuts, empty in (((0, 5), "train"), ((20, 30), "valid"), ((5, 30), "test")):
        with pytest.raises(ValueError, match=f"the {empty} split .* is empty.*0 to 9.*DatasetArgs.temporal_cuts"):
            make_splits(args(protocol="temporal", temporal_cuts=cuts), dataset)
    timeless = make_dataset(tmp_path / "timeless", LENGTHS, with_time=False)
    with pytest.raises(ValueError, match="has no times; use DatasetArgs.protocol = 'leave_one_out'"):
        make_splits(args(protocol="temporal"), timeless)


def test_by_user_trains_on_the_first_users_and_tests_on_the_others(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "small", [3 + i for i in range(10)])
    splits = make_splits(args(protocol="by_user"), dataset)
    assert samples(splits["train"]) == [(user, 3 + user) for user in range(7)]
    assert samples(splits["valid"]) == [(user, 2 + user) for user in (7, 8, 9)]
    assert samples(splits["test"]) == [(user, 3 + user) for user in (7, 8, 9)]
    with pytest.raises(ValueError, match="2 users or more"):
        make_splits(args(protocol="by_user"), make_dataset(tmp_path / "one", [3]))
    short = make_splits(args(protocol="by_user"), make_dataset(tmp_path / "short", [1, 4, 2, 2, 5]))
    assert samples(short["train"]) == [(0, 1), (1, 4), (2, 2)] and samples(short["test"]) == [(4, 5)]


def expected_windows(per_user: list[list[int]], low: float, middle: float, high: float) -> dict[str, list[tuple]]:
    """Samples and, of training, their first events with a loss: from the definition, one event at a time."""
    train, scored = [], {0: [], 1: []}
    for user, times in enumerate(per_user):
        own = [place for place, time in enumerate(times) if low <= time < middle]
        train += [(user, own[-1] + 1, own[0])] if own else []
        scored[user % 2] += [(user, place + 1) for place, t in enumerate(times) if place > 0 and middle <= t < high]
    return {"train": train, "valid": scored[0], "test": scored[1]}


@pytest.mark.parametrize("largest", [12, 10**9])
@pytest.mark.parametrize(("window", "train_windows"), [(0, 1), (1, 1), (2, 1), (1, 2), (2, 3)])
def test_windows_equal_their_definition_with_ties(
    tmp_path: Path, largest: int, window: int, train_windows: int
) -> None:
    dataset, per_user = timed(tmp_path, largest)
    cuts = (largest // 4, largest // 2, largest * 3 // 4)
    options = {"protocol": "windows", "temporal_cuts": cuts, "window": window, "train_windows": train_windows}
    splits = make_splits(args(**options), dataset)
    edges = [-math.inf, *cuts, math.inf]
    expected = expected_windows(per_user, *(edges[k] for k in (window + 1 - train_windows, window + 1, window + 2)))
    train = splits["train"]
    assert list(zip(*(x.tolist() for x in (train.users, train.stop, train.first)), strict=True)) == expected["train"]
    assert samples(splits["valid"]) == expected["valid"] and samples(splits["test"]) == expected["test"]


def test_windows_hold_about_as_many_events_each(tmp_path: Path) -> None:
    dataset, per_user = timed(tmp_path, 10**6)
    cuts = time_quantiles(dataset, (0.25, 0.5, 0.75))
    for window in range(3):
        found = make_splits(args(protocol="windows", num_windows=4, window=window), dataset)
        given = make_splits(args(protocol="windows", temporal_cuts=cuts, window=window), dataset)
        assert {name: samples(split) for name, split in found.items()} == {n: samples(s) for n, s in given.items()}
        train = found["train"]
        assert abs((train.stop - train.first).sum() - sum(map(len, per_user)) / 4) <= 1
    with pytest.raises(ValueError, match=r"window = 3: of 4 windows the last that .* is 2"):
        make_splits(args(protocol="windows", num_windows=4, window=3), dataset)


@pytest.mark.parametrize("stride", [1, 2, 5, 6])
@pytest.mark.parametrize("protocol", [{}, {"protocol": "windows", "num_windows": 3, "window": 1}])
def test_with_a_stride_every_training_event_is_a_target_once(tmp_path: Path, stride: int, protocol: dict) -> None:
    dataset, _ = timed(tmp_path, 10**6)
    whole, cut = (make_splits(args(**protocol, **more), dataset) for more in ({}, {"train_stride": stride}))
    first = whole["train"].first if whole["train"].first is not None else np.zeros(len(whole["train"]), np.int64)
    wanted = [
        (user, place)
        for user, start, stop in zip(whole["train"].users, first, whole["train"].stop, strict=True)
        for place in range(start, stop)
    ]
    assert cut["train"].first is not None and (cut["train"].stop - cut["train"].first).max() <= stride
    found = [
        (user, place)
        for user, start, stop in zip(cut["train"].users, cut["train"].first, cut["train"].stop, strict=True)
        for place in range(start, stop)
    ]
    assert sorted(found) == sorted(wanted) and len(cut["train"]) >= len(whole["train"])
    for name in ("valid", "test"):
        assert samples(cut[name]) == samples(whole[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"protocol": "sideways"}, "protocol = 'sideways': must be one of 'leave_one_out', 'temporal', 'by_user'"),
        ({"window": 1}, "window = 1: needs DatasetArgs.protocol = 'windows'"),
        ({"protocol": "windows", "train_windows": 2}, "train_windows = 2: must be at least 0 and below 2"),
        ({"protocol": "windows", "num_windows": 1}, "num_windows = 1: must be at least 2"),
        ({"protocol": "windows", "temporal_cuts": (5, 5)}, "temporal_cuts.*ascending times"),
        ({"protocol": "windows", "temporal_cuts": ()}, "temporal_cuts.*ascending times"),
        ({"train_stride": 0}, "train_stride = 0: must be at least 1"),
        ({"train_stride": 7}, "train_stride = 7: must be at most 6"),
        ({"train_stride": 3, "max_num_candidates": 2}, "train_stride = 3: must be at most 2"),
        ({"train_stride": 3, "history_end": -2}, "train_stride = 3: needs the whole history"),
        ({"temporal_quantiles": (0.9, 0.8)}, "temporal_quantiles.*two ascending"),
        ({"temporal_quantiles": (0.9,)}, "temporal_quantiles.*two ascending"),
        ({"temporal_quantiles": (0.5, 1)}, "temporal_quantiles.*between 0 and 1"),
        ({"protocol": "temporal", "temporal_cuts": (7, 7)}, "temporal_cuts.*ascending times"),
        ({"temporal_cuts": (1, 2)}, "temporal_cuts.*needs DatasetArgs.protocol = 'temporal' or 'windows'"),
        ({"history_end": 0}, "history_end = 0: leaves no event"),
        ({"history_start": -2, "history_end": -2}, "history_end.*above DatasetArgs.history_start"),
        ({"history_start": 4, "history_end": 3}, "history_end.*above DatasetArgs.history_start"),
        ({"history_sampling_ratio": 0}, "history_sampling_ratio.*at most 1"),
        ({"history_sampling_ratio": 1.5}, "history_sampling_ratio.*at most 1"),
        ({"num_workers": -1}, "num_workers"),
        ({"actions_without_loss": 3}, "actions_without_loss.*a list, each item an integer or a number or a string"),
    ],
)
def test_wrong_fields_are_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        args(**fields)
