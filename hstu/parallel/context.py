"""Context parallelism: each rank holds two pieces of every sequence, and keys and values travel round a ring.

After "Ring Attention with Blockwise Transformers" (Liu et al. 2023, https://arxiv.org/abs/2310.01889), on jagged
sequences and under every mask of :mod:`hstu.ops`. Between neighbours the next keys and values travel while the
present ones are read; in the backward pass their gradients follow one step behind, and arrive at home.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hstu.layers.hstu import HSTUBlock, HSTULayer
from hstu.layers.llama import LLaMABlock
from hstu.layers.tokens import Stream, Tokens
from hstu.layers.transformer import TransformerBlock
from hstu.layers.visibility import Attention, Visibility
from hstu.ops import Mask, RelativeBias
from hstu.ops.attention.ring.partial import SharedAttention, SharedHSTU, SharedSoftmax
from hstu.ops.attention.ring.shard import Block, Scene, Share, deal_tokens, pair_pieces, with_padding_row
from hstu.parallel.mesh import Group


class ContextParallel:
    """Splits streams over the ranks of ``group``, and attends across them.

    Every rank of the group is given the same batch. Layers share the layout of a batch.
    """

    def __init__(self, group: Group) -> None:
        self.rank, self.size, self.group = group.rank, group.size, group.group
        ranks = dist.get_process_group_ranks(group.group)
        self.next, self.previous = ranks[(self.rank + 1) % self.size], ranks[(self.rank - 1) % self.size]
        self._dealt: tuple[Tensor, list[Share]] | None = None
        self._paired: tuple[Tensor, list[list[Block]]] | None = None

    def hold(self, stream: Stream) -> Stream:
        """Return ``stream`` with the rows that this rank holds."""
        return stream.holding(self.shares(stream.offsets)[self.rank].tokens)

    def shares(self, offsets: Tensor) -> list[Share]:
        """Return what each rank of the group holds."""
        if self._dealt is None or self._dealt[0] is not offsets:
            self._dealt = offsets, deal_tokens(offsets, self.size)
        return self._dealt[1]

    def blocks(self, offsets: Tensor, mask: Mask) -> list[list[Block]]:
        """Return what this rank's rows read from each rank's columns; a model has one mask for all its layers."""
        if self._paired is None or self._paired[0] is not offsets:
            shares = self.shares(offsets)
            self._paired = offsets, [pair_pieces(shares[self.rank], other, offsets, mask) for other in shares]
        return self._paired[1]

    def hstu_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        offsets: Tensor,
        *,
        max_seqlen: int,
        scaling_seqlen: float,
        alpha: float | None = None,
        bias: RelativeBias | None = None,
        backend: str = "auto",
        context_attention: str = "causal",
        **mask: Any,
    ) -> Tensor:
        """Same as :func:`hstu.ops.hstu_attention`, of the rows held here [t, H, d] over those of all ranks.

        Whatever describes tokens (offsets, timestamps, segments, memory flags) is that of the whole batch.
        """
        alpha = q.shape[-1] ** -0.5 if alpha is None else alpha
        one_mask = Mask(context_full=context_attention == "full", **mask)
        scene = Scene(offsets=offsets, mask=one_mask, alpha=alpha, bias=bias)
        tables = (None, None) if bias is None else (bias.position, bias.time)
        out: Tensor = _Ring.apply(q, k, v, *tables, self, scene, scaling_seqlen)
        return out

    def softmax_attention_over(self, visibility: Visibility, tokens: Tokens) -> Attention:
        """Same as :func:`hstu.layers.visibility.softmax_attention_over`, of the rows held here."""
        mask = visibility.mask(tokens)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scene = Scene(offsets=tokens.offsets, mask=mask, alpha=q.shape[-1] ** -0.5)
            out: Tensor = _Ring.apply(q, k, v, None, None, self, scene, None)
            return out

        return attend

    def turn(self, kv: Tensor, sizes: list[int], visit: Callable[[int, Tensor], Tensor | None]) -> Tensor | None:
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
    """Attention of the rows held here; queries stay, and keys and values travel. Scores are computed again."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        context: ContextParallel,
        scene: Scene,
        scaling_seqlen: float | None,
    ) -> Tensor:
        shares, blocks = context.shares(scene.offsets), context.blocks(scene.offsets, scene.mask)
        run = _shared(scene, shares[context.rank], q, scaling_seqlen)
        run.start(v.shape[2])

        def visit(owner: int, kv: Tensor) -> None:
            run.forward(shares[owner], _unpack(kv, k, v), blocks[owner])

        with torch.autocast(q.device.type, enabled=False):
            context.turn(_pack(k, v), [share.tokens.numel() + 1 for share in shares], visit)
            out, kept = run.finish()
        ctx.save_for_backward(q, k, v, out, kept)
        ctx.context, ctx.scene, ctx.scaling_seqlen = context, scene, scaling_seqlen
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, kept = ctx.saved_tensors
        context, scene = ctx.context, ctx.scene
        shares, blocks = context.shares(scene.offsets), context.blocks(scene.offsets, scene.mask)
        run = _shared(scene, shares[context.rank], q, ctx.scaling_seqlen)
        run.start_backward(with_padding_row(grad), with_padding_row(out), kept)

        def visit(owner: int, kv: Tensor) -> Tensor:
            gradient = torch.zeros_like(kv, dtype=run.sum_dtype)
            run.backward(shares[owner], _unpack(kv, k, v), blocks[owner], _unpack(gradient, k, v))
            return gradient

        d_kv = context.turn(_pack(k, v), [share.tokens.numel() + 1 for share in shares], visit)
        assert d_kv is not None
        dk, dv = (x[:-1].to(q.dtype) for x in _unpack(d_kv, k, v))
        tables = [
            None if table is None or gradient is None else gradient.to(table.dtype)
            for table, gradient in zip(scene.tables, run.table_gradients, strict=True)
        ]
        return run.dq[:-1].to(q.dtype), dk, dv, *tables, None, None, None


def _shared(scene: Scene, share: Share, q: Tensor, scaling_seqlen: float | None) -> SharedAttention:
    q = with_padding_row(q)
    return SharedSoftmax(scene, share, q) if scaling_seqlen is None else SharedHSTU(scene, share, q, scaling_seqlen)


def _pack(k: Tensor, v: Tensor) -> Tensor:
    return with_padding_row(torch.cat([k, v], 2))


def _unpack(kv: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    own_k, own_v = kv.split([k.shape[2], v.shape[2]], 2)
    return own_k, own_v


def attend_across_ranks(backbone: nn.Module, context: ContextParallel) -> None:
    """Exchange the attention of ``backbone``, in place."""
    if isinstance(backbone, HSTUBlock):
        for layer in backbone.layers:
            assert isinstance(layer, HSTULayer)
            layer.attention = context.hstu_attention
    else:
        assert isinstance(backbone, (TransformerBlock, LLaMABlock)), "refused by check_degrees"
        backbone.attention_over = context.softmax_attention_over
