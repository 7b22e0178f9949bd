"""Declared features: what the columns of a log, of its users and of its items are, said by who knows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import polars as pl

from hstu.data.schema import Kind, Level, Role, require_plain_name

CONTROL = "control"
_AFTER, _TABLE = "after", "table="
GRAMMAR = "name:kind, as price:numeric,brand:categorical,watched:numeric:after,liked:multi:table=brand"


@dataclass(frozen=True)
class Declaration:
    """What a column is.

    Attributes:
        name: The column, and the feature that it becomes.
        level: Whose values they are.
        kind: What they are; None for a control column, which is kept as it is.
        table: Name of the vocabulary.
        known_at_request: Whether the value of an event is known when one asks about it.
    """

    name: str
    level: Level
    kind: Kind | None
    table: str
    known_at_request: bool = True

    @property
    def role(self) -> Role:
        """The role of the feature."""
        return "feature" if self.kind else "control"

    @property
    def has_ids(self) -> bool:
        """Whether it has a vocabulary."""
        return self.kind not in ("numeric", "vector")

    @property
    def may_hold_lists(self) -> bool:
        """Whether one value may be a list."""
        return self.kind in ("multi", "vector")

    @property
    def needs_look(self) -> bool:
        """Whether all values have to be seen before one can be read."""
        return self.kind not in ("numeric", "multi")


def parse_declarations(text: str, level: Level) -> tuple[Declaration, ...]:
    """Read what ``--event_features``, ``--user_features`` or ``--item_features`` says.

    Raises:
        ValueError: For what is no declaration, naming it, the choices and an example.
    """
    found = tuple(_parse(part, level) for part in text.split(",") if part.strip())
    names = [declaration.name for declaration in found]
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--{level}_features: {repeated[0]!r} is declared twice; declare a column once")
    return found


def _parse(part: str, level: Level) -> Declaration:
    name, *words = (word.strip() for word in part.split(":"))
    place = f"--{level}_features: {part.strip()!r}"
    if not words:
        raise ValueError(f"{place} names no kind; write {GRAMMAR}")
    require_plain_name("feature", name)
    kind, table, known = words[0], name, True
    if kind not in (*get_args(Kind), CONTROL):
        choices = ", ".join((*get_args(Kind), CONTROL))
        raise ValueError(f"{place}: {kind!r} is no kind; choose one of {choices}")
    for word in words[1:]:
        if word == _AFTER and level == "event":
            known = False
        elif word.startswith(_TABLE) and kind in ("categorical", "multi"):
            table = word.removeprefix(_TABLE)
            require_plain_name("table", table)
        else:
            reason = {_AFTER: "is for features of events"}.get(word, "is no option of it")
            raise ValueError(f"{place}: {word!r} {reason}; write {GRAMMAR}")
    return Declaration(name, level, None if kind == CONTROL else kind, table, known)  # type: ignore[arg-type]


def suggest(columns: list[pl.Series], separator: str) -> str:
    """Return a declaration of columns by what they look like, for whoever has declared none."""
    return ",".join(f"{column.name}:{_look(column, separator)}" for column in columns)


def _look(column: pl.Series, separator: str) -> str:
    if column.dtype.is_nested():
        return "vector" if column.dtype.inner.is_float() else "multi"  # type: ignore[attr-defined]
    values = column.drop_nulls()
    if values.dtype == pl.String and values.str.contains(separator, literal=True).any():
        return "multi"
    distinct = values.n_unique()
    if values.dtype.is_numeric() or (
        values.dtype == pl.String and not values.cast(pl.Float64, strict=False).null_count()
    ):
        return "numeric" if distinct > 20 else "categorical"
    return "text" if 2 * distinct > len(values) else "categorical"
