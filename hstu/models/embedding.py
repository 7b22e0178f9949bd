"""Embedding tables of a model: sized by the schema, initialised row by row so that no rank count matters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_BLOCK = 4096  # rows drawn from one random stream
_TAKEN = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}  # attributes that no submodule or weight can be called


def table_key(table: str) -> str:
    """Return what the weight of ``table`` is called, and its module: that has no dot and is no name of a method."""
    return f"={table.replace('.', ',')}" if "." in table or table in _TAKEN else table


def table_named(weight: str) -> str:
    """Return the table whose weight is called ``weight``, ``..<key>.weight``: the reverse of ``table_key``."""
    key = weight.split(".")[-2]
    return key[1:].replace(",", ".") if key.startswith("=") else key


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: ``rows`` x ``width``, shared by ``features``; the last row may be for ``unknown`` values.

    Its rows start at random, or with the numbers of ``start`` [n, w] in their first columns, n and w at most these.
    """

    name: str
    rows: int
    width: int
    features: tuple[str, ...]
    std: float
    seed: int
    unknown: bool = False
    start: Tensor | None = field(default=None, compare=False)

    @property
    def key(self) -> str:
        """Its name among modules and weights, see :func:`table_key`."""
        return table_key(self.name)

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
        rows = torch.cat(blocks) if blocks else torch.empty(0, self.width)
        if self.start is not None:
            given = self.start[start:stop]
            rows[: given.shape[0], : given.shape[1]] = given
        return rows


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
            self.weights[table.key] = nn.Parameter(table.initial_rows(0, table.rows))

    def forward(self, features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Look up every feature: name -> [ids of the feature, width]."""
        present = set(features.keys())
        return {
            feature: nn.functional.embedding(features[feature].values(), self.weights[table.key])
            for table in self.tables
            for feature in table.features
            if feature in present
        }
