"""Events of some users to one ``Batch``: which are history, which carry a label, what the label is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from hstu.data.batch import Batch, keyed_features
from hstu.data.reader import SequenceDataset, Sequences
from hstu.data.splits import Split


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Makes batches of one task.

    Attributes:
        task: What the labels are: the actions of the labelled events, or the items after them.
        max_history: Most recent events kept in front of the ones to be predicted.
        max_candidates: Trailing events of a training sample that are candidates; 0: none, every event of
            the history carries a label.
        contexts: Context features to carry.
        use_actions: Whether the history's actions are inputs.
    """

    task: Literal["ranking", "retrieval"]
    max_history: int
    max_candidates: int = 0
    contexts: tuple[str, ...] = ()
    use_actions: bool = True

    @property
    def max_events(self) -> int:
        """Events of the longest sample: history and what is predicted after it."""
        return self.max_history + max(1, self.max_candidates)

    def __call__(
        self, dataset: SequenceDataset, split: Split, rows: np.ndarray, sample_ids: np.ndarray, step: int
    ) -> Batch:
        """Collate samples ``rows`` [B] of ``split``; none makes one sample without events, never a batch of none."""
        training = split.name == "train"
        window = self.max_events if training else self.max_history + 1
        users, stop = split.users[rows], split.stop[rows]
        events = dataset.gather(users, np.maximum(stop - window, 0), stop)
        if rows.size == 0:
            users, sample_ids = np.full(1, -1), np.full(1, -1)
            events = _one_empty_sample(events)
        candidates = self._num_candidates(events.lengths, training)
        mask, labels = self._labels(dataset, events, candidates, training)
        times = events.times if events.times is not None else np.zeros_like(events.items)
        return Batch(
            features=self._features(dataset, events, candidates),
            item=dataset.schema.item.name,
            label_mask=torch.from_numpy(mask),
            labels=torch.from_numpy(labels),
            num_candidates=torch.from_numpy(candidates),
            timestamps=torch.from_numpy(times),
            users=torch.from_numpy(users),
            sample_ids=torch.from_numpy(sample_ids),
            step=step,
        )

    def _num_candidates(self, lengths: np.ndarray, training: bool) -> np.ndarray:
        if self.max_candidates == 0:
            return np.zeros_like(lengths)
        # At least one event stays history, unless there is only one.
        wanted = self.max_candidates if training else 1
        return np.minimum(wanted, np.where(lengths > 1, lengths - 1, lengths))

    def _labels(
        self, dataset: SequenceDataset, events: Sequences, candidates: np.ndarray, training: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        ends = np.cumsum(events.lengths)
        mask = np.zeros(events.items.size, dtype=bool)
        if self.task == "retrieval":
            # The row of event j predicts event j + 1; the last event of a sample predicts nothing.
            last, before = ends[events.lengths > 0] - 1, ends[events.lengths > 1] - 2
            mask[before] = True
            if training:
                mask[:] = True
                mask[last] = False
            return mask, events.items[np.flatnonzero(mask) + 1]
        if events.actions is None:
            raise ValueError(f"data set {dataset.schema.name!r} has no action feature: ranking needs one to predict")
        if self.max_candidates:
            place = np.arange(events.items.size) - np.repeat(ends - events.lengths, events.lengths)
            mask = place >= np.repeat(events.lengths - candidates, events.lengths)
        elif training:
            mask[:] = True
        else:
            mask[ends[events.lengths > 0] - 1] = True
        return mask, events.actions[mask]

    def _features(self, dataset: SequenceDataset, events: Sequences, candidates: np.ndarray):  # type: ignore[no-untyped-def]
        names, values, lengths = [], [], []
        for name in self.contexts:
            names.append(name)
            values.append(events.contexts[name])
            # One id a sample, but none for the sample that stands in for no samples.
            lengths.append(np.full(events.lengths.size, events.contexts[name].size // events.lengths.size))
        names.append(dataset.schema.item.name)
        values.append(events.items)
        lengths.append(events.lengths)
        if self.use_actions and dataset.schema.action is not None and events.actions is not None:
            place = np.arange(events.items.size) - np.repeat(np.cumsum(events.lengths) - events.lengths, events.lengths)
            history = place < np.repeat(events.lengths - candidates, events.lengths)
            names.append(dataset.schema.action.name)
            values.append(events.actions[history])
            lengths.append(events.lengths - candidates)
        return keyed_features(
            names,
            torch.from_numpy(np.concatenate(values)),
            torch.from_numpy(np.concatenate(lengths)),
            [value.size for value in values],
        )


def _one_empty_sample(events: Sequences) -> Sequences:
    return Sequences(
        users=np.full(1, -1),
        contexts={name: np.empty(0, dtype=np.int64) for name in events.contexts},
        lengths=np.zeros(1, dtype=np.int64),
        items=events.items,
        actions=events.actions,
        times=events.times,
    )
