"""What a batch asks of the tables: known from its ids alone, before any table is asked."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from hstu.data.batch import Batch, KeyedJaggedTensor
from hstu.layers.tokens import Stream


@dataclass(frozen=True, kw_only=True)
class Lookup:
    """One batch on its device: what to look up, and what else the loss or the scores need.

    Attributes:
        batch: The samples, with only those labels whose rows are local.
        stream: Their tokens, and which of them are local.
        rows: [L] int64. Place among the local tokens of the row that each label is scored in.
        values: Ids to look up and numbers, of local tokens alone.
    """

    batch: Batch
    stream: Stream
    rows: Tensor
    values: Batch

    @property
    def features(self) -> KeyedJaggedTensor:
        """Ids to look up."""
        return self.values.features

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of all of it alive until ``stream`` is done with it."""
        for value in _tensors(self, set()):
            value.record_stream(stream)


@dataclass(frozen=True, kw_only=True)
class RetrievalLookup(Lookup):
    """A lookup whose labels are told apart from other items.

    Attributes:
        targets: [L] int64. The event that each label is the item of.
        pool_ids: [P] int64. Items that labels are scored against.
        columns: [L, N] int64, those of the pool that count for each label; None: all of them.
        live: [L] bool, the labels that have a negative; None where that is not asked.
        counted: [L] bool, the labels that are some, see ``hstu.models.padding``; None: all of them.
        stocked: [P] bool, the places of the pool that hold an item, likewise.
    """

    targets: Tensor
    pool_ids: Tensor
    columns: Tensor | None = None
    live: Tensor | None = None
    counted: Tensor | None = None
    stocked: Tensor | None = None


def _tensors(value: Any, met: set[int]) -> Iterator[Any]:
    """Yield the tensors in ``value``, its fields and what they keep."""
    if isinstance(value, (Tensor, KeyedJaggedTensor)):
        yield value
    elif id(value) not in met:
        met.add(id(value))
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
        for part in vars(value).values() if is_dataclass(value) else parts:
            yield from _tensors(part, met)
