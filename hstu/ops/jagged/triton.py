"""Kernels that move rows, and the position add."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# mypy: allow-untyped-defs
ELEMENTS = 2048  # of a program: enough for a program to be worth its start


@triton.jit
def _move_rows(
    SOURCE,
    TARGET,
    PLACES,
    ADDED,
    rows,
    width,
    scale,
    SCATTER: tl.constexpr,
    ADD: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Row r of SOURCE to row PLACES[r] (SCATTER) or the other way; ADD: ``scale * ADDED`` to it."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    place = tl.load(PLACES + row, mask=row < rows, other=0)
    inside = (row[:, None] < rows) & (column[None, :] < width)
    here = row[:, None] * width + column[None, :]
    there = place[:, None] * width + column[None, :]
    if SCATTER:
        tl.store(TARGET + there, tl.load(SOURCE + here, mask=inside), mask=inside)
    else:
        value = tl.load(SOURCE + there, mask=inside)
        if ADD:
            added = tl.load(ADDED + here, mask=inside).to(tl.float32)
            value = (value.to(tl.float32) + scale * added).to(value.dtype)
        tl.store(TARGET + here, value, mask=inside)


def _launch(source: Tensor, target: Tensor, places: Tensor, added: Tensor, scale: float, **flags: bool) -> None:
    rows, width = places.numel(), target[:1].numel()
    if rows and width:
        block_d = min(triton.next_power_of_2(width), 1024)
        block_r = max(1, ELEMENTS // block_d)
        grid = (triton.cdiv(rows, block_r), triton.cdiv(width, block_d))
        _move_rows[grid](source, target, places, added, rows, width, scale, BLOCK_R=block_r, BLOCK_D=block_d, **flags)


def scatter_rows(source: Tensor, places: Tensor, target: Tensor) -> None:
    """``target[places] = source``."""
    _launch(source.contiguous(), target, places, places, 1.0, SCATTER=True, ADD=False)


def gather_rows(source: Tensor, places: Tensor) -> Tensor:
    """``source[places]``."""
    target = torch.empty((places.numel(), *source.shape[1:]), dtype=source.dtype, device=source.device)
    if target.numel():
        _launch(source.contiguous(), target, places, places, 1.0, SCATTER=False, ADD=False)
    return target


def add_rows(x: Tensor, table: Tensor, positions: Tensor, scale: float) -> Tensor:
    """``scale * x + table[positions]``."""
    target = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if target.numel():
        _launch(table.contiguous(), target, positions, x.contiguous(), scale, SCATTER=False, ADD=True)
    return target


@triton.jit(do_not_specialize=["samples", "steps"])
def _locate_rows(OFFSETS, SEQUENCE, PLACE, total, samples, steps, BLOCK: tl.constexpr):
    """SEQUENCE[r], the b with OFFSETS[b] <= r < OFFSETS[b + 1], by bisection; PLACE[r] = r - OFFSETS[b]."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = row < total
    low = tl.zeros([BLOCK], tl.int64)
    high = low + samples
    for _ in range(steps):
        middle = (low + high) // 2
        ahead = tl.load(OFFSETS + middle, mask=inside, other=0) <= row
        low, high = tl.where(ahead, middle, low), tl.where(ahead, high, middle)
    tl.store(SEQUENCE + row, low, mask=inside)
    tl.store(PLACE + row, row - tl.load(OFFSETS + low, mask=inside, other=0), mask=inside)


def locate_rows(offsets: Tensor, total: int) -> tuple[Tensor, Tensor]:
    """Return the sequence of each of ``total`` tokens [total] int64, and its place in it [total] int64."""
    sequence, place = (torch.empty(total, dtype=torch.int64, device=offsets.device) for _ in range(2))
    samples = offsets.numel() - 1
    if total:
        grid = (triton.cdiv(total, 512),)
        _locate_rows[grid](offsets.contiguous(), sequence, place, total, samples, samples.bit_length() + 1, BLOCK=512)
    return sequence, place
