"""What a data set directory holds: features, their roles and sizes, counts, provenance."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from hstu.data.atomic_directory import DATA_DIR as DATA_DIR
from hstu.data.atomic_directory import SCHEMA_FILE, repair
from hstu.data.atomic_directory import VOCABULARY_DIR as VOCABULARY_DIR

Role = Literal["user", "item", "action", "time", "context", "category"]
ActionType = Literal["categorical", "bitmask"]

FORMAT_VERSION = 1
CATEGORY = "category:"  # before the name of a category feature, a column of the vocabulary of items
COUNT_KEYS = ("users", "items", "events", "seqlen_min", "seqlen_max", "seqlen_mean", "seqlen_median")


def require_plain_name(kind: str, name: str) -> None:
    """Raise ValueError unless ``name`` can name a file, wherever it is used."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.\- ]*", name):
        raise ValueError(f"{kind} name {name!r}: use letters, digits and '_', after the first also '-', '.' and blanks")


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One column of the data set.

    Ids of a feature are dense in ``[0, vocab_size)``; a time feature has no vocabulary. An action is
    ``categorical`` (id = rank of the value among the sorted distinct values) or a ``bitmask``
    (id = the mask itself, ``vocab_size = 2 ** bits``; ``bits`` may name them, the lowest first). A context belongs to
    a user, a category to an item.
    """

    name: str
    role: Role
    vocab_size: int | None = None
    action_type: ActionType | None = None
    bits: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require_plain_name("feature", self.name)
        if self.bits is not None:
            object.__setattr__(self, "bits", tuple(self.bits))  # a list, where it was read from JSON
            if self.action_type != "bitmask" or self.vocab_size != 2 ** len(self.bits):
                raise ValueError(
                    f"feature {self.name!r}: bits {self.bits} do not name those of a bitmask of {self.vocab_size}"
                )
            for bit in self.bits:
                require_plain_name("bit", bit)
        if self.role not in get_args(Role):
            choices = ", ".join(get_args(Role))
            raise ValueError(f"feature {self.name!r}: role {self.role!r} is none of {choices}")
        self._check_vocab_size()
        if (self.role == "action") != (self.action_type is not None):
            raise ValueError(
                f"feature {self.name!r}: action_type {self.action_type!r} with role {self.role!r}; "
                "an action needs one, no other role has one"
            )
        if self.action_type is not None and self.action_type not in get_args(ActionType):
            choices = " or ".join(get_args(ActionType))
            raise ValueError(f"feature {self.name!r}: action_type {self.action_type!r} is not {choices}")
        if self.action_type == "bitmask" and self.vocab_size & (self.vocab_size - 1):  # type: ignore[operator]
            raise ValueError(f"feature {self.name!r}: vocab_size {self.vocab_size} of a bitmask is not a power of two")

    def _check_vocab_size(self) -> None:
        size = self.vocab_size
        if self.role == "time":
            if size is not None:
                raise ValueError(f"feature {self.name!r}: a time has no vocab_size, got {size!r}")
        elif type(size) is not int or size < 1:
            raise ValueError(f"feature {self.name!r}: vocab_size must be a positive integer, got {size!r}")


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Description of one data set, stored as ``schema.json``.

    Args:
        name: Name of the data set.
        features: One user and one item feature, at most one action and one time, any number of contexts and categories.
        counts: users, items (catalogue), events and seqlen_min, seqlen_max, seqlen_mean, seqlen_median; maybe repeats,
            the events of items that their user met before.
        source: Name of each file that the data were made from, with its sha256.
        best_possible: For planted data, split -> metric -> the score of the oracle that knows the planted
            probabilities, on the same events; None where it is unknown.
        vocabularies: Name of each column in ``vocabulary/`` -> hash of its values in the order of the ids, by which
            one vocabulary is told from another. Data sets of older versions have none.
    """

    name: str
    features: tuple[Feature, ...]
    counts: dict[str, float | int]
    source: dict[str, str] = field(default_factory=dict)
    best_possible: dict[str, dict[str, float]] | None = None
    vocabularies: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_plain_name("data set", self.name)
        names = [feature.name for feature in self.features]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"data set {self.name!r}: feature {repeated[0]!r} appears twice; rename one")
        for role, least, most in (("user", 1, 1), ("item", 1, 1), ("action", 0, 1), ("time", 0, 1)):
            number = len(self._with_role(role))
            if not least <= number <= most:
                allowed = f"{least}" if least == most else f"at most {most}"
                raise ValueError(f"data set {self.name!r}: {number} features of role {role!r}, not {allowed}")
        for key in COUNT_KEYS:
            value = self.counts.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"data set {self.name!r}: counts[{key!r}] must be a number, got {value!r}")

    def _with_role(self, role: str) -> tuple[Feature, ...]:
        return tuple(feature for feature in self.features if feature.role == role)

    @property
    def user(self) -> Feature:
        """The user feature."""
        return self._with_role("user")[0]

    @property
    def item(self) -> Feature:
        """The item feature."""
        return self._with_role("item")[0]

    @property
    def action(self) -> Feature | None:
        """The action feature, if the data set has actions."""
        return next(iter(self._with_role("action")), None)

    @property
    def time(self) -> Feature | None:
        """The time feature, if the data set has times."""
        return next(iter(self._with_role("time")), None)

    @property
    def contexts(self) -> tuple[Feature, ...]:
        """The context features, in the order of the schema."""
        return self._with_role("context")

    @property
    def categories(self) -> tuple[Feature, ...]:
        """The features of items, in the order of the schema."""
        return self._with_role("category")

    def save(self, directory: str | Path) -> None:
        """Write ``schema.json`` into ``directory``."""
        record = {"version": FORMAT_VERSION, **asdict(self)}
        text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
        (Path(directory) / SCHEMA_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path) -> Schema:
        """Read ``schema.json`` from ``directory``.

        Raises:
            ValueError: If the file is missing, is no JSON, has another version, or holds a wrong value.
        """
        path = Path(directory) / SCHEMA_FILE
        if not path.is_file():
            repair(Path(directory))
        if not path.is_file():
            raise ValueError(
                f"{path}: no such file, so {str(directory)!r} is no data set; "
                "make one with: python preprocessing/preprocessor.py --dataset_name NAME --data_dir DIR"
            )
        try:
            return cls._from_record(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}: {error}; run the preprocessor again") from error

    @classmethod
    def _from_record(cls, record: dict[str, Any]) -> Schema:
        version = record.pop("version", None)
        if version != FORMAT_VERSION:
            raise ValueError(f"version {version!r}, this program reads {FORMAT_VERSION}")
        features = tuple(Feature(**feature) for feature in record.pop("features"))
        return cls(features=features, **record)


def unknown_id(schema: Schema, feature: str) -> int:
    """Return the id that stands for values of a context or category which training never met: one after the last."""
    return next(f.vocab_size or 0 for f in (*schema.contexts, *schema.categories) if f.name == feature)


def count_statistics(lengths: np.ndarray, num_items: int, repeats: int | None = None) -> dict[str, float | int]:
    """Counts for a schema from the number of events of each user [U], the catalogue's size, and repeats if known."""
    known = {} if repeats is None else {"repeats": repeats}
    return known | {
        "users": len(lengths),
        "items": num_items,
        "events": int(lengths.sum()),
        "seqlen_min": int(lengths.min()),
        "seqlen_max": int(lengths.max()),
        "seqlen_mean": float(lengths.mean()),
        "seqlen_median": float(np.median(lengths)),
    }
