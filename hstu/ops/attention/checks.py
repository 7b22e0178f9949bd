"""Errors of the attention's arguments, found before any kernel runs and without a device sync."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hstu.ops.attention.bias import RelativeBias
from hstu.ops.attention.mask import Mask
from hstu.ops.checks import check_offsets, values_readable

MAX_HEAD_WIDTH = 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    offsets: Tensor,
    max_seqlen: int,
    scaling_seqlen: float,
    mask: Mask,
    bias: RelativeBias | None,
) -> None:
    """Raise ``ValueError`` for the first argument that does not fit."""
    _check_qkv(q, k, v)
    _check_scalars(max_seqlen, scaling_seqlen, mask)
    total, samples = q.shape[0], offsets.numel() - 1
    _expect("offsets", offsets, None, torch.int64, q.device)
    check_offsets("offsets", offsets, total)
    _expect("num_context", mask.num_context, (samples,), torch.int64, q.device)
    _expect("num_candidates", mask.num_candidates, (samples,), torch.int64, q.device)
    _expect("segments", mask.segments, (total,), torch.int32, q.device)
    _expect("is_memory", mask.is_memory, (total,), torch.bool, q.device)
    if bias is not None:
        _check_bias(bias, total, max_seqlen, q.device)
    if values_readable(offsets):
        _check_lengths(offsets, max_seqlen, mask)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3 or tensor.shape[:2] != q.shape[:2]:
            raise ValueError(
                f"{name} must be [T, H, d] with the T and H of q, got {list(tensor.shape)}, q is {list(q.shape)}"
            )
        if not 1 <= tensor.shape[2] <= MAX_HEAD_WIDTH:
            raise ValueError(f"{name} has head width {tensor.shape[2]}: choose 1 to {MAX_HEAD_WIDTH}")
        if tensor.dtype != q.dtype or tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}: q, k and v must share one of {FLOATS}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: move them to one device")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has head width {k.shape[2]}, q has {q.shape[2]}: they must be equal")


def _check_scalars(max_seqlen: int, scaling_seqlen: float, mask: Mask) -> None:
    if max_seqlen < 0:
        raise ValueError(f"max_seqlen is {max_seqlen}: give a bound on the longest sequence")
    if not (math.isfinite(scaling_seqlen) and scaling_seqlen > 0):
        raise ValueError(f"scaling_seqlen is {scaling_seqlen}: it divides the output and must be positive")
    if mask.candidate_group_size < 1:
        raise ValueError(f"candidate_group_size is {mask.candidate_group_size}: it must be at least 1")
    if mask.max_attn_len is not None and mask.max_attn_len < 0:
        raise ValueError(f"max_attn_len is {mask.max_attn_len}: give a distance >= 0, or None for no limit")


def _check_bias(bias: RelativeBias, total: int, max_seqlen: int, device: torch.device) -> None:
    for name, table in (("bias.position", bias.position), ("bias.time", bias.time)):
        if table is None:
            continue
        _expect(name, table, None, None, device)
        if table.dim() != 1 or table.numel() == 0 or table.dtype not in FLOATS:
            raise ValueError(f"{name} must be a floating vector, got shape {list(table.shape)} of {table.dtype}")
    if bias.position is not None and bias.position.numel() % 2 == 0:
        raise ValueError(f"bias.position must have 2N - 1 entries, got {bias.position.numel()}")
    if bias.position is not None and bias.position.numel() < 2 * max_seqlen - 1:
        raise ValueError(
            f"bias.position has {bias.position.numel()} entries, max_seqlen {max_seqlen} needs "
            f"{2 * max_seqlen - 1}: enlarge the table or shorten the sequences"
        )
    if bias.query_time not in ("own", "next"):
        raise ValueError(f"bias.query_time is {bias.query_time!r}: choose 'own' or 'next'")
    if bias.time is not None and bias.timestamps is None:
        raise ValueError("bias.time is given without bias.timestamps: pass the [T] int64 times of the tokens")
    _expect("bias.timestamps", bias.timestamps, (total,), torch.int64, device)


def _expect(
    name: str, tensor: Any, shape: tuple[int, ...] | None, dtype: torch.dtype | None, device: torch.device
) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, q on {device}: move it to the device of q")
    if (shape is not None and tuple(tensor.shape) != shape) or (dtype is not None and tensor.dtype != dtype):
        raise ValueError(f"{name} must be {dtype} of shape {shape or 'any'}, got {tensor.dtype} {list(tensor.shape)}")


def _check_lengths(offsets: Tensor, max_seqlen: int, mask: Mask) -> None:
    lengths = offsets.diff()
    if lengths.numel() and int(lengths.max()) > max_seqlen:
        raise ValueError(f"max_seqlen is {max_seqlen}, the longest sequence has {int(lengths.max())} tokens")
    taken = torch.zeros_like(lengths)
    for name, count in (("num_context", mask.num_context), ("num_candidates", mask.num_candidates)):
        if count is not None and bool((count < 0).any()):
            raise ValueError(f"{name} of sample {int((count < 0).nonzero()[0])} is negative")
        taken = taken if count is None else taken + count
    if bool((taken > lengths).any()):
        sample = int((taken > lengths).nonzero()[0])
        raise ValueError(
            f"sample {sample} has {int(taken[sample])} context and candidate tokens "
            f"but only {int(lengths[sample])} tokens"
        )
