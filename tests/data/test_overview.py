from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hstu.data import SequenceDataset, overview
from hstu.data.overview_plot import draw_overview, sketch_overview
from tests.samples import make_dataset

LENGTHS = (5, 1, 12, 30, 2, 9)


def crowded(folder: Path, **options: object) -> SequenceDataset:
    """Few items and times, so that there are ties and repeats."""
    rng = np.random.default_rng(0)
    times = np.concatenate([np.sort(rng.integers(6, size=length)) for length in LENGTHS])
    options = {"items": rng.integers(3, size=sum(LENGTHS)), "num_items": 40, "num_actions": 2, "times": times} | options
    return make_dataset(folder, LENGTHS, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("at_once", [1, 10, 1000])
@pytest.mark.parametrize("options", [{}, {"with_time": False}, {"num_actions": None}])
def test_counts_equal_those_of_a_loop(
    tmp_path: Path, options: dict, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overview, "_EVENTS_AT_ONCE", at_once)
    dataset = crowded(tmp_path / "small", **options)
    popularity, ties, repeats, timed = np.zeros(40, int), 0, 0, "with_time" not in options
    again = 0
    for user, length in enumerate(LENGTHS):
        events = dataset.gather(np.array([user]), np.array([0]), np.array([length]))
        np.add.at(popularity, events.items, 1)
        columns = [c for c in (events.items, events.actions, events.times) if c is not None]
        again += length - np.unique(events.items).size
        for t in range(1, length):
            before = range(t) if timed else [t - 1]
            repeats += any(all(column[t] == column[s] for column in columns) for s in before)
            ties += events.times is not None and events.times[t] == events.times[t - 1]
    found = overview.overview(dataset)
    assert found.popularity.tolist() == popularity.tolist() and found.lengths.tolist() == list(LENGTHS)
    assert repeats > 0 and found.repeats == repeats
    assert found.seen_again == again
    assert found.ties == (None if "with_time" in options else ties)
    assert found.actions is None if "num_actions" in options else found.actions is not None
    text = "\n".join(found.warnings)
    assert ("duplicates: " in text) == ("with_time" not in options) and f"{repeats} of 59 events" in text
    assert f"repeats: {again / 59:.1%} of the events are of an item that their user met before" in text
    assert "unseen items: 37 of 40" in text and "short users: 2 of 6" in text and "cold items" not in text


def test_a_clean_data_set_has_no_warnings(tmp_path: Path) -> None:
    times = np.tile(np.arange(10), 6)
    clean = make_dataset(tmp_path / "clean", [10] * 6, num_items=10, items=np.tile(np.arange(10), 6), times=times)
    assert overview.overview(clean).warnings == []


def test_cold_items_and_a_single_action_are_named(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "cold", [4], num_items=4, items=np.array([0, 1, 2, 3]), num_actions=1)
    text = "\n".join(overview.overview(dataset).warnings)
    assert "cold items: 4 of 4 items" in text and "one action" in text


def test_a_user_or_an_item_with_more_than_a_tenth_of_all_events_is_named(tmp_path: Path) -> None:
    items = np.concatenate([np.zeros(20, np.int64), np.arange(1, 49)])
    options = {"num_items": 49, "items": items, "originals": {"user": [*"abcdefghijklm", "N\x1bA"]}}
    text = "\n".join(overview.overview(make_dataset(tmp_path / "large", [4, *[2] * 12, 40], **options)).warnings)
    assert "one user is large: 'N\\x1bA' has 40 of 68 events; is it one user, or what stands" in text
    assert "one item is large: 0 has 20 of 68 events" in text


def test_examples_show_original_values_of_the_newest_events(tmp_path: Path) -> None:
    originals = {"user": list("abcdef"), "item": [f"film {i}" for i in range(40)]}
    dataset = crowded(tmp_path / "small", originals=originals)
    found = overview.examples(dataset, count=3, newest=4)
    assert [user["length"] for user in found] == [1, 5, 30]  # the shortest, the middle one, the longest
    assert [user["user"] for user in found] == ["b", "a", "d"]
    whole = dataset.gather(np.array([3]), np.array([26]), np.array([30]))
    assert whole.actions is not None and whole.times is not None
    expected = zip((f"film {i}" for i in whole.items), whole.actions, whole.times, strict=True)
    assert found[2]["events"] == [(*event, {}) for event in expected]
    assert [len(user["events"]) for user in found] == [1, 4, 4]
    assert set(found[0]["contexts"]) == {"country", "age"}
    assert len(overview.examples(dataset)) == 6  # no user twice


@pytest.mark.parametrize("lengths", [LENGTHS, (1,), (3, 3, 3), (100_000, 1)])
def test_pictures_of_any_lengths(tmp_path: Path, lengths: tuple[int, ...]) -> None:
    found = overview.overview(make_dataset(tmp_path / "small", lengths))
    draw_overview(found, "small", tmp_path / "new" / "picture.png")
    assert (tmp_path / "new" / "picture.png").read_bytes().startswith(b"\x89PNG")
    sketch = sketch_overview(found)
    assert "users by number of events" in sketch and "rank of popularity" in sketch
    assert "\x1b" not in sketch and max(map(len, sketch.splitlines())) <= 72


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_examples_are_never_ids_in_place_of_originals(tmp_path: Path, damage: str) -> None:
    dataset = crowded(tmp_path / "small")
    path = tmp_path / "small" / "vocabulary" / "item.parquet"
    path.write_bytes(path.read_bytes()[:100]) if damage == "cut" else path.unlink()
    with pytest.raises(ValueError, match="item.parquet: (not readable as parquet|no vocabulary)"):
        overview.examples(dataset)
