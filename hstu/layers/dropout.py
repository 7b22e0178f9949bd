"""Dropout whose mask takes a quarter of the random bits on a CPU, where drawing them is most of the work."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16  # four draws of 16 bits from each random int64


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero each element of ``x`` with probability ``p`` (on a CPU: to 2**-17) and scale the others by 1 / (1 - p)."""
    dropped = round(p * _LEVELS)
    if x.device.type != "cpu" or not training or not 0 < dropped < _LEVELS:
        return F.dropout(x, p, training)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    keep = bits[: x.numel()].view(x.shape) >= dropped - _LEVELS // 2
    return x * keep.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


class Dropout(nn.Module):
    """``dropout`` with probability ``p``."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Map a tensor to one of its shape."""
        return dropout(x, self.p, self.training)
