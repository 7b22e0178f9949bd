"""Cross-entropy against few sampled places of the pool: rows of the pool are read where they lie, never gathered.

What is a product of matrices for the whole pool is a sampled product here, or a bag of embeddings: a query's gradient
is a weighted sum of the rows that it sampled, a pool row's one of the queries that sampled it.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.loops import compiled_loops_for
from hstu.ops.softmax.compiled import pool_cross_entropy_compiled
from hstu.ops.softmax.problem import Problem

CACHED = 1 << 21  # numbers of a pool in the processor's cache: from memory, torch's operators read it as fast


def pool_cross_entropy_sampled(
    query: Tensor, positive: Tensor, pool: Tensor, problem: Problem
) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.softmax.pool_cross_entropy`. Keeps the scores ``[L, K]`` for the backward.

    Raises:
        ValueError: no ``columns``.
    """
    if problem.columns is None:
        raise ValueError("backend 'sampled' is for sampled columns: use backend='chunked' for the whole pool")
    if is_compiled(query, positive, pool):
        return pool_cross_entropy_compiled(query, positive, pool, problem, problem.columns)
    return _SampledCrossEntropy.apply(query, positive, pool, problem, problem.columns)


def is_compiled(query: Tensor, positive: Tensor, pool: Tensor) -> bool:
    """Whether compiled loops take these."""
    return pool.numel() <= CACHED and compiled_loops_for(query, positive, pool)


class _SampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, positive: Tensor, pool: Tensor, problem: Problem, columns: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(query.dtype, torch.float32)
        right = (query * positive).sum(-1, dtype=wide).div_(problem.temperature)
        same = problem.same()
        scores = _scores(query.to(wide), pool.to(wide), columns)
        scores = scores.div_(problem.temperature).masked_fill_(same, -torch.inf)
        total = torch.logaddexp(scores.logsumexp(1), right)
        live = same.shape[1] - same.sum(1)
        ctx.save_for_backward(query, positive, pool, columns, scores, right, total)
        ctx.temperature = problem.temperature
        ctx.mark_non_differentiable(live)
        return total - right, live

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        query, positive, pool, columns, scores, right, total = ctx.saved_tensors
        need_query, need_positive, need_pool = ctx.needs_input_grad[:3]
        grad = grad / ctx.temperature
        # d loss / d s+ = p+ - 1
        d_right = (torch.expm1(right - total) * grad)[:, None]
        weights = scores.sub(total[:, None]).exp_().mul_(grad[:, None])
        d_query = d_pool = None
        if need_query:
            d_query = _bags(columns, pool, weights).addcmul_(d_right, positive.to(weights.dtype)).to(query.dtype)
        if need_pool:
            d_pool = _transposed_bags(columns, query, weights, pool.shape[0]).to(pool.dtype)
        d_positive = (d_right * query).to(positive.dtype) if need_positive else None
        return d_query, d_positive, d_pool, None, None


def _scores(query: Tensor, pool: Tensor, columns: Tensor) -> Tensor:
    """Return <query_l, pool_c> for each of the columns c of l, [L, K]."""
    starts = torch.arange(columns.shape[0] + 1, device=columns.device) * columns.shape[1]
    zeros = query.new_zeros(columns.numel())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        # A place that is sampled twice breaks an invariant of the format, but not this product.
        wanted = torch.sparse_csr_tensor(
            starts, columns.flatten(), zeros, (query.shape[0], pool.shape[0]), check_invariants=False
        )
    return torch.sparse.sampled_addmm(wanted, query, pool.T, beta=0.0).values().view(columns.shape)


def _bags(columns: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return the sums of rows[columns] under ``weights``, [L, D]."""
    starts = torch.arange(columns.shape[0], device=columns.device) * columns.shape[1]
    return F.embedding_bag(
        columns.flatten(), rows.to(weights.dtype), starts, per_sample_weights=weights.flatten(), mode="sum"
    )


def _transposed_bags(columns: Tensor, query: Tensor, weights: Tensor, pool_size: int) -> Tensor:
    """Return for each place of the pool the sum of the queries that sampled it, under ``weights``: [P, D]."""
    kind = torch.int16 if pool_size < 2**15 else torch.int32  # fewer bits are sorted faster
    places, order = columns.flatten().to(kind).sort(stable=True)
    starts = torch.searchsorted(places, torch.arange(pool_size, dtype=kind, device=places.device))
    queries = order.div(columns.shape[1], rounding_mode="floor")
    return F.embedding_bag(
        queries, query.to(weights.dtype), starts, per_sample_weights=weights.flatten()[order], mode="sum"
    )
