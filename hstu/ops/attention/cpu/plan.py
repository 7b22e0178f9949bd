"""How a batch is cut on a CPU: groups of sequences of similar length, tiles of their scores, chunks of tiles."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.ops.attention.cpu.scratch import scratch
from hstu.ops.attention.mask import Mask, visible

TILE_ROWS = 100
CHUNK_SCORES = 768 * 1024  # scores of a chunk: a buffer of these in float32 is 3 MB
PADDING = 0.6  # the shortest of a group against its longest
SMALL_GROUP = 96 * 1024  # scores below which the calls cost more than padding does


@dataclass(frozen=True, eq=False)
class Group:
    """``size`` sequences padded to the longest of them, ``n`` tokens.

    Attributes:
        first: place of the group in the padded tokens of all groups.
        tokens: ``[g, n]`` row of each token in the batch; padding repeats the last token.
        lengths: ``[g]``.
        context: ``[g]`` context tokens.
        history: ``[g]`` place of the first candidate.
    """

    first: int
    size: int
    n: int
    tokens: Tensor
    lengths: Tensor
    context: Tensor
    history: Tensor
    has_candidates: bool
    max_context: int
    min_history: int

    def blocks(self, mask: Mask, heads: int) -> Iterator[tuple[int, int, int, int]]:
        """Rows and columns of tiles that hold every visible score; most of the invisible half is left out."""
        count = -(-self.n // TILE_ROWS)
        rows = -(-self.n // count)
        for r0 in range(0, self.n, rows):
            r1 = min(r0 + rows, self.n)
            start, stop = self._columns(mask, r0, r1)
            step = max(TILE_ROWS, CHUNK_SCORES // (self.size * heads * (r1 - r0)))
            for c0 in range(start, stop, step):
                yield r0, r1, c0, min(c0 + step, stop)

    def _columns(self, mask: Mask, r0: int, r1: int) -> tuple[int, int]:
        sees_ahead = not mask.causal or (mask.context_full and r0 < self.max_context)
        start = 0
        if mask.max_attn_len is not None and self.max_context == 0 and mask.is_memory is None:
            start = max(0, min(r0, self.min_history) - mask.max_attn_len)
        return start, self.n if sees_ahead else r1


@dataclass(frozen=True)
class Tile:
    """Rows ``[r0, r1)`` and columns ``[c0, c1)`` of the scores of a group; ``pairs = g * R * C``.

    ``first`` is the place of its pairs among those of its chunk.
    """

    group: Group
    first: int
    r0: int
    r1: int
    c0: int
    c1: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(g, R, C)``."""
        return self.group.size, self.r1 - self.r0, self.c1 - self.c0

    @property
    def last(self) -> int:
        """Place after its last pair."""
        size, rows, columns = self.shape
        return self.first + size * rows * columns

    @property
    def clamps(self) -> bool:
        """Whether a row may be a candidate, whose position is not its place."""
        return self.group.has_candidates and self.r1 > self.group.min_history

    def by_distance(self, mask: Mask) -> bool:
        """Whether order alone decides who may read whom, so that all sequences share one mask."""
        return (
            mask.segments is None
            and mask.max_attn_len is None
            and not (mask.context_full and self.r0 < self.group.max_context)
            and not (self.group.has_candidates and self.c1 > self.group.min_history)
        )

    def visible(self, mask: Mask) -> Tensor:
        """``[g, R, C]`` bool."""
        group, segments, memory = self.group, mask.segments, mask.is_memory
        rows, columns = group.tokens[:, self.r0 : self.r1, None], group.tokens[:, None, self.c0 : self.c1]
        return visible(
            mask,
            torch.arange(self.r0, self.r1)[None, :, None],
            torch.arange(self.c0, self.c1)[None, None, :],
            context=group.context[:, None, None],
            history=group.history[:, None, None],
            segments=None if segments is None else (segments[rows], segments[columns]),
            memory=None if memory is None else (memory[rows], memory[columns]),
        ).expand(self.shape)


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tiles whose scores are held at once, one tile after the other: what is elementwise is done in one go."""

    tiles: list[Tile]

    @property
    def pairs(self) -> int:
        """Scores of one head."""
        return self.tiles[-1].last


class Layout:
    """All groups of a batch, their padded tokens one after the other: P rows ``[g, H, n]`` each.

    Attributes:
        groups: longest first; empty sequences belong to none.
        chunks: of all tiles.
        tokens: row of each token in the batch, ``[g, n]`` after ``[g, n]``; padding repeats the last token.
    """

    def __init__(self, offsets: Tensor, mask: Mask, heads: int) -> None:
        self.heads = heads
        lengths, order = torch.sort(offsets.diff(), descending=True, stable=True)
        sizes = _group_sizes([n for n in lengths.tolist() if n > 0], heads)
        self.groups, self.tokens = _make_groups(sizes, lengths, order, offsets, mask)
        self.chunks = _make_chunks(self.groups, mask, heads)
        total = int(offsets[-1]) * heads
        head = torch.arange(heads)[:, None]
        rows = [torch.add(head, g.tokens[:, None, :], alpha=heads).view(-1) for g in self.groups]
        self._rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        self._padding: Tensor | None = None
        own, places = self._rows, torch.arange(self._rows.numel())
        if own.numel() > total:
            holds = torch.cat([_holds(g).expand(g.size, heads, g.n).reshape(-1) for g in self.groups])
            places, self._padding = holds.nonzero().view(-1), holds.logical_not_().nonzero().view(-1)
            own = own.index_select(0, places)
        self._inverse = torch.empty(total, dtype=torch.int64).index_copy_(0, own, places)

    @property
    def rows(self) -> int:
        """P."""
        return self._rows.numel()

    def pad(self, name: str, x: Tensor) -> Tensor:
        """Rows of ``x [T, H, d]`` as ``[P, d]`` in scratch memory, zero as padding: it adds to no sum over tokens."""
        dense = scratch(name, (self.rows, x.shape[2]), x.dtype)
        torch.index_select(x.reshape(x.shape[0] * x.shape[1], x.shape[2]), 0, self._rows, out=dense)
        return dense if self._padding is None else dense.index_fill_(0, self._padding, 0.0)

    def unpad(self, dense: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`pad`: ``[T, H, d]`` in ``dtype``."""
        rows = dense.index_select(0, self._inverse).to(dtype)
        return rows.view(rows.shape[0] // self.heads, self.heads, rows.shape[1])

    def split(self, dense: Tensor) -> dict[Group, Tensor]:
        """Views ``[g * H, n, d]`` of the groups of ``dense [P, d]``."""
        parts = dense.split([g.size * self.heads * g.n for g in self.groups])
        return {g: part.view(-1, g.n, dense.shape[1]) for g, part in zip(self.groups, parts, strict=True)}


def _holds(group: Group) -> Tensor:
    return (torch.arange(group.n) < group.lengths[:, None])[:, None, :]


def _make_chunks(groups: list[Group], mask: Mask, heads: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    for group in groups:
        for place in group.blocks(mask, heads):
            tile = Tile(group, chunks[-1].pairs if chunks else 0, *place)
            if not chunks or tile.last * heads > CHUNK_SCORES:
                chunks.append(Chunk([Tile(group, 0, *place)]))
            else:
                chunks[-1].tiles.append(tile)
    return chunks


def _group_sizes(lengths: list[int], heads: int) -> list[int]:
    """How many sequences to pad to one length, from the longest on."""
    sizes: list[int] = []
    first = 0
    while first < len(lengths):
        last, n = first + 1, lengths[first]
        matrix = heads * n * min(n, TILE_ROWS)
        while last < len(lengths) and (last + 1 - first) * matrix <= CHUNK_SCORES:
            if lengths[last] < PADDING * n and (last - first) * matrix >= SMALL_GROUP:
                break
            last += 1
        sizes.append(last - first)
        first = last
    return sizes


def _make_groups(
    sizes: list[int], lengths: Tensor, order: Tensor, offsets: Tensor, mask: Mask
) -> tuple[list[Group], Tensor]:
    """The groups, and the tokens of all of them; ``lengths`` come in the order of the groups."""
    starts = offsets[order, None]
    zeros = torch.zeros_like(lengths)
    contexts = zeros if mask.num_context is None else mask.num_context[order]
    candidates = zeros if mask.num_candidates is None else mask.num_candidates[order]
    longest = lengths[[sum(sizes[:i]) for i in range(len(sizes))]].tolist()
    tokens = torch.empty(sum(map(operator.mul, sizes, longest)), dtype=torch.int64)
    groups: list[Group] = []
    place = first = 0
    for size, n in zip(sizes, longest, strict=True):
        own = slice(first, first + size)
        group_tokens = tokens[place : place + size * n].view(size, n)
        torch.minimum(torch.arange(n), lengths[own, None] - 1, out=group_tokens).add_(starts[own])
        history = lengths[own] - candidates[own]
        groups.append(
            Group(
                first=place,
                size=size,
                n=n,
                tokens=group_tokens,
                lengths=lengths[own],
                context=contexts[own],
                history=history,
                has_candidates=mask.num_candidates is not None and bool(candidates[own].any()),
                max_context=0 if mask.num_context is None else int(contexts[own].max()),
                min_history=int(history.min()),
            )
        )
        place, first = place + size * n, first + size
    return groups, tokens
