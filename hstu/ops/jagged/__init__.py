"""Jagged tensors: ``values [T, ...]`` and ``offsets [B + 1]`` int64, no padding.

Every function runs on any device. All rearrangements are permutations of rows, so that the backward of
each is a gather, never a scatter with atomics.
"""

from hstu.ops.jagged.reference import (
    concat_jagged,
    interleave_jagged,
    lengths_to_offsets,
    positions_in_sequence,
    sequence_ids,
    sequences_and_positions,
    split_jagged,
)
from hstu.ops.jagged.rows import add_positions

__all__ = [
    "add_positions",
    "concat_jagged",
    "interleave_jagged",
    "lengths_to_offsets",
    "positions_in_sequence",
    "sequence_ids",
    "sequences_and_positions",
    "split_jagged",
]
