"""A trained model as modules of tensors alone, of which ``torch.export`` makes programs."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hstu.data.batch import Batch
from hstu.layers.similarity import MixtureOfLogits
from hstu.models import RankingModel, RetrievalModel


class Program(nn.Module):
    """A model over tables that are given, one output for each event that is asked about.

    Args:
        model: The model, without tables of its own.
        columns: What ``export.json`` says of the columns of a log.
        asks_candidates: Whether what is asked about stands behind the history, rather than as its last event.
    """

    def __init__(
        self, model: RankingModel | RetrievalModel, columns: dict[str, dict[str, Any]], *, asks_candidates: bool
    ) -> None:
        super().__init__()
        self.model, self.columns, self.asks_candidates = model, columns, asks_candidates
        blocks = model.preprocess.blocks
        self.context_tokens = len(model.preprocess.contexts) + (blocks.num_tokens if blocks else 0)

    def forward(
        self,
        tables: dict[str, Tensor],
        columns: dict[str, list[Tensor]],
        past: Tensor,
        asked: Tensor,
        lengths: Tensor,
        candidates: Tensor,
        longest: Tensor,
    ) -> Tensor:
        """Return what scores items, or predictions, [L, ..], of B histories with E events in all.

        Args:
            tables: [rows, width] float32 of each column of words or sets.
            columns: Times [E] int64; ids [E] or [B] int64; of sets ids [N] and how many each has, [E] or [B]; or
                numbers [E, width] or [B, width], NaN where missing. Histories stand one after the other, each with
                what is asked about as its last events.
            past: Places of the events that are not asked about, [E - L] int64, ascending.
            asked: Places of those that are, [L] int64, ascending.
            lengths: Events of each history with what is asked about, [B] int64.
            candidates: How many of these are asked about, [B] int64.
            longest: Any tensor with as many entries as the longest history has events with what is asked about.
        """
        model = self.model
        model.preprocess.max_tokens = self.context_tokens + model.preprocess.tokens_per_event * longest.shape[0]
        rows, sizes, numbers, sets, times = {}, {}, {}, {}, torch.zeros_like(columns[self._item][0])
        for column, own in self.columns.items():
            name, values, each = own["feature"], columns[column][0], torch.ones_like(lengths)
            if own["kind"] == "time":
                times = values
            elif own["kind"] == "set":
                each = columns[column][1]
                if own["of"] == "event":
                    sets[name], each = each, _sums(each, lengths)
            elif own["kind"] != "word":
                numbers[name] = values
            elif own["of"] == "event":
                each = lengths
                if name == model.feature_tokens.action and self.asks_candidates:
                    values, each = values[past], lengths - candidates
            if own["rows"]:
                rows[name], sizes[name] = tables[column][values], each
        batch = Batch(
            features=cast(Any, _Rows(rows, sizes)),
            item=model.feature_tokens.item,
            label_events=asked if isinstance(model, RankingModel) else (asked - 1).clamp(min=0),
            labels=asked,
            num_candidates=candidates * self.asks_candidates,
            timestamps=times,
            users=lengths,
            sample_ids=lengths,
            step=0,
            numbers=numbers,
            set_lengths=sets,
        )
        request = model.scoring_request(batch)
        hidden = model.encode(rows, request)
        if isinstance(model, RankingModel):
            return model.predictions_of(hidden)
        return model.query_vectors(hidden)

    @property
    def _item(self) -> str:
        return next(name for name, own in self.columns.items() if own["feature"] == self.model.feature_tokens.item)


def _sums(values: Tensor, lengths: Tensor) -> Tensor:
    """Return the sums of ``values`` over pieces of ``lengths``, [B]."""
    return F.pad(values.cumsum(0), (1, 0))[lengths.cumsum(0)].diff(prepend=lengths.new_zeros(1))


class _Rows:
    """What a model asks of a keyed jagged tensor whose values are looked up already."""

    def __init__(self, rows: dict[str, Tensor], lengths: dict[str, Tensor]) -> None:
        self._rows, self._lengths = rows, lengths

    def keys(self) -> list[str]:
        return [*self._rows]

    def length_per_key(self) -> list[int]:
        return [own.shape[0] for own in self._rows.values()]

    def __getitem__(self, name: str) -> _Rows:
        return _Rows({name: self._rows[name]}, {name: self._lengths[name]})

    def lengths(self) -> Tensor:
        (own,) = self._lengths.values()
        return own


class Similarity(nn.Module):
    """The scores of queries [Q, ..] against items [n, ..], [Q, n]."""

    def __init__(self, model: RetrievalModel) -> None:
        super().__init__()
        self.similarity = model.similarity

    def forward(self, queries: Tensor, items: Tensor) -> Tensor:
        """Score all of them at once."""
        if isinstance(self.similarity, MixtureOfLogits):
            return self.similarity.mix(queries, items[None])[0]
        return self.similarity.scores(queries, items)
