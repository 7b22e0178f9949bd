"""What the attention kernels share: visibility, relative bias and SiLU of one tile of scores.

A tile's rows and columns come as two broadcastable index tensors, so that a kernel may hold it transposed.
"""

# mypy: allow-untyped-defs

import triton
import triton.language as tl

from hstu.ops.attention.triton.structs import (
    BLOCK_FIELDS,
    CANDIDATES,
    CAUSAL,
    CONTEXT,
    CONTEXT_FULL,
    GROUPS,
    MEMORY,
    SEGMENTS,
    WINDOW,
    Block,
)

FIELDS = tl.constexpr(BLOCK_FIELDS)


@triton.jit
def load_block(plan, index):
    """The block of that number."""
    at = plan.blocks + index * FIELDS
    return Block(
        q_row=tl.load(at),
        k_row=tl.load(at + 1),
        place=tl.load(at + 2),
        first=tl.load(at + 3),
        length=tl.load(at + 4),
        context=tl.load(at + 5),
        history=tl.load(at + 6),
        plain=tl.load(at + 7),
        stop=tl.load(at + 8),
        listed=tl.load(at + 9),
    )


@triton.jit
def load_rows(X, strides, row, place, length, head, WIDTH: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, C):
    """Rows ``[ROWS, PADDED]`` of a sample from ``place`` on, whose place 0 is ``row``.

    By descriptor, rows beyond the sample are those of the next one; else they are zero, as is what lies beyond WIDTH.
    """
    if C.descriptors:
        tile = X.load([row + place, head * WIDTH])
    else:
        steps = tl.arange(0, ROWS)
        column = tl.arange(0, PADDED)
        start = X + (row + place).to(tl.int64) * strides.token + head * strides.head
        inside = place + steps[:, None] < length
        if WIDTH != PADDED:
            inside = inside & (column[None, :] < WIDTH)
        tile = tl.load(start + steps[:, None] * strides.token + column[None, :], mask=inside, other=0.0)
    return tile


@triton.jit
def store_rows(X, strides, tile, row, place, length, head, WIDTH: tl.constexpr):
    """Write what :func:`load_rows` would load."""
    ROWS: tl.constexpr = tile.shape[0]
    PADDED: tl.constexpr = tile.shape[1]
    steps = tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)
    start = X + (row + place).to(tl.int64) * strides.token + head * strides.head
    inside = (place + steps[:, None] < length) & (column[None, :] < WIDTH)
    tl.store(start + steps[:, None] * strides.token + column[None, :], tile.to(X.dtype.element_ty), mask=inside)


@triton.jit
def visible(i, j, block, rules, tokens, FLAGS: tl.constexpr):
    """Whether row i attends to column j: ``hstu.ops.Mask.visible`` once more."""
    length, context, history = block.length, block.context, block.history
    seen = (j < length) & (i < length)
    if CAUSAL & FLAGS:
        ordered = j <= i
        if CONTEXT_FULL & FLAGS:
            ordered = ordered | (i < context)
        seen = seen & ordered
    always = j < 0
    if CONTEXT & FLAGS:
        always = j < context
    if MEMORY & FLAGS:
        always = always | (tl.load(tokens.memory + block.k_row + j, mask=j < length, other=0) != 0)
    if SEGMENTS & FLAGS:
        of_i = tl.load(tokens.segment + block.k_row + i, mask=i < length, other=-1)
        of_j = tl.load(tokens.segment + block.k_row + j, mask=j < length, other=-2)
        seen = seen & ((of_i == of_j) | always)
    if CANDIDATES & FLAGS:
        own = i == j
        if GROUPS & FLAGS:
            same = (i - history) // rules.group_size == (j - history) // rules.group_size
            own = (i >= history) & (j <= i) & same
        seen = seen & ((j < history) | own)
    if WINDOW & FLAGS:
        near = (tl.minimum(i, history) - tl.minimum(j, history) <= rules.window) | always
        if MEMORY & FLAGS:
            near = near | (tl.load(tokens.memory + block.k_row + i, mask=i < length, other=0) != 0)
        seen = seen & near
    return seen


@triton.jit
def bias_tile(call, block_index, tile, SIZE: tl.constexpr):
    """Where the bias of a tile is stored, less the place in the tile."""
    chunk = call.chunk
    return ((block_index - chunk.first).to(tl.int64) * call.plan.width + tile) * SIZE


@triton.jit
def add_bias(half, call, block_index, tile):
    """``half + r / 2`` of a tile, where there is a bias."""
    if call.chunk.bias is not None:
        rows: tl.constexpr = half.shape[0]
        columns: tl.constexpr = half.shape[1]
        place = tl.arange(0, rows)[:, None] * columns + tl.arange(0, columns)[None, :]
        at = call.chunk.bias + bias_tile(call, block_index, tile, rows * columns)
        half += tl.load(at + place).to(tl.float32)
    return half


@triton.jit
def silu(half, C):
    """``silu(2 half)`` and the logistic function of ``2 half``."""
    if C.fast:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [half], dtype=tl.float32, is_pure=True, pack=1)
        value = half * t + half
        sigma = 0.5 * t + 0.5
    else:
        sigma = 1.0 / (1.0 + tl.exp(-2.0 * half))
        value = 2.0 * half * sigma
    return value, sigma
