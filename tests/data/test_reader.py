from __future__ import annotations

import logging
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu.data import EncodedDataset, Feature, Schema, SequenceDataset, column_cache, write_dataset
from hstu.data.schema import count_statistics
from tests.samples import make_dataset

# Ids that a 32-bit float, and a 32-bit integer, would change.
BIG = (2**24 + 1, 2**40 + 3)


def encode(num_users: int = 40, seed: int = 0) -> EncodedDataset:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, 12, num_users)
    items = rng.integers(0, 50, lengths.sum())
    items[:2] = BIG
    times = np.concatenate([np.sort(rng.integers(0, 20, length)) for length in lengths])
    features = (
        Feature(name="user_id", role="user", vocab_size=num_users),
        Feature(name="segment", level="user", kind="categorical", vocab_size=4),
        Feature(name="item_id", role="item", vocab_size=2**41),
        Feature(name="action", role="action", vocab_size=5, action_type="categorical"),
        Feature(name="timestamp", role="time"),
    )
    schema = Schema(name="tiny", features=features, counts=count_statistics(lengths, 2**41))
    return EncodedDataset(
        schema=schema,
        lengths=lengths,
        contexts={"segment": rng.integers(0, 4, num_users)},
        events={"item_id": items, "action": rng.integers(0, 5, len(items)), "timestamp": times},
        vocabularies={"segment": pa.array(["a", "b", "c", "d"])},
    )


@pytest.fixture
def encoded() -> EncodedDataset:
    return encode()


@pytest.fixture
def path(encoded: EncodedDataset, tmp_path: Path) -> Path:
    write_dataset(encoded, tmp_path / "tiny", events_per_part=100)
    return tmp_path / "tiny"


def per_user(encoded: EncodedDataset, name: str) -> list[np.ndarray]:
    return np.split(encoded.events[name], np.cumsum(encoded.lengths)[:-1])


def test_windows_equal_those_of_a_loop(encoded: EncodedDataset, path: Path) -> None:
    dataset = SequenceDataset.open(path)
    assert len(list((path / "data").iterdir())) > 1  # read over several files
    np.testing.assert_array_equal(dataset.lengths, encoded.lengths)
    rng = np.random.default_rng(1)
    users = rng.integers(0, dataset.num_users, 200)
    stop = rng.integers(0, dataset.lengths[users] + 1)
    start = rng.integers(0, stop + 1)
    batch = dataset.gather(users, start, stop)
    np.testing.assert_array_equal(batch.users, users)
    np.testing.assert_array_equal(batch.lengths, stop - start)
    np.testing.assert_array_equal(batch.contexts["segment"], encoded.contexts["segment"][users])
    for column, name in ((batch.items, "item_id"), (batch.actions, "action"), (batch.times, "timestamp")):
        sequences = per_user(encoded, name)
        expected = [sequences[u][a:b] for u, a, b in zip(users, start, stop, strict=True)]
        np.testing.assert_array_equal(column, np.concatenate(expected))
        assert column.dtype == np.int64


def test_large_ids_are_exact(path: Path) -> None:
    batch = SequenceDataset.open(path).gather(np.array([0]), np.array([0]), np.array([2]))
    assert tuple(batch.items) == BIG


def test_empty_selection(path: Path) -> None:
    none = np.zeros(0, np.int64)
    batch = SequenceDataset.open(path).gather(none, none, none)
    assert len(batch.items) == len(batch.lengths) == len(batch.contexts["segment"]) == 0


def test_data_set_without_actions_and_times(tmp_path: Path, encoded: EncodedDataset) -> None:
    schema = Schema(
        name="bare",
        features=(encoded.schema.user, encoded.schema.item),
        counts=encoded.schema.counts,
    )
    bare = EncodedDataset(
        schema=schema,
        lengths=encoded.lengths,
        contexts={},
        events={"item_id": encoded.events["item_id"]},
        vocabularies={},
    )
    write_dataset(bare, tmp_path / "bare")
    batch = SequenceDataset.open(tmp_path / "bare").gather(np.array([1]), np.array([0]), np.array([3]))
    assert batch.actions is None and batch.times is None and batch.contexts == {}
    np.testing.assert_array_equal(batch.items, per_user(encoded, "item_id")[1][:3])


@pytest.mark.parametrize(
    ("users", "start", "stop"),
    [([40], [0], [1]), ([-1], [0], [1]), ([0], [-1], [1]), ([0], [2], [1]), ([0], [0], [99])],
)
def test_windows_out_of_range_are_refused(path: Path, users: list, start: list, stop: list) -> None:
    with pytest.raises(ValueError, match=r"out of range|lies outside"):
        SequenceDataset.open(path).gather(np.array(users), np.array(start), np.array(stop))


def test_vocabulary_is_in_the_order_of_the_ids(path: Path) -> None:
    assert list(SequenceDataset.open(path).vocabulary("segment")) == ["a", "b", "c", "d"]
    with pytest.raises(ValueError, match="no vocabulary of 'timestamp'; there are: segment"):
        SequenceDataset.open(path).vocabulary("timestamp")


def edit(path: Path, change) -> None:
    """Rewrite the second file after ``change`` of its columns (name -> list of values per row)."""
    file = path / "data" / "part-00001.parquet"
    columns = pq.read_table(file).to_pydict()
    columns = change(columns) or columns
    pq.write_table(pa.table(columns), file)


def drop_action(columns: dict) -> dict:
    return {name: values for name, values in columns.items() if name != "action"}


def shorten_action(columns: dict) -> None:
    columns["action"][4].pop()


def high_item(columns: dict) -> None:
    columns["item_id"][3][1] = 2**41


def negative_context(columns: dict) -> None:
    columns["segment"][2] = -1


def falling_time(columns: dict) -> None:
    columns["timestamp"][5][1] = columns["timestamp"][5][0] - 1


def repeated_user(columns: dict) -> None:
    columns["user_id"][1] = columns["user_id"][0]


def null_user(columns: dict) -> None:
    columns["user_id"][1] = None


def null_list(columns: dict) -> None:
    columns["item_id"][1] = None


def null_value(columns: dict) -> None:
    columns["item_id"][1][0] = None


def float_items(columns: dict) -> None:
    columns["item_id"] = [[float(value) for value in values] for values in columns["item_id"]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_action, "column 'action' is missing; present: user_id, segment, item_id, timestamp"),
        (shorten_action, "column 'action', row 4: .* they must be equal"),
        (high_item, f"column 'item_id', row 3: value {2**41} is outside"),
        (negative_context, r"column 'segment', row 2: value -1 is outside \[0, 4\)"),
        (falling_time, "column 'timestamp', row 5: value -?[0-9]+ is before the event in front of it"),
        (repeated_user, "column 'user_id', row 1"),
        (null_user, "column 'user_id', row 1: null"),
        (null_list, "column 'item_id', row 1: null"),
        (null_value, "column 'item_id', row 1: null"),
        (float_items, "column 'item_id' is list<.*double>, expected list<int64>"),
    ],
)
def test_files_that_contradict_the_schema_are_refused(path: Path, change, message: str) -> None:
    edit(path, change)
    with pytest.raises(ValueError, match=message) as error:
        SequenceDataset.open(path)
    assert "part-00001.parquet" in str(error.value) and "\n" not in str(error.value)


def test_times_may_fall_between_users(path: Path, encoded: EncodedDataset) -> None:
    first = [times[0] for times in per_user(encoded, "timestamp")]
    last = [times[-1] for times in per_user(encoded, "timestamp")]
    assert any(b < a for a, b in zip(last, first[1:], strict=False))
    SequenceDataset.open(path)


def test_missing_and_broken_files_are_refused(path: Path) -> None:
    files = sorted((path / "data").iterdir())
    files[-1].unlink()
    with pytest.raises(ValueError, match="the schema counts 40"):
        SequenceDataset.open(path)
    files[0].write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="part-00000.parquet: not readable as parquet"):
        SequenceDataset.open(path)
    for file in files[:-1]:
        file.unlink()
    with pytest.raises(ValueError, match="no parquet files"):
        SequenceDataset.open(path)


def columns_folders(path: Path) -> list[Path]:
    return sorted(path.glob(".columns-*"))


def assert_same_data(path: Path, encoded: EncodedDataset) -> None:
    dataset = SequenceDataset.open(path)
    users = np.arange(dataset.num_users)
    whole = dataset.gather(users, np.zeros_like(users), dataset.lengths)
    np.testing.assert_array_equal(whole.items, encoded.events["item_id"])
    np.testing.assert_array_equal(whole.actions, encoded.events["action"])
    np.testing.assert_array_equal(whole.times, encoded.events["timestamp"])


def test_columns_are_written_once_and_mapped(path: Path, encoded: EncodedDataset) -> None:
    assert_same_data(path, encoded)
    (folder,) = columns_folders(path)
    written = {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}
    assert_same_data(path, encoded)
    assert {file.name: file.stat().st_mtime_ns for file in folder.iterdir()} == written
    dataset = SequenceDataset.open(path)
    assert all(isinstance(column.base, np.memmap) for column in dataset._columns.values())
    assert dataset._columns["action"].dtype == np.uint8  # the smallest that holds the ids


def test_columns_follow_the_files(path: Path) -> None:
    old = SequenceDataset.open(path)
    other = encode(seed=1)
    write_dataset(other, path, events_per_part=70)
    assert_same_data(path, other)
    assert len(columns_folders(path)) == 1  # the old ones are gone
    edit(path, high_item)
    with pytest.raises(ValueError, match="column 'item_id', row 3"):
        SequenceDataset.open(path)
    # What was mapped before stays readable, though its files have no name any more.
    assert tuple(old.gather(np.array([0]), np.array([0]), np.array([2])).items) == BIG


def test_refused_and_interrupted_columns_leave_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit(path, shorten_action)
    with pytest.raises(ValueError, match="they must be equal"):
        SequenceDataset.open(path)
    assert not list(path.glob(".*columns*"))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(column_cache, "_write_columns", interrupt)
    with pytest.raises(KeyboardInterrupt):
        SequenceDataset.open(path)
    assert not list(path.glob(".*columns*"))


def test_a_faster_process_wins(path: Path, encoded: EncodedDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    write, rivals = column_cache._write_columns, []

    def beaten(folder: Path, files: list[Path], schema: Schema) -> None:
        write(folder, files, schema)
        if not rivals:
            rivals.append(1)
            SequenceDataset.open(path)

    monkeypatch.setattr(column_cache, "_write_columns", beaten)
    assert_same_data(path, encoded)
    assert rivals and len(list(path.glob(".*columns*"))) == 1


def test_a_data_set_that_cannot_be_written_is_read_all_the_same(
    path: Path, encoded: EncodedDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make = tempfile.mkdtemp

    def refuse(*arguments: object, **options: object) -> str:
        if options.get("dir") == path:
            raise PermissionError(13, "Permission denied")
        return make(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)  # permissions do not bind the administrator
    with caplog.at_level(logging.WARNING, "hstu"):
        assert_same_data(path, encoded)
    assert "cannot be written (Permission denied)" in caplog.text
    assert not columns_folders(path)


def test_rows_are_numbered_alike_in_chunks_of_any_size(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(column_cache, "_EVENTS_AT_ONCE", 1)
    edit(path, falling_time)
    with pytest.raises(ValueError, match="column 'timestamp', row 5: "):
        SequenceDataset.open(path)


@pytest.mark.parametrize("largest", [1, 5, 1000])
def test_count_before_counts(tmp_path: Path, largest: int) -> None:
    rng = np.random.default_rng(largest)
    lengths = [4, 1, 9, 0, 30]
    per_user = [np.sort(rng.integers(largest, size=length)) for length in lengths]
    dataset = make_dataset(tmp_path / "timed", lengths, times=np.concatenate(per_user))
    everything = np.concatenate(per_user)
    assert dataset.time_range() == (everything.min(), everything.max())
    for time in (-1, 0, 1, largest // 2, largest - 1, largest):
        assert dataset.count_before(time).tolist() == [int((times < time).sum()) for times in per_user]


def test_actions_are_found_by_their_original_values(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "mask", [3, 4], num_actions=8, action_type="bitmask")
    assert dataset.action_ids((2,)) == (2, 3, 6, 7)
    assert dataset.action_ids((6, 1)) == (1, 3, 5, 6, 7)
    assert dataset.action_ids((0,)) == (0,) and dataset.action_ids(()) == ()
    for wrong in (9, -1, "hate"):
        with pytest.raises(ValueError, match=f"no action {wrong!r} in 'small'; there are: 0, 1, 2, 3"):
            dataset.action_ids((wrong,))
    with pytest.raises(ValueError, match="actions_without_loss = .*'small' has no actions"):
        make_dataset(tmp_path / "none", [3], num_actions=None).action_ids((1,))


@pytest.mark.parametrize(
    ("originals", "wanted", "ids"), [([0.5, 3.0, 5.0, 7.5], (3, 7.5), (1, 3)), (list("abcd"), ("d", "b"), (1, 3))]
)
def test_categorical_actions_keep_their_original_values(
    tmp_path: Path, originals: list, wanted: tuple, ids: tuple[int, ...]
) -> None:
    dataset = make_dataset(tmp_path / "small", [3, 4], originals={"action": originals})
    assert dataset.action_ids(wanted) == ids


def one_bit(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "cut": ("item.npy", lambda path: path.write_bytes(path.read_bytes()[:-4]), "has .* bytes instead of"),
    "gone": ("item.npy", Path.unlink, "is missing"),
    "one bit": ("item.npy", lambda path: one_bit(path, -1), "has other contents than were written, near byte 0"),
    "an offset": (".offsets.npy", lambda path: one_bit(path, -8), "has other contents"),
    "no sums": ("checksums.json", Path.unlink, "No such file"),
    "foreign sums": ("checksums.json", lambda path: path.write_text("{}"), "is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_columns_are_named_and_made_again(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = make_dataset(tmp_path / "small", [3, 4])
    items = dataset.gather(np.arange(2), np.zeros(2), dataset.lengths).items
    (folder,) = columns_folders(tmp_path / "small")
    name, change, words = DAMAGE[damage]
    change(folder / name)
    with caplog.at_level(logging.WARNING, "hstu"):
        again = SequenceDataset.open(tmp_path / "small")
    assert re.search(f"{folder.name}.*{words}.*made again from the parquet files", caplog.text), caplog.text
    assert again.gather(np.arange(2), np.zeros(2), dataset.lengths).items.tolist() == items.tolist()
    caplog.clear()
    SequenceDataset.open(tmp_path / "small", check="all")
    assert not caplog.text


def test_no_bit_of_the_files_of_a_data_set_changes_it_in_silence(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "small", [3, 4, 90], originals={"item": [f"i{n}" for n in range(50)]}).path

    def events(dataset: SequenceDataset) -> list:
        found = dataset.gather(np.arange(3), np.zeros(3), dataset.lengths)
        return [x.tolist() for x in (found.items, found.actions, found.times, *found.contexts.values())]

    dataset, refused = SequenceDataset.open(folder), 0
    parts = {
        "data/part-00000.parquet": events,
        "vocabulary/item.parquet": lambda _: dataset.vocabulary("item").tolist(),
    }
    for name, content in parts.items():
        path, written = folder / name, content(dataset)
        whole = path.read_bytes()
        for place in range(5, len(whole), 47):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            try:
                for columns in columns_folders(folder) if content is events else ():
                    shutil.rmtree(columns)  # which are read otherwise
                found = SequenceDataset.open(folder) if content is events else dataset
                assert content(found) == written, f"byte {place} of {path.name}"
            except ValueError as error:
                refused += 1
                assert str(path.parent) in str(error) and "\n" not in str(error)
        path.write_bytes(whole)
    assert refused > 40


def test_damage_that_no_sample_met_is_refused_where_it_cannot_be_an_id(tmp_path: Path) -> None:
    make_dataset(tmp_path / "small", [3, 4], num_items=20)
    (folder,) = columns_folders(tmp_path / "small")
    content = bytearray((folder / "item.npy").read_bytes())
    content[-1] = 255
    (folder / "item.npy").write_bytes(content)
    dataset = SequenceDataset.open(tmp_path / "small", check="none")
    with pytest.raises(ValueError, match="the column of 'item' is damaged: it holds 255 of 20 ids; python -m hstu.cli"):
        dataset.gather(np.array([1]), np.array([0]), np.array([4]))
