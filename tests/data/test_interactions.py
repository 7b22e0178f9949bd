from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from hstu.data import EncodedDataset, SequenceDataset
from hstu.data.files import blocks as module
from hstu.data.log_encoder import EncodingOptions
from hstu.data.table import preprocess_interactions
from tests.samples import read_back

SPEC = {"name": "log", "time_column": "t", "action_column": "a"}


def log(num_users: int = 30, num_items: int = 25, events: int = 600, seed: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user_id": rng.integers(0, num_users, events) * 7,
            "item_id": rng.integers(0, num_items, events) * 3,
            "t": rng.integers(0, 40, events),  # many ties
            "a": rng.integers(1, 6, events),
            "line": np.arange(events),
        }
    )


def encode(frame: pl.DataFrame, users: pl.DataFrame | None = None, **options) -> EncodedDataset:
    with tempfile.TemporaryDirectory() as folder:
        preprocess_interactions(frame, data_dir=folder, users=users, **SPEC | options)
        return read_back(Path(folder) / "log")


def sequences(dataset: EncodedDataset, name: str) -> list[np.ndarray]:
    return np.split(dataset.events[name], np.cumsum(dataset.lengths)[:-1])


def originals(dataset: EncodedDataset, name: str) -> np.ndarray:
    return np.array(dataset.vocabularies[name].to_pylist())


def by_hand(frame: pl.DataFrame, column: str) -> list[list]:
    """A user's values in time order, ties by row: with Python's stable sort."""
    rows = sorted(frame.iter_rows(named=True), key=lambda row: (row["user_id"], row["t"]))
    users = sorted({row["user_id"] for row in rows})
    return [[row[column] for row in rows if row["user_id"] == user] for user in users]


def test_events_are_in_time_order_and_ties_in_row_order() -> None:
    frame = log(events=30_000)  # few would be sorted stably even by an unstable sort
    dataset = encode(frame)
    for name, column in (("item_id", "item_id"), ("action", "a")):
        decoded = [originals(dataset, name)[ids].tolist() for ids in sequences(dataset, name)]
        assert decoded == by_hand(frame, column)
    assert [times.tolist() for times in sequences(dataset, "timestamp")] == by_hand(frame, "t")


@pytest.mark.parametrize("scale", [1, 2**57])
def test_order_does_not_depend_on_how_it_is_sorted(scale: int) -> None:
    # Times so far apart that user and time do not fit into one sort key, and floats, take another way.
    frame = log()
    expected = encode(frame).events["item_id"]
    for times in (pl.col("t") * scale, pl.col("t").cast(pl.Float64)):
        np.testing.assert_array_equal(encode(frame.with_columns(times.alias("t"))).events["item_id"], expected)


def test_fractions_of_a_second_count_in_the_order() -> None:
    frame = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [10, 20, 30], "t": [5.9, 5.1, 5.5], "a": [0, 0, 0]})
    dataset = encode(frame)
    assert dataset.events["item_id"].tolist() == [1, 2, 0]
    assert dataset.events["timestamp"].tolist() == [5, 5, 5]


def test_without_times_the_order_is_that_of_the_rows() -> None:
    frame = log()
    dataset = encode(frame, time_column=None)
    expected = frame.sort("user_id", "line")["item_id"].to_list()
    assert originals(dataset, "item_id")[dataset.events["item_id"]].tolist() == expected
    assert dataset.schema.time is None and "timestamp" not in dataset.events


@pytest.mark.parametrize("shift", [2**24, 2**40, 2**62 - 600])
def test_large_ids_stay_apart(shift: int, tmp_path: Path) -> None:
    # Neighbours that a 32-bit (2**24, 2**40) or 64-bit (2**62) float would merge.
    frame = log(events=900).with_columns(pl.col("item_id") + shift, pl.col("user_id") + shift)
    preprocess_interactions(frame, data_dir=tmp_path, **SPEC)
    dataset = SequenceDataset.open(tmp_path / "log")
    assert dataset.vocabulary("item_id").tolist() == sorted(set(frame["item_id"]))
    assert dataset.vocabulary("user_id").tolist() == sorted(set(frame["user_id"]))
    batch = dataset.gather(np.arange(30), np.zeros(30), dataset.lengths)
    decoded = dataset.vocabulary("item_id")[batch.items]
    assert decoded.tolist() == sum(by_hand(frame, "item_id"), [])


def test_categorical_actions_are_ranks_and_masks_are_themselves() -> None:
    frame = log().with_columns(a=pl.col("a") / 2)
    dataset = encode(frame)
    assert dataset.schema.action.vocab_size == 5
    assert originals(dataset, "action").tolist() == [0.5, 1.0, 1.5, 2.0, 2.5]
    masks = encode(log().with_columns(a=pl.col("a") * 2), action_type="bitmask")
    assert masks.schema.action.vocab_size == 16  # the largest is 10: four bits
    assert set(masks.events["action"]) == {2, 4, 6, 8, 10} and "action" not in masks.vocabularies
    zeros = encode(log().with_columns(a=0), action_type="bitmask")
    assert zeros.schema.action.vocab_size == 2


def test_pandas_polars_and_text_give_the_same_data_set() -> None:
    frame = log()
    expected = encode(frame)
    text = frame.with_columns(pl.all().cast(pl.String))
    for other in (pl.from_pandas(pd.DataFrame(frame.to_dicts())), text):
        found = encode(other)
        assert found.schema == expected.schema
        for name in expected.events:
            np.testing.assert_array_equal(found.events[name], expected.events[name])


def test_pandas_is_taken_as_it_is(tmp_path: Path) -> None:
    schema = preprocess_interactions(pd.DataFrame(log().to_dicts()), data_dir=tmp_path, **SPEC)
    assert SequenceDataset.open(tmp_path / "log").schema == schema


def test_every_column_of_the_users_becomes_a_context() -> None:
    frame = log()
    users = pl.DataFrame(
        {
            "city": [f"c{k % 4}" for k in range(40)],
            "user_id": [str(7 * k) for k in range(39, -1, -1)],  # other order, other type, ten too many
            "age": np.arange(40) % 3 + 20,
        }
    )
    dataset = encode(frame, users)
    assert [feature.name for feature in dataset.schema.contexts] == ["city", "age"]
    expected = dict(zip(users["user_id"], users["city"], strict=True))
    cities = originals(dataset, "city")[dataset.contexts["city"]]
    assert cities.tolist() == [expected[str(user)] for user in originals(dataset, "user_id")]
    assert originals(dataset, "age").tolist() == [20, 21, 22]


def k_core(rows: list[tuple], least_user: int, least_item: int) -> list[tuple]:
    """Drop one user or item after the other until every one has enough events."""
    while True:
        users, items = [row[0] for row in rows], [row[1] for row in rows]
        for row in rows:
            if users.count(row[0]) < least_user:
                rows = [other for other in rows if other[0] != row[0]]
                break
            if items.count(row[1]) < least_item:
                rows = [other for other in rows if other[1] != row[1]]
                break
        else:
            return rows


def test_filters_repeat_until_stable() -> None:
    frame = log(num_users=40, num_items=40, events=290, seed=3)
    expected = k_core(list(frame.iter_rows()), 5, 5)
    once = frame.filter((pl.len().over("user_id") >= 5) & (pl.len().over("item_id") >= 5))
    assert 0 < len(expected) < once.height < frame.height  # one pass would not do
    dataset = encode(frame, min_user_events=5, min_item_events=5)
    assert dataset.schema.counts["events"] == len(expected)
    assert originals(dataset, "user_id").tolist() == sorted({row[0] for row in expected})
    assert originals(dataset, "item_id").tolist() == sorted({row[1] for row in expected})


def test_duplicates() -> None:
    frame = log().drop("line")
    frame = frame.unique(maintain_order=True)
    twice = pl.concat([frame, frame[5:8]])
    with pytest.raises(
        ValueError, match=rf"3 rows repeat .* is row {frame.height + 1} .*--duplicates drop or --duplicates keep"
    ):
        encode(twice)
    assert encode(twice, duplicates="drop").schema == encode(frame).schema
    assert encode(twice, duplicates="keep").schema.counts["events"] == frame.height + 3
    # Rows that differ in a column without a role are no duplicates.
    assert encode(twice.with_row_index("n")).schema.counts["events"] == frame.height + 3


def short_users(frame: pl.DataFrame) -> pl.DataFrame:
    rare = {"user_id": [901, 902, 902], "item_id": [0, 0, 3], "t": [1, 1, 1], "a": [1, 1, 1], "line": [-1, -2, -3]}
    return pl.concat([frame, pl.DataFrame(rare)])


def test_users_with_few_events_stay_and_can_be_dropped(caplog: pytest.LogCaptureFixture) -> None:
    frame = short_users(log())
    with caplog.at_level("INFO"):
        assert encode(frame, file="log.csv").lengths.min() == 1
    assert "log.csv: 2 of 32 users have fewer than 3 events" in caplog.text
    assert "--min_user_events 3" in caplog.text
    assert encode(frame, min_user_events=3).schema == encode(log()).schema


def with_null(name: str) -> pl.DataFrame:
    return log().with_columns(pl.when(pl.col("line") == 16).then(None).otherwise(pl.col(name)).alias(name))


@pytest.mark.parametrize(
    ("frame", "options", "message"),
    [
        (log(), {"item_column": "sku"}, "column 'sku' is missing; present: user_id, item_id, t, a, line"),
        (log().clear(), {}, "has no rows"),
        (with_null("item_id"), {}, "column 'item_id', row 17: value None is missing"),
        (with_null("t"), {}, "column 't', row 17: value None is missing"),
        (with_null("a"), {}, "column 'a', row 17: value None is missing"),
        (log(), {"min_user_events": 1000}, "no event passes --min_user_events 1000"),
    ],
)
def test_wrong_tables_are_refused(frame: pl.DataFrame, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^log.csv: .*{message}") as error:
        encode(frame, file="log.csv", **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action_type": "stars"}, "action_type is 'stars', must be one of categorical, bitmask"),
        ({"duplicates": "maybe"}, "duplicates is 'maybe'"),
        ({"min_user_events": -1}, "min_user_events is -1"),
        ({"item_column": "user_id"}, "'user_id' is named for two roles"),
        ({"name": "a/b"}, "'a/b'"),
    ],
)
def test_wrong_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(log(), **options)


def users_table() -> pl.DataFrame:
    return pl.DataFrame({"user_id": np.arange(30) * 7, "city": ["x"] * 30})


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (users_table().rename({"user_id": "id"}), "column 'user_id' is missing; present: id, city"),
        (users_table()[:-2], "2 of 30 users of log.csv are missing .for example 196"),
        (pl.concat([users_table(), users_table()[3:4]]), "row 31: user 21 appears twice"),
        (users_table().with_columns(city=None), "column 'city', row 1: value None is missing"),
    ],
)
def test_wrong_users_are_refused(users: pl.DataFrame, message: str) -> None:
    with pytest.raises(ValueError, match=f"^users.csv: .*{message}"):
        encode(log(), users, file="log.csv", users_file="users.csv")


def test_a_context_named_like_another_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="'item_id' appears twice; rename one"):
        encode(log(), users_table().rename({"city": "item_id"}))


WHOLE_COLUMNS = [
    # Each column is what it is as a whole, though its first block looks otherwise.
    {"user_id": [str(7 * k % 35) for k in range(39)] + ["x"]},
    {"item_id": [str(k % 9) for k in range(39)] + ["007"]},
    {"a": [str(k % 5) for k in range(39)] + ["like"]},
    {"a": [str(k % 5) for k in range(39)] + ["2.5"]},
    {"t": [str(k) for k in range(39)] + ["5.5"]},
    {"t": [1_700_000_000_000 + k for k in range(40)]},
    {"t": ["1700000000001.5"] + [f"{1_700_000_000_000 - 700 * k}" for k in range(39)]},
    {"t": [f"2024-05-{k % 28 + 1:02}T12:00:00Z" for k in range(39)] + ["2024-05-30"]},
]


def small_log(**columns: list) -> pl.DataFrame:
    whole = {"user_id": [k % 4 for k in range(40)], "item_id": [k % 7 for k in range(40)]}
    return pl.DataFrame(whole | {"t": list(range(40)), "a": [k % 3 for k in range(40)]} | columns)


@pytest.mark.parametrize("columns", WHOLE_COLUMNS)
def test_blocks_make_no_difference(columns: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = encode(small_log(**columns))
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    blocks = encode(small_log(**columns))
    assert blocks.schema == whole.schema and blocks.vocabularies == whole.vocabularies
    for name in whole.events:
        np.testing.assert_array_equal(blocks.events[name], whole.events[name])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"item_id": ["1"] * 30 + [None] + ["x"] * 9}, "column 'item_id', row 31: value None is missing"),
        ({"user_id": ["1"] * 30 + [" "] + ["x"] * 9}, "column 'user_id', row 31: value ' ' is empty"),
        ({"t": ["17"] * 33 + ["noon"] + ["18"] * 6}, "column 't', row 34: value 'noon' is no time"),
        ({"t": [1_700_000_000_000] * 35 + [1_700_000_000] * 5}, "row 36: value 1700000000 is no time in milliseconds"),
        ({"a": ["1"] * 20 + ["nan"] * 20}, "column 'a', row 21: value nan is not finite"),
    ],
)
def test_rows_of_later_blocks_are_named(columns: dict, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 7)
    with pytest.raises(ValueError, match=message):
        encode(small_log(**columns), duplicates="keep")


@pytest.mark.parametrize("rows", [1 << 18, 7])
def test_repeated_rows_are_found_wherever_they_are(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows)
    frame = small_log()
    twice = pl.concat([frame[:20], frame[3:5], frame[20:], frame[3:4]])
    with pytest.raises(
        ValueError, match=r"3 rows repeat an earlier one in every column, the first is row 21 \(3, 3, 3, 0\)"
    ):
        encode(twice)
    dropped, wanted = encode(twice, duplicates="drop", min_item_events=6), encode(frame, min_item_events=6)
    assert dropped.schema == wanted.schema and dropped.schema.counts["events"] < 40
    for name in wanted.events:
        np.testing.assert_array_equal(dropped.events[name], wanted.events[name])


def test_every_row_is_an_event_or_counted_as_dropped(caplog: pytest.LogCaptureFixture) -> None:
    frame = pl.DataFrame(
        {
            "user_id": ["1", "NA", "1", "2", "", "2", "2", "nan", "2", "1", None],
            "item_id": ["5", "5", "6", "None", "6", "7", "8", "8", "8", "7", "5"],
            "t": [1, 2, None, 4, 5, 6, 7, 8, 7, 9, 10],
            "a": [1, 1, 1, 1, 1, 1, 0, 1, 0, 1, 1],
        }
    )
    with pytest.raises(ValueError, match="log.csv: column 'user_id', row 11: value None is missing; .*--missing drop"):
        encode(frame, file="log.csv")
    with pytest.raises(ValueError, match="row 5: value '' is empty; .*--missing drop"):
        encode(frame[:10], file="log.csv")
    with pytest.raises(ValueError, match="row 2: value 'NA' stands for a missing id; .*--missing drop.*--missing keep"):
        encode(frame[:4], file="log.csv")
    with caplog.at_level("INFO"):
        dataset = encode(frame, file="log.csv", missing="drop", duplicates="drop", max_user_events=1)
    assert "11 rows in, 2 events out, dropped: 4 without 'user_id', 1 without 'item_id', 1 without 't'; " in caplog.text
    assert "1 duplicates; 2 by the filters" in caplog.text
    assert originals(dataset, "user_id").tolist() == [1, 2]  # numbers, once what is none is gone
    kept = encode(frame[:2].with_columns(item_id=pl.lit("None")), missing="keep")
    assert originals(kept, "user_id").tolist() == ["1", "NA"] and originals(kept, "item_id").tolist() == ["None"]


@pytest.mark.parametrize("role", ["user_id", "item_id"])
def test_padded_ids_are_refused(role: str) -> None:
    frame = log().with_columns(pl.format("x{}", role).alias(role))
    frame = frame.with_columns(pl.when(pl.col("line") == 9).then(pl.lit("x1 ")).otherwise(role).alias(role))
    with pytest.raises(ValueError, match=f"column '{role}', row 10: value 'x1 ' is padded with blanks; remove them"):
        encode(frame)


def test_rows_after_dropped_ones_are_named_by_their_place() -> None:
    frame = log().with_columns(pl.col("user_id").cast(pl.String), a=pl.lit(1.0))
    frame = frame.with_columns(pl.when(pl.col("line") < 9).then(None).otherwise("user_id").alias("user_id"))
    frame = frame.with_columns(pl.when(pl.col("line") == 20).then(float("inf")).otherwise("a").alias("a"))
    with pytest.raises(ValueError, match="column 'a', row 21: value inf is not finite"):
        encode(frame, missing="drop")


def test_columns_of_yes_and_no_become_the_named_bits_of_a_mask() -> None:
    frame = log().with_columns(
        click=pl.col("line") % 2,
        like=pl.col("line") % 3 == 0,
        buy=pl.when(pl.col("line") % 5 == 0).then(7).otherwise(0),
    )
    dataset = encode(frame, action_column="click, like,buy")
    action = dataset.schema.action
    assert (action.action_type, action.vocab_size, action.bits) == ("bitmask", 8, ("click", "like", "buy"))
    masks = frame.select("user_id", "t", "line", mask=(pl.col("line") % 2) + 2 * (pl.col("line") % 3 == 0)
                         + 4 * (pl.col("line") % 5 == 0)).sort("user_id", "t", "line")["mask"]  # fmt: skip
    assert dataset.events["action"].tolist() == masks.to_list()
    words = frame.with_columns(click=pl.col("click").cast(pl.String), like=pl.col("like").cast(pl.String))
    np.testing.assert_array_equal(encode(words, action_column="click,like,buy").events["action"], masks)
    for column, value in (("buy", -1), ("click", "often"), ("like", "nan")):
        wrong = frame.with_columns(
            pl.when(pl.col("line") == 7)
            .then(pl.lit(str(value)))
            .otherwise(pl.col(column).cast(pl.String))
            .alias(column)
        )
        with pytest.raises(ValueError, match=f"column '.*{column}.*', row 8: value"):
            encode(wrong, action_column="click,like,buy")
    with pytest.raises(ValueError, match="column 'share' is missing"):
        encode(frame, action_column="click,share")


def test_a_continuous_column_is_no_action() -> None:
    frame = log().with_columns(a=pl.col("line") / 7)
    with pytest.raises(ValueError, match="column 'a' has more than 256 values, an action is one of a few classes; cut"):
        encode(frame)
    assert encode(frame.with_columns(a=pl.col("line") % 256 / 7)).schema.action.vocab_size == 256
    with pytest.raises(ValueError, match="column 'a' has 40 values in 40 rows, an action is one of a few classes; cut"):
        encode(frame.head(40))
    assert encode(frame.head(20)).schema.action.vocab_size == 20


@pytest.mark.parametrize(
    ("times", "time_format"),
    [
        (["2019-10-01 00:00:00 UTC", "2019-10-01 01:00:00 GMT", "2019-10-01 04:00:00 +0200"], None),
        (["01.10.2019 00:00", "01.10.2019 01:00", "01.10.2019 02:00"], "%d.%m.%Y %H:%M"),
        (["10/01/2019 12:00:00 AM", "10/01/2019 01:00:00 AM", "10/01/2019 02:00:00 AM"], "%m/%d/%Y %I:%M:%S %p"),
        ([201910010000, 201910010100, 201910010200], "%Y%m%d%H%M"),
    ],
)
def test_times_in_words_and_formats(times: list, time_format: str | None) -> None:
    frame = pl.DataFrame({"user_id": [1, 1, 1], "item_id": [5, 6, 7], "t": times, "a": [1, 0, 1]})
    dataset = encode(frame, time_format=time_format)
    assert dataset.events["timestamp"].tolist() == [1_569_888_000 + 3600 * hour for hour in range(3)]
    wrong = frame.with_columns(t=pl.col("t").cast(pl.String).str.replace("2019", "20x9", literal=True))
    with pytest.raises(ValueError, match="column 't', row 1: value .* (is no time|does not follow --time_format)"):
        encode(wrong, time_format=time_format)


def test_one_row_a_user_with_lists(tmp_path: Path) -> None:
    frame = log()
    expected = encode(frame.drop("line"), duplicates="keep")
    lists = frame.group_by("user_id", maintain_order=True).agg("item_id", "t", "a")
    lists.write_parquet(tmp_path / "lists.parquet")
    lists.write_ndjson(tmp_path / "lists.jsonl")
    for table in (lists, tmp_path / "lists.parquet", tmp_path / "lists.jsonl"):
        found = encode(table)  # equal entries of a list are no repeated rows
        for name in expected.events:
            np.testing.assert_array_equal(found.events[name], expected.events[name])
    with pytest.raises(ValueError, match=r"row 1: \d+ values in column 't', \d+ in 'item_id'; give one for each item"):
        encode(lists.with_columns(t=pl.col("t").list.head(2)))
    with pytest.raises(ValueError, match="column 't' holds lists, the item column 'item_id' does not"):
        encode(lists.with_columns(item_id=1))


def test_consecutive_repeats_are_dropped_on_request() -> None:
    frame = log(num_users=5, num_items=3)
    kept, dropped = encode(frame), encode(frame, consecutive_repeats="drop")
    wanted = [
        [item for k, item in enumerate(items) if k == 0 or item != items[k - 1]] for items in by_hand(frame, "item_id")
    ]
    assert [originals(dropped, "item_id")[ids].tolist() for ids in sequences(dropped, "item_id")] == wanted
    assert dropped.lengths.tolist() == list(map(len, wanted)) and dropped.lengths.sum() < kept.lengths.sum()
    recent = encode(frame, consecutive_repeats="drop", max_user_events=4)
    assert [originals(recent, "item_id")[ids].tolist() for ids in sequences(recent, "item_id")] == [
        w[-4:] for w in wanted
    ]


def test_sessions_without_users() -> None:
    frame = log()
    renamed = encode(frame.rename({"user_id": "visit"}), session_column="visit")
    assert renamed.schema.counts == encode(frame).schema.counts
    assert (renamed.events["item_id"] == encode(frame).events["item_id"]).all()
    with pytest.raises(ValueError, match="--session_column visit beside --user_column who: .*name:control"):
        encode(frame, session_column="visit", user_column="who")


@pytest.mark.parametrize("unit", [1, 1000, 0.5])
def test_sequences_are_cut_at_gaps(unit: float, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = log(num_users=6, events=120).with_columns(t=1_700_000_000 + pl.col("t") * 600)  # some just at the gap
    users = pl.DataFrame({"user_id": np.arange(7) * 7, "age": np.arange(7) + 20})
    wanted: dict[str, list[int]] = {}
    for user in sorted(frame["user_id"].unique()):
        rows = sorted(frame.filter(user_id=user).iter_rows(named=True), key=lambda row: row["t"])
        number = 0
        for before, row in zip([None, *rows], rows, strict=False):
            number += before is None or row["t"] - before["t"] > 30 * 60
            wanted.setdefault(f"{user}#{number}", []).append(row["item_id"])
    scaled = frame.with_columns(t=(pl.col("t") * unit).cast(pl.Int64) if unit > 1 else pl.col("t") / 1)
    pieces = partial(EncodingOptions, events_per_part=1, events_per_run=200)
    monkeypatch.setattr("hstu.data.table.EncodingOptions", pieces)
    options = {"session_gap": "30m", "user_features": "age:numeric", "duplicates": "keep"}
    found = encode(scaled, users, **options)
    names = originals(found, "user_id").tolist()
    assert len(wanted) > 12 and names == list(wanted)
    assert [originals(found, "item_id")[ids].tolist() for ids in sequences(found, "item_id")] == list(wanted.values())
    assert found.contexts["age"][:, 0].tolist() == [20 + int(name.split("#")[0]) // 7 for name in names]
    # Filters and repeats are of sessions.
    short = encode(scaled, users, min_user_events=3, **options)
    assert originals(short, "user_id").tolist() == [name for name in names if len(wanted[name]) >= 3]


def test_a_gap_is_checked() -> None:
    frame = log().with_columns(visit=1)
    for options, message in (
        ({"session_gap": "half an hour"}, "--session_gap 'half an hour' is no length of time; give one such as 30m"),
        ({"session_gap": "0m"}, "--session_gap '0m' is no length"),
        ({"session_gap": "30m", "time_column": None}, "--session_gap 30m needs the times of events; .*--time_column"),
        ({"session_gap": "30m", "session_column": "visit"}, "--session_gap 30m beside --session_column visit: leave"),
    ):
        with pytest.raises(ValueError, match=message):
            encode(frame, **options)
    with pytest.raises(ValueError, match=r"users: 30 of 30 users of interactions are missing \(for example 0\)"):
        encode(frame, pl.DataFrame({"user_id": [1], "age": [3]}), session_gap="1s")
