"""What the attention kernels are given: operands, tokens, the plan of a batch, and what is fixed when compiling.

Structs are tuples by name: a kernel sees their members as if they were arguments of their own. A member that is None
does not exist in the compiled kernel.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton.language as tl

# Options of a call, one bit each: a kernel is compiled for a combination.
CAUSAL = tl.constexpr(1)
CONTEXT = tl.constexpr(2)
CONTEXT_FULL = tl.constexpr(4)
CANDIDATES = tl.constexpr(8)
GROUPS = tl.constexpr(16)
WINDOW = tl.constexpr(32)
SEGMENTS = tl.constexpr(64)
MEMORY = tl.constexpr(128)
#: Integers that describe a block in ``Plan.blocks``.
BLOCK_FIELDS = 16


class Rows(NamedTuple):
    """Strides of a tensor ``[T, H, d]``, in elements; the last is 1."""

    token: Any
    head: Any


class Operands(NamedTuple):
    """Strides of the tensors of a kernel, ``Rows`` or None, and the number of heads."""

    q: Any
    k: Any
    v: Any
    out: Any
    dq: Any
    dk: Any
    dv: Any
    heads: Any


class Tokens(NamedTuple):
    """What the mask and the time bias know of the tokens of k: ``[T]`` each, or None."""

    segment: Any
    memory: Any
    query_time: Any
    time: Any


class Rules(NamedTuple):
    """Scalars of the mask."""

    window: Any
    group_size: Any


class Bias(NamedTuple):
    """Tables of the relative bias, or None; and the least time difference of each bucket but the first."""

    position: Any
    time: Any
    thresholds: Any
    centre: Any
    num_buckets: Any


class Gradients(NamedTuple):
    """Sums of the tables' gradients in 64-bit fixed point, in which order does not matter; units per 1.0."""

    position: Any
    time: Any
    unit: Any


class Plan(NamedTuple):
    """Which tiles each block of rows (or of columns) has to do with.

    Members:
        blocks: ``[n, BLOCK_FIELDS]`` int32, see ``load_block``.
        listed: ``[n, width]`` int32, numbers of the tiles that need a mask.
        width: tiles of the longest sequence.
    """

    blocks: Any
    listed: Any
    width: Any


class Chunk(NamedTuple):
    """The blocks of one launch, and what is stored of the relative bias for them; None where there is none.

    Members:
        first: number of its first block.
        bias: ``[blocks, width, rows * columns]``, half the bias of each tile, laid out as the kernel holds it.
        gradient: ``[H, blocks, width, rows * columns]``, the gradients of each tile's scores.
        blocks: number of blocks.
    """

    first: Any
    bias: Any
    gradient: Any
    blocks: Any


class Block(NamedTuple):
    """One block of rows or of columns of one sample.

    Members:
        q_row: row in q of the token at place 0 of the sample, were it there.
        k_row: row in k of the token at place 0.
        place: of the block's first token.
        first: place of the first query; those before it are keys alone.
        length: tokens of the sample.
        context: context tokens.
        history: place of the first candidate.
        plain, stop: tiles ``[plain, stop)`` need no mask.
        listed: number of tiles that need one.
    """

    q_row: Any
    k_row: Any
    place: Any
    first: Any
    length: Any
    context: Any
    history: Any
    plain: Any
    stop: Any
    listed: Any


class Call(NamedTuple):
    """What a kernel is given besides its operands."""

    strides: Any
    plan: Any
    chunk: Any
    rules: Any
    tokens: Any
    alpha: Any
    scale: Any


class Config(NamedTuple):
    """What a kernel is compiled for; every member a ``tl.constexpr``.

    Members:
        flags: options of the call.
        d_qk, d_v: head widths.
        block_qk, block_v: their padded widths.
        rows, columns: of a tile.
        shared: query heads to a key head.
        descriptors: whether operands are loaded by tensor descriptors (TMA).
        fast: whether the hardware's tanh will do (relative error 2^-11, enough for bfloat16).
        precision: of float32 products.
        dk, dv: which of both the kernel by columns writes.
    """

    flags: Any
    d_qk: Any
    d_v: Any
    block_qk: Any
    block_v: Any
    rows: Any
    columns: Any
    shared: Any
    descriptors: Any
    fast: Any
    precision: Any
    dk: Any
    dv: Any
