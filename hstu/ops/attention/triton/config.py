"""Tile sizes of the attention kernels, by head width and device: read from ``tiles.json``.

``benchmarks/tune_attention.py`` measures and writes that file.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
import triton

Kernel = Literal["forward", "columns", "rows"]
TABLE = Path(__file__).with_name("tiles.json")


@dataclass(frozen=True)
class TileConfig:
    """How a kernel cuts the scores.

    Attributes:
        rows: rows of a tile.
        columns: columns of a tile.
        warps: that work on it.
        stages: of the pipeline of loads.
        split: whether dk and dv are written by two launches, for a product more: both sums of wide heads do not fit
            the registers.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    split: bool = False


def padded_width(width: int) -> int:
    """The power of two, at least 16, that a head of this width takes in a kernel."""
    return max(16, 1 << (width - 1).bit_length())


@cache
def _table() -> dict[str, dict[str, dict[str, dict[str, list[int]]]]]:
    tiles: dict[str, dict[str, dict[str, dict[str, list[int]]]]] = json.loads(TABLE.read_text())["tiles"]
    return tiles


@cache
def tile_config(kernel: Kernel, device: str, width: int, *, biased: bool, longest: int) -> TileConfig:
    """Tiles of a kernel.

    Args:
        kernel: its name.
        device: ``"sm80"``, ``"sm90"``, or of any device ``"float32"`` for that dtype and ``"unaligned"``.
        width: the larger padded head width.
        biased: whether there is a relative bias.
        longest: tokens of the longest sequence, a power of two: no tile is more than twice as long.
    """
    kinds = _table()[device][kernel]
    sizes = kinds.get("bias" if biased else "plain", kinds["plain"])
    rows, columns, warps, stages, *split = sizes[str(max(width, min(map(int, sizes))))]
    rows, columns = (max(min(size, 64), min(size, longest)) for size in (rows, columns))
    return TileConfig(rows, columns, min(warps, max(4, rows * columns // 512)), stages, bool(split))


def capability(device: torch.device) -> int:
    """Compute capability, times ten, of what runs kernels on tensors of this device; 0: nothing does."""
    if device.type == "cuda":
        return _capability(device)
    return 90 if triton.knobs.runtime.interpret else 0


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def device_kind(device: torch.device, dtype: torch.dtype, *, aligned: bool) -> str:
    """Which part of the table is for tensors of this dtype on this device.

    Heads that do not begin at multiples of 16 bytes are read value by value, whose addresses want registers.
    """
    if dtype == torch.float32:
        return "float32"
    return "unaligned" if not aligned else "sm90" if capability(device) >= 90 else "sm80"
