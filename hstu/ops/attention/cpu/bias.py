"""The relative bias and the mask of a chunk of scores on a CPU, and the tables' gradients."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hstu.ops.attention.bias import QueryTime, bucket_thresholds, query_times
from hstu.ops.attention.cpu.plan import Chunk, Plan, Tile
from hstu.ops.attention.cpu.scratch import scratch
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import positions

# A float32 difference is looked up by its exponent and two bits of mantissa. Thresholds are 1.35 times apart,
# a cell spans 1.25 at most: it has one threshold at most, and one comparison settles the bucket.
_CELL_SHIFT = 21
_CELLS = 1 << (31 - _CELL_SHIFT)
_LANES = 4  # neighbours count in different bins: adding to one bin over and over waits on its last addition
KEPT_PER_TOKEN = 256  # indices kept from the forward for the backward: 1 KB a token


@cache
def _cell_tables(num_buckets: int) -> tuple[Tensor, Tensor]:
    """Threshold inside each cell, int64, and the bucket of each index ``(cell, lane, above threshold)``."""
    starts = (torch.arange(_CELLS, dtype=torch.int32) << _CELL_SHIFT).view(torch.float32)
    starts = starts.double().nan_to_num(posinf=2.0**128)
    thresholds = bucket_thresholds(num_buckets)
    base = torch.bucketize(starts, thresholds.double(), right=True)
    endless = torch.tensor([torch.iinfo(torch.int64).max])
    inside = torch.cat([thresholds, endless])[base]
    buckets = torch.stack([base, (base + 1).clamp(max=num_buckets)], 1)
    return inside, buckets[:, None, :].expand(_CELLS, _LANES, 2).reshape(-1)


@cache
def _lanes(bits: int) -> Tensor:
    """``2 * lane + 1``, the lanes one after the other, ``[2 ** bits]`` int32."""
    return torch.arange(1 << bits, dtype=torch.int32).remainder_(_LANES).mul_(2).add_(1)


class TimeIndex:
    """Where each score finds its time bias: the same in all layers, kept for a bounded number of scores a token.

    Attributes:
        buckets: bucket of each index.
    """

    def __init__(self, plan: Plan, keys: Layout, query_time: QueryTime, num_buckets: int) -> None:
        assert keys.timestamps is not None
        thresholds, self.buckets = _cell_tables(num_buckets)
        times, asked = keys.timestamps, query_times(keys, query_time)
        if times.numel() and int(times.max()) - int(times.min()) < 2**31:
            first = times.min()  # within a batch 31 bits nearly always do, at twice the speed of 63
            times, asked = (times - first).int(), (asked - first).int()
            thresholds = thresholds.clamp(max=2**31 - 1).int()
        self._plan, self._thresholds = plan, thresholds
        self._of_rows, self._of_columns = asked[plan.query_tokens], times[plan.keys.tokens]
        self._kept: dict[Chunk, Tensor] = {}
        self._last: tuple[Chunk, Tensor] | None = None
        self._room = KEPT_PER_TOKEN * times.numel()

    def of(self, chunk: Chunk) -> Tensor:
        """``(cell * lanes + lane) * 2 + above threshold`` of each pair, int32 (int64 when times need it)."""
        index = self._kept.get(chunk)
        if index is None:
            if self._last is None or self._last[0] is not chunk:
                self._last = chunk, self._compute(chunk)
            index = self._last[1]
            if index.numel() <= self._room:
                self._room -= index.numel()
                self._kept[chunk] = index
        return index

    def _compute(self, chunk: Chunk) -> Tensor:
        shape = (chunk.pairs,)
        seconds = scratch("seconds", shape, self._of_rows.dtype)
        for tile in chunk.tiles:
            rows = self._plan.rows(self._of_rows, tile.group)[:, tile.r0 : tile.r1, None]
            columns = self._plan.columns(self._of_columns, tile.group)[:, None, tile.c0 : tile.c1]
            torch.sub(rows, columns, out=seconds[tile.first : tile.last].view(tile.shape))
        cell = scratch("cell", shape, torch.float32).copy_(seconds.abs_()).view(torch.int32)
        cell.bitwise_right_shift_(_CELL_SHIFT)
        threshold = torch.index_select(self._thresholds, 0, cell, out=scratch("threshold", shape, seconds.dtype))
        # The sign of the distance to the cell's threshold, 0 or -1, is much faster than a comparison.
        below = seconds.sub_(threshold).bitwise_right_shift_(torch.iinfo(seconds.dtype).bits - 1)
        return torch.add(_lanes(chunk.pairs.bit_length())[: chunk.pairs], cell, alpha=2 * _LANES).add_(below)


class ScoreBias:
    """What is added to the products of q and k, in ``dtype``: the relative bias, and where a row may not attend to a
    column a great negative number, of which SiLU and its slope are exactly zero.
    """

    def __init__(
        self, plan: Plan, position: Tensor | None, time: Tensor | None, times: TimeIndex | None, dtype: torch.dtype
    ) -> None:
        self._plan, self._times, self._dtype = plan, times, dtype
        self._masked = torch.finfo(dtype).min / 2
        self._position = None if position is None else position.detach().to(dtype)
        self._centre = 0 if position is None else (position.numel() - 1) // 2
        self.position_grad: Tensor | None = None
        self.time_grad: Tensor | None = None
        self._spread: Tensor | None = None
        if time is not None and times is not None:
            self._spread = time.detach().to(dtype).index_select(0, times.buckets)

    def want_gradients(self, position: bool, time: bool) -> None:
        """Start gathering the gradients of the tables named."""
        if position and self._position is not None:
            self.position_grad = torch.zeros(self._position.numel(), dtype=torch.float64)
        if time and self._spread is not None:
            self.time_grad = torch.zeros(self._spread.numel(), dtype=torch.float64)

    def of(self, chunk: Chunk) -> list[Tensor | None]:
        """For each tile ``[g, 1, R, C]``, or ``[1, 1, R, C]`` when its sequences share it; None for nothing."""
        if self._times is None or self._spread is None:
            return [None if x is None else x[:, None] for x in map(self._without_time, chunk.tiles)]
        flat = scratch("bias", (chunk.pairs,), self._spread.dtype)
        torch.index_select(self._spread, 0, self._times.of(chunk), out=flat)
        result: list[Tensor | None] = []
        for tile in chunk.tiles:
            own, rest = flat[tile.first : tile.last].view(tile.shape), self._without_time(tile)
            result.append((own if rest is None else own.add_(rest))[:, None])
        return result

    def add_gradient(self, chunk: Chunk, d_scores: list[Tensor]) -> None:
        """Add the gradients ``[g, H, R, C]`` of the scores of each tile."""
        flat = scratch("per sample", (chunk.pairs,), d_scores[0].dtype)
        for tile, own in zip(chunk.tiles, d_scores, strict=True):
            per_sample = torch.sum(own, 1, out=flat[tile.first : tile.last].view(tile.shape))
            if self.position_grad is not None:
                self._add_position_gradient(tile, per_sample)
        if self.time_grad is not None:
            assert self._times is not None
            weights = flat if flat.dtype == torch.float64 else flat.float()
            self.time_grad += torch.bincount(self._times.of(chunk), weights, self.time_grad.numel())

    def time_table_gradient(self, num_buckets: int) -> Tensor:
        """Gradient of the time table, ``[num_buckets + 1]`` float64."""
        assert self.time_grad is not None and self._times is not None
        return self.time_grad.new_zeros(num_buckets + 1).index_add_(0, self._times.buckets, self.time_grad)

    def _without_time(self, tile: Tile) -> Tensor | None:
        """Mask and position bias, ``[1, R, C]`` or ``[g, R, C]``; None when they add nothing."""
        hidden = self._plan.hidden(tile)
        by_distance = tile.distance is not None and (hidden is None or hidden.pairs is None)
        if by_distance and (hidden is not None or self._position is not None):
            return self._diagonals(tile, None if hidden is None else hidden.distances)
        if hidden is None and self._position is None:
            return None
        bias = None
        if self._position is not None:
            bias = self._position[self._position_index(tile)] if tile.distance is None else self._diagonals(tile)
        if hidden is None:
            return bias
        assert hidden.pairs is not None
        if bias is None:
            bias = torch.zeros(hidden.pairs.shape, dtype=self._dtype)
        return bias.masked_fill(hidden.pairs, self._masked)

    def _diagonals(self, tile: Tile, hidden: Tensor | None = None) -> Tensor:
        """Position bias of a tile, far below zero at the distances hidden."""
        assert tile.distance is not None
        _, rows, columns = tile.shape
        last = self._centre + tile.distance
        width = rows + columns - 1
        table = torch.zeros(width, dtype=self._dtype) if self._position is None else self._position[last : last + width]
        if hidden is not None:
            table = table.masked_fill(hidden, self._masked)
        # Row r of a tile is the table from centre - r on: overlapping rows, taken from the last to the first.
        return table.unfold(0, columns, 1).index_select(0, torch.arange(rows - 1, -1, -1))[None]

    def _position_index(self, tile: Tile) -> Tensor:
        history = tile.group.history[:, None, None]
        rows, columns = (positions(place, history) for place in tile.places())
        return columns - rows + self._centre

    def _add_position_gradient(self, tile: Tile, per_sample: Tensor) -> None:
        assert self.position_grad is not None
        if tile.distance is None:
            index, weights = self._position_index(tile).view(-1), per_sample.reshape(-1)
            self.position_grad += torch.bincount(index, weights.double(), self.position_grad.numel())
            return
        _, rows, columns = tile.shape
        last = self._centre + tile.distance
        # Written into a matrix one column wider than its row step, diagonals become columns.
        width = rows + columns - 1
        skewed = per_sample.new_zeros(rows * width + rows)
        torch.sum(per_sample, 0, out=skewed.as_strided((rows, columns), (width - 1, 1), rows - 1))
        self.position_grad[last : last + width] += skewed[: rows * width].view(rows, width).sum(0)
