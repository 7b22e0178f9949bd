"""Cross-entropy against a pool of items, sampled or whole, one matrix product at a time."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from hstu.ops.checks import values_readable
from hstu.ops.softmax.chunked import pool_cross_entropy_chunked
from hstu.ops.softmax.problem import Problem
from hstu.ops.softmax.reference import pool_cross_entropy_reference
from hstu.ops.softmax.sampled import is_compiled, pool_cross_entropy_sampled

__all__ = ["pool_cross_entropy"]

BACKENDS = ("auto", "reference", "chunked", "sampled", "triton")
# Share of the pool under which a dot product for each sampled place is cheaper than the whole product. In compiled
# loops half the pool costs a third of the product at width 64, and as much as it at width 256.
FEW, FEW_COMPILED = 1 / 12, 1 / 2


def pool_cross_entropy(
    query: Tensor,
    positive: Tensor,
    positive_ids: Tensor,
    pool: Tensor,
    pool_ids: Tensor,
    *,
    temperature: float = 1.0,
    columns: Tensor | None = None,
    stocked: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of each query's positive against negatives from a pool shared by all queries.

    ``loss_t = log(exp(s_t+) + sum_k exp(s_tk)) - s_t+`` with ``s = <query, item> / temperature``. A negative
    whose id is the positive's takes no part, so that the whole catalogue as pool gives the full softmax.
    Neither ``[L, K, D]`` nor, but for the reference, ``[L, P]`` is kept for the backward.

    Args:
        query: ``[L, D]``.
        positive: ``[L, D]``.
        positive_ids: ``[L]`` int64.
        pool: ``[P, D]``.
        pool_ids: ``[P]`` int64.
        temperature: divides the scores; positive.
        columns: ``[L, K]`` int64, places in the pool of each query's negatives; None takes all of it.
        stocked: ``[P]`` bool, the places of a whole pool that hold an item, where the size of the pool is that of a
            buffer; the others take no part, and their ids are looked at by nobody. None: all of them.
        backend: ``"auto"``, ``"reference"``, ``"chunked"`` (matrix products of bounded size, any device),
            ``"triton"`` (no score leaves the kernel) or, for ``columns`` alone, ``"sampled"``. The last two read
            each sampled row where it lies. Auto leaves a whole pool to ``"chunked"``.

    Returns:
        ``(loss [L] float32 or wider, live [L] int64)``: the number of negatives that took part. Differentiable
        in query, positive and pool.

    Raises:
        ValueError: shapes, dtypes or an unknown backend.
    """
    _check(query, positive, positive_ids, pool, pool_ids, temperature, columns)
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        # Sampled columns are few: their kernel reads just those rows of the pool, but sums by atomic additions.
        fits = (
            not torch.are_deterministic_algorithms_enabled()
            and query.is_cuda
            and query.dtype != torch.float64
            and find_spec("triton") is not None
        )
        share = FEW_COMPILED if is_compiled(query, positive, pool) else FEW
        few = columns is not None and 0 < columns.shape[1] < share * pool.shape[0]
        backend = "triton" if fits and columns is not None else "sampled" if few else "chunked"
    if stocked is not None and (columns is not None or backend not in ("chunked", "reference")):
        raise ValueError("stocked is for a whole pool and backend 'chunked' or 'reference': columns choose items alone")
    if stocked is not None and (stocked.shape != pool_ids.shape or stocked.dtype != torch.bool):
        raise ValueError(f"stocked must be [{len(pool)}] bool, got {list(stocked.shape)} {stocked.dtype}")
    problem = Problem(positive_ids, pool_ids, temperature, columns, stocked)
    if backend == "triton":
        from hstu.ops.softmax.triton import pool_cross_entropy_triton

        return pool_cross_entropy_triton(query, positive, pool, problem)
    run = {
        "reference": pool_cross_entropy_reference,
        "chunked": pool_cross_entropy_chunked,
        "sampled": pool_cross_entropy_sampled,
    }[backend]
    return run(query, positive, pool, problem)


def _check(
    query: Tensor,
    positive: Tensor,
    positive_ids: Tensor,
    pool: Tensor,
    pool_ids: Tensor,
    temperature: float,
    columns: Tensor | None,
) -> None:
    if query.dim() != 2 or positive.shape != query.shape:
        raise ValueError(
            f"query and positive must share one shape [L, D], got {list(query.shape)} and {list(positive.shape)}"
        )
    if pool.dim() != 2 or pool.shape[1] != query.shape[1]:
        raise ValueError(f"pool must be [P, {query.shape[1]}], got {list(pool.shape)}")
    for name, ids, rows in (("positive_ids", positive_ids, query.shape[0]), ("pool_ids", pool_ids, pool.shape[0])):
        if ids.shape != (rows,) or ids.dtype != torch.int64:
            raise ValueError(f"{name} must be [{rows}] int64, got {list(ids.shape)} {ids.dtype}")
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}: it divides the scores and must be positive")
    if columns is None:
        return
    if columns.dim() != 2 or columns.shape[0] != query.shape[0] or columns.dtype != torch.int64:
        raise ValueError(f"columns must be [{query.shape[0]}, K] int64, got {list(columns.shape)} {columns.dtype}")
    if values_readable(columns) and columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < len(pool):
        raise ValueError(f"columns must be places in the pool, 0 to {len(pool) - 1}")
