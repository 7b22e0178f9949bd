"""MovieLens: every rating is an event, its action the rating; user attributes are contexts, genres features of items.

Ages are the published brackets of ml-1m, decades in ml-100k. Of a zip code the first character is kept (the
postal region): most whole codes belong to one user, so they would say who it is rather than what it is like.
"""

from __future__ import annotations

import csv
from collections.abc import Callable

import polars as pl

from hstu.data.interactions import ITEM, USER
from hstu.data.log_encoder import EncodingOptions
from hstu.preprocessing.layout import Field, Layout, seconds
from hstu.preprocessing.published import Published, TableFile
from hstu.preprocessing.raw_files import Archive

_SITE = "https://files.grouplens.org/datasets/movielens"
_STARS = (0.5, 5.0)
_EVENT = (
    pl.col("userId").alias("user"),
    pl.col("movieId").alias("item"),
    pl.col("rating").alias("action"),
    pl.col("timestamp").alias("time"),
)


def _ratings(separator: str, rating: type[pl.DataType] = pl.Int64, *, header: bool = False) -> Layout:
    fields = (
        Field("userId", pl.Int64),
        Field("movieId", pl.Int64),
        Field("rating", rating, _STARS, "rating from 0.5 to 5"),
        seconds("timestamp"),
    )
    return Layout(fields=fields, separator=separator, header=header)


def _users(name: str, separator: str, fields: tuple[str, ...], age: pl.Expr) -> TableFile:
    whole = ("userId", "age")
    layout = Layout(
        fields=tuple(Field(field, pl.Int64 if field in whole else pl.String) for field in fields), separator=separator
    )
    region = pl.col("zip_code").str.slice(0, 1)
    columns = (pl.col("userId").alias(USER), pl.col("gender"), age, pl.col("occupation"), region)
    return TableFile(name=name, layout=layout, columns=columns)


def _movies(name: str, separator: str, encoding: str, num_fields: int, genres: Callable[[list[str]], str]) -> TableFile:
    """A file of movies: the first field of a line is the id, the second the title; titles hold all kinds of signs."""

    def parse(content: bytes, place: str) -> pl.DataFrame:
        rows: list[tuple[int, str, str]] = []
        lines = content.decode(encoding, "replace").splitlines()
        table = csv.reader(lines) if separator == "," else (line.split(separator) for line in lines)
        for number, fields in enumerate(table, 1):
            if fields == ["movieId", "title", "genres"] and number == 1:
                continue
            if len(fields) != num_fields or not fields[0].isdigit():
                raise ValueError(
                    f"{place}: line {number} is no movie of {num_fields} fields: {separator.join(fields)[:80]!r}; "
                    "replace the file by the published one"
                )
            rows.append((int(fields[0]), fields[1], genres(fields)))
        return pl.DataFrame(rows, schema={ITEM: pl.Int64, "title": pl.String, "genres": pl.String}, orient="row")

    return TableFile(name=name, columns=(pl.all(),), features="title:text,genres:multi", parse=parse)


def _named(fields: list[str]) -> str:
    return "" if fields[2] == "(no genres listed)" else fields[2]


def _flagged(fields: list[str]) -> str:
    return "|".join(genre for genre, flag in zip(GENRES, fields[-len(GENRES) :], strict=True) if flag == "1")


# In the order of the flags at the end of a line of u.item, after one of a movie of unknown genres.
GENRES = (
    *("Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy"),
    *("Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_OPTIONS = EncodingOptions(absent_items=True, judge=False)

DATASETS = {
    "ml-100k": Published(
        archive=Archive(
            file_name="ml-100k.zip",
            url=f"{_SITE}/ml-100k.zip",
            checksum="md5:0e33842e24a9c977be4e0107933c0723",
            root="ml-100k",
        ),
        logs=("u.data",),
        layout=_ratings("\t"),
        columns=_EVENT,
        users=_users(
            "u.user", "|", ("userId", "age", "gender", "occupation", "zip_code"), age=pl.col("age") // 10 * 10
        ),
        items=_movies("u.item", "|", "latin-1", 24, _flagged),
        options=_OPTIONS,
        log_counts={"users": 943, "items": 1682, "events": 100_000},
    ),
    "ml-1m": Published(
        archive=Archive(
            file_name="ml-1m.zip",
            url=f"{_SITE}/ml-1m.zip",
            checksum="md5:c4d9eecfca2ab87c1945afe126590906",
            root="ml-1m",
        ),
        logs=("ratings.dat",),
        layout=_ratings("::"),
        columns=_EVENT,
        users=_users("users.dat", "::", ("userId", "gender", "age", "occupation", "zip_code"), age=pl.col("age")),
        items=_movies("movies.dat", "::", "latin-1", 3, _named),
        options=_OPTIONS,
        log_counts={"users": 6040, "items": 3706, "events": 1_000_209},
    ),
    "ml-20m": Published(
        archive=Archive(
            file_name="ml-20m.zip",
            url=f"{_SITE}/ml-20m.zip",
            checksum="md5:cd245b17a1ae2cc31bb14903e1204af3",
            root="ml-20m",
        ),
        logs=("ratings.csv",),
        layout=_ratings(",", pl.Float64, header=True),
        columns=_EVENT,
        items=_movies("movies.csv", ",", "utf-8", 3, _named),
        options=_OPTIONS,
        log_counts={"users": 138_493, "items": 26_744, "events": 20_000_263},
    ),
}
