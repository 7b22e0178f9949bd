"""From hidden states of all tokens to the rows that carry a label, normalised."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from hstu.layers.tokens import Stream


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

    def rows(self, stream: Stream, events: Tensor) -> Tensor:
        """Return where among the local rows the hidden states of ``events`` [L] are, [L] int64; -1: on another rank."""
        rows = stream.event_rows[events]
        if self.last_token:
            rows = rows + stream.tokens_per_event - 1
            rows = rows if stream.memory_after is None else rows + stream.memory_after[events]
        return stream.places(rows)

    def forward(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Return ``rows`` [L] of the local hidden states [t, D], normalised: [L, D] float32."""
        selected = hidden[rows].float()
        if self.layer_norm is not None:
            return self.layer_norm(selected)
        return l2_normalize(selected, self.eps) if self.norm == "l2" else selected


def l2_normalize(x: Tensor, eps: float) -> Tensor:
    """Scale the last dimension to length one: x / max(|x|, eps)."""
    if torch.compiler.is_exporting():
        return F.normalize(x, dim=-1, eps=eps)
    units: Tensor = _Normalize.apply(x, eps)
    return units


class _Normalize(torch.autograd.Function):
    """``F.normalize``, whose backward pass is that of a dozen operators."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_(min=eps)
        units = x / length
        ctx.save_for_backward(units, length)
        ctx.eps = eps
        return units

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        units, length = ctx.saved_tensors
        # A row of eps and less is divided by a constant.
        along = torch.linalg.vecdot(grad, units)[..., None] * (length > ctx.eps)
        return torch.addcmul(grad, units, along, value=-1).div_(length), None
