"""Features in files of histories: those of a data set that is written out are read back as they were."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hstu.data import SequenceDataset, Split
from hstu.data.collate import Collator
from hstu.data.files import FileFormat
from hstu.data.request_features import read_features
from hstu.data.request_files import HistoryColumns, read_frame, read_histories
from hstu.data.values import Sets, Values
from tests.data.test_feature_batch import listed
from tests.samples import declared_features, make_dataset

LENGTHS = (3, 4, 12)
NAMES = ("income", "face", "likes", "device", "price", "place", "tags", "watched", "marks")
COLUMNS = HistoryColumns(user="user", item="item", time="time", action="action", contexts=("age",), use_actions=False,
                         has_unknown=False, features=NAMES)  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    words = {"device": ["phone", "tv", "web", "car", "app"], "likes": ["a", "b", "c", "d", "e", "f"]}
    folder = tmp_path_factory.mktemp("data") / "small"
    return make_dataset(folder, LENGTHS, declared=declared_features(), originals=words)


def written(dataset: SequenceDataset) -> pl.DataFrame:
    """All histories, one row per event, in original values."""
    users = np.arange(len(LENGTHS))
    found = dataset.gather(users, users * 0, dataset.lengths, NAMES)
    row = np.repeat(users, LENGTHS)
    columns = {"user": row, "item": found.items, "time": found.times, "age": found.contexts["age"][row]}
    for name, values in (found.of_users | found.of_events).items():
        feature = next(feature for feature in dataset.schema.features if feature.name == name)
        originals = listed(values)
        if feature.has_ids:
            known = [*dataset.vocabulary(name).tolist(), None]
            originals = [[known[k] for k in ids] if isinstance(ids, list) else known[ids] for ids in originals]
        elif feature.kind == "numeric":
            originals = [value and value[0] for value in originals]
        columns[name] = pl.Series([originals[user] for user in row] if name in found.of_users else originals)
    return pl.DataFrame(columns)


def same(left: Values, right: Values) -> bool:
    pairs = zip(left, right, strict=True) if isinstance(left, Sets) else [(left, right)]
    return all(np.array_equal(a, b, equal_nan=a.dtype.kind == "f") for a, b in pairs)


@pytest.mark.parametrize("kind", ["parquet", "csv", "lists"])
def test_what_is_written_is_read_back(dataset: SequenceDataset, tmp_path: Path, kind: str) -> None:
    frame = written(dataset)
    path = tmp_path / f"histories.{'csv' if kind == 'csv' else 'parquet'}"
    if kind == "csv":
        nested = [name for name, dtype in frame.schema.items() if dtype.is_nested()]
        frame.with_columns(pl.col(nested).cast(pl.List(pl.String)).list.join("|")).write_csv(path)
    elif kind == "parquet":
        frame[::-1].write_parquet(path)
    else:
        frame.group_by("user", maintain_order=True).agg(pl.all().exclude("age"), pl.first("age")).write_parquet(path)
    read = read_frame(path, COLUMNS, FileFormat(), name=str(path))
    histories, users = read_histories(str(path), read, dataset, COLUMNS)
    rows = users.to_numpy()
    found = histories.gather(np.arange(3), np.zeros(3, np.int64), histories.lengths, NAMES)
    wanted = dataset.gather(rows, rows * 0, dataset.lengths[rows], NAMES)
    assert (found.items == wanted.items).all() and (found.contexts["age"] == wanted.contexts["age"]).all()
    for name in NAMES:
        left, right = ((x.of_users | x.of_events)[name] for x in (found, wanted))
        assert same(left, right), name
    # And the collator takes them as it takes those of a data set.
    collator = Collator(task="retrieval", max_history=9, user_features=NAMES[:3], event_features=NAMES[3:])
    split = Split(name="test", users=np.arange(3), stop=histories.lengths)
    batch = collator(histories, split, np.arange(3), np.arange(3), 0)
    assert [*batch.numbers] == ["price", "place", "watched", "income", "face"]


def test_values_that_the_data_set_lacks_are_missing_and_counted(
    dataset: SequenceDataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    device, tags = (f for f in dataset.schema.features if f.name in ("device", "tags"))
    frame = pl.DataFrame({"device": ["tv", "fridge", None], "tags": ["a|zz|c", "", "zz"]})
    found = read_features(frame, (device, tags), dataset, "f.csv", absent="error", separator="|")
    assert listed(found["device"]) == [1, 5, 5] and listed(found["tags"]) == [[0, 2], [], []]
    assert (
        "f.csv: column 'tags': 2 values that the data set lacks ('zz', for example) are read as missing" in caplog.text
    )
    assert "column 'device': 1 values that the data set lacks ('fridge', for example)" in caplog.text


def test_a_feature_that_is_missing_is_refused_or_allowed(
    dataset: SequenceDataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    frame = written(dataset).drop("price", "likes", "tags", "face")
    with pytest.raises(ValueError, match="f: column 'face' is missing, .*--missing_features allow; present: user"):
        read_histories("f", frame, dataset, COLUMNS)
    histories, _ = read_histories("f", frame, dataset, replace(COLUMNS, missing_features="allow"))
    found = histories.gather(np.arange(3), np.zeros(3, np.int64), histories.lengths, NAMES)
    assert set(listed(found.of_events["price"])) == {None} and listed(found.of_users["likes"]) == [[], [], []]
    assert "f: column 'tags' is missing: the model reads none of its values" in caplog.messages
    with pytest.raises(ValueError, match="f: column 'age' is missing"):
        read_histories("f", frame.drop("age"), dataset, replace(COLUMNS, missing_features="allow"))
    known = replace(COLUMNS, missing_features="allow", has_unknown=True)
    histories, _ = read_histories("f", frame.drop("age"), dataset, known)
    assert histories.gather(np.arange(3), np.zeros(3, int), np.zeros(3, int)).contexts["age"].tolist() == [7, 7, 7]


@pytest.mark.parametrize(("name", "value"), [("income", 5.0), ("likes", ["a"]), ("face", [9.0, 9.0, 9.0]), ("age", 3)])
def test_a_user_has_one_value(dataset: SequenceDataset, name: str, value: object) -> None:
    frame = written(dataset)
    changed = pl.Series(name, [*frame[name][:-1].to_list(), value], dtype=frame[name].dtype)
    with pytest.raises(ValueError, match=f"f: column '{name}': user 2 has two values; give one per user"):
        read_histories("f", frame.with_columns(changed), dataset, COLUMNS)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"price": "dear"}, "f: column 'price', row 1: value 'dear' is no number"),
        ({"place": [1.0]}, "f: column 'place', row 1: value .* has another length than the others, 2"),
        ({"tags": "a||b"}, "f: column 'tags', row 1: value 'a||b' has an empty member"),
    ],
)
def test_values_that_do_not_fit_are_refused(dataset: SequenceDataset, columns: dict, message: str) -> None:
    frame = written(dataset)
    frame = frame.with_columns(pl.Series(name, [value] * frame.height) for name, value in columns.items())
    with pytest.raises(ValueError, match=message.replace("||", r"\|\|")):
        read_histories("f", frame, dataset, COLUMNS)


def test_users_who_lack_a_context_need_a_row_for_unknown_values(dataset: SequenceDataset) -> None:
    columns = replace(COLUMNS, has_unknown=True, missing_features="allow", features=())
    histories, _ = read_histories("f", written(dataset).drop("age"), dataset, columns)
    split = Split(name="test", users=np.arange(3), stop=histories.lengths)
    collator = Collator(task="retrieval", max_history=4, contexts=("age",))
    with pytest.raises(ValueError, match="a user lacks a value of 'age', .*FeatureArgs.unknown_rate above 0"):
        collator(histories, split, np.arange(3), np.arange(3), 0)
