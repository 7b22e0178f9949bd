"""Which events train, validate and test: every protocol, as indices into one data set."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from hstu.config import DatasetArgs
from hstu.data.reader import SequenceDataset
from hstu.data.sessions import session_begins, session_column

logger = logging.getLogger(__name__)

MIN_EVENTS = 3
TRAIN_SHARE = 0.7
_MOST_WINDOWS = 10_000
_EVENTS_AT_ONCE = 1 << 22


@dataclass(frozen=True, kw_only=True)
class Split:
    """Samples of one split.

    Args:
        name: "train", "valid" or "test".
        users: Row of the user in the data set, int64 [S]; a user may have several samples.
        stop: The events before ``stop`` belong to the sample, int64 [S]. Of a valid or test sample the
            event ``stop - 1`` is the held-out target.
        first: The events of a training sample before this one are inputs without a loss, int64 [S];
            None: all have one.
        asked: Events at the end of a valid or test sample that are asked about, as candidates, int64 [S]; None: one.
        known: The events of the user before this one are known to training, int64 [S]; None: those before ``stop``.
    """

    name: Literal["train", "valid", "test"]
    users: np.ndarray
    stop: np.ndarray
    first: np.ndarray | None = None
    asked: np.ndarray | None = None
    known: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.users)


def make_splits(args: DatasetArgs, dataset: SequenceDataset, recent_targets: int | None = None) -> dict[str, Split]:
    """Return the splits of ``args.protocol`` by name.

    Args:
        args: Which protocol.
        dataset: The data.
        recent_targets: The last events of a training sample that may carry a loss; None: all.

    Raises:
        ValueError: If the data set has too few events, or no times where the protocol needs them.
    """
    if args.protocol == "temporal":
        splits = temporal(dataset, *(args.temporal_cuts or time_quantiles(dataset, args.temporal_quantiles)))
    elif args.protocol == "windows":
        window = args.first_window if isinstance(args.window, str) else args.window
        splits = windows(dataset, window_cuts(args, dataset), window, args.train_windows)
    else:
        splits = {"leave_one_out": leave_one_out, "by_user": by_user}[args.protocol](dataset.lengths)
    if args.sessions is not None:
        splits["train"] = _cut_at_sessions(splits["train"], dataset, args.sessions)
    stride = args.train_stride
    if stride is None and args.sessions is not None:
        stride = recent_targets or args.max_num_candidates or args.max_history_seqlen
    if stride is not None:
        splits["train"] = _cut(splits["train"], stride)
    if recent_targets is not None:
        train = splits["train"]
        first = np.maximum(train.stop - recent_targets, 0 if train.first is None else train.first)
        splits["train"] = replace(train, first=first)
    return splits


def leave_one_out(lengths: np.ndarray) -> dict[str, Split]:
    """Train on all but the last two events, validate on the last but one, test on the last.

    Users with fewer than 3 events train with all they have and are not scored.

    Args:
        lengths: Number of events of each user, int64 [U].

    Returns:
        The splits by name; each has at most one sample per user.

    Raises:
        ValueError: If no user has 3 events.
    """
    users, scored = np.flatnonzero(lengths), _scored(lengths)
    held_out = np.where(lengths < MIN_EVENTS, 0, 2)
    return _require_samples(
        {
            "train": Split(name="train", users=users, stop=(lengths - held_out)[users]),
            "valid": Split(name="valid", users=scored, stop=lengths[scored] - 1),
            "test": Split(name="test", users=scored, stop=lengths[scored]),
        },
        f"no user has {MIN_EVENTS} events",
    )


def by_user(lengths: np.ndarray) -> dict[str, Split]:
    """Train on all events of the first 70% of the users; of the others, validate and test on the last two.

    For comparison with systems that split so: the future of a training user is another's past. Of the others,
    those with fewer than 3 events are left out.

    Args:
        lengths: Number of events of each user, int64 [U].

    Raises:
        ValueError: If a split is empty.
    """
    share = int(len(lengths) * TRAIN_SHARE)
    train, scored = np.flatnonzero(lengths[:share]), _scored(lengths, share)
    return _require_samples(
        {
            "train": Split(name="train", users=train, stop=lengths[train]),
            "valid": Split(name="valid", users=scored, stop=lengths[scored] - 1),
            "test": Split(name="test", users=scored, stop=lengths[scored]),
        },
        f"by_user needs 2 users or more, and {MIN_EVENTS} events of one of the last 30%",
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


def windows(dataset: SequenceDataset, cuts: tuple[int, ...], window: int, train_windows: int = 1) -> dict[str, Split]:
    """Cut the time into windows; train on the events of one (or some up to it), score those of the next.

    What a user did before a window is input to it. Of the scored window each event is one sample, as in
    ``temporal``: those of users in even rows validate, those of users in odd rows test.

    Args:
        dataset: The data.
        cuts: Times at which the next window begins, ascending, in seconds; one fewer than windows.
        window: Number of the (last) window to train on, from 0.
        train_windows: How many windows up to that one are trained on; 0: all.

    Raises:
        ValueError: If there is no window after ``window``, the data set has no times, or a split is empty.
    """
    if window >= len(cuts):
        raise ValueError(
            f"DatasetArgs.window = {window}: of {len(cuts) + 1} windows the last that has another one after it to be "
            f"scored is {len(cuts) - 1}"
        )
    edges, begin = [-(2**63), *cuts, 2**63 - 1], window + 1 - train_windows if train_windows else 0
    first, last, end = (dataset.count_before(edges[k]) for k in (begin, window + 1, window + 2))
    users = np.flatnonzero(last > first)
    even = np.arange(len(end)) % 2 == 0
    return _require_samples(
        {
            "train": Split(name="train", users=users, stop=last[users], first=first[users]),
            "valid": _one_sample_per_event("valid", last, np.where(even, end, last)),
            "test": _one_sample_per_event("test", last, np.where(even, last, end)),
        },
        f"window {window} ends at the time {cuts[window]}, the next at {[*cuts, 'the end'][window + 1]}; change "
        "DatasetArgs.window, num_windows or temporal_cuts",
    )


def window_cuts(args: DatasetArgs, dataset: SequenceDataset) -> tuple[int, ...]:
    """Return when all windows of ``args`` but the first begin, ascending, in seconds.

    Windows with a length begin at multiples of it since 1970: days at midnight, UTC.

    Raises:
        ValueError: If the data set has no times, or one window holds all of them.
    """
    if args.temporal_cuts is not None:
        return args.temporal_cuts
    length = args.window_seconds
    if length is None:
        return time_quantiles(dataset, tuple(number / args.num_windows for number in range(1, args.num_windows)))
    first, last = dataset.time_range()
    cuts = range((first // length + 1) * length, last + 1, length)
    if not cuts or len(cuts) > _MOST_WINDOWS:
        found = "one window holds all of them" if not cuts else f"these are {len(cuts) + 1:,} windows"
        raise ValueError(
            f"DatasetArgs.window = {args.window!r}: the events are of {last - first:,} seconds, so that {found}; "
            f"give a {'shorter' if not cuts else 'longer'} one"
        )
    return tuple(cuts)


def each_window(args: DatasetArgs, dataset: SequenceDataset) -> dict[int, DatasetArgs | str]:
    """Return for each window that a run over windows trains on what makes it one of its own, or why it is left out.

    Raises:
        ValueError: If there is no window to train on, or ``last_window`` is beyond the last one.
    """
    cuts = window_cuts(args, dataset)
    last = len(cuts) - 1 if args.last_window is None else args.last_window
    for field, window in (("first_window", args.first_window), ("last_window", last)):
        if window >= len(cuts):
            raise ValueError(f"DatasetArgs.{field} = {window}: of {len(cuts) + 1} windows the last with another one "
                             f"after it to be scored is {len(cuts) - 1}")  # fmt: skip
    found: dict[int, DatasetArgs | str] = {}
    for window in range(args.first_window, last + 1):
        trained = min(args.train_windows, window + 1)
        try:
            windows(dataset, cuts, window, trained)
        except ValueError as error:
            found[window] = str(error).partition(":")[0]
            continue
        found[window] = replace(
            args,
            window=window,
            train_windows=trained,
            temporal_cuts=cuts,
            num_windows=10,
            first_window=0,
            last_window=None,
            carry_over=True,
        )
    if all(isinstance(own, str) for own in found.values()):
        raise ValueError(f"DatasetArgs.window = {args.window!r}: no window can be trained on and scored: {found}")
    return found


def time_quantiles(dataset: SequenceDataset, shares: tuple[float, ...]) -> tuple[int, ...]:
    """Return for each share the first time before which at least that share of all events lies.

    Raises:
        ValueError: If the data set has no times or no events.
    """
    return tuple(_time_quantile(dataset, share) for share in shares)


def _time_quantile(dataset: SequenceDataset, share: float) -> int:
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


def _cut(split: Split, stride: int) -> Split:
    """Cut samples from their ends into ones of ``stride`` events each that carry a loss, with all before as history."""
    first = np.zeros_like(split.stop) if split.first is None else split.first
    counts = -((first - split.stop) // stride)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    stop = np.repeat(split.stop, counts) - number * stride
    return replace(
        split,
        users=np.repeat(split.users, counts),
        stop=stop,
        first=np.maximum(stop - stride, np.repeat(first, counts)),
        known=np.repeat(split.stop if split.known is None else split.known, counts),
    )


def _cut_at_sessions(split: Split, dataset: SequenceDataset, sessions: str) -> Split:
    """Cut training samples into one of each session, whose events carry a loss, with all before as history."""
    first = np.zeros_like(split.stop) if split.first is None else split.first
    columns = session_column(sessions, dataset.schema)
    users, starts, stops, known = [], [], [], []
    for rows in sample_blocks(split):
        events = dataset.gather(split.users[rows], first[rows], split.stop[rows], columns)
        begins = np.flatnonzero(session_begins(events, sessions, dataset.schema))
        ends = np.cumsum(events.lengths)
        sample = np.searchsorted(ends, begins, side="right")
        last = np.append(sample[1:] != sample[:-1], True)
        shift = first[rows][sample] - (ends - events.lengths)[sample]
        users.append(split.users[rows][sample])
        starts.append(begins + shift)
        known.append(split.stop[rows][sample])
        stops.append(np.where(last, known[-1], np.append(begins[1:], 0) + shift))
    found = (np.concatenate(parts) for parts in (users, stops, starts, known))
    return Split(name=split.name, **dict(zip(("users", "stop", "first", "known"), found, strict=True)))


def sample_blocks(split: Split) -> Iterator[np.ndarray]:
    """Yield the samples of ``split`` in order, with some ``_EVENTS_AT_ONCE`` events before their targets at once."""
    block = np.cumsum(split.stop) // _EVENTS_AT_ONCE
    yield from np.split(np.arange(len(split)), np.flatnonzero(np.diff(block)) + 1)


def _scored(lengths: np.ndarray, begin: int = 0) -> np.ndarray:
    """Return the users from ``begin`` on with enough events to be scored, and tell how many have not."""
    users = np.arange(begin, len(lengths))
    enough = lengths[begin:] >= MIN_EVENTS
    if not enough.all():
        logger.info(
            "%d of %d users have fewer than %d events: they are not scored (--min_user_events %d in preprocessing "
            "drops them)",
            *((~enough).sum(), len(users), MIN_EVENTS, MIN_EVENTS),
        )
    return users[enough]


def _require_samples(splits: dict[str, Split], remedy: str) -> dict[str, Split]:
    for name, split in splits.items():
        if not len(split):
            raise ValueError(f"the {name} split of the data set is empty: {remedy}")
    return splits
