"""HSTU attention on a CPU: in compiled loops where there are any, else in tiles that stay in cache.

The tiles take sequences of similar length together. No score outlives its tile: the backward computes it again, so
memory grows with the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.cpu.bias import ScoreBias, TimeIndex
from hstu.ops.attention.cpu.compiled import CompiledAttention
from hstu.ops.attention.cpu.padded import PaddedTokens
from hstu.ops.attention.cpu.plan import Chunk, Plan, Tile
from hstu.ops.attention.cpu.scratch import scratch
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.loops import compiled_loops_for

aten = torch.ops.aten
Padded = list[Tensor]  # ``[g * H, n, d]`` of each group


def hstu_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    mask: Mask,
    *,
    scaling_seqlen: float,
    alpha: float,
    bias: RelativeBias,
    keys: Layout,
) -> Tensor:
    """Same as :func:`hstu.ops.attention.reference.hstu_attention_reference`."""
    attention = CpuAttention(
        layout, mask, heads=q.shape[1], scaling_seqlen=scaling_seqlen, alpha=alpha, bias=bias, keys=keys
    )
    return _CpuAttention.apply(q, k, v, bias.position, bias.time, attention)


class CpuAttention:
    """Forward and backward for one batch: how it is cut up is kept on the layout, for all layers."""

    def __init__(
        self,
        layout: Layout,
        mask: Mask,
        *,
        heads: int,
        scaling_seqlen: float,
        alpha: float,
        bias: RelativeBias,
        keys: Layout,
    ) -> None:
        self._layout, self._mask, self._keys, self._heads, self._bias = layout, mask, keys, heads, bias
        self.alpha, self.scale = alpha, 1.0 / scaling_seqlen

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None) -> Tensor:
        """Return the output ``[T, H, d_v]``."""
        if compiled_loops_for(q, position, time):
            return self._compiled().forward(q, k, v, position, time)
        return _Pass(self, q.dtype, position, time).forward(q, k, v)

    def gradients(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        position: Tensor | None,
        time: Tensor | None,
        needs: tuple[bool, bool, bool, bool],
    ) -> list[Tensor | None]:
        """Gradients of q, k, v and both tables; ``needs``: of q and k, of v, of each table."""
        need_qk, need_v, need_position, need_time = needs
        if compiled_loops_for(grad, position, time):
            q, k, v = (torch.empty(x.shape) for x in inputs)
            return [q, k, v, *self._compiled().backward(grad, inputs, (position, time), (q, k, v), needs[2:])]
        run = _Pass(self, grad.dtype, position, time)
        run.bias.want_gradients(need_position, need_time)
        grads = run.backward((*inputs, grad), (need_qk, need_v), need_position or need_time)
        d_position = d_time = None
        if position is not None and run.bias.position_grad is not None:
            d_position = run.bias.position_grad.to(position.dtype)
        if time is not None and run.bias.time_grad is not None:
            d_time = run.bias.time_table_gradient(time.numel() - 1).to(time.dtype)
        return [*grads, d_position, d_time]

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor | None, Tensor | None],
        into: tuple[Tensor, Tensor, Tensor],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of q, k and v to ``into``; return those of the tables."""
        if compiled_loops_for(grad, *tables):
            return self._compiled().backward(grad, inputs, tables, into, needs)
        *grads, d_position, d_time = self.gradients(grad, inputs, *tables, (True, True, *needs))
        for target, own in zip(into, grads, strict=True):
            assert own is not None
            target.copy_(own)
        return d_position, d_time

    def tiles(self) -> tuple[Plan, TimeIndex | None]:
        """The plan of the tiles, and where their scores find the bias over time."""
        # Nothing that is kept on a layout refers to it: its memory goes with the batch, not with the next collection.
        layout, mask, keys, heads, bias = self._layout, self._mask, self._keys, self._heads, self._bias
        case = (mask, heads, None if keys is layout else keys)
        plan = layout.keep(("cpu", *case), lambda: Plan(layout, mask, heads, keys))
        if bias.time is None:
            return plan, None
        buckets, which = bias.time.numel() - 1, bias.query_time
        kept = ("cpu times", *case, buckets, which)
        return plan, layout.keep(kept, lambda: TimeIndex(plan, keys, which, buckets))

    def _compiled(self) -> CompiledAttention:
        return CompiledAttention(
            self._layout, self._mask, self._keys, self._bias.query_time, alpha=self.alpha, scale=self.scale
        )


class _Pass:
    """One forward or backward pass, chunk by chunk."""

    def __init__(self, call: CpuAttention, dtype: torch.dtype, position: Tensor | None, time: Tensor | None) -> None:
        self.call, self.dtype = call, dtype
        self.plan, times = call.tiles()
        # Scores take the wider type of q and the tables; sums of low-precision products are kept in float32.
        self.score_dtype = dtype
        for table in (position, time):
            if table is not None:
                self.score_dtype = torch.promote_types(self.score_dtype, table.dtype)
        self.sum_dtype = torch.promote_types(dtype, torch.float32)
        self.bias = ScoreBias(self.plan, position, time, times, self.score_dtype)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Return the output ``[T, H, d_v]`` of q, k and v."""
        queries, keys = self.plan.queries, self.plan.keys
        q, k, v = map(self.pad, ("q", "k", "v"), (queries, keys, keys), inputs)
        out, sums = self.zeros("out", queries, inputs[2])
        for chunk in self.plan.chunks:
            scores = self.scores(q, k, chunk)
            weights = self.lowered(aten.silu.out(scores, out=scores))
            for tile, own in zip(chunk.tiles, self.split(weights, chunk), strict=True):
                self.add_product(sums, tile, rows, own, columns(v, tile), self.call.scale)
        return queries.unpad(out, self.dtype)

    def backward(self, inputs: tuple[Tensor, ...], needs: tuple[bool, bool], need_bias: bool) -> list[Tensor | None]:
        """Gradients of q, k and v from these and the output's; those of the tables gather in ``self.bias``.

        ``needs``: of q and k, of v.
        """
        queries, keys = self.plan.queries, self.plan.keys
        sides = queries, keys, keys
        padded = list(map(self.pad, ("q", "k", "v", "do"), (*sides, queries), inputs))
        wanted = zip(("dq", "dk", "dv"), sides, inputs[:3], (needs[0], needs[0], needs[1]), strict=True)
        grads = [self.zeros(name, side, x) if need else (None, None) for name, side, x, need in wanted]
        for chunk in self.plan.chunks:
            self._chunk_backward(chunk, padded, [views for _, views in grads], need_bias)
        return [
            None if dense is None else side.unpad(dense, self.dtype)
            for side, (dense, _) in zip(sides, grads, strict=True)
        ]

    def _chunk_backward(self, chunk: Chunk, inputs: list[Padded], sums: list[Padded | None], need_bias: bool) -> None:
        (q, k, v, do), (dq, dk, dv) = inputs, sums
        scores = self.scores(q, k, chunk)
        if dv is not None:
            weights = self.lowered(aten.silu.out(scores, out=scratch("silu", scores.shape, scores.dtype)))
            for tile, own in zip(chunk.tiles, self.split(weights, chunk), strict=True):
                self.add_product(dv, tile, columns, own.transpose(1, 2), rows(do, tile), self.call.scale)
        if dq is None and not need_bias:
            return
        d_weights = scratch("d_weights", scores.shape, self.dtype)
        for tile, own in zip(chunk.tiles, self.split(d_weights, chunk), strict=True):
            product(rows(do, tile), columns(v, tile).transpose(1, 2), self.call.scale, own)
        d_scores = aten.silu_backward.grad_input(d_weights.to(scores.dtype), scores, grad_input=scores)
        if need_bias:
            shaped = [x.unflatten(0, (-1, self.plan.heads)) for x in self.split(d_scores, chunk)]
            self.bias.add_gradient(chunk, shaped)
        if dq is not None and dk is not None:
            for tile, own in zip(chunk.tiles, self.split(self.lowered(d_scores), chunk), strict=True):
                self.add_product(dq, tile, rows, own, columns(k, tile), self.call.alpha)
                self.add_product(dk, tile, columns, own.transpose(1, 2), rows(q, tile), self.call.alpha)

    def scores(self, q: Padded, k: Padded, chunk: Chunk) -> Tensor:
        """``alpha <q, k> + r`` of a chunk, flat, in the score dtype; far below zero where hidden."""
        scores = scratch("scores", (chunk.pairs * self.plan.heads,), self.score_dtype)
        for tile, own, bias in zip(chunk.tiles, self.split(scores, chunk), self.bias.of(chunk), strict=True):
            a, b = rows(q, tile), columns(k, tile).transpose(1, 2)
            if self.score_dtype != self.dtype:
                own.copy_(product(a, b, self.call.alpha, scratch("part", own.shape, self.dtype)))
                if bias is not None:
                    own.unflatten(0, (-1, self.plan.heads)).add_(bias)
            elif bias is None:
                product(a, b, self.call.alpha, own)
            else:
                own.unflatten(0, (-1, self.plan.heads)).copy_(bias)
                torch.baddbmm(own, a, b, alpha=self.call.alpha, out=own)
        return scores

    def add_product(
        self, sums: Padded, tile: Tile, side: Callable[[Padded, Tile], Tensor], a: Tensor, b: Tensor, factor: float
    ) -> None:
        """Add a product to the rows or columns of a tile in ``sums``."""
        target = side(sums, tile)
        if target.dtype == a.dtype and target.is_contiguous():
            torch.baddbmm(target, a, b, alpha=factor, out=target)
        else:
            target.add_(product(a, b, factor, scratch("part", target.shape, self.dtype)))

    def split(self, flat: Tensor, chunk: Chunk) -> list[Tensor]:
        """Views ``[g * H, R, C]`` of the tiles."""
        heads = self.plan.heads
        shapes = [(tile, (tile.shape[0] * heads, *tile.shape[1:])) for tile in chunk.tiles]
        return [flat[tile.first * heads : tile.last * heads].view(shape) for tile, shape in shapes]

    def lowered(self, scores: Tensor) -> Tensor:
        """The scores in the dtype of q, for a product."""
        if scores.dtype == self.dtype:
            return scores
        return scratch("low", scores.shape, self.dtype).copy_(scores)

    def pad(self, name: str, side: PaddedTokens, x: Tensor) -> Padded:
        return side.split(side.pad(name, x))

    def zeros(self, name: str, side: PaddedTokens, like: Tensor) -> tuple[Tensor, Padded]:
        """Sums for the padded rows of ``like``: all of them, and by group."""
        dense = scratch(name, (side.size, like.shape[2]), self.sum_dtype).zero_()
        return dense, side.split(dense)


def rows(padded: Padded, tile: Tile) -> Tensor:
    """What the rows of a tile stand for, ``[g * H, R, d]``."""
    return padded[tile.group.index][:, tile.r0 : tile.r1]


def columns(padded: Padded, tile: Tile) -> Tensor:
    """What the columns of a tile stand for, ``[g * H, C, d]``."""
    return padded[tile.group.index][:, tile.c0 : tile.c1]


def product(a: Tensor, b: Tensor, factor: float, out: Tensor) -> Tensor:
    """``factor`` times the batched product."""
    return torch.baddbmm(out, a, b, beta=0, alpha=factor, out=out)


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        attention: CpuAttention,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position, time)
        ctx.attention = attention
        return attention.forward(q, k, v, position, time)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position, time = ctx.saved_tensors
        need_q, need_k, need_v, need_position, need_time, _ = ctx.needs_input_grad
        needs = (need_q or need_k, need_v, need_position, need_time)
        return (*ctx.attention.gradients(grad, (q, k, v), position, time, needs), None)
