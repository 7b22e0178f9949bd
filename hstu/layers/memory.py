"""Where memory tokens stand: blocks that compress what is before them and are all that later events see of it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hstu.layers.tokens import Stream
from hstu.ops import host_to_device, positions_in_sequence, sequence_ids


@dataclass(frozen=True)
class MemoryBlocks:
    """Block j of ``sizes[j]`` tokens follows ``offsets[j]`` events of a full history of ``history`` events.

    Events are numbered as in a full history: of n events the last has the number ``history - 1`` and the first
    ``history - n``, whatever n; what is predicted after them has the number ``history``. So the tokens of a block
    stand at one position in every history, and the recent events are the same number in all that have as many.

    Attributes:
        offsets: Ascending.
        sizes: Tokens of each block.
        history: Events of a full history.
        compressed: Events that a stored memory stands for: one of ``offsets``.
        at_session: Whether the first event of the last session has the number ``compressed``, the last of ``offsets``,
            and others those before and after it; the number of what is predicted then differs from sample to sample.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    history: int
    compressed: int
    at_session: bool = False

    @property
    def num_tokens(self) -> int:
        """K, of all blocks."""
        return sum(self.sizes)

    @cached_property
    def num_stored(self) -> int:
        """Blocks of a stored memory."""
        return self.offsets.index(self.compressed) + 1

    def tokens_before(self, segment: int) -> int:
        """Return the memory tokens before ``segment``, which is the number of blocks that stand before it."""
        return sum(self.sizes[:segment])

    def on(self, device: torch.device) -> BlocksOnDevice:
        """Return where the blocks stand, in tensors on ``device``, which is not waited for."""
        of_tokens = [block for block, size in enumerate(self.sizes) for _ in range(size)]
        before = [self.tokens_before(segment) for segment in range(len(self.sizes) + 1)]
        parts = self.offsets, before, of_tokens
        numbers = host_to_device(torch.tensor([number for part in parts for number in part], dtype=torch.int64), device)
        return BlocksOnDevice(*numbers.split([len(part) for part in parts]))

    def whole(self, events: Tensor, recent: Tensor | None) -> Part:
        """Return the part that has everything.

        Args:
            events: [B] int64, of each history.
            recent: [B] int64, those of its last session, where that counts.
        """
        if self.at_session:
            assert recent is not None
            first = self.compressed - (events - recent)
            return Part(first=first, blocks=range(len(self.offsets)), asked=self.compressed + recent)
        return Part(first=self.history - events, blocks=range(len(self.offsets)))


@dataclass(frozen=True)
class BlocksOnDevice:
    """Where the blocks stand, on the device of a batch.

    Attributes:
        offsets: [blocks] int64, as :class:`MemoryBlocks` has them.
        before: [blocks + 1] int64, memory tokens before each segment.
        of_tokens: [K] int64, the block of each token.
    """

    offsets: Tensor
    before: Tensor
    of_tokens: Tensor

    def segments(self, numbers: Tensor) -> Tensor:
        """Return how many blocks stand before the events of ``numbers``: their segment, int64 of that shape."""
        return torch.searchsorted(self.offsets, numbers, right=True)


@dataclass(frozen=True, kw_only=True)
class Part:
    """What of its samples a batch has; what is before stands in a cache.

    Attributes:
        first: [B] int64, number of the first event of each sample.
        blocks: Blocks that stand among the events.
        context: [B] int64, context tokens of each sample that are in the cache; None for none.
        asked: [B] int64, number of what is predicted after each history; None: that of a full history.
    """

    first: Tensor
    blocks: range
    context: Tensor | None = None
    asked: Tensor | None = None


class PlacedMemory:
    """The blocks of ``part`` among the events of a batch.

    Args:
        blocks: All blocks.
        part: What the batch has.
        item_offsets: [B + 1] int64, of its events.
        events: Their number E.

    Attributes:
        before: [E] int64, memory tokens of the part before each event.
    """

    def __init__(self, blocks: MemoryBlocks, part: Part, item_offsets: Tensor, events: int) -> None:
        self.part, self.on_device = part, blocks.on(item_offsets.device)
        #: Of all tokens, those of the part.
        self.tokens = slice(blocks.tokens_before(part.blocks.start), blocks.tokens_before(part.blocks.stop))
        self.tokens_per_sample = self.tokens.stop - self.tokens.start
        sequence = sequence_ids(item_offsets, events)
        # All candidates have one number, as they have one position.
        last = torch.full_like(part.first, blocks.history) if part.asked is None else part.asked
        number = part.first[sequence] + positions_in_sequence(item_offsets, events)
        self.number = torch.minimum(number, last[sequence])
        self.segment = self.on_device.segments(self.number)
        self.before, following = self._tokens_before(self.segment), self.on_device.segments(self.number + 1)
        self._after = self._tokens_before(following) - self.before

    def _tokens_before(self, segments: Tensor) -> Tensor:
        here = segments.clamp(self.part.blocks.start, self.part.blocks.stop)
        return self.on_device.before[here] - self.tokens.start

    def put(self, stream: Stream, events: Tensor, before_events: Tensor) -> Stream:
        """Return ``stream``, which has room for the blocks, with memory, segments and positions.

        Args:
            stream: Of the batch.
            events: [T] int64, the last event at or before each token; any for one that has none.
            before_events: [T] bool, tokens before the first event of their sample.
        """
        layout, part, blocks = stream.layout, self.part, self.on_device
        device, total = layout.offsets.device, events.numel()
        block = blocks.of_tokens[self.tokens]
        offset = blocks.offsets[block]
        in_part = torch.arange(block.numel(), device=device)
        token = in_part + self.tokens.start
        history = stream.tokens_per_event * (offset - part.first[:, None]).clamp(min=0)
        rows = (layout.offsets[:-1, None] + layout.context[:, None] + history + in_part).flatten()

        contexts = layout.context if part.context is None else layout.context + part.context
        place = positions_in_sequence(layout.offsets, total)
        segments, positions = torch.zeros_like(place), place
        if self.number.numel():
            start = stream.tokens_per_event * self.number + blocks.before[self.segment] - stream.event_rows
            owner = sequence_ids(layout.offsets, total)
            events = events.clamp(max=self.number.numel() - 1)
            of_event = contexts[owner] + start[events] + torch.arange(total, device=device)
            positions = torch.where(before_events, place, of_event)
            segments = torch.where(before_events, 0, self.segment[events])
        at = contexts[:, None] + stream.tokens_per_event * offset + token
        layout = replace(
            layout,
            segments=segments.index_copy(0, rows, block.repeat(layout.num_samples)).int(),
            is_memory=torch.zeros_like(before_events).index_fill(0, rows, True),
        )
        return replace(
            stream,
            layout=layout,
            memory=(rows, token.repeat(layout.num_samples)),
            memory_after=self._after,
            positions=positions.index_copy(0, rows, at.flatten()),
        )
