"""Kernels of the fused layer: layer norm, gate with norm and dropout, and SiLU's backward with the bias's gradient."""

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
def _dropped(x, row, part, parts: tl.constexpr, width, SEED, dropout, DROPOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Apply the dropout of columns ``[part * width, (part + 1) * width)`` of a row."""
    if DROPOUT:
        place = ((row * parts + part) * width + tl.arange(0, BLOCK)).to(tl.int32)
        x = tl.where(tl.rand(tl.load(SEED), place) >= dropout, x / (1.0 - dropout), 0.0)
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
    SEED,
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
        _store_row(Y, _dropped(u, row, 0, parts, width, SEED, dropout, DROPOUT, BLOCK), row, y_row, width, BLOCK)
        o = _dropped(o, row, 1, parts, width, SEED, dropout, DROPOUT, BLOCK)
        _store_row(Y + width, o, row, y_row, width, BLOCK)
    gated = _dropped(gated, row, parts - 1, parts, width, SEED, dropout, DROPOUT, BLOCK)
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
    SEED,
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
        grad = _dropped(grad, row, parts - 1, parts, width, SEED, dropout, DROPOUT, BLOCK)
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
            du += _dropped(of_u, row, 0, parts, width, SEED, dropout, DROPOUT, BLOCK)
            of_o = _load_row(GRAD + width, row, parts * width, width, BLOCK)
            do += _dropped(of_o, row, 1, parts, width, SEED, dropout, DROPOUT, BLOCK)
        _store_row(DU, du, row, du_row, width, BLOCK)
        _store_row(DO, do, row, width, width, BLOCK)
    _store_row(DW, dw, tl.program_id(0), width, width, BLOCK)
    _store_row(DB, db, tl.program_id(0), width, width, BLOCK)


@triton.jit
def silu_backward(GRAD, Z, SUMS, rows, columns, rows_each, silu_columns, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Gradient of z in place of ``GRAD``, and its sums over ``rows_each`` rows, one row of SUMS for each program."""
    j = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(0).to(tl.int64) * rows_each
    total = tl.zeros((BLOCK_N,), tl.float32)
    for m0 in range(first, tl.minimum(first + rows_each, rows), BLOCK_M):
        i = m0 + tl.arange(0, BLOCK_M)
        inside = (i[:, None] < tl.minimum(first + rows_each, rows)) & (j[None, :] < columns)
        place = i[:, None].to(tl.int64) * columns + j[None, :]
        grad = tl.load(GRAD + place, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(Z + place, mask=inside, other=0.0).to(tl.float32)
        sigma = 1.0 / (1.0 + tl.exp(-z))
        slope = tl.where(j[None, :] < silu_columns, sigma * (1.0 + z * (1.0 - sigma)), 1.0)
        dz = grad * slope
        tl.store(GRAD + place, dz.to(GRAD.dtype.element_ty), mask=inside)
        total += tl.sum(dz, 0)
    tl.store(SUMS + tl.program_id(0).to(tl.int64) * columns + j, total, mask=j < columns)
