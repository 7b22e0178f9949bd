"""Tiles of the relative bias and its table gradients on a CPU, from passes that vectorise."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from hstu.ops.attention.bias import RelativeBias, bucket_thresholds, query_times
from hstu.ops.attention.cpu_groups import Group, Tile
from hstu.ops.attention.mask import Mask

# A float32 difference is looked up by its exponent and two bits of mantissa. Thresholds are 1.35 times apart,
# a cell spans 1.25 at most: it holds one threshold at most, and one comparison settles the bucket.
_CELL_SHIFT = 21
_CELLS = 1 << (31 - _CELL_SHIFT)
_LANES = 4  # neighbours count in different bins: adding to one bin over and over waits on its last addition


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


class TileBias:
    """Relative bias of one call, tile by tile, in ``dtype``; gathers the gradients of its tables.

    A tile's bias is ``[g, 1, R, C]``, or ``[1, 1, R, C]`` when all sequences of the group share it.
    """

    def __init__(self, bias: RelativeBias, offsets: Tensor, mask: Mask, dtype: torch.dtype) -> None:
        self.position = None if bias.position is None else bias.position.detach().to(dtype)
        self.time = None if bias.time is None else bias.time.detach().to(dtype)
        self.position_grad: Tensor | None = None
        self.time_grad: Tensor | None = None
        self._position_entries = 0 if bias.position is None else bias.position.numel()
        if self.time is not None:
            self._prepare_time(bias, offsets, mask)

    def want_gradients(self, position: bool, time: bool) -> None:
        """Start gathering the gradients of the tables named."""
        if position and self.position is not None:
            self.position_grad = torch.zeros(self.position.numel(), dtype=torch.float64)
        if time and self.time is not None:
            self.time_grad = torch.zeros(self._buckets.numel(), dtype=torch.float64)

    def tile(self, group: Group, tile: Tile) -> Tensor:
        """Bias of a tile; call :meth:`add_gradient` for it before asking for the next."""
        if self.time is None:
            return self._position_tile(group, tile)
        index = self._time_index(group, tile)
        result = self._spread.index_select(0, index.view(-1)).view(index.shape)[:, None]
        return result if self.position is None else result.add_(self._position_tile(group, tile))

    def add_gradient(self, group: Group, tile: Tile, grad: Tensor) -> None:
        """Add the score gradients ``[g, H, R, C]`` of the tile last asked for."""
        if self.time_grad is not None:
            per_sample = grad.sum(1)
            weights = per_sample.view(-1)
            if weights.dtype not in (torch.float32, torch.float64):
                weights = weights.float()
            bins = torch.bincount(self._index.view(-1), weights, self.time_grad.numel())
            self.time_grad += bins
        else:
            per_sample = grad.sum(1) if group.has_candidates else grad.view(1, -1, *grad.shape[2:]).sum(1)
        if self.position_grad is not None:
            self._add_position_gradient(group, tile, per_sample)

    def time_table_gradient(self, num_buckets: int) -> Tensor:
        """Gradient of the time table, ``[num_buckets + 1]`` float64."""
        assert self.time_grad is not None
        return self.time_grad.new_zeros(num_buckets + 1).index_add_(0, self._buckets, self.time_grad)

    def _prepare_time(self, bias: RelativeBias, offsets: Tensor, mask: Mask) -> None:
        assert self.time is not None and bias.timestamps is not None
        thresholds, self._buckets = _cell_tables(self.time.numel() - 1)
        self._spread = self.time.index_select(0, self._buckets)
        keys, readers = bias.timestamps, query_times(bias, offsets, mask.num_candidates)
        if keys.numel() and int(keys.max()) - int(keys.min()) < 2**31:
            first = keys.min()  # within a batch 31 bits nearly always do, at twice the speed of 63
            keys, readers = (keys - first).int(), (readers - first).int()
            thresholds = thresholds.clamp(max=2**31 - 1).int()
        self._keys, self._readers, self._thresholds = keys, readers, thresholds
        self._times_of: Group | None = None

    def _time_index(self, group: Group, tile: Tile) -> Tensor:
        """Index ``(cell * lanes + lane) * 2 + above`` of each score, ``[g, R, C]`` int32."""
        if self._times_of is not group:
            self._times_of = group
            self._group_times = self._readers[group.tokens][:, :, None], self._keys[group.tokens][:, None, :]
            self._lanes = torch.arange(group.n, dtype=torch.int32).remainder_(_LANES).mul_(2).add_(1)
        readers, keys = self._group_times
        seconds = torch.sub(readers[:, tile.r0 : tile.r1], keys[..., tile.c0 : tile.c1]).abs_()
        cell = seconds.float().view(torch.int32)
        cell.bitwise_right_shift_(_CELL_SHIFT)
        # The sign of the distance to the cell's threshold, 0 or -1, is much faster than a comparison.
        below = seconds.sub_(self._thresholds.index_select(0, cell.view(-1)).view(cell.shape))
        below.bitwise_right_shift_(torch.iinfo(below.dtype).bits - 1)
        lanes = self._lanes[tile.c0 : tile.c1]
        self._index = torch.add(lanes, cell, alpha=2 * _LANES, out=cell).add_(below)
        return self._index

    def _position_tile(self, group: Group, tile: Tile) -> Tensor:
        assert self.position is not None
        if group.has_candidates:
            return self.position.index_select(0, self._position_index(group, tile)).view(
                group.size, 1, tile.r1 - tile.r0, tile.c1 - tile.c0
            )
        rows, columns = tile.r1 - tile.r0, tile.c1 - tile.c0
        last = (self._position_entries - 1) // 2 + tile.c0 - (tile.r1 - 1)
        diagonals = self.position[last : last + rows + columns - 1]
        return diagonals.unfold(0, columns, 1).flip(0)[None, None]

    def _position_index(self, group: Group, tile: Tile) -> Tensor:
        rows = torch.arange(tile.r0, tile.r1).clamp(max=group.history[:, None])[:, :, None]
        columns = torch.arange(tile.c0, tile.c1).clamp(max=group.history[:, None])[:, None, :]
        return (columns - rows + (self._position_entries - 1) // 2).view(-1)

    def _add_position_gradient(self, group: Group, tile: Tile, per_sample: Tensor) -> None:
        assert self.position_grad is not None
        if group.has_candidates:
            index, weights = self._position_index(group, tile), per_sample.reshape(-1)
            self.position_grad += torch.bincount(index, weights.double(), self._position_entries)
            return
        rows, columns = tile.r1 - tile.r0, tile.c1 - tile.c0
        last = (self._position_entries - 1) // 2 + tile.c0 - (tile.r1 - 1)
        # Written into a matrix one column wider than its row step, diagonals become columns.
        width = rows + columns - 1
        skewed = per_sample.new_zeros(rows * width + rows)
        skewed.as_strided((rows, columns), (width - 1, 1), rows - 1).copy_(per_sample.sum(0))
        self.position_grad[last : last + width] += skewed[: rows * width].view(rows, width).sum(0)
