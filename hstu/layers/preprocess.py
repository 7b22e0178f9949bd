"""Embeddings to the token stream: widths made equal, contexts in front, actions merged, candidates last."""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn

from hstu.layers.feature_encoders import ByFeature
from hstu.layers.memory import MemoryBlocks, Part, PlacedMemory
from hstu.layers.mlp import MLP
from hstu.layers.positions import PositionEncoder
from hstu.layers.tokens import Stream, Tokens
from hstu.ops import Layout, lengths_to_offsets, sequence_ids, sequences_and_positions

MEMORY_STD = 0.02
_MEMORY = "__memory__"


class Preprocess(nn.Module):
    """Builds ``[context | i1 a1 i2 a2 .. | candidates]``, blocks of memory between events, and encodes positions.

    Args:
        hidden_size: D.
        widths: Width of each feature's embedding; one that is not D goes through a two-layer MLP.
        item: Item feature.
        action: Action feature, or None.
        contexts: Context features, in token order.
        layout: ``"interleave"`` (two tokens an event), ``"add"`` (their sum), ``"concat"`` (side by side through a
            matrix; of a candidate, zeros stand beside the item) or ``"item"``.
        positions: Encoder of the finished stream.
        max_tokens: Bound on the tokens of one sample, for lengths that are not in host memory.
        memory: Blocks of memory tokens, or None.
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
        max_tokens: int,
        memory: MemoryBlocks | None = None,
    ) -> None:
        super().__init__()
        self.item, self.action, self.contexts, self.layout = item, action, contexts, layout
        self.project = ByFeature(
            {
                name: MLP(width, (hidden_size, hidden_size), activation="silu")
                for name, width in widths.items()
                if width != hidden_size
            }
        )
        self.merge = nn.Linear(2 * hidden_size, hidden_size) if layout == "concat" else None
        self.positions, self.max_tokens, self.blocks = positions, max_tokens, memory
        self.memory: nn.Parameter | None = None
        if memory is not None:  # before positions are added, the same for all samples
            self.memory = nn.Parameter(torch.empty(memory.num_tokens, hidden_size))
            nn.init.trunc_normal_(self.memory, std=MEMORY_STD, a=-2 * MEMORY_STD, b=2 * MEMORY_STD)

    @property
    def tokens_per_event(self) -> int:
        """Tokens of a history event."""
        return 2 if self.layout == "interleave" else 1

    def layout_of(self, lengths: dict[str, Tensor], num_candidates: Tensor) -> Layout:
        """Return where the tokens of samples of such ``lengths`` lie, in host memory and without memory tokens."""
        assert self.blocks is None
        offsets = lengths_to_offsets(_sum(lengths, self.item, *self._beside_items))
        return Layout(offsets, num_context=self._num_context(lengths), num_candidates=num_candidates)

    @property
    def is_bare(self) -> bool:
        """Whether the tokens are the events: one of each, and no others."""
        return self.tokens_per_event == 1 and not self.contexts and self.blocks is None

    @property
    def _beside_items(self) -> tuple[str, ...]:
        """Features that have tokens of their own, beside items."""
        return self.contexts if self.action is None or self.layout != "interleave" else (*self.contexts, self.action)

    def _num_context(self, lengths: dict[str, Tensor]) -> Tensor | None:
        return _sum(lengths, *self.contexts) if self.contexts else None

    def stream(
        self,
        lengths: dict[str, Tensor],
        sizes: dict[str, int],
        num_candidates: Tensor,
        timestamps: Tensor,
        part: Part | None = None,
        recent: Tensor | None = None,
    ) -> Stream:
        """Lay out the stream of a batch, without its values.

        Args:
            lengths: [B] int64 of each feature.
            sizes: Their sums, known on the host.
            num_candidates: [B] int64.
            timestamps: [E] int64, of the events (history and candidates).
            part: What of its samples the batch has; None: all of them, and one event to be predicted after each.
            recent: [B] int64, events of the last session of each history, if memory stands where it begins.
        """
        events, item_offsets = timestamps.shape[0], lengths_to_offsets(lengths[self.item])
        num_context, placed = self._num_context(lengths), None
        if self.blocks is not None:
            history = (lengths[self.item] - num_candidates.clamp(min=1)).clamp(min=0)
            part = part or self.blocks.whole(history, recent)
            placed = PlacedMemory(self.blocks, part, item_offsets, events)
        total = events + sum(sizes[name] for name in self._beside_items)
        if self.is_bare:
            offsets, event_rows = item_offsets, torch.arange(events, device=item_offsets.device)
        else:
            tokens = _sum(lengths, self.item, *self._beside_items)
            tokens = tokens if placed is None else tokens + placed.tokens_per_sample
            offsets = lengths_to_offsets(tokens)
            history = lengths[self.item] - num_candidates
            event_rows = self._event_rows(offsets, num_context, item_offsets, history, events)
        if placed is not None:
            event_rows = event_rows + placed.before
            total += placed.tokens_per_sample * num_candidates.numel()
        rows, first = {self.item: event_rows}, offsets[:-1]
        for name in self.contexts:
            rows[name] = _rows_from(first, lengths[name], sizes[name])
            first = first + lengths[name]
        if self.action is not None:
            of_event = event_rows[_rows_from(item_offsets[:-1], lengths[self.action], sizes[self.action])]
            rows[self.action] = of_event + 1 if self.tokens_per_event > 1 else of_event
        own = is_first = None
        if not self.is_bare:
            own, is_first = _events_of(event_rows, item_offsets, offsets, total)
        bounded = offsets.device.type != "cpu" or torch.compiler.is_exporting()  # lengths are not read
        layout = Layout(
            offsets,
            max_seqlen=self.max_tokens if bounded else None,
            num_context=num_context,
            num_candidates=num_candidates,
            timestamps=timestamps if own is None else _token_times(timestamps, own),
        )
        stream = Stream(
            layout=layout,
            event_rows=event_rows,
            tokens_per_event=self.tokens_per_event,
            feature_rows=rows,
        )
        return stream if placed is None or own is None or is_first is None else placed.put(stream, own, is_first)

    def forward(self, embedded: dict[str, Tensor], stream: Stream) -> Tokens:
        """Fill the stream and encode positions.

        Args:
            embedded: [n, width] of each feature: of all its values, or of those in the local rows of ``stream``.
            stream: Of the batch.
        """
        # Under autocast a projection ends in bfloat16; the stream keeps the tables' precision.
        values = {name: self.project(name, x).to(x.dtype) for name, x in embedded.items()}
        places = {name: stream.places(stream.feature_rows[name]) for name in values}
        if stream.memory is not None and self.memory is not None:
            places[_MEMORY], token = stream.places(stream.memory[0]), stream.memory[1]
            token = token if stream.local is None else token[places[_MEMORY] >= 0]
            values[_MEMORY] = self.memory.to(values[self.item].dtype)[token]
        if stream.local is not None:
            places = {name: own[own >= 0] for name, own in places.items()}
        added = None if self.action is None or self.layout == "interleave" else values.pop(self.action)
        x = torch.cat(list(values.values())) if len(values) > 1 else values[self.item]
        if not self.is_bare or stream.local is not None:
            rows = torch.cat([places[name] for name in values])
            x = x.new_zeros(stream.num_local, x.shape[1]).index_copy(0, rows, x)
        if added is not None and self.action is not None:
            x = self._merge(x, added.to(x.dtype), places[self.action], places[self.item])
        encoded: Tokens = self.positions(Tokens(**vars(stream), values=x))
        return encoded

    def _merge(self, x: Tensor, actions: Tensor, places: Tensor, item_places: Tensor) -> Tensor:
        """Put the actions into the rows of their items: added, or side by side through the matrix."""
        if self.merge is None:
            return x.index_add(0, places, actions)
        beside = torch.zeros_like(x).index_copy(0, places, actions)
        merged = self.merge(torch.cat([x, beside], 1)[item_places])
        return x.index_copy(0, item_places, merged.to(x.dtype))

    def _event_rows(
        self, offsets: Tensor, num_context: Tensor | None, item_offsets: Tensor, num_history: Tensor, total: int
    ) -> Tensor:
        sequence, place = sequences_and_positions(item_offsets, total)
        first = offsets[:-1] if num_context is None else offsets[:-1] + num_context
        rows = first[sequence] + place
        return rows if self.tokens_per_event == 1 else rows + torch.minimum(place, num_history[sequence])


def _sum(lengths: dict[str, Tensor], *names: str) -> Tensor:
    return reduce(torch.add, [lengths[name] for name in names])


def _rows_from(first: Tensor, lengths: Tensor, total: int) -> Tensor:
    """Count up from ``first`` [B] in each sample, ``lengths`` [B] times: [total] int64."""
    offsets = lengths_to_offsets(lengths)
    sequence, place = sequences_and_positions(offsets, total)
    return first[sequence] + place


def _events_of(rows: Tensor, item_offsets: Tensor, offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the event of each token, [T] int64, and which tokens stand before the first one of their sample, [T] bool.

    Of a token that belongs to no event it is the one before it, of one before all of its sample the first of those.
    """
    token = torch.arange(total, device=rows.device)
    first = item_offsets[sequence_ids(offsets, total)]
    last = torch.searchsorted(rows, token, right=True) - 1
    return torch.maximum(last, first), last < first


def _token_times(timestamps: Tensor, events: Tensor) -> Tensor:
    """Give each token the time of its event, [T] int64; zeros where there is no event at all."""
    if timestamps.numel() == 0:
        return timestamps.new_zeros(events.numel())
    return timestamps[events.clamp(max=timestamps.numel() - 1)]
