"""A log in blocks gives the data set that its definition gives."""

from __future__ import annotations

import multiprocessing
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from hstu.data import SequenceDataset
from hstu.data.external_sort import Runs
from hstu.data.interactions import InteractionSpec
from hstu.data.log_encoder import EncodingOptions, encode_log
from hstu.data.writer import writing

FILTERS = [{}, {"min_user_events": 20}, {"min_user_events": 9, "min_item_events": 8}, {"max_user_events": 7}]


def table(num_users: int = 40, events: int = 700, seed: int = 0, shift: int = 0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user": (num_users * rng.random(events) ** 2).astype(np.int64) * 7 + shift,
            "item": (50 * rng.random(events) ** 2).astype(np.int64) * 3 + shift,
            "time": rng.integers(0, 30, events),  # many ties
            "action": rng.integers(1, 9, events) / 2,
        }
    )


def encode(folder: Path, blocks: list, users: pl.DataFrame | None = None, **options: int) -> SequenceDataset:
    own = {name: options.pop(name) for name in list(options) if name in EncodingOptions.__dataclass_fields__}
    spec = InteractionSpec(name="log", time_column="time", action_column="action", **options)
    with writing(folder) as writer:
        schema = encode_log(blocks, spec, EncodingOptions(**own), writer, users=lambda: users, progress=lambda *_: None)
        writer.schema(schema)
    return SequenceDataset.open(folder)


def expected(frame: pl.DataFrame, users: pl.DataFrame, **filters: int) -> dict[str, list]:
    """What the data set holds in original values, from the definition."""
    kept = frame
    while True:
        enough = (pl.len().over("user") >= filters.get("min_user_events", 0)) & (
            pl.len().over("item") >= filters.get("min_item_events", 0)
        )
        if kept.select(enough.all()).item():
            break
        kept = kept.filter(enough)
    rows = sorted(kept.iter_rows(named=True), key=lambda row: (row["user"], row["time"]))
    cities = dict(users.iter_rows())
    names = sorted(set(kept["user"]))
    events = [[row for row in rows if row["user"] == user][-filters.get("max_user_events", 0) :] for user in names]
    return {
        "users": names,
        "items": sorted(set(kept["item"])),
        "cities": [cities[user] for user in names],
        "events": [[(row["item"], row["action"], row["time"]) for row in own] for own in events],
    }


def held(dataset: SequenceDataset) -> dict[str, list]:
    """What a data set holds, in original values."""
    everyone = np.arange(dataset.num_users)
    batch = dataset.gather(everyone, np.zeros(len(everyone)), dataset.lengths)
    columns = (dataset.vocabulary("item_id")[batch.items], dataset.vocabulary("action")[batch.actions], batch.times)
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    ends = np.cumsum(dataset.lengths)
    return {
        "users": dataset.vocabulary("user_id").tolist(),
        "items": dataset.vocabulary("item_id").tolist(),
        "cities": dataset.vocabulary("city")[batch.contexts["city"]].tolist(),
        "events": [rows[end - number : end] for end, number in zip(ends, dataset.lengths, strict=True)],
    }


def assert_same(left: SequenceDataset, right: SequenceDataset) -> None:
    assert left.schema == right.schema
    for name in ("user_id", "item_id", "action"):
        np.testing.assert_array_equal(left.vocabulary(name), right.vocabulary(name))
    everyone = np.arange(left.num_users)
    batches = [one.gather(everyone, np.zeros(len(everyone)), one.lengths) for one in (left, right)]
    for name in ("lengths", "items", "actions", "times"):
        np.testing.assert_array_equal(*(getattr(batch, name) for batch in batches))
    assert batches[0].contexts.keys() == batches[1].contexts.keys()
    for name in batches[0].contexts:
        np.testing.assert_array_equal(*(batch.contexts[name] for batch in batches))


@pytest.mark.parametrize("filters", FILTERS)
@pytest.mark.parametrize("shift", [0, 2**40, 2**62 - 1000, -500])
def test_what_a_log_holds(tmp_path: Path, filters: dict, shift: int) -> None:
    frame = table(shift=shift)
    users = frame.select(user_id=pl.col("user").unique()).with_columns(city=pl.col("user_id") % 4)
    blocks = [(0, frame[start : start + 90]) for start in range(0, frame.height, 90)]
    encoded = encode(tmp_path / "a", blocks, users, events_per_run=200, events_per_part=50, **filters)
    assert held(encoded) == expected(frame, users, **filters)
    own = [[item for item, _, _ in events] for events in expected(frame, users, **filters)["events"]]
    assert encoded.schema.counts["repeats"] == sum(len(items) - len(set(items)) for items in own) > 0
    if filters:
        assert encoded.num_events < frame.height


def test_files_may_come_in_any_order(tmp_path: Path) -> None:
    frame = table(num_users=5)
    first, second = (0, frame[:300]), (1, frame[300:])
    again = [(1, frame[300:310]), (0, frame[:200]), (0, frame[200:300]), (1, frame[310:])]
    expected = encode(tmp_path / "a", [first, second])
    assert_same(encode(tmp_path / "b", [second, first]), expected)
    assert_same(encode(tmp_path / "c", again, events_per_run=64), expected)


def test_a_user_with_228_000_events_and_one_with_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    number = 228_000
    frame = pl.DataFrame(
        {
            "user": np.concatenate([np.full(number, 5), [3]]),
            "item": rng.integers(0, 2**40, number + 1),
            "time": rng.integers(0, 2**31, number + 1),
            "action": np.ones(number + 1),
        }
    )
    frame = frame[rng.permutation(number + 1)]
    dataset = encode(tmp_path / "a", [(0, frame)], events_per_run=50_000, events_per_part=1000)
    assert dataset.lengths.tolist() == [1, number]
    batch = dataset.gather(np.array([1]), np.array([0]), np.array([number]))
    expected = frame.filter(pl.col("user") == 5).sort("time", maintain_order=True)
    np.testing.assert_array_equal(dataset.vocabulary("item_id")[batch.items], expected["item"])
    np.testing.assert_array_equal(batch.times, expected["time"])


def test_times_too_far_apart_for_one_sort_key(tmp_path: Path) -> None:
    frame = table(num_users=9)
    apart = encode(tmp_path / "a", [(0, frame.with_columns(pl.col("time") * 2**57))])
    close = encode(tmp_path / "b", [(0, frame)])
    everyone = np.arange(close.num_users)
    batches = [one.gather(everyone, np.zeros(len(everyone)), one.lengths) for one in (apart, close)]
    np.testing.assert_array_equal(batches[0].items, batches[1].items)
    np.testing.assert_array_equal(batches[0].times, batches[1].times * 2**57)


def test_one_user_and_no_users(tmp_path: Path) -> None:
    frame = table(num_users=1)
    assert encode(tmp_path / "a", [(0, frame)]).num_users == 1
    with pytest.raises(ValueError, match="interactions: has no rows"):
        encode(tmp_path / "b", [(0, frame.clear())])
    assert not (tmp_path / "b").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    def blocks() -> Iterator[tuple[int, pl.DataFrame]]:
        for start in range(0, 600, 60):
            yield 0, table()[start : start + 60]
        raise ValueError("a bad line")

    for _ in range(5):  # what a thread still writes must not outlive the run
        with pytest.raises(ValueError, match="a bad line"):
            encode(tmp_path / "a", blocks(), events_per_run=50)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hstu.data.external_sort._write_run", full)
    with pytest.raises(ValueError, match=r"a: cannot be written \(No space left on device\); choose another"):
        encode(tmp_path / "a", [(0, table())])
    assert list(tmp_path.iterdir()) == []


def test_runs_hold_every_row_once(tmp_path: Path) -> None:
    frame = table()
    runs = Runs(tmp_path, events_per_run=100)
    for start in range(0, frame.height, 33):
        runs.append({name: frame[name][start : start + 33].to_numpy() for name in frame.columns})
    runs.close()
    assert len(runs) > 3 and runs.rows == frame.height
    users = np.unique(frame["user"])
    starts, stops = runs.bounds(users, users)
    for number, user in enumerate(users):
        part = runs.part(starts[:, number], stops[:, number], frame.columns)
        expected = frame.filter(pl.col("user") == user)
        for name in frame.columns:
            assert part[name].tolist() == expected[name].to_list()


@pytest.mark.parametrize("limit", [100, 4000, 7999])
def test_a_disk_that_is_full_at_the_last_byte_is_noticed(tmp_path: Path, limit: int) -> None:
    ours, theirs = multiprocessing.Pipe()

    def write() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        runs = Runs(tmp_path, 10**6)
        runs.append({"user": np.arange(1000) * 2**40})
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            runs.close()
            theirs.send("")
        except OSError as error:
            theirs.send(str(error))

    process = multiprocessing.get_context("fork").Process(target=write)
    process.start()
    assert ours.poll(20) and ours.recv()
    process.join()
