"""Declared features of histories and candidates that no data set holds, in the ids of the data set of a model."""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import polars as pl

from hstu.data.declarations import Declaration
from hstu.data.feature_cleaning import MEMBER, FeatureLook, clean_feature
from hstu.data.feature_codes import numbers_of
from hstu.data.files import printable
from hstu.data.reader import SequenceDataset
from hstu.data.schema import Feature
from hstu.data.values import Sets, Values, missing, take

logger = logging.getLogger(__name__)

MissingFeatures = Literal["error", "allow"]


def read_features(
    frame: pl.DataFrame,
    features: tuple[Feature, ...],
    known: SequenceDataset,
    file: str,
    *,
    absent: MissingFeatures,
    separator: str,
) -> dict[str, Values]:
    """Return the values of ``features`` in each row of a table.

    Values that ``known`` lacks are read as missing ones, and a log line counts them.

    Args:
        frame: The table.
        features: What a model reads.
        known: The data set whose ids apply.
        file: What messages call the table.
        absent: What to do with a feature for which there is no column: "error", or "allow", then all are missing.
        separator: Between the members of sets, and the numbers of vectors, that are strings.

    Raises:
        ValueError: For a column that is missing, or a value that its kind does not have.
    """
    found: dict[str, Values] = {}
    for feature in features:
        if feature.name in frame.columns:
            found[feature.name] = _read(frame[feature.name], feature, known, file, separator)
        elif absent == "allow":
            logger.info("%s: column %r is missing: the model reads none of its values", file, feature.name)
            found[feature.name] = missing(feature, frame.height)
        else:
            raise ValueError(
                f"{file}: column {feature.name!r} is missing, which the model reads; add it, or do without it with "
                f"--missing_features allow; present: {', '.join(map(printable, frame.columns))}"
            )
    return found


def _read(column: pl.Series, feature: Feature, known: SequenceDataset, file: str, separator: str) -> Values:
    assert feature.level is not None and feature.kind is not None
    declared = Declaration(feature.name, feature.level, feature.kind, feature.table or feature.name)
    look = FeatureLook().add(column, declared, separator)
    look.width = feature.width or 0
    clean = clean_feature(column, declared, file, look, separator)
    if not feature.has_ids:
        return numbers_of(clean)
    vocabulary = known.index(feature.name)
    if feature.kind != "multi":
        ids = vocabulary.places(clean)
        _tell(clean.filter(ids.is_null() & clean.is_not_null()), file, feature)
        return ids.fill_null(feature.vocab_size).to_numpy()
    sets = clean.fill_null("").str.split(MEMBER).list.unique(maintain_order=True)
    members, owners = sets.explode(), np.repeat(np.arange(len(clean)), sets.list.len().to_numpy())
    ids = vocabulary.places(members)
    _tell(members.filter(ids.is_null() & (members != "")), file, feature)
    kept = ids.is_not_null().to_numpy()
    lengths = np.bincount(owners[kept], minlength=len(clean))
    return Sets(np.concatenate([[0], np.cumsum(lengths)]), ids.drop_nulls().to_numpy())


def _tell(strange: pl.Series, file: str, feature: Feature) -> None:
    if len(strange):
        logger.info(
            "%s: column %r: %d values that the data set lacks (%r, for example) are read as missing",
            *(file, feature.name, len(strange), strange[0]),
        )


def one_per_user(values: Values, row: np.ndarray, name: str, users: pl.Series, file: str) -> Values:
    """Return the value of each user, of ``values`` at T events that belong to users ``row`` [T], which ascends.

    Raises:
        ValueError: If a user has two.
    """
    first = np.searchsorted(row, np.arange(len(users)))
    expected = take(values, first[row])
    if isinstance(values, Sets) and isinstance(expected, Sets):
        differ = values.lengths != expected.lengths
        if not differ.any():
            owners = np.repeat(np.arange(len(row)), values.lengths)
            differ[owners[values.ids != expected.ids]] = True
    else:
        assert isinstance(values, np.ndarray) and isinstance(expected, np.ndarray)
        same = (values == expected) | ((values != values) & (expected != expected))  # NaN is not equal to itself
        differ = ~(same if same.ndim == 1 else same.all(axis=1))
    if differ.any():
        user = users[int(row[int(differ.argmax())])]
        raise ValueError(f"{file}: column {name!r}: user {user!r} has two values; give one per user")
    return take(values, first)
