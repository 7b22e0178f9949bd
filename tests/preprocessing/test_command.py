"""The command as a user meets it: what it prints, writes and refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hstu.cli.flags import underscore_flags
from hstu.cli.preprocess import DATASETS, summary
from hstu.data import SequenceDataset
from hstu.data.synthetic import SyntheticConfig, generate

from .conftest import (
    Command,
    assert_refused,
    exposures,
    ratings,
    write_amazon,
    write_kuairand,
    write_ml_1m,
    write_ml_20m,
    write_ml_100k,
)

TINY = ("--num_users=50", "--num_items=60", "--num_clusters=8", "--max_seqlen=30")


def test_planted_data_from_any_directory(command: Command, tmp_path: Path) -> None:
    result = command("--dataset_name", "synthetic", *TINY, "--seed", 7, "--event-features=number,price")
    assert result.returncode == 0 and result.stderr == ""
    dataset = SequenceDataset.open(tmp_path / "tmp_data" / "synthetic")
    assert dataset.num_users == 50 and dataset.schema.best_possible
    for part in (
        "synthetic: tmp_data/synthetic",
        "users            50",
        "best test        AUC 0.",
        "price            numeric",
    ):
        assert part in result.stdout


def test_repeats_are_shown_and_warned_of(tmp_path: Path) -> None:
    schema = generate(SyntheticConfig(num_users=50, num_items=60, num_clusters=8, max_seqlen=30)).schema
    assert "repeats          0 events (0.0%) of an item" in summary(schema, tmp_path)
    for events, warned in ((1000, False), (999, True)):  # 1% is few
        found = summary(replace(schema, counts=schema.counts | {"repeats": 10, "events": events}), tmp_path)
        assert ("warning: users come back" in found) == warned


def test_movielens_beside_its_raw_files(command: Command, tmp_path: Path) -> None:
    write_ml_100k(tmp_path / "data" / "ml-100k", ratings())
    flags = ("--dataset-name=ml-100k", "--data-dir", "data")
    assert_refused(command(*flags), "u.data: 12 users, the published data set has 943", "--check_counts=false")
    assert sorted(path.name for path in (tmp_path / "data").rglob("*")) == ["ml-100k", "u.data", "u.item", "u.user"]
    result = command(*flags, "--check-counts=false")
    assert result.returncode == 0, result.stderr
    assert SequenceDataset.open(tmp_path / "data" / "ml-100k").num_users == 12
    assert (tmp_path / "data" / "ml-100k" / "u.data").is_file()


def test_declared_features_of_a_log_and_its_items(command: Command, tmp_path: Path) -> None:
    rows = [f"{user},{item},{user * item}.5,b{item % 3},r{user}{item}\n" for user in range(6) for item in range(5)]
    (tmp_path / "log.csv").write_text("user_id,item_id,price,brand,request\n" + "".join(rows))
    items = [f"{item},cheap;red,{item}\n" for item in range(5)]
    (tmp_path / "items.csv").write_text("item_id,tags,notes\n" + "".join(items))
    flags = ("--dataset_name=custom", "--name=mine", "--interactions=log.csv", "--items=items.csv")
    declared = ("--item-features=tags:multi", "--set_separator=;")
    result = command(*flags, *declared, "--event_features=price:numeric,brand:categorical,request:control")
    assert result.returncode == 0, result.stderr
    for part in (
        "items.csv: columns that are not declared are left out: notes",
        "price            numeric, of events, 0.5 to 20.5",
        "brand            categorical, of events, 3 values",
        "request          kept, of events, 30 values",
        "tags             multi, of items, 2 values",
    ):
        assert part in result.stdout
    refused = command(*flags, *declared, "--event_features=request:categorical")
    assert_refused(refused, "log.csv: column 'request' has 30 values in 30 rows", "request:control")
    assert SequenceDataset.open(tmp_path / "tmp_data" / "mine").schema.of("event", "numeric"), "the old one stays"


def test_all_named_data_sets(command: Command, tmp_path: Path) -> None:
    write_ml_100k(tmp_path / "raw", ratings())
    write_ml_1m(tmp_path / "raw" / "ml-1m", ratings())
    write_ml_20m(tmp_path / "raw" / "ml-20m", ratings())
    for name, known in DATASETS.items():
        if name.startswith("kuairand"):
            write_kuairand(tmp_path / "raw" / name, name, exposures())
        elif name.startswith("amazon"):
            rows = [(f"A{user}", f"B{item % 5}", 5.0, time) for user, item, _, time in ratings()]
            write_amazon(tmp_path / "raw" / known.logs[0], rows)
    result = command("--dataset_name=all", "--raw_dir=raw", "--check_counts=false", *TINY)
    assert result.returncode == 0, result.stderr
    names = sorted(path.name for path in (tmp_path / "tmp_data").iterdir())
    assert names == sorted(["synthetic", *DATASETS])
    for name in names:
        assert SequenceDataset.open(tmp_path / "tmp_data" / name).num_users > 0


def test_of_all_data_sets_those_that_can_be_made_are_made(command: Command, tmp_path: Path) -> None:
    test_all_named_data_sets(command, tmp_path)
    (tmp_path / "raw" / "ml-1m" / "ratings.dat").write_text("1::2::three::4\n")
    (tmp_path / "raw" / "u.data").write_text("")
    result = command("--dataset_name=all", "--raw_dir=raw", "--check_counts=false", "--data_dir=again", *TINY)
    assert result.returncode == 2
    errors = result.stderr.splitlines()
    assert len(errors) == 2 and "u.data" in errors[0] and "ratings.dat" in errors[1]
    made = {path.name for path in (tmp_path / "again").iterdir() if not path.name.startswith(".")}
    assert made == {"synthetic", *DATASETS} - {"ml-100k", "ml-1m"}


def test_filters_of_published_data_sets(command: Command, tmp_path: Path) -> None:
    write_ml_100k(tmp_path / "data" / "ml-100k", ratings())
    flags = ("--dataset-name=ml-100k", "--data-dir=data", "--check-counts=false")
    result = command(*flags, "--min-user-events=10", "--min_item_events=3", "--max_user_events=12")
    assert result.returncode == 0, result.stderr
    lengths = SequenceDataset.open(tmp_path / "data" / "ml-100k").lengths
    assert lengths.min() >= 10 and lengths.max() <= 12
    assert "u.data: the filters dropped" in result.stdout


def test_custom_and_a_failed_run_after_it(command: Command, tmp_path: Path) -> None:
    log = tmp_path / "log.csv"
    lines = [f"{user},{item},{10 * user + item}\n" for user in range(4) for item in range(5)]
    log.write_text("user_id,sku,ts\n" + "".join(lines))
    flags = ("--dataset_name=custom", "--name=mine", f"--interactions={log}", "--item-column=sku", "--data_dir=d")
    result = command(*flags, "--time_column=ts")
    assert result.returncode == 0, result.stderr
    before = {path: path.read_bytes() for path in (tmp_path / "d").rglob("*") if path.is_file()}
    log.write_text("user_id,sku,ts\n" + "".join(lines[:1]))
    assert_refused(command(*flags, "--min_user_events=3"), "no event passes --min_user_events 3")
    assert {path: path.read_bytes() for path in (tmp_path / "d").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ((), ("--dataset_name is missing", "ml-100k")),
        (("--dataset_name=netflix",), ("'netflix'", "synthetic, ml-100k, ml-1m, ml-20m, kuairand-pure", "custom, all")),
        (("--dataset_name=custom",), ("needs --name",)),
        (("--dataset_name=custom", "--name=ml-1m", "--interactions=x"), ("ml-1m", "published")),
        (("--dataset_name=ml-1m", "--num_users=5"), ("--num_users belongs to --dataset_name synthetic",)),
        (("--dataset_name=synthetic", "--num_items=5"), ("num_items = 5",)),
        (("--dataset_name=synthetic", "--max_user_events=5"), ("--max_user_events does not apply",)),
        (("--dataset_name=ml-1m", "--min_user_events=5", "--max_user_events=4"), ("max_user_events is 4",)),
        (("--dataset_name=synthetic", "--colour=red"), ("colour",)),
        (("--dataset_name=synthetic", "--seed=1", "--seed=2"), ("--seed=2", "already defined")),
        (("--dataset_name=custom", "--name=x", "--interactions=file", "--separator=;"), ("file", "no format", "'x'")),
        (("--dataset_name=ml-1m", "--missing=drop"), ("--missing belongs to --dataset_name custom",)),
        (("--dataset_name=synthetic", "--seqlen-distribution=flat"), ("seqlen_distribution", "lognormal")),
        (("--dataset_name=synthetic", "--data_dir=file/sub"), ("file/sub", "cannot be written")),
        (("synthetic",), ("'synthetic' is no flag",)),
    ],
)
def test_mistakes_end_in_one_line_and_exit_code_2(
    command: Command, tmp_path: Path, flags: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    (tmp_path / "file").write_text("x")
    assert_refused(command(*flags), *parts)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["file"]


def test_both_spellings_of_flags() -> None:
    given = ["run", "--data-dir=a-b", "--raw-dir", "c-d", "--no-check-counts", "-x-y", "--", "--not-me"]
    expected = ["run", "--data_dir=a-b", "--raw_dir", "c-d", "--no_check_counts", "-x-y", "--", "--not-me"]
    assert underscore_flags(given) == expected
