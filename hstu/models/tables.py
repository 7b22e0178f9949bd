"""The embedding tables of a model: one for each vocabulary that it reads, shared by the features that have it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hstu.config import Config, ConfigError
from hstu.data.batch import POOL
from hstu.data.schema import Feature, Schema
from hstu.models.binding import Inputs, model_inputs
from hstu.models.embedding import Table
from hstu.models.features import part_widths, table_of
from hstu.models.item_encoder import item_feature


@dataclass(frozen=True, kw_only=True)
class _Reader:
    """A feature that reads a table, as what it looks its ids up, and the width that suits it."""

    feature: Feature
    table: str
    keys: tuple[str, ...]
    width: int
    unknown: bool


def make_tables(config: Config, schema: Schema) -> tuple[Table, ...]:
    """Return the tables that the model looks up in, named as the vocabularies and sized by the schema.

    Features that share one are looked up in it at once. It is as wide as FeatureArgs.widths says, or as the feature
    that wants it widest.

    Raises:
        ConfigError: for a table that does not exist or is to have two widths.
    """
    readers: dict[str, list[_Reader]] = {}
    for reader in _readers(config, schema, model_inputs(config, schema)):
        readers.setdefault(reader.table, []).append(reader)
    _check_names(config, tuple(readers))
    _check_dynamic(config, schema.item.name)
    return tuple(
        Table(
            name=name,
            rows=config.dynamic_embedding.capacity.get(name, _num_rows(own)),
            width=_width(name, own, config),
            features=tuple(key for reader in own for key in reader.keys),
            std=config.network.embedding_initializer_std,
            seed=config.trainer.seed,
            unknown=any(reader.unknown for reader in own),
        )
        for name, own in readers.items()
    )


def _readers(config: Config, schema: Schema, inputs: Inputs) -> Iterator[_Reader]:
    """Yield what reads tables: items and their features, actions, users' features, events' features."""
    network, declared, args = config.network, inputs.declared, config.feature
    sources = (inputs.item, POOL) if config.task == "retrieval" else (inputs.item,)
    item, action = network.item_embedding_dim, network.action_embedding_dim

    def of_features(features: tuple[Feature, ...], added_to: int | None) -> Iterator[_Reader]:
        widths = part_widths(features, config, schema, added_to)
        for feature in features:
            if feature.kind not in ("categorical", "multi"):
                continue
            keys: tuple[str, ...] = (feature.name,)
            if feature.level == "item":
                keys = tuple(item_feature(source, feature.name) for source in sources)
            # An event may lack a value, or it is not known yet; a set is then empty.
            may_lack = args.unknown_rate > 0 or feature.level == "event"
            yield _Reader(
                feature=feature,
                table=table_of(feature, args, schema),
                keys=keys,
                width=widths[feature.name],
                unknown=feature.kind == "categorical" and may_lack,
            )

    if inputs.items_have_rows:
        yield _Reader(feature=schema.item, table=schema.item.name, keys=sources, width=item, unknown=False)
    yield from of_features(declared.items, item if args.item_merge == "sum" else None)
    if inputs.action is not None and schema.action is not None:
        keys, unknown = (inputs.action,), args.unknown_rate > 0
        yield _Reader(feature=schema.action, table=inputs.action, keys=keys, width=action, unknown=unknown)
    yield from of_features(declared.users, network.contextual_embedding_dim if args.context_merge == "tokens" else None)
    yield from of_features(declared.events, item if args.merge == "sum" else None)
    yield from of_features(declared.outcomes, action if args.merge == "sum" else None)


def _num_rows(readers: list[_Reader]) -> int:
    return (readers[0].feature.vocab_size or 0) + any(reader.unknown for reader in readers)


def _width(table: str, readers: list[_Reader], config: Config) -> int:
    args = config.feature
    names = dict.fromkeys([table, *(reader.feature.name for reader in readers)])
    given = {name: args.widths[name] for name in names if name in args.widths}
    if len(set(given.values())) > 1:
        raise args.error("widths", f"{', '.join(map(repr, given))} are of one table, {table!r}, which has one width")
    return next(iter(given.values()), max(reader.width for reader in readers))


def _check_names(config: Config, tables: tuple[str, ...]) -> None:
    """Raise ``ConfigError`` for a table that is named and does not exist."""
    named = {f"EmbeddingArgs.{f}": getattr(config.embedding, f) for f in ("table_sharding_types", "uvm_caching_tables")}
    named["DynamicEmbeddingArgs.capacity"] = config.dynamic_embedding.capacity
    for field, table in ((field, table) for field, own in named.items() for table in own):
        if table not in tables:
            raise ConfigError(field, f": no table {table!r}; tables: {', '.join(tables)}")


def _check_dynamic(config: Config, item: str) -> None:
    """Raise ``ConfigError`` where negatives would be drawn from items of which most have no row."""
    args, retrieval = config.dynamic_embedding, config.retrieval
    if item in args.capacity and config.item_text.use == "start":
        raise args.error("capacity", f"table {item!r}: rows begin when an item is met and cannot start from texts; "
                         "use ItemTextArgs.use = 'vector'")  # fmt: skip
    if item in args.capacity and retrieval and retrieval.loss == "bce":
        raise args.error("capacity", f"table {item!r}: bce draws its negatives from all items, of which those not met "
                         "yet have no row; use RetrievalArgs.loss = 'sampled_softmax'")  # fmt: skip
    if item in args.capacity and retrieval and retrieval.negatives not in ("in_batch", "uniform"):
        raise args.error("capacity", f"table {item!r}: items not met yet have no row and are no negatives; use "
                         "another RetrievalArgs.loss than full_softmax, with sampling_strategy = 'in_batch' or "
                         "'uniform'")  # fmt: skip
