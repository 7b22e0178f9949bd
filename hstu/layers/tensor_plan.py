"""How a layer may be spread over tensor ranks: each layer declares it, ``parallel/tensor.py`` carries it out.

A layer that takes part has ``tensor_plan() -> TensorPlan``, from the names of its modules and parameters.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Columns:
    """A linear layer of whose outputs each rank computes an equal part of each of ``parts`` (widths)."""

    parts: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """A linear layer of whose inputs each rank has an equal part of each of ``parts``; outputs are summed."""

    parts: tuple[int, ...]


@dataclass(frozen=True)
class Heads:
    """A norm or dropout over channels of which each rank has an equal part of each of ``parts``."""

    parts: tuple[int, ...]


@dataclass(frozen=True)
class OfAllHeads:
    """A parameter that the heads of every rank use: its gradients are summed."""


@dataclass(frozen=True)
class PerToken:
    """A norm or dropout outside the heads: with sequence parallelism each rank applies it to a part of the tokens."""


TensorPlan = dict[str, Columns | Rows | Heads | OfAllHeads | PerToken]


def split_parts(x: Tensor, parts: list[int]) -> tuple[Tensor, ...]:
    """Split the last dimension of ``x`` into ``parts``, or into this rank's part of each."""
    return x.split([part * x.shape[-1] // sum(parts) for part in parts], dim=-1)
