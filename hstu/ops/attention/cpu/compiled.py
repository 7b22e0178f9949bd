"""HSTU attention on a CPU in compiled loops: same as the tiles of torch's operators, and faster."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hstu.ops.attention.bias import QueryTime, bucket_thresholds, query_times
from hstu.ops.attention.cpu.runs import Pairs
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.loops import run_shares, shares_of

KEPT_PER_TOKEN = 512  # buckets kept from layer to layer and for the backward, a byte each


class Buckets:
    """Time bucket of each pair, as far as they are kept."""

    def __init__(self, pairs: Pairs, keys: Layout, query_time: QueryTime, num_buckets: int) -> None:
        from hstu.ops.attention.cpu.numba_hstu import keep_buckets

        assert keys.timestamps is not None
        self.thresholds = bucket_thresholds(num_buckets)
        self.asked, self.times = query_times(keys, query_time).contiguous(), keys.timestamps.contiguous()
        stops = pairs.reach.cumsum(0)
        room = KEPT_PER_TOKEN * self.times.numel()
        self.kept_at = torch.where(stops <= room, stops - pairs.reach, -1)
        self.kept = torch.empty(min(room, int(stops[-1]) if stops.numel() else 0), dtype=torch.uint8)
        parts, shares = pairs.parts.numpy(), shares_of(self.kept.numel())
        arrays = [x.numpy() for x in (pairs.reach, *self.tensors())]
        run_shares(shares, lambda share: keep_buckets(parts, *arrays, share, shares))

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the loops' arguments."""
        return self.thresholds, self.asked, self.times, self.kept, self.kept_at


class CompiledAttention:
    """Forward and backward for one batch; what it needs of the batch is kept on the layout, for all layers."""

    def __init__(
        self, layout: Layout, mask: Mask, keys: Layout, query_time: QueryTime, *, alpha: float, scale: float
    ) -> None:
        self._case, self._query_time = (mask, None if keys is layout else keys), query_time
        self._layout, self._keys, self._factors = layout, keys, (alpha, scale)
        self._pairs: Pairs = layout.keep(("cpu runs", *self._case), lambda: Pairs(layout, mask, keys))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None) -> Tensor:
        """Return the output ``[T, H, d_v]``."""
        from hstu.ops.attention.cpu.numba_hstu import forward

        out = torch.empty(*q.shape[:2], v.shape[2])
        values, shape = _flat(q, k, v, out)
        pairs, bias = self._arrays(position, time)
        rest, shares = (shape, *self._factors, self._pairs.most_rows), self._shares(q)
        run_shares(shares, lambda share: forward(*values, *pairs, *bias, *rest, share, shares))
        return out

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor | None, Tensor | None],
        into: tuple[Tensor, Tensor, Tensor],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of q, k and v to ``into``; return those of the tables, where needed."""
        from hstu.ops.attention.cpu.numba_hstu import backward

        shares, plan = self._shares(inputs[0]), self._pairs
        pairs, bias = self._arrays(*tables)
        sizes = [x.numel() if x is not None and need else 0 for x, need in zip(tables, needs, strict=True)]
        d_position = torch.zeros(shares, sizes[0], dtype=torch.float64)
        d_time = torch.zeros(shares, 4, sizes[1], dtype=torch.float64)
        partial = [torch.empty(plan.partial_keys, *x.shape[1:]) for x in inputs[1:]]
        if not bool((self._layout.lengths > 0).all()):  # keys that nobody asks for
            for x in into[1:]:
                x.zero_()
        assert all(x.stride(2) == 1 for x in into)
        values, shape = _flat(*inputs, grad, *into)
        rest = shape, *self._factors, plan.most_rows
        sums = [x.view(-1).numpy() for x in partial] + [d_position.numpy(), d_time.numpy()]
        run_shares(shares, lambda share: backward(*values, *pairs, *bias, *rest, share, shares, *sums))
        for first, count, places in plan.split:
            for x, own in zip(into[1:], partial, strict=True):
                total = x[first : first + count].zero_()
                for at in places:
                    total += own[at : at + count]
        return (
            d_position.sum(0).float() if sizes[0] else None,
            d_time.sum((0, 1)).float() if sizes[1] else None,
        )

    def _shares(self, q: Tensor) -> int:
        return min(shares_of(self._pairs.pairs * q.shape[1]), max(1, self._pairs.parts.shape[0] * q.shape[1]))

    def _arrays(self, position: Tensor | None, time: Tensor | None) -> tuple[list[Any], list[Any]]:
        """Arrays of the pairs, and of the bias: empty tables where there is none."""
        plan, none, whole = self._pairs, torch.empty(0), torch.empty(0, dtype=torch.int64)
        kept: tuple[Tensor, ...] = (whole, whole, whole, torch.empty(0, dtype=torch.uint8), whole)
        if time is not None:
            count, which = time.numel() - 1, self._query_time
            key = ("cpu buckets", *self._case, count, which)
            kept = self._layout.keep(key, lambda: Buckets(plan, self._keys, which, count)).tensors()
        tables = [none if x is None else x.contiguous() for x in (position, time)]
        pairs = [x.numpy() for x in (plan.parts, plan.rows, plan.first, plan.starts, plan.stops)]
        return pairs, [x.detach().numpy() for x in (*tables, *kept)]


def _flat(*tensors: Tensor) -> tuple[list[Any], Any]:
    """The memory of each tensor ``[T, H, d]`` as one vector; steps of a token and of a head, d and H, of each."""
    arrays, shapes = [], []
    for x in tensors:
        x = x.detach()
        if x.stride(2) != 1:
            x = x.contiguous()
        steps = x.stride()
        size = 1 + sum((n - 1) * step for n, step in zip(x.shape, steps, strict=True)) if x.numel() else 0
        arrays.append(x.as_strided((size,), (1,)).numpy())
        shapes.append((*steps[:2], x.shape[2], x.shape[1]))
    return arrays, torch.tensor(shapes).numpy()
