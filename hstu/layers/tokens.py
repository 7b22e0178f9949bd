"""The token stream: what the preprocessing makes and every backbone reads."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """T tokens of B samples: context, then history, then candidates; nothing padded.

    Attributes:
        values: [T, D].
        offsets: [B + 1] int64.
        num_context: [B] int64. Leading context tokens.
        num_candidates: [B] int64. Trailing candidate tokens.
        timestamps: [T] int64 seconds.
        event_rows: [E] int64. Row of each event's item token.
        tokens_per_event: Tokens of a history event (2 when items and actions are interleaved).
    """

    values: Tensor
    offsets: Tensor
    num_context: Tensor
    num_candidates: Tensor
    timestamps: Tensor
    event_rows: Tensor
    tokens_per_event: int

    def with_values(self, values: Tensor) -> Tokens:
        """Return the same stream with other values."""
        return replace(self, values=values)
