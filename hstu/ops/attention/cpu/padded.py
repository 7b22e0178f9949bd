"""The tokens of a batch, padded to the length of their group."""

from __future__ import annotations

import torch
from torch import Tensor

from hstu.ops.attention.cpu.scratch import scratch


class PaddedTokens:
    """All groups one after the other: P rows, ``[g, H, n]`` of each.

    Args:
        shapes: sequences g and padded length n of each group.
        starts: first token of each sequence, in the order of the groups.
        lengths: tokens of each sequence, at least one.
        total: tokens of the batch; those of no group come back as zeros.
        heads: H.

    Attributes:
        tokens: token that each padded place of one head stands for; padding repeats the last one of its sequence.
    """

    def __init__(
        self, shapes: list[tuple[int, int]], starts: Tensor, lengths: Tensor, total: Tensor, heads: int
    ) -> None:
        self.heads, self._sizes = heads, [size * heads * n for size, n in shapes]
        self._widths = [n for _, n in shapes]
        groups = [size for size, _ in shapes]
        parts = list(zip(shapes, starts.split(groups), lengths.split(groups), strict=True))
        empty = torch.zeros(0, dtype=torch.int64)
        tokens = [
            torch.minimum(torch.arange(n), length[:, None] - 1) + start[:, None] for (_, n), start, length in parts
        ]
        self.tokens = torch.cat([empty, *(own.view(-1) for own in tokens)])
        head = torch.arange(heads)[:, None]
        self._rows = torch.cat([empty, *(torch.add(head, own[:, None, :], alpha=heads).view(-1) for own in tokens)])
        self._padding: Tensor | None = None
        own, places = self._rows, torch.arange(self._rows.numel())
        if own.numel() > int(lengths.sum()) * heads:
            real = torch.cat(
                [
                    (torch.arange(n) < length[:, None])[:, None].expand(size, heads, n).reshape(-1)
                    for (size, n), _, length in parts
                ]
            )
            places, self._padding = real.nonzero().view(-1), real.logical_not_().nonzero().view(-1)
            own = own.index_select(0, places)
        self._inverse = torch.zeros(int(total) * heads, dtype=torch.int64).index_copy_(0, own, places)
        #: Rows of the batch that belong to a group, and their places, where not all do.
        self._grouped = (own, places) if own.numel() < self._inverse.numel() else None

    @property
    def size(self) -> int:
        """P."""
        return self._rows.numel()

    def pad(self, name: str, x: Tensor) -> Tensor:
        """Rows of ``x [T, H, d]`` as ``[P, d]`` in scratch memory, zero as padding: it adds to no sum over tokens."""
        dense = scratch(name, (self.size, x.shape[2]), x.dtype)
        torch.index_select(x.reshape(x.shape[0] * x.shape[1], x.shape[2]), 0, self._rows, out=dense)
        return dense if self._padding is None else dense.index_fill_(0, self._padding, 0.0)

    def unpad(self, dense: Tensor, dtype: torch.dtype) -> Tensor:
        """Inverse of :meth:`pad`: ``[T, H, d]`` in ``dtype``."""
        if self._grouped is None:
            rows = dense.index_select(0, self._inverse).to(dtype)
        else:
            own, places = self._grouped
            zeros = torch.zeros(self._inverse.numel(), dense.shape[1], dtype=dtype)
            rows = zeros.index_copy_(0, own, dense.index_select(0, places).to(dtype))
        return rows.view(rows.shape[0] // self.heads, self.heads, rows.shape[1])

    def split(self, dense: Tensor) -> list[Tensor]:
        """Views ``[g * H, n, d]`` of the groups of ``dense [P, d]``."""
        parts = dense.split(self._sizes)
        return [part.view(-1, n, dense.shape[1]) for part, n in zip(parts, self._widths, strict=True)]
