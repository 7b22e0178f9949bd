from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from hstu.data import EncodedDataset, SequenceDataset, write_dataset
from preprocessing.movielens import DATASETS, encode_movielens

from .conftest import ratings, write_ml_1m, write_ml_20m, write_ml_100k

WRITERS = {"ml-100k": write_ml_100k, "ml-1m": write_ml_1m, "ml-20m": write_ml_20m}
ROWS = ratings()


def encode(name: str, *directories: Path, check_counts: bool = False) -> EncodedDataset:
    return encode_movielens(name, list(directories), directories[0], check_counts=check_counts)


def expected_sequences() -> list[list[tuple[int, int, int]]]:
    """Each user's (item, rating, time) in time order, ties in file order."""
    ordered = sorted(ROWS, key=lambda row: (row[0], row[3]))
    return [[row[1:] for row in ordered if row[0] == user] for user in range(1, 13)]


@pytest.mark.parametrize("name", DATASETS)
def test_published_layouts(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / "raw", ROWS)
    write_dataset(encode(name, tmp_path / "raw"), tmp_path / name)
    dataset = SequenceDataset.open(tmp_path / name)
    assert [feature.role for feature in dataset.schema.features if feature.role != "context"] == [
        "user",
        "item",
        "action",
        "time",
    ]
    items, stars = dataset.vocabulary("item_id"), dataset.vocabulary("rating")
    assert dataset.vocabulary("user_id").tolist() == list(range(1, 13))
    assert stars.tolist() == ([0.5, 1.5, 2.5, 3.5, 4.5] if name == "ml-20m" else [1, 2, 3, 4, 5])
    assert dataset.schema.action.action_type == "categorical"
    shift = 0.5 if name == "ml-20m" else 0
    for user, expected in enumerate(expected_sequences()):
        batch = dataset.gather(np.array([user]), np.array([0]), dataset.lengths[[user]])
        found = zip(items[batch.items], stars[batch.actions] + shift, batch.times, strict=True)
        assert list(found) == expected


def contexts(dataset: EncodedDataset) -> dict[str, list]:
    return {
        name: np.array(dataset.vocabularies[name].to_pylist())[ids].tolist() for name, ids in dataset.contexts.items()
    }


def test_user_contexts(tmp_path: Path) -> None:
    for name, writer in WRITERS.items():
        writer(tmp_path / name, ROWS)
    small = contexts(encode("ml-100k", tmp_path / "ml-100k"))
    # People repeat with the user number modulo 3; ages are decades, zip codes regions.
    assert small["age"][:3] == [50, 0, 20] and small["gender"][:3] == ["F", "F", "M"]
    assert small["occupation"][:3] == ["other", "writer", "technician"]
    assert small["zip_code"][:3] == ["T", "0", "8"]
    million = contexts(encode("ml-1m", tmp_path / "ml-1m"))
    assert million["age"][:3] == [56, 25, 1] and million["gender"][:3] == ["M", "M", "F"]
    assert million["occupation"][:3] == [16, 15, 10] and million["zip_code"][:3] == [7, 5, 4]
    assert contexts(encode("ml-20m", tmp_path / "ml-20m")) == {}


def test_without_a_users_file_there_are_no_contexts_and_one_line_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_ml_1m(tmp_path, ROWS)
    (tmp_path / "users.dat").unlink()
    with caplog.at_level("INFO"):
        assert contexts(encode("ml-1m", tmp_path)) == {}
    assert [record.getMessage() for record in caplog.records] == [
        "ml-1m: there is no users.dat, so the data set gets no user contexts"
    ]


def test_raw_files_are_found_plain_a_folder_deeper_or_in_the_zip(tmp_path: Path) -> None:
    write_ml_1m(tmp_path / "plain", ROWS)
    write_ml_1m(tmp_path / "unpacked" / "ml-1m", ROWS)
    (tmp_path / "zipped").mkdir()
    with zipfile.ZipFile(tmp_path / "zipped" / "ml-1m.zip", "w") as archive:
        archive.writestr("../../evil.txt", "x")
        for file in (tmp_path / "plain").iterdir():
            archive.write(file, f"ml-1m/{file.name}")
    expected = encode("ml-1m", tmp_path / "plain")
    for place in ("unpacked", "zipped"):
        found = encode("ml-1m", tmp_path / "nowhere", tmp_path / place)
        assert found.schema == expected.schema and len(found.schema.source) == 2
        np.testing.assert_array_equal(found.events["item_id"], expected.events["item_id"])
    assert not list(tmp_path.rglob("evil.txt"))
    assert [path.name for path in (tmp_path / "zipped").iterdir()] == ["ml-1m.zip"]


def test_first_directory_wins(tmp_path: Path) -> None:
    write_ml_100k(tmp_path / "a", ROWS)
    write_ml_100k(tmp_path / "b", ROWS[1:])
    assert encode("ml-100k", tmp_path / "a", tmp_path / "b").schema.counts["events"] == len(ROWS)


def test_counts_are_checked(tmp_path: Path) -> None:
    write_ml_100k(tmp_path, ROWS)
    with pytest.raises(ValueError, match=r"u.data: 12 users, the published data set has 943; .*--check_counts=false"):
        encode("ml-100k", tmp_path, check_counts=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7\tx\t3\t900000000\n", "'?x'?"),
        ("7\t5\t3\n", "column 'timestamp', row 2: value None is missing"),
        ("7\t5\t3\t900000000\t1\n", "found more fields"),
    ],
)
def test_malformed_ratings_are_refused(tmp_path: Path, line: str, message: str) -> None:
    write_ml_100k(tmp_path, ROWS[:1])
    with (tmp_path / "u.data").open("a") as file:
        file.write(line)
    with pytest.raises(ValueError, match=message) as error:
        encode("ml-100k", tmp_path)
    assert "u.data" in str(error.value) and "\n" not in str(error.value)


def test_empty_foreign_and_broken_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text("")
    with pytest.raises(ValueError, match="u.data: is empty"):
        encode("ml-100k", tmp_path)
    (tmp_path / "ratings.csv").write_text("user,item\n1,2\n")
    with pytest.raises(ValueError, match="the first line is b'user,item', expected 'userId,movieId"):
        encode("ml-20m", tmp_path)
    (tmp_path / "ml-1m.zip").write_bytes(b"PK half of a download")
    with pytest.raises(ValueError, match="ml-1m.zip: cannot be read as a zip"):
        encode("ml-1m", tmp_path)


@pytest.mark.skipif(not os.environ.get("HSTU_RAW_DIR"), reason="HSTU_RAW_DIR names no raw files")
def test_published_ml_100k() -> None:
    raw = Path(os.environ["HSTU_RAW_DIR"])
    dataset = encode("ml-100k", raw / "ml-100k", raw, check_counts=True)
    assert dataset.schema.counts["seqlen_min"] == 20 and dataset.schema.counts["seqlen_max"] == 737
    sizes = {feature.name: feature.vocab_size for feature in dataset.schema.features}
    assert sizes["rating"] == 5 and sizes["gender"] == 2 and sizes["occupation"] == 21
