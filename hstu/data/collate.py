"""Events of some users to one ``Batch``: which are history, which carry a label, what the label is."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch

from hstu.data.batch import Batch, KeyedJaggedTensor, keyed_features
from hstu.data.reader import Histories, Sequences
from hstu.data.schema import Schema, unknown_id
from hstu.data.sessions import of_last_session, session_column
from hstu.data.splits import Split
from hstu.data.values import Sets, Values, missing, only, take, without


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes batches of one task.

    Attributes:
        task: What the labels are: the actions of the labelled events, or the items after them.
        max_history: Most recent events kept in front of the ones to be predicted.
        max_candidates: Trailing events of a training sample that are candidates; 0: none, every event of
            the history carries a label.
        contexts: Categorical features of users to carry, one id a sample.
        user_features: Other features of users to carry.
        event_features: Features of events to carry.
        label_features: Features of events that are predicted, ids and numbers.
        use_actions: Whether the history's actions are inputs.
        history_start: First event of the history that a sample sees, as in a Python slice; None: the oldest.
        history_end: Where what it sees ends, as in a Python slice; None: with the history.
        sampling_ratio: Share of the history that a training sample keeps, drawn anew in each epoch.
        seed: Of that draw.
        actions_without_loss: Ids of actions whose events are never to be predicted in training.
        unknown_rate: Share of the training samples whose value of a context becomes the unknown one, drawn anew for
            each context and epoch, and of the events whose action does; 0: there is no unknown value.
        met: Context -> which of its ids training meets, [vocab_size + 1] bool; to others the unknown value is given
            after training. Contexts that are left out have all been met.
        met_values: The same of categories of events, and of members of sets, which leave theirs.
        sessions: What parts events into sessions, ``DatasetArgs.sessions``.
        memory_room: Events before the last session of a sample, and of it, that stand around its memory tokens; None:
            these stand at a distance from the end, or there are none.
        whole_history: Whether training batches carry all items of their users.
    """

    task: Literal["ranking", "retrieval"]
    max_history: int
    max_candidates: int = 0
    contexts: tuple[str, ...] = ()
    user_features: tuple[str, ...] = ()
    event_features: tuple[str, ...] = ()
    label_features: tuple[str, ...] = ()
    use_actions: bool = True
    history_start: int | None = None
    history_end: int | None = None
    sampling_ratio: float = 1.0
    seed: int = 0
    actions_without_loss: tuple[int, ...] = ()
    whole_history: bool = False
    sessions: str | None = None
    memory_room: tuple[int, int] | None = None
    unknown_rate: float = 0.0
    met: dict[str, np.ndarray] = field(default_factory=dict)
    met_values: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def max_events(self) -> int:
        """Events of the longest sample: history and what is predicted after it."""
        return self.max_history + max(1, self.max_candidates)

    def __call__(self, dataset: Histories, split: Split, rows: np.ndarray, sample_ids: np.ndarray, step: int) -> Batch:
        """Collate samples ``rows`` [B] of ``split``; none makes one sample without events, never a batch of none."""
        training = split.name == "train"
        users = split.users[rows]
        events, is_target, targets = self.visible(dataset, split, rows)
        if training and self.sampling_ratio < 1:
            events, is_target = self._thin(events, is_target, targets, sample_ids)
        if rows.size == 0:
            users, sample_ids, targets = np.full(1, -1), np.full(1, -1), np.zeros(1, np.int64)
            events = _one_empty_sample(dataset.schema, events)
        candidates = targets if self.max_candidates or split.asked is not None else np.zeros_like(targets)
        recent = None
        if self.memory_room is not None:
            events, is_target, recent = self._fit_sessions(dataset.schema, events, is_target, candidates)
        predicted = {name: _label(events.of_events[name]) for name in self.label_features}
        events = self._known_at_request(dataset.schema, events, candidates if training else targets)
        if not training:
            events = self._met_alone(dataset.schema, events)
        mask, labels = self._labels(dataset, events, candidates, is_target, training)
        times = events.times if events.times is not None else np.zeros_like(events.items)
        return Batch(
            features=self._features(dataset, events, candidates, sample_ids if training else None),
            item=dataset.schema.item.name,
            label_events=torch.from_numpy(np.flatnonzero(mask)),
            labels=torch.from_numpy(labels),
            num_candidates=torch.from_numpy(candidates),
            timestamps=torch.from_numpy(times),
            users=torch.from_numpy(users),
            sample_ids=torch.from_numpy(sample_ids),
            step=step,
            recent=None if recent is None else torch.from_numpy(recent),
            whole_history=_whole_history(dataset, split, rows) if training and self.whole_history else None,
            numbers={
                name: torch.from_numpy(values)
                for name, values in self._declared(events)
                if isinstance(values, np.ndarray) and values.ndim == 2
            },
            set_lengths={
                name: torch.from_numpy(values.lengths)
                for name, values in self._declared(events)
                if isinstance(values, Sets) and name in self.event_features
            },
            targets={name: torch.from_numpy(values) for name, values in predicted.items()},
        )

    def visible(self, dataset: Histories, split: Split, rows: np.ndarray) -> tuple[Sequences, np.ndarray, np.ndarray]:
        """Return the events that samples ``rows`` [B] of ``split`` may see and those to be predicted.

        Returns:
            The events, E in all; which of them are the sample's own [E] bool; how many at the end of each sample are
            not history, [B].
        """
        users, stop, training = split.users[rows], split.stop[rows], split.name == "train"
        own = stop if split.first is None else stop - split.first[rows]
        targets = self._num_targets(stop, own, training) if split.asked is None else split.asked[rows]
        return *self._gather(dataset, users, stop, own, targets, training), targets

    def _num_targets(self, stop: np.ndarray, own: np.ndarray, training: bool) -> np.ndarray:
        """Return how many events at the end of each sample are not history, [B]; at most its ``own``."""
        if not training:
            return np.minimum(stop, 1)
        # At least one event stays history, unless there is only one.
        return np.minimum(self.max_candidates, np.minimum(own, np.where(stop > 1, stop - 1, stop)))

    def _gather(
        self,
        dataset: Histories,
        users: np.ndarray,
        stop: np.ndarray,
        own: np.ndarray,
        targets: np.ndarray,
        training: bool,
    ) -> tuple[Sequences, np.ndarray]:
        """Read the visible part of each history, and the targets; and which of these events are the sample's own."""
        history = stop - targets
        start, end = _slice(self.history_start, 0, history), _slice(self.history_end, history, history)
        # Where every event is trained on, the first has nothing to predict it from and comes on top.
        longest = self.max_history + int(training and self.max_candidates == 0)
        start = np.maximum(np.minimum(start, end), end - longest)
        bounds = np.stack([start, end, history, stop], axis=1).reshape(-1, 2)
        pieces = dataset.gather(
            np.repeat(users, 2),
            bounds[:, 0],
            bounds[:, 1],
            (
                *self.user_features,
                *self.event_features,
                *self.label_features,
                *session_column(self.sessions, dataset.schema),
            ),
        )
        events = replace(
            pieces,
            users=users,
            contexts={name: ids[::2] for name, ids in pieces.contexts.items()},
            of_users={name: take(values, np.arange(0, 2 * len(users), 2)) for name, values in pieces.of_users.items()},
            lengths=pieces.lengths.reshape(-1, 2).sum(axis=1),
        )
        # Own events that are not visible are the latest: those that history_end hides.
        visible = np.maximum(own - (history - end), targets)
        return events, _places(events.lengths)[1] < np.repeat(visible, events.lengths)

    def _thin(
        self, events: Sequences, is_target: np.ndarray, targets: np.ndarray, sample_ids: np.ndarray
    ) -> tuple[Sequences, np.ndarray]:
        """Keep each event of the history with probability ``sampling_ratio``, whatever rank holds the sample."""
        place, left = _places(events.lengths)
        keys = _mix(sample_ids.astype(np.uint64) + _mix(np.array([self.seed], np.uint64)))
        drawn = _mix(np.repeat(keys, events.lengths) + place.astype(np.uint64)) >> np.uint64(11)
        keep = (drawn < self.sampling_ratio * 2**53) | (left < np.repeat(targets, events.lengths))
        return _kept(events, keep), is_target[keep]

    def _fit_sessions(
        self, schema: Schema, events: Sequences, is_target: np.ndarray, candidates: np.ndarray
    ) -> tuple[Sequences, np.ndarray, np.ndarray]:
        """Drop old events that find no room before the memory; and return how many stand behind it, [B]."""
        assert self.sessions is not None and self.memory_room is not None
        asked = np.maximum(candidates, 1)  # as the model has it: without candidates, the last event is what is asked
        own = of_last_session(events, self.sessions, schema)
        before, behind = self.memory_room
        recent = np.clip(own - asked, 0, behind)
        keep = _places(events.lengths)[1] < np.repeat(asked + recent + before, events.lengths)
        return _kept(events, keep), is_target[keep], recent

    def _known_at_request(self, schema: Schema, events: Sequences, asked: np.ndarray) -> Sequences:
        """Blank what is known of the last ``asked`` [B] events of each sample only after they are asked about."""
        later = {f.name: f for f in schema.stored("event") if f.name in events.of_events and not f.known_at_request}
        if not later:
            return events
        lost = _places(events.lengths)[1] < np.repeat(asked, events.lengths)
        blank = {name: without(events.of_events[name], lost, feature) for name, feature in later.items()}
        return replace(events, of_events=events.of_events | blank)

    def _met_alone(self, schema: Schema, events: Sequences) -> Sequences:
        """Give the unknown value to what training never met, and leave it out of sets."""

        def met(values: dict[str, Values]) -> dict[str, Values]:
            names = values.keys() & self.met_values.keys()
            return values | {n: only(values[n], self.met_values[n], unknown_id(schema, n)) for n in names}

        return replace(events, of_events=met(events.of_events), of_users=met(events.of_users))

    def _declared(self, events: Sequences) -> list[tuple[str, Values]]:
        """Return the declared features to carry, in the order of their keys: those of events, then of users."""
        of_events = [(name, events.of_events[name]) for name in self.event_features]
        return of_events + [(name, events.of_users[name]) for name in self.user_features]

    def _labels(
        self,
        dataset: Histories,
        events: Sequences,
        candidates: np.ndarray,
        is_target: np.ndarray,
        training: bool,
    ) -> tuple[np.ndarray, np.ndarray]:
        _, left = _places(events.lengths)
        if training and self.actions_without_loss:
            is_target = is_target & ~self._left_out(dataset, events)
        if self.task == "retrieval":
            # The row of event j predicts event j + 1; the last event of a sample predicts nothing.
            mask = left > 0 if training else left == 1
            if training:
                mask[:-1] &= is_target[1:]
            return mask, events.items[np.flatnonzero(mask) + 1]
        if events.actions is None and not self.label_features:
            raise ValueError(f"data set {dataset.schema.name!r} has no action feature: ranking needs one to predict")
        if self.max_candidates or candidates.any():
            mask = left < np.repeat(candidates, events.lengths)
        else:
            mask = np.ones_like(left, dtype=bool) if training else left == 0
        if training:
            mask &= is_target
        return mask, events.items[mask] * 0 if events.actions is None else events.actions[mask]

    def _left_out(self, dataset: Histories, events: Sequences) -> np.ndarray:
        assert dataset.schema.action is not None and events.actions is not None, "ids of actions come from actions"
        table = np.zeros(dataset.schema.action.vocab_size or 0, dtype=bool)
        table[list(self.actions_without_loss)] = True
        return table[events.actions]

    def _contexts(self, dataset: Histories, events: Sequences, drawn_for: np.ndarray | None) -> list[np.ndarray]:
        """Return the ids of each context, those replaced that are drawn for samples ``drawn_for`` or were never met."""
        found = [events.contexts[name] for name in self.contexts]
        if self.unknown_rate == 0:
            for name, ids in zip(self.contexts, found, strict=True):
                if ids.size and ids.max() == unknown_id(dataset.schema, name):
                    raise ValueError(
                        f"data set {dataset.schema.name!r}: a user lacks a value of {name!r}, which needs the row for "
                        "unknown values: set FeatureArgs.unknown_rate above 0, or leave it out of "
                        "DatasetArgs.contextual_feature_names"
                    )
            return found
        for number, name in enumerate(self.contexts):
            unknown = unknown_id(dataset.schema, name)
            if drawn_for is None:
                lost = ~self.met[name][found[number]] if name in self.met else np.zeros(1, bool)
            else:
                lost = self._lost(drawn_for, 1 + number)
            found[number] = np.where(lost, unknown, found[number])
        return found

    def _actions(self, dataset: Histories, events: Sequences, drawn_for: np.ndarray | None) -> np.ndarray:
        """Return the ids of the actions, those replaced that are drawn for samples ``drawn_for``."""
        action = dataset.schema.action
        assert action is not None and events.actions is not None
        if self.unknown_rate == 0 or drawn_for is None:
            return events.actions
        place, _ = _places(events.lengths)
        keys = np.repeat(_mix(drawn_for.astype(np.uint64)), events.lengths) + place.astype(np.uint64)
        return np.where(self._lost(keys, 0x10000), unknown_id(dataset.schema, action.name), events.actions)

    def _lost(self, keys: np.ndarray, of: int) -> np.ndarray:
        """Return which of ``keys`` lose their value of feature ``of``, a share ``unknown_rate`` of them."""
        mixed = _mix(keys.astype(np.uint64) + _mix(np.array([self.seed + (of << 32)], np.uint64)))
        return (mixed >> np.uint64(11)) < self.unknown_rate * 2**53

    def _features(
        self, dataset: Histories, events: Sequences, candidates: np.ndarray, drawn_for: np.ndarray | None
    ) -> KeyedJaggedTensor:
        names, values, lengths = [*self.contexts], self._contexts(dataset, events, drawn_for), []
        for name in self.contexts:
            # One id a sample, but none for the sample that stands in for no samples.
            lengths.append(np.full(events.lengths.size, events.contexts[name].size // events.lengths.size))
        names.append(dataset.schema.item.name)
        values.append(events.items)
        lengths.append(events.lengths)
        if self.use_actions and dataset.schema.action is not None and events.actions is not None:
            names.append(dataset.schema.action.name)
            actions = self._actions(dataset, events, drawn_for)
            if candidates.any():
                _, left = _places(events.lengths)
                actions = actions[left >= np.repeat(candidates, events.lengths)]
            values.append(actions)
            lengths.append(events.lengths - candidates)
        for name, found in self._declared(events):
            if isinstance(found, Sets):
                values.append(found.ids)
                ends = _offsets(events.lengths) if name in self.event_features else slice(None)
                lengths.append(np.diff(found.offsets[ends]))
            elif found.ndim == 1:
                values.append(found)
                lengths.append(events.lengths)
            else:
                continue
            names.append(name)
        return keyed_features(
            names,
            torch.from_numpy(np.concatenate(values, dtype=np.int64)),
            torch.from_numpy(np.concatenate(lengths)),
            [value.size for value in values],
        )


def _label(values: Values) -> np.ndarray:
    assert isinstance(values, np.ndarray), "sets are no labels"
    return values.astype(np.int64 if values.ndim == 1 else np.float32, copy=False)


def _whole_history(dataset: Histories, split: Split, rows: np.ndarray) -> torch.Tensor:
    """Return all that training knows of the users of samples ``rows``: place of the sample and item of each, [2, H]."""
    known = (split.stop if split.known is None else split.known)[rows]
    events = dataset.gather(split.users[rows], np.zeros_like(known), known)
    return torch.from_numpy(np.stack([np.repeat(np.arange(rows.size), events.lengths), events.items]))


def _slice(bound: int | None, default: int | np.ndarray, length: np.ndarray) -> np.ndarray:
    """Resolve one bound of a Python slice for sequences of ``length`` [B]."""
    if bound is None:
        return np.broadcast_to(default, length.shape)
    return np.clip(bound if bound >= 0 else length + bound, 0, length)


def _offsets(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])


def _places(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return of each event how many of its sequence come before it, and how many after it, [T] each."""
    offsets = _offsets(lengths)
    index = np.arange(offsets[-1])
    return index - np.repeat(offsets[:-1], lengths), np.repeat(offsets[1:] - 1, lengths) - index


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble uint64 (the finaliser of splitmix64, Steele et al. 2014; products wrap around)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _kept(events: Sequences, keep: np.ndarray) -> Sequences:
    """Return the events [T] of which ``keep`` is true."""
    return replace(
        events,
        lengths=np.diff(np.concatenate([[0], np.cumsum(keep)])[_offsets(events.lengths)]),
        items=events.items[keep],
        actions=None if events.actions is None else events.actions[keep],
        times=None if events.times is None else events.times[keep],
        of_events={name: take(values, np.flatnonzero(keep)) for name, values in events.of_events.items()},
    )


def _one_empty_sample(schema: Schema, events: Sequences) -> Sequences:
    return Sequences(
        users=np.full(1, -1),
        contexts={name: np.empty(0, dtype=np.int64) for name in events.contexts},
        lengths=np.zeros(1, dtype=np.int64),
        items=events.items,
        actions=events.actions,
        times=events.times,
        of_users={f.name: missing(f, 1) for f in schema.stored("user") if f.name in events.of_users},
        of_events=events.of_events,
    )
