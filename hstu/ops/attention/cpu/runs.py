"""Who attends to whom as runs of columns, and how the work is dealt out: what compiled attention needs of a batch."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask

BLOCK = 64  # consecutive places of rows, or of columns, that are looked at together
LOOKED_AT = 1 << 22  # pairs of which visibility is in memory at a time
ENDLESS = 1 << 62
PART_ROWS = 1024  # a longer sequence is dealt out in parts, each with its own sums for the keys
MOST_PARTS = 4

Span = tuple[int, int]  # the first of some consecutive columns or blocks, and the one after the last
Block = tuple[Tensor, Tensor, Tensor]  # of each row, the number of runs; of each run, its first column and its end


class Pairs:
    """The visible pairs of a batch, made once for all layers and their backward.

    What the mask shows is asked of ``Mask.visible``, block by block within what ``Mask.reachable`` does not exclude;
    blocks that are alike share their rows of runs.

    Attributes:
        rows: ``[T]`` int32, which row of runs each query has.
        first: ``[rows + 1]`` int32, first run of each row.
        starts: ``[runs]`` int32, first column of each run.
        stops: ``[runs]`` int32, the column after its last; it may lie beyond the keys.
        parts: ``[parts, 8]`` int64, the costliest first: first query and first key of its sequence in the batch,
            number of queries, number of keys, place of the first candidate; its own first row and the row after its
            last; where its sums for the keys lie among the partial ones, -1 where no other part adds to them.
        split: of each sequence in parts, its first key, number of keys, and where the sums of each part lie.
        partial_keys: keys of all partial sums.
        pairs: rows times columns, a bound on the visible pairs.
    """

    def __init__(self, layout: Layout, mask: Mask, keys: Layout) -> None:
        self._make_runs(layout, mask, keys)
        numbers = layout.offsets, keys.offsets, layout.lengths, keys.lengths, keys.history
        self.split: list[tuple[int, int, list[int]]] = []
        self.partial_keys = self.pairs = 0
        parts: list[tuple[int, ...]] = []
        for q0, k0, n, m, history in zip(*(x.tolist() for x in numbers), strict=False):
            self.pairs += n * m
            number = min(MOST_PARTS, -(-n // PART_ROWS))
            bounds = [n * part // number for part in range(number + 1)] if number else []
            if number > 1:
                self.split.append((k0, m, [self.partial_keys + m * part for part in range(number)]))
            for r0, r1 in pairwise(bounds):
                parts.append((q0, k0, n, m, history, r0, r1, self.partial_keys if number > 1 else -1))
                self.partial_keys += m if number > 1 else 0
        parts.sort(key=lambda part: (part[5] - part[6]) * part[3])
        self.parts = torch.tensor(parts, dtype=torch.int64).view(-1, 8)
        self.most_rows = max((part[6] - part[5] for part in parts), default=0)

    def _make_runs(self, layout: Layout, mask: Mask, keys: Layout) -> None:
        n, m = layout.lengths, keys.lengths
        shift = m - n
        low, high = shift // BLOCK, torch.where(n > 0, (m + BLOCK - 1) // BLOCK, shift // BLOCK)
        spans = list(zip(low.tolist(), high.tolist(), strict=True))
        alike = keys.segments is None and keys.is_memory is None
        tables, bases = _shared_tables(mask, spans, keys) if alike else _own_tables(mask, spans, keys, shift)
        none = torch.zeros(0, dtype=torch.int32)
        runs, self.starts, self.stops = (
            torch.cat([none, *column]) for column in zip(*tables, (none,) * 3, strict=True)
        )
        self.first = torch.cat([runs.new_zeros(1), runs.cumsum(0, dtype=torch.int32)])
        sample = torch.repeat_interleave(n)
        self.place = torch.arange(sample.numel()) + (shift - layout.offsets[:-1])[sample]
        count = high - low
        block = self.place // BLOCK + (count.cumsum(0) - count - low)[sample]
        self.rows = (torch.tensor(bases, dtype=torch.int64)[block] + self.place % BLOCK).int()
        last = self.first[1:].long() - 1
        reach = torch.where(runs > 0, self.stops[last.clamp(min=0)] if self.stops.numel() else runs, runs)
        #: ``[T]`` int64, the column after the last that each query attends to.
        self.reach = torch.minimum(reach[self.rows], m[sample])


def _shared_tables(mask: Mask, spans: list[Span], keys: Layout) -> tuple[list[Block], list[int]]:
    """Blocks of runs, and for each block of rows of each sequence the row at which its own begins.

    Beyond the columns in reach it does not matter where context ends and candidates begin: few blocks are not alike.
    """
    places: dict[tuple[int, ...], int] = {}
    tables: list[Block] = []
    bases: list[int] = []
    numbers = (x.tolist() for x in (keys.lengths, keys.context, keys.history))
    for span, m, context, history in zip(spans, *numbers, strict=True):
        end = span[1] * BLOCK
        ends = min(context, end), min(history if history < m else ENDLESS, end)
        for block, reach in zip(range(*span), _reach(mask, span, *ends), strict=True):
            limit = max((block + 1) * BLOCK, reach[1])
            case = block, *reach, *(min(x, limit) for x in ends)
            if case not in places:
                places[case] = len(tables) * BLOCK
                tables.append(_block(mask, *case))
            bases.append(places[case])
    return tables, bases


@lru_cache(maxsize=1 << 14)
def _reach(mask: Mask, span: Span, context: int, history: int) -> list[Span]:
    """Columns that each block of rows of a span of blocks may attend to."""
    r0, c0 = torch.arange(*span)[:, None] * BLOCK, torch.arange(span[1]) * BLOCK
    ends = (r0, r0 + BLOCK - 1), (c0, c0 + BLOCK - 1)
    return [_columns(cells) for cells in mask.reachable(*ends, context=context, history=history)]


@lru_cache(maxsize=1 << 13)
def _block(mask: Mask, block: int, c0: int, c1: int, context: int, history: int) -> Block:
    i, j = torch.arange(block * BLOCK, (block + 1) * BLOCK)[None, :, None], torch.arange(c0, c1)
    return _runs(mask.visible(i, j, context=context, history=history).expand(1, BLOCK, c1 - c0), c0)


def _own_tables(mask: Mask, spans: list[Span], keys: Layout, shift: Tensor) -> tuple[list[Block], list[int]]:
    """As :func:`_shared_tables` where tokens bear segments or are memory: every block is its own.

    ``shift`` is the place of the first query of each sequence.
    """
    tables: list[Block] = []
    at: dict[tuple[int, int], int] = {}
    for block in range(max((stop for _, stop in spans), default=0)):
        samples = [sample for sample, (start, stop) in enumerate(spans) if start <= block < stop]
        at |= {(sample, block): BLOCK * (len(at) + number) for number, sample in enumerate(samples)}
        step = max(1, LOOKED_AT // (BLOCK * max(1, keys.longest)))
        for some in torch.tensor(samples, dtype=torch.int64).split(step) if samples else ():
            tables.append(_flagged_blocks(mask, block, some, keys, int(shift[some].min())))
    return tables, [at[sample, block] for sample, span in enumerate(spans) for block in range(*span)]


def _flagged_blocks(mask: Mask, block: int, samples: Tensor, keys: Layout, shift: int) -> Block:
    """Runs of one block of rows of each of these samples, none of which has a query before place ``shift``."""
    first, last = keys.offsets[samples, None], keys.lengths[samples, None] - 1
    context, history = keys.context[samples, None], keys.history[samples, None]
    longest = int(last.max()) + 1
    low, high = max(block * BLOCK, shift), min((block + 1) * BLOCK, longest)
    places = torch.arange(low, high), torch.arange((longest - 1) // BLOCK * BLOCK + BLOCK)
    tokens = [first + torch.minimum(place, last) for place in places]  # beyond a sequence its last token stands
    flags = [None if x is None else [x[own] for own in tokens] for x in (keys.segments, keys.is_memory)]
    segments = has_memory = None
    if flags[0] is not None:
        rows, cells = flags[0][0].aminmax(dim=1, keepdim=True), flags[0][1].unflatten(1, (-1, BLOCK)).aminmax(dim=2)
        segments = (rows.min, rows.max), (cells.min, cells.max)
    if flags[1] is not None:
        has_memory = flags[1][0].any(1, keepdim=True) | flags[1][1].unflatten(1, (-1, BLOCK)).any(2)
    cell = torch.arange(places[1].numel() // BLOCK) * BLOCK
    reach = mask.reachable(
        (low, torch.minimum(places[0][-1], last)), (cell, torch.minimum(cell + BLOCK - 1, last)),
        context=context, history=history, segments=segments, has_memory=False if has_memory is None else has_memory,
    )  # fmt: skip
    c0, c1 = _columns(reach.any(0))
    c1 = min(c1, longest)
    pairs = [None if x is None else (x[0][:, :, None], x[1][:, None, c0:c1]) for x in flags]
    seen = mask.visible(
        places[0][:, None], places[1][c0:c1], context=context[:, None], history=history[:, None],
        segments=pairs[0], memory=pairs[1],
    )  # fmt: skip
    counts, begin, end = _runs(seen.expand(len(samples), high - low, c1 - c0), c0)
    counts = torch.nn.functional.pad(counts.view(-1, high - low), (low - block * BLOCK, (block + 1) * BLOCK - high))
    return counts.flatten(), begin, end


def _columns(cells: Tensor) -> Span:
    """From the first cell that is True to the last: columns."""
    found = cells.nonzero()
    return (int(found[0]) * BLOCK, (int(found[-1]) + 1) * BLOCK) if len(found) else (0, 0)


def _runs(visible: Tensor, first: int) -> Block:
    """Runs of True in each row of ``visible [g, R, C]``, whose first column is ``first``."""
    rows = torch.nn.functional.pad(visible.reshape(visible.shape[0] * visible.shape[1], -1), (1, 1))
    starts, stops = (rows[:, 1:] & ~rows[:, :-1]), (rows[:, :-1] & ~rows[:, 1:])
    counts = starts.sum(1, dtype=torch.int32)
    begin, end = ((edges.nonzero()[:, 1] + first).int() for edges in (starts, stops))
    return counts, begin, end
