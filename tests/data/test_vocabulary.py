"""One vocabulary is told from another by its content alone, and damage by the name of the file."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hstu.data import SequenceDataset
from hstu.data.vocabulary import identity_of, places_of
from tests.samples import make_dataset

KINDS = {
    "whole": [5, 2**40, -1],
    "real": [0.5, 1.5, -2.0],
    "text": ["ab", "", "c\u00e9\u4e2d"],
    "dates": [datetime.date(2020, 1, day) for day in (1, 2, 3)],
    "with a null": ["ab", None, "c"],
    "numbers with a null": [3, None, 4],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_is_that_of_the_values_in_their_order(kind: str) -> None:
    values = KINDS[kind]
    array = pa.array(values)
    known = identity_of([array])
    blocks = [array.slice(0, 1), array.slice(1, 0), array.slice(1)]
    assert identity_of(blocks) == known and len(known) == 64
    others = [values[::-1], values[:2], [*values, values[0]], [values[0], values[0], values[2]]]
    assert len({known, *(identity_of([pa.array(other)]) for other in others)}) == 5


def test_how_values_are_stored_does_not_matter() -> None:
    assert len({identity_of([pa.array([3, 1], kind)]) for kind in (pa.int64(), pa.int32(), pa.uint8())}) == 1
    assert len({identity_of([pa.array(["x", "yz"], kind)]) for kind in (pa.string(), pa.large_string())}) == 1
    assert identity_of([pa.array(["x"])]) != identity_of([pa.array([b"x"])]), "one bit of a file makes bytes of text"


def test_values_that_look_alike_are_told_apart() -> None:
    alike = [pa.array([1, 12]), pa.array([1.0, 12.0]), pa.array(["1", "12"]), pa.array(["11", "2"]), pa.array(["112"]),
             pa.array([0, 12]), pa.array([None, 12]), pa.array(["", "112"]), pa.array([None, "112"])]  # fmt: skip
    assert len({identity_of([array]) for array in alike}) == len(alike)


def test_the_schema_names_every_column_of_every_vocabulary(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "small", [3, 4], categories=["kind"])
    assert {*dataset.schema.vocabularies} == {"user", "country", "age", "item", "kind", "category:kind", "action"}
    assert dataset.schema.vocabularies["item"] == identity_of([pa.array(range(50))])
    masks = make_dataset(tmp_path / "masks", [3, 4], action_type="bitmask")
    assert masks.vocabularies.identity("action") is None and "action" not in masks.schema.vocabularies


def test_a_data_set_of_before_has_its_files_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = make_dataset(tmp_path / "small", [3, 4]).schema.vocabularies
    record = json.loads((tmp_path / "small" / "schema.json").read_text())
    del record["vocabularies"]
    (tmp_path / "small" / "schema.json").write_text(json.dumps(record))
    monkeypatch.setattr("hstu.data.vocabulary._BLOCK", 7)
    old = SequenceDataset.open(tmp_path / "small")
    assert not old.schema.vocabularies and {name: old.vocabularies.identity(name) for name in known} == known
    assert old.vocabulary("item").tolist() == list(range(50))


def rewrite(path: Path, **columns: list) -> None:
    table = pq.read_table(path)
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    pq.write_table(table, path)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"original": [*range(49), 48]}, "column 'original' is damaged, it is not what .*schema.json describes"),
        ({"original": [1, 0, *range(2, 50)]}, "column 'original' is damaged"),
        ({"category:kind": [0] * 50}, "column 'category:kind' is damaged"),
        ({"id": [1, 0, *range(2, 50)]}, "is damaged, its ids are not 0, 1, 2"),
        ({"id": [None, *range(1, 50)]}, "is damaged, its ids are not 0, 1, 2"),
    ],
)
def test_damage_names_the_file(tmp_path: Path, columns: dict[str, list], problem: str) -> None:
    dataset = make_dataset(tmp_path / "small", [3, 4], categories=["kind"])
    rewrite(tmp_path / "small" / "vocabulary" / "item.parquet", **columns)
    with pytest.raises(ValueError, match=f"item.parquet: {problem}"):
        dataset.category_ids("kind") if "category:kind" in columns else dataset.vocabulary("item")


def test_a_vocabulary_of_another_size_is_damaged(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "small", [3, 4])
    path = tmp_path / "small" / "vocabulary" / "item.parquet"
    pq.write_table(pq.read_table(path).slice(0, 49), path)
    with pytest.raises(ValueError, match=r"item.parquet: has 49 values, .*schema.json says 50"):
        dataset.vocabulary("item")


def test_places_compare_numbers_as_numbers_and_the_rest_as_written() -> None:
    assert places_of(pl.Series([7, 8, 9]), pl.Series([9, 7])).to_list() == [1, None, 0]
    assert places_of(pl.Series([7.0, 8.5]), pl.Series([7, 8])).to_list() == [0, None]
    assert places_of(pl.Series(["7", "x"]), pl.Series([8, 7])).to_list() == [1, None]
    many = np.random.default_rng(0).permutation(1000)
    assert (places_of(pl.Series(range(1000)), pl.Series(many)).to_numpy() == np.argsort(many)).all()
