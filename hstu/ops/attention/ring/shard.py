"""Attention between shards of a batch: the rows that one rank has, over the columns that another has.

A batch is sharded token by token, in zigzag: each rank has two pieces of every sequence, one early and one late, so
that causal work is even. The outputs of a rank's rows over all shards add up to attention over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.bias import RelativeBias, query_times, time_bucket
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask, positions

TILE_ELEMENTS = 1 << 20  # scores in memory at once


@dataclass(frozen=True, kw_only=True)
class TokenShard:
    """What one rank has of B sequences: two pieces of each, t tokens in all; pieces may be empty.

    Attributes:
        tokens: [t] int64, rows of the batch: piece by piece, in the order of the sequences.
        first: [B, 2] int64, place in its sequence of each piece's first token.
        length: [B, 2] int64, tokens of each piece.
        start: [B, 2] int64, row in the shard of each piece's first token.
    """

    tokens: Tensor
    first: Tensor
    length: Tensor
    start: Tensor


def shard_zigzag(layout: Layout, ranks: int) -> list[TokenShard]:
    """Cut each sequence into ``2 * ranks`` pieces; a rank gets the i-th and the i-th from the end.

    Who gets the outermost pair changes with the number of the sequence, so that short ones spread too. Made once for
    a layout.

    Args:
        layout: Of the batch.
        ranks: At least 1.
    """
    return layout.keep(("shards", ranks), lambda: _shard_zigzag(layout.offsets, ranks))


def _shard_zigzag(offsets: Tensor, ranks: int) -> list[TokenShard]:
    lengths, pieces = offsets.diff(), 2 * ranks
    bounds = lengths[:, None] * torch.arange(pieces + 1, device=offsets.device) // pieces
    sequence = torch.arange(lengths.numel(), device=offsets.device)
    shards = []
    for rank in range(ranks):
        early = (rank - sequence) % ranks
        chosen = torch.stack([early, pieces - 1 - early], 1)
        first = bounds.gather(1, chosen)
        length = bounds.gather(1, chosen + 1) - first
        start = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
        shift = (offsets[:-1, None] + first - start).flatten()
        tokens = torch.repeat_interleave(shift, length.flatten())
        tokens = tokens + torch.arange(tokens.numel(), device=offsets.device)
        shards.append(TokenShard(tokens=tokens, first=first, length=length, start=start))
    return shards


@dataclass(frozen=True, kw_only=True)
class Block:
    """Pairs of pieces of like size, padded to the largest: g pairs of R rows and C columns.

    Attributes:
        sequence: [g] int64.
        rows: [g, R] int64, rows of the row shard; its number of tokens stands for padding.
        columns: [g, C] int64, likewise of the column shard.
        row_places: [g, R] int64, places in the sequence.
        column_places: [g, C] int64.
    """

    sequence: Tensor
    rows: Tensor
    columns: Tensor
    row_places: Tensor
    column_places: Tensor

    def tiles(self, heads: int) -> Iterator[Block]:
        """Cut the block into parts of at most ``TILE_ELEMENTS`` scores (one row and column at the least)."""
        pairs = max(1, TILE_ELEMENTS // (heads * 32 * 32))
        for p in range(0, self.sequence.numel(), pairs):
            side = max(1, math.isqrt(TILE_ELEMENTS // (heads * min(pairs, self.sequence.numel() - p))))
            for r in range(0, self.rows.shape[1], side):
                for c in range(0, self.columns.shape[1], side):
                    yield Block(
                        sequence=self.sequence[p : p + pairs],
                        rows=self.rows[p : p + pairs, r : r + side],
                        columns=self.columns[p : p + pairs, c : c + side],
                        row_places=self.row_places[p : p + pairs, r : r + side],
                        column_places=self.column_places[p : p + pairs, c : c + side],
                    )


def pair_pieces(rows: TokenShard, columns: TokenShard, layout: Layout, mask: Mask) -> list[Block]:
    """Pair each piece of ``rows`` with those of ``columns`` that it may attend to; a block has no row twice."""
    blocks = []
    for mine, other in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = rows.length[:, mine], columns.length[:, other]
        segments, has_memory = _flags(rows, mine, columns, other, layout)
        keep = mask.reachable(
            (rows.first[:, mine], rows.first[:, mine] + row - 1),
            (columns.first[:, other], columns.first[:, other] + column - 1),
            context=layout.context,
            history=layout.history,
            segments=segments,
            has_memory=has_memory,
        )
        keep = keep & (row > 0) & (column > 0)
        size = torch.maximum(row, column).clamp(min=1).double().log2().mul(2).floor()
        for kind in size[keep].unique().tolist():
            chosen = (keep & (size == kind)).nonzero().squeeze(1)
            row_index, row_places = _padded_piece(rows, mine, chosen)
            column_index, column_places = _padded_piece(columns, other, chosen)
            blocks.append(
                Block(
                    sequence=chosen,
                    rows=row_index,
                    columns=column_index,
                    row_places=row_places,
                    column_places=column_places,
                )
            )
    return blocks


Extremes = tuple[Tensor, Tensor]


def _flags(
    rows: TokenShard, mine: int, columns: TokenShard, other: int, layout: Layout
) -> tuple[tuple[Extremes, Extremes] | None, Tensor]:
    """Segment numbers of the pieces, least and greatest, and whether any of their tokens is memory."""
    segments, memory = None, torch.zeros((), dtype=torch.bool, device=layout.offsets.device)
    if layout.segments is not None:
        segments = _extremes(layout.segments, rows, mine), _extremes(layout.segments, columns, other)
    if layout.is_memory is not None:
        flags = layout.is_memory.int()
        memory = (_extremes(flags, rows, mine)[1] > 0) | (_extremes(flags, columns, other)[1] > 0)
    return segments, memory


def _extremes(values: Tensor, shard: TokenShard, piece: int) -> Extremes:
    """Least and greatest of ``values`` [T] in a piece of each sequence, [B] each; anything where it is empty."""
    lengths = shard.length.flatten()
    owner = torch.repeat_interleave(lengths)
    own, none = values[shard.tokens], values.new_zeros(lengths.numel())
    least, greatest = (none.scatter_reduce(0, owner, own, kind, include_self=False) for kind in ("amin", "amax"))
    return least.view(-1, 2)[:, piece], greatest.view(-1, 2)[:, piece]


def _padded_piece(shard: TokenShard, piece: int, sequences: Tensor) -> tuple[Tensor, Tensor]:
    length = shard.length[sequences, piece, None]
    step = torch.arange(int(length.max()), device=length.device)[None]
    index = (shard.start[sequences, piece, None] + step).masked_fill(step >= length, shard.tokens.numel())
    return index, shard.first[sequences, piece, None] + step


def with_padding_row(x: Tensor) -> Tensor:
    """Append the row of zeros that stands for padding, and takes what is to go nowhere."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """What decides scores besides queries and keys.

    Attributes:
        layout: Of the whole batch.
        mask: Who attends to whom.
        alpha: Factor on the products.
        bias: Relative bias.
    """

    layout: Layout
    mask: Mask
    alpha: float
    bias: RelativeBias = RelativeBias()

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """The position and the time table."""
        return self.bias.position, self.bias.time

    def blocks(self, rank: int, ranks: int) -> list[list[Block]]:
        """What the rows of ``rank`` attend to in each rank's columns; made once for a layout and mask."""
        layout, mask = self.layout, self.mask

        def make() -> list[list[Block]]:
            shards = shard_zigzag(layout, ranks)
            return [pair_pieces(shards[rank], other, layout, mask) for other in shards]

        return layout.keep(("shard blocks", rank, ranks, mask), make)

    def visible(self, tile: Block, rows: TokenShard, columns: TokenShard) -> Tensor:
        """Whether each row of the tile may attend to each column, [g, 1, R, C] bool; to padding none does."""
        layout = self.layout
        flags: list[tuple[Tensor, Tensor] | None] = []
        for values in (layout.segments, layout.is_memory):
            own = None if values is None else (values[_tokens(rows, tile.rows)], values[_tokens(columns, tile.columns)])
            flags.append(None if own is None else (own[0][:, :, None], own[1][:, None]))
        visible = self.mask.visible(
            tile.row_places[:, :, None],
            tile.column_places[:, None],
            context=layout.context[tile.sequence, None, None],
            history=layout.history[tile.sequence, None, None],
            segments=flags[0],
            memory=flags[1],
        )
        return (visible & (tile.columns < columns.tokens.numel())[:, None])[:, None]

    def bias_indices(self, tile: Block, rows: TokenShard, columns: TokenShard) -> tuple[Tensor | None, Tensor | None]:
        """Return the row of the position table and of the time table of each score, [g, R, C] int64, or None."""
        position = time = None
        if self.bias.position is not None:
            history = self.layout.history[tile.sequence, None]
            p_row, p_column = positions(tile.row_places, history), positions(tile.column_places, history)
            last = self.bias.position.numel() - 1
            # Places of padding may lie beyond the table.
            position = (p_column[:, None] - p_row[:, :, None] + last // 2).clamp(0, last)
        if self.bias.time is not None:
            assert self.layout.timestamps is not None
            asked = query_times(self.layout, self.bias.query_time)[_tokens(rows, tile.rows)]
            times = self.layout.timestamps[_tokens(columns, tile.columns)]
            time = time_bucket(asked[:, :, None] - times[:, None], self.bias.time.numel() - 1)
        return position, time


def _tokens(shard: TokenShard, index: Tensor) -> Tensor:
    return F.pad(shard.tokens, (0, 1))[index]


def gather_heads(padded: Tensor, index: Tensor, heads: int) -> Tensor:
    """Rows ``index`` [g, n] of ``padded`` [t + 1, G, d] as [g, heads, n, d]; consecutive heads share one of G."""
    own = padded[index].transpose(1, 2)
    return own if own.shape[1] == heads else own.repeat_interleave(heads // own.shape[1], 1)


def scatter_heads(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add ``values`` [g, H, n, d] to rows ``index`` [g, n] of ``total`` [t + 1, G, d], heads that share one summed."""
    if values.shape[1] != total.shape[1]:
        values = values.unflatten(1, (total.shape[1], -1)).sum(2)
    total.index_add_(0, index.flatten(), values.transpose(1, 2).flatten(0, 1).to(total.dtype))
