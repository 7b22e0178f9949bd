"""Cross-entropy against a pool by matrix products of bounded size; the backward computes the scores again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.softmax.problem import Problem

# Scores held at once: on a CPU they stay in the caches, on a GPU a product is long enough to fill it.
CPU_ELEMENTS = 1 << 19
GPU_ELEMENTS = 1 << 26


def pool_cross_entropy_chunked(
    query: Tensor, positive: Tensor, pool: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.softmax.pool_cross_entropy`."""
    return _ChunkedCrossEntropy.apply(query, positive, pool, problem)


def _chunks(query: Tensor, pool: Tensor) -> Iterator[slice]:
    elements = CPU_ELEMENTS if query.device.type == "cpu" else GPU_ELEMENTS
    step = max(1, elements // max(1, pool.shape[0]))
    for start in range(0, query.shape[0], step):
        yield slice(start, min(start + step, query.shape[0]))


def _scores(query: Tensor, pool: Tensor, rows: slice, problem: Problem) -> Tensor:
    """``[l, K]`` scores of the negatives, in float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query[rows] @ pool.T).to(wide)
    return (scores if problem.columns is None else scores.gather(1, problem.columns[rows])).div_(problem.temperature)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, positive: Tensor, pool: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        right = (query * positive).sum(-1, dtype=wide).div_(problem.temperature)
        total = torch.empty_like(right)
        live = torch.empty(query.shape[0], dtype=torch.int64, device=query.device)
        for rows in _chunks(query, pool):
            same = problem.same(rows)
            scores = _scores(query, pool, rows, problem).masked_fill_(same, -torch.inf)
            torch.logaddexp(scores.logsumexp(1), right[rows], out=total[rows])
            live[rows] = same.shape[1] - same.sum(1)
        ctx.save_for_backward(query, positive, pool, total, right)
        ctx.problem = problem
        ctx.mark_non_differentiable(live)
        return total - right, live

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        query, positive, pool, total, right = ctx.saved_tensors
        problem: Problem = ctx.problem
        need_query, need_positive, need_pool, _unused = ctx.needs_input_grad
        grad = grad / problem.temperature
        # d loss / d s+ = p+ - 1
        d_right = (torch.expm1(right - total) * grad).to(query.dtype)[:, None]
        d_query = d_right * positive if need_query else None
        d_positive = d_right * query if need_positive else None
        d_pool = torch.zeros_like(pool, dtype=total.dtype) if need_pool else None
        for rows in _chunks(query, pool) if need_query or need_pool else ():
            scores = _scores(query, pool, rows, problem)
            scores = scores.sub_(total[rows, None]).exp_().masked_fill_(problem.same(rows), 0.0)
            weights = scores.mul_(grad[rows, None]).to(query.dtype)
            if problem.columns is not None:
                spread = weights.new_zeros(weights.shape[0], pool.shape[0])
                weights = spread.scatter_add_(1, problem.columns[rows], weights)
            if d_query is not None:
                d_query[rows] += weights @ pool
            if d_pool is not None:
                d_pool += weights.T @ query[rows]
        return d_query, d_positive, None if d_pool is None else d_pool.to(pool.dtype), None
