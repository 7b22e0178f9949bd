"""Softmax attention by Triton kernels, on the plans and tiles of HSTU attention."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.attention.layout import Layout
from hstu.ops.attention.mask import Mask
from hstu.ops.attention.triton.config import Kernel
from hstu.ops.attention.triton.launch import Inputs, Launch, Tables, check_device, unit_stride
from hstu.ops.attention.triton.plan import Batch
from hstu.ops.attention.triton.softmax_kernels import (
    softmax_backward_columns,
    softmax_backward_rows,
    softmax_forward,
)

NO_TABLES: Tables = (None, None)


def softmax_attention_triton(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask, *, alpha: float, keys: Layout
) -> Tensor:
    """Same as :func:`hstu.ops.attention.reference.softmax_attention_reference`; deterministic, without a wait."""
    check_device(q, v)
    out: Tensor = _TritonSoftmax.apply(q, k, v, layout, mask, alpha, keys)
    return out


class _TritonSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Mask, alpha: float, keys: Layout
    ) -> Tensor:
        q, k, v = (unit_stride(x) for x in (q, k, v))
        out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
        normaliser = q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32)
        ctx.batch, ctx.alpha = Batch.of(layout, keys, (q.shape[0], k.shape[0]), mask), alpha / math.log(2.0)
        if q.numel():
            launch = _launch("forward", softmax_forward, ctx.batch, (q, k, v))
            operands = *launch.operands(q, k, v), out, normaliser
            (chunk,) = launch.chunks(NO_TABLES)
            launch.run(chunk, operands, launch.strides(out), (ctx.alpha, 1.0))
        ctx.save_for_backward(q, k, v, out, normaliser)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, normaliser = ctx.saved_tensors
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        if not q.numel():
            return dq, dk.zero_(), dv.zero_(), None, None, None, None
        grad = unit_stride(grad)
        delta = torch.linalg.vecdot(grad.float(), out.float())
        rows = normaliser, delta
        launch = _launch("columns", softmax_backward_columns, ctx.batch, (q, k, v))
        operands = *launch.operands(q, k, v, grad), dk, dv, rows
        (chunk,) = launch.chunks(NO_TABLES)
        strides = launch.strides(grad, dq, dk, dv)
        for part in range(len(launch.parts)):
            launch.run(chunk, operands, strides, (ctx.alpha, 1.0), part)
        launch = _launch("rows", softmax_backward_rows, ctx.batch, (q, k, v))
        operands = *launch.operands(q, k, v, grad), dq, rows
        (chunk,) = launch.chunks(NO_TABLES)
        launch.run(chunk, operands, strides, (ctx.alpha, 1.0))
        return dq, dk, dv, None, None, None, None


def _launch(name: Kernel, kernel: Any, batch: Batch, inputs: Inputs) -> Launch:
    return Launch.of(name, kernel, batch, inputs, "own", NO_TABLES)
