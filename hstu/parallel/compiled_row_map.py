"""The map from ids to rows in compiled loops, on a CPU: the same rows, scores and counters, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hstu.ops.loops import compiled_loops_for, run_shares, shares_of
from hstu.ops.row_sets import AGEING, WAYS
from hstu.parallel.row_map import RowMap


class CompiledRowMap(RowMap):
    """See ``RowMap``, whose parameters it takes; where ``RowMap`` computes with tensors, loops go from id to id."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options, fixed_shapes=False)
        self._grid = self.parts.start, self.parts.step, self.sets

    def _find(self, ids: Tensor, places: Tensor | None = None) -> Tensor:
        from hstu.ops.numba_rows import find

        ids = ids.contiguous()
        places = torch.full_like(ids, self.size) if places is None else places.clone()
        arrays, shares = (ids.numpy(), self.ids.numpy()), shares_of(2 * WAYS * len(ids))
        run_shares(shares, lambda share: find(*arrays, *self._grid, places.numpy(), share, shares))
        return places

    def _after(self, ids: Tensor, places: Tensor) -> Tensor:
        return self._find(ids, places)

    def _rows(self, ids: Tensor, places: Tensor) -> Tensor:
        from hstu.ops.numba_rows import rows_of

        rows = torch.empty_like(places)
        rows_of(ids.contiguous().numpy(), places.numpy(), self.size, *self._grid, self.usable, rows.numpy())
        return rows

    def _distinct(self, ids: Tensor, some: Tensor) -> tuple[Tensor, Tensor]:
        new, counts = np.unique(ids.numpy()[some.numpy()], return_counts=True)
        return torch.from_numpy(new), torch.from_numpy(counts)

    def _counters(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        from hstu.ops.numba_rows import counters

        own, old = ids.new_empty(2 * len(ids)), ids.new_empty(AGEING * len(ids))
        start, step, _ = self._grid
        counters(ids.numpy(), int(self.clock), start, step, self.counters, own.numpy(), old.numpy())
        return own, old

    def _chosen(self, ids: Tensor, counts: Tensor, due: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        from hstu.ops.numba_rows import choose, settle

        least = {"lfu": -1, "none": 0}.get(self.args.evict_strategy)
        if least is None:
            least = max(0, int(self.clock) - (self.args.ttl or 0))
        keys, *found = (torch.empty_like(ids) for _ in range(4))
        scores = self.scores.numpy()
        choose(ids.numpy(), scores, *self._grid, keys.numpy())
        keys.numpy().sort()  # in registers, unlike torch's
        taken = settle(keys.numpy(), ids.numpy(), counts.numpy(), scores, least, *(x.numpy() for x in found))
        places, ids, counts = (x[:taken] for x in found)
        return places, ids, counts


def row_map(rows: int, args: Any, parts: range, device: torch.device, *, waits: bool) -> RowMap:
    """Return the map of ``rows`` for ``device``; see ``RowMap``. ``waits``: the host may wait for the device."""
    if waits and compiled_loops_for(torch.empty(0, device=device)):
        return CompiledRowMap(rows, args, parts, device)
    return RowMap(rows, args, parts, device, fixed_shapes=not waits)
