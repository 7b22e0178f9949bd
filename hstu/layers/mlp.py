"""Multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class MLP(nn.Module):
    """Linear layers of the given widths with an activation between them, none after the last."""

    def __init__(self, in_features: int, widths: Sequence[int], *, activation: str = "relu", bias: bool = True) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Linear(in_features, width, bias=bias), _ACTIVATIONS[activation]()]
            in_features = width
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in_features] to [..., widths[-1]]."""
        out: Tensor = self.layers(x)
        return out


def initialize(module: nn.Module, kind: str, std: float) -> None:
    """Set every linear weight below ``module``: ``"normal"`` with ``std``, or ``"xavier_uniform"``; biases to 0.

    A layer with an ``init_scale`` starts that much smaller.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            if kind == "normal":
                torch.nn.init.normal_(layer.weight, std=std)
            else:
                torch.nn.init.xavier_uniform_(layer.weight)
            with torch.no_grad():
                layer.weight.mul_(getattr(layer, "init_scale", 1.0))
            if layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
