from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from hstu.data import Feature, Schema
from hstu.data.schema import count_statistics

USER = Feature(name="user_id", role="user", vocab_size=2)
ITEM = Feature(name="item_id", role="item", vocab_size=5)
COUNTS = count_statistics(np.array([3, 4]), 5)


def make(**changes) -> Schema:
    features = (
        USER,
        Feature(name="segment", role="context", vocab_size=3),
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
        ({"name": "a", "role": "label", "vocab_size": 1}, "role 'label'"),
        ({"name": "a", "role": "item"}, "vocab_size must be a positive integer, got None"),
        ({"name": "a", "role": "item", "vocab_size": 0}, "got 0"),
        ({"name": "a", "role": "item", "vocab_size": True}, "got True"),
        ({"name": "a", "role": "time", "vocab_size": 4}, "a time has no vocab_size"),
        ({"name": "a", "role": "action", "vocab_size": 4}, "action_type None"),
        ({"name": "a", "role": "item", "vocab_size": 4, "action_type": "bitmask"}, "role 'item'"),
        ({"name": "a", "role": "action", "vocab_size": 4, "action_type": "stars"}, "'stars'"),
        ({"name": "a", "role": "action", "vocab_size": 6, "action_type": "bitmask"}, "power of two"),
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
        ({"counts": {**COUNTS, "events": None}}, r"counts\['events'\]"),
        ({"counts": {**COUNTS, "seqlen_mean": float("nan")}}, r"counts\['seqlen_mean'\]"),
    ],
)
def test_wrong_schemas_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**changes)


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
