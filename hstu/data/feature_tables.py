"""The tables of users and of items: their declared columns, or all of them, for the users and items of a log."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import polars as pl

from hstu.data.cleaning import clean_ids, clean_values, require_columns
from hstu.data.declarations import suggest
from hstu.data.feature_cleaning import FeatureLook, clean_feature
from hstu.data.feature_codes import FeatureColumn, summarize
from hstu.data.interactions import InteractionSpec
from hstu.data.schema import Feature
from hstu.data.values import Values

logger = logging.getLogger(__name__)


@dataclass
class TableFeatures:
    """What a table says of the users or the items of a log.

    Attributes:
        columns: Its declared features.
        undeclared: Features that were not declared, all of them categorical -> their ids and vocabulary.
    """

    columns: dict[str, FeatureColumn] = field(default_factory=dict)
    undeclared: dict[str, tuple[np.ndarray, pl.Series]] = field(default_factory=dict)
    _codes: dict[str, np.ndarray] = field(default_factory=dict)
    _level: Literal["user", "item"] = "user"

    @classmethod
    def read(
        cls,
        level: Literal["user", "item"],
        table: pl.DataFrame | None,
        known: pl.Series,
        spec: InteractionSpec,
        absent: str | None = None,
        *,
        judge: bool = True,
    ) -> TableFeatures:
        """Read the table of a level.

        Args:
            level: Whose table it is.
            table: One row for each of them, or None.
            known: Ids of those of the log, any number of times.
            spec: Names of columns and files, and what is declared.
            absent: Value of categories for those who are not in the table, "" for none; None refuses them.
            judge: See ``FeatureColumn``.

        Raises:
            ValueError: If the table is wrong.
        """
        found, declared = cls(_level=level), spec.declared(level)
        if table is None:
            return found
        rows = _rows_of(level, table, known, spec, absent)
        if (spec.user_features if level == "user" else spec.item_features) is None:
            for column in _undeclared(level, table, spec):
                gathered = column.gather(rows)
                if rows.null_count():  # to whom there is a value to give, or they would have been refused
                    gathered = gathered.cast(pl.String).fill_null(absent)
                found.undeclared[column.name] = _encode(gathered)
            return found
        file, key = _place(level, spec)
        if ignored := [name for name in table.columns if name not in (key, *(told.name for told in declared))]:
            logger.info("%s: columns that are not declared are left out: %s", file, ", ".join(ignored))
        for told in declared:
            column, separator = table[told.name], spec.set_separator
            look = FeatureLook().add(column, told, separator)
            clean = clean_feature(column, told, file, look, separator).gather(rows)
            if absent and clean.dtype == pl.String and told.kind == "categorical":
                clean = clean.set(rows.is_null(), absent)
            found.columns[told.name] = FeatureColumn(told, file, judge=judge)
            found._codes[told.name] = found.columns[told.name].codes(clean)
        return found

    def encode(self) -> tuple[list[Feature], dict[str, Values]]:
        """Return features and their values, once the declared ones have their vocabularies."""
        features: list[Feature] = []
        values: dict[str, Values] = {}
        for name, (ids, vocabulary) in self.undeclared.items():
            values[name] = ids
            features.append(Feature(name=name, level=self._level, kind="categorical", vocab_size=len(vocabulary)))
        for name, column in self.columns.items():
            values[name] = column.values(self._codes[name])
            column.add(summarize(values[name]))
            features.append(column.feature())
        return features, values


def _place(level: Literal["user", "item"], spec: InteractionSpec) -> tuple[str, str]:
    """Return what messages call the table, and its column of ids."""
    return (spec.users_file, spec.user_column) if level == "user" else (spec.items_file, spec.item_column)


def _rows_of(
    level: Literal["user", "item"],
    table: pl.DataFrame,
    known: pl.Series,
    spec: InteractionSpec,
    absent: str | None,
) -> pl.Series:
    """The row of each ``known`` user or item, Int64; null for one that is not there."""
    file, key = _place(level, spec)
    require_columns(table, [key, *(declared.name for declared in spec.declared(level))], file)
    ids = clean_ids(table[key], file, missing=spec.missing)
    first = ids.is_first_distinct().to_numpy()
    if not first.all():
        row = int(first.argmin())
        raise ValueError(f"{file}: row {row + 1}: {level} {ids[row]!r} appears twice; keep one row per {level}")
    if ids.dtype != known.dtype:
        ids, known = ids.cast(pl.String), known.cast(pl.String)
    row_of = pl.DataFrame({"id": ids, "row": np.arange(len(ids))})
    rows = known.to_frame("id").join(row_of, on="id", how="left", maintain_order="left")["row"]
    missing = known.filter(rows.is_null()).unique(maintain_order=True)
    if len(missing) and absent is not None:
        given = f"they get {absent!r}" if absent else "they have no features"
        logger.info("%s: %d %ss of %s are missing; %s", file, len(missing), level, spec.file, given)
    elif len(missing):
        raise ValueError(
            f"{file}: {len(missing)} of {known.n_unique()} {level}s of {spec.file} are missing "
            f"(for example {missing[0]!r}); add them or leave the {level}s file out"
        )
    idle = len(ids) - rows.n_unique() + bool(len(missing))
    if idle:
        logger.info("%s: %d %ss without events are left out", file, idle, level)
    return rows


def _undeclared(level: Literal["user", "item"], table: pl.DataFrame, spec: InteractionSpec) -> list[pl.Series]:
    """The columns of a table of which nothing is declared, clean: each is taken for categories, and a line says so."""
    file, key = _place(level, spec)
    columns = [column for column in table.get_columns() if column.name != key]
    if nested := [column.name for column in columns if column.dtype.is_nested()]:
        logger.warning("%s: columns %s hold lists and are left out; declare them: --%s_features", file, nested, level)
    single = [column for column in columns if column.name not in nested]
    if single:
        logger.info("%s: all other columns are taken for categories; to say what they are: --%s_features %s",
                    file, level, suggest(single, spec.set_separator))  # fmt: skip
    return [clean_values(column, file) for column in single]


def _encode(column: pl.Series) -> tuple[np.ndarray, pl.Series]:
    """Ids of the values, int64, and the vocabulary, ascending."""
    vocabulary = column.unique().sort()
    table = pl.DataFrame({"value": vocabulary, "id": np.arange(len(vocabulary))})
    ids = column.to_frame("value").join(table, on="value", how="left", maintain_order="left")["id"]
    return ids.to_numpy(), vocabulary
