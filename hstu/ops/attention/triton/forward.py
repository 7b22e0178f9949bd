"""Forward kernel: one program for one block of rows of one head of one sample."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hstu.ops.attention.triton.tiles import (
    add_bias,
    column_ranges,
    load_rows,
    sample_extent,
    sigmoid,
    store_rows,
    visible,
)


@triton.jit
def _add_tile(
    acc,
    q,
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
    p = s * sigmoid(s, FAST)
    if MASKED:
        seen = visible(i, j, length, context, history, window, group_size, SEGMENT, IS_MEMORY, FLAGS)
        p = tl.where(seen, p, 0.0)
    return tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)


@triton.jit
def attention_forward(
    Q,
    K,
    V,
    OUT,
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
    out_token,
    out_head,
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
    """Write ``OUT``; one-dimensional grid of samples, heads and blocks, longest first."""
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
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        first, masked, middle, late, stop = column_ranges(
            m0, length, context, history, window, group_size, BLOCK_M, BLOCK_N, FLAGS
        )
        for n0 in range(first, masked, BLOCK_N):
            acc = _add_tile(
                acc, q, K, V, m0, n0, length, context, history, k_token, v_token, alpha, window, group_size,
                SEGMENT, IS_MEMORY, POSITION_TABLE, TIME_TABLE, READERS, KEYS, THRESHOLDS, centre, num_buckets,
                False, FLAGS, DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, FAST, PRECISION,
            )  # fmt: skip
        before = tl.cdiv(middle - masked, BLOCK_N)
        for turn in range(0, before + tl.cdiv(stop - late, BLOCK_N)):
            n0 = tl.where(turn < before, masked + turn * BLOCK_N, late + (turn - before) * BLOCK_N)
            acc = _add_tile(
                acc, q, K, V, m0, n0, length, context, history, k_token, v_token, alpha, window, group_size,
                SEGMENT, IS_MEMORY, POSITION_TABLE, TIME_TABLE, READERS, KEYS, THRESHOLDS, centre, num_buckets,
                True, FLAGS, DQK, DV, BLOCK_DQK, BLOCK_DV, BLOCK_M, BLOCK_N, FAST, PRECISION,
            )  # fmt: skip
        OUT += start * out_token + head * out_head
        store_rows(OUT, acc * scale, rows, length, out_token, DV, BLOCK_DV)
