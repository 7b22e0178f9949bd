"""What there is to know of a data set at a glance: distributions, example users, and what looks wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from hstu.data.reader import SequenceDataset, Sequences
from hstu.data.repeats import MANY_REPEATS, REPEATS_MATTER, count_repeats
from hstu.data.schema import Feature, Level, Schema, unknown_id
from hstu.data.values import Sets, Values, count

COLD_EVENTS = 5
LARGE_SHARE = 0.1  # of all events, when one user or item has more
EXAMPLES = 10
_EVENTS_AT_ONCE = 1 << 21
_LEVELS: tuple[Level, ...] = ("user", "event")


@dataclass(frozen=True, kw_only=True)
class Overview:
    """Counts of a data set.

    Attributes:
        lengths: Events of each user, int64 [U].
        popularity: Events of each item, int64 [items].
        actions: Events of each action id, int64 [actions], or None.
        ties: Events at the time of the one before; None without times.
        repeats: Events with the time, item and action of another one of their user; without times, with the item
            and action of the one before.
        seen_again: Events of an item that their user met before.
        missing: Share of the users, events or items that lack a value of a declared feature or control column.
        warnings: What deserves a look, a line each.
    """

    lengths: np.ndarray
    popularity: np.ndarray
    actions: np.ndarray | None
    ties: int | None
    repeats: int
    seen_again: int
    missing: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


def overview(dataset: SequenceDataset) -> Overview:
    """Read a data set once, some users at a time."""
    schema = dataset.schema
    popularity = np.zeros(schema.item.vocab_size or 0, np.int64)
    actions = None if schema.action is None else np.zeros(schema.action.vocab_size or 0, np.int64)
    ties = repeats = seen_again = 0
    lacking = dict.fromkeys(stored_names(schema), 0)
    for events in _all_users(dataset, tuple(lacking)):
        for name, values in (events.of_users | events.of_events).items():
            lacking[name] += _missing(values, schema, name)
        np.add.at(popularity, events.items, 1)
        if actions is not None and events.actions is not None:
            np.add.at(actions, events.actions, 1)
        # Both belong to one user.
        inside = np.ones(events.items.size, bool)
        inside[(np.cumsum(events.lengths) - events.lengths)[events.lengths > 0]] = False
        ties += int((inside & _same(events.times)).sum())
        repeats += _repeats(events, inside)
        seen_again += count_repeats(events.lengths, events.items)
    found = Overview(
        lengths=dataset.lengths,
        popularity=popularity,
        actions=actions,
        ties=None if schema.time is None else ties,
        repeats=repeats,
        seen_again=seen_again,
        missing=_shares(dataset, lacking),
    )
    found.warnings.extend([*_dominating(dataset, found), *_warnings(found)])
    return found


def examples(dataset: SequenceDataset, count: int = EXAMPLES, newest: int = 5) -> list[dict[str, Any]]:
    """Return ``count`` users from the shortest sequence to the longest, with the original values of their ids.

    Each is ``user``, ``contexts`` (name -> value), ``length``, and ``events``: the ``newest``, oldest of them
    first, each (item, action, time, features) with None for what the data set or the event lacks.
    """
    order = np.argsort(dataset.lengths, kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(count, len(order))).astype(np.int64))]
    stop = dataset.lengths[chosen]
    declared = tuple(feature.name for feature in dataset.schema.stored("event"))
    events = dataset.gather(chosen, np.maximum(stop - newest, 0), stop, declared)
    users = _originals(dataset, dataset.schema.user.name, chosen)
    contexts = {name: _originals(dataset, name, ids) for name, ids in events.contexts.items()}
    nothing = np.full(events.items.size, None)
    action, times = dataset.schema.action, nothing if events.times is None else events.times
    actions = nothing
    if action is not None and events.actions is not None:
        actions = _originals(dataset, action.name, events.actions)
    columns = {name: _listed(dataset, name, events.of_events[name]) for name in declared}
    features = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    items = _originals(dataset, dataset.schema.item.name, events.items)
    table = list(zip(items, actions, times, features or [{} for _ in items], strict=True))
    ends = np.cumsum(events.lengths)
    return [
        {
            "user": users[b],
            "contexts": {name: values[b] for name, values in contexts.items()},
            "length": int(stop[b]),
            "events": table[ends[b] - events.lengths[b] : ends[b]],
        }
        for b in range(len(chosen))
    ]


def size_of(feature: Feature) -> str:
    """Return how many values a feature has, or between what they lie, in a few words."""
    if feature.statistics is not None:
        return f"{feature.statistics.quantiles[0]:.4g} to {feature.statistics.quantiles[-1]:.4g}"
    if feature.width is not None:
        return f"{feature.width:,} wide"
    return "seconds" if feature.vocab_size is None else f"{feature.vocab_size:,} values"


def stored_names(schema: Schema) -> tuple[str, ...]:
    """Return the declared features and control columns of users and events."""
    return tuple(feature.name for level in _LEVELS for feature in schema.stored(level))


def _missing(values: Values, schema: Schema, name: str) -> int:
    """Count the values that are missing."""
    if isinstance(values, Sets):
        return int((values.lengths == 0).sum())
    lost = np.isnan(values).any(axis=1) if values.ndim == 2 else values == unknown_id(schema, name)
    return int(lost.sum())


def _shares(dataset: SequenceDataset, lacking: dict[str, int]) -> dict[str, float]:
    schema = dataset.schema
    shares: dict[str, float] = {}
    for level, number in (("user", dataset.num_users), ("event", dataset.num_events)):
        for feature in schema.stored(level):  # type: ignore[arg-type]
            shares[feature.name] = lacking[feature.name] / max(1, number)
    for feature in schema.stored("item"):
        values = dataset.item_features(feature.name)
        shares[feature.name] = _missing(values, schema, feature.name) / count(values)
    return shares


def _all_users(dataset: SequenceDataset, features: tuple[str, ...] = ()) -> Iterator[Sequences]:
    """Yield the whole sequences of all users, about ``_EVENTS_AT_ONCE`` events at once."""
    chunk = np.cumsum(dataset.lengths) // _EVENTS_AT_ONCE
    for users in np.split(np.arange(dataset.num_users), np.flatnonzero(np.diff(chunk)) + 1):
        yield dataset.gather(users, np.zeros_like(users), dataset.lengths[users], features)


def _repeats(events: Sequences, inside: np.ndarray) -> int:
    """Count the repeats of ``Overview``; ``inside`` [T] tells which events are not the first of their user."""
    columns = [values for values in (events.items, events.actions, events.times) if values is not None]
    if events.times is not None:  # equal rows have equal times, but others may stand between them
        owner = np.repeat(np.arange(events.lengths.size), events.lengths)
        order = np.lexsort((*columns, owner))
        columns, inside = [values[order] for values in (owner, *columns)], np.ones_like(inside)
    for values in columns:
        inside = inside & _same(values)
    return int(inside.sum())


def _same(values: np.ndarray | None) -> np.ndarray | bool:
    """Return where a value equals the one before it, [T]; True where there are none to differ."""
    return True if values is None else np.concatenate([[False], values[1:] == values[:-1]])[: values.size]


def _listed(dataset: SequenceDataset, name: str, values: Values) -> list[Any]:
    """Return original values, or numbers; None where one is missing."""
    if isinstance(values, np.ndarray) and values.ndim == 2:
        return [None if np.isnan(row).any() else row.tolist() if len(row) > 1 else float(row[0]) for row in values]
    known = [*dataset.vocabulary(name).tolist(), None]
    if isinstance(values, Sets):
        return [[known[k] for k in part] for part in np.split(values.ids, values.offsets[1:-1])][: count(values)]
    return [known[k] for k in values]


def _originals(dataset: SequenceDataset, feature: str, ids: np.ndarray) -> np.ndarray:
    """Return original values; bit masks stand for themselves, or for the names of their bits."""
    action = dataset.schema.action
    if action is not None and action.name == feature and action.action_type == "bitmask":
        return ids if action.bits is None else np.array([_names(action.bits, mask) for mask in ids.tolist()], object)
    return dataset.vocabulary(feature)[ids]


def _names(bits: tuple[str, ...], mask: int) -> str:
    return "+".join(name for bit, name in enumerate(bits) if mask >> bit & 1) or "none"


def _dominating(dataset: SequenceDataset, found: Overview) -> list[str]:
    """A line for the user and the item with more than ``LARGE_SHARE`` of all events, in original ids."""
    lines = []
    for feature, counts in ((dataset.schema.user, found.lengths), (dataset.schema.item, found.popularity)):
        largest, events = int(counts.argmax()), int(counts.sum())
        # Few users have large shares each.
        if counts[largest] > events * max(LARGE_SHARE, 1.5 / np.count_nonzero(counts)):
            (original,) = dataset.vocabulary(feature.name)[[largest]].tolist()
            lines.append(
                f"one {feature.role} is large: {original!r} has {counts[largest]:,} of {events:,} events; is it one "
                f"{feature.role}, or what stands for an unknown one?"
            )
    return lines


def _warnings(found: Overview) -> list[str]:
    events, users = int(found.lengths.sum()), len(found.lengths)
    cold = int(((found.popularity > 0) & (found.popularity < COLD_EVENTS)).sum())
    unseen = int((found.popularity == 0).sum())
    constant = None if found.actions is None else int((found.actions > 0).sum()) < 2
    share = f"{found.repeats:,} of {events:,} events"
    again = found.seen_again > MANY_REPEATS * events
    kinds = [
        (found.repeats, f"duplicates: {share} repeat another one in every column"
         if found.ties is not None else f"repeats: {share} repeat the item before them"),
        (found.ties, f"ties: {found.ties or 0:,} events have the time of the one before them; the order of the input "
         "decides which of them is held out"),
        (again, f"repeats: {found.seen_again / max(1, events):.1%} of the events are of an item that their user met "
         f"before; {REPEATS_MATTER}"),
        (cold, f"cold items: {cold:,} of {len(found.popularity):,} items have fewer than {COLD_EVENTS} events"),
        (unseen, f"unseen items: {unseen:,} of {len(found.popularity):,} items have no event"),
        (int((found.lengths < 3).sum()), f"short users: {int((found.lengths < 3).sum()):,} of {users:,} have fewer "
         "than 3 events; leave_one_out trains on them and does not score them"),
        (constant, "one action: all events have the same action, so that there is nothing to rank"),
    ]  # fmt: skip
    return [text for number, text in kinds if number]
