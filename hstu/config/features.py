"""Knobs of declared features: which of them a model reads, and how each becomes a vector."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

from hstu.config.base import UNSET, Args
from hstu.registry import Registry, T

NumberEncoding = Literal["raw", "linear", "soft_one_hot"]
Merging = Literal["concat", "sum", "multiply"]
CUSTOM_ENCODERS = Registry("encoder", get_args(NumberEncoding))


def register_encoder(name: str) -> Callable[[T], T]:
    """Return a decorator for an encoder of features of your own, chosen by ``FeatureArgs.encoders = {feature: name}``.

    What it is put on is called with the ``hstu.data.schema.Feature``, the width W of its vector, and
    ``encoder_options[feature]`` by their names, and returns a module to vectors [n, W] of n events, items or users. Of
    a numeric or vector feature it maps numbers [n, k] float32 (k = 1 of a numeric one, which ``number_scaling`` has
    scaled), NaN where one is missing. Of a set it maps the rows of the table that its ids have, [m, W], set after set,
    and the length of each set, [n] int64, which may be 0. No vector may depend on another event, item or user, also in
    training, and both vectors and gradients are finite where values are missing: that is tried out when a model is
    built. The module initialises its own weights, from the seed of the run, and each rank has all of them.

    Args:
        name: Of letters, digits and underscores.

    Raises:
        ValueError: for a name that is taken.
    """
    return CUSTOM_ENCODERS.add(name)


@dataclass(frozen=True, kw_only=True)
class FeatureArgs(Args):
    """The declared features of users, items and events.

    Those of an event join its item, or its action if they are known only after the event (and there is an action
    token); those of an item join its row wherever the item stands; those of a user are context tokens, chosen by
    DatasetArgs.contextual_feature_names.
    """

    #: Features of events that the model reads; None: all that the data set declares.
    event_features: tuple[str, ...] | None = None
    #: Likewise of items; None: all, if NetworkArgs.item_embedding is not "local".
    item_features: tuple[str, ...] | None = None
    #: Share of the categorical values that training replaces by the row for unknown ones, of users by sample, of
    #: actions and events by event, of items by item and step, so that this row learns what can be said without the
    #: value. 0: no such row, and predict refuses values that the data set lacks.
    unknown_rate: float = 0.01
    #: Share of the values of categorical features of events and items that training swaps for another one: that of
    #: another event of the sample, or of another item.
    swap_rate: float = 0.0
    #: Width of a feature's vector, or of the table that features share, by its name. Others: of ids in n rows
    #: 2 n^(1/4) rounded up to a multiple of 4, of a number number_width, of a vector its own width, at most that of
    #: the stream; where they are added up as they are (item_merge = "sum", context tokens) the width of the sum.
    widths: dict[str, int] = field(default_factory=dict)
    #: Feature -> one whose table it reads, beside those that share one in the data set; they need one vocabulary.
    shared_tables: dict[str, str] = field(default_factory=dict)
    #: How a set of ids becomes a vector from the rows of its ids.
    set_pooling: Literal["mean", "sum"] = "mean"
    #: Numbers first: (x - mean) / std, or their place among the quantiles of the data, or as they are.
    number_scaling: Literal["standard", "quantile", "none"] = "standard"
    #: "raw": as it is, beside a flag of missing ones; "linear": times a vector; "soft_one_hot": softmax over
    #: number_bins, times a row of each.
    number_encoding: NumberEncoding = "soft_one_hot"
    #: By name of a feature, in place of number_encoding.
    number_encodings: dict[str, NumberEncoding] = field(default_factory=dict)
    #: Feature -> name of a registered encoder, in place of the shipped one: of numbers, vectors and sets.
    encoders: dict[str, str] = field(default_factory=dict)
    #: Feature -> what its registered encoder is called with, by name.
    encoder_options: dict[str, dict[str, bool | int | float | str]] = field(default_factory=dict)
    #: Bins of "soft_one_hot".
    number_bins: int = 16
    #: Width of the vector of a number.
    number_width: int = 16
    #: How features join the item or action of their event: side by side through a matrix; added up; or
    #: item * (1 + sum of them).
    merge: Merging = "concat"
    #: Inner width of a second layer wherever features are merged by "concat"; None: there is one layer.
    merge_hidden_size: int | None = None
    #: How an item's row and features become one vector.
    item_merge: Merging = "sum"
    #: Features of a user: a token each, or one for all of them, side by side through a matrix.
    context_merge: Literal["tokens", "concat"] = "tokens"
    #: Layer norm of each part before it is merged; None: not where parts are added up.
    layer_norm: bool = UNSET
    #: Of merged features.
    dropout: float = 0.0

    limits: ClassVar = {
        **dict.fromkeys(("unknown_rate", "swap_rate", "dropout"), (0, 1)),
        **dict.fromkeys(("widths", "number_width", "merge_hidden_size"), (1, 2**17)),
        "number_bins": (2, 2**16),
        "encoder_options": (-(2**62), 2**62),
    }

    def validate(self) -> None:
        for name in ("unknown_rate", "swap_rate", "dropout"):
            self.require_range(name, 0, 1)
        if self.merge_hidden_size and "concat" not in (self.merge, self.item_merge, self.context_merge):
            raise self.error("merge_hidden_size", "is for features merged by 'concat', and none are; leave it out")
        for name, encoder in self.encoders.items():
            if CUSTOM_ENCODERS.get(encoder) is None:
                known = ", ".join(map(repr, CUSTOM_ENCODERS.names)) or "none"
                raise self.error("encoders", f"{encoder!r} is not registered ({known} so far); one of your own is "
                                 "registered by a module that --import names")  # fmt: skip
            if name in self.number_encodings:
                raise self.error("encoders", f"{name!r} stands in number_encodings too; leave one of them out")
        if unknown := sorted(self.encoder_options.keys() - self.encoders.keys()):
            raise self.error("encoder_options", f"{unknown[0]!r} has no registered encoder; name it in encoders")
        for name, other in self.shared_tables.items():
            if other in self.shared_tables or name == other:
                raise self.error("shared_tables", f"{name!r} reads the table of {other!r}, which reads another; name "
                                 "the feature whose table it is")  # fmt: skip

    def normed(self, merging: str) -> bool:
        """Return whether parts are normed before they are merged as ``merging`` says."""
        return merging != "sum" if self.layer_norm is None else self.layer_norm

    def encoding_of(self, name: str) -> NumberEncoding:
        """Return how number ``name`` becomes a vector."""
        return self.number_encodings.get(name, self.number_encoding)


def table_width(rows: int) -> int:
    """Return the width of a table by rule: 2 n^(1/4), rounded up to a multiple of 4."""
    return 4 * math.ceil(2 * rows**0.25 / 4)
