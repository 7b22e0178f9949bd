"""The token stream: what the preprocessing makes and every backbone maps to hidden states."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from hstu.ops import Layout

if TYPE_CHECKING:
    from hstu.layers.cache import Past


@dataclass(frozen=True, kw_only=True)
class Stream:
    """T tokens of B samples: context, then history, then candidates; nothing padded.

    Attributes:
        layout: Where the tokens lie, with context, candidates and timestamps; layers keep there what they plan.
        event_rows: [E] int64. Row of each event's item token.
        tokens_per_event: Tokens of a history event (2 when items and actions are interleaved).
        feature_rows: Of each feature, the row that each of its values stands in, [n] int64.
        memory: [M] int64 both: rows of the memory tokens, and which of the learned tokens they are; None for none.
        memory_after: [E] int64, memory tokens between an event and the next; None for none.
        positions: [T] int64, position of each token where its place in the sample is not its position; else None.
        local: [t] int64, ascending within a sample: the rows whose values this rank has; None: all of them, t = T.
        where: [T] int64, where each row lies among the local ones, -1 for one that does not; None if all are local.
    """

    layout: Layout
    event_rows: Tensor
    tokens_per_event: int
    feature_rows: dict[str, Tensor] = field(default_factory=dict)
    memory: tuple[Tensor, Tensor] | None = None
    memory_after: Tensor | None = None
    positions: Tensor | None = None
    local: Tensor | None = None
    where: Tensor | None = None

    @property
    def timestamps(self) -> Tensor:
        """[T] int64 seconds."""
        assert self.layout.timestamps is not None
        return self.layout.timestamps

    @property
    def num_local(self) -> int:
        """Number t of the local rows."""
        return (self.timestamps if self.local is None else self.local).numel()

    def shard(self, rows: Tensor) -> Self:
        """Return this stream with the values of ``rows`` [t] alone."""
        where = torch.full_like(self.timestamps, -1)
        where[rows] = torch.arange(rows.numel(), device=rows.device)
        return replace(self, local=rows, where=where)

    def of_local(self, values: Tensor) -> Tensor:
        """Return the entries of ``values`` [T, ..] that belong to the local rows, [t, ..]."""
        return values if self.local is None else values[self.local]

    def places(self, rows: Tensor) -> Tensor:
        """Return where ``rows`` [n] lie among the local ones, [n] int64; -1 for one that does not."""
        return rows if self.where is None else self.where[rows]

    def is_local(self, feature: str) -> Tensor:
        """Return which values of ``feature`` stand in a local row, [n] bool."""
        return self.places(self.feature_rows[feature]) >= 0


@dataclass(frozen=True, kw_only=True)
class Tokens(Stream):
    """A stream and its values.

    Attributes:
        values: [t, D].
        past: What stands in front of these tokens; None for nothing.
    """

    values: Tensor
    past: Past | None = None

    def behind(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return the keys and values that a layer attends to, from its own [t, H, d], and their layout as an option."""
        if self.past is None:
            return k, v, {}
        return *self.past.join(k, v), {"keys": self.past.keys}

    def with_values(self, values: Tensor) -> Tokens:
        """Return the same stream with other values."""
        return replace(self, values=values)
