"""Amazon reviews of 2014: every rating is an event, its action the rating.

Published are csv files `user,item,rating,timestamp` without a header and without a checksum. Checked instead are the
numbers of ratings that the download page (jmcauley.ucsd.edu/data/amazon) states beside the files, and after the filter
the numbers of papers (https://arxiv.org/abs/2008.07873 for the 5-cores). Users and items with fewer than 5 ratings are
dropped in one of two published ways:

- books: counted once, over all ratings. The 695,762 items that are left with a rating are the catalogue of the code
  beside https://arxiv.org/abs/2402.17152, also those of users who are left with fewer than 5 ratings and are dropped
  then.
- beauty, sports, toys: counted again until every user and item has 5 (the "5-core").
"""

from __future__ import annotations

import polars as pl

from hstu.data.stream import StreamOptions
from preprocessing.layout import Field, Layout, seconds
from preprocessing.published import Published
from preprocessing.raw_files import Archive

_SITE = "http://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


def _published(category: str, ratings: int, counts: dict[str, int], *, filter_once: bool = False) -> Published:
    file_name = f"ratings_{category}.csv"
    return Published(
        archive=Archive(file_name=file_name, url=f"{_SITE}/{file_name}"),
        logs=(file_name,),
        layout=Layout(
            fields=(
                Field("user", pl.String),
                Field("item", pl.String),
                Field("rating", pl.Float64, (1.0, 5.0), "rating from 1 to 5"),
                seconds("timestamp"),
            )
        ),
        columns=(pl.col("user"), pl.col("item"), pl.col("rating").alias("action"), pl.col("timestamp").alias("time")),
        options=StreamOptions(filter_once=filter_once),
        filters={"min_user_events": 5, "min_item_events": 5},
        log_counts={"events": ratings},
        counts=counts,
    )


DATASETS = {
    "amazon-books": _published("Books", 22_507_155, {"items": 695_762}, filter_once=True),
    "amazon-beauty": _published("Beauty", 2_023_070, {"users": 22_363, "items": 12_101, "events": 198_502}),
    "amazon-sports": _published(
        "Sports_and_Outdoors", 3_268_695, {"users": 35_598, "items": 18_357, "events": 296_337}
    ),
    "amazon-toys": _published("Toys_and_Games", 2_252_771, {"users": 19_412, "items": 11_924, "events": 167_597}),
}
