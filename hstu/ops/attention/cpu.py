"""HSTU attention on a CPU: sequences of similar length together, in tiles that stay in cache.

No score outlives its tile: the backward computes it again, so memory grows with the number of tokens.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.cpu_bias import TileBias
from hstu.ops.attention.cpu_groups import Group, Layout, Tile
from hstu.ops.attention.mask import Mask

aten = torch.ops.aten


def hstu_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    scaling_seqlen: float,
    alpha: float,
    mask: Mask,
    bias: RelativeBias | None,
) -> Tensor:
    """Same as :func:`hstu.ops.attention.reference.hstu_attention_reference`."""
    attention = CpuAttention(offsets, q.shape[1], scaling_seqlen, alpha, mask, bias)
    position, time = (None, None) if bias is None else (bias.position, bias.time)
    return _CpuAttention.apply(q, k, v, position, time, attention)


class CpuAttention:
    """Forward and backward for one batch: how it is cut into tiles is worked out once for both."""

    def __init__(
        self,
        offsets: Tensor,
        heads: int,
        scaling_seqlen: float,
        alpha: float,
        mask: Mask,
        bias: RelativeBias | None,
    ) -> None:
        self._call = _Call(offsets, Layout(offsets, mask, heads), scaling_seqlen, alpha, mask, bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None) -> Tensor:
        """Return the output ``[T, H, d_v]``."""
        return self._pass((q, k, v), position, time).forward()

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
        run = self._pass(inputs, position, time)
        if run.bias is not None:
            run.bias.want_gradients(need_position, need_time)
        grads = run.backward(grad, need_qk, need_v, need_position or need_time)
        d_position = d_time = None
        if need_position and position is not None:
            assert run.bias is not None and run.bias.position_grad is not None
            d_position = run.bias.position_grad.to(position.dtype)
        if need_time and time is not None:
            assert run.bias is not None
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
        *grads, d_position, d_time = self.gradients(grad, inputs, *tables, (True, True, *needs))
        for target, own in zip(into, grads, strict=True):
            assert own is not None
            target.copy_(own)
        return d_position, d_time

    def _pass(self, inputs: tuple[Tensor, Tensor, Tensor], position: Tensor | None, time: Tensor | None) -> _Pass:
        return _Pass(*inputs, self._call, [table for table in (position, time) if table is not None])


@dataclass(frozen=True)
class _Call:
    """What a call needs besides its differentiable tensors."""

    offsets: Tensor
    layout: Layout
    scaling_seqlen: float
    alpha: float
    mask: Mask
    bias: RelativeBias | None


@dataclass
class _Workspace:
    """Buffers used again from tile to tile: fresh memory costs more than the arithmetic on it."""

    buffers: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        size = math.prod(shape)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name, dtype] = torch.empty(size, dtype=dtype)
        return buffer[:size].view(shape)


_kept = threading.local()  # tiles are bounded, so one workspace a thread is kept from call to call


class _Pass:
    """One forward or backward pass over all tiles; dense tensors are ``[P, d]`` as in :class:`Layout`."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, call: _Call, tables: list[Tensor]) -> None:
        self.call, self.layout, self.dtype, self.heads = call, call.layout, q.dtype, q.shape[1]
        # Scores take the wider type of q and the tables; sums of low-precision products are kept in float32.
        self.score_dtype = q.dtype
        for table in tables:
            self.score_dtype = torch.promote_types(self.score_dtype, table.dtype)
        self.sum_dtype = torch.promote_types(q.dtype, torch.float32)
        # Zero rows as padding of v (and of the output's gradient) keep padding out of every sum over tokens.
        self.q = self.layout.pad(q, scale=call.alpha)
        self.k, self.v = self.layout.pad(k), self.layout.pad(v, zero=True)
        self.space: _Workspace = _kept.__dict__.setdefault("space", _Workspace())
        self.bias = None
        if tables:
            assert call.bias is not None
            self.bias = TileBias(call.bias, call.offsets, call.mask, self.score_dtype)

    def forward(self) -> Tensor:
        out = self.zeros(self.v)
        for group in self.layout.groups:
            q, k, v, sums = (self.layout.of(group, x) for x in (self.q, self.k, self.v, out))
            for tile in group.tiles(self.call.mask, self.heads):
                scores = self.scores(q, k, group, tile)
                weights = aten.silu.out(scores, out=scores)
                self.hide(group, tile, weights)
                low = self.lowered("low", weights)
                sums[:, tile.r0 : tile.r1].add_(self.product("part", low, v[:, tile.c0 : tile.c1]))
        return self.layout.unpad(out.div_(self.call.scaling_seqlen), self.dtype)

    def backward(self, grad: Tensor, need_qk: bool, need_v: bool, need_bias: bool) -> list[Tensor | None]:
        """Gradients of q, k and v; those of the tables gather in ``self.bias``."""
        do = self.layout.pad(grad, scale=1.0 / self.call.scaling_seqlen, zero=True)
        inputs = (self.q, self.k, self.v, do)
        sums = [self.zeros(x) if need else None for x, need in zip(inputs[:3], (need_qk, need_qk, need_v), strict=True)]
        for group in self.layout.groups:
            own = [self.layout.of(group, x) for x in inputs]
            own_sums = [None if x is None else self.layout.of(group, x) for x in sums]
            for tile in group.tiles(self.call.mask, self.heads):
                self._tile_backward(group, tile, own, own_sums, need_bias)
        if sums[0] is not None:
            sums[0].mul_(self.call.alpha)
        return [None if x is None else self.layout.unpad(x, self.dtype) for x in sums]

    def _tile_backward(
        self, group: Group, tile: Tile, inputs: list[Tensor], sums: list[Tensor | None], need_bias: bool
    ) -> None:
        (q, k, v, do), (dq, dk, dv) = inputs, sums
        r, c = slice(tile.r0, tile.r1), slice(tile.c0, tile.c1)
        scores = self.scores(q, k, group, tile)
        if dv is not None:
            weights = aten.silu.out(scores, out=self.space.get("silu", tuple(scores.shape), scores.dtype))
            self.hide(group, tile, weights)
            dv[:, c].add_(self.product("part", self.lowered("low", weights).transpose(1, 2), do[:, r]))
        if dq is None and not need_bias:
            return
        d_weights = self.product("d_weights", do[:, r], v[:, c].transpose(1, 2)).to(scores.dtype)
        d_scores = aten.silu_backward.grad_input(d_weights, scores, grad_input=scores)
        self.hide(group, tile, d_scores)
        if need_bias:
            assert self.bias is not None
            self.bias.add_gradient(group, tile, d_scores.view(group.size, self.heads, *d_scores.shape[1:]))
        if dq is not None and dk is not None:
            low = self.lowered("low", d_scores)
            dq[:, r].add_(self.product("part", low, k[:, c]))
            dk[:, c].add_(self.product("part", low.transpose(1, 2), q[:, r]))

    def scores(self, q: Tensor, k: Tensor, group: Group, tile: Tile) -> Tensor:
        """``alpha <q, k> + r`` of a tile, ``[g * H, R, C]`` in the score dtype (alpha is in q)."""
        rows, columns = q[:, tile.r0 : tile.r1], k[:, tile.c0 : tile.c1].transpose(1, 2)
        if self.bias is None:
            return self.product("scores", rows, columns)
        shape = (q.shape[0], tile.r1 - tile.r0, tile.c1 - tile.c0)
        scores = self.space.get("scores", shape, self.score_dtype)
        scores.view(group.size, self.heads, *shape[1:]).copy_(self.bias.tile(group, tile))
        if self.score_dtype == self.dtype:
            return torch.baddbmm(scores, rows, columns, out=scores)
        return scores.add_(self.product("products", rows, columns))

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Batched product of tiles in the dtype of q, into a buffer of its own."""
        out = self.space.get(name, (a.shape[0], a.shape[1], b.shape[2]), self.dtype)
        return torch.bmm(a, b, out=out)

    def lowered(self, name: str, tile: Tensor) -> Tensor:
        """The tile in the dtype of q, for a product."""
        if tile.dtype == self.dtype:
            return tile
        return self.space.get(name, tuple(tile.shape), self.dtype).copy_(tile)

    def hide(self, group: Group, tile: Tile, scores: Tensor) -> None:
        group.hide(self.call.mask, tile, scores.view(group.size, self.heads, *scores.shape[1:]))

    def zeros(self, like: Tensor) -> Tensor:
        return torch.zeros_like(like, dtype=self.sum_dtype)


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
