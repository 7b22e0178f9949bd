"""Embedding tables of a model: sized by the schema, initialised row by row so that no rank count matters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hstu.data.batch import POOL, keyed_features

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from hstu.data.reader import SequenceDataset

_BLOCK = 4096  # rows drawn from one random stream


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table: ``rows`` x ``width``, shared by ``features``."""

    name: str
    rows: int
    width: int
    features: tuple[str, ...]
    std: float
    seed: int

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


def category_feature(source: str, category: str) -> str:
    """Return what ``category`` of the items of ``source``, the item feature or ``POOL``, is looked up as."""
    return f"{source}:{category}"


class ItemCategories(nn.Module):
    """Embeds items by their categories, alone or beside a row of their own.

    The categorical embedding in the public code of "Actions Speak Louder than Words"
    (https://arxiv.org/abs/2402.17152), over any number of categories: an item is the sum of the rows of its categories.

    Args:
        item: Item feature.
        names: Category features.
        num_items: Size of the catalogue.
    """

    def __init__(self, item: str, names: tuple[str, ...], num_items: int) -> None:
        super().__init__()
        self.item, self.names = item, names
        self.ids: Tensor
        self.register_buffer("ids", torch.full((len(names), num_items), -1, dtype=torch.int32), persistent=False)

    def read(self, dataset: SequenceDataset) -> None:
        """Take the categories of the items of ``dataset``."""
        for ids, name in zip(self.ids, self.names, strict=True):
            ids.copy_(torch.from_numpy(dataset.category_ids(name)))

    def beside(self, features: KeyedJaggedTensor) -> KeyedJaggedTensor:
        """Return ``features`` and the categories of their items."""
        names, sizes = [*features.keys()], [*features.length_per_key()]
        values, lengths = [features.values()], [features.lengths().view(len(names), -1)]
        for source, size in zip(features.keys(), features.length_per_key(), strict=True):
            if source in (self.item, POOL):
                names += [category_feature(source, name) for name in self.names]
                values.append(self.ids[:, features[source].values()].long().flatten())
                lengths += [features[source].lengths()[None]] * len(self.names)
                sizes += [size] * len(self.names)
        return keyed_features(names, torch.cat(values), torch.cat(lengths), sizes)

    def merged(self, embedded: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return ``embedded``, the rows of categories added to those of their items."""
        out = dict(embedded)
        for source in (self.item, POOL):
            for name in self.names:
                if (key := category_feature(source, name)) in out:
                    rows = out.pop(key)
                    out[source] = out[source] + rows if source in out else rows
        return out
