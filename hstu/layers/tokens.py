"""The token stream: what the preprocessing makes and every backbone reads."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Where T tokens of B samples lie: context, then history, then candidates; nothing padded.

    Attributes:
        offsets: [B + 1] int64.
        num_context: [B] int64. Leading context tokens.
        num_candidates: [B] int64. Trailing candidate tokens.
        timestamps: [T] int64 seconds.
        event_rows: [E] int64. Row of each event's item token.
        tokens_per_event: Tokens of a history event (2 when items and actions are interleaved).
        feature_rows: Of each feature, the row that each of its values stands in, [n] int64.
        held: [t] int64, ascending within a sample: the rows whose values are here; None: all of them, t = T.
        where: [T] int64, where each row lies among those held, -1 for one that is not; None if all are.
    """

    offsets: Tensor
    num_context: Tensor
    num_candidates: Tensor
    timestamps: Tensor
    event_rows: Tensor
    tokens_per_event: int
    feature_rows: dict[str, Tensor] = field(default_factory=dict)
    held: Tensor | None = None
    where: Tensor | None = None

    @property
    def num_held(self) -> int:
        """Number t of the rows held."""
        return (self.timestamps if self.held is None else self.held).numel()

    def holding(self, rows: Tensor) -> Self:
        """Return this stream with the values of ``rows`` [t] alone."""
        where = torch.full_like(self.timestamps, -1)
        where[rows] = torch.arange(rows.numel(), device=rows.device)
        return replace(self, held=rows, where=where)

    def of_held(self, values: Tensor) -> Tensor:
        """Return the entries of ``values`` [T, ..] that belong to the rows held, [t, ..]."""
        return values if self.held is None else values[self.held]

    def places(self, rows: Tensor) -> Tensor:
        """Return where ``rows`` [n] lie among those held, [n] int64; -1 for one that is not."""
        return rows if self.where is None else self.where[rows]

    def holds(self, feature: str) -> Tensor:
        """Return which values of ``feature`` stand in a row held, [n] bool."""
        return self.places(self.feature_rows[feature]) >= 0


@dataclass(frozen=True, kw_only=True)
class Tokens(Stream):
    """A stream and its values.

    Attributes:
        values: [t, D].
    """

    values: Tensor

    def with_values(self, values: Tensor) -> Tokens:
        """Return the same stream with other values."""
        return replace(self, values=values)
