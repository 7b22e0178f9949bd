"""Which tiles a kernel visits, worked out once a batch for all layers and heads.

One program looks at the pairs of one block of rows (or columns), tile by tile: a tile that no pair of can attend is
left out, and one of which every pair can needs no mask. So no kernel derives ranges from the rules of the mask: they
stand in ``tiles.visible`` alone.
"""

# mypy: allow-untyped-defs

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hstu.ops.attention.bias import QueryTime, query_times
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.attention.triton.structs import (
    BLOCK_FIELDS,
    CANDIDATES,
    CAUSAL,
    CONTEXT,
    CONTEXT_FULL,
    GROUPS,
    MEMORY,
    SEGMENTS,
    WINDOW,
    Block,
    Plan,
    Rules,
    Tokens,
)
from hstu.ops.attention.triton.tiles import FIELDS, visible
from hstu.ops.checks import values_readable

_INT32_MAX = 2**31 - 1


@triton.jit
def _find(ENDS, ORDER, index, samples):
    """Sample of block ``index``, and the number of blocks up to its end; samples of one if there are none so far."""
    low = 0
    high = samples
    while low < high:
        middle = (low + high) // 2
        if tl.load(ENDS + middle) <= index:
            low = middle + 1
        else:
            high = middle
    found = tl.minimum(low, samples - 1)
    return tl.load(ORDER + found), tl.load(ENDS + found)


@triton.jit
def _close(listed, count, run, run_stop, best, best_stop):
    """End a run of tiles without a mask: the longest run is kept, the other one listed."""
    other = run
    other_stop = run_stop
    if run_stop - run > best_stop - best:
        other = best
        other_stop = best_stop
        best = run
        best_stop = run_stop
    for tile in range(other, other_stop):
        tl.store(listed + count, tile)
        count += 1
    return count, best, best_stop


@triton.jit
def _store_block(plan, index, block):
    at = plan.blocks + index * FIELDS
    tl.store(at, block.q_row)
    tl.store(at + 1, block.k_row)
    tl.store(at + 2, block.place)
    tl.store(at + 3, block.first)
    tl.store(at + 4, block.length)
    tl.store(at + 5, block.context)
    tl.store(at + 6, block.history)
    tl.store(at + 7, block.plain)
    tl.store(at + 8, block.stop)
    tl.store(at + 9, block.listed)


@triton.jit
def _sample(layouts, index, samples, rules, ROWS, COLUMNS, FLAGS: tl.constexpr, BY_ROWS: tl.constexpr):
    """The block of that number, without its tiles; those of a sample that have most to do come first."""
    sample, end = _find(layouts.ends, layouts.order, index, samples)
    q_start = tl.load(layouts.q_offsets + sample)
    k_start = tl.load(layouts.k_offsets + sample)
    length = (tl.load(layouts.k_offsets + sample + 1) - k_start).to(tl.int32)
    first = length - (tl.load(layouts.q_offsets + sample + 1) - q_start).to(tl.int32)
    context = 0
    if CONTEXT & FLAGS:
        context = tl.load(layouts.num_context + sample).to(tl.int32)
    history = length
    if CANDIDATES & FLAGS:
        history = length - tl.load(layouts.num_candidates + sample).to(tl.int32)
    if BY_ROWS:
        place = first + (end - 1 - index).to(tl.int32) * ROWS
    else:
        place = (tl.cdiv(length, COLUMNS) - (end - index).to(tl.int32)) * COLUMNS
    if index >= end:
        length = 0
        first = 0
    return Block(
        q_row=(q_start - first).to(tl.int32), k_row=k_start.to(tl.int32), place=place, first=first, length=length,
        context=context, history=history, plain=0, stop=0, listed=0,
    )  # fmt: skip


@triton.jit
def plan_blocks(
    plan, layouts, samples, rules, tokens,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, FLAGS: tl.constexpr, BY_ROWS: tl.constexpr,
):  # fmt: skip
    """Fill in one block of ``plan``: by rows, whose tiles are of columns, or by columns, whose tiles are of rows."""
    index = tl.program_id(0)
    block = _sample(layouts, index, samples, rules, ROWS, COLUMNS, FLAGS, BY_ROWS)
    row = index.to(tl.int64) * plan.width
    count = 0
    best = 0
    best_stop = 0
    run = 0
    run_stop = 0
    if BY_ROWS:  # noqa: SIM108 - decided when compiling
        tiles = tl.cdiv(block.length, COLUMNS)
    else:
        tiles = tl.cdiv(block.length - block.first, ROWS)
    for tile in range(0, tiles):
        if BY_ROWS:
            i = block.place + tl.arange(0, ROWS)[:, None]
            j = tile * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        else:
            i = block.first + tile * ROWS + tl.arange(0, ROWS)[:, None]
            j = block.place + tl.arange(0, COLUMNS)[None, :]
        seen = visible(i, j, block, rules, tokens, FLAGS)
        pairs = tl.sum(tl.sum(seen.to(tl.int32), 1), 0)
        plain = pairs == ROWS * COLUMNS
        if plain:
            if run_stop < tile:
                run = tile
            run_stop = tile + 1
        else:
            count, best, best_stop = _close(plan.listed + row, count, run, run_stop, best, best_stop)
            run = 0
            run_stop = 0
            if pairs > 0:
                tl.store(plan.listed + row + count, tile)
                count += 1
    count, best, best_stop = _close(plan.listed + row, count, run, run_stop, best, best_stop)
    _store_block(
        plan, index,
        Block(
            q_row=block.q_row, k_row=block.k_row, place=block.place, first=block.first, length=block.length,
            context=block.context, history=block.history, plain=best, stop=best_stop, listed=count,
        ),
    )  # fmt: skip


class Layouts(NamedTuple):
    """Tensors of the layouts of q and k, and the order of the samples: ``ends`` counts their blocks so far."""

    q_offsets: Any
    k_offsets: Any
    num_context: Any
    num_candidates: Any
    order: Any
    ends: Any


@dataclass(frozen=True, eq=False)
class Batch:
    """What the kernels of every layer are given about a batch.

    Attributes:
        layout: of the queries, ``q_total`` in all.
        keys: of the keys, ``k_total`` in all.
        flags: options of the mask.
        rules: scalars of the mask.
        tokens: what the mask knows of the tokens.
        plans: those made so far.
        launches: kernels made ready so far.
    """

    layout: Layout
    keys: Layout
    q_total: int
    k_total: int
    flags: int
    rules: Rules
    tokens: Tokens
    plans: dict[tuple[int, int, bool], tuple[Plan, int]] = field(default_factory=dict)
    launches: dict[Any, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, layout: Layout, keys: Layout, totals: tuple[int, int], mask: Mask) -> Batch:
        """Return that of ``layout``, made once for all layers of a model; ``totals``: tokens of q and of k."""

        def make() -> Batch:
            memory = None if keys.is_memory is None else keys.is_memory.view(torch.uint8)
            rules = Rules(mask.max_attn_len or 0, mask.candidate_group_size)
            return cls(layout, keys, *totals, _flags(keys, mask), rules, Tokens(keys.segments, memory, None, None))

        return keys.keep(("triton", layout, mask), make)

    def plan(self, rows: int, columns: int, *, by_rows: bool) -> tuple[Plan, int]:
        """Blocks of so many rows (or columns), and their number; made once a batch for tiles of this size."""
        key = (rows, columns, by_rows)
        if key not in self.plans:
            self.plans[key] = self._make_plan(*key)
        return self.plans[key]

    def _make_plan(self, rows: int, columns: int, by_rows: bool) -> tuple[Plan, int]:
        layout, keys = self.layout, self.keys
        own, size = (layout, rows) if by_rows else (keys, columns)
        order = own.keep("order", lambda: torch.argsort(own.lengths, descending=True))
        ends = own.keep(("ends", size), lambda: ((own.lengths[order] + (size - 1)) // size).cumsum(0))
        number = (self.q_total if by_rows else self.k_total) // size + own.num_samples
        # Two at least: Triton 3.6 loses a 1 that stands in a struct of a struct.
        width = max(2, triton.cdiv(keys.longest, columns) if by_rows else triton.cdiv(layout.longest, rows))
        blocks = ends.new_empty(number, BLOCK_FIELDS, dtype=torch.int32)
        plan = Plan(blocks, ends.new_empty(number, width, dtype=torch.int32), width)
        layouts = Layouts(layout.offsets, keys.offsets, keys.num_context, keys.num_candidates, order, ends)
        plan_blocks[(number,)](
            plan, layouts, own.num_samples, self.rules, self.tokens, ROWS=rows, COLUMNS=columns, FLAGS=self.flags,
            BY_ROWS=by_rows, num_warps=4,
        )  # fmt: skip
        return plan, number

    def timed(self, query_time: QueryTime) -> Tokens:
        """What a time bias knows of the tokens."""
        keys = self.keys

        def relative(which: QueryTime) -> Tensor:
            return keys.keep(("relative", which), lambda: _relative(keys, query_times(keys, which)))

        return self.tokens._replace(query_time=relative(query_time), time=relative("own"))


def _flags(keys: Layout, mask: Mask) -> int:
    """The options of a mask on a layout as the bits of ``structs``."""
    candidates = keys.num_candidates is not None
    chosen = {
        CAUSAL: mask.causal,
        CONTEXT: keys.num_context is not None,
        CONTEXT_FULL: mask.context == "full" and keys.num_context is not None,
        CANDIDATES: candidates,
        GROUPS: candidates and mask.candidate_group_size > 1,
        WINDOW: mask.max_attn_len is not None,
        SEGMENTS: keys.segments is not None,
        MEMORY: keys.is_memory is not None,
    }
    return sum(bit.value for bit, wanted in chosen.items() if wanted)


def _relative(keys: Layout, times: Tensor) -> Tensor:
    """Seconds since the first token of the sample, int32 (68 years)."""
    own = keys.timestamps
    assert own is not None
    if not own.numel():
        return own.int()
    first = keys.keep("first times", lambda: _first_times(keys, own))
    relative = times - first
    # Two tokens differ by at most twice the larger distance from the first.
    if values_readable(own) and int(relative.abs().max()) > _INT32_MAX // 2:
        raise ValueError("timestamps of a sample span more than 34 years: give seconds, or use the reference")
    return relative.int()


def _first_times(keys: Layout, own: Tensor) -> Tensor:
    """Time of the first token of the sample of each token, ``[T]`` int64."""
    first = own[keys.offsets[:-1].clamp(max=own.numel() - 1)]
    return torch.repeat_interleave(first, keys.lengths, output_size=own.numel())
