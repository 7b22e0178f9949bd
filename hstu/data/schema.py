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

Role = Literal["user", "item", "action", "time", "feature", "control"]
Level = Literal["user", "event", "item"]
Kind = Literal["categorical", "multi", "numeric", "vector", "text"]
ActionType = Literal["categorical", "bitmask"]

FORMAT_VERSION = 2
ITEM_FEATURE = "category:"  # before the name of a feature of items, a column of the vocabulary of items
NUM_QUANTILES = 101
COUNT_KEYS = ("users", "items", "events", "seqlen_min", "seqlen_max", "seqlen_mean", "seqlen_median")


def require_plain_name(kind: str, name: str) -> None:
    """Raise ValueError unless ``name`` can name a file, wherever it is used."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.\- ]*", name):
        raise ValueError(f"{kind} name {name!r}: use letters, digits and '_', after the first also '-', '.' and blanks")


_SPECIAL: dict[str, tuple[Level, Kind]] = {
    "user": ("user", "categorical"),
    "item": ("item", "categorical"),
    "action": ("event", "categorical"),
    "time": ("event", "numeric"),
}
_OLD_ROLES: dict[str, Level] = {"context": "user", "category": "item"}  # of version 1: categorical features


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What the numbers of a feature are like, without missing ones.

    Attributes:
        mean: Their mean.
        std: Their standard deviation.
        quantiles: 101 of them, from the least number to the largest.
    """

    mean: float
    std: float
    quantiles: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "quantiles", tuple(self.quantiles))  # a list, where it was read from JSON
        numbers = (self.mean, self.std, *self.quantiles)
        if not all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers):
            raise ValueError(f"statistics hold a value that is no finite number: {numbers}")
        if len(self.quantiles) != NUM_QUANTILES or list(self.quantiles) != sorted(self.quantiles) or self.std < 0:
            raise ValueError(
                f"statistics need {NUM_QUANTILES} ascending quantiles and no negative deviation: {numbers}"
            )


@dataclass(frozen=True, kw_only=True)
class Feature:
    """One column of the data set: a user, an item, an action or a time, or what was declared beside them.

    A ``feature`` is an input of models, a ``control`` column is only kept. Ids are dense in ``[0, vocab_size)``. An
    action is ``categorical`` (id = rank of the value among the sorted distinct values) or a ``bitmask`` (id = the mask
    itself, ``vocab_size = 2 ** bits``; ``bits`` may name them, the lowest first).

    Where a declared feature lacks a value, a categorical one or a text has the id ``vocab_size``, a set (``multi``) is
    empty, a number or vector is NaN.

    Attributes:
        level: Whose value it is: one for each user, event or item.
        kind: What its values are; of texts and control columns an id stands for each distinct value.
        vocab_size: Number of ids; None for numbers, vectors and times.
        width: Numbers of a vector.
        statistics: What the numbers of a numeric feature are like.
        table: Name of its vocabulary, which features may share; by default its own name.
        num_ids: Ids in all sets of a ``multi``.
        known_at_request: Whether the value of an event is known when one asks about it; by default of all but actions.
    """

    name: str
    role: Role = "feature"
    level: Level | None = None
    kind: Kind | None = None
    vocab_size: int | None = None
    width: int | None = None
    statistics: Statistics | None = None
    table: str | None = None
    num_ids: int | None = None
    known_at_request: bool | None = None
    action_type: ActionType | None = None
    bits: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        require_plain_name("feature", self.name)
        if self.bits is not None:
            object.__setattr__(self, "bits", tuple(self.bits))  # a list, where it was read from JSON
        if isinstance(self.statistics, dict):
            object.__setattr__(self, "statistics", Statistics(**self.statistics))
        self._require_choice("role", Role)
        level, kind = _SPECIAL.get(self.role, (self.level, self.kind))
        self._default("level", level)
        self._default("kind", kind)
        if self.vocab_size is not None:
            self._default("table", self.name)
        self._default("known_at_request", self.role != "action")
        self._require_choice("level", Level)
        self._require_choice("kind", Kind)
        if (self.level, self.kind) != (level, kind):
            raise self._error(f"level {self.level!r} and kind {self.kind!r} with role {self.role!r}; leave them out")
        self._check_values()
        self._check_action()

    @property
    def has_ids(self) -> bool:
        """Whether its values are ids of a vocabulary."""
        return self.role != "time" and self.kind not in ("numeric", "vector")

    def _default(self, field_name: str, value: object) -> None:
        if getattr(self, field_name) is None:
            object.__setattr__(self, field_name, value)

    def _error(self, message: str) -> ValueError:
        return ValueError(f"feature {self.name!r}: {message}")

    def _require_choice(self, field_name: str, choices: object) -> None:
        if (value := getattr(self, field_name)) not in get_args(choices):
            raise self._error(f"{field_name} {value!r} is none of {', '.join(get_args(choices))}")

    def _check_values(self) -> None:
        if self.role == "time" and self.vocab_size is not None:
            raise self._error(f"a time has no vocab_size, got {self.vocab_size!r}")
        wanted = {
            "vocab_size": self.has_ids,
            "width": self.kind == "vector",
            "num_ids": self.kind == "multi",
        }
        for name, needed in wanted.items():
            value, least = getattr(self, name), int(name != "num_ids")
            if needed and (type(value) is not int or value < least):
                raise self._error(f"{name} must be {'a positive' if least else 'an'} integer, got {value!r}")
            if not needed and value is not None:
                raise self._error(f"{name} {value!r} with kind {self.kind!r}, which has none")
        if (self.statistics is not None) != (self.kind == "numeric" and self.role != "time"):
            raise self._error(
                f"statistics {self.statistics!r} with kind {self.kind!r}; numeric features alone have some"
            )
        if self.known_at_request is False and self.level != "event":
            raise self._error(f"known_at_request False with level {self.level!r}; it is for what belongs to events")

    def _check_action(self) -> None:
        if (self.role == "action") != (self.action_type is not None):
            raise self._error(
                f"action_type {self.action_type!r} with role {self.role!r}; an action needs one, no other role has one"
            )
        if self.action_type is not None:
            self._require_choice("action_type", ActionType)
        if self.action_type == "bitmask" and self.vocab_size & (self.vocab_size - 1):  # type: ignore[operator]
            raise self._error(f"vocab_size {self.vocab_size} of a bitmask is not a power of two")
        if self.bits is None:
            return
        if self.action_type != "bitmask" or self.vocab_size != 2 ** len(self.bits):
            raise self._error(f"bits {self.bits} do not name those of a bitmask of {self.vocab_size}")
        for bit in self.bits:
            require_plain_name("bit", bit)


@dataclass(frozen=True, kw_only=True)
class Schema:
    """Description of one data set, stored as ``schema.json``.

    Args:
        name: Name of the data set.
        features: One user and one item, at most one action and one time, any number of declared features and control
            columns.
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
        self._check_tables()
        for role, least, most in (("user", 1, 1), ("item", 1, 1), ("action", 0, 1), ("time", 0, 1)):
            number = len(self._with_role(role))
            if not least <= number <= most:
                allowed = f"{least}" if least == most else f"at most {most}"
                raise ValueError(f"data set {self.name!r}: {number} features of role {role!r}, not {allowed}")
        for key in COUNT_KEYS:
            value = self.counts.get(key)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"data set {self.name!r}: counts[{key!r}] must be a number, got {value!r}")

    def _check_tables(self) -> None:
        sizes: dict[str, int] = {}
        for feature in self.features:
            table = feature.table
            if table is not None and sizes.setdefault(table, feature.vocab_size or 0) != feature.vocab_size:
                raise ValueError(f"data set {self.name!r}: features of table {table!r} differ in vocab_size")
        for feature in self.features:
            if feature.name in sizes and feature.table != feature.name:
                raise ValueError(f"data set {self.name!r}: feature {feature.name!r} is not of the table of that name")

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

    def of(self, level: Level, *kinds: Kind) -> tuple[Feature, ...]:
        """Return the declared features of ``level`` that are of one of ``kinds``, or of any, in the schema's order."""
        declared = self._with_role("feature")
        return tuple(f for f in declared if f.level == level and (not kinds or f.kind in kinds))

    def stored(self, level: Level) -> tuple[Feature, ...]:
        """Return what is stored beside the user, item, action and time: declared features, then control columns."""
        return *self.of(level), *(control for control in self._with_role("control") if control.level == level)

    @property
    def contexts(self) -> tuple[Feature, ...]:
        """The categorical features of users, in the order of the schema."""
        return self.of("user", "categorical")

    @property
    def categories(self) -> tuple[Feature, ...]:
        """The categorical features of items, in the order of the schema."""
        return self.of("item", "categorical")

    def save(self, directory: str | Path) -> None:
        """Write ``schema.json`` into ``directory``."""
        record = {"version": FORMAT_VERSION, **asdict(self)}
        record["features"] = [{k: v for k, v in f.items() if v is not None} for f in record["features"]]
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
        if version not in (1, FORMAT_VERSION):
            raise ValueError(f"version {version!r}, this program reads 1 to {FORMAT_VERSION}")
        features = record.pop("features")
        if version == 1:
            features = [_of_version_1(feature) for feature in features]
        return cls(features=tuple(Feature(**feature) for feature in features), **record)


def _of_version_1(feature: dict[str, Any]) -> dict[str, Any]:
    level = _OLD_ROLES.get(feature["role"])
    return feature if level is None else feature | {"role": "feature", "level": level, "kind": "categorical"}


def unknown_id(schema: Schema, feature: str) -> int:
    """Return the id that stands for missing values of a feature, and those training never met: one after the last."""
    return next(f.vocab_size or 0 for f in schema.features if f.name == feature)


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
