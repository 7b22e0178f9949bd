from __future__ import annotations

import gzip
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu.preprocessing.amazon import DATASETS

from .conftest import events, make, write_amazon


def ratings(number: int = 900, seed: int = 0) -> list[tuple[str, str, float, int]]:
    rng = np.random.default_rng(seed)
    users = (150 * rng.random(number) ** 2).astype(int)
    items = (250 * rng.random(number) ** 3).astype(int)
    return [
        (f"A{user:03d}XYZLONGERTHANTWELVE", f"B00{item}", float(stars), int(time))
        for user, item, stars, time in zip(
            users, items, rng.integers(1, 6, number), rng.integers(10**9, 10**9 + 99, number), strict=True
        )
    ]


ROWS = ratings()


def counted_once(rows: list[tuple], least: int) -> tuple[list[tuple], set[str]]:
    """Rows that are left, and the catalogue, as in the published preprocessing of books."""
    users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
    left = [row for row in rows if users[row[0]] >= least and items[row[1]] >= least]
    again = Counter(row[0] for row in left)
    return [row for row in left if again[row[0]] >= least], {row[1] for row in left}


def core(rows: list[tuple], least: int) -> list[tuple]:
    while True:
        users, items = Counter(row[0] for row in rows), Counter(row[1] for row in rows)
        left = [row for row in rows if users[row[0]] >= least and items[row[1]] >= least]
        if len(left) == len(rows):
            return rows
        rows = left


def sequences(rows: list[tuple]) -> dict[str, list[tuple]]:
    ordered = sorted(rows, key=lambda row: row[3])
    return {user: [row[1:] for row in ordered if row[0] == user] for user in {row[0] for row in rows}}


def test_categories_where_there_is_metadata(tmp_path: Path) -> None:
    write_amazon(tmp_path / "ratings_Beauty.csv", ROWS)
    assert not make("amazon-beauty", tmp_path).schema.of("item")
    lines = [
        {"asin": "B000", "title": "Soap & 'more'", "categories": [["Beauty", "Bath", "Soaps"], ["Beauty", "Gifts"]]},
        {"asin": "B001", "categories": [["Beauty"]], "price": 3.5},
        {"asin": "B00unseen", "title": "x"},
    ]
    with gzip.open(tmp_path / "meta_Beauty.json.gz", "wt") as file:
        file.writelines(f"{line}\n" for line in lines)
    dataset = make("amazon-beauty", tmp_path)
    items, sets = dataset.vocabulary("item_id").tolist(), dataset.item_features("categories")
    known = dataset.vocabulary("categories")
    found = [sorted(known[sets.ids[sets.offsets[k] : sets.offsets[k + 1]]]) for k in map(items.index, ("B000", "B001"))]
    assert found == [["Bath", "Gifts", "Soaps"], ["Beauty"]] and sets.lengths.sum() == 4
    assert [*dataset.vocabulary("title")] == ["Soap & 'more'"]
    assert "meta_Beauty.json.gz" in dataset.schema.source
    with gzip.open(tmp_path / "meta_Beauty.json.gz", "wt") as file:
        file.write("{'asin': \n")
    with pytest.raises(ValueError, match="meta_Beauty.json.gz: line 1 is no dictionary of an item"):
        make("amazon-beauty", tmp_path)


def test_books_are_counted_once(tmp_path: Path) -> None:
    left, catalogue = counted_once(ROWS, 5)
    assert len(core(ROWS, 5)) < len(left) < len(ROWS) and catalogue > {row[1] for row in left}  # it all matters here
    write_amazon(tmp_path / "ratings_Books.csv", ROWS)
    dataset = make("amazon-books", tmp_path)
    assert events(dataset) == sequences(left)
    assert set(dataset.vocabulary("item_id")) == catalogue


@pytest.mark.parametrize("name", ["amazon-beauty", "amazon-sports", "amazon-toys"])
def test_the_others_until_all_have_five(name: str, tmp_path: Path) -> None:
    write_amazon(tmp_path / DATASETS[name].logs[0], ROWS)
    dataset = make(name, tmp_path)
    assert events(dataset) == sequences(core(ROWS, 5))


def test_flags_replace_the_published_filter(tmp_path: Path) -> None:
    write_amazon(tmp_path / "ratings_Beauty.csv", ROWS)
    everything = make("amazon-beauty", tmp_path, min_user_events=0, min_item_events=0)
    assert events(everything) == sequences(ROWS)
    # Strings are numbered in the order of their first appearance.
    assert everything.vocabulary("user_id").tolist() == list(dict.fromkeys(row[0] for row in ROWS))


def test_counts_before_and_after_the_filter_are_checked(tmp_path: Path) -> None:
    write_amazon(tmp_path / "ratings_Beauty.csv", ROWS)
    with pytest.raises(ValueError, match="900 events, the published data set has 2,023,070"):
        make("amazon-beauty", tmp_path, check_counts=True)
    known = replace(DATASETS["amazon-beauty"], log_counts={"events": 900})
    with pytest.raises(ValueError, match="users, the published data set has 22,363"):
        make("amazon-beauty", tmp_path, known=known, check_counts=True)
    make("amazon-beauty", tmp_path, known=known, check_counts=True, min_user_events=3)


def test_nobody_left(tmp_path: Path) -> None:
    write_amazon(tmp_path / "ratings_Toys_and_Games.csv", ROWS[:5])
    with pytest.raises(ValueError, match="no event passes --min_user_events 5 --min_item_events 5; lower them"):
        make("amazon-toys", tmp_path)
