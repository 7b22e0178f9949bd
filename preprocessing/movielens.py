"""MovieLens: every rating is an event, its action the rating; user attributes are contexts.

Ages are the published brackets of ml-1m, decades in ml-100k. Of a zip code the first character is kept (the
postal region): most whole codes belong to one user, so they would say who it is rather than what it is like.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from hstu.data.interactions import ITEM, TIME, USER, InteractionSpec, encode_interactions
from hstu.data.writer import EncodedDataset
from preprocessing.raw_files import Archive, RawFile, find, obtain, sha256

logger = logging.getLogger("hstu.preprocessing")

_SITE = "https://files.grouplens.org/datasets/movielens"


@dataclass(frozen=True, kw_only=True)
class MovieLens:
    """One published MovieLens data set.

    Args:
        archive: The published zip.
        ratings: File of ratings: user, item, rating, seconds.
        separator: Between the fields of the ratings.
        header: First line of the ratings, None where there is none.
        rating_type: Whole or half stars.
        users: File of users, None where there is none.
        users_separator: Between the fields of the users.
        users_columns: The fields of the users.
        counts: Known numbers of users, items and events.
    """

    archive: Archive
    ratings: str
    separator: str
    header: str | None = None
    rating_type: type[pl.DataType] = pl.Int64
    users: str | None = None
    users_separator: str = ""
    users_columns: tuple[str, ...] = ()
    counts: dict[str, int]


DATASETS = {
    "ml-100k": MovieLens(
        archive=Archive(name="ml-100k", url=f"{_SITE}/ml-100k.zip", md5="0e33842e24a9c977be4e0107933c0723"),
        ratings="u.data",
        separator="\t",
        users="u.user",
        users_separator="|",
        users_columns=(USER, "age", "gender", "occupation", "zip_code"),
        counts={"users": 943, "items": 1682, "events": 100_000},
    ),
    "ml-1m": MovieLens(
        archive=Archive(name="ml-1m", url=f"{_SITE}/ml-1m.zip", md5="c4d9eecfca2ab87c1945afe126590906"),
        ratings="ratings.dat",
        separator="::",
        users="users.dat",
        users_separator="::",
        users_columns=(USER, "gender", "age", "occupation", "zip_code"),
        counts={"users": 6040, "items": 3706, "events": 1_000_209},
    ),
    "ml-20m": MovieLens(
        archive=Archive(name="ml-20m", url=f"{_SITE}/ml-20m.zip", md5="cd245b17a1ae2cc31bb14903e1204af3"),
        ratings="ratings.csv",
        separator=",",
        header="userId,movieId,rating,timestamp",
        rating_type=pl.Float64,
        counts={"users": 138_493, "items": 26_744, "events": 20_000_263},
    ),
}


def encode_movielens(
    name: str, directories: list[Path], download_to: Path, *, check_counts: bool = True
) -> EncodedDataset:
    """Read a MovieLens data set from raw files in ``directories`` (or download them) and encode it.

    Args:
        name: A key of ``DATASETS``.
        directories: Where raw files may be, in order.
        download_to: Where the archive goes when there are none.
        check_counts: Whether users, items and events must be those of the published data set.

    Raises:
        ValueError: For missing or malformed raw files, or other counts than the known ones.
    """
    known = DATASETS[name]
    file = obtain(known.ratings, known.archive, directories, download_to)
    content = file.read()
    source = {known.ratings: sha256(content)}
    ratings = _read_ratings(content, known, file)
    users, users_file = None, find(known.users, known.archive, directories) if known.users else None
    if users_file:
        content = users_file.read()
        source[users_file.name] = sha256(content)
        users = _read_users(content, known, users_file)
    elif known.users:
        logger.info("%s: there is no %s, so the data set gets no user contexts", name, known.users)
    spec = InteractionSpec(
        name=name,
        time_column=TIME,
        action_column="rating",
        action_name="rating",
        file=str(file),
        users_file=str(users_file),
    )
    dataset = encode_interactions(ratings, spec, users=users, source=source)
    if check_counts:
        _check_counts(dataset.schema.counts, known.counts, file)
    return dataset


def _read_ratings(content: bytes, known: MovieLens, file: RawFile) -> pl.DataFrame:
    if known.header is not None:
        first, _, content = content.partition(b"\n")
        if first.strip() != known.header.encode():
            raise ValueError(f"{file}: the first line is {first[:80]!r}, expected {known.header!r}")
    types = {USER: pl.Int64, ITEM: pl.Int64, "rating": known.rating_type, TIME: pl.Int64}
    return _read_fields(content, known.separator, types, file)


def _read_users(content: bytes, known: MovieLens, file: RawFile) -> pl.DataFrame:
    types = {column: pl.Int64 if column in (USER, "age") else pl.String for column in known.users_columns}
    users = _read_fields(content, known.users_separator, types, file)
    age = pl.col("age") if known.archive.name == "ml-1m" else pl.col("age") // 10 * 10
    return users.select(USER, "gender", age, "occupation", pl.col("zip_code").str.slice(0, 1))


def _read_fields(content: bytes, separator: str, types: dict[str, type[pl.DataType]], file: RawFile) -> pl.DataFrame:
    """Read separated lines without a header; a field that is not there becomes null."""
    if not content.strip():
        raise ValueError(f"{file}: is empty; replace it by the published file")
    # Polars knows separators of one character: '::' is ':' with an empty field in between.
    gaps = len(separator) - 1
    schema: dict[str, type[pl.DataType]] = {}
    for position, (name, kind) in enumerate(types.items()):
        if position:
            schema |= {f"gap {position}.{gap}": pl.String for gap in range(gaps)}
        schema[name] = kind
    try:
        frame = pl.read_csv(
            content,
            has_header=False,
            separator=separator[0],
            quote_char=None,
            schema=schema,
            encoding="utf8-lossy",
        )
    except pl.exceptions.PolarsError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{file}: {reason}; replace it by the published file") from error
    return frame.select(types.keys())


def _check_counts(counts: dict[str, float | int], known: dict[str, int], file: RawFile) -> None:
    for key, number in known.items():
        if counts[key] != number:
            raise ValueError(
                f"{file}: {counts[key]:,} {key}, the published data set has {number:,}; replace the file, "
                "or use it as it is with --check_counts=false"
            )
