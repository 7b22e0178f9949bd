"""Kernels of the cross-entropy: over sampled places of the pool, and over all of it."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl


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


@triton.jit
def _load(X, row, rows, width, BLOCK_D: tl.constexpr):
    """``[len(row), BLOCK_D]`` of a matrix, zero outside."""
    d = tl.arange(0, BLOCK_D)
    inside = (row[:, None] < rows) & (d[None, :] < width)
    return tl.load(X + row[:, None].to(tl.int64) * width + d[None, :], mask=inside, other=0.0)


@triton.jit
def _store(X, x, row, rows, width, BLOCK_D: tl.constexpr):
    d = tl.arange(0, BLOCK_D)
    inside = (row[:, None] < rows) & (d[None, :] < width)
    tl.store(X + row[:, None].to(tl.int64) * width + d[None, :], x.to(X.dtype.element_ty), mask=inside)


@triton.jit
def _pool_scores(
    query, items, token, column, POSITIVE_IDS, POOL_IDS, tokens, places, inverse_temperature, PRECISION: tl.constexpr
):
    """Scores of a tile of queries and items, minus infinity where an item is padding or the query's positive."""
    scores = tl.dot(query, tl.trans(items), input_precision=PRECISION) * inverse_temperature
    right = tl.load(POSITIVE_IDS + token, mask=token < tokens, other=0)
    ids = tl.load(POOL_IDS + column, mask=column < places, other=0)
    live = (column < places)[None, :] & (ids[None, :] != right[:, None])
    return tl.where(live, scores, float("-inf")), live


@triton.jit
def pool_forward(
    QUERY,
    POOL,
    POSITIVE_IDS,
    POOL_IDS,
    RIGHT,
    TOTAL,
    LIVE,
    tokens,
    places,
    width,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program for a block of queries, over the whole pool."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = _load(QUERY, token, tokens, width, BLOCK_D)
    greatest = tl.load(RIGHT + token, mask=token < tokens, other=0.0)
    total = greatest * 0.0 + 1.0
    count = tl.zeros((BLOCK_M,), tl.int32)
    for n0 in range(0, places, BLOCK_N):
        column = n0 + tl.arange(0, BLOCK_N)
        items = _load(POOL, column, places, width, BLOCK_D)
        scores, live = _pool_scores(
            query, items, token, column, POSITIVE_IDS, POOL_IDS, tokens, places, inverse_temperature, PRECISION
        )
        above = tl.maximum(greatest, tl.max(scores, 1))
        total = total * tl.exp(greatest - above) + tl.sum(tl.exp(scores - above[:, None]), 1)
        greatest = above
        count += tl.sum(live.to(tl.int32), 1)
    tl.store(TOTAL + token, greatest + tl.log(total), mask=token < tokens)
    tl.store(LIVE + token, count, mask=token < tokens)


@triton.jit
def pool_backward_query(
    QUERY,
    POOL,
    POSITIVE_IDS,
    POOL_IDS,
    TOTAL,
    GRAD,
    D_QUERY,
    tokens,
    places,
    width,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a block of queries from all negatives; GRAD holds the temperature."""
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    query = _load(QUERY, token, tokens, width, BLOCK_D)
    total = tl.load(TOTAL + token, mask=token < tokens, other=0.0)[:, None]
    grad = tl.load(GRAD + token, mask=token < tokens, other=0.0)[:, None]
    d_query = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for n0 in range(0, places, BLOCK_N):
        column = n0 + tl.arange(0, BLOCK_N)
        items = _load(POOL, column, places, width, BLOCK_D)
        scores, _ = _pool_scores(
            query, items, token, column, POSITIVE_IDS, POOL_IDS, tokens, places, inverse_temperature, PRECISION
        )
        weights = (tl.exp(scores - total) * grad).to(items.dtype)
        d_query = tl.dot(weights, items, d_query, input_precision=PRECISION)
    _store(D_QUERY, d_query, token, tokens, width, BLOCK_D)


@triton.jit
def pool_backward_pool(
    QUERY,
    POOL,
    POSITIVE_IDS,
    POOL_IDS,
    TOTAL,
    GRAD,
    D_POOL,
    tokens,
    places,
    width,
    inverse_temperature,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of a block of the pool from all queries: no atomic additions, so always the same."""
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    items = _load(POOL, column, places, width, BLOCK_D)
    d_items = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for m0 in range(0, tokens, BLOCK_M):
        token = m0 + tl.arange(0, BLOCK_M)
        query = _load(QUERY, token, tokens, width, BLOCK_D)
        total = tl.load(TOTAL + token, mask=token < tokens, other=0.0)[:, None]
        grad = tl.load(GRAD + token, mask=token < tokens, other=0.0)[:, None]
        scores, _ = _pool_scores(
            query, items, token, column, POSITIVE_IDS, POOL_IDS, tokens, places, inverse_temperature, PRECISION
        )
        weights = (tl.exp(scores - total) * grad).to(query.dtype)
        d_items = tl.dot(tl.trans(weights), query, d_items, input_precision=PRECISION)
    _store(D_POOL, d_items, column, places, width, BLOCK_D)
