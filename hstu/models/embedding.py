"""Embedding tables of a model: sized by the schema, initialised row by row so that no rank count matters."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from hstu.data.batch import POOL, keyed_features
from hstu.models.negatives import random_uniform

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from hstu.data.reader import SequenceDataset

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


def category_feature(source: str, category: str) -> str:
    """Return what ``category`` of the items of ``source``, the item feature or ``POOL``, is looked up as."""
    return f"{source}:{category}"


class ItemCategories(nn.Module):
    """Embeds items by their categories, alone or beside a row of their own.

    The categorical embedding in the public code of "Actions Speak Louder than Words"
    (https://arxiv.org/abs/2402.17152), over any number of categories: an item is the sum of the rows of its categories.

    Args:
        item: Item feature.
        unknown: Category feature -> the id of its unknown value.
        num_items: Size of the catalogue.
        unknown_rate: Share of the items whose value of a category is the unknown one in a step of training.
        seed: Of that draw.
    """

    def __init__(self, item: str, unknown: dict[str, int], num_items: int, unknown_rate: float, seed: int) -> None:
        super().__init__()
        self.item, self.names, self.unknown_rate, self.seed = item, tuple(unknown), unknown_rate, seed
        self.ids: Tensor
        self.unknown: Tensor
        self.register_buffer("ids", torch.full((len(unknown), num_items), -1, dtype=torch.int32), persistent=False)
        self.register_buffer("unknown", torch.tensor([*unknown.values()])[:, None], persistent=False)

    def read(self, dataset: SequenceDataset, met: dict[str, np.ndarray] | None = None) -> None:
        """Take the categories of the items of ``dataset``.

        Args:
            dataset: The data set.
            met: Category -> which of its ids training meets, [vocab_size + 1] bool; others become the unknown value.
        """
        for ids, name, unknown in zip(self.ids, self.names, self.unknown, strict=True):
            ids.copy_(torch.tensor(dataset.category_ids(name)))
            if met is not None:
                ids[~torch.from_numpy(met[name]).to(ids.device)[ids.long()]] = int(unknown)

    def ids_of(self, items: Tensor, step: int) -> Tensor:
        """Return the ids of ``items`` [n], some of them lost in training: [names, n] int64.

        What is lost is a function of seed, step and item: the same wherever the item stands, on every rank.
        """
        ids = self.ids[:, items].long()
        if not self.training or self.unknown_rate == 0:
            return ids
        keys = (items + step * self.ids.shape[1]) * len(self.names) + torch.arange(len(ids), device=ids.device)[:, None]
        drawn = random_uniform(keys.flatten(), 1, self.seed + 3 * 2**40).view_as(ids)
        return torch.where(drawn < self.unknown_rate, self.unknown, ids)

    def beside(self, features: KeyedJaggedTensor, step: int) -> KeyedJaggedTensor:
        """Return ``features`` and the categories of their items in a step of training, or after it."""
        names, sizes = [*features.keys()], [*features.length_per_key()]
        values, lengths = [features.values()], [features.lengths().view(len(names), -1)]
        for source, size in zip(features.keys(), features.length_per_key(), strict=True):
            if source in (self.item, POOL):
                names += [category_feature(source, name) for name in self.names]
                values.append(self.ids_of(features[source].values(), step).flatten())
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
