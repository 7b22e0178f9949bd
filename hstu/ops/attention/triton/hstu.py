"""HSTU attention by Triton kernels. No scores and no bias are ever stored, and nothing here waits for the device."""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.attention.triton.backward import attention_backward_columns, attention_backward_rows
from hstu.ops.attention.triton.config import Kernel
from hstu.ops.attention.triton.forward import attention_forward
from hstu.ops.attention.triton.launch import Inputs, Launch, Tables, check_device, unit_stride
from hstu.ops.attention.triton.plan import Batch
from hstu.ops.attention.triton.structs import Gradients


def hstu_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    mask: Mask,
    *,
    scaling_seqlen: float,
    alpha: float,
    bias: RelativeBias,
    keys: Layout,
) -> Tensor:
    """Same as :func:`hstu.ops.attention.reference.hstu_attention_reference`, for float32, bfloat16, float16.

    The times of one sample must span less than 68 years. Results are deterministic.
    """
    check_device(q, v)
    attention = TritonAttention(layout, mask, scaling_seqlen=scaling_seqlen, alpha=alpha, bias=bias, keys=keys)
    return _TritonAttention.apply(q, k, v, bias.position, bias.time, attention)


class TritonAttention:
    """Forward and backward for one batch, for an operation that holds the attention."""

    def __init__(
        self, layout: Layout, mask: Mask, *, scaling_seqlen: float, alpha: float, bias: RelativeBias, keys: Layout
    ) -> None:
        self.layout, self.mask, self.query_time, self.keys = layout, mask, bias.query_time, keys
        #: alpha and 1 / S
        self.factors = (float(alpha), 1.0 / scaling_seqlen)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None) -> Tensor:
        """Return the output ``[T, H, d_v]``."""
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        if q.numel():
            launch = self._launch("forward", attention_forward, (q, k, v), (position, time))
            operands = *launch.operands(q, k, v), out
            strides = launch.strides(out)
            for chunk in launch.chunks((position, time)):
                launch.run(chunk, operands, strides, self.factors)
        return out

    def backward(self, grad: Tensor, inputs: Inputs, tables: Tables, into: Inputs, needs: tuple[bool, bool]) -> Tables:
        """Write the gradients of q, k and v to ``into``; return those of the tables where ``needs`` says so."""
        if not inputs[0].numel():
            for tensor in into:
                tensor.zero_()
            d_position, d_time = (
                torch.zeros_like(t) if t is not None and need else None for t, need in zip(tables, needs, strict=True)
            )
            return d_position, d_time
        grad = unit_stride(grad)
        self.columns(grad, inputs, tables, into[1:])
        return self.rows(grad, inputs, tables, into[0], needs)

    def columns(self, grad: Tensor, inputs: Inputs, tables: Tables, into: tuple[Tensor, Tensor]) -> None:
        """Write the gradients of k and v to ``into``."""
        q, k, v = inputs
        launch = self._launch("columns", attention_backward_columns, inputs, tables)
        operands = *launch.operands(q, k, v, grad), *into
        strides = launch.strides(grad, None, *into)
        for chunk in launch.chunks(tables):
            for part in range(len(launch.parts)):
                launch.run(chunk, operands, strides, self.factors, part)

    def rows(self, grad: Tensor, inputs: Inputs, tables: Tables, into: Tensor, needs: tuple[bool, bool]) -> Tables:
        """Write the gradient of q to ``into``; return those of the tables."""
        q, k, v = inputs
        launch = self._launch("rows", attention_backward_rows, inputs, tables)
        operands = *launch.operands(q, k, v, grad), into
        strides = launch.strides(grad, into)
        sums = TableSums(tables, needs, self._unit(grad, v)) if any(needs) else None
        for chunk in launch.chunks(tables, gradients=sums is not None):
            launch.run(chunk, operands, strides, self.factors)
            if sums is not None:
                launch.reduce(chunk, tables, sums.gradients, self.factors[1])
        return (None, None) if sums is None else sums.result()

    def _launch(self, name: Kernel, kernel: Any, inputs: Inputs, tables: Tables) -> Launch:
        batch = Batch.of(self.layout, self.keys, (inputs[0].shape[0], inputs[1].shape[0]), self.mask)
        return Launch.of(name, kernel, batch, inputs, self.query_time, tables)

    def _unit(self, grad: Tensor, v: Tensor) -> Tensor:
        """Units per 1.0 such that no sum of score gradients can overflow 63 bits, ``[1]`` float64."""
        largest = torch.linalg.vector_norm(grad, float("inf")) * torch.linalg.vector_norm(v, float("inf")).double()
        # The slope of SiLU stays below 1.1.
        bound = 1.1 * self.factors[1] * grad.numel() * self.keys.longest
        return (2.0**62 / bound / largest.clamp(min=math.pi * 2.0**-238 / bound)).view(1)  # at most 2^300 / pi


class TableSums:
    """Gradients of both tables while they are summed, in fixed point: ``unit`` a 1.0."""

    def __init__(self, tables: Tables, needs: tuple[bool, bool], unit: Tensor) -> None:
        wanted = [table if need else None for table, need in zip(tables, needs, strict=True)]
        self._sizes = [0 if table is None else table.numel() for table in wanted]
        self._dtypes = [None if table is None else table.dtype for table in wanted]
        self._sums = torch.zeros(sum(self._sizes), dtype=torch.int64, device=unit.device)
        d_position, d_time = self._of_tables(self._sums)
        self.gradients = Gradients(d_position, d_time, unit)

    def result(self) -> Tables:
        """Return the sums in the dtypes of the tables."""
        wide = reduce(torch.promote_types, [dtype for dtype in self._dtypes if dtype is not None])
        # Divided in float64 and rounded once, in one kernel.
        sums = torch.div(self._sums, self.gradients.unit, out=self._sums.new_empty(self._sums.shape, dtype=wide))
        d_position, d_time = (
            None if part is None else part.to(dtype)
            for part, dtype in zip(self._of_tables(sums), self._dtypes, strict=True)
        )
        return d_position, d_time

    def _of_tables(self, sums: Tensor) -> list[Tensor | None]:
        parts = zip(self._dtypes, sums.split(self._sizes), strict=True)
        return [None if dtype is None else part for dtype, part in parts]


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, position: Any, time: Any, attention: TritonAttention
    ) -> Tensor:
        q, k, v = (unit_stride(x) for x in (q, k, v))
        ctx.save_for_backward(q, k, v, position, time)
        ctx.attention = attention
        return attention.forward(q, k, v, position, time)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position, time = ctx.saved_tensors
        needs = tuple(
            x is not None and need for x, need in zip((position, time), ctx.needs_input_grad[3:5], strict=True)
        )
        into = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        d_tables = ctx.attention.backward(grad, (q, k, v), (position, time), into, needs)
        return (*into, *d_tables, None)
