"""HSTU and softmax attention of one shard's rows, shard of columns after shard of columns.

Whoever moves the columns calls ``start``, ``forward`` for each shard of columns and ``finish``; then for the
gradients ``start_backward`` and ``backward`` for each shard of columns. Queries, keys, values and gradients carry
a last row of zeros, see ``with_padding_row``. No score outlives its tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from hstu.ops.attention.ring.shard import AttentionSpec, Block, TokenShard, gather_heads, scatter_heads

Columns = tuple[Tensor, Tensor]


class PartialAttention:
    """What both kinds of attention have in common.

    Args:
        spec: Layout, mask, scale and bias.
        rows: The shard of the queries.
        q: [t + 1, H, d_qk].
    """

    def __init__(self, spec: AttentionSpec, rows: TokenShard, q: Tensor) -> None:
        self.spec, self.rows, self.q = spec, rows, q
        self.heads = q.shape[1]
        self.sum_dtype = torch.promote_types(q.dtype, torch.float32)
        #: Gradients of the position and time table, float64.
        self.table_gradients: list[Tensor | None] = [None, None]

    def start(self, value_width: int) -> None:
        """Begin a forward pass."""
        self.out = self.q.new_zeros(*self.q.shape[:2], value_width, dtype=self.sum_dtype)

    def forward(self, columns: TokenShard, kv: Columns, blocks: list[Block]) -> None:
        """Add what the rows attend to in ``columns``, whose keys and values are ``kv`` [t' + 1, G, d]."""
        for tile, scores, visible, _ in self._tiles(columns, kv[0], blocks):
            self._attend(tile, scores, visible, gather_heads(kv[1], tile.columns, self.heads))

    def finish(self) -> tuple[Tensor, Tensor]:
        """Return the output [t, H, d_v], and one number per row and head for the backward pass [t, H]."""
        raise NotImplementedError

    def start_backward(self, grad: Tensor, out: Tensor, kept: Tensor) -> None:
        """Begin a backward pass for the gradient ``grad`` of the output ``out``, both [t + 1, H, d_v]."""
        self.grad, self.dq = grad, torch.zeros_like(self.q, dtype=self.sum_dtype)

    def backward(self, columns: TokenShard, kv: Columns, blocks: list[Block], gradients: Columns) -> None:
        """Add to ``dq``, to the tables' gradients, and to ``gradients`` of the keys and values."""
        for tile, scores, visible, indices in self._tiles(columns, kv[0], blocks):
            k, v = (gather_heads(x, tile.columns, self.heads) for x in kv)
            q, do = (gather_heads(x, tile.rows, self.heads) for x in (self.q, self.grad))
            weights, d_scores = self._differentiate(tile, scores, visible, (do @ v.transpose(2, 3)).to(scores.dtype))
            scatter_heads(gradients[1], tile.columns, weights.to(do.dtype).transpose(2, 3) @ do)
            for table, index in zip(self.table_gradients, indices, strict=True):
                if table is not None and index is not None:
                    table.index_add_(0, index.flatten(), d_scores.sum(1).flatten().to(table.dtype))
            low = (d_scores * self.spec.alpha).to(q.dtype)
            scatter_heads(self.dq, tile.rows, low @ k)
            scatter_heads(gradients[0], tile.columns, low.transpose(2, 3) @ q)

    def _tiles(
        self, columns: TokenShard, k: Tensor, blocks: list[Block]
    ) -> Iterator[tuple[Block, Tensor, Tensor, tuple]]:
        """Yield each tile, its scores [g, H, R, C], who attends to whom, and its places in the bias tables."""
        for block in blocks:
            for tile in block.tiles(self.heads):
                q, own = gather_heads(self.q, tile.rows, self.heads), gather_heads(k, tile.columns, self.heads)
                scores = (q @ own.transpose(2, 3)).to(self.sum_dtype) * self.spec.alpha
                indices = self.spec.bias_indices(tile, self.rows, columns)
                for table, index in zip(self.spec.tables, indices, strict=True):
                    scores = scores if table is None else scores + table[index][:, None].to(scores.dtype)
                yield tile, scores, self.spec.visible(tile, self.rows, columns), indices

    def _attend(self, tile: Block, scores: Tensor, visible: Tensor, v: Tensor) -> None:
        raise NotImplementedError

    def _differentiate(self, tile: Block, scores: Tensor, visible: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights, and the gradients of the scores."""
        raise NotImplementedError


class PartialHSTU(PartialAttention):
    """``o_i = 1/S sum_j M_ij silu(alpha <q_i, k_j> + r_ij) v_j``; partial outputs simply add."""

    def __init__(self, spec: AttentionSpec, rows: TokenShard, q: Tensor, scaling_seqlen: float) -> None:
        super().__init__(spec, rows, q)
        self.scaling_seqlen = scaling_seqlen

    def finish(self) -> tuple[Tensor, Tensor]:
        return (self.out[:-1] / self.scaling_seqlen).to(self.q.dtype), self.q[:0, :, 0]

    def start_backward(self, grad: Tensor, out: Tensor, kept: Tensor) -> None:
        super().start_backward(grad / self.scaling_seqlen, out, kept)
        self.table_gradients = [
            None if table is None else torch.zeros_like(table, dtype=torch.float64) for table in self.spec.tables
        ]

    def _attend(self, tile: Block, scores: Tensor, visible: Tensor, v: Tensor) -> None:
        scatter_heads(self.out, tile.rows, (F.silu(scores) * visible).to(v.dtype) @ v)

    def _differentiate(self, tile: Block, scores: Tensor, visible: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        return F.silu(scores) * visible, torch.ops.aten.silu_backward(d_weights * visible, scores)


class PartialSoftmax(PartialAttention):
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

    def _attend(self, tile: Block, scores: Tensor, visible: Tensor, v: Tensor) -> None:
        scores = scores.masked_fill(~visible, float("-inf"))
        old = self._of_rows(self.maxima, tile)
        new = torch.maximum(old, scores.amax(3, keepdim=True))
        # A row that has attended to nothing yet has no maximum to subtract.
        base = new.masked_fill(new == float("-inf"), 0.0)
        weights, shrink = (scores - base).exp(), (old - base).exp()
        index = tile.rows.flatten()
        out = gather_heads(self.out, tile.rows, self.heads) * shrink + weights.to(v.dtype) @ v
        sums = self._of_rows(self.sums, tile) * shrink + weights.sum(3, keepdim=True)
        for total, value in ((self.out, out), (self.sums, sums[..., 0]), (self.maxima, new[..., 0])):
            total[index] = value.transpose(1, 2).flatten(0, 1)

    def _differentiate(self, tile: Block, scores: Tensor, visible: Tensor, d_weights: Tensor) -> tuple[Tensor, Tensor]:
        # Masked first: what nobody attends to may exceed the normaliser without bound.
        weights = (scores - self._of_rows(self.normaliser, tile)).masked_fill(~visible, float("-inf")).exp()
        return weights, weights * (d_weights - self._of_rows(self.delta, tile))

    def _of_rows(self, values: Tensor, tile: Block) -> Tensor:
        return values[tile.rows].transpose(1, 2)[..., None]
