"""Declared features from tables to data sets: by hand, and what is refused."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hstu.data import EncodedDataset
from hstu.data.declarations import parse_declarations, suggest
from hstu.data.feature_codes import FeatureColumn, summarize
from hstu.data.interactions import InteractionSpec
from hstu.data.log_encoder import EncodingOptions
from hstu.data.table import preprocess_interactions
from hstu.data.values import Sets
from tests.samples import read_back

EVENTS = 400
DECLARED = (
    "price:numeric,brand:categorical,tags:multi,place:vector,watched:numeric:after,session:control,size:categorical"
)


def log(seed: int = 0) -> pl.DataFrame:
    """Random events; each feature lacks some values, and ``line`` is not declared."""
    rng = np.random.default_rng(seed)
    price = rng.lognormal(2, 1, EVENTS).round(2)
    lacking = rng.random((5, EVENTS)) < 0.1
    tags = [[f"t{k}" for k in rng.choice(7, rng.integers(0, 4), replace=False)] for _ in range(EVENTS)]
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, 20, EVENTS),
            "item_id": rng.integers(0, 15, EVENTS),
            "t": rng.permutation(EVENTS),
            "price": [None if lost else value for lost, value in zip(lacking[0], price.tolist(), strict=True)],
            "brand": [None if lost else f"b{rng.integers(6)}" for lost in lacking[1]],
            "tags": [None if lost else value for lost, value in zip(lacking[2], tags, strict=True)],
            "place": [None if lost else rng.random(3).tolist() for lost in lacking[3]],
            "watched": rng.integers(0, 100, EVENTS),
            "session": [f"s{k}" for k in range(EVENTS)],
            "size": [None if lost else int(rng.integers(3, 12)) for lost in lacking[4]],
            "line": np.arange(EVENTS),
        }
    )


USERS = pl.DataFrame({"user_id": range(20), "age": [None, *range(19)], "likes": ["b1|b9", "", *["b2"] * 18],
                      "note": ["x"] * 20})  # fmt: skip
ITEMS = pl.DataFrame(
    {"item_id": range(15), "title": ["", *(f"item {k}" for k in range(14))], "kind": ["a", "b", "c"] * 5}
)
SPEC = {"name": "log", "time_column": "t", "event_features": DECLARED}


def encode(frame: pl.DataFrame | Path, **options) -> EncodedDataset:
    with tempfile.TemporaryDirectory() as folder:
        preprocess_interactions(frame, data_dir=folder, **SPEC | options)
        return read_back(Path(folder) / "log")


def decoded(dataset: EncodedDataset, name: str) -> list:
    """The original values of a feature, None where one is missing."""
    (feature,) = (feature for feature in dataset.schema.features if feature.name == name)
    values = (dataset.contexts | dataset.events | dataset.categories)[name]
    if not feature.has_ids:
        return [None if np.isnan(row).any() else row.tolist() for row in values]
    known = [*dataset.vocabularies[feature.table].to_pylist(), None]
    if isinstance(values, Sets):
        return [[known[k] for k in part] for part in np.split(values.ids, values.offsets[1:-1])]
    return [known[k] for k in values]


def by_hand(frame: pl.DataFrame, column: str) -> list:
    rows = sorted(frame.iter_rows(named=True), key=lambda row: (row["user_id"], row["t"]))
    return [row[column] for row in rows]


def check(dataset: EncodedDataset, frame: pl.DataFrame) -> None:
    singles = {name: [value and [value] for value in by_hand(frame, name)] for name in ("price", "watched")}
    singles["watched"] = [[float(value)] for value in by_hand(frame, "watched")]
    for name, expected in (singles | {"place": by_hand(frame, "place")}).items():
        rounded = [value and [float(np.float32(number)) for number in value] for value in expected]
        assert decoded(dataset, name) == rounded
    for name in ("brand", "session", "size"):
        assert decoded(dataset, name) == by_hand(frame, name)
    assert decoded(dataset, "tags") == [value or [] for value in by_hand(frame, "tags")]


def test_events_have_the_values_of_their_rows() -> None:
    frame = log()
    dataset = encode(frame)
    check(dataset, frame)
    features = {feature.name: feature for feature in dataset.schema.features}
    assert "line" not in features and features["session"].role == "control" and features["place"].width == 3
    assert dataset.vocabularies["size"].to_pylist() == list(range(3, 12))
    assert [name for name, feature in features.items() if not feature.known_at_request] == ["watched"]
    numbers, known = frame["price"].drop_nulls().to_numpy(), features["price"].statistics
    assert known is not None and np.isclose(known.mean, numbers.mean()) and np.isclose(known.std, numbers.std())
    np.testing.assert_allclose(known.quantiles, np.quantile(numbers, np.linspace(0, 1, 101)), rtol=1e-6)
    assert features["tags"].num_ids == sum(len(tags) for tags in frame["tags"] if tags is not None)


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl", "lists"])
def test_all_formats_give_the_same_values(tmp_path: Path, kind: str) -> None:
    frame, path = log(), tmp_path / f"log.{'parquet' if kind == 'lists' else kind}"
    if kind == "csv":
        as_text = [pl.col(name).cast(pl.List(pl.String)).list.join("|") for name in ("tags", "place")]
        frame.with_columns(as_text).write_csv(path)
    elif kind == "parquet":
        frame.write_parquet(path)
    elif kind == "jsonl":
        frame.write_ndjson(path)
    else:
        frame.group_by("user_id").agg(pl.all()).write_parquet(path)
    check(encode(path), frame)


def test_small_runs_and_parts_give_the_same_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(log())
    monkeypatch.setattr("hstu.data.files.blocks.ROWS_AT_ONCE", 37)
    small = partial(EncodingOptions, events_per_run=50, events_per_part=60)
    monkeypatch.setattr("hstu.data.table.EncodingOptions", small)
    cut = encode(log())
    for name in ("price", "brand", "tags", "place", "session", "size"):
        assert decoded(cut, name) == decoded(whole, name)
    assert cut.schema.features[-3:] == whole.schema.features[-3:]


def test_users_and_items_have_what_their_tables_say(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    dataset = encode(
        log(),
        users=USERS,
        items=ITEMS,
        user_features="age:numeric,likes:multi:table=brands",
        item_features="title:text,kind:categorical",
        event_features=DECLARED.replace("brand:categorical", "brand:categorical:table=brands"),
    )
    assert decoded(dataset, "age") == [None, *([float(k)] for k in range(19))]
    assert decoded(dataset, "likes") == [["b1", "b9"], [], *[["b2"]] * 18]
    assert decoded(dataset, "brand") == by_hand(log(), "brand"), "from the vocabulary that it shares"
    assert dataset.vocabularies["brands"].to_pylist() == ["b0", "b1", "b2", "b3", "b4", "b5", "b9"]
    assert decoded(dataset, "title") == [title or None for title in ITEMS["title"]]
    assert decoded(dataset, "kind") == ITEMS["kind"].to_list()
    assert [feature.name for feature in dataset.schema.of("item")] == ["title", "kind"]
    assert "users: columns that are not declared are left out: note" in caplog.messages
    assert "interactions: columns that are not declared (--event_features) are left out: line" in caplog.messages


def test_filters_and_repeated_rows_take_the_features_along() -> None:
    frame = log().filter(pl.col("user_id") > 1)
    twice = pl.concat([frame, frame[::3]])
    dataset = encode(twice, duplicates="drop", max_user_events=5)
    latest = frame.sort("t").group_by("user_id", maintain_order=True).tail(5)
    check(dataset, latest)


def test_undeclared_tables_are_categories_and_a_line_says_what_they_look_like(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    items = ITEMS.with_columns(pl.col("title").str.replace("^$", "none"), genres=pl.lit("Adventure|Animation"))
    dataset = encode(log(), items=items)
    assert [feature.name for feature in dataset.schema.categories] == ["title", "kind", "genres"]
    (line,) = (message for message in caplog.messages if "--item_features" in message)
    assert line.endswith("--item_features title:text,kind:categorical,genres:multi")
    looks = [pl.Series("a", range(50)), pl.Series("b", [[0.5]]), pl.Series("c", [["x"]]), pl.Series("d", ["1.5"])]
    assert suggest(looks, "|") == "a:numeric,b:vector,c:multi,d:categorical"


def test_quantiles_of_many_numbers_are_those_of_a_fair_sample() -> None:
    rng = np.random.default_rng(0)
    (declaration,) = parse_declarations("x:numeric", "event")
    column, numbers = FeatureColumn(declaration, "f"), rng.standard_normal(600_000).astype(np.float32)
    for part, values in enumerate(np.split(np.sort(numbers), [100_000, 550_000])):  # unequal parts, of unlike numbers
        column.add(summarize(values[:, None], part))
    known = column.feature().statistics
    assert known is not None and abs(known.mean - numbers.mean()) < 1e-6 and abs(known.std - numbers.std()) < 1e-6
    assert (known.quantiles[0], known.quantiles[-1]) == (numbers.min(), numbers.max())
    # A quantile q of n numbers is off by sqrt(q (1 - q) / n) / density: 0.0025 at the median of 2**18.
    for place in (10, 50, 90):
        assert abs(known.quantiles[place] - np.quantile(numbers, place / 100)) < 4 * 0.0034


CASES: dict[str, tuple[dict, str]] = {
    "text": ({"price": ["cheap"] * EVENTS}, "column 'price', row 1: value 'cheap' is no number; .*price:categorical"),
    "nan": ({"price": [float("nan")] * EVENTS}, "column 'price', row 1: value nan is no finite number"),
    "infinite": ({"price": [1.0] * 9 + [float("inf")] * 391}, "column 'price', row 10: value inf is no finite number"),
    "large": ({"price": [1e39] * EVENTS}, r"column 'price', row 1: value 1e\+39 is no finite number of 32 bits"),
    "dates": ({"price": pl.Series([1] * EVENTS).cast(pl.Date)}, "column 'price' is Date, no number"),
    "empty number": ({"price": [None] * EVENTS}, "column 'price' has no value in any row; leave it out"),
    "classes": ({"brand": [f"b{k}" for k in range(EVENTS)]}, "'brand' has 400 values in 400 rows, .* brand:control"),
    "lists": ({"brand": [["a", "b"]] * EVENTS}, "column 'brand' holds lists"),
    "no class": ({"brand": [""] * EVENTS}, "column 'brand' has no value in any row"),
    "vector": ({"place": [[1.0, 2.0, 3.0]] * 7 + [[1.0]] * 393}, "column 'place', row 8: .* another length .* 3;"),
    "hole": ({"place": [[1.0, None, 3.0]] * EVENTS}, "column 'place', row 1: .* no finite number"),
    "endless": ({"place": [[1.0, float("inf"), 3.0]] * EVENTS}, "column 'place', row 1: .* no finite number"),
    "words": ({"place": ["1|x|3"] * EVENTS}, r"column 'place', row 1: value '1\|x\|3' holds what is no finite number"),
    "numbers": ({"place": [1.0] * EVENTS}, "column 'place' is Float64, no vector"),
    "fractions": ({"tags": [[0.5]] * EVENTS}, "column 'tags' holds lists of fractions; declare it tags:vector"),
    "member": (
        {"tags": ["a|b", "a||b"] * 200},
        r"'tags', row 2: value 'a\|\|b' has an empty member; .*--set_separator",
    ),
    "hidden": ({"tags": [["a", None]] * EVENTS}, "column 'tags', row 1: .* has an empty member"),
    "scalar": ({"tags": [1] * EVENTS}, "column 'tags' is Int64, no set"),
    "commas": ({"tags": [f"a{k},b" for k in range(EVENTS)]}, "'tags' has no set of two or more, and 400 values"),
    "no set": ({"tags": [[]] * EVENTS}, "column 'tags' has no value in any row"),
}


@pytest.mark.parametrize("case", CASES)
def test_values_that_do_not_fit_are_refused(case: str, tmp_path: Path) -> None:
    columns, message = CASES[case]
    frame = log().with_columns(pl.Series(name, values, strict=False) for name, values in columns.items())
    with pytest.raises(ValueError, match=message) as error:
        preprocess_interactions(frame, data_dir=tmp_path, **SPEC)
    assert "\n" not in str(error.value) and str(error.value).startswith("interactions: ")
    assert not (tmp_path / "log").exists() or not any((tmp_path / "log").iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event_features": "price"}, "--event_features: 'price' names no kind; write name:kind"),
        ({"event_features": "price:float"}, "'float' is no kind; choose one of categorical, multi, numeric"),
        ({"event_features": "price:numeric,price:multi"}, "'price' is declared twice"),
        ({"event_features": "price:numeric:before"}, "'before' is no option of it"),
        ({"event_features": "price:numeric:table=t"}, "'table=t' is no option of it"),
        ({"user_features": "age:numeric:after"}, "--user_features: .* 'after' is for features of events"),
        ({"user_features": "age:numeric"}, "--user_features needs --users"),
        (
            {"event_features": "cost:numeric"},
            "column 'cost' is missing; present: .*; name one of them, or",
        ),
        ({"item_features": "colour:categorical"}, "items: column 'colour' is missing; present: "),
        ({"event_features": "t:numeric"}, "'t' is named for two roles"),
        ({"event_features": "action:numeric", "action_column": "size"}, "has another feature 'action'"),
        ({"event_features": "tags:multi", "item_features": "tags:multi"}, "another feature 'tags'; rename the column"),
        ({"event_features": "brand:categorical:table=item_id"}, "table=item_id is none of features"),
        (
            {"event_features": "brand:categorical:table=tags,tags:multi:table=brand"},
            "table=.* is the name of a feature of another table",
        ),
        ({"set_separator": ""}, "--set_separator is empty"),
    ],
)
def test_wrong_declarations_are_refused(options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as error:
        preprocess_interactions(log(), data_dir=tmp_path, items=ITEMS, **SPEC | {"event_features": ""} | options)
    assert "\n" not in str(error.value)


def test_declarations_are_read() -> None:
    spec = InteractionSpec(name="x", event_features=" price : numeric , seen:categorical:after:table=flags ")
    price, seen = spec.declared("event")
    assert (price.name, price.kind, price.table, price.known_at_request) == ("price", "numeric", "price", True)
    assert (seen.name, seen.kind, seen.table, seen.known_at_request) == ("seen", "categorical", "flags", False)
