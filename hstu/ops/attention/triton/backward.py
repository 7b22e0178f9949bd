"""Backward kernels: by columns for dk, dv, the bias tables and (with atomic additions) dq; by rows for dq alone."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hstu.ops.attention.triton.tiles import (
    CANDIDATES,
    add_bias,
    column_ranges,
    load_rows,
    position_index,
    row_ranges,
    sample_extent,
    sigmoid,
    store_rows,
    time_buckets,
    visible,
)


@triton.jit
def _silu_and_slope(s, FAST: tl.constexpr):
    sigma = sigmoid(s, FAST)
    p = s * sigma
    return p, sigma + p * (1.0 - sigma)


@triton.jit
def _accumulate(TABLE, index, value, mask, unit, FIXED: tl.constexpr):
    """Add to a table; in fixed point the order of the additions does not matter."""
    if FIXED:
        tl.atomic_add(TABLE + index, (value.to(tl.float64) * unit).to(tl.int64), mask=mask, sem="relaxed")
    else:
        tl.atomic_add(TABLE + index, value, mask=mask, sem="relaxed")


@triton.jit
def _add_position_gradient(
    D_TABLE, ds, m0, n0, length, history, centre, unit, FLAGS: tl.constexpr, FIXED: tl.constexpr
):
    """Sum ``ds [N, M]`` (columns by rows) along its diagonals before adding to the table."""
    BLOCK_N: tl.constexpr = ds.shape[0]
    BLOCK_M: tl.constexpr = ds.shape[1]
    if CANDIDATES & FLAGS:  # noqa: SIM102 - decided when compiling, unlike the next
        # Candidate rows share one position: their part of the index depends on the column alone.
        if m0 + BLOCK_M > history:
            i = (m0 + tl.arange(0, BLOCK_M))[None, :]
            j = n0 + tl.arange(0, BLOCK_N)
            sums = tl.sum(tl.where(i >= history, ds, 0.0), 1)
            index = position_index(length, j, length, history, centre)
            _accumulate(D_TABLE, index, sums, j < length, unit, FIXED)
            ds = tl.where(i < history, ds, 0.0)
    a = tl.arange(0, BLOCK_N)[:, None]
    c = tl.arange(0, BLOCK_M)[None, :]
    skewed = tl.gather(ds, (a + c) % BLOCK_M, 1)
    turns = (a + c) // BLOCK_M
    for turn in tl.static_range(0, (BLOCK_N + BLOCK_M - 2) // BLOCK_M + 1):
        sums = tl.sum(tl.where(turns == turn, skewed, 0.0), 0)
        index = n0 - m0 + turn * BLOCK_M - tl.arange(0, BLOCK_M) + centre
        _accumulate(D_TABLE, index, sums, (index >= 0) & (index <= 2 * centre) & (sums != 0.0), unit, FIXED)


@triton.jit
def _add_time_gradient(D_TABLE, ds, bucket, unit, FIXED: tl.constexpr):
    """One sum for each bucket between the least and the greatest of the tile."""
    low = tl.min(tl.where(ds != 0.0, bucket, 1 << 30))
    high = tl.max(tl.where(ds != 0.0, bucket, -1))
    for one in range(low, high + 1):
        total = tl.sum(tl.where(bucket == one, ds, 0.0))
        _accumulate(D_TABLE, one, total, total != 0.0, unit, FIXED)


@triton.jit
def _column_tile(
    dk,
    dv,
    k,
    v,
    Q,
    DO,
    DQ,
    m0,
    n0,
    length,
    context,
    history,
    q_token,
    do_token,
    dq_token,
    alpha,
    scale,
    window,
    group_size,
    SEGMENT,
    IS_MEMORY,
    POSITION_TABLE,
    TIME_TABLE,
    READERS,
    KEYS,
    THRESHOLDS,
    centre,
    num_buckets,
    D_POSITION,
    D_TIME,
    unit,
    MASKED: tl.constexpr,
    NEED_POSITION: tl.constexpr,
    NEED_TIME: tl.constexpr,
    ATOMIC_DQ: tl.constexpr,
    FIXED: tl.constexpr,
    FLAGS: tl.constexpr,
    DQK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Add one transposed tile ``[N, M]`` to dk and dv; alpha and scale are applied to them at the end."""
    rows = m0 + tl.arange(0, BLOCK_M)
    i = rows[None, :]
    j = (n0 + tl.arange(0, BLOCK_N))[:, None]
    q = load_rows(Q, rows, length, q_token, DQK, BLOCK_DQK)
    do = load_rows(DO, rows, length, do_token, DV, BLOCK_DV)
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * alpha
    s = add_bias(
        s, i, j, length, history, POSITION_TABLE, TIME_TABLE, READERS, KEYS, THRESHOLDS, centre, num_buckets, FLAGS
    )
    p, slope = _silu_and_slope(s, FAST)
    if MASKED:
        seen = visible(i, j, length, context, history, window, group_size, SEGMENT, IS_MEMORY, FLAGS)
        p = tl.where(seen, p, 0.0)
        slope = tl.where(seen, slope, 0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    ds = tl.dot(v, tl.trans(do), input_precision=PRECISION) * slope
    if NEED_POSITION:
        _add_position_gradient(D_POSITION, ds * scale, m0, n0, length, history, centre, unit, FLAGS, FIXED)
    if NEED_TIME:
        bucket = time_buckets(READERS, KEYS, THRESHOLDS, i, j, length, num_buckets)
        _add_time_gradient(D_TIME, ds * scale, bucket, unit, FIXED)
    low = ds.to(q.dtype)
    dk = tl.dot(low, q, dk, input_precision=PRECISION)
    if ATOMIC_DQ:
        dq = tl.dot(tl.trans(low), k, input_precision=PRECISION) * (alpha * scale)
        column = tl.arange(0, BLOCK_DQK)[None, :]
        inside = (rows[:, None] < length) & (column < DQK)
        tl.atomic_add(DQ + rows[:, None] * dq_token + column, dq, mask=inside, sem="relaxed")
    return dk, dv


@triton.jit
def attention_backward_columns(
    Q,
    K,
    V,
    DO,
    DQ,
    DK,
    DV_OUT,
    D_POSITION,
    D_TIME,
    UNIT,
    OFFSETS,
    ORDER,
    NUM_CONTEXT,
    NUM_CANDIDATES,
    SEGMENT,
    IS_MEMORY,
    POSITION_TABLE,
    TIME_TABLE,
    READERS,
    KEYS,
    THRESHOLDS,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    do_token,
    do_head,
    dq_token,
    dq_head,
    dk_token,
    dk_head,
    dv_token,
    dv_head,
    heads,
    blocks,
    alpha,
    scale,
    window,
    group_size,
    centre,
    num_buckets,
    NEED_POSITION: tl.constexpr,
    NEED_TIME: tl.constexpr,
    ATOMIC_DQ: tl.constexpr,
    FIXED: tl.constexpr,
    FLAGS: tl.constexpr,
    DQK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write DK and DV, add to the tables and, where ATOMIC_DQ, to the float32 DQ."""
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    sample = tl.load(ORDER + tl.program_id(0) // blocks // heads)
    start, length, context, history = sample_extent(OFFSETS, NUM_CONTEXT, NUM_CANDIDATES, sample, FLAGS)
    n0 = block * BLOCK_N
    if n0 < length:
        Q += start * q_token + head * q_head
        DO += start * do_token + head * do_head
        DQ += start * dq_token + head * dq_head
        SEGMENT += start
        IS_MEMORY += start
        READERS += start
        KEYS += start
        unit = 1.0
        if FIXED:
            unit = tl.load(UNIT)
        columns = n0 + tl.arange(0, BLOCK_N)
        k = load_rows(K + start * k_token + head * k_head, columns, length, k_token, DQK, BLOCK_DQK)
        v = load_rows(V + start * v_token + head * v_head, columns, length, v_token, DV, BLOCK_DV)
        dk = tl.zeros((BLOCK_N, BLOCK_DQK), tl.float32)
        dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        early, begin, plain, stop = row_ranges(
            n0, length, context, history, window, group_size, BLOCK_M, BLOCK_N, FLAGS
        )
        before = tl.cdiv(early, BLOCK_M)
        for turn in range(0, before + tl.cdiv(plain - begin, BLOCK_M)):
            m0 = tl.where(turn < before, turn * BLOCK_M, begin + (turn - before) * BLOCK_M)
            dk, dv = _column_tile(
                dk, dv, k, v, Q, DO, DQ, m0, n0, length, context, history, q_token, do_token, dq_token, alpha,
                scale, window, group_size, SEGMENT, IS_MEMORY, POSITION_TABLE, TIME_TABLE, READERS, KEYS,
                THRESHOLDS, centre, num_buckets, D_POSITION, D_TIME, unit, True, NEED_POSITION, NEED_TIME,
                ATOMIC_DQ, FIXED, FLAGS, DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, FAST, PRECISION,
            )  # fmt: skip
        for m0 in range(plain, stop, BLOCK_M):
            dk, dv = _column_tile(
                dk, dv, k, v, Q, DO, DQ, m0, n0, length, context, history, q_token, do_token, dq_token, alpha,
                scale, window, group_size, SEGMENT, IS_MEMORY, POSITION_TABLE, TIME_TABLE, READERS, KEYS,
                THRESHOLDS, centre, num_buckets, D_POSITION, D_TIME, unit, False, NEED_POSITION, NEED_TIME,
                ATOMIC_DQ, FIXED, FLAGS, DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, FAST, PRECISION,
            )  # fmt: skip
        DK += start * dk_token + head * dk_head
        DV_OUT += start * dv_token + head * dv_head
        store_rows(DK, dk * (alpha * scale), columns, length, dk_token, DQK, BLOCK_DQK)
        store_rows(DV_OUT, dv * scale, columns, length, dv_token, DV, BLOCK_DV)


@triton.jit
def _row_tile(
    dq,
    q,
    do,
    K,
    V,
    m0,
    n0,
    length,
    context,
    history,
    k_token,
    v_token,
    alpha,
    window,
    group_size,
    SEGMENT,
    IS_MEMORY,
    POSITION_TABLE,
    TIME_TABLE,
    READERS,
    KEYS,
    THRESHOLDS,
    centre,
    num_buckets,
    MASKED: tl.constexpr,
    FLAGS: tl.constexpr,
    DQK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns = n0 + tl.arange(0, BLOCK_N)
    i = (m0 + tl.arange(0, BLOCK_M))[:, None]
    j = columns[None, :]
    k = load_rows(K, columns, length, k_token, DQK, BLOCK_DQK)
    v = load_rows(V, columns, length, v_token, DV, BLOCK_DV)
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * alpha
    s = add_bias(
        s, i, j, length, history, POSITION_TABLE, TIME_TABLE, READERS, KEYS, THRESHOLDS, centre, num_buckets, FLAGS
    )
    _, slope = _silu_and_slope(s, FAST)
    if MASKED:
        seen = visible(i, j, length, context, history, window, group_size, SEGMENT, IS_MEMORY, FLAGS)
        slope = tl.where(seen, slope, 0.0)
    ds = tl.dot(do, tl.trans(v), input_precision=PRECISION) * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)


@triton.jit
def attention_backward_rows(
    Q,
    K,
    V,
    DO,
    DQ,
    OFFSETS,
    ORDER,
    NUM_CONTEXT,
    NUM_CANDIDATES,
    SEGMENT,
    IS_MEMORY,
    POSITION_TABLE,
    TIME_TABLE,
    READERS,
    KEYS,
    THRESHOLDS,
    q_token,
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    do_token,
    do_head,
    dq_token,
    dq_head,
    heads,
    blocks,
    alpha,
    scale,
    window,
    group_size,
    centre,
    num_buckets,
    FLAGS: tl.constexpr,
    DQK: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_DQK: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write DQ without atomic additions, for two products more: the deterministic way, and that of wide heads."""
    block = tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    sample = tl.load(ORDER + tl.program_id(0) // blocks // heads)
    start, length, context, history = sample_extent(OFFSETS, NUM_CONTEXT, NUM_CANDIDATES, sample, FLAGS)
    m0 = (tl.cdiv(length, BLOCK_M) - 1 - block) * BLOCK_M
    if m0 >= 0:
        K += start * k_token + head * k_head
        V += start * v_token + head * v_head
        SEGMENT += start
        IS_MEMORY += start
        READERS += start
        KEYS += start
        rows = m0 + tl.arange(0, BLOCK_M)
        q = load_rows(Q + start * q_token + head * q_head, rows, length, q_token, DQK, BLOCK_DQK)
        do = load_rows(DO + start * do_token + head * do_head, rows, length, do_token, DV, BLOCK_DV)
        dq = tl.zeros((BLOCK_M, BLOCK_DQK), tl.float32)
        first, masked, middle, late, stop = column_ranges(
            m0, length, context, history, window, group_size, BLOCK_M, BLOCK_N, FLAGS
        )
        for n0 in range(first, masked, BLOCK_N):
            dq = _row_tile(
                dq, q, do, K, V, m0, n0, length, context, history, k_token, v_token, alpha, window, group_size,
                SEGMENT, IS_MEMORY, POSITION_TABLE, TIME_TABLE, READERS, KEYS, THRESHOLDS, centre, num_buckets,
                False, FLAGS, DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, FAST, PRECISION,
            )  # fmt: skip
        before = tl.cdiv(middle - masked, BLOCK_N)
        for turn in range(0, before + tl.cdiv(stop - late, BLOCK_N)):
            n0 = tl.where(turn < before, masked + turn * BLOCK_N, late + (turn - before) * BLOCK_N)
            dq = _row_tile(
                dq, q, do, K, V, m0, n0, length, context, history, k_token, v_token, alpha, window, group_size,
                SEGMENT, IS_MEMORY, POSITION_TABLE, TIME_TABLE, READERS, KEYS, THRESHOLDS, centre, num_buckets,
                True, FLAGS, DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, FAST, PRECISION,
            )  # fmt: skip
        DQ += start * dq_token + head * dq_head
        store_rows(DQ, dq * (alpha * scale), rows, length, dq_token, DQK, BLOCK_DQK)
