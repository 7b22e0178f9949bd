"""Embedding tables of a model: sized by the schema, initialised row by row so that no rank count matters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_BLOCK = 4096  # rows drawn from one random stream


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: ``rows`` x ``width``, shared by ``features``; the last row may be for ``unknown`` values."""

    name: str
    rows: int
    width: int
    features: tuple[str, ...]
    std: float
    seed: int
    unknown: bool = False

    def initial_rows(self, start: int, stop: int) -> Tensor:
        """Return rows [start, stop) of the initial weights, the same whoever asks: [stop - start, width] float32.

        Truncated normal within two ``std``.
        """
        blocks = []
        for block in range(start // _BLOCK, -(-stop // _BLOCK)):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{self.name}/{block}".encode()))
            first, size = block * _BLOCK, min(_BLOCK, self.rows - block * _BLOCK)
            weights = torch.empty(size, self.width)
            nn.init.trunc_normal_(weights, std=self.std, a=-2 * self.std, b=2 * self.std, generator=generator)
            blocks.append(weights[max(start - first, 0) : stop - first])
        return torch.cat(blocks) if blocks else torch.empty(0, self.width)


class Embeddings(nn.Module):
    """What every kind of tables offers: ``forward`` maps features to {name: [ids of the feature, width]}."""

    def __init__(self, tables: tuple[Table, ...]) -> None:
        super().__init__()
        self.tables = tables

    @property
    def widths(self) -> dict[str, int]:
        """Embedding width of each feature."""
        return {feature: table.width for table in self.tables for feature in table.features}


class EmbeddingTables(Embeddings):
    """Plain tables on one device. ``parallelize`` replaces them by sharded ones with the same forward."""

    def __init__(self, tables: tuple[Table, ...], *, allocate: bool = True) -> None:
        """Create the tables; with ``allocate`` false only their descriptions, to be sharded later."""
        super().__init__(tables)
        self.weights = nn.ParameterDict()
        for table in tables if allocate else ():
            self.weights[table.name] = nn.Parameter(table.initial_rows(0, table.rows))

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Look up every feature: name -> [ids of the feature, width]."""
        present = set(features.keys())
        return {
            feature: nn.functional.embedding(features[feature].values(), self.weights[table.name])
            for table in self.tables
            for feature in table.features
            if feature in present
        }
