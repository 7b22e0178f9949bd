"""Bad files of every kind: each is refused in one line that names it, or read as what it plainly says."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import tempfile
from pathlib import Path
from unittest import mock

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hstu.cli.preprocess import DATASETS
from hstu.data.interactions import InteractionSpec
from hstu.data.reader import SequenceDataset
from hstu.data.table import encode
from hstu.data.writer import writing
from hstu.preprocessing.kuairand import EVENTS
from hstu.preprocessing.layout import Field, Layout
from hstu.preprocessing.published import Published

from .conftest import events, exposures, make, ratings, write_amazon, write_kuairand, write_ml_1m, write_ml_20m
from .conftest import write_ml_100k as write_small

NAMES = ("ml-100k", "ml-1m", "ml-20m", "kuairand-pure", "amazon-toys")
TOKENS = [
    *(
        "",
        " ",
        "x",
        "-1",
        "0",
        "1",
        "1.0",
        "2.5",
        "1e3",
        "nan",
        "inf",
        "-inf",
        "NULL",
        "None",
        "true",
        "007",
        "+7",
        " 7",
    ),
    *("7 ", "1_0", "0x10", "1,5", '"7"', '"', '"a,b"', "é", "\x00", "\t", "::", "1649400000000", "900000000"),
    *map(str, (2**31, 2**40, 2**62, 2**63 - 1, 2**63, -(2**63), 10**30, 9 * 10**11)),
]
FAULTS = ["token"] * 3 + ["delete field", "add field", "blank", "repeat", "drop", "cut", "raw", "crlf", "swap"]
RAW = [b"\xff\xfe", b"\xef\xbb\xbf", b"\r", b"\n", b"\n\n", b"\r\n", b"\x00", b'"', b",", b"|", b"1,2,3\n", b"a" * 3000]


def write(folder: Path, name: str) -> None:
    if name == "kuairand-pure":
        write_kuairand(folder, name, exposures()[:24])
    elif name == "amazon-toys":
        rows = [(f"A{user}", f"B{item % 7}", float(stars), time) for user, item, stars, time in ratings(4)]
        write_amazon(folder / DATASETS[name].logs[0], rows)
    else:
        {"ml-100k": write_small, "ml-1m": write_ml_1m, "ml-20m": write_ml_20m}[name](folder, ratings(4))


def mutate(draw: st.DrawFn, content: bytes, layout: Layout) -> bytes:
    """One fault, or a change that only looks like one."""
    separator = layout.separator.encode()
    lines = content.split(b"\n")[:-1]
    row = draw(st.integers(0, len(lines) - 1))
    kind = draw(
        st.sampled_from(
            [
                "token",
                "token",
                "token",
                "delete field",
                "add field",
                "blank",
                "repeat",
                "drop",
                "cut",
                "raw",
                "crlf",
                "swap",
            ]
        )
    )
    fields = lines[row].split(separator)
    column = draw(st.integers(0, len(fields) - 1))
    if kind == "token":
        fields[column] = draw(st.sampled_from(TOKENS)).encode()
    elif kind == "delete field":
        del fields[column]
    elif kind == "add field":
        fields.insert(column, draw(st.sampled_from(TOKENS)).encode())
    elif kind == "swap":
        fields[0], fields[column] = fields[column], fields[0]
    lines[row] = separator.join(fields)
    if kind == "blank":
        lines.insert(row, b"")
    elif kind == "repeat":
        lines.insert(row, lines[row])
    elif kind == "drop":
        del lines[row]
    changed = (b"\r\n" if kind == "crlf" else b"\n").join(lines) + b"\n"
    place = draw(st.integers(0, len(changed)))
    if kind == "cut":
        return changed[:place]
    return changed[:place] + draw(st.sampled_from(RAW)) + changed[place:] if kind == "raw" else changed


def plainly(value: str, field: Field) -> object:
    """The value of a field; ValueError where there is none."""
    if field.kind is None:
        return None
    if str(field.kind) == "String":
        if value == "":
            raise ValueError
        return value
    if "_" in value or value.lstrip(" ") != value.strip():
        raise ValueError
    number = float(value) if str(field.kind) == "Float64" else int(value)
    low, high = field.bounds or (-(2**63), 2**63 - 1)
    if not low <= number <= high:
        raise ValueError
    return number


def by_hand(contents: list[bytes], known: Published) -> dict[object, list[tuple]] | None:
    """What the logs plainly say, None if it is no log of this layout; written without looking at the reader."""
    layout, rows = known.layout, []
    for content in contents:
        try:
            text = content.decode()
        except UnicodeDecodeError:
            return None
        lines = text.removesuffix("\n").split("\n")
        if not content or '"' in text or text.startswith("\ufeff"):
            return None
        lines = [line.removesuffix("\r") for line in lines]
        if layout.header and lines.pop(0) != layout.separator.join(field.name for field in layout.fields):
            return None
        for line in lines:
            values = line.split(layout.separator)
            if len(values) != len(layout.fields) or values[-1] == "" or "\r" in line:
                return None
            try:
                row = {field.name: plainly(value, field) for value, field in zip(values, layout.fields, strict=True)}
            except ValueError:
                return None
            rows.append(row)
    if not rows:
        return None
    return sequences(rows)


def sequences(rows: list[dict]) -> dict[object, list[tuple]]:
    found: dict[object, list[tuple]] = {}
    in_milliseconds = "video_id" in rows[0]
    if in_milliseconds:
        rows = [
            {"user": row["user_id"], "item": row["video_id"], "timestamp": row["time_ms"]}
            | {"rating": sum(bit * row[event] for event, bit in EVENTS.items())}
            for row in rows
        ]
    for row in sorted(rows, key=lambda row: row["timestamp"]):
        user, item = row.get("user", row.get("userId")), row.get("item", row.get("movieId"))
        time = row["timestamp"] // 1000 if in_milliseconds or row["timestamp"] > 10**12 else row["timestamp"]
        found.setdefault(user, []).append((item, row["rating"], time))
    return found


def one_line(error: ValueError, *names: str) -> None:
    assert any(name in str(error) for name in names) and "\n" not in str(error) and len(str(error)) < 800, error


def check_published(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    known = DATASETS[name]
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        write(raw, name)
        target = raw / data.draw(st.sampled_from(known.logs))
        content = target.read_bytes()
        for _ in range(data.draw(st.integers(1, 2))):
            if content:
                content = mutate(data.draw, content if content.endswith(b"\n") else content + b"\n", known.layout)
        target.write_bytes(content)
        if known.users:
            (raw / known.users.name).unlink()
        expected = by_hand([(raw / log).read_bytes() for log in known.logs], known)
        try:
            dataset = make(name, raw, min_user_events=0, min_item_events=0)
        except ValueError as error:
            nothing = "has no value in any row" in str(error)  # no movie that is left has a title
            one_line(
                error, *known.logs, *(["u.item: column", "movies.dat: column", "movies.csv: column"] if nothing else [])
            )
            assert expected is None or nothing, error
        else:
            assert expected is not None, content
            assert events(dataset) == expected


WIDE = settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
QUICK = settings(WIDE, max_examples=25, derandomize=True)


@QUICK
@given(data=st.data())
def test_published_logs(data: st.DataObject) -> None:
    check_published(data)


@pytest.mark.slow
@WIDE
@given(data=st.data())
def test_many_published_logs(data: st.DataObject) -> None:
    check_published(data)


def nasty_text() -> st.SearchStrategy[str]:
    odd = st.text(st.sampled_from(list("ab,;\"\n'| \té0.-")), min_size=1, max_size=5)
    return st.one_of(st.sampled_from(TOKENS), odd, st.integers(-(2**63), 2**63).map(str))


KINDS = ("csv", "jsonl", "json", "parquet", "csv.gz", "jsonl.xz")


def write_custom(path: Path, names: tuple[str, ...], rows: list[tuple]) -> None:
    """Write rows in the format of the ending."""
    kind = path.name.removeprefix("log.")
    if kind == "parquet":
        pl.DataFrame(rows, names, orient="row").write_parquet(path)
        return
    objects = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    text = "[" + ",\n ".join(objects) + "]" if kind == "json" else "".join(line + "\n" for line in objects)
    if kind.startswith("csv"):
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows([names, *rows])
        text = lines.getvalue()
    content = text.encode()
    path.write_bytes({"csv.gz": gzip.compress, "jsonl.xz": lzma.compress}.get(kind, bytes)(content))


def is_no_id(value: str, missing: str) -> bool:
    """Whether a string is to be refused; no number is, and the words are not where they are kept."""
    words = ("na", "n/a", "<na>", "null", "nan", "none")
    return value.strip() != value or value == "" or (missing == "error" and value.lower() in words)


def check_custom(data: st.DataObject) -> None:
    """Values with quotes, separators and line ends, quoted as the format asks for, read in blocks of a few rows; the
    rows themselves are the truth."""
    users = data.draw(st.lists(nasty_text(), min_size=1, max_size=3, unique=True))
    rows = [
        (user, data.draw(nasty_text()), data.draw(st.integers(0, 9)), number)
        for user in users
        for number in range(data.draw(st.integers(3, 5)))
    ]
    rows = data.draw(st.permutations(rows))
    names = ("user_id", "item_id", "time", "row")
    kind = data.draw(st.sampled_from(KINDS))
    missing = data.draw(st.sampled_from(("error", "keep")))
    with tempfile.TemporaryDirectory() as folder, mock.patch("hstu.data.files.source.CHUNK", 60):
        path = Path(folder) / f"log.{kind}"
        write_custom(path, names, rows)
        spec = InteractionSpec(name="log", time_column="time", file=str(path), missing=missing)
        try:
            with writing(Path(folder) / "log") as writer:
                writer.schema(encode(path, spec, writer))
        except ValueError as error:
            one_line(error, path.name)
            assert any(is_no_id(value, missing) for row in rows for value in row[:2]), error
            return
        assert not any(is_no_id(value, missing) for row in rows for value in row[:2])
        dataset = SequenceDataset.open(Path(folder) / "log")
        ends = dataset.lengths.cumsum()
        users_read, items = dataset.vocabulary("user_id"), dataset.vocabulary("item_id")
        everyone = dataset.gather(range(dataset.num_users), [0] * dataset.num_users, dataset.lengths)
        found = {
            str(user): [str(item) for item in items[everyone.items[end - length : end]]]
            for user, end, length in zip(users_read, ends, dataset.lengths, strict=True)
        }
        ordered = sorted(rows, key=lambda row: row[2])
        assert found == {user: [row[1] for row in ordered if row[0] == user] for user in users}


@QUICK
@given(data=st.data())
def test_custom_logs(data: st.DataObject) -> None:
    check_custom(data)


@pytest.mark.slow
@WIDE
@given(data=st.data())
def test_many_custom_logs(data: st.DataObject) -> None:
    check_custom(data)
