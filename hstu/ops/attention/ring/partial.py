"""HSTU and softmax attention of one share's rows, share of columns after share of columns.

Whoever moves the columns calls ``start``, ``forward`` for each share of columns and ``finish``; then for the
gradients ``start_backward`` and ``backward`` for each share of columns. Queries, keys, values and gradients carry
a last row of zeros, see ``with_padding_row``. No score outlives its tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.ring.shard import Block, Scene, Share, gather_heads, scatter_heads

Columns = tuple[Tensor, Tensor]


class SharedAttention:
    """What both kinds of attention have in common.

    Args:
        scene: Mask, scale and bias.
        rows: The share of the queries.
        q: [t + 1, H, d_qk].
    """

    def __init__(self, scene: Scene, rows: Share, q: Tensor) -> None:
        self.scene, self.rows, self.q = scene, rows, q
        self.heads = q.shape[1]
        self.sum_dtype = torch.promote_types(q.dtype, torch.float32)
        #: Gradients of the position and time table, float64.
        self.table_gradients: list[Tensor | None] = [None, None]

    def start(self, value_width: int) -> None:
        """Begin a forward pass."""
        self.out = self.q.new_zeros(*self.q.shape[:2], value_width, dtype=self.sum_dtype)

    def forward(self, columns: Share, kv: Columns, blocks: list[Block]) -> None:
        """Add what the rows read from ``columns``, whose keys and values are ``kv`` [t' + 1, G, d]."""
        for tile, scores, seen, _ in self._tiles(columns, kv[0], blocks):
            self._read(tile, scores, seen, gather_heads(kv[1], tile.columns, self.heads))

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the output [t, H, d_v], and one number per row and head for the backward pass [t, H]."""
        raise NotImplementedError

    def start_backward(self, grad: Tensor, out: Tensor, kept: Tensor) -> None:
        """Begin a backward pass for the gradient ``grad`` of the output ``out``, both [t + 1, H, d_v]."""
        self.grad, self.dq = grad, torch.zeros_like(self.q, dtype=self.sum_dtype)

    def backward(self, columns: Share, kv: Columns, blocks: list[Block], gradients: Columns) -> None:
        """Add to ``dq``, to the tables' gradients, and to ``gradients`` of the keys and values."""
        for tile, scores, seen, indices in self._tiles(columns, kv[0], blocks):
            k, v = (gather_heads(x, tile.columns, self.heads) for x in kv)
            q, do = (gather_heads(x, tile.rows, self.heads) for x in (self.q, self.grad))
            weights, d_scores = self._differentiate(tile, scores, seen, (do @ v.transpose(2, 3)).to(scores.dtype))
            scatter_heads(gradients[1], tile.columns, weights.to(do.dtype).transpose(2, 3) @ do)
            for table, index in zip(self.table_gradients, indices, strict=True):
                if table is not None and index is not None:
                    table.index_add_(0, index.flatten(), d_scores.sum(1).flatten().to(table.dtype))
            low = (d_scores * self.scene.alpha).to(q.dtype)
            scatter_heads(self.dq, tile.rows, low @ k)
            scatter_heads(gradients[0], tile.columns, low.transpose(2, 3) @ q)

    def _tiles(self, columns: Share, k: Tensor, blocks: list[Block]) -> Iterator[tuple[Block, Tensor, Tensor, tuple]]:
        """Yield each tile, its scores [g, H, R, C], who reads whom, and its places in the bias tables."""
        for block in blocks:
            for tile in block.tiles(self.heads):
                q, own = gather_heads(self.q, tile.rows, self.heads), gather_heads(k, tile.columns, self.heads)
                scores = (q @ own.transpose(2, 3)).to(self.sum_dtype) * self.scene.alpha
                indices = self.scene.bias_indices(tile, self.rows, columns)
                for table, index in zip(self.scene.tables, indices, strict=True):
                    scores = scores if table is None else scores + table[index][:, None].to(scores.dtype)
                yield tile, scores, self.scene.seen(tile, self.rows, columns), indices

    def _read(self, tile: Block, scores: Tensor, seen: Tensor, v: Tensor) -> None:
        raise NotImplementedError

    def _differentiate(self, tile: Block, scores: Tensor, seen: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, and the gradients of the scores."""
        raise NotImplementedError


class SharedHSTU(SharedAttention):
    """``o_i = 1/S sum_j M_ij silu(alpha <q_i, k_j> + r_ij) v_j``; partial outputs simply add."""

    def __init__(self, scene: Scene, rows: Share, q: Tensor, scaling_seqlen: float) -> None:
        super().__init__(scene, rows, q)
        self.scaling_seqlen = scaling_seqlen

    def finish(self) -> tuple[Tensor, Tensor]:
        return (self.out[:-1] / self.scaling_seqlen).to(self.q.dtype), self.q[:0, :, 0]

    def start_backward(self, grad: Tensor, out: Tensor, kept: Tensor) -> None:
        super().start_backward(grad / self.scaling_seqlen, out, kept)
        self.table_gradients = [
            None if table is None else torch.zeros_like(table, dtype=torch.float64) for table in self.scene.tables
        ]

    def _read(self, tile: Block, scores: Tensor, seen: Tensor, v: Tensor) -> None:
        scatter_heads(self.out, tile.rows, (F.silu(scores) * seen).to(v.dtype) @ v)

    def _differentiate(self, tile: Block, scores: Tensor, seen: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(scores) * seen, torch.ops.aten.silu_backward(d_weights * seen, scores)


class SharedSoftmax(SharedAttention):
    """``o_i = sum_j softmax_j(alpha <q_i, k_j>) v_j``, gathered with a running maximum and sum of each row.

    "Online normalizer calculation for softmax" (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867).
    """

    def start(self, value_width: int) -> None:
        super().start(value_width)
        self.sums = self.out.new_zeros(self.q.shape[:2])
        self.maxima = torch.full_like(self.sums, float("-inf"))

    def finish(self) -> tuple[Tensor, Tensor]:
        out = self.out / self.sums[..., None]
        return out[:-1].to(self.q.dtype), (self.maxima + self.sums.log())[:-1]

    def start_backward(self, grad: Tensor, out: Tensor, kept: Tensor) -> None:
        super().start_backward(grad, out, kept)
        self.normaliser = F.pad(kept, (0, 0, 0, 1))
        self.delta = (grad.to(self.sum_dtype) * out.to(self.sum_dtype)).sum(2)

    def _read(self, tile: Block, scores: Tensor, seen: Tensor, v: Tensor) -> None:
        scores = scores.masked_fill(~seen, float("-inf"))
        old = self._of_rows(self.maxima, tile)
        new = torch.maximum(old, scores.amax(3, keepdim=True))
        # A row that has seen nothing yet has no maximum to subtract.
        base = new.masked_fill(new == float("-inf"), 0.0)
        weights, shrink = (scores - base).exp(), (old - base).exp()
        index = tile.rows.flatten()
        out = gather_heads(self.out, tile.rows, self.heads) * shrink + weights.to(v.dtype) @ v
        sums = self._of_rows(self.sums, tile) * shrink + weights.sum(3, keepdim=True)
        for total, value in ((self.out, out), (self.sums, sums[..., 0]), (self.maxima, new[..., 0])):
            total[index] = value.transpose(1, 2).flatten(0, 1)

    def _differentiate(self, tile: Block, scores: Tensor, seen: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        # Masked first: what nobody sees may exceed the normaliser without bound.
        weights = (scores - self._of_rows(self.normaliser, tile)).masked_fill(~seen, float("-inf")).exp()
        return weights, weights * (d_weights - self._of_rows(self.delta, tile))

    def _of_rows(self, values: Tensor, tile: Block) -> Tensor:
        return values[tile.rows].transpose(1, 2)[..., None]
