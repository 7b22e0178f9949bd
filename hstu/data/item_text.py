"""The texts of items: what a language model reads of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from hstu.data.schema import Feature, Kind, Schema
from hstu.data.values import Sets

if TYPE_CHECKING:
    from hstu.data.reader import SequenceDataset

KINDS: tuple[Kind, ...] = ("text", "categorical", "multi")
"""Kinds of features that can be read."""


def text_columns(schema: Schema, names: tuple[str, ...] | None) -> tuple[Feature, ...]:
    """Return the features of items that are read: those of ``names``, or all texts.

    Raises:
        ValueError: If there are none, or one of the names is none.
    """
    known = {feature.name: feature for feature in schema.of("item", *KINDS)}
    chosen = [name for name, feature in known.items() if feature.kind == "text"] if names is None else list(names)
    has = f"data set {schema.name!r} has {', '.join(known) or 'none'}"
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"no column {unknown[0]!r} of words among those of its items: {has}; declare it when the data "
                         f"set is made: --item_features {unknown[0]}:text")  # fmt: skip
    if not chosen:
        raise ValueError(f"no column of its items is declared as text: {has}; declare one when the data set is made: "
                         "--item_features NAME:text, or name others")  # fmt: skip
    return tuple(known[name] for name in dict.fromkeys(chosen))


def item_texts(dataset: SequenceDataset, columns: tuple[Feature, ...], prompt: str) -> list[str]:
    """Return the text of each item: the prompt, then a line ``name: value`` for each column with a value.

    Raises:
        ValueError: If no item has a value.
    """
    lines: list[list[str]] = [[] for _ in range(dataset.schema.item.vocab_size or 0)]
    for column in columns:
        for own, value in zip(lines, _values(dataset, column), strict=True):
            if value:
                own.append(f"{column.name}: {value}")
    if not any(lines):
        names = ", ".join(column.name for column in columns)
        raise ValueError(f"no item has a value of {names}; name other columns, or give the items file texts")
    return [prompt + "\n".join(own) for own in lines]


def item_names(dataset: SequenceDataset) -> dict[str, str]:
    """Return what items are called, by their ids as texts: their first text, or a category called name or title."""
    texts = dataset.schema.of("item", "text")
    named = [own for own in dataset.schema.categories if own.name.lower() in ("name", "title")]
    if not (texts or named):
        return {}
    items = map(str, dataset.vocabulary(dataset.schema.item.name))
    return {item: name for item, name in zip(items, _values(dataset, [*texts, *named][0]), strict=True) if name}


def _values(dataset: SequenceDataset, column: Feature) -> Iterator[str]:
    """Yield what each item has, "" for nothing."""
    originals = [*(str(value).strip() for value in dataset.vocabulary(column.name)), ""]
    found = dataset.item_features(column.name)
    if isinstance(found, Sets):
        for start, stop in zip(found.offsets[:-1], found.offsets[1:], strict=True):
            yield ", ".join(originals[id] for id in found.ids[start:stop])
    else:
        yield from (originals[id] for id in np.asarray(found))
