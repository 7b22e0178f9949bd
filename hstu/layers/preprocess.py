"""Embeddings to the token stream: widths made equal, contexts in front, actions merged, candidates last."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from hstu.layers.mlp import MLP
from hstu.layers.positions import PositionEncoder
from hstu.layers.tokens import Tokens
from hstu.ops import concat_jagged, interleave_jagged, lengths_to_offsets, positions_in_sequence, sequence_ids


class Preprocess(nn.Module):
    """Builds ``[context | i1 a1 i2 a2 .. | candidates]`` and encodes positions.

    Args:
        hidden_size: D.
        widths: Width of each feature's embedding; one that is not D goes through a two-layer MLP.
        item: Item feature.
        action: Action feature, or None.
        contexts: Context features, in token order.
        layout: ``"interleave"`` (two tokens an event), ``"add"`` (their sum), ``"concat"`` (side by side through a
            matrix; of a candidate, zeros stand beside the item) or ``"item"``.
        positions: Encoder of the finished stream.
    """

    def __init__(
        self,
        hidden_size: int,
        widths: dict[str, int],
        *,
        item: str,
        action: str | None,
        contexts: tuple[str, ...],
        layout: Literal["interleave", "add", "concat", "item"],
        positions: PositionEncoder,
    ) -> None:
        super().__init__()
        self.item, self.action, self.contexts, self.layout = item, action, contexts, layout
        self.project = nn.ModuleDict(
            {
                name: MLP(width, (hidden_size, hidden_size), activation="silu")
                for name, width in widths.items()
                if width != hidden_size
            }
        )
        self.merge = nn.Linear(2 * hidden_size, hidden_size) if layout == "concat" else None
        self.positions = positions

    @property
    def tokens_per_event(self) -> int:
        """Tokens of a history event."""
        return 2 if self.layout == "interleave" else 1

    def forward(
        self,
        embedded: dict[str, Tensor],
        lengths: dict[str, Tensor],
        num_candidates: Tensor,
        timestamps: Tensor,
    ) -> Tokens:
        """Build the stream.

        Args:
            embedded: [ids of the feature, width] of each feature.
            lengths: [B] int64 of each feature.
            num_candidates: [B] int64.
            timestamps: [E] int64, of the events (history and candidates).

        Returns:
            The tokens, positions encoded.
        """
        # Under autocast a projection ends in bfloat16; the stream keeps the tables' precision.
        values = {n: self.project[n](x).to(x.dtype) if n in self.project else x for n, x in embedded.items()}
        item_offsets = lengths_to_offsets(lengths[self.item])
        events, event_offsets = self._events(values, lengths, item_offsets)
        parts = [(values[name], lengths_to_offsets(lengths[name])) for name in self.contexts]
        stream, offsets = concat_jagged([*parts, (events, event_offsets)])
        num_context = sum((lengths[name] for name in self.contexts), torch.zeros_like(num_candidates))
        rows = self._event_rows(offsets, num_context, item_offsets, lengths[self.item] - num_candidates, timestamps)
        tokens = Tokens(
            values=stream,
            offsets=offsets,
            num_context=num_context,
            num_candidates=num_candidates,
            timestamps=_token_times(timestamps, rows, offsets, num_context, stream.shape[0]),
            event_rows=rows,
            tokens_per_event=self.tokens_per_event,
        )
        encoded: Tokens = self.positions(tokens)
        return encoded

    def _events(
        self, values: dict[str, Tensor], lengths: dict[str, Tensor], item_offsets: Tensor
    ) -> tuple[Tensor, Tensor]:
        items = values[self.item]
        if self.action is None:
            return items, item_offsets
        actions, action_offsets = values[self.action], lengths_to_offsets(lengths[self.action])
        if self.layout == "interleave":
            return interleave_jagged(items, item_offsets, actions, action_offsets)
        sequence = sequence_ids(action_offsets, actions.shape[0])
        rows = item_offsets[sequence] + positions_in_sequence(action_offsets, actions.shape[0])
        if self.merge is None:
            return items.index_add(0, rows, actions.to(items.dtype)), item_offsets
        beside = torch.zeros_like(items).index_copy(0, rows, actions.to(items.dtype))
        return self.merge(torch.cat([items, beside], 1)), item_offsets

    def _event_rows(
        self,
        offsets: Tensor,
        num_context: Tensor,
        item_offsets: Tensor,
        num_history: Tensor,
        timestamps: Tensor,
    ) -> Tensor:
        total = timestamps.shape[0]
        sequence, place = sequence_ids(item_offsets, total), positions_in_sequence(item_offsets, total)
        history = torch.minimum(place, num_history[sequence])
        return offsets[sequence] + num_context[sequence] + place + (self.tokens_per_event - 1) * history


def _token_times(timestamps: Tensor, rows: Tensor, offsets: Tensor, num_context: Tensor, total: int) -> Tensor:
    """Give each token the time of its event, and context tokens that of the first event after them, [T] int64."""
    if timestamps.numel() == 0:
        return timestamps.new_zeros(total)
    token = torch.arange(total, device=rows.device)
    is_context = positions_in_sequence(offsets, total) < num_context[sequence_ids(offsets, total)]
    own, following = torch.searchsorted(rows, token, right=True) - 1, torch.searchsorted(rows, token)
    return timestamps[torch.where(is_context, following, own).clamp(0, rows.numel() - 1)]
