"""Which events train, validate and test: every protocol, as indices into one data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from hstu.config import DatasetArgs
from hstu.data.reader import SequenceDataset

MIN_EVENTS = 3
TRAIN_SHARE = 0.7


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples of one split.

    Args:
        name: "train", "valid" or "test".
        users: Row of the user in the data set, int64 [S]; a user may have several samples.
        stop: The events before ``stop`` belong to the sample, int64 [S]. Of a valid or test sample the
            event ``stop - 1`` is the held-out target.
    """

    name: Literal["train", "valid", "test"]
    users: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.users)


def make_splits(args: DatasetArgs, dataset: SequenceDataset) -> dict[str, Split]:
    """Return the splits of ``args.protocol`` by name.

    Raises:
        ValueError: If the data set has too few events, or no times where the protocol needs them.
    """
    if args.protocol == "temporal":
        cuts = args.temporal_cuts or tuple(time_quantile(dataset, q) for q in args.temporal_quantiles)
        return temporal(dataset, *cuts)
    return {"leave_one_out": leave_one_out, "by_user": by_user}[args.protocol](dataset.lengths)


def leave_one_out(lengths: np.ndarray) -> dict[str, Split]:
    """Train on all but the last two events, validate on the last but one, test on the last.

    Args:
        lengths: Number of events of each user, int64 [U].

    Returns:
        The splits by name; each has one sample per user.

    Raises:
        ValueError: If a user has fewer than 3 events.
    """
    _require_events(lengths)
    users = np.arange(len(lengths), dtype=np.int64)
    stop = np.asarray(lengths, dtype=np.int64)
    return {
        "train": Split(name="train", users=users, stop=stop - 2),
        "valid": Split(name="valid", users=users, stop=stop - 1),
        "test": Split(name="test", users=users, stop=stop),
    }


def by_user(lengths: np.ndarray) -> dict[str, Split]:
    """Train on all events of the first 70% of the users; of the others, validate and test on the last two.

    For comparison with systems that split so: the future of a training user is another's past.

    Args:
        lengths: Number of events of each user, int64 [U].

    Raises:
        ValueError: If a user has fewer than 3 events, or there are fewer than 2 users.
    """
    _require_events(lengths)
    users = np.arange(len(lengths), dtype=np.int64)
    stop = np.asarray(lengths, dtype=np.int64)
    share = int(len(lengths) * TRAIN_SHARE)
    train, others = users[:share], users[share:]
    return _require_samples(
        {
            "train": Split(name="train", users=train, stop=stop[train]),
            "valid": Split(name="valid", users=others, stop=stop[others] - 1),
            "test": Split(name="test", users=others, stop=stop[others]),
        },
        "by_user needs 2 users or more",
    )


def temporal(dataset: SequenceDataset, valid_from: int, test_from: int) -> dict[str, Split]:
    """Train on the events before a time, validate on those up to a later one, test on the rest.

    Each event of a window is one sample, with everything its user did before as history; a user's first
    event cannot be predicted and is left out. Events of one time always fall into one split.

    Args:
        dataset: The data.
        valid_from: Time of the first validation event, in seconds.
        test_from: Time of the first test event, in seconds.

    Raises:
        ValueError: If the data set has no times, or a split is empty.
    """
    edges = [dataset.count_before(valid_from), dataset.count_before(test_from), dataset.lengths]
    users = np.flatnonzero(edges[0])
    first, last = dataset.time_range()
    return _require_samples(
        {
            "train": Split(name="train", users=users, stop=edges[0][users]),
            "valid": _one_sample_per_event("valid", edges[0], edges[1]),
            "test": _one_sample_per_event("test", edges[1], edges[2]),
        },
        f"it was cut at the times {valid_from} and {test_from}, its events are of {first} to {last}; change "
        "DatasetArgs.temporal_cuts or DatasetArgs.temporal_quantiles",
    )


def time_quantile(dataset: SequenceDataset, share: float) -> int:
    """Return the first time before which at least ``share`` of all events lie.

    Raises:
        ValueError: If the data set has no times or no events.
    """
    low, high = dataset.time_range()
    high += 1
    while low < high:
        middle = (low + high) // 2
        if dataset.count_before(middle).sum() >= share * dataset.num_events:
            high = middle
        else:
            low = middle + 1
    return low


def _one_sample_per_event(name: Literal["valid", "test"], start: np.ndarray, stop: np.ndarray) -> Split:
    """Make a sample of each event in ``[start, stop)`` of each user, but of a user's first.

    Their order is random and always the same, so that a shortened evaluation takes a fair sample of them.
    """
    start = np.minimum(np.maximum(start, 1), stop)
    counts = stop - start
    shift = start - (np.cumsum(counts) - counts)
    targets = np.arange(counts.sum()) + np.repeat(shift, counts)
    order = np.random.default_rng(0).permutation(len(targets))
    return Split(name=name, users=np.repeat(np.arange(len(stop)), counts)[order], stop=targets[order] + 1)


def _require_events(lengths: np.ndarray) -> None:
    short = np.flatnonzero(lengths < MIN_EVENTS)
    if len(short):
        raise ValueError(
            f"{len(short)} of {len(lengths)} users have fewer than {MIN_EVENTS} events "
            f"(row {short[0]} has {lengths[short[0]]}), too few to train, validate and test on; "
            f"drop them with --min_user_events {MIN_EVENTS} in preprocessing"
        )


def _require_samples(splits: dict[str, Split], remedy: str) -> dict[str, Split]:
    for name, split in splits.items():
        if not len(split):
            raise ValueError(f"the {name} split of the data set is empty: {remedy}")
    return splits
