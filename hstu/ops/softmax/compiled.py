"""Cross-entropy against few sampled places of the pool in compiled loops; see :mod:`hstu.ops.softmax.sampled`."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.loops import run_shares, shares_of
from hstu.ops.softmax.problem import Problem

MOST_GROUPS = 8
GROUP_SHARE = 8  # sums of a group are zeroed and added up: as many samples as these times the pool are worth one


def pool_cross_entropy_compiled(
    query: Tensor, positive: Tensor, pool: Tensor, problem: Problem, columns: Tensor
) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.softmax.pool_cross_entropy`; float32. Keeps the scores ``[L, K]`` for the backward."""
    return _CompiledCrossEntropy.apply(query, positive, pool, problem, columns.contiguous())


class _CompiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, positive: Tensor, pool: Tensor, problem: Problem, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        from hstu.ops.softmax.numba_sampled import forward

        wide = [_whole_vectors(x) for x in (query, positive, pool)]
        scores, right, whole = torch.empty(columns.shape), *(torch.empty(len(columns)) for _ in range(2))
        live = torch.empty(len(columns), dtype=torch.int64)
        ids = [x.contiguous().numpy() for x in (problem.positive_ids, problem.pool_ids, columns)]
        matrices, found = (
            [x.numpy() for x in some] for some in ([x.view(-1) for x in wide], (scores, right, whole, live))
        )
        width, shares = wide[0].shape[1], shares_of(columns.numel())
        run_shares(
            shares, lambda share: forward(*matrices, *ids, 1 / problem.temperature, *found, width, share, shares)
        )
        ctx.save_for_backward(*wide, columns, scores, right, whole)
        ctx.temperature, ctx.width = problem.temperature, query.shape[1]
        ctx.mark_non_differentiable(live)
        return whole - right, live

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        from hstu.ops.softmax.numba_sampled import pool_backward, rows_backward

        query, positive, pool, columns, scores, right, whole = ctx.saved_tensors
        grad = (grad / ctx.temperature).contiguous()
        weights, d_query = torch.empty_like(scores), torch.empty_like(query)
        width, shares = query.shape[1], shares_of(columns.numel())
        matrices = [x.view(-1).numpy() for x in (query, positive, pool)]
        rows = [x.numpy() for x in (columns, scores, right, whole, grad, weights, d_query.view(-1))]
        run_shares(shares, lambda share: rows_backward(*matrices, *rows, width, share, shares))
        d_positive = d_pool = None
        if ctx.needs_input_grad[1]:
            d_positive = (torch.expm1(right - whole) * grad)[:, None] * query
        if ctx.needs_input_grad[2]:
            groups = max(1, min(MOST_GROUPS, columns.numel() // (GROUP_SHARE * max(1, len(pool)))))
            sums = torch.zeros(groups, *pool.shape)
            arrays = matrices[0], rows[0], weights.numpy(), sums.view(-1).numpy()
            run_shares(groups * (width // 16), lambda share: pool_backward(*arrays, len(pool), width, share, groups))
            d_pool = sums.sum(0)
        grads = (None if x is None else x[:, : ctx.width] for x in (d_query, d_positive, d_pool))
        return *grads, None, None


def _whole_vectors(x: Tensor) -> Tensor:
    """Rows as wide as whole vectors of 16 lanes, with zeros."""
    return F.pad(x.detach(), (0, -x.shape[1] % 16)).contiguous()
