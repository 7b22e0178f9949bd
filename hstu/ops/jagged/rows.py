"""Rearrangement of rows and the position add: each output row is written once, without a copy in between.

On a GPU with triton one kernel moves the rows; elsewhere torch does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def merge_rows(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Rows of all parts, each at its place; differentiable.

    Args:
        parts: ``[T_k, ...]``, of one dtype and trailing shape.
        places: ``[T_k]`` int64; together a permutation of all rows.
    """
    return _MergeRows.apply(tuple(places), *parts)


def part_rows(values: Tensor, places: Sequence[Tensor]) -> list[Tensor]:
    """Rows ``values[places_k]`` for each k, the inverse of :func:`merge_rows`; differentiable."""
    return list(_PartRows.apply(tuple(places), values))


def add_positions(x: Tensor, table: Tensor, positions: Tensor, *, scale: float = 1.0) -> Tensor:
    """``scale * x + table[positions]``; differentiable in x and table.

    Args:
        x: ``[T, D]``.
        table: ``[P, D]``, of the dtype of x.
        positions: ``[T]`` int64, below P.
        scale: the square root of D in the published models.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if x.dim() != 2 or table.dim() != 2 or table.shape[1] != x.shape[1] or table.dtype != x.dtype:
        raise ValueError(
            f"table must be [P, D] of the width and dtype of x, got {list(table.shape)} {table.dtype} "
            f"for x {list(x.shape)} {x.dtype}"
        )
    if positions.shape != x.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(f"positions must be [{x.shape[0]}] int64, got {list(positions.shape)} {positions.dtype}")
    return _AddPositions.apply(x, table, positions, scale)


class _MergeRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: tuple[Tensor, ...], *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*places)
        return _merge(parts, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        return None, *(_gather(grad, own) if need else None for own, need in zip(ctx.saved_tensors, needs, strict=True))


class _PartRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, places: tuple[Tensor, ...], values: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*places)
        return tuple(_gather(values, own) for own in places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, _merge(grads, ctx.saved_tensors)


class _AddPositions(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, positions: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(positions)
        ctx.rows, ctx.scale = table.shape[0], scale
        if x.dtype != torch.float64 and _has_kernel(x.device.type):
            from hstu.ops.jagged.triton import add_rows

            return add_rows(x, table, positions, scale)
        return table.index_select(0, positions).add_(x, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (positions,) = ctx.saved_tensors
        need_x, need_table = ctx.needs_input_grad[:2]
        d_table = None
        if need_table:
            wide = torch.promote_types(grad.dtype, torch.float32)
            sums = torch.zeros(ctx.rows, grad.shape[1], dtype=wide, device=grad.device)
            d_table = sums.index_add_(0, positions, grad.to(wide)).to(grad.dtype)
        return grad * ctx.scale if need_x else None, d_table, None, None


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def _has_kernel(device: str) -> bool:
    """Whether the Triton kernels run on this type of device: on a CPU only in the interpreter."""
    if device == "cpu":
        triton = sys.modules.get("triton")
        return triton is not None and bool(triton.knobs.runtime.interpret)
    return device == "cuda" and _installed()


def located(offsets: Tensor, total: int) -> tuple[Tensor, Tensor] | None:
    """Return the sequence of each of ``total`` tokens and its place in it by the kernel; None where that is not."""
    if not _has_kernel(offsets.device.type) or offsets.dtype != torch.int64:
        return None
    from hstu.ops.jagged.triton import locate_rows

    return locate_rows(offsets, total)


def _merge(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    total = sum(own.numel() for own in places)
    out = torch.empty((total, *parts[0].shape[1:]), dtype=parts[0].dtype, device=parts[0].device)
    for part, own in zip(parts, places, strict=True):
        if _has_kernel(part.device.type):
            from hstu.ops.jagged.triton import scatter_rows

            scatter_rows(part, own, out)
        else:
            out.index_copy_(0, own, part)
    return out


def _gather(values: Tensor, places: Tensor) -> Tensor:
    if _has_kernel(values.device.type):
        from hstu.ops.jagged.triton import gather_rows

        return gather_rows(values, places)
    return values.index_select(0, places)
