"""Retrieval by permuted items: hidden ones are predicted in a random order, each from the visible and those before."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu.config import Config
from hstu.data.batch import Batch, keyed_features
from hstu.data.schema import Schema
from hstu.layers.memory import Part
from hstu.layers.tokens import Stream
from hstu.models.lookup import RetrievalLookup
from hstu.models.masked import MaskedRetrievalModel
from hstu.ops import lengths_to_offsets, positions_in_sequence, sequence_ids, sequences_and_positions


@dataclass(frozen=True, kw_only=True)
class PermutedBatch(Batch):
    """A batch whose events stand in another order than in time, some of them twice.

    Attributes:
        from_end: [E] int64, events of the sample after each one, in time.
    """

    from_end: Tensor


class PermutedRetrievalModel(MaskedRetrievalModel):
    """Permuted language modelling (https://arxiv.org/abs/1906.08237) of runs of events.

    A training sample is ``[visible events | ? a ? b .. ?]``: its hidden events in a random order, each as the learned
    vector at its position, where it is predicted, and then as itself. Visible events attend to each other; what follows
    is in the place of candidates of one group, each of which attends to the visible ones and to those before it.
    Evaluation hides the one event after the history, which nothing of it attends to.
    """

    def __init__(self, config: Config, schema: Schema, *, allocate_tables: bool = True) -> None:
        super().__init__(config, schema, allocate_tables=allocate_tables)
        if config.network.is_hugging_face and not (self.backbone.takes_positions and self.backbone.takes_mask):
            what = "position_ids" if self.backbone.takes_mask else "mask but of padding"
            raise config.network.error("backbone", f"takes no {what}; RetrievalArgs.objective = 'permuted' needs "
                                       "an architecture that does")  # fmt: skip
        self.preprocess.max_tokens *= 2

    def training_batch(self, batch: Batch) -> Batch:
        """Hide runs of events, and put the hidden ones behind the others."""
        hidden, lengths = self._hidden(batch), batch.lengths(self.item)
        offsets, total = lengths_to_offsets(lengths), batch.num_events
        owner, place = sequences_and_positions(offsets, total)
        events = hidden.nonzero().squeeze(1)
        events = events[self._uniform(batch.sample_ids[owner[events]] * 2**20 + place[events], 3).argsort()]
        events = events[owner[events].argsort(stable=True)]
        number = torch.zeros_like(lengths).index_add(0, owner, hidden.long())
        rank = positions_in_sequence(lengths_to_offsets(number), events.numel())
        before = events[rank + 1 < number[owner[events]]]  # nothing is behind the last one that could read it
        visible = (~hidden).nonzero().squeeze(1)
        behind = lengths[owner[events]] + 2 * rank
        source = torch.cat([visible, events, before])
        order = torch.cat([place[visible], behind, behind[rank + 1 < number[owner[events]]] + 1])
        order = (owner[source] * 2**32 + order).argsort()
        is_asked = torch.zeros_like(source, dtype=torch.bool)
        is_asked[visible.numel() : visible.numel() + events.numel()] = True
        asked, source = is_asked[order].nonzero().squeeze(1), source[order]
        taken = self._taken(batch, source, lengths + (number - 1).clamp(min=0))
        taken = replace(taken, num_candidates=(2 * number - 1).clamp(min=0))
        taken = taken.with_labels(asked, batch.ids(self.item)[source[asked]])
        taken = self.with_shared_pool(taken)
        return PermutedBatch(**vars(taken), from_end=(lengths[owner] - 1 - place)[source])

    def scoring_request(self, batch: Batch) -> RetrievalLookup:
        """Hide the event after the labelled one of each sample, from the others too."""
        owner = sequence_ids(lengths_to_offsets(batch.lengths(self.item)), batch.num_events)
        asked = torch.zeros_like(batch.num_candidates).index_fill(0, owner[batch.label_events], 1)
        return super().scoring_request(replace(batch, num_candidates=asked))

    def whole_stream(self, batch: Batch, part: Part | None = None) -> Stream:
        stream = super().whole_stream(batch, part)
        layout, twice = stream.layout, (batch.num_candidates - 1).clamp(min=0) // 2
        total = stream.timestamps.numel()
        owner, place = sequences_and_positions(layout.offsets, total)
        positions = (layout.lengths - twice - 1)[owner] - place
        if isinstance(batch, PermutedBatch):
            positions = positions.index_copy(0, stream.event_rows, batch.from_end)
        return replace(stream, positions=positions)

    def _drawn(self, batch: Batch, offsets: Tensor, owner: Tensor) -> Tensor:
        """Hide a run of one to ``max_span_length`` events in each stretch of 1 / ``mask_probability`` times as many."""
        lengths, share = offsets.diff(), max(self.args.mask_probability, 1e-6)
        start, ends = torch.zeros_like(lengths), torch.zeros(batch.num_events + 1, dtype=torch.int64)
        for number in range(int(lengths.max()) if lengths.numel() else 0):
            if bool((start >= lengths).all()):
                break
            keys = batch.sample_ids * 2**20 + number
            run = 1 + (self._uniform(keys, 4) * self.args.max_span_length).long()
            stretch = torch.maximum((run / share).ceil().long(), run)
            first = start + (self._uniform(keys, 5) * (stretch - run + 1)).long()
            bounds = torch.stack([first, first + run]).minimum(lengths)
            ends.index_add_(0, offsets[:-1] + bounds[0], torch.ones_like(first))
            ends.index_add_(0, offsets[:-1] + bounds[1], -torch.ones_like(first))
            start = start + stretch
        return ends.cumsum(0)[:-1] > 0

    def _taken(self, batch: Batch, source: Tensor, lengths: Tensor) -> Batch:
        """Return ``batch`` with events ``source`` [E] in place of its own, ``lengths`` [B] of them in each sample."""
        names, sizes = [*batch.features.keys()], [*batch.features.length_per_key()]
        values = dict(zip(names, batch.features.values().split(sizes), strict=True))
        counts = dict(zip(names, batch.features.lengths().view(len(names), -1), strict=True))
        sets, numbers = dict(batch.set_lengths), dict(batch.numbers)
        owner = torch.repeat_interleave(lengths)
        for name in (self.item, *(feature.name for feature in self.feature_tokens.events.features)):
            if name in sets:
                own = sets[name]
                first = own.cumsum(0) - own
                sets[name] = own = own[source]
                of, start = torch.repeat_interleave(own), own.cumsum(0) - own
                values[name] = values[name][first[source][of] + torch.arange(of.numel()) - start[of]]
                counts[name] = torch.zeros_like(lengths).index_add(0, owner, own)
            elif name in values:
                values[name], counts[name] = values[name][source], lengths
            else:
                numbers[name] = numbers[name][source]
        features = keyed_features(
            names,
            torch.cat([values[name] for name in names]),
            torch.stack([counts[name].to(lengths.dtype) for name in names]),
            [values[name].numel() for name in names],
        )
        return replace(batch, features=features, timestamps=batch.timestamps[source], set_lengths=sets, numbers=numbers)
