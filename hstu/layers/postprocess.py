"""From hidden states of all tokens to the rows that carry a label, normalised."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from hstu.layers.tokens import Stream, Tokens


class Postprocess(nn.Module):
    """Selects rows and normalises them.

    Args:
        hidden_size: D.
        norm: ``"l2"``, ``"layer_norm"`` or ``"none"``.
        eps: Of the norm.
        last_token: Take the last row before the next event (memory where a block stands between, else the event's
            action, when interleaved) rather than its item.
    """

    def __init__(
        self, hidden_size: int, norm: Literal["l2", "layer_norm", "none"], eps: float, *, last_token: bool
    ) -> None:
        super().__init__()
        self.norm, self.eps, self.last_token = norm, eps, last_token
        self.layer_norm = nn.LayerNorm(hidden_size, eps) if norm == "layer_norm" else None

    def rows(self, stream: Stream, label_mask: Tensor) -> Tensor:
        """Return the row of the stream whose hidden state stands for each labelled event, [L] int64."""
        rows = stream.event_rows[label_mask]
        if not self.last_token:
            return rows
        last = rows + stream.tokens_per_event - 1
        return last if stream.memory_after is None else last + stream.memory_after[label_mask]

    def forward(self, hidden: Tensor, tokens: Tokens, label_mask: Tensor) -> Tensor:
        """Return [L, D]: the rows of the events where ``label_mask`` [E] is true, as far as they are local."""
        places = tokens.places(self.rows(tokens, label_mask))
        selected = hidden[places if tokens.local is None else places[places >= 0]].float()
        if self.layer_norm is not None:
            return self.layer_norm(selected)
        return l2_normalize(selected, self.eps) if self.norm == "l2" else selected


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to length one: x / max(|x|, eps)."""
    return F.normalize(x, dim=-1, eps=eps)
