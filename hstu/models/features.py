"""Which declared features a model reads, how wide the vector of each is, and what makes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from hstu.config import Config, ConfigError, FeatureArgs
from hstu.config.features import Merging, table_width
from hstu.data.schema import Feature, Level, Schema
from hstu.layers.feature_encoders import (
    ByFeature,
    FeatureMerge,
    NumberEncoder,
    QuantileNormalize,
    Standardize,
    pool_sets,
)
from hstu.models.custom import make_custom_encoder

_INPUTS = ("categorical", "multi", "numeric", "vector")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The declared features that a model reads.

    Attributes:
        users: Of users, in the order of their tokens.
        events: Of events, that join the item of theirs.
        outcomes: Of events, that join the action of theirs: what is known of an event only after it.
        items: Of items.
    """

    users: tuple[Feature, ...]
    events: tuple[Feature, ...]
    outcomes: tuple[Feature, ...]
    items: tuple[Feature, ...]

    @property
    def every(self) -> tuple[Feature, ...]:
        """All of them."""
        return *self.users, *self.events, *self.outcomes, *self.items


def declared_features(config: Config, schema: Schema) -> Declared:
    """Return the declared features that a model of ``config`` reads.

    Raises:
        ConfigError: for names that the data set lacks, or an item without a row and features.
    """
    args, network = config.feature, config.network
    users = _chosen(schema, "user", config.dataset.contextual_feature_names, "DatasetArgs.contextual_feature_names")
    events = _chosen(schema, "event", args.event_features, "FeatureArgs.event_features")
    items = _chosen(schema, "item", args.item_features, "FeatureArgs.item_features")
    if network.item_embedding == "local":
        items = ()
    elif network.item_embedding is not None and not items and not config.item_text.is_vector:
        raise network.error("item_embedding", f"data set {schema.name!r} has no features of items to read; give the "
                            "preprocessor an --items file, or use 'local'")  # fmt: skip
    has_action = network.token_layout != "item" and schema.action is not None
    outcomes = tuple(feature for feature in events if has_action and not feature.known_at_request)
    events = tuple(feature for feature in events if feature not in outcomes)
    found = Declared(users=users, events=events, outcomes=outcomes, items=items)
    known = {feature.name for feature in found.every}
    named = {name: [*getattr(args, name)] for name in ("widths", "number_encodings", "encoders")}
    named["shared_tables"] = [*args.shared_tables, *args.shared_tables.values()]
    known |= {feature.table for feature in found.every if feature.table} | {schema.item.name}
    for field, names in named.items():
        if unknown := sorted(set(names) - known):
            raise args.error(field, f"the model reads no feature {unknown[0]!r}; it reads: {', '.join(sorted(known))}")
    encoded: dict[str, tuple[str, ...]] = {"number_encodings": ("numeric",), "encoders": ("numeric", "vector", "multi")}
    for field, kinds in encoded.items():
        for feature in found.every:
            if feature.name in getattr(args, field) and feature.kind not in kinds:
                raise args.error(field, f"feature {feature.name!r} is {feature.kind}; those that are "
                                 f"{' or '.join(kinds)} have a choice")  # fmt: skip
    return found


def _chosen(schema: Schema, level: Level, names: tuple[str, ...] | None, field: str) -> tuple[Feature, ...]:
    known = {feature.name: feature for feature in schema.of(level, *_INPUTS)}  # type: ignore[arg-type]
    for name in names or ():
        if name not in known:
            what = "context feature" if level == "user" else f"feature of {level}s"
            raise ConfigError(field, f"= {names!r}: data set {schema.name!r} has no {what} {name!r}; it has: "
                              f"{', '.join(known) or 'none'}")  # fmt: skip
    return tuple(known.values()) if names is None else tuple(known[name] for name in dict.fromkeys(names))


def table_of(feature: Feature, args: FeatureArgs, schema: Schema) -> str:
    """Return the name of the table that the ids of ``feature`` are rows of.

    Raises:
        ConfigError: for features that are to share a table and have different vocabularies.
    """
    own = feature.table or feature.name
    if feature.name not in args.shared_tables:
        return own
    other = next(known for known in schema.features if args.shared_tables[feature.name] in (known.name, known.table))
    shared = other.table or other.name
    identities = [schema.vocabularies.get(name) for name in (own, shared)]
    if own != shared and (identities[0] is None or identities[0] != identities[1]):
        raise args.error("shared_tables", f"{feature.name!r} and {other.name!r} have different vocabularies, so that "
                         "one id means different things; give them one table when the data set is made")  # fmt: skip
    return shared


def part_widths(features: tuple[Feature, ...], config: Config, schema: Schema, added_to: int | None) -> dict[str, int]:
    """Return the width of the vector of each of ``features``, of ids that of their table before it is shared.

    Args:
        features: Of one place.
        config: The run.
        schema: The data set.
        added_to: The width that they are added up in; None if they are not.
    """
    args, found = config.feature, {}
    for feature in features:
        default = added_to
        if feature.kind in ("categorical", "multi"):
            given = [args.widths.get(name) for name in (feature.name, table_of(feature, args, schema))]
            default = default or table_width(feature.vocab_size or 1)
        else:
            given = [args.widths.get(feature.name)]
            own = min(feature.width or 1, config.network.hidden_size)
            default = default or (args.number_width if feature.kind == "numeric" else own)
        found[feature.name] = next((width for width in given if width), default)
    return found


class FeatureEncoders(nn.Module):
    """Makes one vector of each feature of a place, from rows of tables, lengths of sets, and numbers.

    Args:
        features: Of one place: of items, of users, or of events.
        widths: Of the vector of each.
        args: How.
        std: Of initial weights.
    """

    def __init__(self, features: tuple[Feature, ...], widths: Mapping[str, int], args: FeatureArgs, std: float) -> None:
        super().__init__()
        self.features, self.pooling = features, args.set_pooling
        custom = {f.name: _custom_encoder(f, widths[f.name], args) for f in features if f.name in args.encoders}
        numbers = [f for f in features if f.kind in ("numeric", "vector") and f.name not in custom]
        own = {f.name: _number_encoder(f, widths[f.name], args, std) for f in numbers}
        self.encoders = ByFeature(custom | own)
        self.widths = {f.name: own[f.name].width if f.name in own else widths[f.name] for f in features}
        #: Those that are as they came, which no norm may change.
        self.raw = tuple(f.name for f in numbers if f.kind == "numeric" and args.encoding_of(f.name) == "raw")

    def forward(
        self, rows: Mapping[str, Tensor], set_lengths: Mapping[str, Tensor], numbers: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return [n, width] of each feature.

        Args:
            rows: Of ids, one each [n, width], or set after set [m, width].
            set_lengths: Ids of each set, [n] int64.
            numbers: [n, numbers of the feature] float32, nan where missing.
        """
        return {feature.name: self._encode(feature, rows, set_lengths, numbers) for feature in self.features}

    def _encode(
        self,
        feature: Feature,
        rows: Mapping[str, Tensor],
        set_lengths: Mapping[str, Tensor],
        numbers: Mapping[str, Tensor],
    ) -> Tensor:
        name = feature.name
        if feature.kind in ("numeric", "vector"):
            encoded: Tensor = self.encoders(name, numbers[name])
        elif feature.kind != "multi":
            encoded = rows[name]
        elif name in self.encoders:
            encoded = self.encoders[name](rows[name], set_lengths[name])
        else:
            encoded = pool_sets(rows[name], set_lengths[name], self.pooling)
        return encoded


def _custom_encoder(feature: Feature, width: int, args: FeatureArgs) -> nn.Module:
    encoder = make_custom_encoder(feature, width, args)
    scaling = _scaling(feature, args) if feature.kind == "numeric" else None
    return encoder if scaling is None else nn.Sequential(scaling, encoder)


def _number_encoder(feature: Feature, width: int, args: FeatureArgs, std: float) -> NumberEncoder:
    if feature.kind == "vector":
        return NumberEncoder("linear", width, in_features=feature.width or 1, std=std)
    kind = args.encoding_of(feature.name)
    return NumberEncoder(kind, width, scaling=_scaling(feature, args), bins=args.number_bins, std=std)


def _scaling(feature: Feature, args: FeatureArgs) -> nn.Module | None:
    known = feature.statistics
    assert known is not None, "numeric features have statistics"
    if args.number_scaling == "standard":
        return Standardize(known.mean, known.std)
    return QuantileNormalize(known.quantiles) if args.number_scaling == "quantile" else None


def make_merge(
    kind: Merging,
    encoders: FeatureEncoders,
    base: tuple[str, int] | None,
    width: int,
    args: FeatureArgs,
    others: Mapping[str, int] = MappingProxyType({}),
) -> FeatureMerge:
    """Return what joins vectors in ``width``: those of ``encoders``, a ``base`` (name, width) and ``others``."""
    widths = ({base[0]: base[1]} if base else {}) | encoders.widths | dict(others)
    return FeatureMerge(
        kind,
        widths,
        width,
        base=base[0] if base else None,
        hidden=args.merge_hidden_size if kind == "concat" else None,
        norm=tuple(name for name in widths if name not in encoders.raw) if args.normed(kind) else (),
        dropout=args.dropout,
    )
