"""Attention between shares of a batch: the rows that one holder has, over the columns that another has.

A batch is dealt to holders token by token, each having two pieces of every sequence: one early and one late, so
that causal work is even. The outputs of a holder's rows over all shares add up to attention over the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.bias import RelativeBias, query_times, time_bucket
from hstu.ops.attention.mask import Mask, visible

TILE_ELEMENTS = 1 << 20  # scores held at once


@dataclass(frozen=True, kw_only=True)
class Share:
    """What one holder has of B sequences: two pieces of each, t tokens in all; pieces may be empty.

    Attributes:
        tokens: [t] int64, rows of the batch: piece by piece, in the order of the sequences.
        first: [B, 2] int64, place in its sequence of each piece's first token.
        length: [B, 2] int64, tokens of each piece.
        start: [B, 2] int64, row in the share of each piece's first token.
    """

    tokens: Tensor
    first: Tensor
    length: Tensor
    start: Tensor


def deal_tokens(offsets: Tensor, holders: int) -> list[Share]:
    """Cut each sequence into ``2 * holders`` pieces and deal them, the i-th with the i-th from the end.

    Who gets the outermost pair turns with the number of the sequence, so that short ones spread too.

    Args:
        offsets: [B + 1] int64.
        holders: At least 1.
    """
    lengths, pieces = offsets.diff(), 2 * holders
    bounds = lengths[:, None] * torch.arange(pieces + 1, device=offsets.device) // pieces
    sequence = torch.arange(lengths.numel(), device=offsets.device)
    shares = []
    for holder in range(holders):
        early = (holder - sequence) % holders
        chosen = torch.stack([early, pieces - 1 - early], 1)
        first = bounds.gather(1, chosen)
        length = bounds.gather(1, chosen + 1) - first
        start = (length.flatten().cumsum(0) - length.flatten()).view_as(length)
        shift = (offsets[:-1, None] + first - start).flatten()
        tokens = torch.repeat_interleave(shift, length.flatten())
        tokens = tokens + torch.arange(tokens.numel(), device=offsets.device)
        shares.append(Share(tokens=tokens, first=first, length=length, start=start))
    return shares


@dataclass(frozen=True, kw_only=True)
class Block:
    """Pairs of pieces of like size, padded to the largest: g pairs of R rows and C columns.

    Attributes:
        sequence: [g] int64.
        rows: [g, R] int64, rows of the row share; its number of tokens stands for padding.
        columns: [g, C] int64, likewise of the column share.
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


def pair_pieces(rows: Share, columns: Share, offsets: Tensor, mask: Mask) -> list[Block]:
    """Pair each piece of ``rows`` with those of ``columns`` that it may read from; a block holds no row twice."""
    lengths = offsets.diff()
    context = torch.zeros_like(lengths) if mask.num_context is None else mask.num_context
    history = lengths if mask.num_candidates is None else lengths - mask.num_candidates
    blocks = []
    for early_or_late in (0, 1):
        for other in (0, 1):
            row, column = (share.length[:, s] for share, s in ((rows, early_or_late), (columns, other)))
            first_row, first_column = rows.first[:, early_or_late], columns.first[:, other]
            last_row, last_column = first_row + row - 1, first_column + column - 1
            keep = (row > 0) & (column > 0)
            if mask.causal:
                keep &= (first_column <= last_row) | ((first_row < context) if mask.context_full else False)
            if mask.max_attn_len is not None and mask.is_memory is None:
                distance = torch.minimum(first_row, history) - torch.minimum(last_column, history)
                keep &= (distance <= mask.max_attn_len) | (first_column < context)
            size = torch.maximum(row, column).clamp(min=1).double().log2().mul(2).floor()
            for kind in size[keep].unique().tolist():
                chosen = (keep & (size == kind)).nonzero().squeeze(1)
                row_index, row_places = _padded_piece(rows, early_or_late, chosen)
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


def _padded_piece(share: Share, piece: int, sequences: Tensor) -> tuple[Tensor, Tensor]:
    length = share.length[sequences, piece, None]
    step = torch.arange(int(length.max()), device=length.device)[None]
    index = (share.start[sequences, piece, None] + step).masked_fill(step >= length, share.tokens.numel())
    return index, share.first[sequences, piece, None] + step


def with_padding_row(x: Tensor) -> Tensor:
    """Append the row of zeros that padding reads, and adds what nobody wants to."""
    return torch.cat([x, x.new_zeros(1, *x.shape[1:])])


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What decides scores besides queries and keys; tensors are those of the whole batch.

    Attributes:
        offsets: [B + 1] int64.
        mask: Who reads whom.
        alpha: Factor on the products.
        bias: Relative bias, or None.
    """

    offsets: Tensor
    mask: Mask
    alpha: float
    bias: RelativeBias | None = None

    @property
    def tables(self) -> tuple[Tensor | None, Tensor | None]:
        """The position and the time table."""
        return (None, None) if self.bias is None else (self.bias.position, self.bias.time)

    def seen(self, tile: Block, rows: Share, columns: Share) -> Tensor:
        """Whether each row of the tile may read each column, [g, 1, R, C] bool; padding is not read."""
        mask, lengths = self.mask, self.offsets.diff()
        context = torch.zeros_like(lengths) if mask.num_context is None else mask.num_context
        history = lengths if mask.num_candidates is None else lengths - mask.num_candidates
        flags: list[tuple[Tensor, Tensor] | None] = []
        for values in (mask.segments, mask.is_memory):
            own = None if values is None else (values[_tokens(rows, tile.rows)], values[_tokens(columns, tile.columns)])
            flags.append(None if own is None else (own[0][:, :, None], own[1][:, None]))
        seen = visible(
            mask,
            tile.row_places[:, :, None],
            tile.column_places[:, None],
            context=context[tile.sequence, None, None],
            history=history[tile.sequence, None, None],
            segments=flags[0],
            memory=flags[1],
        )
        return (seen & (tile.columns < columns.tokens.numel())[:, None])[:, None]

    def bias_indices(self, tile: Block, rows: Share, columns: Share) -> tuple[Tensor | None, Tensor | None]:
        """Return the row of the position table and of the time table of each score, [g, R, C] int64, or None."""
        position = time = None
        if self.bias is not None and self.bias.position is not None:
            lengths = self.offsets.diff()
            history = lengths if self.mask.num_candidates is None else lengths - self.mask.num_candidates
            end = history[tile.sequence, None]
            p_row, p_column = torch.minimum(tile.row_places, end), torch.minimum(tile.column_places, end)
            last = self.bias.position.numel() - 1
            # Places of padding may lie beyond the table.
            position = (p_column[:, None] - p_row[:, :, None] + last // 2).clamp(0, last)
        if self.bias is not None and self.bias.time is not None:
            assert self.bias.timestamps is not None
            readers = query_times(self.bias, self.offsets, self.mask.num_candidates)[_tokens(rows, tile.rows)]
            keys = self.bias.timestamps[_tokens(columns, tile.columns)]
            time = time_bucket(readers[:, :, None] - keys[:, None], self.bias.time.numel() - 1)
        return position, time


def _tokens(share: Share, index: Tensor) -> Tensor:
    return F.pad(share.tokens, (0, 1))[index]


def gather_heads(padded: Tensor, index: Tensor, heads: int) -> Tensor:
    """Rows ``index`` [g, n] of ``padded`` [t + 1, G, d] as [g, heads, n, d]; consecutive heads share one of G."""
    own = padded[index].transpose(1, 2)
    return own if own.shape[1] == heads else own.repeat_interleave(heads // own.shape[1], 1)


def scatter_heads(total: Tensor, index: Tensor, values: Tensor) -> None:
    """Add ``values`` [g, H, n, d] to rows ``index`` [g, n] of ``total`` [t + 1, G, d], heads that share one summed."""
    if values.shape[1] != total.shape[1]:
        values = values.unflatten(1, (total.shape[1], -1)).sum(2)
    total.index_add_(0, index.flatten(), values.transpose(1, 2).flatten(0, 1).to(total.dtype))
