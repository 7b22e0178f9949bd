"""Buffers used again from chunk to chunk and call to call: fresh memory costs more than the arithmetic on it."""

from __future__ import annotations

import math
import threading

import torch
from torch import Tensor

KEPT_ELEMENTS = 1 << 22  # of a buffer; a larger one is not kept

_kept = threading.local()


def scratch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised memory, this thread's under this name: what was got before under it is overwritten."""
    size = math.prod(shape)
    if size > KEPT_ELEMENTS:
        return torch.empty(shape, dtype=dtype)
    buffer: Tensor | None = _kept.__dict__.get(f"{name} {dtype}")
    if buffer is None or buffer.numel() < size:
        buffer = _kept.__dict__[f"{name} {dtype}"] = torch.empty(size, dtype=dtype)
    return buffer[:size].view(shape)
