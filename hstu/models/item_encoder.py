"""Items as one vector each, from a row of their own, their features and their text, wherever an item stands."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from hstu.config import Config, ConfigError, FeatureArgs
from hstu.data.batch import POOL, keyed_features
from hstu.data.schema import Schema, unknown_id
from hstu.data.values import only
from hstu.layers.feature_encoders import FeatureMerge
from hstu.models.binding import Inputs
from hstu.models.features import FeatureEncoders, make_merge, part_widths
from hstu.models.item_text import ItemText, make_item_text
from hstu.models.negatives import random_columns, random_uniform
from hstu.ops import lengths_to_offsets, sequences_and_positions

if TYPE_CHECKING:
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    from hstu.data.reader import SequenceDataset

_UNKNOWN, _SWAPPED, _SOURCE = (purpose * 2**40 for purpose in (3, 4, 5))  # beside the seeds of other draws


TEXT = "__text__"
"""The part of an item that is made of its text."""


def item_feature(source: str, name: str) -> str:
    """Return what feature ``name`` of the items of ``source``, the item feature or ``POOL``, is looked up as."""
    return f"{source}:{name}"


class ItemEncoder(nn.Module):
    """Embeds items by their features and texts, alone or beside a row of their own.

    In history, among candidates, in pools of negatives and in the catalogue alike, so that an item without a trained
    row is ranked by its features. With categories that are added up this is the categorical embedding in the public
    code of "Actions Speak Louder than Words" (https://arxiv.org/abs/2402.17152), over any number of categories.

    Args:
        item: Item feature.
        num_items: Size of the catalogue.
        encoders: Of the features.
        merge: Of their vectors, and of the row and the text if there are any.
        args: Rates of what training loses and swaps.
        seed: Of these draws.
        has_row: Whether items have rows of their own.
        text: What reads the texts; None: items have none.
    """

    def __init__(
        self,
        item: str,
        num_items: int,
        encoders: FeatureEncoders,
        merge: FeatureMerge,
        args: FeatureArgs,
        seed: int,
        *,
        has_row: bool,
        text: ItemText | None = None,
    ) -> None:
        super().__init__()
        self.item, self.num_items, self.seed, self.has_row = item, num_items, seed, has_row
        self.text = text
        self.encoders, self.merge, self.unknown_rate, self.swap_rate = (
            encoders,
            merge,
            args.unknown_rate,
            args.swap_rate,
        )
        self.categories = tuple(f for f in encoders.features if f.kind == "categorical")
        self.sets = tuple(f for f in encoders.features if f.kind == "multi")
        self.numbers = tuple(f for f in encoders.features if f.kind in ("numeric", "vector"))
        unknown = torch.tensor([f.vocab_size or 0 for f in self.categories], dtype=torch.int64)
        self.ids: Tensor
        self.unknown: Tensor
        self._keep("ids", torch.full((len(self.categories), num_items), -1, dtype=torch.int32))
        self._keep("unknown", unknown[:, None])
        for place, feature in enumerate(self.sets):
            self._keep(f"set_offsets_{place}", torch.zeros(num_items + 1, dtype=torch.int64))
            self._keep(f"set_ids_{place}", torch.zeros(feature.num_ids or 0, dtype=torch.int64))
        for place, feature in enumerate(self.numbers):
            self._keep(f"numbers_{place}", torch.full((num_items, feature.width or 1), torch.nan))

    def _keep(self, name: str, values: Tensor) -> None:
        self.register_buffer(name, values, persistent=False)

    def read(self, dataset: SequenceDataset, met: Mapping[str, np.ndarray] | None = None) -> None:
        """Take the features and the texts of the items of ``dataset``, the former as :meth:`read_features` does.

        Raises:
            ConfigError: for items without a value where none is known as unknown, and texts that cannot be read.
        """
        if self.text is not None:
            self.text.read(dataset)
        self.read_features(dataset, met or {})

    def read_features(self, dataset: SequenceDataset, met: Mapping[str, np.ndarray]) -> None:
        """Take the features of the items of ``dataset``.

        Args:
            dataset: The data set.
            met: Feature -> which of its ids training meets, [vocab_size + 1] bool; others become the unknown value, or
                leave their sets. Of features that are left out, all are met.

        Raises:
            ConfigError: for items without a value where none is known as unknown.
        """
        for ids, feature, unknown in zip(self.ids, self.categories, self.unknown, strict=True):
            ids.copy_(torch.tensor(np.asarray(dataset.item_features(feature.name))))
            if self.unknown_rate == 0 and bool((ids == unknown).any()):
                raise ConfigError("FeatureArgs.unknown_rate", f"= 0.0: items lack a value of {feature.name!r}, which "
                                  "needs the row for unknown ones; use more than 0")  # fmt: skip
            if feature.name in met:
                ids[~torch.from_numpy(met[feature.name]).to(ids.device)[ids.long()]] = int(unknown)
        for place, feature in enumerate(self.sets):
            sets = dataset.item_features(feature.name)
            if feature.name in met:
                sets = only(sets, met[feature.name], unknown_id(dataset.schema, feature.name))
            offsets, members = sets
            getattr(self, f"set_offsets_{place}").copy_(torch.tensor(offsets))
            getattr(self, f"set_ids_{place}")[: len(members)] = torch.tensor(members)
        for place, feature in enumerate(self.numbers):
            getattr(self, f"numbers_{place}").copy_(torch.tensor(np.asarray(dataset.item_features(feature.name))))

    def ids_of(self, items: Tensor, step: int) -> Tensor:
        """Return the ids of ``items`` [n], some of them lost or swapped in training: [categories, n] int64.

        What is lost is a function of seed, step and item: the same wherever the item stands, on every rank.
        """
        ids = self.ids[:, items].long()
        if not self.training or self.unknown_rate == self.swap_rate == 0:
            return ids
        keys = (items + step * self.num_items) * len(self.categories)
        keys = (keys + torch.arange(len(ids), device=ids.device)[:, None]).flatten()
        if self.swap_rate:
            swapped = random_uniform(keys, 1, self.seed + _SWAPPED).view_as(ids) < self.swap_rate
            source = random_columns(keys, 1, self.num_items, self.seed + _SOURCE).view_as(ids)
            ids = torch.where(swapped, self.ids.gather(1, source).long(), ids)
        drawn = random_uniform(keys, 1, self.seed + _UNKNOWN).view_as(ids)
        return torch.where(drawn < self.unknown_rate, self.unknown, ids)

    def beside(self, features: KeyedJaggedTensor, step: int) -> KeyedJaggedTensor:
        """Return ``features`` and what the features of their items look up in a step of training, or after it."""
        names, sizes = [*features.keys()], [*features.length_per_key()]
        values, lengths = [features.values()], [features.lengths().view(len(names), -1)]
        for source in self._sources(features):
            items, each = features[source].values(), features[source].lengths()
            if self.categories:
                names += [item_feature(source, feature.name) for feature in self.categories]
                values.append(self.ids_of(items, step).flatten())
                lengths += [each[None]] * len(self.categories)
                sizes += [items.numel()] * len(self.categories)
            for place, feature in enumerate(self.sets):
                members, own = self._members(place, items)
                ends = torch.cat([own.new_zeros(1), own.cumsum(0)])[each.cumsum(0)]
                names.append(item_feature(source, feature.name))
                values.append(members)
                lengths.append(ends.diff(prepend=ends.new_zeros(1))[None])
                sizes.append(members.numel())
        return keyed_features(names, torch.cat(values), torch.cat(lengths), sizes)

    def _sources(self, features: KeyedJaggedTensor) -> list[str]:
        return [source for source in features.keys() if source in (self.item, POOL)]  # noqa: SIM118

    def _members(self, place: int, items: Tensor) -> tuple[Tensor, Tensor]:
        """Return the ids in the sets of ``items`` [n], set after set, and how many each has, [n] int64."""
        offsets, members = getattr(self, f"set_offsets_{place}"), getattr(self, f"set_ids_{place}")
        lengths = offsets[items + 1] - offsets[items]
        own = lengths_to_offsets(lengths)
        total = int(own[-1])  # which only the device knows
        owner, position = sequences_and_positions(own, total)
        return members[offsets[items][owner] + position], lengths

    def merged(self, found: Mapping[str, Tensor], features: KeyedJaggedTensor) -> dict[str, Tensor]:
        """Return the rows ``found`` of ``features``, from :meth:`beside`, items as the one vector of each.

        Args:
            found: [n, width] of each key.
            features: What was looked up.
        """
        out, sources = dict(found), self._sources(features)
        of_texts: dict[str, Tensor] = {}
        if self.text is not None:  # of all sources at once, so that no item is read twice
            every = [features[source].values() for source in sources]
            parts_of = self.text(torch.cat(every)).split([ids.numel() for ids in every])
            of_texts = dict(zip(sources, parts_of, strict=True))
        for source in sources:
            items = features[source].values()
            rows = {f.name: out.pop(item_feature(source, f.name)) for f in (*self.categories, *self.sets)}
            lengths = {
                feature.name: getattr(self, f"set_offsets_{place}")[items + 1]
                - getattr(self, f"set_offsets_{place}")[items]
                for place, feature in enumerate(self.sets)
            }
            numbers = {f.name: getattr(self, f"numbers_{place}")[items] for place, f in enumerate(self.numbers)}
            parts = self.encoders(rows, lengths, numbers)
            if source in of_texts:
                parts[TEXT] = of_texts[source]
            out[source] = self.merge({self.item: out[source], **parts} if self.has_row else parts)
        return out


def make_item_encoder(config: Config, schema: Schema, inputs: Inputs, widths: Mapping[str, int]) -> ItemEncoder | None:
    """Return what makes one vector of an item; None where that is its row alone.

    Args:
        config: The run.
        schema: The data set.
        inputs: What the model reads.
        widths: Of the rows of each key that is looked up.

    Raises:
        ConfigError: for features that are to scale a row that items do not have.
    """
    args, width, features = config.feature, config.network.item_embedding_dim, inputs.declared.items
    text = make_item_text(config, schema) if config.item_text.is_vector else None
    if not features and text is None:
        return None
    if args.item_merge == "multiply" and not inputs.items_have_rows:
        raise args.error(
            "item_merge", "scales rows that items have of their own; use NetworkArgs.item_embedding = 'both'"
        )
    own = part_widths(features, config, schema, width if args.item_merge == "sum" else None)
    own = {name: widths.get(item_feature(inputs.item, name), of_rule) for name, of_rule in own.items()}
    encoders = FeatureEncoders(features, own, args, config.network.embedding_initializer_std)
    base = (inputs.item, width) if inputs.items_have_rows else None
    merge = make_merge(args.item_merge, encoders, base, width, args, {} if text is None else {TEXT: width})
    return ItemEncoder(
        inputs.item,
        schema.item.vocab_size or 0,
        encoders,
        merge,
        args,
        config.trainer.seed,
        has_row=inputs.items_have_rows,
        text=text,
    )
