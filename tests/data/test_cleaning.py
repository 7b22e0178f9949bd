from __future__ import annotations

import logging
from datetime import date, datetime, timedelta, timezone

import polars as pl
import pytest

from hstu.data.cleaning import Look, clean_ids, clean_masks, clean_times, clean_values, whole_seconds

NOON = 1_717_157_400  # 2024-05-31T12:10:00Z


def column(values: list, dtype: pl.DataType | None = None) -> pl.Series:
    return pl.Series("c", values, dtype=dtype)


def seconds(values: list) -> list[int]:
    return whole_seconds(*clean_times(column(values), "f")).to_list()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["7", "12"], [7, 12]),
        (["007", "7"], ["007", "7"]),
        (["7", "a"], ["7", "a"]),
        ([str(2**62), "-1"], [2**62, -1]),
        ([2**62], [2**62]),
        ([1.0, 2.0**24 + 1, 2.0**53], [1, 2**24 + 1, 2**53]),
    ],
)
def test_ids_are_integers_where_nothing_is_lost(values: list, expected: list) -> None:
    assert clean_ids(column(values), "f").to_list() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["a", None], "row 2: value None is missing"),
        (["a", "b", " "], "row 3: value ' ' is empty"),
        ([1.0, 2.5], "row 2: value 2.5 is no exact whole number"),
        ([2.0**54], "row 1: value 1.8.*e.16 is no exact whole number"),
        ([1.0, float("inf")], "row 2: value inf is not finite"),
        ([True], "is Boolean; ids are integers or strings"),
    ],
)
def test_wrong_ids_are_refused(values: list, message: str) -> None:
    with pytest.raises(ValueError, match=f"^f: column 'c'.*{message}"):
        clean_ids(column(values), "f")


def test_integers_beyond_64_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=f"value {2**63} is too large"):
        clean_ids(column([2**63], pl.UInt64()), "f")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["3", "1"], [3, 1]),
        (["0.5", "3"], [0.5, 3.0]),
        (["click", "3"], ["click", "3"]),
        ([True, False], [True, False]),
        ([date(2024, 5, 31)], ["2024-05-31"]),
    ],
)
def test_values(values: list, expected: list) -> None:
    assert clean_values(column(values), "f").to_list() == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [([1.0, float("nan")], "row 2: value nan is not finite"), (["1", "nan"], "row 2"), (["a", None], "row 2")],
)
def test_wrong_values_are_refused(values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clean_values(column(values), "f")


@pytest.mark.parametrize("values", [[0, -1], [0, 1.5], ["0", "like"], [0, 2**20]])
def test_wrong_masks_are_refused(values: list) -> None:
    with pytest.raises(ValueError, match="is no bit mask.*--action_type categorical"):
        clean_masks(pl.Series("c", values, strict=False), "f")


@pytest.mark.parametrize(
    ("values", "row", "value"),
    [(["1", "2", "x"], 3, "x"), (["4", "-1", "y"], 2, "-1"), ([1, 2.5, 3], 2, "2.5"), ([1, 2**20], 2, "1048576")],
)
def test_the_error_about_a_mask_names_its_row(values: list[object], row: int, value: str) -> None:
    look = Look().add(pl.Series(["word", "1"]))  # of the whole column; its other blocks may hold numbers alone
    with pytest.raises(ValueError, match=rf"^f: column 'c', row {10 + row}: value '?{value}'? is no bit mask"):
        clean_masks(pl.Series("c", values, strict=False), "f", look, rows=10)


def test_a_block_of_masks_in_a_column_with_words_is_read() -> None:
    assert clean_masks(pl.Series("c", ["1", "3"]), "f", Look().add(pl.Series(["word", "1"]))).to_list() == [1, 3]


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([NOON], "seconds"),
        ([NOON * 10**3 + 999], "milliseconds"),
        ([NOON * 10**6], "microseconds"),
        ([NOON * 10**9], "nanoseconds"),
        ([float(NOON) + 0.7], "seconds"),
        ([float(NOON * 1000)], "milliseconds"),
        ([str(NOON)], "seconds"),
        ([f"{NOON}.5"], "seconds"),
        (["2024-05-31T12:10:00Z"], None),
        (["2024-05-31 12:10:00.75"], None),
        (["2024-05-31T14:10:00+02:00"], None),
        (["2024-05-31T12:10"], None),
        ([datetime(2024, 5, 31, 12, 10)], None),
        ([datetime(2024, 5, 31, 14, 10, tzinfo=timezone(timedelta(hours=2)))], None),
    ],
)
def test_times_are_seconds(values: list, unit: str | None, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert seconds(values) == [NOON]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == (unit is not None)
    assert all(f"is taken as {unit}, judged by its size" in line and "is 2024-05-31 12:10:00" in line for line in said)


@pytest.mark.parametrize(
    ("values", "message"),
    [([1e9, 1e30], "row 2: value 1e\\+30 is too large for a time"), (["2024-05-31", "24-05-31"], "row 2.*is no time")],
)
def test_times_that_cannot_be_are_refused(values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        seconds(values)


def test_numbers_that_are_no_seconds_are_shown_as_a_date(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        seconds([20240501])
    assert "is taken as seconds, judged by its size: 20240501 is 1970-08-23" in caplog.text


@pytest.mark.parametrize("kind", [pl.Categorical, pl.Enum(["a", "b", "7"])])
def test_categoricals_are_read_as_strings(kind: pl.DataType) -> None:
    column = pl.Series("c", ["b", "a"], dtype=kind)
    assert clean_ids(column, "f").to_list() == clean_values(column, "f").to_list() == ["b", "a"]
    assert clean_ids(pl.Series("c", ["7"], dtype=kind), "f").to_list() == [7]


def test_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="column 'c' is List.*give one value a row"):
        clean_values(pl.Series("c", [[1], [2]]), "f")


def test_times_before_1970_round_down() -> None:
    assert seconds([-1.5]) == [-2]
    assert seconds(["1969-12-31T23:59:58.5"]) == [-2]
    assert seconds([date(1970, 1, 2)]) == [86_400]


def test_dates_beyond_2262_do_not_wrap() -> None:
    assert seconds(["9999-12-31"]) == [253_402_214_400]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["2024-05-31", "yesterday"], "row 2: value 'yesterday' is no time"),
        (["17", "18", "yesterday"], "row 3: value 'yesterday' is no time"),
        (["2024-05-31", "2024-02-30"], "row 2: value '2024-02-30' is no time"),
        ([1.0, float("nan")], "row 2: value nan is not finite"),
        (["1.5", "2", "inf"], "row 3: value inf is not finite"),
        ([1, None], "row 2: value None is missing"),
        ([True], "is Boolean; times are"),
        ([NOON * 1000, NOON], f"row 2: value {NOON} is no time in milliseconds, as the largest is"),
        ([NOON * 10**9, NOON * 10**6, NOON], f"row 2: value {NOON * 10**6} is no time in nanoseconds"),
        ([float(NOON), NOON * 1e3], "row 1: value 1717157400.0 is no time in milliseconds"),
    ],
)
def test_wrong_times_are_refused(values: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clean_times(column(values), "f")
