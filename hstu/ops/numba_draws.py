"""Numbers drawn by keys in compiled loops: those of ``hstu.models.negatives``, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hstu.ops.numba_lanes import compiled


@njit(inline="always")
def mix(x):  # type: ignore[no-untyped-def]
    """Scramble an int64."""
    x = (x ^ (x >> 30 & 0x3FFFFFFFF)) * np.int64(-4658895280553007687)
    x = (x ^ (x >> 27 & 0x1FFFFFFFFF)) * np.int64(-7723592293110705685)
    return x ^ (x >> 31 & 0x1FFFFFFFF)


@njit(inline="always")
def begun(key, seed):  # type: ignore[no-untyped-def]
    """What all draws of a key begin with."""
    return mix(key * np.int64(0x9E3779B1) + seed)


@njit(inline="always")
def two(begin, number, bound):  # type: ignore[no-untyped-def]
    """Two numbers below ``bound``: columns ``2 * number`` and the next."""
    bits = mix(begin + number * np.int64(0x632BE5AB)) & (2**62 - 1)
    return (bits & (2**31 - 1)) * bound >> 31, (bits >> 31) * bound >> 31


@compiled("void(int64[::1], int64, int64, int64[:,::1], int64, int64)")
def columns(keys: Any, bound: int, seed: int, drawn: Any, share: int, shares: int) -> None:
    """Write the rows of a share: as many numbers below ``bound`` as ``drawn [n, count]`` holds for each of ``keys``."""
    rows, count = drawn.shape
    for row in range(rows * share // shares, rows * (share + 1) // shares):
        begin = begun(keys[row], seed)
        for number in range(count // 2):
            drawn[row, 2 * number], drawn[row, 2 * number + 1] = two(begin, number, bound)
        if count % 2:
            drawn[row, count - 1] = two(begin, count // 2, bound)[0]
