"""Tile sizes of the attention kernels, by head width; none spills registers on sm_80 or sm_90."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hstu.ops.attention import triton_tiles as tiles

Kernel = Literal["forward", "backward_columns", "backward_rows"]


@dataclass(frozen=True)
class TileConfig:
    """How a kernel cuts the scores.

    Attributes:
        rows: rows of a tile.
        columns: columns of a tile.
        warps: that work on it.
        stages: of the pipeline of loads.
        atomic_dq: whether the backward by columns also adds to dq; if not, the backward by rows does that.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    atomic_dq: bool = True


# Tiles by kernel and by padded head width, 64 standing for all below.
PLAIN: dict[Kernel, dict[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 8, 2),
        128: TileConfig(128, 64, 8, 2),
        256: TileConfig(128, 32, 8, 2),
    },
    "backward_columns": {
        64: TileConfig(64, 128, 8, 2),
        128: TileConfig(32, 128, 8, 1),
        256: TileConfig(32, 32, 8, 1, atomic_dq=False),
    },
    "backward_rows": {
        64: TileConfig(128, 64, 8, 2),
        128: TileConfig(128, 64, 8, 1),
        256: TileConfig(32, 32, 8, 1),
    },
}
RICH: dict[Kernel, dict[int, TileConfig]] = {
    "forward": {
        64: TileConfig(128, 64, 8, 2),
        128: TileConfig(128, 32, 8, 2),
        256: TileConfig(64, 16, 8, 2),
    },
    "backward_columns": {
        64: TileConfig(32, 64, 8, 1),
        128: TileConfig(32, 32, 8, 1),
        256: TileConfig(32, 16, 8, 1, atomic_dq=False),
    },
    "backward_rows": {
        64: TileConfig(64, 64, 8, 2),
        128: TileConfig(64, 32, 8, 1),
        256: TileConfig(32, 32, 8, 1),
    },
}
_SMALL = {64: TileConfig(32, 32, 4, 1), 128: TileConfig(32, 32, 4, 1), 256: TileConfig(16, 16, 4, 1)}
FLOAT32: dict[Kernel, dict[int, TileConfig]] = dict.fromkeys(("forward", "backward_columns", "backward_rows"), _SMALL)


def padded_width(width: int) -> int:
    """The power of two, at least 16, that a head of this width takes in a kernel."""
    return max(16, 1 << (width - 1).bit_length())


def is_rich(flags: int) -> bool:
    """Whether the options need many registers: the bias, segments, windows."""
    plain = tiles.CAUSAL.value | tiles.CONTEXT.value | tiles.CONTEXT_FULL.value | tiles.CANDIDATES.value
    return bool(flags & ~plain)


def tile_config(kernel: Kernel, width: int, element_size: int, rich: bool) -> TileConfig:
    """Default tiles of a kernel.

    Args:
        kernel: its name.
        width: the larger padded head width.
        element_size: bytes of an element of q.
        rich: see :func:`is_rich`.
    """
    table = FLOAT32 if element_size == 4 else RICH if rich else PLAIN
    return table[kernel][max(width, 64)]
