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
