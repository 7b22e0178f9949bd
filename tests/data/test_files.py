"""Every format gives the same table; what does not fit is refused with its first line and the flag to use."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest

from hstu.data.files import FileFormat, open_table, parquet, printable, read_table, source

FRAME = pl.DataFrame(
    {
        "user_id": [f"u{k % 5}" for k in range(40)],
        "item_id": [f"é {k}" for k in range(40)],
        "n": list(map(str, range(40))),
    }
)
IDS = ["user_id", "item_id"]


def text(separator: str = ",", header: bool = True, frame: pl.DataFrame = FRAME) -> str:
    rows = [frame.columns] * header + list(frame.rows())
    return "".join(separator.join(row) + "\n" for row in rows)


OBJECTS = [json.dumps(row) for row in FRAME.to_dicts()]
ZSTD = pa.Codec("zstd").compress(text().encode(), asbytes=True)
FILES: list[tuple[str, str | bytes, dict[str, str]]] = [
    ("a.csv", text(), {}),
    ("crlf.csv", text().replace("\n", "\r\n"), {}),
    ("blank.csv", "\n" + text().replace("\n", "\n\n", 7), {}),
    ("open_end.csv", text().rstrip("\n"), {}),
    ("quoted.csv", text('","').replace("\n", '"\n"')[:-1].join(['"', ""]), {}),
    ("padded.csv", " user_id ,\titem_id, n \n" + text(header=False), {}),
    ("mark.csv", text().encode("utf-8-sig"), {}),
    ("utf16.csv", text().encode("utf-16"), {}),
    ("utf16le.csv", text().encode("utf-16-le"), {}),
    ("utf16be.tsv", text("\t").encode("utf-16-be"), {}),
    ("latin.csv", text().encode("latin-1"), {"encoding": "latin-1"}),
    ("a.csv.gz", gzip.compress(text().encode(), mtime=0), {}),
    ("a.csv.bz2", bz2.compress(text().encode()), {}),
    ("a.csv.xz", lzma.compress(text().encode()), {}),
    ("a.csv.zst", ZSTD, {}),
    ("a.tsv", text("\t"), {}),
    ("a.inter", text("\t", header=False).join(["user_id:token\titem_id:token\tn:float\n", ""]), {}),
    ("semicolon.csv", text(";"), {"separator": ";"}),
    ("ratings.dat", text("::", header=False), {"format": "csv", "separator": "::", "columns": "user_id,item_id,n"}),
    ("typed.txt", text("|", header=False), {"format": "csv", "separator": "|",
                                            "columns": "user_id:token,item_id:token,n:float"}),
    ("a.jsonl", "\n".join(OBJECTS), {}),
    ("escaped.json", "[\n" + ",\n".join(OBJECTS) + "\n]\n", {}),
    ("one_line.json", "[" + ",".join(OBJECTS) + "]", {}),
    ("indented.json", json.dumps(FRAME.to_dicts(), indent=2), {}),
    ("named.json", "\n".join(OBJECTS), {"format": "jsonl"}),
]  # fmt: skip


@pytest.mark.parametrize("chunk", [70, 1 << 24])
@pytest.mark.parametrize(("name", "content", "options"), FILES, ids=[name for name, *_ in FILES])
def test_one_table_in_every_format(
    tmp_path: Path, name: str, content: str | bytes, options: dict, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "CHUNK", chunk)
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert read_table(tmp_path / name, IDS, FileFormat(**options)).equals(FRAME)
    blocks = list(open_table(tmp_path / name, IDS, FileFormat(**options)).read(["item_id"]))
    assert pl.concat(blocks).equals(FRAME.select("item_id")) and (len(blocks) > 3) == (chunk == 70)


@pytest.mark.parametrize("what", ["parts", "parts/*.parquet", "parts/**/*.parquet"])
def test_parts_of_parquet_in_the_order_of_their_names(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "ROWS_AT_ONCE", 7)
    (tmp_path / "parts").mkdir()
    for number in (3, 1, 0, 2):
        FRAME[10 * number : 10 * number + 10].write_parquet(tmp_path / "parts" / f"part-{number}.parquet")
    (tmp_path / "parts" / "_SUCCESS").touch()
    (tmp_path / "parts" / ".part-0.parquet.crc").write_text("x")
    assert read_table(tmp_path / what, IDS).equals(FRAME)
    FRAME.with_columns(pl.col("n").cast(pl.Int64)).write_parquet(tmp_path / "parts" / "part-4.parquet")
    with pytest.raises(ValueError, match=r"part-4.parquet: column 'n' is Int64, in .*part-0.parquet it is String"):
        read_table(tmp_path / what, IDS)


def test_parts_of_text_need_one_header(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.csv").write_text(text(frame=FRAME[10 * number : 10 * number + 10]))
    assert read_table(tmp_path, IDS).equals(FRAME)
    (tmp_path / "4.csv").write_text("item_id,user_id,n\n")
    with pytest.raises(ValueError, match=r"4.csv: has the columns \['item_id', 'user_id', 'n'\], .*0.csv has"):
        read_table(tmp_path, IDS)


def test_quotes_in_tsv_are_characters_and_no_row_is_swallowed(tmp_path: Path) -> None:
    lines = [f"u{k}\ti{k}\t{chr(34) * (k in (3, 17))}Intro\n" for k in range(59)]
    (tmp_path / "log.tsv").write_text("user_id\titem_id\tname\n" + "".join(lines))
    found = read_table(tmp_path / "log.tsv", IDS)
    assert found.height == 59 and found["name"][17] == '"Intro'
    with pytest.raises(ValueError, match="log.tsv: line 19: a double quote within a field"):  # closed far below
        read_table(tmp_path / "log.tsv", IDS, FileFormat(quoting="double"))


LISTS = [{"user_id": "a", "item_id": ["1", "2", "x"], "t": [1, 2, 3]}, {"user_id": "b", "item_id": ["3"], "t": [4]}]


def test_lists_are_read_as_lists(tmp_path: Path) -> None:
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, LISTS)))
    (tmp_path / "l.inter").write_text("user_id:token\titem_id:token_seq\tt:float_seq\na\t1 2 x\t1 2 3\nb\t3\t4\n")
    found = [read_table(tmp_path / name, IDS) for name in ("l.jsonl", "l.inter")]
    assert found[0].equals(found[1]) and found[0]["item_id"].to_list() == [["1", "2", "x"], ["3"]]
    (tmp_path / "m.csv").write_text(
        'user_id,sequence_item_ids,sequence_ratings,sequence_timestamps\na,"1,2,x","5,4,3","1,2,3"\nb,3,5,4\n'
    )
    found = read_table(tmp_path / "m.csv", ["user_id"])
    assert found["sequence_item_ids"].to_list() == [["1", "2", "x"], ["3"]]


REFUSED: list[tuple[str, str | bytes, dict[str, str], str]] = [
    ("a.json", '{"user_id":1,"item_id":2}\n', {}, r"first line is '{.user_id.*; --format jsonl reads one object"),
    ("a.jsonl", '[{"user_id":1,"item_id":2}]', {}, "--format json reads an array of objects"),
    ("a.csv", '{"user_id":1,"item_id":2}\n', {}, "--format jsonl reads one object"),
    ("a.csv", "user_id;item_id\n1;2\n", {}, "'user_id' is missing; .*--format csv --separator ';' fits"),
    ("a.csv", "user_id\titem_id\n1\t2\n", {}, "--format csv --separator tab fits"),
    ("a.txt", "user_id item_id\n1 2\n", {}, "its ending tells no format; .*--format csv --separator space fits"),
    ("a.txt", "1 2 3\n", {}, "its ending tells no format; its first line is '1 2 3'; say what it is with --format"),
    ("a.txt", "user_id item_id\n1 2\n", {"format": "sequences"}, "line 1 is a header, which sequences lack"),
    ("a.csv", "user_id,item_id\n1,2\n", {"columns": "user_id,item_id"}, "has a header of its own; leave --columns"),
    ("a.csv", "1,2\n", {"columns": "user_id,item_id,n"}, "line 1 has 2 fields, there are names for 3"),
    ("a.csv", 'user_id,item_id\n1,"2\n1,3\n', {}, "line 2: the first with an odd number"),
    ("a.csv", 'user_id,item_id\n1,5" pipe\n', {}, "line 2: the first with an odd number of .*'1,5. pipe'"),
    ("a.csv", 'user_id,item_id\n1,2\n1,5" x 7"\n', {}, "line 3: a double quote within a field: '1,5. x 7.'"),
    ("a.csv", "user_id,item_id\r1,2\r", {}, "line 1 holds a carriage return alone"),
    ("a.csv", "user_id,item_id\n1,2\n1\r,3\n", {}, "line 3 holds a carriage return alone"),
    ("a.csv", gzip.compress(b"user_id,item_id\n", mtime=0), {}, "is gzip .end its name in .gz"),
    ("a.csv.gz", gzip.compress(text().encode(), mtime=0)[:-20], {}, "a.csv.gz: cannot be read .*ended before"),
    ("a.csv.zst", ZSTD[:-20], {}, "a.csv.zst: cannot be read .*[Tt]runcated"),
    ("a.csv.zst", b"user_id,item_id\n", {}, "a.csv.zst: cannot be read"),
    ("a.csv", b"PAR1xxxx", {}, "is parquet"),
    ("a.parquet", text(), {}, "cannot be read as parquet"),
    ("a.jsonl", '{"user_id":1,"item_id":2}\n{"user_id":1,"user_id":2}\n', {}, "line 2 has the key 'user_id' twice"),
    ("a.jsonl", '{"user_id":1,"item_id":NaN}\n', {}, "line 1 holds NaN, which is no JSON"),
    ("a.json", '[{"user_id":1,"item_id":2},\n{"user_id":1,"item_id":NaN}]', {}, "element 2 holds NaN"),
    ("a.json", '[{"user_id":1,"item_id":2},\n{"user_id":1,"item_id":', {}, "after element 1 comes .* is no JSON"),
    ("a.jsonl", "\n\n", {}, "a.jsonl: is empty"),
    ("a.json", "[]", {}, "a.json: is empty"),
    ("a.json", "", {}, "a.json: is empty"),
    ("a.jsonl", '{"user_id":{"a":1},"item_id":2}\n', {}, "key 'user_id' holds objects; give a number or a string"),
    ("a.jsonl", '{"user_id":1,"item_id":[2]}\n{"user_id":1,"item_id":2}\n', {}, "line 2: key 'item_id' holds single"),
    ("a.jsonl", '{"user_id":"a","item_id":"b"}\n{"user_id":"a","item_id":["b"]}\n', {}, "key 'item_id' holds lists"),
    ("a.jsonl", '{"user_id":["a"],"item_id":"b"}\n{"user_id":"a","item_id":"b"}\n', {}, "key 'user_id' holds single"),
    ("a.json", '[{"user_id":"a","item_id":"b"},{"user_id":"a","item_id":{}}]', {}, "key 'item_id' holds objects"),
    ("a.parquet", b"", {"separator": ";"}, "is read as parquet, to which --separator does not apply; what is between "
     "the members of sets in one column is --set_separator"),
    ("a.csv", "user_id,item_id,tags\n1,2,a|b\n", {"separator": "|"}, "'user_id' is missing; present: "
     "user_id,item_id,tags; .* --format csv --separator ',' fits; what is between the members .* is --set_separator"),
    ("a.csv", "1,2,a|b\n", {"separator": ";", "columns": "user_id,item_id,t"}, "line 1 has 1 fields.* --set_separator"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "options", "message"), REFUSED)
def test_what_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, name: str, content: str | bytes, options: dict, message: str
) -> None:
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as error:
        list(open_table(tmp_path / name, IDS, FileFormat(**options)).read(IDS))
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("where", ["absent", "empty", "*.absent"])
def test_no_file_is_said(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="cannot be read|stands for no file"):
        read_table(tmp_path / where, IDS)


def test_repeated_keys_are_seen_among_missing_ones(tmp_path: Path) -> None:
    """As many keys as rows and columns, but one twice."""
    (tmp_path / "a.jsonl").write_text('{"user_id":1,"item_id":2,"n":1}\n{"user_id":1,"item_id":3,"item_id":4}\n')
    with pytest.raises(ValueError, match="line 2 has the key 'item_id' twice"):
        read_table(tmp_path / "a.jsonl", IDS)


def test_control_characters_are_shown_escaped(tmp_path: Path) -> None:
    assert printable("a\x1b[2J é") == "a\\x1b[2J é"
    (tmp_path / "a.csv").write_text("user\x1b[2J,item_id\n1,2\n")
    with pytest.raises(ValueError, match="present: user") as error:
        read_table(tmp_path / "a.csv", IDS)
    assert "\x1b" not in str(error.value)
