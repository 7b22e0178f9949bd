"""Forward kernel: one program for one block of rows of one head of one sample."""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hstu.ops.attention.triton.tiles import add_bias, load_block, load_rows, silu, store_rows, visible


@triton.jit
def _add_tile(acc, q, k, v, head, index, tile, block, call, PLAIN: tl.constexpr, C):
    """Add the columns of one tile."""
    j0 = tile * C.columns
    k_tile = load_rows(k, call.strides.k, block.k_row, j0, block.length, head, C.d_qk, C.block_qk, C.columns, C)
    v_tile = load_rows(v, call.strides.v, block.k_row, j0, block.length, head, C.d_v, C.block_v, C.columns, C)
    half = tl.dot(q, tl.trans(k_tile), input_precision=C.precision) * (0.5 * call.alpha)
    p, _ = silu(add_bias(half, call, index, tile), C)
    if not PLAIN:
        i = (block.place + tl.arange(0, C.rows))[:, None]
        j = (j0 + tl.arange(0, C.columns))[None, :]
        p = tl.where(visible(i, j, block, call.rules, call.tokens, C.flags), p, 0.0)
    return tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision=C.precision)


@triton.jit
def attention_forward(q, k, v, out, call, C):
    """Write ``out``; one-dimensional grid of blocks and heads, longest first."""
    index = tl.program_id(0) // call.strides.heads + call.chunk.first
    head = tl.program_id(0) % call.strides.heads
    block = load_block(call.plan, index)
    if block.length > 0:
        q_tile = load_rows(
            q, call.strides.q, block.q_row, block.place, block.length, head, C.d_qk, C.block_qk, C.rows, C
        )
        acc = tl.zeros((C.rows, C.block_v), tl.float32)
        for tile in range(block.plain, block.stop):
            acc = _add_tile(acc, q_tile, k, v, head, index, tile, block, call, True, C)
        listed = call.plan.listed + index.to(tl.int64) * call.plan.width
        for turn in range(0, block.listed):
            acc = _add_tile(acc, q_tile, k, v, head, index, tl.load(listed + turn), block, call, False, C)
        store_rows(out, call.strides.out, acc * call.scale, block.q_row, block.place, block.length, head, C.d_v)
