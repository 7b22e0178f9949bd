"""Cross-entropy against sampled items in one pass: the kernel reads each sampled row where it lies."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

# mypy: allow-untyped-defs


def pool_cross_entropy_triton(
    query: Tensor,
    positive: Tensor,
    positive_ids: Tensor,
    pool: Tensor,
    pool_ids: Tensor,
    temperature: float,
    columns: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.softmax.pool_cross_entropy`; the pool's gradient is summed by atomic additions.

    Raises:
        ValueError: no ``columns`` (matrix products do that better: use ``"chunked"``), or float64.
    """
    if columns is None:
        raise ValueError("backend 'triton' is for sampled columns: use backend='chunked' for the whole pool")
    if query.dtype == torch.float64:
        raise ValueError("the Triton kernels do not do float64: use backend='chunked'")
    return _SampledCrossEntropy.apply(query, positive, positive_ids, pool, pool_ids, temperature, columns)


@triton.jit
def _sampled_scores(
    QUERY,
    POOL,
    POSITIVE_IDS,
    POOL_IDS,
    COLUMNS,
    token,
    k0,
    sampled,
    width,
    inverse_temperature,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Query, sampled rows, their scores, which of them are live, and their places in the pool."""
    d = tl.arange(0, BLOCK_D)
    place = k0 + tl.arange(0, BLOCK_K)
    query = tl.load(QUERY + token * width + d, mask=d < width, other=0.0).to(tl.float32)
    column = tl.load(COLUMNS + token * sampled + place, mask=place < sampled, other=0)
    live = (place < sampled) & (tl.load(POOL_IDS + column) != tl.load(POSITIVE_IDS + token))
    rows = tl.load(POOL + column[:, None] * width + d[None, :], mask=d[None, :] < width, other=0.0)
    rows = rows.to(tl.float32)
    scores = tl.sum(rows * query[None, :], 1) * inverse_temperature
    return query, rows, scores, live, column


@triton.jit
def sampled_forward(
    QUERY,
    POOL,
    POSITIVE_IDS,
    POOL_IDS,
    COLUMNS,
    RIGHT,
    TOTAL,
    LIVE,
    sampled,
    width,
    inverse_temperature,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a token: logarithm of the sum of exponentials, kept relative to the greatest so far."""
    token = tl.program_id(0).to(tl.int64)
    greatest = tl.load(RIGHT + token)
    total = greatest * 0.0 + 1.0
    count = 0
    for k0 in range(0, sampled, BLOCK_K):
        _, _, scores, live, _ = _sampled_scores(
            QUERY, POOL, POSITIVE_IDS, POOL_IDS, COLUMNS, token, k0, sampled, width, inverse_temperature,
            BLOCK_K, BLOCK_D,
        )  # fmt: skip
        scores = tl.where(live, scores, float("-inf"))
        above = tl.maximum(greatest, tl.max(scores))
        total = total * tl.exp(greatest - above) + tl.sum(tl.exp(scores - above))
        greatest = above
        count += tl.sum(live.to(tl.int32))
    tl.store(TOTAL + token, greatest + tl.log(total))
    tl.store(LIVE + token, count)


@triton.jit
def sampled_backward(
    QUERY,
    POOL,
    POSITIVE_IDS,
    POOL_IDS,
    COLUMNS,
    TOTAL,
    GRAD,
    D_QUERY,
    D_POOL,
    sampled,
    width,
    inverse_temperature,
    NEED_POOL: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a token: its query's gradient, and its share of the pool's; GRAD holds the temperature."""
    token = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    total = tl.load(TOTAL + token)
    grad = tl.load(GRAD + token)
    d_query = tl.zeros((BLOCK_D,), tl.float32)
    for k0 in range(0, sampled, BLOCK_K):
        query, rows, scores, live, column = _sampled_scores(
            QUERY, POOL, POSITIVE_IDS, POOL_IDS, COLUMNS, token, k0, sampled, width, inverse_temperature,
            BLOCK_K, BLOCK_D,
        )  # fmt: skip
        weights = tl.where(live, tl.exp(scores - total) * grad, 0.0)
        d_query += tl.sum(weights[:, None] * rows, 0)
        if NEED_POOL:
            share = weights[:, None] * query[None, :]
            inside = live[:, None] & (d[None, :] < width)
            tl.atomic_add(D_POOL + column[:, None] * width + d[None, :], share, mask=inside, sem="relaxed")
    tl.store(D_QUERY + token * width + d, d_query, mask=d < width)


def _blocks(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(max(width, 16))
    return {"BLOCK_D": block, "BLOCK_K": max(1, min(64, 4096 // block))}


class _SampledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        positive: Tensor,
        positive_ids: Tensor,
        pool: Tensor,
        pool_ids: Tensor,
        temperature: float,
        columns: Tensor,
    ) -> tuple[Tensor, Tensor]:
        query, pool, columns = query.contiguous(), pool.contiguous(), columns.contiguous()
        tokens, width = query.shape
        right = (query * positive).sum(-1, dtype=torch.float32).div_(temperature)
        total = torch.empty(tokens, dtype=torch.float32, device=query.device)
        live = torch.empty(tokens, dtype=torch.int64, device=query.device)
        if tokens:
            sampled_forward[(tokens,)](
                query, pool, positive_ids, pool_ids, columns, right, total, live, columns.shape[1], width,
                1.0 / temperature, **_blocks(width),
            )  # fmt: skip
        ctx.save_for_backward(query, positive, positive_ids, pool, pool_ids, columns, total, right)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(live)
        return total - right, live

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        query, positive, positive_ids, pool, pool_ids, columns, total, right = ctx.saved_tensors
        tokens, width = query.shape
        grad = (grad / ctx.temperature).float().contiguous()
        d_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        need_pool = ctx.needs_input_grad[3]
        d_pool = torch.zeros(pool.shape if need_pool else (0,), dtype=torch.float32, device=query.device)
        if tokens:
            sampled_backward[(tokens,)](
                query, pool, positive_ids, pool_ids, columns, total, grad, d_query, d_pool, columns.shape[1],
                width, 1.0 / ctx.temperature, NEED_POOL=need_pool, **_blocks(width),
            )  # fmt: skip
        d_right = (torch.expm1(right - total) * grad)[:, None]
        d_query += d_right * positive
        d_positive = (d_right * query).to(positive.dtype)
        gradient = d_pool.to(pool.dtype) if need_pool else None
        return d_query.to(query.dtype), d_positive, None, gradient, None, None, None
