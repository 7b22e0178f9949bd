from __future__ import annotations

import os
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hstu.preprocessing.movielens import DATASETS

from .conftest import contexts, events, make, ratings, write_ml_1m, write_ml_20m, write_ml_100k

WRITERS = {"ml-100k": write_ml_100k, "ml-1m": write_ml_1m, "ml-20m": write_ml_20m}
ROWS = ratings()


def expected(name: str) -> dict[int, list[tuple[int, float, int]]]:
    """Each user's (item, rating, time) in time order, ties in file order."""
    shift = 0.5 if name == "ml-20m" else 0
    ordered = [(user, (item, stars - shift, time)) for user, item, stars, time in sorted(ROWS, key=lambda row: row[3])]
    return {user: [event for owner, event in ordered if owner == user] for user in range(1, 13)}


@pytest.mark.parametrize("name", DATASETS)
def test_published_layouts(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path, ROWS)
    dataset = make(name, tmp_path)
    roles = [feature.role for feature in dataset.schema.features if feature.role != "feature"]
    assert roles == ["user", "item", "action", "time"]
    assert dataset.vocabulary("user_id").tolist() == list(range(1, 13))
    assert dataset.vocabulary("item_id").tolist() == sorted({row[1] for row in ROWS})
    assert dataset.vocabulary("rating").tolist() == ([0.5, 1.5, 2.5, 3.5, 4.5] if name == "ml-20m" else [1, 2, 3, 4, 5])
    assert dataset.schema.action.action_type == "categorical"
    assert events(dataset) == expected(name)


@pytest.mark.parametrize(("events_per_run", "events_per_part"), [(1, 1), (7, 20), (50, 10**6)])
def test_the_sizes_of_runs_and_parts_change_nothing(tmp_path: Path, events_per_run: int, events_per_part: int) -> None:
    write_ml_100k(tmp_path, ROWS)
    known = DATASETS["ml-100k"]
    options = replace(known.options, events_per_run=events_per_run, events_per_part=events_per_part)
    dataset = make("ml-100k", tmp_path, known=replace(known, options=options))
    assert events(dataset) == expected("ml-100k")
    assert contexts(dataset) == contexts(make("ml-100k", tmp_path))


def test_user_contexts(tmp_path: Path) -> None:
    for name, writer in WRITERS.items():
        writer(tmp_path / name, ROWS)
    found = {name: contexts(make(name, tmp_path / name)) for name in WRITERS}
    small, million = (
        {key: list(values.values())[:3] for key, values in found[name].items()} for name in list(found)[:2]
    )
    # People repeat with the user number modulo 3; ages are decades, zip codes regions.
    assert small["age"] == [50, 0, 20] and small["gender"] == ["F", "F", "M"]
    assert small["occupation"] == ["other", "writer", "technician"] and small["zip_code"] == ["T", "0", "8"]
    assert million["age"] == [56, 25, 1] and million["gender"] == ["M", "M", "F"]
    assert million["occupation"] == [16, 15, 10] and million["zip_code"] == [7, 5, 4]
    assert found["ml-20m"] == {}


@pytest.mark.parametrize(
    ("name", "titles", "genres"),
    [
        ("ml-100k", ["Café 0", "Café 1"], [["Comedy", "Documentary"], []]),
        ("ml-1m", ["Misérables, Les (1995)", 'Wars: "One"'], [["Drama", "Musical"], ["Action"]]),
        ("ml-20m", ['Café, "the" first', "Second"], [["Comedy", "Drama"], []]),
    ],
)
def test_genres_and_titles_of_movies(name: str, titles: list[str], genres: list[list[str]], tmp_path: Path) -> None:
    WRITERS[name](tmp_path, ROWS)
    dataset = make(name, tmp_path)
    items, sets = dataset.vocabulary("item_id").tolist(), dataset.item_features("genres")
    known, words = dataset.vocabulary("genres"), [*dataset.vocabulary("title"), None]
    places = [items.index(1), items.index(2)]
    assert [words[dataset.item_features("title")[place]] for place in places] == titles
    assert [sorted(known[sets.ids[sets.offsets[k] : sets.offsets[k + 1]]]) for k in places] == genres
    other = items.index(3)
    assert words[dataset.item_features("title")[other]] is None and sets.lengths[other] == 0
    (movies,) = (path for path in tmp_path.iterdir() if path.name in ("u.item", "movies.dat", "movies.csv"))
    movies.write_text("1::x::y::z\n")
    with pytest.raises(ValueError, match="line 1 is no movie of .* fields"):
        make(name, tmp_path)
    movies.unlink()
    assert not make(name, tmp_path).schema.of("item")


def test_without_a_users_file_there_are_no_contexts_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_ml_1m(tmp_path, ROWS)
    (tmp_path / "users.dat").unlink()
    with caplog.at_level("INFO"):
        assert contexts(make("ml-1m", tmp_path)) == {}
    assert "ml-1m: there is no users.dat, so the data set gets no features of users" in caplog.messages


def test_users_without_a_line_are_refused(tmp_path: Path) -> None:
    write_ml_1m(tmp_path, [*ROWS, (99, 1, 3, 900_000_000)])
    with pytest.raises(ValueError, match=r"users.dat: 1 users of .*ratings.dat|users.dat: 1 of 13 users"):
        make("ml-1m", tmp_path)


def test_raw_files_are_found_plain_a_folder_deeper_or_in_the_zip(tmp_path: Path) -> None:
    write_ml_1m(tmp_path / "plain", ROWS)
    write_ml_1m(tmp_path / "unpacked" / "ml-1m", ROWS)
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "ml-1m.zip", "w") as archive:
        archive.writestr("../../evil.txt", "x")
        for file in (tmp_path / "plain").iterdir():
            archive.write(file, f"ml-1m/{file.name}")
    plain = make("ml-1m", tmp_path / "plain")
    for place in ("unpacked", "zipped"):
        found = make("ml-1m", tmp_path / "nowhere", tmp_path / place)
        assert found.schema == plain.schema and len(found.schema.source) == 3
        assert events(found) == events(plain)
    assert not list(tmp_path.rglob("evil.txt"))
    assert [path.name for path in (tmp_path / "zipped").iterdir()] == ["ml-1m.zip"]


def test_first_directory_wins(tmp_path: Path) -> None:
    write_ml_100k(tmp_path / "a", ROWS)
    write_ml_100k(tmp_path / "b", ROWS[1:])
    assert make("ml-100k", tmp_path / "a", tmp_path / "b").schema.counts["events"] == len(ROWS)


def test_counts_are_checked(tmp_path: Path) -> None:
    write_ml_100k(tmp_path, ROWS)
    with pytest.raises(ValueError, match=r"u.data: 12 users, the published data set has 943; .*--check_counts=false"):
        make("ml-100k", tmp_path, check_counts=True)
    assert not (tmp_path / "made" / "ml-100k").exists()


def test_filters(tmp_path: Path) -> None:
    write_ml_100k(tmp_path, ROWS)
    least = make("ml-100k", tmp_path, min_user_events=10, min_item_events=3)
    assert least.lengths.min() >= 10 and least.num_events < len(ROWS)
    items = least.gather(np.arange(least.num_users), np.zeros(least.num_users), least.lengths).items
    assert np.bincount(items).min() >= 3 and len(np.bincount(items)) == least.schema.item.vocab_size
    recent = make("ml-100k", tmp_path, max_user_events=5)
    assert events(recent) == {user: rows[-5:] for user, rows in expected("ml-100k").items()}
    assert recent.schema.item.vocab_size == len({row[1] for row in ROWS})  # the catalogue stays


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7\tx\t3\t900000000\n", "line 2, field 'movieId': 'x' is no number"),
        ("7\t5\t3\n", "line 2 has 3 fields, not 4: '7.t5.t3'"),
        ("7\t5\t3\t900000000\t1\n", "line 2 has 5 fields, not 4"),
        ("7\t5\t9\t900000000\n", "line 2, field 'rating': '9' is no rating from 0.5 to 5"),
        ("7\t5\t3\t900000000000\n", "line 2, field 'timestamp': '900000000000' is no time in seconds"),
        ('7\t"5"\t3\t900000000\n', "line 2 holds a quote"),
        ("\n7\t5\t3\t900000000\n", "line 2 is empty"),
        (f"{2**63}\t5\t3\t900000000\n", "line 2, field 'userId': '9223372036854775808' is no number"),
        ("7\t\t3\t900000000\n", "line 2, field 'movieId': '' is no number"),
    ],
)
def test_malformed_ratings_are_refused(tmp_path: Path, line: str, message: str) -> None:
    write_ml_100k(tmp_path, ROWS[:1])
    with (tmp_path / "u.data").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message) as error:
        make("ml-100k", tmp_path)
    assert "u.data: line 2" in str(error.value) and "\n" not in str(error.value)


def test_empty_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("")
    with pytest.raises(ValueError, match="u.data: is empty"):
        make("ml-100k", tmp_path)
    (tmp_path / "ratings.csv").write_text("user,item\n1,2\n")
    with pytest.raises(ValueError, match="the first line is b'user,item', expected 'userId,movieId"):
        make("ml-20m", tmp_path)
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n")
    with pytest.raises(ValueError, match="ratings.csv: has no rows"):
        make("ml-20m", tmp_path)
    (tmp_path / "ml-1m.zip").write_bytes(b"PK half of a download")
    with pytest.raises(ValueError, match="ml-1m.zip: cannot be read"):
        make("ml-1m", tmp_path)


@pytest.mark.skipif(not os.environ.get("HSTU_RAW_DIR"), reason="HSTU_RAW_DIR names no raw files")
def test_published_ml_100k(tmp_path: Path) -> None:
    raw = Path(os.environ["HSTU_RAW_DIR"])
    dataset = make("ml-100k", tmp_path, raw / "ml-100k", raw, check_counts=True)
    assert dataset.schema.counts["seqlen_min"] == 20 and dataset.schema.counts["seqlen_max"] == 737
    sizes = {feature.name: feature.vocab_size for feature in dataset.schema.features}
    assert sizes["rating"] == 5 and sizes["gender"] == 2 and sizes["occupation"] == 21
