"""Kernels of the fused layer: layer norm, gate with norm and dropout, and the product with SiLU at its end."""

import triton
import triton.language as tl

# mypy: allow-untyped-defs


@triton.jit
def _load_row(X, row, stride, width, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    return tl.load(X + row * stride + d, mask=d < width, other=0.0).to(tl.float32)


@triton.jit
def _store_row(X, value, row, stride, width, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    tl.store(X + row * stride + d, value.to(X.dtype.element_ty), mask=d < width)


@triton.jit
def _moments(x, width, eps, BLOCK: tl.constexpr):
    """Mean and reciprocal deviation of a row."""
    mean = tl.sum(x, 0) / width
    centred = tl.where(tl.arange(0, BLOCK) < width, x - mean, 0.0)
    return mean, 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / width + eps)


@triton.jit
def _affine(hat, W, B, width, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr):
    d = tl.arange(0, BLOCK)
    if HAS_WEIGHT:
        hat *= tl.load(W + d, mask=d < width, other=0.0).to(tl.float32)
    if HAS_BIAS:
        hat += tl.load(B + d, mask=d < width, other=0.0).to(tl.float32)
    return hat


@triton.jit
def _norm_gradient(grad, hat, deviation, W, width, HAS_WEIGHT: tl.constexpr, BLOCK: tl.constexpr):
    """Gradient of the row that was normalised to ``hat``."""
    d = tl.arange(0, BLOCK)
    if HAS_WEIGHT:
        grad *= tl.load(W + d, mask=d < width, other=0.0).to(tl.float32)
    along = tl.sum(grad * hat, 0) / width
    mean = tl.sum(grad, 0) / width
    return (grad - mean - hat * along) * deviation


@triton.jit
def norm_forward(
    X,
    Y,
    MEAN,
    DEVIATION,
    W,
    B,
    x_row,
    width,
    eps,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row."""
    row = tl.program_id(0).to(tl.int64)
    x = _load_row(X, row, x_row, width, BLOCK)
    mean, deviation = _moments(x, width, eps, BLOCK)
    y = _affine((x - mean) * deviation, W, B, width, HAS_WEIGHT, HAS_BIAS, BLOCK)
    _store_row(Y, y, row, width, width, BLOCK)
    tl.store(MEAN + row, mean)
    tl.store(DEVIATION + row, deviation)


@triton.jit
def norm_backward(
    GRAD,
    X,
    MEAN,
    DEVIATION,
    W,
    RESIDUAL,
    DX,
    DW,
    DB,
    grad_row,
    x_row,
    residual_row,
    rows,
    rows_each,
    width,
    HAS_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``rows_each`` rows a program; DW and DB hold one row of sums for each program, added up afterwards."""
    first = tl.program_id(0).to(tl.int64) * rows_each
    inside = tl.arange(0, BLOCK) < width
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + rows_each, rows)):
        grad = _load_row(GRAD, row, grad_row, width, BLOCK)
        deviation = tl.load(DEVIATION + row)
        hat = (_load_row(X, row, x_row, width, BLOCK) - tl.load(MEAN + row)) * deviation
        hat = tl.where(inside, hat, 0.0)
        dw += grad * hat
        db += grad
        dx = _norm_gradient(grad, hat, deviation, W, width, HAS_WEIGHT, BLOCK)
        dx += _load_row(RESIDUAL, row, residual_row, width, BLOCK)
        _store_row(DX, dx, row, width, width, BLOCK)
    _store_row(DW, dw, tl.program_id(0), width, width, BLOCK)
    _store_row(DB, db, tl.program_id(0), width, width, BLOCK)


@triton.jit
def _dropped(x, row, part, parts: tl.constexpr, width, seed, dropout, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Apply the dropout of columns ``[part * width, (part + 1) * width)`` of a row."""
    if DROPOUT:
        place = ((row * parts + part) * width + tl.arange(0, BLOCK)).to(tl.int32)
        x = tl.where(tl.rand(seed, place) >= dropout, x / (1.0 - dropout), 0.0)
    return x


@triton.jit
def gate_forward(
    U,
    ATTENDED,
    Y,
    MEAN,
    DEVIATION,
    W,
    B,
    u_row,
    o_row,
    width,
    eps,
    seed,
    dropout,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program a row: ``dropout(u * norm(o))``, or of the concatenation [u, o, u * norm(o)]."""
    row = tl.program_id(0).to(tl.int64)
    parts: tl.constexpr = 3 if CONCAT else 1
    u = _load_row(U, row, u_row, width, BLOCK)
    o = _load_row(ATTENDED, row, o_row, width, BLOCK)
    mean, deviation = _moments(o, width, eps, BLOCK)
    gated = u * _affine((o - mean) * deviation, W, B, width, HAS_WEIGHT, HAS_BIAS, BLOCK)
    y_row = parts * width
    if CONCAT:
        _store_row(Y, _dropped(u, row, 0, parts, width, seed, dropout, DROPOUT, BLOCK), row, y_row, width, BLOCK)
        o = _dropped(o, row, 1, parts, width, seed, dropout, DROPOUT, BLOCK)
        _store_row(Y + width, o, row, y_row, width, BLOCK)
    gated = _dropped(gated, row, parts - 1, parts, width, seed, dropout, DROPOUT, BLOCK)
    _store_row(Y + (parts - 1) * width, gated, row, y_row, width, BLOCK)
    tl.store(MEAN + row, mean)
    tl.store(DEVIATION + row, deviation)


@triton.jit
def gate_backward(
    GRAD,
    U,
    ATTENDED,
    MEAN,
    DEVIATION,
    W,
    B,
    DU,
    DO,
    DW,
    DB,
    u_row,
    o_row,
    du_row,
    rows,
    rows_each,
    width,
    seed,
    dropout,
    CONCAT: tl.constexpr,
    DROPOUT: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``rows_each`` rows a program, as :func:`norm_backward`."""
    first = tl.program_id(0).to(tl.int64) * rows_each
    parts: tl.constexpr = 3 if CONCAT else 1
    inside = tl.arange(0, BLOCK) < width
    dw = tl.zeros((BLOCK,), tl.float32)
    db = tl.zeros((BLOCK,), tl.float32)
    for row in range(first, tl.minimum(first + rows_each, rows)):
        grad = _load_row(GRAD + (parts - 1) * width, row, parts * width, width, BLOCK)
        grad = _dropped(grad, row, parts - 1, parts, width, seed, dropout, DROPOUT, BLOCK)
        deviation = tl.load(DEVIATION + row)
        hat = (_load_row(ATTENDED, row, o_row, width, BLOCK) - tl.load(MEAN + row)) * deviation
        hat = tl.where(inside, hat, 0.0)
        du = grad * _affine(hat, W, B, width, HAS_WEIGHT, HAS_BIAS, BLOCK)
        dn = grad * _load_row(U, row, u_row, width, BLOCK)
        dw += dn * hat
        db += dn
        do = _norm_gradient(dn, hat, deviation, W, width, HAS_WEIGHT, BLOCK)
        if CONCAT:
            of_u = _load_row(GRAD, row, parts * width, width, BLOCK)
            du += _dropped(of_u, row, 0, parts, width, seed, dropout, DROPOUT, BLOCK)
            of_o = _load_row(GRAD + width, row, parts * width, width, BLOCK)
            do += _dropped(of_o, row, 1, parts, width, seed, dropout, DROPOUT, BLOCK)
        _store_row(DU, du, row, du_row, width, BLOCK)
        _store_row(DO, do, row, width, width, BLOCK)
    _store_row(DW, dw, tl.program_id(0), width, width, BLOCK)
    _store_row(DB, db, tl.program_id(0), width, width, BLOCK)


@triton.jit
def linear_silu(
    A,
    W,
    B,
    Z,
    ACTIVE,
    rows,
    columns,
    inner,
    silu_columns,
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``Z = A W^T + b`` and ACTIVE, Z with SiLU on its leading columns; GROUP row blocks share columns in cache."""
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    group = program // (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    m0 = (group * GROUP + program % (GROUP * column_blocks) % height) * BLOCK_M
    n0 = program % (GROUP * column_blocks) // height * BLOCK_N
    i = m0 + tl.arange(0, BLOCK_M)
    j = n0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, inner, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        a_inside = (i[:, None] < rows) & (k[None, :] < inner)
        w_inside = (j[:, None] < columns) & (k[None, :] < inner)
        a = tl.load(A + i[:, None].to(tl.int64) * inner + k[None, :], mask=a_inside, other=0.0)
        w = tl.load(W + j[:, None].to(tl.int64) * inner + k[None, :], mask=w_inside, other=0.0)
        acc = tl.dot(a, tl.trans(w), acc, input_precision=PRECISION)
    if HAS_BIAS:
        acc += tl.load(B + j, mask=j < columns, other=0.0).to(tl.float32)[None, :]
    # SiLU of the rounded value, which is the one that the backward reads.
    z = acc.to(Z.dtype.element_ty)
    wide = z.to(tl.float32)
    active = tl.where(j[None, :] < silu_columns, wide / (1.0 + tl.exp(-wide)), wide)
    place = i[:, None].to(tl.int64) * columns + j[None, :]
    inside = (i[:, None] < rows) & (j[None, :] < columns)
    tl.store(Z + place, z, mask=inside)
    tl.store(ACTIVE + place, active.to(Z.dtype.element_ty), mask=inside)
