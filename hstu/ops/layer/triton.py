"""Launches of the fused layer's kernels; matrix products are left to the library's."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from hstu.ops.layer.kernels import Affine, Moments, TorchKernels
from hstu.ops.layer.options import LayerOptions
from hstu.ops.layer.triton_kernels import (
    gate_backward,
    gate_forward,
    norm_backward,
    norm_forward,
    silu_backward,
)

PROGRAMS = 264  # of a backward over rows: two for each multiprocessor of an H100


class TritonKernels(TorchKernels):
    """Norms, gate and SiLU's backward on a GPU; the products are the library's, which no kernel of ours reaches."""

    def norm(self, x: Tensor, affine: Affine, eps: float, dtype: torch.dtype) -> tuple[Tensor, Moments]:
        """As the parent's."""
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        mean, deviation = (torch.empty(len(x), dtype=torch.float32, device=x.device) for _ in range(2))
        if y.numel():
            norm_forward[(len(x),)](
                x, y, mean, deviation, *_pointers(affine, x), x.stride(0), x.shape[1], eps, **_has(affine),
                **_row_block(x.shape[1]),
            )  # fmt: skip
        return y, (mean, deviation)

    def norm_backward(
        self, grad: Tensor, x: Tensor, moments: Moments, affine: Affine, residual: Tensor
    ) -> tuple[Tensor, Affine]:
        """As the parent's."""
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        programs, rows_each, dw, db = _sums(x)
        if dx.numel():
            norm_backward[(programs,)](
                grad, x, *moments, _or(affine[0], x), residual, dx, dw, db, grad.stride(0), x.stride(0),
                residual.stride(0), len(x), rows_each, x.shape[1], HAS_WEIGHT=affine[0] is not None,
                **_row_block(x.shape[1]),
            )  # fmt: skip
        return dx, (_total(dw, affine[0]), _total(db, affine[1]))

    def activate_backward(self, grad: Tensor, z: Tensor, silu_columns: int, sums: bool) -> tuple[Tensor, Tensor | None]:
        """As the parent's, in one pass over both."""
        rows, columns = grad.shape
        rows_each = max(16, triton.cdiv(rows, 4 * PROGRAMS))
        programs = triton.cdiv(rows, rows_each)
        total = torch.empty(programs, columns, dtype=torch.float32, device=grad.device)
        if grad.numel():
            silu_backward[(programs, triton.cdiv(columns, 256))](
                grad, z, total, rows, columns, rows_each, silu_columns, BLOCK_M=16, BLOCK_N=256, num_warps=4
            )
        return grad, total.sum(0).to(grad.dtype) if sums else None

    def gate(
        self, u: Tensor, o: Tensor, affine: Affine, options: LayerOptions, seed: Tensor | None
    ) -> tuple[Tensor, Moments]:
        """As the parent's."""
        width = o.shape[1]
        gated = torch.empty(len(o), options.gated_width, dtype=o.dtype, device=o.device)
        mean, deviation = (torch.empty(len(o), dtype=torch.float32, device=o.device) for _ in range(2))
        if gated.numel():
            gate_forward[(len(o),)](
                u, o, gated, mean, deviation, *_pointers(affine, o), u.stride(0), o.stride(0), width, options.eps, seed,
                options.dropout, CONCAT=options.gate == "concat", DROPOUT=seed is not None, **_has(affine),
                **_row_block(width),
            )  # fmt: skip
        return gated, (mean, deviation)

    def gate_backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor],
        moments: Moments,
        affine: Affine,
        options: LayerOptions,
        seed: Tensor | None,
        du: Tensor,
    ) -> tuple[Tensor, Affine]:
        """As the parent's."""
        u, o = inputs
        width = o.shape[1]
        do = torch.empty(o.shape, dtype=o.dtype, device=o.device)
        programs, rows_each, dw, db = _sums(o)
        if do.numel():
            gate_backward[(programs,)](
                grad.contiguous(), u, o, *moments, *_pointers(affine, o), du, do, dw, db, u.stride(0), o.stride(0),
                du.stride(0), len(o), rows_each, width, seed, options.dropout, CONCAT=options.gate == "concat",
                DROPOUT=seed is not None, **_has(affine), **_row_block(width),
            )  # fmt: skip
        return do, (_total(dw, affine[0]), _total(db, affine[1]))


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer for an argument that the compiled kernel never reads."""
    return other if tensor is None else tensor


def _pointers(affine: Affine, other: Tensor) -> tuple[Tensor, Tensor]:
    return _or(affine[0], other), _or(affine[1], other)


def _has(affine: Affine) -> dict[str, bool]:
    return {"HAS_WEIGHT": affine[0] is not None, "HAS_BIAS": affine[1] is not None}


def _row_block(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(8, block // 256))}


def _sums(x: Tensor) -> tuple[int, int, Tensor, Tensor]:
    """Programs, rows of each, and zeroed sums of weight and bias gradients for each program."""
    rows_each = max(1, triton.cdiv(len(x), PROGRAMS))
    programs = triton.cdiv(len(x), rows_each)
    dw, db = (torch.zeros(programs, x.shape[1], dtype=torch.float32, device=x.device) for _ in range(2))
    return programs, rows_each, dw, db


def _total(sums: Tensor, parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else sums.sum(0).to(parameter.dtype)
