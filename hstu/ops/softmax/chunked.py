"""Cross-entropy against a pool by matrix products of bounded size; the backward computes the scores again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores held at once: on a CPU they stay in the caches, on a GPU a product is long enough to fill it.
CPU_ELEMENTS = 1 << 19
GPU_ELEMENTS = 1 << 26


def pool_cross_entropy_chunked(
    query: Tensor,
    positive: Tensor,
    positive_ids: Tensor,
    pool: Tensor,
    pool_ids: Tensor,
    temperature: float,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.softmax.pool_cross_entropy`."""
    problem = _Problem(positive_ids, pool_ids, temperature, columns)
    return _ChunkedCrossEntropy.apply(query, positive, pool, problem)


@dataclass(frozen=True)
class _Problem:
    positive_ids: Tensor
    pool_ids: Tensor
    temperature: float
    columns: Tensor | None

    def chunks(self, query: Tensor, pool: Tensor) -> Iterator[slice]:
        elements = CPU_ELEMENTS if query.device.type == "cpu" else GPU_ELEMENTS
        step = max(1, elements // max(1, pool.shape[0]))
        for start in range(0, query.shape[0], step):
            yield slice(start, min(start + step, query.shape[0]))

    def same(self, rows: slice) -> Tensor:
        """Which negatives are the positive itself."""
        ids = self.pool_ids[None, :] if self.columns is None else self.pool_ids[self.columns[rows]]
        return ids == self.positive_ids[rows, None]

    def scores(self, query: Tensor, pool: Tensor, rows: slice) -> Tensor:
        """``[l, K]`` scores of the negatives, in float32 or wider, before the division."""
        wide = torch.promote_types(query.dtype, torch.float32)
        scores = (query[rows] @ pool.T).to(wide)
        return scores if self.columns is None else scores.gather(1, self.columns[rows])


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, positive: Tensor, pool: Tensor, problem: _Problem) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        right = (query * positive).sum(-1, dtype=wide).div_(problem.temperature)
        total = torch.empty_like(right)
        live = torch.empty(query.shape[0], dtype=torch.int64, device=query.device)
        for rows in problem.chunks(query, pool):
            same = problem.same(rows)
            scores = problem.scores(query, pool, rows).div_(problem.temperature).masked_fill_(same, -torch.inf)
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
        problem: _Problem = ctx.problem
        need_query, need_positive, need_pool, _unused = ctx.needs_input_grad
        grad = grad / problem.temperature
        # d loss / d s+ = p+ - 1
        d_right = (torch.expm1(right - total) * grad).to(query.dtype)[:, None]
        d_query = d_right * positive if need_query else None
        d_positive = d_right * query if need_positive else None
        d_pool = torch.zeros_like(pool, dtype=total.dtype) if need_pool else None
        for rows in problem.chunks(query, pool) if need_query or need_pool else ():
            scores = problem.scores(query, pool, rows).div_(problem.temperature)
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
