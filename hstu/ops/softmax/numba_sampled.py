"""Cross-entropy against sampled places of a pool in compiled loops: no row of the pool is gathered, nothing is sorted.

Rows of all matrices are whole vectors wide. A share writes rows, or sums, of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hstu.ops.numba_lanes import LANES, add, compiled, exp, fma, load, splat, store, total, zeros

ZERO = np.float32(0.0)
_MATRIX, _PLACES = "float32[::1]", "int64[:,::1]"


@compiled(
    f"void({_MATRIX}, {_MATRIX}, {_MATRIX}, int64[::1], int64[::1], {_PLACES}, float32, float32[:,::1], float32[::1],"
    " float32[::1], int64[::1], int64, int64, int64)"
)
def forward(
    query: Any, positive: Any, pool: Any, positive_ids: Any, pool_ids: Any, columns: Any, factor: float,
    scores: Any, right: Any, whole: Any, live: Any, width: int, share: int, shares: int,
) -> None:  # fmt: skip
    """Write the rows of a share: scores, that of the positive, the logarithm of the sum of exponentials, and how many.

    The score of a negative that is the positive is minus infinity.
    """
    rows, count = columns.shape
    for row in range(rows * share // shares, rows * (share + 1) // shares):
        start, own = row * width, scores[row]
        sums = zeros()
        for d in range(0, width, LANES):
            sums = fma(load(query, start + d), load(positive, start + d), sums)
        highest = right[row] = total(sums) * factor
        live[row] = 0
        for k in range(count):
            place = columns[row, k]
            if pool_ids[place] == positive_ids[row]:
                own[k] = -np.inf
                continue
            sums = zeros()
            for d in range(0, width, LANES):
                sums = fma(load(query, start + d), load(pool, place * width + d), sums)
            own[k] = total(sums) * factor
            live[row] += 1
            highest = max(highest, own[k])
        mass = ZERO
        for k in range(count):
            mass += exp(own[k] - highest)
        mass += exp(right[row] - highest)
        whole[row] = highest + np.log(mass)


@compiled(
    f"void({_MATRIX}, {_MATRIX}, {_MATRIX}, {_PLACES}, float32[:,::1], float32[::1], float32[::1], float32[::1],"
    f" float32[:,::1], {_MATRIX}, int64, int64, int64)"
)
def rows_backward(
    query: Any, positive: Any, pool: Any, columns: Any, scores: Any, right: Any, whole: Any, grad: Any,
    weights: Any, d_query: Any, width: int, share: int, shares: int,
) -> None:  # fmt: skip
    """Write the rows of a share: what each score's gradient is, and those of the queries."""
    rows, count = columns.shape
    d_right = np.empty(1, np.float32)
    for row in range(rows * share // shares, rows * (share + 1) // shares):
        own, source = weights[row], scores[row]
        for k in range(count):
            weight = exp(source[k] - whole[row]) * grad[row]
            own[k] = weight if source[k] > -np.inf else ZERO
        d_right[0] = np.expm1(right[row] - whole[row]) * grad[row]
        for d in range(0, width, LANES):
            s0 = fma(splat(d_right, 0), load(positive, row * width + d), zeros())
            s1 = s2 = s3 = zeros()
            for k in range(0, count - 3, 4):
                s0 = fma(splat(own, k), load(pool, columns[row, k] * width + d), s0)
                s1 = fma(splat(own, k + 1), load(pool, columns[row, k + 1] * width + d), s1)
                s2 = fma(splat(own, k + 2), load(pool, columns[row, k + 2] * width + d), s2)
                s3 = fma(splat(own, k + 3), load(pool, columns[row, k + 3] * width + d), s3)
            for k in range(count // 4 * 4, count):
                s1 = fma(splat(own, k), load(pool, columns[row, k] * width + d), s1)
            store(d_query, row * width + d, add(add(s0, s1), add(s2, s3)))


@compiled(f"void({_MATRIX}, {_PLACES}, float32[:,::1], {_MATRIX}, int64, int64, int64, int64)")
def pool_backward(
    query: Any, columns: Any, weights: Any, sums: Any, places: int, width: int, share: int, groups: int
) -> None:
    """Add to the rows of ``sums [groups, places, width]`` one group of queries, in the lanes of a share."""
    rows, count = columns.shape
    group, d = share % groups, share // groups * LANES
    for row in range(rows * group // groups, rows * (group + 1) // groups):
        x, own = load(query, row * width + d), weights[row]
        for k in range(count):
            at = (group * places + columns[row, k]) * width + d
            store(sums, at, fma(splat(own, k), x, load(sums, at)))
