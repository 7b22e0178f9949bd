from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
import pytest

from hstu.data import EncodedDataset
from hstu.data.files import FileFormat, open_table, parquet, source
from hstu.data.interactions import InteractionSpec
from hstu.data.table import encode as encode_files
from hstu.data.writer import writing
from tests.samples import read_back

from .conftest import ratings

FRAME = pl.DataFrame(ratings(), schema=["who", "what", "stars", "when"], orient="row")
COLUMNS = {"user_column": "who", "item_column": "what", "time_column": "when", "action_column": "stars"}


def encode(
    path: Path,
    users: Path | None = None,
    items: Path | None = None,
    formats: dict[str, FileFormat] | None = None,
    **options,
) -> EncodedDataset:
    spec = InteractionSpec(
        name="mine", file=str(path), users_file=str(users), items_file=str(items), **COLUMNS | options
    )
    with tempfile.TemporaryDirectory() as folder:
        with writing(folder) as writer:
            writer.schema(encode_files(path, spec, writer, users=users, items=items, formats=formats))
        return read_back(Path(folder))


def test_all_formats_give_the_same_data_set(tmp_path: Path) -> None:
    FRAME.write_csv(tmp_path / "a.csv")
    FRAME.write_csv(tmp_path / "a.tsv", separator="\t")
    FRAME.write_csv(tmp_path / "semicolons.csv", separator=";")
    FRAME.write_csv(tmp_path / "bom.csv", include_bom=True)
    FRAME.write_parquet(tmp_path / "a.parquet")
    FRAME.write_ndjson(tmp_path / "a.jsonl")
    formats = {"semicolons.csv": FileFormat(separator=";")}
    found = [
        encode(path, formats={"interactions": formats.get(path.name, FileFormat())})
        for path in sorted(tmp_path.iterdir())
    ]
    assert len(found) == 6
    for dataset in found[1:]:
        assert dataset.schema.features == found[0].schema.features
        assert all((dataset.events[name] == found[0].events[name]).all() for name in found[0].events)
        assert all(dataset.vocabularies[name] == found[0].vocabularies[name] for name in found[0].vocabularies)


def test_quoted_strings_and_dates(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(
        "who,what,stars,when\n"
        'ann,"tea, green",like,2024-05-31T12:00:00Z\n'
        "ann,milk,skip,2024-05-30\n"
        "ann,rice,like,2024-06-01 08:30:00\n"
    )
    dataset = encode(path)
    assert dataset.vocabularies["item_id"].to_pylist() == ["tea, green", "milk", "rice"]
    assert dataset.events["item_id"].tolist() == [1, 0, 2]
    assert dataset.vocabularies["action"].to_pylist() == ["like", "skip"]
    assert list(dataset.schema.source) == ["log.csv"] and len(dataset.schema.source["log.csv"]) == 64


def test_users_file(tmp_path: Path) -> None:
    FRAME.write_csv(tmp_path / "log.csv")
    lines = [f"{user}\t{'north' if user % 2 else 'south'}\n" for user in range(1, 13)]
    (tmp_path / "users.tsv").write_text("who\tregion\n" + "".join(lines))
    dataset = encode(tmp_path / "log.csv", tmp_path / "users.tsv")
    assert [feature.name for feature in dataset.schema.contexts] == ["region"]
    assert dataset.contexts["region"].tolist() == [0, 1] * 6
    assert len(dataset.schema.source) == 2


def test_a_frame_with_categoricals(tmp_path: Path) -> None:
    frame = FRAME.with_columns(pl.col("who").cast(pl.String).cast(pl.Categorical), pl.col("stars").cast(pl.String))
    frame = frame.with_columns(pl.col("stars").cast(pl.Categorical))
    frame.write_parquet(tmp_path / "log.parquet")
    FRAME.write_csv(tmp_path / "log.csv")
    found, wanted = (encode(tmp_path / name) for name in ("log.parquet", "log.csv"))
    assert found.schema.features == wanted.schema.features
    assert all((found.events[name] == wanted.events[name]).all() for name in wanted.events)


def test_a_column_that_appears_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("who,what,what,stars,when\n1,2,3,4,5\n")
    with pytest.raises(ValueError, match="log.csv: column 'what' appears twice; rename one"):
        encode(tmp_path / "log.csv")


def test_keys_of_late_json_lines_count(tmp_path: Path) -> None:
    FRAME.write_csv(tmp_path / "log.csv")
    lines = [f'{{"who": {user}' + (', "region": "x"}' if user > 1100 else "}") for user in range(1, 1300)]
    (tmp_path / "users[1].jsonl").write_text("\n".join(lines))
    with pytest.raises(ValueError, match="column 'region', row 1: value None is missing"):
        encode(tmp_path / "log.csv", tmp_path / "users[1].jsonl")


def test_two_files_of_one_name_keep_a_checksum_each(tmp_path: Path) -> None:
    (tmp_path / "people").mkdir()
    FRAME.write_csv(tmp_path / "log.csv")
    (tmp_path / "people" / "log.csv").write_text("who,region\n" + "".join(f"{user},north\n" for user in range(1, 13)))
    source = encode(tmp_path / "log.csv", tmp_path / "people" / "log.csv").schema.source
    assert list(source) == ["log.csv", "people/log.csv"] and len(set(source.values())) == 2


def test_items_file(tmp_path: Path) -> None:
    FRAME.write_csv(tmp_path / "log.csv")
    kinds = {item: "tea" if item % 3 else "milk" for item in FRAME["what"].unique().to_list()}
    rows = [f"{item},{kind},{item % 2 == 0}\n" for item, kind in kinds.items()]
    (tmp_path / "items.csv").write_text("what,kind,even\n9999,none,true\n" + "".join(rows))
    dataset = encode(tmp_path / "log.csv", items=tmp_path / "items.csv")
    assert [(f.name, f.level, f.vocab_size) for f in dataset.schema.categories] == [
        ("kind", "item", 2),
        ("even", "item", 2),
    ]
    assert dataset.vocabularies["kind"].to_pylist() == ["milk", "tea"]
    expected = [int(kinds[item] == "tea") for item in dataset.vocabularies["item_id"].to_pylist()]
    assert dataset.categories["kind"].tolist() == expected
    (tmp_path / "items.csv").write_text("what,kind\n" + "".join(f"{item},x\n" for item in list(kinds)[1:]))
    with pytest.raises(ValueError, match=f"items.csv: 1 of {len(kinds)} items of .*log.csv are missing"):
        encode(tmp_path / "log.csv", items=tmp_path / "items.csv")
    (tmp_path / "items.csv").write_text("what,kind\n1,x\n1,y\n")
    with pytest.raises(ValueError, match="items.csv: row 2: item 1 appears twice"):
        encode(tmp_path / "log.csv", items=tmp_path / "items.csv")


JSON = '{"who":1,"what":2,"stars":3,"when":4}\n'
TEXT = {"user_column": "user_id", "item_column": "item_id", "time_column": None, "action_column": None}
TEXT["formats"] = {"interactions": FileFormat(format="sequences")}


def test_text_of_pairs(tmp_path: Path) -> None:
    path = tmp_path / "pairs.txt"
    path.write_text("u2 30\nu1\t7\n\nu2   10 \nu1 8\nu2 20\nu1 7\n")
    dataset = encode(path, **TEXT, duplicates="keep")
    assert dataset.vocabularies["user_id"].to_pylist() == ["u2", "u1"]
    assert dataset.vocabularies["item_id"].to_pylist() == [7, 8, 10, 20, 30]
    assert dataset.events["item_id"].tolist() == [4, 2, 3, 0, 1, 0]
    assert dataset.schema.time is None and dataset.schema.action is None


def test_text_of_sequences(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "sequences.txt"
    path.write_text("2 30 10 20\n1 7 8 9 10\n")
    with caplog.at_level("INFO"):
        dataset = encode(path, **TEXT)
    assert dataset.lengths.tolist() == [4, 3]
    assert dataset.vocabularies["item_id"].to_pylist() == [7, 8, 9, 10, 20, 30]
    assert dataset.events["item_id"].tolist() == [0, 1, 2, 3, 5, 3, 4]
    assert "7 rows in, 7 events out, dropped: none" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("log.csv", "", {}, "log.csv: is empty"),
        ("log.csv", "who,what,stars,when\n", {}, "log.csv: has no rows"),
        ("log.csv", "who,what,when\n1,2,3\n", {}, "column 'stars' is missing; present: who, what, when"),
        ("log.csv", "who,what,stars,when\n1,2,3,4\n1,2,3,4,5\n", {}, "line 3 has 5 fields, the header has 4"),
        ("log.csv", "who,what,stars,when\n1,2,3,4\n1,2\n", {}, "line 3 has 2 fields, the header has 4"),
        ("log.csv", "who,what,stars,when\n1,2,3,4\n1,2,3,\n", {}, "column 'when', row 2: value None is missing"),
        ("log.csv", "who,what,stars,when\n1,2,nan,4\n", {}, "column 'stars', row 1: value nan is not finite"),
        ("log.csv", "who,what,stars,when\n1,2,3,noon\n", {}, "column 'when', row 1: value 'noon' is no time"),
        ("log.parquet", "no parquet", {}, "log.parquet: cannot be read"),
        ("log.jsonl", "", {}, "log.jsonl: (is empty|cannot be read)"),
        ("log.jsonl", '{"who":1,"what":2}\n', {}, "column 'when' is missing; present: who, what"),
        ("log.jsonl", JSON + '{"who":1,"when":3}\n', {}, "column 'what', row 2: value None is missing"),
        ("log.jsonl", JSON + '{"who":1,"what":\n', {}, "log.jsonl: line 2 is no JSON: '{"),
        ("log.jsonl", JSON + "[1,2,3,4]\n", {}, "log.jsonl: line 2 is no object"),
        ("log.csv", b"who,what,stars,when\n1,2,3,4\n\xff\xfe,1,2,3\n", {}, "log.csv: line 3: .* is not UTF-8"),
        ("log.txt", "", TEXT, "log.txt: is empty"),
        ("log.txt", "1 2\n\n3\n", TEXT, "line 3 holds '3' alone"),
        ("u.data", "1\t2\t3\t4\n2\t2\t3\t4\n1\t3\t3\t4\n", TEXT, "line 3: user '1' has a line already"),
    ],
)
def test_wrong_files_are_refused(tmp_path: Path, name: str, content: str | bytes, options: dict, message: str) -> None:
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError, match=message) as error:
        encode(tmp_path / name, **options)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    for read in (lambda path: encode(path), lambda path: open_table(path, ["who"])):
        with pytest.raises(ValueError, match=r"absent.csv: cannot be read"):
            read(tmp_path / "absent.csv")


def test_a_users_file_without_a_header_is_refused(tmp_path: Path) -> None:
    FRAME.write_csv(tmp_path / "log.csv")
    (tmp_path / "users.txt").write_text("1 north\n")
    with pytest.raises(ValueError, match="users.txt: its ending tells no format; its first line is '1 north'"):
        encode(tmp_path / "log.csv", tmp_path / "users.txt")


def test_a_file_of_many_blocks_is_one_of_few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FRAME.write_csv(tmp_path / "a.csv")
    FRAME.write_parquet(tmp_path / "a.parquet")
    (tmp_path / "text.txt").write_text("".join(f"{user} {item}\n" for user, item in FRAME["who", "what"].iter_rows()))
    options = {"a.csv": {}, "a.parquet": {}, "text.txt": TEXT | {"duplicates": "keep"}}
    wanted = {name: encode(tmp_path / name, **more) for name, more in options.items()}
    monkeypatch.setattr(source, "CHUNK", 60)
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 10)
    for name, more in options.items():
        fmt = more.get("formats", {"interactions": FileFormat()})["interactions"]
        assert len(list(open_table(tmp_path / name, ["who", "what"], fmt).read(None))) > 5
        found = encode(tmp_path / name, **more)
        assert found.schema == wanted[name].schema and found.vocabularies == wanted[name].vocabularies
        assert all((found.events[key] == wanted[name].events[key]).all() for key in found.events)


def test_a_short_line_far_down_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "CHUNK", 60)
    FRAME.write_csv(tmp_path / "log.csv")
    with (tmp_path / "log.csv").open("a") as file:
        file.write("1,2\n")
    with pytest.raises(ValueError, match=f"line {FRAME.height + 2} has 2 fields, the header has 4"):
        encode(tmp_path / "log.csv")
