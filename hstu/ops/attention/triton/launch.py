"""HSTU attention by Triton kernels: launches, and the gradient of both bias tables with the rest.

No scores and no bias are ever stored. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from hstu.ops.attention.bias import RelativeBias, bucket_thresholds, query_times
from hstu.ops.attention.mask import Mask
from hstu.ops.attention.triton import tiles
from hstu.ops.attention.triton.backward import attention_backward_columns, attention_backward_rows
from hstu.ops.attention.triton.config import MAX_REGISTERS, Kernel, TileConfig, is_rich, padded_width, tile_config
from hstu.ops.attention.triton.forward import attention_forward
from hstu.ops.checks import values_readable

_INT32_MAX = 2**31 - 1


def hstu_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    *,
    max_seqlen: int,
    scaling_seqlen: float,
    alpha: float,
    mask: Mask,
    bias: RelativeBias | None,
) -> Tensor:
    """Same as :func:`hstu.ops.attention.reference.hstu_attention_reference`, for float32, bfloat16, float16.

    The times of one sample must span less than 68 years. The backward is deterministic, for two products
    more, when ``torch.use_deterministic_algorithms`` is on.
    """
    if q.dtype == torch.float64:
        raise ValueError("the Triton kernels do not do float64: use backend='reference'")
    if q.device.type == "cpu" and not triton.knobs.runtime.interpret:
        raise ValueError("backend 'triton' needs a GPU, q is on the CPU: use backend='auto'")
    bias = RelativeBias() if bias is None else bias
    call = AttentionCall.prepare(q, v, offsets, max_seqlen, scaling_seqlen, alpha, mask, bias)
    return _TritonAttention.apply(q, k, v, bias.position, bias.time, call)


@dataclass(frozen=True)
class AttentionCall:
    """What the kernels need besides q, k, v and the tables."""

    flags: int
    samples: int
    max_seqlen: int
    precision: str
    fast: bool
    arguments: dict[str, Any]

    @classmethod
    def prepare(
        cls,
        q: Tensor,
        v: Tensor,
        offsets: Tensor,
        max_seqlen: int,
        scaling_seqlen: float,
        alpha: float,
        mask: Mask,
        bias: RelativeBias,
    ) -> AttentionCall:
        """Collect the kernels' common arguments."""
        absent = offsets  # stands for tensors that the compiled kernel never reads
        num_buckets = 0 if bias.time is None else bias.time.numel() - 1
        keys = readers = thresholds = absent
        if bias.time is not None:
            assert bias.timestamps is not None
            keys, readers = bias.timestamps, query_times(bias, offsets, mask.num_candidates)
            thresholds = _thresholds(num_buckets, q.device)
            _check_span(keys)
        arguments = {
            "OFFSETS": offsets,
            "ORDER": torch.argsort(offsets.diff(), descending=True),
            "NUM_CONTEXT": absent if mask.num_context is None else mask.num_context,
            "NUM_CANDIDATES": absent if mask.num_candidates is None else mask.num_candidates,
            "SEGMENT": absent if mask.segments is None else mask.segments,
            "IS_MEMORY": absent if mask.is_memory is None else mask.is_memory.view(torch.uint8),
            "READERS": readers.contiguous(),
            "KEYS": keys.contiguous(),
            "THRESHOLDS": thresholds,
            "heads": q.shape[1],
            "alpha": alpha,
            "scale": 1.0 / scaling_seqlen,
            "window": mask.max_attn_len or 0,
            "group_size": mask.candidate_group_size,
            "centre": 0 if bias.position is None else (bias.position.numel() - 1) // 2,
            "num_buckets": num_buckets,
        }
        return cls(
            flags=option_flags(mask, bias),
            samples=offsets.numel() - 1,
            max_seqlen=max_seqlen,
            precision="tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee",
            fast=q.dtype == torch.bfloat16 and not triton.knobs.runtime.interpret,
            arguments=arguments,
        )

    def config(self, name: Kernel, q: Tensor, v: Tensor) -> TileConfig:
        """Tiles of a kernel for these head widths."""
        widths = q.shape[2], v.shape[2]
        return tile_config(
            name,
            padded_width(max(widths)),
            q.element_size(),
            uneven=any(width != padded_width(width) for width in widths),
            rich=is_rich(self.flags),
            hopper=_is_hopper(q.device),
        )

    def launch(self, kernel: Any, name: Kernel, q: Tensor, v: Tensor, **tensors: Any) -> None:
        """Run a kernel over all blocks of all samples and heads."""
        dqk, dv = padded_width(q.shape[2]), padded_width(v.shape[2])
        config = self.config(name, q, v)
        block = config.columns if name == "backward_columns" else config.rows
        blocks = triton.cdiv(self.max_seqlen, block)
        kernel[(blocks * self.samples * q.shape[1],)](
            **self.arguments,
            **tensors,
            blocks=blocks,
            FLAGS=self.flags,
            DQK=q.shape[2],
            DV=v.shape[2],
            BLOCK_DQK=dqk,
            BLOCK_DV=dv,
            BLOCK_M=config.rows,
            BLOCK_N=config.columns,
            FAST=self.fast,
            PRECISION=self.precision,
            num_warps=config.warps,
            num_stages=config.stages,
            maxnreg=MAX_REGISTERS,
        )


def option_flags(mask: Mask, bias: RelativeBias) -> int:
    """The options of a call as the bits of ``triton_tiles``."""
    chosen = {
        tiles.CAUSAL: mask.causal,
        tiles.CONTEXT: mask.num_context is not None,
        tiles.CONTEXT_FULL: mask.context_full and mask.num_context is not None,
        tiles.CANDIDATES: mask.num_candidates is not None,
        tiles.GROUPS: mask.num_candidates is not None and mask.candidate_group_size > 1,
        tiles.WINDOW: mask.max_attn_len is not None,
        tiles.SEGMENTS: mask.segments is not None,
        tiles.MEMORY: mask.is_memory is not None,
        tiles.POSITION: bias.position is not None,
        tiles.TIME: bias.time is not None,
    }
    return sum(bit.value for bit, wanted in chosen.items() if wanted)


def forward(q: Tensor, k: Tensor, v: Tensor, position: Any, time: Any, call: AttentionCall) -> Tensor:
    """The output ``[T, H, d_v]``."""
    out = torch.empty_like(v, memory_format=torch.contiguous_format)
    if q.numel() and call.max_seqlen:
        call.launch(attention_forward, "forward", q, v, **_inputs(q, k, v, position, time, call), **_rows("OUT", out))
    return out


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    position: Tensor | None,
    time: Tensor | None,
    call: AttentionCall,
    *,
    into: tuple[Tensor, Tensor, Tensor] | None = None,
    need_position: bool = False,
    need_time: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and, where needed, of the tables; the inputs are those of :func:`forward`.

    ``into`` names tensors to write the gradients of q, k and v to, with stride 1 in the last dimension.
    """
    if into is None:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    else:
        dq, dk, dv = into
    deterministic = torch.are_deterministic_algorithms_enabled()
    table_dtype = torch.int64 if deterministic else torch.float32
    d_tables = [
        torch.zeros(table.numel(), dtype=table_dtype, device=q.device) if table is not None and need else None
        for table, need in ((position, need_position), (time, need_time))
    ]
    if q.numel() and call.max_seqlen:
        grad = _unit_stride(grad)
        inputs = _inputs(q, k, v, position, time, call) | _rows("DO", grad)
        unit = _fixed_point_unit(grad, v, call) if deterministic else call.arguments["OFFSETS"]
        atomic_dq = call.config("backward_columns", q, v).atomic_dq and not deterministic
        dq_sums = dq if not atomic_dq else torch.zeros(dq.shape, dtype=torch.float32, device=q.device)
        call.launch(
            attention_backward_columns,
            "backward_columns",
            q,
            v,
            **inputs,
            **_rows("DQ", dq_sums),
            **_rows("DK", dk),
            **_rows("DV", dv, pointer="DV_OUT"),
            D_POSITION=_or(d_tables[0], call),
            D_TIME=_or(d_tables[1], call),
            UNIT=unit,
            NEED_POSITION=d_tables[0] is not None,
            NEED_TIME=d_tables[1] is not None,
            ATOMIC_DQ=atomic_dq,
            FIXED=deterministic,
        )
        if atomic_dq:
            dq.copy_(dq_sums)
        else:
            call.launch(attention_backward_rows, "backward_rows", q, v, **inputs, **_rows("DQ", dq))
        if deterministic:
            d_tables = [None if sums is None else sums.double() / unit for sums in d_tables]
    d_position, d_time = (
        None if sums is None or table is None else sums.to(table.dtype)
        for sums, table in zip(d_tables, (position, time), strict=True)
    )
    return dq, dk, dv, d_position, d_time


class TritonAttention:
    """Forward and backward for one batch, for an operation that holds the attention."""

    def __init__(self, call: AttentionCall) -> None:
        self._call = call

    def forward(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor | None, time: Tensor | None) -> Tensor:
        """Return the output ``[T, H, d_v]``."""
        return forward(q, k, v, position, time, self._call)

    def backward(
        self,
        grad: Tensor,
        inputs: tuple[Tensor, Tensor, Tensor],
        tables: tuple[Tensor | None, Tensor | None],
        into: tuple[Tensor, Tensor, Tensor],
        needs: tuple[bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """Write the gradients of q, k and v to ``into``; return those of the tables."""
        need_position, need_time = needs
        return backward(
            grad, *inputs, *tables, self._call, into=into, need_position=need_position, need_time=need_time
        )[3:]


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, position: Any, time: Any, call: AttentionCall) -> Tensor:
        q, k, v = (_unit_stride(x) for x in (q, k, v))
        ctx.save_for_backward(q, k, v, position, time)
        ctx.call = call
        return forward(q, k, v, position, time, call)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, position, time = ctx.saved_tensors
        needs = dict(zip(("need_position", "need_time"), ctx.needs_input_grad[3:5], strict=True))
        grads = backward(grad, q, k, v, position, time, ctx.call, **needs)
        return (*grads, None)


@cache
def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 9


@cache
def _thresholds(num_buckets: int, device: torch.device) -> Tensor:
    """Threshold above each bucket as int32, the largest number where there is none within 68 years."""
    bounds = torch.full((num_buckets + 1,), _INT32_MAX, dtype=torch.int64)
    thresholds = bucket_thresholds(num_buckets)
    bounds[: thresholds.numel()] = thresholds.clamp(max=_INT32_MAX)
    return bounds.int().to(device)


def _check_span(times: Tensor) -> None:
    if values_readable(times) and times.numel() and int(times.max() - times.min()) > _INT32_MAX:
        raise ValueError("bias.timestamps span more than 68 years: give them in seconds, or use the reference")


def _fixed_point_unit(grad: Tensor, v: Tensor, call: AttentionCall) -> Tensor:
    """Units per 1.0 such that no sum of score gradients can overflow 63 bits, ``[1]`` float64."""
    largest = torch.linalg.vector_norm(grad, dim=-1, dtype=torch.float32).max()
    largest = largest * torch.linalg.vector_norm(v, dim=-1, dtype=torch.float32).max()
    count = v.shape[0] * v.shape[1] * call.max_seqlen
    # The slope of SiLU stays below 1.1.
    bound = largest.double() * (1.1 * call.arguments["scale"] * count)
    return (2.0**62 / bound.clamp(min=1e-200)).clamp(max=2.0**300 / math.pi).view(1)


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _or(table: Tensor | None, call: AttentionCall) -> Tensor:
    return call.arguments["OFFSETS"] if table is None else table


def _rows(name: str, x: Tensor, pointer: str | None = None) -> dict[str, Any]:
    return {pointer or name: x, f"{name.lower()}_token": x.stride(0), f"{name.lower()}_head": x.stride(1)}


def _inputs(q: Tensor, k: Tensor, v: Tensor, position: Any, time: Any, call: AttentionCall) -> dict[str, Any]:
    tables = {"POSITION_TABLE": _or(position, call), "TIME_TABLE": _or(time, call)}
    return _rows("Q", q) | _rows("K", k) | _rows("V", v) | tables
