"""Kernels of softmax attention: the tiles, plans and masks of HSTU's, with a running maximum and sum of each row.

"Online normalizer calculation for softmax" (Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867); backward as
in "FlashAttention-2" (Dao 2023, https://arxiv.org/abs/2307.08691). Exponentials are powers of two: ``call.alpha``
holds the factor on the scores times log2(e).
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hstu.ops.attention.triton.tiles import load_block, load_rows, store_rows, visible

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _row_at(values, call, block, head, place, ROWS: tl.constexpr):
    """One number of each row from ``place`` on, of ``values [T, H]``; zero beyond the sample."""
    steps = tl.arange(0, ROWS)
    at = values + (block.q_row + place + steps).to(tl.int64) * call.strides.heads + head
    return tl.load(at, mask=place + steps < block.length, other=0.0)


@triton.jit
def _add_tile(acc, most, total, q, k, v, head, tile, block, call, PLAIN: tl.constexpr, C):
    """Add the columns of one tile to the sums of rows, which are those of ``exp2(score - most)``."""
    j0 = tile * C.columns
    k_tile = load_rows(k, call.strides.k, block.k_row, j0, block.length, head, C.d_qk, C.block_qk, C.columns, C)
    v_tile = load_rows(v, call.strides.v, block.k_row, j0, block.length, head, C.d_v, C.block_v, C.columns, C)
    scores = tl.dot(q, tl.trans(k_tile), input_precision=C.precision) * call.alpha
    if not PLAIN:
        i = (block.place + tl.arange(0, C.rows))[:, None]
        j = (j0 + tl.arange(0, C.columns))[None, :]
        scores = tl.where(visible(i, j, block, call.rules, call.tokens, C.flags), scores, float("-inf"))
    new = tl.maximum(most, tl.max(scores, 1))
    # A row that has seen nothing yet has no maximum to subtract.
    base = tl.where(new == float("-inf"), 0.0, new)
    p = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(most - base)
    acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=C.precision)
    return acc, new, total * shrink + tl.sum(p, 1)


@triton.jit
def softmax_forward(q, k, v, out, normaliser, call, C):
    """Write ``out``, and ``normaliser [T, H]``: the logarithm to base 2 of each row's sum of exponentials."""
    index = tl.program_id(0) // call.strides.heads
    head = tl.program_id(0) % call.strides.heads
    block = load_block(call.plan, index)
    if block.length > 0:
        row, place, length = block.q_row, block.place, block.length
        q_tile = load_rows(q, call.strides.q, row, place, length, head, C.d_qk, C.block_qk, C.rows, C)
        acc = tl.zeros((C.rows, C.block_v), tl.float32)
        most = tl.full((C.rows,), float("-inf"), tl.float32)
        total = tl.zeros((C.rows,), tl.float32)
        shared = head // C.shared
        for tile in range(block.plain, block.stop):
            acc, most, total = _add_tile(acc, most, total, q_tile, k, v, shared, tile, block, call, True, C)
        listed = call.plan.listed + index.to(tl.int64) * call.plan.width
        for turn in range(0, block.listed):
            tile = tl.load(listed + turn)
            acc, most, total = _add_tile(acc, most, total, q_tile, k, v, shared, tile, block, call, False, C)
        # Rows beyond the sample have seen nothing.
        total = tl.where(total == 0.0, 1.0, total)
        store_rows(out, call.strides.out, acc / total[:, None], row, place, length, head, C.d_v)
        steps = tl.arange(0, C.rows)
        at = normaliser + (row + place + steps).to(tl.int64) * call.strides.heads + head
        tl.store(at, most + tl.log2(total), mask=place + steps < length)


@triton.jit
def _column_tile(dk, dv, k_tile, v_tile, q, do, rows, head, tile, block, call, PLAIN: tl.constexpr, C):
    """Add the rows of one transposed tile ``[N, M]``; ``rows``: normaliser and delta."""
    i0 = block.first + tile * C.rows
    q_tile = load_rows(q, call.strides.q, block.q_row, i0, block.length, head, C.d_qk, C.block_qk, C.rows, C)
    do_tile = load_rows(do, call.strides.out, block.q_row, i0, block.length, head, C.d_v, C.block_v, C.rows, C)
    scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=C.precision) * call.alpha
    scores -= _row_at(rows[0], call, block, head, i0, C.rows)[None, :]
    if not PLAIN:
        # Masked first: what nobody sees may exceed the normaliser without bound.
        i = (i0 + tl.arange(0, C.rows))[None, :]
        j = (block.place + tl.arange(0, C.columns))[:, None]
        scores = tl.where(visible(i, j, block, call.rules, call.tokens, C.flags), scores, float("-inf"))
    p = tl.exp2(scores)
    if C.dv:
        dv = tl.dot(p.to(do_tile.dtype), do_tile, dv, input_precision=C.precision)
    if C.dk:
        dp = tl.dot(v_tile, tl.trans(do_tile), input_precision=C.precision)
        ds = p * (dp - _row_at(rows[1], call, block, head, i0, C.rows)[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=C.precision)
    return dk, dv


@triton.jit
def softmax_backward_columns(q, k, v, do, dk, dv, rows, call, C):
    """Write ``dk`` and ``dv``, or one of both; a program sums over the query heads that share its head of keys."""
    heads = call.strides.heads // C.shared
    index = tl.program_id(0) // heads
    own = tl.program_id(0) % heads
    block = load_block(call.plan, index)
    if block.length > 0:
        row, place, length = block.k_row, block.place, block.length
        k_tile = load_rows(k, call.strides.k, row, place, length, own, C.d_qk, C.block_qk, C.columns, C)
        v_tile = load_rows(v, call.strides.v, row, place, length, own, C.d_v, C.block_v, C.columns, C)
        k_sum = 0.0
        v_sum = 0.0
        if C.dk:
            k_sum = tl.zeros((C.columns, C.block_qk), tl.float32)
        if C.dv:
            v_sum = tl.zeros((C.columns, C.block_v), tl.float32)
        listed = call.plan.listed + index.to(tl.int64) * call.plan.width
        for head in range(own * C.shared, own * C.shared + C.shared):
            for turn in range(0, block.listed):
                k_sum, v_sum = _column_tile(
                    k_sum, v_sum, k_tile, v_tile, q, do, rows, head, tl.load(listed + turn), block, call, False, C
                )
            for tile in range(block.plain, block.stop):
                k_sum, v_sum = _column_tile(
                    k_sum, v_sum, k_tile, v_tile, q, do, rows, head, tile, block, call, True, C
                )  # fmt: skip
        factor = call.alpha * LN2
        if C.dk:
            store_rows(dk, call.strides.dk, k_sum * factor, row, place, length, own, C.d_qk)
        if C.dv:
            store_rows(dv, call.strides.dv, v_sum, row, place, length, own, C.d_v)


@triton.jit
def _row_tile(acc, q_tile, do_tile, k, v, log_sum, delta, head, tile, block, call, PLAIN: tl.constexpr, C):
    """Add the columns of one tile to dq."""
    j0 = tile * C.columns
    k_tile = load_rows(k, call.strides.k, block.k_row, j0, block.length, head, C.d_qk, C.block_qk, C.columns, C)
    v_tile = load_rows(v, call.strides.v, block.k_row, j0, block.length, head, C.d_v, C.block_v, C.columns, C)
    scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=C.precision) * call.alpha - log_sum[:, None]
    if not PLAIN:
        i = (block.place + tl.arange(0, C.rows))[:, None]
        j = (j0 + tl.arange(0, C.columns))[None, :]
        scores = tl.where(visible(i, j, block, call.rules, call.tokens, C.flags), scores, float("-inf"))
    dp = tl.dot(do_tile, tl.trans(v_tile), input_precision=C.precision)
    ds = tl.exp2(scores) * (dp - delta[:, None])
    return tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=C.precision)


@triton.jit
def softmax_backward_rows(q, k, v, do, dq, rows, call, C):
    """Write ``dq``."""
    index = tl.program_id(0) // call.strides.heads
    head = tl.program_id(0) % call.strides.heads
    block = load_block(call.plan, index)
    if block.length > 0:
        row, place, length = block.q_row, block.place, block.length
        q_tile = load_rows(q, call.strides.q, row, place, length, head, C.d_qk, C.block_qk, C.rows, C)
        do_tile = load_rows(do, call.strides.out, row, place, length, head, C.d_v, C.block_v, C.rows, C)
        log_sum = _row_at(rows[0], call, block, head, place, C.rows)
        delta = _row_at(rows[1], call, block, head, place, C.rows)
        acc = tl.zeros((C.rows, C.block_qk), tl.float32)
        shared = head // C.shared
        for tile in range(block.plain, block.stop):
            acc = _row_tile(acc, q_tile, do_tile, k, v, log_sum, delta, shared, tile, block, call, True, C)
        listed = call.plan.listed + index.to(tl.int64) * call.plan.width
        for turn in range(0, block.listed):
            tile = tl.load(listed + turn)
            acc = _row_tile(acc, q_tile, do_tile, k, v, log_sum, delta, shared, tile, block, call, False, C)
        store_rows(dq, call.strides.dq, acc * (call.alpha * LN2), row, place, length, head, C.d_qk)
