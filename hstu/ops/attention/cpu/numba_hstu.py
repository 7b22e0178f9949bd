"""HSTU attention in compiled loops: four rows at a time against the columns of a tile, nothing in memory in between.

A share is every ``shares``-th pair of a part and a head. It writes its own rows of the output and of the gradients, and
its own sums for the tables: the result does not depend on who computes which share when.

Loops over a slice from 0 on become vectors; from elsewhere on they would not, for an index might be negative.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hstu.ops.numba_lanes import LANES, MATHS, compiled, exp, fma, load, splat, store, zeros

ROWS = 4  # of a group: what is loaded of a column serves all of them
TILE = 256  # columns whose keys and values stay in cache, a multiple of LANES
ONE, ZERO = np.float32(1.0), np.float32(0.0)
# A part of loops, not called from outside: what makes it callable would take longer to compile than it does.
_INNER: dict[str, Any] = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
loop: Any = njit(fastmath=MATHS, error_model="numpy", **_INNER)

_FLAT = "float32[::1]"
_PAIRS = "int64[:,::1], int32[::1], int32[::1], int32[::1], int32[::1]"
_BIAS = "float32[::1], float32[::1], int64[::1], int64[::1], int64[::1], uint8[::1], int64[::1]"
_REST = "int64[:,::1], float32, float32, int64, int64, int64"


@loop
def _padded(width: int) -> Any:
    return (width + LANES - 1) // LANES * LANES


@loop
def _place(shape: Any, token: int, head: int) -> Any:
    """Where a token of a head begins in a tensor of this ``shape``."""
    return token * shape[0] + head * shape[1]


@loop
def _pack_columns(x: Any, start: int, step: int, width: int, count: int, panels: Any) -> None:
    """``count`` rows of x, ``LANES`` of them side by side: ``panels[c // LANES, d, c % LANES]``, zero beyond."""
    for c in range(_padded(count)):
        base = c // LANES * LANES * width + c % LANES
        panel = panels[base : base + LANES * width]
        if c < count:
            row = x[start + c * step : start + c * step + width]
            for d in range(width):
                panel[d * LANES] = row[d]
        else:
            for d in range(width):
                panel[d * LANES] = ZERO


@loop
def _pack_rows(x: Any, start: int, step: int, width: int, count: int, last: int, factor: float, packed: Any) -> None:
    """``count`` rows of x times ``factor``, zero up to whole vectors; row ``last`` stands for those after it."""
    wide = _padded(width)
    for r in range(count):
        at = start + min(r, last) * step
        row, target = x[at : at + width], packed[r * wide : (r + 1) * wide]
        for d in range(width):
            target[d] = row[d] * factor
        target[width:] = ZERO


@loop
def _unpack_rows(packed: Any, wide: int, width: int, count: int, factor: float, x: Any, start: int, step: int) -> None:
    """Write ``count`` rows of ``packed``, times ``factor``, to x."""
    for r in range(count):
        row, target = packed[r * wide : r * wide + width], x[start + r * step : start + r * step + width]
        for d in range(width):
            target[d] = row[d] * factor


@loop
def _products(a: Any, width: int, panels: Any, low: int, high: int, out: Any) -> None:
    """``out[r, c] = <a_r, column c>`` for whole vectors of columns from ``low`` on."""
    wide = _padded(width)
    for c in range(low, high, LANES):
        s0 = s1 = s2 = s3 = zeros()
        base = c * width
        for d in range(width):
            x = load(panels, base + d * LANES)
            s0 = fma(splat(a, d), x, s0)
            s1 = fma(splat(a, wide + d), x, s1)
            s2 = fma(splat(a, 2 * wide + d), x, s2)
            s3 = fma(splat(a, 3 * wide + d), x, s3)
        store(out, c, s0)
        store(out, TILE + c, s1)
        store(out, 2 * TILE + c, s2)
        store(out, 3 * TILE + c, s3)


@loop
def _add_weighted(weights: Any, low: int, high: int, values: Any, wide: int, sums: Any, at: int) -> None:
    """``sums[at + r] += sum over the columns of weights[r, c] values[c]``."""
    for d in range(0, wide, LANES):
        base = at + d
        s0, s1 = load(sums, base), load(sums, base + wide)
        s2, s3 = load(sums, base + 2 * wide), load(sums, base + 3 * wide)
        for c in range(low, high):
            x = load(values, c * wide + d)
            s0 = fma(splat(weights, c), x, s0)
            s1 = fma(splat(weights, TILE + c), x, s1)
            s2 = fma(splat(weights, 2 * TILE + c), x, s2)
            s3 = fma(splat(weights, 3 * TILE + c), x, s3)
        store(sums, base, s0)
        store(sums, base + wide, s1)
        store(sums, base + 2 * wide, s2)
        store(sums, base + 3 * wide, s3)


@loop
def _spread(weights: Any, low: int, high: int, rows: Any, wide: int, sums: Any) -> None:
    """``sums[c] += sum over the rows of weights[r, c] rows[r]``."""
    for d in range(0, wide, LANES):
        x0, x1, x2, x3 = load(rows, d), load(rows, wide + d), load(rows, 2 * wide + d), load(rows, 3 * wide + d)
        for c in range(low, high):
            s = load(sums, c * wide + d)
            s = fma(splat(weights, c), x0, s)
            s = fma(splat(weights, TILE + c), x1, s)
            s = fma(splat(weights, 2 * TILE + c), x2, s)
            s = fma(splat(weights, 3 * TILE + c), x3, s)
            store(sums, c * wide + d, s)


@loop
def _extent(query: int, count: int, c0: int, c1: int, rows: Any, first: Any, starts: Any, stops: Any) -> Any:
    """From the first column in ``[c0, c1)`` that any of ``count`` queries attends to, to the one after the last."""
    low, high = c1, c0
    for row in rows[query : query + count]:
        for run in range(first[row], first[row + 1]):
            start, stop = max(starts[run], c0), min(stops[run], c1)
            if start < stop:
                low, high = min(low, start), max(high, stop)
    return low, high


@loop
def _hide(values: Any, begin: int, end: int, c0: int, row: int, first: Any, starts: Any, stops: Any) -> None:
    """Zero what a row does not attend to of the columns ``[begin, end)`` after ``c0``."""
    cursor = begin
    for run in range(first[row], first[row + 1]):
        start, stop = max(starts[run] - c0, cursor), min(stops[run] - c0, end)
        if start < stop:
            values[cursor:start] = ZERO
            cursor = stop
    values[cursor:end] = ZERO


@loop
def find_buckets(asked: int, times: Any, thresholds: Any, out: Any) -> None:
    """Bucket of each column for a query at time ``asked``: it is not far from its neighbour's."""
    bucket, last = 0, thresholds.shape[0]
    for c in range(times.shape[0] - 1, -1, -1):
        seconds = abs(asked - times[c])
        while bucket < last and seconds >= thresholds[bucket]:
            bucket += 1
        while bucket > 0 and seconds < thresholds[bucket - 1]:
            bucket -= 1
        out[c] = bucket


@loop
def _add_position(scores: Any, low: int, place: int, history: int, position: Any) -> None:
    """Add the bias by position of a row at ``place`` to its columns from ``low`` on."""
    base = (position.shape[0] - 1) // 2 - min(place, history)
    count = max(min(scores.shape[0], history - low), 0)
    table = position[base + low : base + low + count]
    for j in range(count):
        scores[j] += table[j]
    if count < scores.shape[0]:
        of_candidates = position[base + history]
        rest = scores[count:]
        for j in range(rest.shape[0]):
            rest[j] += of_candidates


@loop
def _add_position_grads(grads: Any, low: int, place: int, history: int, sums: Any) -> None:
    """Add the gradients of a row's scores to those of the table of positions."""
    base = (sums.shape[0] - 1) // 2 - min(place, history)
    count = max(min(grads.shape[0], history - low), 0)
    table = sums[base + low : base + low + count]
    for j in range(count):
        table[j] += grads[j]
    for j in range(count, grads.shape[0]):
        sums[base + history] += grads[j]


@loop
def _add_bias(
    scores: Any, query: int, key: int, low: int, place: int, history: int, position: Any, time: Any, thresholds: Any,
    asked: Any, times: Any, kept: Any, kept_at: Any, buckets: Any
) -> None:  # fmt: skip
    """Add the bias of a row to its columns from ``low`` on, the ``key``-th of all, and leave their buckets."""
    count = scores.shape[0]
    if position.shape[0]:
        _add_position(scores, low, place, history, position)
    if time.shape[0]:
        at = kept_at[query]
        if at >= 0:
            buckets[:] = kept[at + low : at + low + count]
        else:
            find_buckets(asked[key - low + place], times[key : key + count], thresholds, buckets)
        for j in range(count):
            scores[j] += time[np.uint64(buckets[j])]


@compiled(f"void({_FLAT}, {_FLAT}, {_FLAT}, {_FLAT}, {_PAIRS}, {_BIAS}, {_REST})")
def forward(
    q: Any, k: Any, v: Any, out: Any,
    parts: Any, rows: Any, first: Any, starts: Any, stops: Any,
    position: Any, time: Any, thresholds: Any, asked: Any, times: Any, kept: Any, kept_at: Any,
    shape: Any, alpha: float, scale: float, most_rows: int, share: int, shares: int,
) -> None:  # fmt: skip
    """Write the rows of a share to ``out``. ``shape``: steps of a token and of a head, and widths, of all tensors."""
    heads, width, v_width = shape[0, 3], shape[0, 2], shape[2, 2]
    wide, v_wide = _padded(width), _padded(v_width)
    panels, values = np.empty(TILE * width, np.float32), np.empty(TILE * v_wide, np.float32)
    own, scores = np.empty(ROWS * wide, np.float32), np.empty(ROWS * TILE, np.float32)
    sums, buckets = np.empty((most_rows + ROWS) * v_wide, np.float32), np.empty(TILE, np.uint8)
    for task in range(share, parts.shape[0] * heads, shares):
        q0, k0, n, m, history, r0, r1, _ = parts[task // heads]
        head = task % heads
        q_at, k_at = _place(shape[0], q0, head), _place(shape[1], k0, head)
        v_at, out_at = _place(shape[2], k0, head), _place(shape[3], q0, head)
        sums[: (r1 - r0 + ROWS) * v_wide] = ZERO
        for c0 in range(0, m, TILE):
            c1, packed = min(c0 + TILE, m), False
            for r in range(r0, r1, ROWS):
                count = min(ROWS, r1 - r)
                low, high = _extent(q0 + r, count, c0, c1, rows, first, starts, stops)
                if low >= high:
                    continue
                if not packed:
                    _pack_columns(k, k_at + c0 * shape[1, 0], shape[1, 0], width, c1 - c0, panels)
                    _pack_rows(v, v_at + c0 * shape[2, 0], shape[2, 0], v_width, c1 - c0, c1 - c0, ONE, values)
                    packed = True
                begin, end = (low - c0) // LANES * LANES, _padded(high - c0)
                _pack_rows(q, q_at + r * shape[0, 0], shape[0, 0], width, ROWS, count - 1, alpha, own)
                _products(own, width, panels, begin, end, scores)
                for a in range(ROWS):
                    if a >= count:
                        scores[a * TILE + begin : a * TILE + end] = ZERO
                        continue
                    query, row = q0 + r + a, scores[a * TILE + low - c0 : a * TILE + high - c0]
                    _add_bias(row, query, k0 + low, low, m - n + r + a, history, position, time, thresholds, asked,
                              times, kept, kept_at, buckets[: high - low])  # fmt: skip
                    for j in range(row.shape[0]):
                        row[j] = row[j] / (ONE + exp(-row[j]))
                    _hide(scores[a * TILE : (a + 1) * TILE], begin, end, c0, rows[query], first, starts, stops)
                _add_weighted(scores, low - c0, high - c0, values, v_wide, sums, (r - r0) * v_wide)
        _unpack_rows(sums, v_wide, v_width, r1 - r0, scale, out, out_at + r0 * shape[3, 0], shape[3, 0])


@loop
def _slopes(scores: Any, grads: Any) -> None:
    """Put SiLU of the scores in their place, and times its slope the gradients of it."""
    for j in range(scores.shape[0]):
        x = scores[j]
        sigmoid = ONE / (ONE + exp(-x))
        grads[j] *= sigmoid * (ONE + x * (ONE - sigmoid))
        scores[j] = x * sigmoid


@compiled(
    f"void({_FLAT}, {_FLAT}, {_FLAT}, {_FLAT}, {_FLAT}, {_FLAT}, {_FLAT}, {_PAIRS}, {_BIAS}, {_REST}, {_FLAT}, {_FLAT},"
    " float64[:,::1], float64[:,:,::1])"
)
def backward(
    q: Any, k: Any, v: Any, grad: Any, d_q: Any, d_k: Any, d_v: Any,
    parts: Any, rows: Any, first: Any, starts: Any, stops: Any,
    position: Any, time: Any, thresholds: Any, asked: Any, times: Any, kept: Any, kept_at: Any,
    shape: Any, alpha: float, scale: float, most_rows: int, share: int, shares: int,
    partial_k: Any, partial_v: Any, all_d_position: Any, all_d_time: Any,
) -> None:  # fmt: skip
    """Write the gradients of a share; the last two, ``[shares, .]`` and ``[shares, 4, .]``, hold its own sums."""
    heads, width, v_width = shape[0, 3], shape[0, 2], shape[2, 2]
    wide, v_wide = _padded(width), _padded(v_width)
    k_panels, v_panels = np.empty(TILE * width, np.float32), np.empty(TILE * v_width, np.float32)
    key_rows, k_sums = np.empty(TILE * wide, np.float32), np.empty(TILE * wide, np.float32)
    v_sums, q_sums = np.empty(TILE * v_wide, np.float32), np.empty((most_rows + ROWS) * wide, np.float32)
    own, own_grad = np.empty(ROWS * wide, np.float32), np.empty(ROWS * v_wide, np.float32)
    scores, grads = np.empty(ROWS * TILE, np.float32), np.empty(ROWS * TILE, np.float32)
    tile_buckets = np.empty(TILE, np.uint8)
    d_position, d_time = all_d_position[share], all_d_time[share]
    for task in range(share, parts.shape[0] * heads, shares):
        q0, k0, n, m, history, r0, r1, partial = parts[task // heads]
        head = task % heads
        q_at, k_at, v_at = _place(shape[0], q0, head), _place(shape[1], k0, head), _place(shape[2], k0, head)
        grad_at, dq_at = _place(shape[3], q0, head), _place(shape[4], q0, head)
        dk_at, dv_at = _place(shape[5], k0, head), _place(shape[6], k0, head)
        q_sums[: (r1 - r0 + ROWS) * wide] = ZERO
        for c0 in range(0, m, TILE):
            c1 = min(c0 + TILE, m)
            _pack_columns(k, k_at + c0 * shape[1, 0], shape[1, 0], width, c1 - c0, k_panels)
            _pack_columns(v, v_at + c0 * shape[2, 0], shape[2, 0], v_width, c1 - c0, v_panels)
            _pack_rows(k, k_at + c0 * shape[1, 0], shape[1, 0], width, c1 - c0, c1 - c0, ONE, key_rows)
            k_sums[:] = ZERO
            v_sums[:] = ZERO
            for r in range(r0, r1, ROWS):
                count = min(ROWS, r1 - r)
                low, high = _extent(q0 + r, count, c0, c1, rows, first, starts, stops)
                if low >= high:
                    continue
                begin, end = (low - c0) // LANES * LANES, _padded(high - c0)
                _pack_rows(q, q_at + r * shape[0, 0], shape[0, 0], width, ROWS, count - 1, alpha, own)
                _pack_rows(grad, grad_at + r * shape[3, 0], shape[3, 0], v_width, ROWS, count - 1, scale, own_grad)
                _products(own, width, k_panels, begin, end, scores)
                _products(own_grad, v_width, v_panels, begin, end, grads)
                for a in range(ROWS):
                    if a >= count:
                        scores[a * TILE + begin : a * TILE + end] = ZERO
                        grads[a * TILE + begin : a * TILE + end] = ZERO
                        continue
                    query, place = q0 + r + a, m - n + r + a
                    row = scores[a * TILE + low - c0 : a * TILE + high - c0]
                    row_grads = grads[a * TILE + low - c0 : a * TILE + high - c0]
                    buckets = tile_buckets[: high - low]
                    _add_bias(row, query, k0 + low, low, place, history, position, time, thresholds, asked, times,
                              kept, kept_at, buckets)  # fmt: skip
                    _slopes(row, row_grads)
                    _hide(scores[a * TILE : (a + 1) * TILE], begin, end, c0, rows[query], first, starts, stops)
                    _hide(grads[a * TILE : (a + 1) * TILE], begin, end, c0, rows[query], first, starts, stops)
                    if d_position.shape[0]:
                        _add_position_grads(row_grads, low, place, history, d_position)
                    if d_time.shape[1]:
                        # Neighbours add to different sums: one sum would wait for its last addition.
                        for j in range(row_grads.shape[0]):
                            d_time[j & 3, buckets[j]] += row_grads[j]
                _add_weighted(grads, low - c0, high - c0, key_rows, wide, q_sums, (r - r0) * wide)
                _spread(grads, low - c0, high - c0, own, wide, k_sums)
                _spread(scores, low - c0, high - c0, own_grad, v_wide, v_sums)
            if partial < 0:
                _unpack_rows(k_sums, wide, width, c1 - c0, ONE, d_k, dk_at + c0 * shape[5, 0], shape[5, 0])
                _unpack_rows(v_sums, v_wide, v_width, c1 - c0, ONE, d_v, dv_at + c0 * shape[6, 0], shape[6, 0])
            else:
                at = (partial + c0) * heads + head
                _unpack_rows(k_sums, wide, width, c1 - c0, ONE, partial_k, at * width, heads * width)
                _unpack_rows(v_sums, v_wide, v_width, c1 - c0, ONE, partial_v, at * v_width, heads * v_width)
        _unpack_rows(q_sums, wide, width, r1 - r0, alpha, d_q, dq_at + r0 * shape[4, 0], shape[4, 0])


@compiled("void(int64[:,::1], int64[::1], int64[::1], int64[::1], int64[::1], uint8[::1], int64[::1], int64, int64)")
def keep_buckets(
    parts: Any, reach: Any, thresholds: Any, asked: Any, times: Any, kept: Any, kept_at: Any, share: int, shares: int
) -> None:
    """Write the buckets of the rows of a share, up to the last column that each attends to."""
    for part in range(share, parts.shape[0], shares):
        q0, k0, n, m, _, r0, r1, _ = parts[part]
        for query in range(q0 + r0, q0 + r1):
            at, count = kept_at[query], reach[query]
            if at >= 0:
                asks = asked[k0 + m - n + query - q0]
                find_buckets(asks, times[k0 : k0 + count], thresholds, kept[at : at + count])
