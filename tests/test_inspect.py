"""The command that shows a data set."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hstu.cli.inspect import main
from tests.samples import declared_features, make_dataset


def test_the_report_shows_what_there_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "small", [3, 4, 12], items=np.array([0, 1, 0, *range(2, 18)]))
    assert main([str(tmp_path / "small"), "--output", str(tmp_path / "picture.png")]) == 0
    out = capsys.readouterr().out
    for expected in (
        "users                         3",
        "events                       19",
        "3 to 12, median 4, mean 6.3",
        "repeats                       1, 5.3% of the events, of an item that their user met before",
    ):
        assert expected in out
    for feature, role, size in (("user", "user", "3"), ("country", "user", "7"), ("item", "item", "50")):
        assert f"  {feature:24} {role:8} {size + ' values':>16}" in out
    assert "user 2: 12 events country=" in out and "2001-09-" in out and "cold items" in out
    assert str(tmp_path / "picture.png") in out and (tmp_path / "picture.png").is_file()


def test_declared_features_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = make_dataset(tmp_path / "small", [3, 4, 12], declared=declared_features())
    assert main([str(tmp_path / "small")]) == 0
    out = capsys.readouterr().out
    missing = np.isnan(dataset.item_features("image")).any(axis=1).mean()
    for expected in (
        f"  {'image':24} {'item':8} {'3 wide':>16}  vector, {missing:.1%} missing",
        f"  {'price':24} {'event':8} {'-3 to 3':>16}  numeric, mean 0, deviation 1, median",
        "categorical, known after the request",
        "multi, table likes",
        f"  {'request':24} {'event':8} {'9 values':>16}  kept, no input",
    ):
        assert expected in out
    prices = dataset.gather(np.array([0]), np.array([0]), np.array([3]), ("price",)).of_events["price"][:, 0]
    shown = [f"price {price:.4g}  place" for price in prices if not np.isnan(price)]
    assert shown and all(text.split("  ")[0] in out for text in shown)


def test_ids_cannot_steer_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "odd", [3, 4], num_items=5, originals={"item": [f"\x1b[2J{k}" for k in range(5)]})
    assert main([str(tmp_path / "odd")]) == 0
    out = capsys.readouterr().out
    assert "item \\x1b[2J" in out and "\x1b" not in out


def test_data_without_actions_times_and_contexts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "bare", [3, 4], num_actions=None, with_time=False, contexts=())
    assert main([str(tmp_path / "bare")]) == 0
    out = capsys.readouterr().out
    assert "  action" not in out and "picture" not in out and "time  " not in out


def test_times_beyond_the_calendar_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_dataset(tmp_path / "far", [3], times=np.array([0, 10**15, 2 * 10**17]))
    assert main([str(tmp_path / "far")]) == 0
    assert "1970-01-01 00:00:00 to 200000000000000000" in capsys.readouterr().out


def test_mistakes_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "is no data set" in error
    make_dataset(tmp_path / "small", [3, 4])
    (tmp_path / "file").write_text("")
    assert main([str(tmp_path / "small"), "--output", str(tmp_path / "file" / "picture.png")]) == 2
    assert "--output = " in capsys.readouterr().err
