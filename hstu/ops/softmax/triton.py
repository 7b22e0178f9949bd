"""Cross-entropy by kernels that keep no score: sampled rows are read where they lie, a whole pool in tiles."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.softmax.problem import Problem
from hstu.ops.softmax.triton_kernels import (
    pool_backward_pool,
    pool_backward_query,
    pool_forward,
    sampled_backward,
    sampled_forward,
)

MAX_WIDTH = 256


def pool_cross_entropy_triton(query: Tensor, positive: Tensor, pool: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """See :func:`hstu.ops.softmax.pool_cross_entropy`; with ``columns`` the pool's gradient is summed atomically.

    Raises:
        ValueError: float64, or a whole pool of rows wider than 256.
    """
    if query.dtype == torch.float64:
        raise ValueError("the Triton kernels do not do float64: use backend='chunked'")
    if problem.columns is None and query.shape[1] > MAX_WIDTH:
        raise ValueError(f"rows of {query.shape[1]} are too wide for the kernel, at most {MAX_WIDTH}: use 'chunked'")
    return _TritonCrossEntropy.apply(query, positive, pool, problem)


class _TritonCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, positive: Tensor, pool: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
        query, pool = query.contiguous(), pool.contiguous()
        tokens, width = query.shape
        right = (query * positive).sum(-1, dtype=torch.float32).div_(problem.temperature)
        total = torch.empty(tokens, dtype=torch.float32, device=query.device)
        live = torch.empty(tokens, dtype=torch.int64, device=query.device)
        inputs = (query, pool, problem.positive_ids, problem.pool_ids)
        scale = 1.0 / problem.temperature
        if tokens and problem.columns is not None:
            columns = problem.columns.contiguous()
            sampled_forward[(tokens,)](
                *inputs, columns, right, total, live, columns.shape[1], width, scale, **_sampled_blocks(width)
            )
        elif tokens:
            blocks = _pool_blocks(query)
            pool_forward[(triton.cdiv(tokens, blocks["BLOCK_M"]),)](
                *inputs, right, total, live, tokens, pool.shape[0], width, scale, **blocks
            )
        ctx.save_for_backward(query, positive, pool, total, right)
        ctx.problem = problem
        ctx.mark_non_differentiable(live)
        return total - right, live

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        query, positive, pool, total, right = ctx.saved_tensors
        problem: Problem = ctx.problem
        need_pool = ctx.needs_input_grad[2]
        grad = (grad / problem.temperature).float().contiguous()
        d_query = torch.zeros(query.shape, dtype=torch.float32, device=query.device)
        d_pool = torch.zeros(pool.shape if need_pool else (0,), dtype=torch.float32, device=query.device)
        if len(query):
            _negatives_backward(query, pool, total, grad, d_query, d_pool, problem)
        d_right = (torch.expm1(right - total) * grad)[:, None]
        d_query += d_right * positive
        d_positive = (d_right * query).to(positive.dtype)
        return d_query.to(query.dtype), d_positive, d_pool.to(pool.dtype) if need_pool else None, None


def _negatives_backward(
    query: Tensor, pool: Tensor, total: Tensor, grad: Tensor, d_query: Tensor, d_pool: Tensor, problem: Problem
) -> None:
    """Write what the negatives contribute to ``d_query`` and, unless empty, ``d_pool``."""
    tokens, width = query.shape
    places, need_pool, scale = pool.shape[0], d_pool.dim() == 2, 1.0 / problem.temperature
    inputs = (query, pool, problem.positive_ids, problem.pool_ids)
    if problem.columns is not None:
        columns = problem.columns.contiguous()
        sampled_backward[(tokens,)](
            *inputs, columns, total, grad, d_query, d_pool, columns.shape[1], width, scale,
            NEED_POOL=need_pool, **_sampled_blocks(width),
        )  # fmt: skip
        return
    blocks = _pool_blocks(query)
    sizes = (tokens, places, width, scale)
    pool_backward_query[(triton.cdiv(tokens, blocks["BLOCK_M"]),)](*inputs, total, grad, d_query, *sizes, **blocks)
    if need_pool and places:
        pool_backward_pool[(triton.cdiv(places, blocks["BLOCK_N"]),)](*inputs, total, grad, d_pool, *sizes, **blocks)


def _sampled_blocks(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(max(width, 16))
    return {"BLOCK_D": block, "BLOCK_K": max(1, min(64, 4096 // block))}


def _pool_blocks(query: Tensor) -> dict[str, Any]:
    """The largest tiles that compile without a spilled register."""
    block = triton.next_power_of_2(max(query.shape[1], 16))
    side = 16 if query.dtype == torch.float32 else 64 if block <= 128 else 32
    warps = 8 if query.dtype == torch.float32 and block > 128 else 4
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    sizes = {"BLOCK_M": side, "BLOCK_N": side, "BLOCK_D": block}
    return {**sizes, "PRECISION": precision, "num_warps": warps, "maxnreg": 255}
