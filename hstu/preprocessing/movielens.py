"""MovieLens: every rating is an event, its action the rating; user attributes are contexts.

Ages are the published brackets of ml-1m, decades in ml-100k. Of a zip code the first character is kept (the
postal region): most whole codes belong to one user, so they would say who it is rather than what it is like.
"""

from __future__ import annotations

import polars as pl

from hstu.data.interactions import USER
from hstu.preprocessing.layout import Field, Layout, seconds
from hstu.preprocessing.published import Published, UsersFile
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


def _users(name: str, separator: str, fields: tuple[str, ...], age: pl.Expr) -> UsersFile:
    whole = ("userId", "age")
    layout = Layout(
        fields=tuple(Field(field, pl.Int64 if field in whole else pl.String) for field in fields), separator=separator
    )
    region = pl.col("zip_code").str.slice(0, 1)
    columns = (pl.col("userId").alias(USER), pl.col("gender"), age, pl.col("occupation"), region)
    return UsersFile(name=name, layout=layout, columns=columns)


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
        log_counts={"users": 138_493, "items": 26_744, "events": 20_000_263},
    ),
}
