"""Sequences of similar length, and the tiles of their score matrices."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hstu.ops.attention.mask import Mask, visible

TILE_ROWS = 80
TILE_ELEMENTS = 384 * 1024  # scores of a tile: a few such float32 buffers stay in the caches of two cores
PADDING = 0.7  # the shortest of a group against its longest
SMALL_GROUP = 64 * 1024  # scores below which the calls cost more than padding does


@dataclass(frozen=True)
class Tile:
    """Rows ``[r0, r1)`` and columns ``[c0, c1)`` of the score matrices of a group."""

    r0: int
    r1: int
    c0: int
    c1: int


@dataclass(frozen=True)
class Group:
    """``size`` sequences padded to the longest of them, ``n`` tokens.

    Attributes:
        first: place of the group in the padded tokens of all groups.
        tokens: ``[g, n]`` row of each token in the batch; padding repeats the last token.
        lengths: ``[g]``.
        context: ``[g]`` context tokens.
        history: ``[g]`` place of the first candidate.
        has_candidates: whether any sequence has one.
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

    def tiles(self, mask: Mask, heads: int) -> Iterator[Tile]:
        """Tiles that hold every visible score, row by row; the invisible half is left out."""
        blocks = -(-self.n // TILE_ROWS)
        rows = -(-self.n // blocks)
        for r0 in range(0, self.n, rows):
            r1 = min(r0 + rows, self.n)
            start, stop = self._columns(mask, r0, r1)
            step = max(TILE_ROWS, TILE_ELEMENTS // (self.size * heads * (r1 - r0)))
            for c0 in range(start, stop, step):
                yield Tile(r0, r1, c0, min(c0 + step, stop))

    def _columns(self, mask: Mask, r0: int, r1: int) -> tuple[int, int]:
        sees_ahead = not mask.causal or (mask.context_full and r0 < self.max_context)
        start = 0
        if mask.max_attn_len is not None and self.max_context == 0 and mask.is_memory is None:
            start = max(0, min(r0, self.min_history) - mask.max_attn_len)
        return start, self.n if sees_ahead else r1

    def hide(self, mask: Mask, tile: Tile, scores: Tensor) -> None:
        """Set to zero, in place, what may not be seen in a contiguous ``[g, H, R, C]`` tile."""
        plain = (
            mask.segments is None
            and mask.max_attn_len is None
            and not (mask.context_full and tile.r0 < self.max_context)
            and not (self.has_candidates and tile.c1 > self.min_history)
        )
        if not plain:
            scores.mul_(self._visible(mask, tile)[:, None].to(scores.dtype))
        elif mask.causal and tile.c1 > tile.r0 + 1:
            scores.tril_(tile.r0 - tile.c0)

    def _visible(self, mask: Mask, tile: Tile) -> Tensor:
        rows, columns = self.tokens[:, tile.r0 : tile.r1, None], self.tokens[:, None, tile.c0 : tile.c1]
        segments, memory = mask.segments, mask.is_memory
        return visible(
            mask,
            torch.arange(tile.r0, tile.r1)[None, :, None],
            torch.arange(tile.c0, tile.c1)[None, None, :],
            context=self.context[:, None, None],
            history=self.history[:, None, None],
            segments=None if segments is None else (segments[rows], segments[columns]),
            memory=None if memory is None else (memory[rows], memory[columns]),
        )


class Layout:
    """All groups of a batch, their padded tokens one after the other: P rows ``[g, H, n]`` each.

    Attributes:
        groups: longest first; empty sequences belong to none.
        rows: ``[P]`` row of ``[T * H, d]`` of each padded row.
        padding: ``[P, 1]`` bool, or None when there is none.
        inverse: ``[T * H]`` padded row of each row.
    """

    def __init__(self, offsets: Tensor, mask: Mask, heads: int) -> None:
        self.heads = heads
        self.groups = _make_groups(offsets, mask, heads)
        total = int(offsets[-1]) * heads
        head = torch.arange(heads)[None, :, None]
        rows = [(g.tokens[:, None, :] * heads + head).view(-1) for g in self.groups]
        self.rows = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.int64)
        self.padding: Tensor | None = None
        places = torch.arange(self.rows.numel())
        own = self.rows
        if self.rows.numel() > total:
            padding = [
                (torch.arange(g.n) >= g.lengths[:, None])[:, None, :].expand(g.size, heads, g.n).reshape(-1)
                for g in self.groups
            ]
            valid = torch.cat(padding).logical_not_()
            self.padding = ~valid[:, None]
            own, places = own[valid], places[valid]
        self.inverse = torch.empty(total, dtype=torch.int64)
        self.inverse[own] = places

    def pad(self, x: Tensor, *, scale: float = 1.0, zero: bool = False) -> Tensor:
        """Rows of ``x [T, H, d]`` as ``[P, d]``, scaled; padding repeats the last token or is zero."""
        matrix = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(x.shape[0] * x.shape[1], x.shape[2])
        dense = matrix.index_select(0, self.rows)
        if scale != 1.0:
            dense.mul_(scale)
        if zero and self.padding is not None:
            dense.masked_fill_(self.padding, 0.0)
        return dense

    def unpad(self, dense: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`pad`: ``[T, H, d]`` in ``dtype``."""
        rows = dense.index_select(0, self.inverse).to(dtype)
        return rows.view(rows.shape[0] // self.heads, self.heads, rows.shape[1])

    def of(self, group: Group, dense: Tensor) -> Tensor:
        """Rows of one group, ``[g * H, n, d]``, a view."""
        size = group.size * self.heads
        first = group.first * self.heads
        return dense[first : first + size * group.n].view(size, group.n, dense.shape[1])


def _make_groups(offsets: Tensor, mask: Mask, heads: int) -> list[Group]:
    lengths = offsets.diff()
    order = torch.argsort(lengths, descending=True, stable=True)
    ordered = [n for n in lengths[order].tolist() if n > 0]
    groups: list[Group] = []
    first = place = 0
    while first < len(ordered):
        last, n = first + 1, ordered[first]
        matrix = heads * n * min(n, TILE_ROWS)
        while last < len(ordered) and (last + 1 - first) * matrix <= TILE_ELEMENTS:
            if ordered[last] < PADDING * n and (last - first) * matrix >= SMALL_GROUP:
                break
            last += 1
        groups.append(_group(order[first:last], place, offsets, lengths, mask))
        place += (last - first) * n
        first = last
    return groups


def _group(samples: Tensor, first: int, offsets: Tensor, lengths: Tensor, mask: Mask) -> Group:
    own = lengths[samples]
    n = int(own[0])
    zeros = torch.zeros_like(own)
    context = zeros if mask.num_context is None else mask.num_context[samples]
    candidates = zeros if mask.num_candidates is None else mask.num_candidates[samples]
    history = own - candidates
    return Group(
        first=first,
        size=samples.numel(),
        n=n,
        tokens=offsets[samples][:, None] + torch.minimum(torch.arange(n), own[:, None] - 1),
        lengths=own,
        context=context,
        history=history,
        has_candidates=bool(candidates.any()),
        max_context=int(context.max()),
        min_history=int(history.min()),
    )
