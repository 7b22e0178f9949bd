"""Position and time encoding of the token stream."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hstu.layers.dropout import Dropout
from hstu.layers.tokens import Stream, Tokens
from hstu.ops import sequence_ids, sequences_and_positions


def token_positions(tokens: Stream, *, from_end: bool = False) -> Tensor:
    """Return p_i = min(i, L_b - m_b) of the local rows, [t] int64: candidates stand at the place after the history.

    ``from_end`` counts the other way, L_b - 1 - i: 0 is the last token. A stream may have
    positions of its own.
    """
    if tokens.positions is not None:
        return tokens.of_local(tokens.positions)
    layout, total = tokens.layout, tokens.timestamps.shape[0]
    sequence, place = sequences_and_positions(layout.offsets, total)
    if from_end:
        return tokens.of_local((layout.lengths - 1)[sequence] - place)
    return tokens.of_local(torch.minimum(place, layout.history[sequence]))


class PositionEncoder(nn.Module):
    """x * sqrt(D) + P[p], and optionally + A[bucket(seconds)], then dropout.

    Without ``scale_inputs`` x stays as it is, and P starts with ``std``, as embeddings do. Seconds are those before the
    request, the latest event of the sample (``"age"``), or since the event before (``"gap"``; for candidates, the last
    one of the history). With ``num_positions`` = 0 there is no P, for backbones that know positions themselves; with
    ``num_time_buckets`` = 0 no A. ``positions_from_end`` is for sequences without candidates whose last token is asked
    for, as padding on the left has it.
    Following "Actions Speak Louder than Words" (https://arxiv.org/abs/2402.17152) and its production form.
    """

    def __init__(
        self,
        hidden_size: int,
        num_positions: int,
        *,
        scale_inputs: bool = True,
        std: float = 0.02,
        positions_from_end: bool = False,
        num_time_buckets: int = 0,
        time_bucket_fn: Literal["sqrt", "log"] = "sqrt",
        time_bucket_of: Literal["age", "gap"] = "age",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale = math.sqrt(hidden_size) if scale_inputs else 1.0
        self.positions_from_end = positions_from_end
        self.position: nn.Parameter | None = None
        if num_positions:
            self.position = nn.Parameter(torch.empty(num_positions, hidden_size))
            std = 1 / self.scale if scale_inputs else std
            nn.init.trunc_normal_(self.position, std=std, a=-2 * std, b=2 * std)
        self.time: nn.Parameter | None = None
        if num_time_buckets:
            self.time = nn.Parameter(torch.zeros(num_time_buckets + 1, hidden_size))
        self.time_bucket_fn, self.time_bucket_of = time_bucket_fn, time_bucket_of
        self.dropout = Dropout(dropout)

    def forward(self, tokens: Tokens) -> Tokens:
        """Return the stream with encoded values."""
        values = tokens.values * self.scale
        if self.position is not None:
            values = values + self.position[token_positions(tokens, from_end=self.positions_from_end)]
        if self.time is not None:
            values = values + self.time[self.time_buckets(tokens)]
        return tokens.with_values(self.dropout(values))

    def time_buckets(self, tokens: Tokens) -> Tensor:
        """Return [t] int64, the row of the time table of each local token."""
        assert self.time is not None
        seconds = (_ages(tokens) if self.time_bucket_of == "age" else _gaps(tokens)).double()
        buckets = seconds.sqrt() if self.time_bucket_fn == "sqrt" else seconds.log1p()
        return tokens.of_local(buckets.long().clamp(max=self.time.shape[0] - 1))


def _ages(tokens: Stream) -> Tensor:
    """Return the seconds of each token before the latest event of its sample, [T] int64."""
    sequence = sequence_ids(tokens.layout.offsets, tokens.timestamps.shape[0])
    # The largest, not the last: candidates may stand in any order.
    request = tokens.timestamps.new_zeros(tokens.layout.num_samples)
    request = request.scatter_reduce(0, sequence, tokens.timestamps, "amax", include_self=False)
    return request[sequence] - tokens.timestamps


def _gaps(tokens: Stream) -> Tensor:
    """Return the seconds since the event before that of each token, [T] int64; 0 for the first and before it.

    What comes before a candidate is the last event of the history.
    """
    layout, rows, total = tokens.layout, tokens.event_rows, tokens.timestamps.shape[0]
    if rows.numel() == 0:
        return tokens.timestamps.new_zeros(total)
    first, sequence = torch.searchsorted(rows, layout.offsets), sequence_ids(layout.offsets, total)
    sample, token = sequence[rows], torch.arange(total, device=rows.device)
    events = first.diff() - (layout.lengths - layout.history)  # of the history
    place = torch.minimum(torch.arange(rows.numel(), device=rows.device) - first[:-1][sample], events[sample])
    times = tokens.timestamps[rows]
    before = times[(first[:-1][sample] + place - 1).clamp(min=0)]
    gaps = torch.where(place > 0, times - before, 0).clamp(min=0)
    event = torch.searchsorted(rows, token, right=True) - 1
    return gaps[event.clamp(min=0)].masked_fill(event < first[:-1][sequence], 0)  # context, and memory of nothing
