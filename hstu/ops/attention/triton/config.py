"""Tile sizes of the attention kernels, by head width and device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hstu.ops.attention.triton import tiles

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


# Said outright, the limit keeps the compiler from spilling to a smaller number that it believes to suit the device.
MAX_REGISTERS = 255
# (rows, columns, warps, stages) by kernel and padded head width, the least width standing for all below. Found by
# compiling: the largest tiles without a spilled register.
Table = dict[Kernel, dict[int, tuple[int, int, int, int]]]
HOPPER_PLAIN: Table = {
    "forward": {64: (128, 64, 8, 2), 128: (128, 64, 8, 2), 256: (128, 32, 8, 2)},
    "backward_columns": {64: (64, 128, 8, 2), 128: (32, 128, 8, 1), 256: (32, 32, 8, 1)},
    "backward_rows": {64: (128, 64, 8, 2), 128: (128, 64, 8, 1), 256: (32, 16, 8, 1)},
}
HOPPER_RICH: Table = {
    "forward": {64: (128, 32, 8, 2), 128: (128, 32, 8, 2), 256: (64, 16, 8, 2)},
    "backward_columns": {64: (32, 64, 8, 1), 128: (16, 32, 8, 1), 256: (32, 16, 8, 1)},
    "backward_rows": {32: (64, 32, 8, 2), 64: (64, 64, 8, 2), 128: (32, 32, 8, 1), 256: (16, 32, 8, 1)},
}
AMPERE_PLAIN: Table = {
    "forward": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (64, 32, 8, 2)},
    "backward_columns": {32: (64, 128, 8, 2), 64: (32, 128, 8, 2), 128: (32, 64, 8, 1), 256: (32, 32, 8, 1)},
    "backward_rows": {64: (128, 64, 8, 2), 128: (64, 64, 8, 2), 256: (32, 16, 8, 1)},
}
AMPERE_RICH: Table = {
    "forward": {32: (128, 32, 8, 2), 64: (64, 32, 8, 2), 128: (32, 32, 8, 2), 256: (64, 16, 8, 2)},
    "backward_columns": {32: (32, 64, 8, 1), 64: (32, 32, 8, 1), 128: (32, 32, 8, 1), 256: (32, 16, 8, 1)},
    "backward_rows": {64: (64, 32, 8, 2), 128: (32, 32, 8, 1), 256: (32, 32, 8, 1)},
}
FLOAT32: Table = {
    "forward": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    "backward_columns": {64: (16, 16, 4, 1), 128: (16, 16, 8, 1), 256: (16, 16, 8, 1)},
    "backward_rows": {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
}


def padded_width(width: int) -> int:
    """The power of two, at least 16, that a head of this width takes in a kernel."""
    return max(16, 1 << (width - 1).bit_length())


def is_rich(flags: int) -> bool:
    """Whether the options need many registers: the bias, segments, windows."""
    plain = tiles.CAUSAL.value | tiles.CONTEXT.value | tiles.CONTEXT_FULL.value | tiles.CANDIDATES.value
    return bool(flags & ~plain)


def tile_config(kernel: Kernel, width: int, element_size: int, *, uneven: bool, rich: bool, hopper: bool) -> TileConfig:
    """Default tiles of a kernel.

    Args:
        kernel: its name.
        width: the larger padded head width.
        element_size: bytes of an element of q.
        uneven: whether a head is narrower than its padding: masked loads need registers.
        rich: see :func:`is_rich`.
        hopper: compute capability 9.0 or later.
    """
    plain, full = (HOPPER_PLAIN, HOPPER_RICH) if hopper else (AMPERE_PLAIN, AMPERE_RICH)
    sizes = (FLOAT32 if element_size == 4 else full if rich or uneven else plain)[kernel]
    # Three accumulators of 256 columns do not fit the registers: wide heads get dq from the kernel by rows.
    atomic_dq = width < 256
    if rich and uneven:
        width = max(width, 128)
    return TileConfig(*sizes[max(width, min(sizes))], atomic_dq=atomic_dq)
