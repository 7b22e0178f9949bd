"""Layers one after another, of which the backward pass may compute each again instead of keeping what it made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def through(layers: Iterable[nn.Module], x: Tensor, *rest: Any, recompute: bool) -> Tensor:
    """Return what ``layers`` make of ``x`` [T, D], each of the one before; [T, D].

    Args:
        layers: Called with x and ``rest``.
        x: Of the first.
        rest: Of all.
        recompute: Keep the inputs of layers alone (https://arxiv.org/abs/1604.06174). Random states are those of the
            first time, so that values and gradients are the same.
    """
    for layer in layers:
        if recompute and torch.is_grad_enabled():
            x = checkpoint(layer, x, *rest, use_reentrant=False)
        else:
            x = layer(x, *rest)
    return x
