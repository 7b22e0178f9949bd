"""Backward kernels: by columns for dk and dv, by rows for dq. Nothing is added atomically."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hstu.ops.attention.triton.tiles import add_bias, bias_tile, load_block, load_rows, silu, store_rows, visible


@triton.jit
def _slope(value, sigma):
    """Derivative of SiLU, from its value and the logistic function."""
    return value * (1.0 - sigma) + sigma


@triton.jit
def _column_tile(dk, dv, k_tile, v_tile, q, do, head, index, tile, block, call, PLAIN: tl.constexpr, C):
    """Add the rows of one transposed tile ``[N, M]``; alpha and scale are applied at the end."""
    i0 = block.first + tile * C.rows
    q_tile = load_rows(q, call.strides.q, block.q_row, i0, block.length, head, C.d_qk, C.block_qk, C.rows, C)
    do_tile = load_rows(do, call.strides.out, block.q_row, i0, block.length, head, C.d_v, C.block_v, C.rows, C)
    half = tl.dot(k_tile, tl.trans(q_tile), input_precision=C.precision) * (0.5 * call.alpha)
    p, sigma = silu(add_bias(half, call, index, tile), C)
    slope = _slope(p, sigma)
    if not PLAIN:
        i = (i0 + tl.arange(0, C.rows))[None, :]
        j = (block.place + tl.arange(0, C.columns))[:, None]
        seen = visible(i, j, block, call.rules, call.tokens, C.flags)
        p = tl.where(seen, p, 0.0)
        slope = tl.where(seen, slope, 0.0)
    if C.dv:
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=C.precision)
    if C.dk:
        ds = tl.dot(v_tile, tl.trans(do_tile), input_precision=C.precision) * slope
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=C.precision)
    return dk, dv


@triton.jit
def attention_backward_columns(q, k, v, do, dk, dv, call, C):
    """Write ``dk`` and ``dv``, or one of both; one program for one block of columns of one head of one sample."""
    index = tl.program_id(0) // call.strides.heads + call.chunk.first
    head = tl.program_id(0) % call.strides.heads
    block = load_block(call.plan, index)
    if block.length > 0:
        row, place, length = block.k_row, block.place, block.length
        k_tile = load_rows(k, call.strides.k, row, place, length, head, C.d_qk, C.block_qk, C.columns, C)
        v_tile = 0
        k_sum = 0.0
        v_sum = 0.0
        if C.dk:
            v_tile = load_rows(v, call.strides.v, row, place, length, head, C.d_v, C.block_v, C.columns, C)
            k_sum = tl.zeros((C.columns, C.block_qk), tl.float32)
        if C.dv:
            v_sum = tl.zeros((C.columns, C.block_v), tl.float32)
        listed = call.plan.listed + index.to(tl.int64) * call.plan.width
        for turn in range(0, block.listed):
            k_sum, v_sum = _column_tile(
                k_sum, v_sum, k_tile, v_tile, q, do, head, index, tl.load(listed + turn), block, call, False, C
            )
        for tile in range(block.plain, block.stop):
            k_sum, v_sum = _column_tile(
                k_sum, v_sum, k_tile, v_tile, q, do, head, index, tile, block, call, True, C
            )  # fmt: skip
        if C.dk:
            store_rows(dk, call.strides.dk, k_sum * (call.alpha * call.scale), row, place, length, head, C.d_qk)
        if C.dv:
            store_rows(dv, call.strides.dv, v_sum * call.scale, row, place, length, head, C.d_v)


@triton.jit
def _row_tile(acc, q_tile, do_tile, k, v, head, index, tile, block, call, PLAIN: tl.constexpr, C):
    """Add the columns of one tile to dq, and keep the gradients of its scores where there is a bias."""
    j0 = tile * C.columns
    k_tile = load_rows(k, call.strides.k, block.k_row, j0, block.length, head, C.d_qk, C.block_qk, C.columns, C)
    v_tile = load_rows(v, call.strides.v, block.k_row, j0, block.length, head, C.d_v, C.block_v, C.columns, C)
    half = tl.dot(q_tile, tl.trans(k_tile), input_precision=C.precision) * (0.5 * call.alpha)
    value, sigma = silu(add_bias(half, call, index, tile), C)
    slope = _slope(value, sigma)
    if not PLAIN:
        i = (block.place + tl.arange(0, C.rows))[:, None]
        j = (j0 + tl.arange(0, C.columns))[None, :]
        slope = tl.where(visible(i, j, block, call.rules, call.tokens, C.flags), slope, 0.0)
    ds = tl.dot(do_tile, tl.trans(v_tile), input_precision=C.precision) * slope
    low = ds.to(k_tile.dtype)
    if call.chunk.gradient is not None:
        size: tl.constexpr = C.rows * C.columns
        of_head = head.to(tl.int64) * call.chunk.blocks * call.plan.width * size
        at = call.chunk.gradient + of_head + bias_tile(call, index, tile, size)
        tl.store(at + tl.arange(0, C.rows)[:, None] * C.columns + tl.arange(0, C.columns)[None, :], low)
    return tl.dot(low, k_tile, acc, input_precision=C.precision)


@triton.jit
def attention_backward_rows(q, k, v, do, dq, call, C):
    """Write ``dq``; one program for one block of rows of one head of one sample."""
    index = tl.program_id(0) // call.strides.heads + call.chunk.first
    head = tl.program_id(0) % call.strides.heads
    block = load_block(call.plan, index)
    if block.length > 0:
        row, place, length = block.q_row, block.place, block.length
        q_tile = load_rows(q, call.strides.q, row, place, length, head, C.d_qk, C.block_qk, C.rows, C)
        do_tile = load_rows(do, call.strides.out, row, place, length, head, C.d_v, C.block_v, C.rows, C)
        acc = tl.zeros((C.rows, C.block_qk), tl.float32)
        for tile in range(block.plain, block.stop):
            acc = _row_tile(acc, q_tile, do_tile, k, v, head, index, tile, block, call, True, C)
        listed = call.plan.listed + index.to(tl.int64) * call.plan.width
        for turn in range(0, block.listed):
            tile = tl.load(listed + turn)
            acc = _row_tile(acc, q_tile, do_tile, k, v, head, index, tile, block, call, False, C)
        store_rows(dq, call.strides.dq, acc * (call.alpha * call.scale), row, place, length, head, C.d_qk)
