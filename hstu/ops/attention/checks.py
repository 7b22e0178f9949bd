"""Errors of the attention's arguments, found before any kernel runs and without a device sync."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hstu.ops.attention.bias import QueryTime, RelativeBias
from hstu.ops.attention.layout import Layout
from hstu.ops.checks import values_readable

MAX_HEAD_WIDTH = 256
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_hstu(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, keys: Layout, scaling_seqlen: float, bias: RelativeBias
) -> None:
    """Raise ``ValueError`` for the first argument of HSTU attention that does not fit."""
    _check_qkv(q, k, v)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k has {k.shape[1]} heads, q has {q.shape[1]}: they must be equal")
    _check_tokens(q, k, layout, keys)
    if not (math.isfinite(scaling_seqlen) and scaling_seqlen > 0):
        raise ValueError(f"scaling_seqlen is {scaling_seqlen}: it divides the output and must be positive")
    _check_bias(bias, keys, q.device)


def check_softmax(q: Tensor, k: Tensor, v: Tensor, layout: Layout, keys: Layout) -> None:
    """Raise ``ValueError`` for the first argument of softmax attention that does not fit."""
    _check_qkv(q, k, v)
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"q has {q.shape[1]} heads, k has {k.shape[1]}: they must divide those of q")
    _check_tokens(q, k, layout, keys)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be [T, H, d], got {list(tensor.shape)}")
        if not 1 <= tensor.shape[2] <= MAX_HEAD_WIDTH:
            raise ValueError(f"{name} has head width {tensor.shape[2]}: choose 1 to {MAX_HEAD_WIDTH}")
        if tensor.dtype != q.dtype or tensor.dtype not in FLOATS:
            raise ValueError(f"{name} is {tensor.dtype}: q, k and v must share one of {FLOATS}")
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}: move them to one device")
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"k has head width {k.shape[2]}, q has {q.shape[2]}: they must be equal")
    if k.shape[:2] != v.shape[:2]:
        raise ValueError(f"v must have the tokens and heads of k {list(k.shape)}, got {list(v.shape)}")


def _check_tokens(q: Tensor, k: Tensor, layout: Layout, keys: Layout) -> None:
    if layout is keys and q.shape[0] != k.shape[0]:
        raise ValueError(f"q has {q.shape[0]} tokens, k has {k.shape[0]}: give k's layout as keys")
    for name, rows, owner in (("q", q, layout), ("k", k, keys)):
        if not isinstance(owner, Layout):
            raise ValueError(f"the layout of {name} must be a hstu.ops.Layout, got {type(owner).__name__}")
        if owner.offsets.device != rows.device:
            raise ValueError(f"the layout is on {owner.offsets.device}, {name} on {rows.device}: use one device")
        if values_readable(owner.offsets) and int(owner.offsets[-1]) != rows.shape[0]:
            raise ValueError(
                f"{name} has {rows.shape[0]} tokens, offsets of its layout end at {int(owner.offsets[-1])}"
            )
    if layout is keys:
        return
    if layout.num_samples != keys.num_samples:
        raise ValueError(f"layout has {layout.num_samples} samples, keys has {keys.num_samples}")
    if values_readable(keys.offsets) and bool((layout.lengths > keys.lengths).any()):
        sample = int((layout.lengths > keys.lengths).nonzero()[0])
        raise ValueError(
            f"sample {sample} has {int(layout.lengths[sample])} queries but only {int(keys.lengths[sample])} keys"
        )


def _check_bias(bias: RelativeBias, keys: Layout, device: torch.device) -> None:
    for name, table in (("bias.position", bias.position), ("bias.time", bias.time)):
        if table is None:
            continue
        if table.dim() != 1 or table.numel() == 0 or table.dtype not in FLOATS:
            raise ValueError(f"{name} must be a floating vector, got shape {list(table.shape)} of {table.dtype}")
        if table.device != device:
            raise ValueError(f"{name} is on {table.device}, q on {device}: move it to the device of q")
    if bias.position is not None and bias.position.numel() % 2 == 0:
        raise ValueError(f"bias.position must have 2N - 1 entries, got {bias.position.numel()}")
    is_known = not torch.compiler.is_exporting()  # a length that differs from call to call
    if bias.position is not None and is_known and bias.position.numel() < 2 * keys.longest - 1:
        raise ValueError(
            f"bias.position has {bias.position.numel()} entries, max_seqlen {keys.longest} needs "
            f"{2 * keys.longest - 1}: enlarge the table or shorten the sequences"
        )
    if bias.query_time not in QueryTime.__args__:  # type: ignore[attr-defined]
        raise ValueError(f"bias.query_time is {bias.query_time!r}: choose 'own' or 'next'")
    if bias.time is not None and keys.timestamps is None:
        raise ValueError("bias.time is given, but the layout has no timestamps: give it the [T] int64 seconds")
