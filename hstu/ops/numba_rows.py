"""The map from ids to rows on a CPU in compiled loops: the numbers of ``hstu.parallel.row_map``, to the bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from hstu.ops.numba_draws import begun, two
from hstu.ops.numba_lanes import compiled, prefetch
from hstu.ops.row_sets import AGEING, BLOCKED, GOLDEN, NEVER, PARTS, WAYS

AHEAD = 32  # ids whose cache lines are asked for at once
_IDS, _SCORES = "int64[::1]", "int32[::1]"


@njit(inline="always")
def _drawn(key, number, bound, seed):  # type: ignore[no-untyped-def]
    return two(begun(key, np.int64(seed)), number, bound)


@njit(inline="always")
def _part(key):  # type: ignore[no-untyped-def]
    return key * np.int64(GOLDEN) >> 60 & (PARTS - 1)


@njit(inline="always")
def _sets(key, start, step, sets):  # type: ignore[no-untyped-def]
    first, second = _drawn(key, 0, sets, 1)
    base = (_part(key) - start) // step * sets
    return base + first, base + second


@njit(inline="always")
def _found(key, held, start, step, sets):  # type: ignore[no-untyped-def]
    place = len(held) - 1
    for base in _sets(key, start, step, sets):
        for way in range(base * WAYS, base * WAYS + WAYS):
            place = way if held[way] == key else place
    return place if key < BLOCKED else len(held) - 1


@compiled(f"void({_IDS}, {_IDS}, int64, int64, int64, {_IDS}, int64, int64)")
def find(
    ids: Any, held: Any, start: int, step: int, sets: int, places: Any, share: int, shares: int
) -> None:  # fmt: skip
    """Correct the ``places`` of a share of ``ids``, as far as others hold them; the last one is nowhere."""
    nowhere, stop = len(held) - 1, len(ids) * (share + 1) // shares
    first = len(ids) * share // shares
    for n in range(first, stop + AHEAD):
        if n < stop:
            if places[n] < nowhere:
                prefetch(held, places[n])
            else:
                a, b = _sets(ids[n], start, step, sets)
                prefetch(held, a * WAYS)
                prefetch(held, b * WAYS)
        if n - AHEAD >= first:
            key, place = ids[n - AHEAD], places[n - AHEAD]
            if not (place < nowhere and held[place] == key):
                places[n - AHEAD] = _found(key, held, start, step, sets)


@compiled(f"void({_IDS}, {_IDS}, int64, int64, int64, int64, int64, {_IDS})")
def rows_of(
    ids: Any, places: Any, nowhere: int, start: int, step: int, sets: int, usable: int, rows: Any
) -> None:  # fmt: skip
    """Write the row of each of ``ids``, which are held at ``places``; without one, that of its part."""
    for n in range(len(ids)):
        part, place = _part(ids[n]), places[n]
        row = (part - (part - start) // step) * sets + (place >> 3) + (place & (WAYS - 1)) * (PARTS * sets)
        rows[n] = row if place < nowhere else usable + part


@compiled(f"void({_IDS}, int64, int64, int64, int64, {_IDS}, {_IDS})")
def counters(
    ids: Any, clock: int, start: int, step: int, size: int, own: Any, old: Any
) -> None:  # fmt: skip
    """Write which two counters of a sketch count each of ``ids``, and which ``AGEING`` it halves."""
    for n in range(len(ids)):
        first = (_part(ids[n]) - start) // step * size
        a, b = _drawn(ids[n], 0, size, 2)
        own[2 * n], own[2 * n + 1] = first + a, first + b
        for number in range(AGEING // 2):
            a, b = _drawn(ids[n] + clock * np.int64(GOLDEN), number, size, 3)
            place = AGEING * n + 2 * number
            old[place], old[place + 1] = first + a, first + b


@njit(inline="always")
def _worth(scores, first):  # type: ignore[no-untyped-def]
    """How many of the set from ``first`` are free, negative, or its lowest score."""
    free, lowest = np.int32(0), np.int32(NEVER)
    for place in range(first, first + WAYS):
        free += scores[place] >> np.int32(31)
        lowest = min(lowest, scores[place])
    return free if free < 0 else lowest


@compiled(f"void({_IDS}, {_SCORES}, int64, int64, int64, {_IDS})")
def choose(ids: Any, scores: Any, start: int, step: int, sets: int, keys: Any) -> None:
    """Write the emptier set of each of ``ids``, times 2^32, plus its number."""
    ahead = np.empty((2, AHEAD), np.int64)
    for n in range(len(ids) + AHEAD):
        if n >= AHEAD:
            first, second = ahead[0, n % AHEAD], ahead[1, n % AHEAD]
            emptier = second if _worth(scores, second * WAYS) < _worth(scores, first * WAYS) else first
            keys[n - AHEAD] = emptier << 32 | (n - AHEAD)
        if n < len(ids):
            a, b = _sets(ids[n], start, step, sets)
            ahead[0, n % AHEAD], ahead[1, n % AHEAD] = a, b
            prefetch(scores, a * WAYS)
            prefetch(scores, b * WAYS)


@compiled(f"int64({_IDS}, {_IDS}, {_IDS}, {_SCORES}, int64, {_IDS}, {_IDS}, {_IDS})")
def settle(
    keys: Any, ids: Any, counts: Any, scores: Any, least: int, places: Any, own_ids: Any, own_counts: Any
) -> int:  # fmt: skip
    """Give places to those who come to each set, of ascending ``keys``, and return how many got one.

    Of a set those with most counts come first, and take the lowest scores: free places, and what is below ``least``
    or, where that is negative, below their count.
    """
    taken = at = 0
    order, left = np.empty(WAYS, np.int64), np.empty(WAYS, np.int32)
    while at < len(keys):
        first, coming = (keys[at] >> 32) * WAYS, 0
        while at < len(keys) and (keys[at] >> 32) * WAYS == first:
            n, behind = keys[at] & (2**32 - 1), coming
            while behind > 0 and counts[order[behind - 1]] < counts[n]:
                if behind < WAYS:
                    order[behind] = order[behind - 1]
                behind -= 1
            if behind < WAYS:
                order[behind] = n
                coming = min(coming + 1, WAYS)
            at += 1
        for way in range(WAYS):
            left[way] = scores[first + way]
        for turn in range(coming):
            n, best = order[turn], 0
            for way in range(1, WAYS):
                best = way if left[way] < left[best] else best
            if left[best] >= 0 and left[best] >= (counts[n] if least < 0 else least):
                continue
            left[best] = NEVER
            places[taken], own_ids[taken], own_counts[taken] = first + best, ids[n], counts[n]
            taken += 1
    return taken
