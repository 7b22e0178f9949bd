"""Features to vectors: an encoder for each kind, and one merge. A missing number is NaN, a missing set is empty."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import reduce
from operator import add
from typing import Literal

import torch
from torch import Tensor, nn

from hstu.layers.dropout import Dropout
from hstu.layers.mlp import MLP
from hstu.ops import lengths_to_offsets, sequence_ids

Pooling = Literal["mean", "sum"]
Merging = Literal["concat", "sum", "multiply"]


class ByFeature(nn.Module):
    """Modules of some features, whose names may have dots or be those of methods."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self._keys = {name: "of_" + name.replace(".", "/") for name in modules}
        for name, module in modules.items():
            self.add_module(self._keys[name], module)

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __contains__(self, feature: str) -> bool:
        return feature in self._keys

    def __getitem__(self, feature: str) -> nn.Module:
        return self.get_submodule(self._keys[feature])

    def forward(self, feature: str, x: Tensor) -> Tensor:
        """Return ``x`` through the module of ``feature``, if it has one."""
        out: Tensor = self[feature](x) if feature in self else x
        return out


def pool_sets(rows: Tensor, lengths: Tensor, pooling: Pooling) -> Tensor:
    """Return the mean or the sum of the rows of each set, [n, w]; of an empty one, zeros.

    Args:
        rows: [m, w], set after set.
        lengths: Rows of each set, [n] int64, m in all.
        pooling: Which of the two.
    """
    owner = sequence_ids(lengths_to_offsets(lengths), rows.shape[0])
    total = rows.new_zeros(lengths.shape[0], rows.shape[1]).index_add(0, owner, rows)
    return total / lengths.clamp(min=1)[:, None].to(rows.dtype) if pooling == "mean" else total


class Standardize(nn.Module):
    """(x - mean) / std, or x - mean where all values are one."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std if std > 0 else 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Map numbers to numbers."""
        return (x - self.mean) / self.std


class QuantileNormalize(nn.Module):
    """Where a number stands among those of the data: even from -sqrt(3) to sqrt(3), of mean 0 and deviation 1.

    Between two of the quantiles by interpolation; a value that many events have takes the middle of its places.

    Args:
        quantiles: Ascending, evenly spaced from the least to the largest value.
    """

    def __init__(self, quantiles: tuple[float, ...]) -> None:
        super().__init__()
        self.knots: Tensor
        self.register_buffer("knots", torch.tensor(quantiles), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map numbers to numbers."""
        knots = self.knots.to(x.dtype)
        below, above = _places(x, knots), 1 - _places(-x, -knots.flip(0))
        return (below + above - 1) * math.sqrt(3)


def _places(x: Tensor, knots: Tensor) -> Tensor:
    """Return the place of each number among evenly spaced quantiles, in [0, 1]; of equal ones, the last."""
    right = torch.searchsorted(knots, x.detach().contiguous(), right=True).clamp(1, knots.numel() - 1)
    low, high = knots[right - 1], knots[right]
    part = ((x - low) / (high - low).clamp(min=torch.finfo(x.dtype).tiny)).clamp(0, 1)
    part = torch.where(x >= high, torch.ones_like(part), part)  # behind the last one, also where it is repeated
    return (right - 1 + part) / (knots.numel() - 1)


class NumberEncoder(nn.Module):
    """Numbers, or vectors of them, to vectors; a row with a missing number takes a learned vector.

    ``"raw"``: the number and a flag (of a missing one 0 and 1). ``"linear"``: through a matrix. ``"soft_one_hot"``:
    softmax(x W + b) over bins, times a row of each bin.

    Args:
        kind: Which of them.
        width: Of the result; of raw always 2.
        in_features: Numbers in a row; linear takes any, the others one.
        scaling: What is done to the numbers first; None: nothing.
        bins: Of soft_one_hot.
        std: Of the initial weights that meet the stream, as of embeddings.
    """

    def __init__(
        self,
        kind: Literal["raw", "linear", "soft_one_hot"],
        width: int,
        *,
        in_features: int = 1,
        scaling: nn.Module | None = None,
        bins: int = 16,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        assert kind == "linear" or in_features == 1
        self.width = 2 if kind == "raw" else width
        self.scaling = scaling
        self.weight: nn.Parameter | None = None
        self.bins: nn.Linear | None = None
        if kind == "soft_one_hot":
            self.bins = nn.Linear(1, bins)
            nn.init.normal_(self.bins.weight)
            nn.init.normal_(self.bins.bias)
        if kind != "raw":
            self.weight = nn.Parameter(torch.empty(bins if kind == "soft_one_hot" else in_features, width))
            self.missing = nn.Parameter(torch.empty(width))
            for weight in (self.weight, self.missing):
                nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)

    def forward(self, numbers: Tensor) -> Tensor:
        """Map [n, in_features] to [n, width]."""
        missing = numbers.isnan().any(-1, keepdim=True)
        x = numbers.masked_fill(missing, 0.0)
        x = (x if self.scaling is None else self.scaling(x)).masked_fill(missing, 0.0)
        if self.weight is None:
            return torch.cat([x, missing.to(x.dtype)], -1)
        x = x if self.bins is None else self.bins(x).softmax(-1)
        return torch.where(missing, self.missing, x @ self.weight)


class FeatureMerge(nn.Module):
    """Joins the parts of an item, an event or a user into one vector.

    ``"concat"``: side by side, dropout, then a matrix, or two with SiLU between them. ``"sum"``: added up, and
    ``"multiply"``: base * (1 + sum of the others), then dropout; a part of another width goes through a matrix first.

    Args:
        kind: Which of them.
        widths: Of the parts.
        width: Of the result.
        base: The part that the others scale (multiply).
        hidden: Width between the two matrices of concat; None: there is one.
        norm: Parts that a layer norm comes first for; one of width 1, which would become a constant, goes without.
        dropout: Probability.
    """

    def __init__(
        self,
        kind: Merging,
        widths: Mapping[str, int],
        width: int,
        *,
        base: str | None = None,
        hidden: int | None = None,
        norm: tuple[str, ...] = (),
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        assert kind != "multiply" or base in widths
        self.kind, self.names, self.base = kind, tuple(widths), base
        self.norms = ByFeature({n: nn.LayerNorm(w) for n, w in widths.items() if n in norm and w > 1})
        self.dropout = Dropout(dropout)
        others = {} if kind == "concat" else {n: nn.Linear(w, width) for n, w in widths.items() if w != width}
        self.projections = ByFeature(others)
        if kind == "concat":
            self.joined: nn.Module = MLP(
                sum(widths.values()), (hidden or width, width)[not hidden :], activation="silu"
            )
        for layer in (layer for layer in self.modules() if isinstance(layer, nn.Linear)):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Map [n, width] of each part to [n, width]."""
        own = {name: self.norms(name, parts[name]) for name in self.names}
        if self.kind == "concat":
            joined: Tensor = self.joined(self.dropout(torch.cat([*own.values()], -1)))
            return joined
        own = {name: self.projections(name, x) for name, x in own.items()}
        if self.kind == "multiply" and self.base is not None:
            base = own.pop(self.base)
            merged = base * reduce(add, own.values(), torch.ones_like(base))
        else:
            merged = reduce(add, own.values())
        dropped: Tensor = self.dropout(merged)
        return dropped
