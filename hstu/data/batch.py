"""One training or evaluation batch: ragged features, the rows that carry a label, and their labels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hstu.quiet import silence_known_notices

silence_known_notices()

from torchrec.sparse.jagged_tensor import KeyedJaggedTensor  # noqa: E402
from torchrec.streamable import Pipelineable  # noqa: E402

POOL = "__pool__"
"""Feature of item ids that no sample owns: negatives, or the whole catalogue."""
_BY_FEATURE = ("numbers", "set_lengths", "targets")


@dataclass(frozen=True, kw_only=True)
class Batch(Pipelineable):
    """B samples with E item events in all, nothing padded.

    Attributes:
        features: Keys in a fixed order: one per context feature (one id a sample), the item feature
            (history, then candidates), the action feature (history only) if used, declared features (ids of all E
            events, or the sets of the samples' users) and for retrieval ``POOL``. int64 ids.
        item: Key of the item feature.
        label_events: [L] int64, ascending. Events whose row carries a label. Ranking: the event that is scored.
            Retrieval: the event before the one to be predicted. Made on the host: a device would be waited for.
        labels: [L] int64. Ranking: action ids. Retrieval: item ids.
        num_candidates: [B] int64. Trailing events of each sample that are candidates.
        timestamps: [E] int64 seconds; zeros for a data set without time.
        users: [B] int64. Row of each sample's user in the data set.
        sample_ids: [B] int64. Identity of each sample in the run, whatever rank holds it.
        step: Number of the global batch in the run.
        recent: [B] int64, events before what is asked for that stand behind the memory tokens; None: as many as fit.
        whole_history: [2, H] int64, place of the sample and item id of all that training knows of the samples' users;
            None unless the loss asks for it.
        numbers: Numeric feature or vector -> float32, [E, width] of events or [B, width] of users, NaN where missing.
        set_lengths: Feature whose value is a set, one for each event -> ids of each event's, [E] int64.
        targets: Feature that is predicted -> its values of all events, ids [E] int64 or numbers [E, width].
        pool: [P] int64, distinct labels of all ranks, where they are to be told apart from each other; else None.
    """

    features: KeyedJaggedTensor
    item: str
    label_events: Tensor
    labels: Tensor
    num_candidates: Tensor
    timestamps: Tensor
    users: Tensor
    sample_ids: Tensor
    step: int
    recent: Tensor | None = None
    whole_history: Tensor | None = None
    numbers: dict[str, Tensor] = field(default_factory=dict)
    set_lengths: dict[str, Tensor] = field(default_factory=dict)
    targets: dict[str, Tensor] = field(default_factory=dict)
    pool: Tensor | None = None

    @property
    def num_samples(self) -> int:
        """B."""
        return self.users.numel()

    def ids(self, feature: str) -> Tensor:
        """Return the ids of ``feature``, [sum of its lengths] int64."""
        return self.features[feature].values()

    def lengths(self, feature: str) -> Tensor:
        """Return the number of ids of ``feature`` in each sample, [B] int64."""
        return self.features[feature].lengths()

    @property
    def num_events(self) -> int:
        """E."""
        return self.timestamps.numel()

    def with_labels(self, label_events: Tensor, labels: Tensor) -> Batch:
        """Return this batch with the labels of other events."""
        return replace(self, label_events=label_events, labels=labels)

    def with_pool(self, ids: Tensor) -> Batch:
        """Return this batch with ``ids`` [P] looked up beside its own features, under ``POOL``.

        One lookup for both matters: a table steps once per lookup in the backward pass.
        """
        names = self.features.keys()
        lengths = self.features.lengths().view(len(names), -1)
        pool = torch.zeros_like(lengths[:1])
        pool[0, 0] = ids.numel()  # any sample may carry them: the collator never makes a batch of none
        sizes = [*self.features.length_per_key(), ids.numel()]
        features = keyed_features(
            [*names, POOL], torch.cat([self.features.values(), ids]), torch.cat([lengths, pool]), sizes
        )
        return replace(self, features=features)

    def only(self, kept: dict[str, Tensor]) -> Batch:
        """Return this batch with only the values of each feature for which ``kept`` [n] bool is true, to look up."""
        names, values, lengths = self.features.keys(), [], []
        for name in names:
            starts = torch.cat([kept[name].new_zeros(1, dtype=torch.int64), kept[name].cumsum(0)])
            ends = self.lengths(name).cumsum(0)
            values.append(self.ids(name)[kept[name]])
            lengths.append(starts[ends].diff(prepend=starts[:1]))
        sizes = [own.numel() for own in values]
        return replace(self, features=keyed_features(names, torch.cat(values), torch.stack(lengths), sizes))

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Copy to ``device``."""
        return self._map(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Copy to page-locked memory."""
        return self._map(lambda value: value.pin_memory())

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory alive until ``stream`` is done with it."""
        every = (*vars(self).values(), *(value for name in _BY_FEATURE for value in getattr(self, name).values()))
        for value in every:
            if isinstance(value, (Tensor, KeyedJaggedTensor)):
                value.record_stream(stream)

    def _map(self, function) -> Batch:  # type: ignore[no-untyped-def]
        """Return this batch with ``function`` of each tensor and jagged tensor."""
        changed: dict[str, Any] = {
            name: function(value)
            for name, value in vars(self).items()
            if isinstance(value, (Tensor, KeyedJaggedTensor))
        }
        for name in _BY_FEATURE:
            changed[name] = {feature: function(value) for feature, value in getattr(self, name).items()}
        return replace(self, **changed)


def keyed_features(keys: list[str], values: Tensor, lengths: Tensor, sizes: list[int]) -> KeyedJaggedTensor:
    """Build a KJT whose per-key sizes are known on the host, so that splitting it never syncs a device."""
    return KeyedJaggedTensor(keys=keys, values=values, lengths=lengths.reshape(-1), length_per_key=sizes)
