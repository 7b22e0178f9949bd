"""Position and time encoding of the token stream."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from hstu.layers.dropout import Dropout
from hstu.layers.tokens import Stream, Tokens
from hstu.ops import positions_in_sequence, sequence_ids


def token_positions(tokens: Stream, *, from_end: bool = False) -> Tensor:
    """Return p_i = min(i, L_b - m_b) of the local rows, [t] int64: candidates stand at the place after the history.

    ``from_end`` counts the other way, L_b - 1 - i: 0 is the last token. A stream may have
    positions of its own.
    """
    if tokens.positions is not None:
        return tokens.of_local(tokens.positions)
    layout, total = tokens.layout, tokens.timestamps.shape[0]
    place, sequence = positions_in_sequence(layout.offsets, total), sequence_ids(layout.offsets, total)
    if from_end:
        return tokens.of_local((layout.lengths - 1)[sequence] - place)
    return tokens.of_local(torch.minimum(place, layout.history[sequence]))


class PositionEncoder(nn.Module):
    """x * sqrt(D) + P[p], and optionally + A[bucket(seconds before the request)], then dropout.

    Without ``scale_inputs`` x stays as it is, and P starts with ``std``, as embeddings do. The request is the latest
    event of the sample. With ``num_positions`` = 0 there is no P, for backbones that know positions themselves; with
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
        self.time_bucket_fn = time_bucket_fn
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
        sequence = sequence_ids(tokens.layout.offsets, tokens.timestamps.shape[0])
        # The largest, not the last: candidates may stand in any order.
        request = tokens.timestamps.new_zeros(tokens.layout.num_samples)
        request = request.scatter_reduce(0, sequence, tokens.timestamps, "amax", include_self=False)
        age = (request[sequence] - tokens.timestamps).double()
        buckets = age.sqrt() if self.time_bucket_fn == "sqrt" else age.log1p()
        return tokens.of_local(buckets.long().clamp(max=self.time.shape[0] - 1))
