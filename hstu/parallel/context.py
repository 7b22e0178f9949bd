"""Context parallelism: each rank has two pieces of every sequence, and keys and values travel round a ring.

After "Ring Attention with Blockwise Transformers" (Liu et al. 2023, https://arxiv.org/abs/2310.01889), on jagged
sequences and under every mask of :mod:`hstu.ops`. Between neighbours the next keys and values travel while the
present ones are attended to; in the backward pass their gradients follow one step behind, and arrive at home.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hstu.layers.tokens import Stream
from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, softmax_attention
from hstu.ops.attention.ring.partial import PartialAttention, PartialHSTU, PartialSoftmax
from hstu.ops.attention.ring.shard import AttentionSpec, TokenShard, shard_zigzag, with_padding_row
from hstu.parallel.mesh import Group


class ContextParallel:
    """Shards streams over the ranks of ``group``, and attends across them.

    Every rank of the group is given the same batch. How it is sharded is kept on the batch's layout.
    """

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self.group = group.rank, group.size, group.group
        ranks = dist.get_process_group_ranks(group.group)
        self.next, self.previous = ranks[(self.rank + 1) % self.size], ranks[(self.rank - 1) % self.size]

    def shard(self, stream: Stream) -> Stream:
        """Return ``stream`` with the rows of this rank."""
        return stream.shard(self.shards(stream.layout)[self.rank].tokens)

    def shards(self, layout: Layout) -> list[TokenShard]:
        """Return what each rank of the group has."""
        return shard_zigzag(layout, self.size)

    def hstu_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        mask: Mask = Mask(),  # noqa: B008 - frozen
        *,
        scaling_seqlen: float,
        alpha: float | None = None,
        bias: RelativeBias | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Same as :func:`hstu.ops.hstu_attention`, of this rank's rows [t, H, d] over those of all ranks.

        ``layout`` is that of the whole batch; torch operations do the work whatever the ``backend``.
        """
        spec = _spec(q, layout, mask, alpha, bias or RelativeBias())
        out: Tensor = _Ring.apply(q, k, v, *spec.tables, self, spec, scaling_seqlen)
        return out

    def softmax_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: Layout,
        mask: Mask = Mask(),  # noqa: B008 - frozen
        *,
        alpha: float | None = None,
        backend: str = "auto",
    ) -> Tensor:
        """Same as :func:`hstu.ops.softmax_attention`, of this rank's rows; see :meth:`hstu_attention`."""
        out: Tensor = _Ring.apply(q, k, v, None, None, self, _spec(q, layout, mask, alpha), None)
        return out

    def circulate(self, kv: Tensor, sizes: list[int], visit: Callable[[int, Tensor], Tensor | None]) -> Tensor | None:
        """Send ``kv`` [t + 1, ..] once round the ring, and call ``visit`` with each rank's as it comes by.

        Args:
            kv: This rank's.
            sizes: Rows of each rank's.
            visit: From the rank that ``kv`` is of, and ``kv``, to its gradient or None.

        Returns:
            The sum of all ranks' gradients for this rank's ``kv``, or None.
        """
        arriving: Tensor | None = None
        pending: list[dist.Work] = []
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            following: Tensor | None = None
            sending: list[dist.Work] = []
            if step + 1 < self.size:
                following, sending = self._exchange(kv, sizes[(owner - 1) % self.size], tag=0)
            gradient = visit(owner, kv)
            for work in pending:
                work.wait()
            if gradient is not None:
                total = gradient if arriving is None else arriving.add_(gradient)
                if self.size == 1:
                    return total
                # What arrives next belongs to the rank before this owner; the last to arrive is one's own.
                arriving, pending = self._exchange(total, sizes[(owner - 1) % self.size], tag=1)
            for work in sending:
                work.wait()
            if following is not None:
                kv = following
        for work in pending:
            work.wait()
        return arriving

    def _exchange(self, values: Tensor, rows: int, *, tag: int) -> tuple[Tensor, list[dist.Work]]:
        """Start to send ``values`` to the next rank, and to receive ``rows`` of them from the one before."""
        received = values.new_empty(rows, *values.shape[1:])
        operations = [
            dist.P2POp(dist.isend, values, self.next, self.group, tag),
            dist.P2POp(dist.irecv, received, self.previous, self.group, tag),
        ]
        return received, dist.batch_isend_irecv(operations)


class _Ring(torch.autograd.Function):
    """Attention of this rank's rows; queries stay, and keys and values travel. Scores are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        context: ContextParallel,
        spec: AttentionSpec,
        scaling_seqlen: float | None,
    ) -> Tensor:
        shards, blocks = context.shards(spec.layout), spec.blocks(context.rank, context.size)
        run = _partial(spec, shards[context.rank], q, scaling_seqlen)
        run.start(v.shape[2])

        def visit(owner: int, kv: Tensor) -> None:
            run.forward(shards[owner], _unpack(kv, k, v), blocks[owner])

        with torch.autocast(q.device.type, enabled=False):
            context.circulate(_pack(k, v), [shard.tokens.numel() + 1 for shard in shards], visit)
            out, kept = run.finish()
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.context, ctx.spec, ctx.scaling_seqlen = context, spec, scaling_seqlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, kept = ctx.saved_tensors
        context, spec = ctx.context, ctx.spec
        shards, blocks = context.shards(spec.layout), spec.blocks(context.rank, context.size)
        run = _partial(spec, shards[context.rank], q, ctx.scaling_seqlen)
        run.start_backward(with_padding_row(grad), with_padding_row(out), kept)

        def visit(owner: int, kv: Tensor) -> Tensor:
            gradient = torch.zeros_like(kv, dtype=run.sum_dtype)
            run.backward(shards[owner], _unpack(kv, k, v), blocks[owner], _unpack(gradient, k, v))
            return gradient

        d_kv = context.circulate(_pack(k, v), [shard.tokens.numel() + 1 for shard in shards], visit)
        assert d_kv is not None
        dk, dv = (x[:-1].to(q.dtype) for x in _unpack(d_kv, k, v))
        tables = [
            None if table is None or gradient is None else gradient.to(table.dtype)
            for table, gradient in zip(spec.tables, run.table_gradients, strict=True)
        ]
        return run.dq[:-1].to(q.dtype), dk, dv, *tables, None, None, None


def _partial(spec: AttentionSpec, shard: TokenShard, q: Tensor, scaling_seqlen: float | None) -> PartialAttention:
    q = with_padding_row(q)
    return PartialSoftmax(spec, shard, q) if scaling_seqlen is None else PartialHSTU(spec, shard, q, scaling_seqlen)


def _spec(
    q: Tensor,
    layout: Layout,
    mask: Mask,
    alpha: float | None,
    bias: RelativeBias = RelativeBias(),  # noqa: B008
) -> AttentionSpec:
    alpha = q.shape[-1] ** -0.5 if alpha is None else alpha
    return AttentionSpec(layout=layout, mask=mask, alpha=alpha, bias=bias)


def _pack(k: Tensor, v: Tensor) -> Tensor:
    return with_padding_row(torch.cat([k, v], 2))


def _unpack(kv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    own_k, own_v = kv.split([k.shape[2], v.shape[2]], 2)
    return own_k, own_v


def attend_across_ranks(backbone: nn.Module, context: ContextParallel) -> None:
    """Exchange the attention of every layer of ``backbone``, in place."""
    across = {hstu_attention: context.hstu_attention, softmax_attention: context.softmax_attention}
    layers = backbone.layers
    assert isinstance(layers, nn.ModuleList), "refused by check_degrees"
    for layer in layers:
        layer.attention = across[layer.attention]  # type: ignore[index, assignment]
