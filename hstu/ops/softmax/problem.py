"""What a cross-entropy needs besides its differentiable matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Problem:
    """Arguments of :func:`hstu.ops.softmax.pool_cross_entropy` under their names there."""

    positive_ids: Tensor
    pool_ids: Tensor
    temperature: float
    columns: Tensor | None
    stocked: Tensor | None = None

    def same(self, rows: slice = slice(None)) -> Tensor:
        """Which negatives of these queries are the positive itself, or no item, ``[l, K]``."""
        ids = self.pool_ids[None, :] if self.columns is None else self.pool_ids[self.columns[rows]]
        same = ids == self.positive_ids[rows, None]
        return same if self.stocked is None else same | ~self.stocked
