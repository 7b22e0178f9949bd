"""How a batch is cut on a CPU: groups of sequences of similar length, tiles of their scores, chunks of tiles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hstu.ops.attention.cpu.padded import PaddedTokens
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask

TILE_ROWS = 100
CELLS_OF_A_TILE = 4  # columns are left out a quarter of a tile at a time
MOST_CELLS = 512  # of a sequence, so that planning takes time in proportion to the tokens
CHUNK_SCORES = 768 * 1024  # scores of a chunk: a buffer of these in float32 is 3 MB
PADDING = 0.6  # the shortest of a group against its longest
SMALL_GROUP = 96 * 1024  # scores below which the calls cost more than padding does
ENDLESS = 1 << 62
KEPT_PER_TOKEN = 256  # of a mask that no distance describes: bytes kept for the layers and the backward


@dataclass(frozen=True, eq=False)
class Group:
    """``size`` sequences padded to the longest of them, ``n`` queries and ``m`` keys each.

    Attributes:
        index: place among the groups.
        first_row: place of its first query among the padded queries of all groups.
        first_column: place of its first key among the padded keys.
        num_queries: ``[g]``.
        num_keys: ``[g]``.
        start: ``[g]`` place of the first query in its sequence.
        context: ``[g]`` context tokens.
        history: ``[g]`` place of the first candidate.
        shift: the start of every sequence, None where they differ.
        context_span: least and greatest of ``context``.
        history_span: of ``history``, which is endless where there are no candidates.
    """

    index: int
    size: int
    n: int
    m: int
    first_row: int
    first_column: int
    num_queries: Tensor
    num_keys: Tensor
    start: Tensor
    context: Tensor
    history: Tensor
    shift: int | None
    context_span: tuple[int, int]
    history_span: tuple[int, int]

    @property
    def block(self) -> int:
        """Rows of a tile."""
        return _share(self.n)

    @property
    def cell(self) -> int:
        """Columns that are attended to, or left out, together."""
        return self.m if self.m <= TILE_ROWS else max(_share(self.m) // CELLS_OF_A_TILE, -(-self.m // MOST_CELLS))


def _share(length: int) -> int:
    """Rows of each of as few tiles as ``TILE_ROWS`` allows; whole cells where there are several."""
    if length <= TILE_ROWS:
        return length
    rows = -(-length // -(-length // TILE_ROWS))
    return -(-rows // CELLS_OF_A_TILE) * CELLS_OF_A_TILE


@dataclass(frozen=True, eq=False)
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
    def distance(self) -> int | None:
        """Distance of the last row to the first column, which tells those of all; None where samples differ."""
        group = self.group
        if group.shift is None or group.shift + self.r1 > group.history_span[0]:
            return None  # a candidate's position is not its place
        return self.c0 - (group.shift + self.r1 - 1)

    def common(self) -> tuple[int, int] | None:
        """Context and history of every sequence, as far as the tile goes; None where they differ."""
        group = self.group
        if group.shift is None:
            return None
        # Beyond the tile it does not matter where context ends and candidates begin.
        end = max(group.shift + self.r1, self.c1)
        context, history = ([min(x, end) for x in span] for span in (group.context_span, group.history_span))
        return (context[0], history[0]) if context[0] == context[1] and history[0] == history[1] else None

    def places(self) -> tuple[Tensor, Tensor]:
        """Places of the rows, ``[g or 1, R, 1]``, and of the columns, ``[1, 1, C]``."""
        rows, columns = torch.arange(self.r0, self.r1), torch.arange(self.c0, self.c1)
        shift = self.group.start[:, None] if self.group.shift is None else self.group.shift
        return (rows + shift).view(-1, len(rows), 1), columns.view(1, 1, -1)

    def valid(self) -> Tensor | None:
        """Where there is a query and a key, ``[g, R, C]``; None: everywhere."""
        group = self.group
        if bool((group.num_queries >= self.r1).all()) and bool((group.num_keys >= self.c1).all()):
            return None
        rows = torch.arange(self.r0, self.r1)[:, None] < group.num_queries[:, None, None]
        return rows & (torch.arange(self.c0, self.c1) < group.num_keys[:, None, None])


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tiles whose scores are in memory together, one after the other: what is elementwise is done in one go."""

    tiles: list[Tile]

    @property
    def pairs(self) -> int:
        """Scores of one head."""
        return self.tiles[-1].last


@dataclass(frozen=True, eq=False)
class Hidden:
    """Pairs of a tile that the mask hides: ``[g or 1, R, C]`` bool, or by distance, ``[R + C - 1]``, the least first.

    A pair of which one side is padding counts as either.
    """

    pairs: Tensor | None = None
    distances: Tensor | None = None


class Plan:
    """What a batch needs, made once for all layers and their backward.

    Attributes:
        groups: longest first; sequences without queries belong to none.
        chunks: of all tiles in which any query attends to any key.
        queries: where the queries lie padded.
        keys: likewise of the keys: the same object where they are the queries.
        query_tokens: the padded queries as tokens of the keys' layout.
    """

    def __init__(self, layout: Layout, mask: Mask, heads: int, keys: Layout) -> None:
        self.mask, self.heads = mask, heads
        self._segments, self._memory = keys.segments, keys.is_memory
        m, n = keys.lengths, layout.lengths
        order = torch.argsort(m if keys is layout else m * (keys.longest + 1) + n, descending=True, stable=True)
        order = order[n[order] > 0]
        sizes = _group_sizes(n[order].tolist(), m[order].tolist(), heads)
        self.groups = _make_groups(sizes, order, layout, keys)
        self.keys = PaddedTokens([(g.size, g.m) for g in self.groups], keys.offsets[order], m[order], m.sum(), heads)
        self.queries, self.query_tokens = self.keys, self.keys.tokens
        if keys is not layout:
            shapes = [(g.size, g.n) for g in self.groups]
            self.queries = PaddedTokens(shapes, layout.offsets[order], n[order], n.sum(), heads)
            ahead = (keys.offsets[1:] - layout.offsets[1:])[order]  # the queries are the last tokens of the keys
            widths = torch.tensor([g.n for g in self.groups for _ in range(g.size)], dtype=torch.int64)
            self.query_tokens = self.queries.tokens + torch.repeat_interleave(ahead, widths)
        self.chunks = _make_chunks([(g, list(self._tiles(g))) for g in self.groups], heads)
        self._hidden: dict[Tile, Hidden | None] = {}
        self._room = KEPT_PER_TOKEN * int(m.sum())

    def hidden(self, tile: Tile) -> Hidden | None:
        """What the mask hides of a tile; None for nothing."""
        if tile in self._hidden:
            return self._hidden[tile]
        shift, common = tile.group.shift, tile.common()
        if common is None or shift is None or self._segments is not None or self._memory is not None:
            hidden = _describe(self._visible(tile), tile.valid(), tile.distance is not None)
        else:
            hidden = _hidden_of_all(self.mask, (shift + tile.r0, shift + tile.r1), (tile.c0, tile.c1), *common)
        size = 0 if hidden is None or hidden.pairs is None else hidden.pairs.numel()
        if size <= self._room:
            self._room -= size
            self._hidden[tile] = hidden
        return hidden

    def rows(self, values: Tensor, group: Group) -> Tensor:
        """Entries of ``values``, one a padded query, of the queries of a group: ``[g, n]``."""
        return values[group.first_row :][: group.size * group.n].view(group.size, group.n)

    def columns(self, values: Tensor, group: Group) -> Tensor:
        """Likewise of ``values``, one a padded key, of its keys: ``[g, m]``."""
        return values[group.first_column :][: group.size * group.m].view(group.size, group.m)

    def _visible(self, tile: Tile) -> Tensor:
        """``[g, R, C]``."""
        group, (i, j) = tile.group, tile.places()
        flags: list[tuple[Tensor, Tensor] | None] = [None, None]
        for which, values in enumerate((self._segments, self._memory)):
            if values is not None:
                rows, columns = self.rows(self.query_tokens, group), self.columns(self.keys.tokens, group)
                flags[which] = values[rows[:, tile.r0 : tile.r1, None]], values[columns[:, None, tile.c0 : tile.c1]]
        context, history = group.context[:, None, None], group.history[:, None, None]
        visible = self.mask.visible(i, j, context=context, history=history, segments=flags[0], memory=flags[1])
        return visible.expand(tile.shape)

    def _tiles(self, group: Group) -> Iterator[tuple[int, int, int, int]]:
        """Rows and columns of tiles that contain every visible score of a group."""
        for block, cells in enumerate(self._reached(group)):
            r0, r1 = block * group.block, min((block + 1) * group.block, group.n)
            step = max(TILE_ROWS, CHUNK_SCORES // (group.size * self.heads * (r1 - r0)))
            for start, stop in _runs(cells):
                last = min(stop * group.cell, group.m)
                for c0 in range(start * group.cell, last, step):
                    yield r0, r1, c0, min(c0 + step, last)

    def _reached(self, group: Group) -> list[list[bool]]:
        """For each block of rows and cell of columns, whether any of its pairs may attend."""
        blocks, cells = -(-group.n // group.block), -(-group.m // group.cell)
        if blocks * cells == 1:
            return [[True]]
        r0, c0 = (torch.arange(blocks) * group.block)[:, None], torch.arange(cells) * group.cell
        num_queries, num_keys, start, context, history = (
            x[:, None, None] for x in (group.num_queries, group.num_keys, group.start, group.context, group.history)
        )
        r1, c1 = torch.minimum(r0 + group.block, num_queries) - 1, torch.minimum(c0 + group.cell, num_keys) - 1
        segments, has_memory = None, torch.zeros((), dtype=torch.bool)
        rows, columns = self.rows(self.query_tokens, group), self.columns(self.keys.tokens, group)
        if self._segments is not None:
            low, high = _extremes(self._segments[rows], group.block)
            least, greatest = _extremes(self._segments[columns], group.cell)
            segments = (low[:, :, None], high[:, :, None]), (least[:, None], greatest[:, None])
        if self._memory is not None:
            of_rows, of_columns = self._memory[rows], self._memory[columns]
            has_memory = _extremes(of_rows, group.block)[1][:, :, None] | _extremes(of_columns, group.cell)[1][:, None]
        reach = self.mask.reachable(
            (start + r0, start + r1), (c0, c1), context=context, history=history,
            segments=segments, has_memory=has_memory,
        )  # fmt: skip
        reached: list[list[bool]] = (reach & (r1 >= r0) & (c1 >= c0)).any(0).tolist()
        return reached


def _extremes(values: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Least and greatest of each ``width`` of ``values [g, n]``, the last of which stands for what is missing."""
    missing = values[:, -1:].expand(-1, -values.shape[1] % width)
    least, greatest = torch.cat([values, missing], 1).unflatten(1, (-1, width)).aminmax(dim=2)
    return least, greatest


def _runs(cells: list[bool]) -> Iterator[tuple[int, int]]:
    """First and after the last of neighbours that are True."""
    start = None
    for place, here in enumerate([*cells, False]):
        if here and start is None:
            start = place
        elif not here and start is not None:
            yield start, place
            start = None


@lru_cache(maxsize=512)
def _hidden_of_all(
    mask: Mask, rows: tuple[int, int], columns: tuple[int, int], context: int, history: int
) -> Hidden | None:
    """What is hidden of a tile in which all sequences are alike: tiles of many batches are the same."""
    i, j = torch.arange(*rows)[None, :, None], torch.arange(*columns)
    return _describe(mask.visible(i, j, context=context, history=history), None, rows[1] <= history)


def _describe(visible: Tensor, valid: Tensor | None, by_distance: bool) -> Hidden | None:
    """Put what is hidden in the shortest form.

    Args:
        visible: ``[g, R, C]``, or ``[1, R, C]`` for all sequences.
        valid: likewise, False at padding; None for none.
        by_distance: whether positions are places, so that the distance may tell.
    """
    hidden = ~visible if valid is None else valid & ~visible
    if not bool(hidden.any()):
        return None
    of_any, seen = hidden.any(0), (visible if valid is None else valid & visible).any(0)
    if by_distance:
        distances = _any_by_distance(of_any)
        if not bool((distances & _any_by_distance(seen)).any()):
            return Hidden(distances=distances)
    return Hidden(pairs=hidden if bool((of_any & seen).any()) else of_any[None])


def _any_by_distance(pairs: Tensor) -> Tensor:
    """Whether any pair is true at each distance of a row ``[R, C]`` to a column, from the least on: ``[R + C - 1]``."""
    rows, columns = pairs.shape
    width = rows + columns - 1
    # Written into a matrix one column wider than its row step, diagonals become columns.
    skewed = pairs.new_zeros(rows * width + rows)
    skewed.as_strided((rows, columns), (width - 1, 1), rows - 1).copy_(pairs)
    return skewed[: rows * width].view(rows, width).any(0)


def _make_chunks(groups: list[tuple[Group, list[tuple[int, int, int, int]]]], heads: int) -> list[Chunk]:
    chunks: list[Chunk] = []
    for group, places in groups:
        for place in places:
            tile = Tile(group, chunks[-1].pairs if chunks else 0, *place)
            if not chunks or tile.last * heads > CHUNK_SCORES:
                chunks.append(Chunk([Tile(group, 0, *place)]))
            else:
                chunks[-1].tiles.append(tile)
    return chunks


def _group_sizes(queries: list[int], keys: list[int], heads: int) -> list[int]:
    """How many sequences to pad to one length, from the longest on."""
    sizes: list[int] = []
    first = 0
    while first < len(keys):
        last, n, m = first + 1, queries[first], keys[first]
        while last < len(keys):
            widest, size = max(n, queries[last]), last - first
            matrix = heads * m * min(widest, TILE_ROWS)
            alike = keys[last] >= PADDING * m and min(n, queries[last]) >= PADDING * widest
            if (size + 1) * matrix > CHUNK_SCORES or not (alike or size * matrix < SMALL_GROUP):
                break
            last, n = last + 1, widest
        sizes.append(last - first)
        first = last
    return sizes


def _make_groups(sizes: list[int], order: Tensor, layout: Layout, keys: Layout) -> list[Group]:
    """The groups of the sequences ``order``."""
    groups: list[Group] = []
    numbers = torch.stack([layout.lengths, keys.lengths, keys.lengths - layout.lengths, keys.context, keys.history])
    numbers = numbers[:, order]
    on_host, first, first_row, first_column = numbers.tolist(), 0, 0, 0
    for index, own in enumerate(numbers.split(sizes, 1)):
        num_queries, num_keys, start, context, history = own
        size = own.shape[1]
        queries, lengths, starts, contexts, histories = (x[first : first + size] for x in on_host)
        ends = [h if h < m else ENDLESS for h, m in zip(histories, lengths, strict=True)]
        groups.append(
            Group(
                index=index,
                size=size,
                n=max(queries),
                m=lengths[0],
                first_row=first_row,
                first_column=first_column,
                num_queries=num_queries,
                num_keys=num_keys,
                start=start,
                context=context,
                history=history,
                shift=starts[0] if min(starts) == max(starts) else None,
                context_span=(min(contexts), max(contexts)),
                history_span=(min(ends), max(ends)),
            )
        )
        first, first_row, first_column = first + size, first_row + size * max(queries), first_column + size * lengths[0]
    return groups
