"""The relative bias of the published research model: a table over positions and one over time differences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from hstu.ops.attention.layout import Layout

# The published model divides the natural logarithm of the seconds by this constant.
BUCKET_LOG_WIDTH = 0.301
_INT64_MAX = 2**63 - 1
QueryTime = Literal["own", "next"]


@dataclass(frozen=True, kw_only=True)
class RelativeBias:
    """``r_ij = position[p_j - p_i + N - 1] + time[bucket(t_i' - t_j)]``, shared by the heads of a layer.

    Attributes:
        position: ``[2N - 1]`` floating table, or None; N bounds the length of a sequence.
        time: ``[num_buckets + 1]`` floating table, or None; needs the layout's ``timestamps``.
        query_time: ``"own"``: t_i' is the token's own time; ``"next"``: that of the token after it in the
            sample (its own for the last token, for candidates and for memory), as in the published research model.
    """

    position: Tensor | None = None
    time: Tensor | None = None
    query_time: QueryTime = "own"


@cache
def _thresholds(num_buckets: int) -> tuple[int, ...]:
    # Beyond exp(43) the differences no longer fit int64: those buckets are empty.
    last = min(num_buckets, int(math.log(_INT64_MAX) / BUCKET_LOG_WIDTH))
    return tuple(math.ceil(math.exp(BUCKET_LOG_WIDTH * k)) for k in range(1, last + 1))


def bucket_thresholds(num_buckets: int, device: torch.device | None = None) -> Tensor:
    """Smallest difference in seconds of buckets 1, 2, ... as an int64 tensor, in increasing order."""
    return torch.tensor(_thresholds(num_buckets), dtype=torch.int64, device=device)


def time_bucket(difference: Tensor, num_buckets: int) -> Tensor:
    """``floor(ln(max(1, |x|)) / 0.301)`` clipped to ``num_buckets``, exact for integer seconds.

    Args:
        difference: int64 of any shape, seconds.
        num_buckets: the largest bucket; the table has one row more.
    """
    return torch.bucketize(difference.abs(), bucket_thresholds(num_buckets, difference.device), right=True)


def query_times(layout: Layout, which: QueryTime) -> Tensor:
    """Time t_i' of each token as a query, ``[T]`` int64; made once a batch."""
    assert layout.timestamps is not None
    if which == "own" or layout.timestamps.numel() == 0:
        return layout.timestamps
    return layout.keep(("query_times", which), lambda: _next_times(layout))


def _next_times(layout: Layout) -> Tensor:
    own, offsets = layout.timestamps, layout.offsets
    assert own is not None
    following = torch.cat([own[1:], own[-1:]])
    # The last history token asks at the request time; from the last token or first candidate on, its own.
    stop = torch.minimum(offsets[:-1] + layout.history, offsets[1:] - 1)
    stop = torch.repeat_interleave(stop, layout.lengths, output_size=own.numel())
    asks_later = torch.arange(own.numel(), device=own.device) < stop
    if layout.is_memory is not None:  # what it keeps does not depend on what comes after
        asks_later = asks_later & ~layout.is_memory
    return torch.where(asks_later, following, own)
