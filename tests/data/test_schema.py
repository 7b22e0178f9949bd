from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hstu.data import Feature, Schema, Statistics
from hstu.data.schema import count_statistics

USER = Feature(name="user_id", role="user", vocab_size=2)
ITEM = Feature(name="item_id", role="item", vocab_size=5)
NUMBERS = Statistics(mean=1.5, std=0.5, quantiles=tuple(np.linspace(1, 2, 101).tolist()))
PRICE = Feature(name="price", level="event", kind="numeric", statistics=NUMBERS)
COUNTS = count_statistics(np.array([3, 4]), 5)


def make(**changes) -> Schema:
    features = (
        USER,
        Feature(name="segment", level="user", kind="categorical", vocab_size=3),
        ITEM,
        Feature(name="action", role="action", vocab_size=8, action_type="bitmask"),
        Feature(name="timestamp", role="time"),
    )
    return Schema(**{"name": "tiny", "features": features, "counts": COUNTS} | changes)


def test_schema_survives_saving(tmp_path: Path) -> None:
    schema = make(source={"u.data": "ab"}, best_possible={"test": {"AUC": 0.1 + 0.2}})
    schema.save(tmp_path)
    assert Schema.load(tmp_path) == schema
    assert [feature.name for feature in schema.contexts] == ["segment"]
    assert (schema.user.name, schema.item.name) == ("user_id", "item_id")
    assert schema.action.vocab_size == 8
    assert schema.time.name == "timestamp"


def test_declared_features(tmp_path: Path) -> None:
    declared = (
        PRICE,
        Feature(name="brand", level="item", kind="categorical", vocab_size=4),
        Feature(name="liked", level="user", kind="multi", vocab_size=4, num_ids=0, table="brand"),
        Feature(name="image", level="item", kind="vector", width=3),
        Feature(name="watched", level="event", kind="categorical", vocab_size=2, known_at_request=False),
        Feature(name="request", role="control", level="event", kind="categorical", vocab_size=9),
    )
    schema = make(features=(*make().features, *declared))
    schema.save(tmp_path)
    assert Schema.load(tmp_path) == schema
    assert schema.of("event") == (PRICE, declared[4]) and schema.of("event", "numeric", "vector") == (PRICE,)
    assert schema.stored("event") == (PRICE, *declared[4:])
    assert [feature.name for feature in schema.contexts] == ["segment"], "a set is no categorical feature"
    assert schema.categories == (declared[1],) and declared[1].table == "brand"
    known = {feature.name: feature.known_at_request for feature in schema.features}
    assert [name for name, value in known.items() if not value] == ["action", "watched"]


def test_schemas_of_version_1_are_read(tmp_path: Path) -> None:
    old = [
        {"name": "user_id", "role": "user", "vocab_size": 2, "action_type": None, "bits": None},
        {"name": "segment", "role": "context", "vocab_size": 3, "action_type": None, "bits": None},
        {"name": "item_id", "role": "item", "vocab_size": 5, "action_type": None, "bits": None},
        {"name": "genre", "role": "category", "vocab_size": 4, "action_type": None, "bits": None},
        {"name": "action", "role": "action", "vocab_size": 8, "action_type": "bitmask", "bits": None},
        {"name": "timestamp", "role": "time", "vocab_size": None, "action_type": None, "bits": None},
    ]
    (tmp_path / "schema.json").write_text(
        json.dumps({"version": 1, "name": "old", "features": old, "counts": COUNTS, "source": {}})
    )
    schema = Schema.load(tmp_path)
    assert schema.contexts == (Feature(name="segment", level="user", kind="categorical", vocab_size=3),)
    assert schema.categories == (Feature(name="genre", level="item", kind="categorical", vocab_size=4),)
    assert schema.action == make().action and schema.time == make().time


def test_bits_have_names(tmp_path: Path) -> None:
    action = Feature(name="action", role="action", vocab_size=8, action_type="bitmask", bits=("click", "like", "buy"))
    schema = make(features=(USER, ITEM, action))
    schema.save(tmp_path)
    assert Schema.load(tmp_path) == schema and schema.action.bits == ("click", "like", "buy")
    with pytest.raises(ValueError, match="bits .* do not name those of a bitmask of 4"):
        Feature(name="action", role="action", vocab_size=4, action_type="bitmask", bits=("click", "like", "buy"))


def test_action_and_time_are_optional() -> None:
    schema = make(features=(USER, ITEM))
    assert schema.action is None and schema.time is None and schema.contexts == ()


def test_counts() -> None:
    counts = count_statistics(np.array([3, 4, 9, 5]), 7)
    assert counts == {
        "users": 4,
        "items": 7,
        "events": 21,
        "seqlen_min": 3,
        "seqlen_max": 9,
        "seqlen_mean": 5.25,
        "seqlen_median": 4.5,
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"name": "../x", "role": "item", "vocab_size": 1}, "'../x'"),
        ({"name": "a", "role": "label", "vocab_size": 1}, "role 'label' is none of"),
        ({"name": "a", "role": "item"}, "vocab_size must be a positive integer, got None"),
        ({"name": "a", "role": "item", "vocab_size": 0}, "got 0"),
        ({"name": "a", "role": "item", "vocab_size": True}, "got True"),
        ({"name": "a", "role": "time", "vocab_size": 4}, "a time has no vocab_size"),
        ({"name": "a", "role": "action", "vocab_size": 4}, "action_type None"),
        ({"name": "a", "role": "item", "vocab_size": 4, "action_type": "bitmask"}, "role 'item'"),
        ({"name": "a", "role": "action", "vocab_size": 4, "action_type": "stars"}, "'stars'"),
        ({"name": "a", "role": "action", "vocab_size": 6, "action_type": "bitmask"}, "power of two"),
        ({"name": "a", "kind": "numeric", "statistics": NUMBERS}, "level None is none of user, event, item"),
        ({"name": "a", "level": "event", "kind": "float"}, "kind 'float' is none of categorical, multi"),
        ({"name": "a", "role": "item", "vocab_size": 1, "kind": "text"}, "kind 'text' with role 'item'"),
        ({"name": "a", "level": "item", "kind": "categorical"}, "vocab_size must be a positive integer, got None"),
        ({"name": "a", "level": "item", "kind": "multi", "vocab_size": 3}, "num_ids must be an integer, got None"),
        ({"name": "a", "level": "item", "kind": "vector"}, "width must be a positive integer, got None"),
        ({"name": "a", "level": "item", "kind": "vector", "width": 3, "vocab_size": 3}, "vocab_size 3 with kind 'vec"),
        ({"name": "a", "level": "event", "kind": "numeric"}, "statistics None with kind 'numeric'"),
        (
            {"name": "a", "level": "user", "kind": "categorical", "vocab_size": 3, "known_at_request": False},
            "known_at_request False with level 'user'",
        ),
    ],
)
def test_wrong_features_are_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Feature(**fields)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": (USER,)}, "0 features of role 'item'"),
        ({"features": (USER, USER, ITEM)}, "'user_id' appears twice"),
        (
            {
                "features": (
                    USER,
                    ITEM,
                    *(
                        Feature(name=n, level="item", kind="categorical", vocab_size=v, table="t")
                        for n, v in (("a", 3), ("b", 4))
                    ),
                )
            },
            "features of table 't' differ in vocab_size",
        ),
        (
            {
                "features": (
                    USER,
                    ITEM,
                    *(
                        Feature(name=n, level="item", kind="categorical", vocab_size=3, table=t)
                        for n, t in (("a", "b"), ("b", "c"))
                    ),
                )
            },
            "feature 'b' is not of the table of that name",
        ),
        ({"counts": {**COUNTS, "events": None}}, r"counts\['events'\]"),
        ({"counts": {**COUNTS, "seqlen_mean": float("nan")}}, r"counts\['seqlen_mean'\]"),
    ],
)
def test_wrong_schemas_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mean": float("nan")}, "no finite number"),
        ({"std": -1.0}, "no negative deviation"),
        ({"quantiles": (0.0, 1.0)}, "101 ascending quantiles"),
        ({"quantiles": tuple(np.linspace(2, 1, 101).tolist())}, "101 ascending quantiles"),
    ],
)
def test_wrong_statistics_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Statistics(**{"mean": 1.5, "std": 0.5, "quantiles": NUMBERS.quantiles} | changes)


def test_broken_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"schema.json: no such file.*preprocessor.py"):
        Schema.load(tmp_path)
    make().save(tmp_path)
    path = tmp_path / "schema.json"
    record = json.loads(path.read_text())
    for broken, message in (
        ("{", "Expecting"),
        (json.dumps({**record, "version": 99}), "version 99"),
        (json.dumps({**record, "colour": 1}), "colour"),
        (json.dumps({**record, "features": 3}), "schema.json"),
        (json.dumps([1]), "schema.json"),
    ):
        path.write_text(broken)
        with pytest.raises(ValueError, match=message) as error:
            Schema.load(tmp_path)
        assert str(path) in str(error.value)
