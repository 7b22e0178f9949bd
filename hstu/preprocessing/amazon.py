"""Amazon reviews of 2014: every rating is an event, its action the rating.

Published are csv files `user,item,rating,timestamp` without a header and without a checksum. A download is compared
with the sha256 that others have recorded of it; of any file are checked the number of ratings that the download page
(jmcauley.ucsd.edu/data/amazon) states beside it, and after the filter the numbers of papers
(https://arxiv.org/abs/2008.07873 for the 5-cores). Users and items with fewer than 5 ratings are
dropped in one of two published ways:

- books: counted once, over all ratings. The 695,762 items that are left with a rating are the catalogue of the code
  beside https://arxiv.org/abs/2402.17152, also those of users who are left with fewer than 5 ratings and are dropped
  then.
- beauty, sports, toys: counted again until every user and item has 5 (the "5-core").

Where a file of metadata stands beside the ratings (`meta_Beauty.json.gz`, one Python dictionary a line), items have its
categories, of all levels but the first, and its title.
"""

from __future__ import annotations

import ast
import gzip
import io

import polars as pl

from hstu.data.interactions import ITEM
from hstu.data.log_encoder import EncodingOptions
from hstu.preprocessing.layout import Field, Layout, seconds
from hstu.preprocessing.published import Published, TableFile
from hstu.preprocessing.raw_files import Archive, readable

_SITE = "https://snap.stanford.edu/data/amazon/productGraph/categoryFiles"


def _metadata(content: bytes, place: str) -> pl.DataFrame:
    """Items, titles and categories of a file of metadata."""
    rows = []
    with readable(place), gzip.open(io.BytesIO(content)) as file:
        for number, line in enumerate(file, 1):
            try:
                found = ast.literal_eval(line.decode())
                paths = [path[1:] or path for path in found.get("categories", [])]
                names = dict.fromkeys(name.strip() for path in paths for name in path if name.strip())
                rows.append((str(found["asin"]), found.get("title"), [*names]))
            except (ValueError, SyntaxError, KeyError, TypeError, AttributeError):
                text = f"{place}: line {number} is no dictionary of an item: {line[:80]!r}"
                raise ValueError(f"{text}; replace the file by the published one") from None
    kinds = pl.Schema({ITEM: pl.String(), "title": pl.String(), "categories": pl.List(pl.String())})
    return pl.DataFrame(rows, schema=kinds, orient="row")


def _published(
    category: str, ratings: int, sha256: str, counts: dict[str, int], *, filter_once: bool = False
) -> Published:
    file_name = f"ratings_{category}.csv"
    return Published(
        archive=Archive(file_name=file_name, url=f"{_SITE}/{file_name}", checksum=f"sha256:{sha256}"),
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
        items=TableFile(
            name=f"meta_{category}.json.gz",
            columns=(pl.col(ITEM), pl.col("title"), pl.col("categories")),
            features="title:text,categories:multi",
            parse=_metadata,
        ),
        options=EncodingOptions(filter_once=filter_once, absent_items=True, judge=False),
        filters={"min_user_events": 5, "min_item_events": 5},
        log_counts={"events": ratings},
        counts=counts,
    )


DATASETS = {
    "amazon-books": _published(
        "Books",
        22_507_155,
        "87d923ddac2aacf40c1d0e0e056dbf4bf69c9c7d41852c6b434e781e759c0707",
        {"items": 695_762},
        filter_once=True,
    ),
    "amazon-beauty": _published(
        "Beauty",
        2_023_070,
        "17d5232b90444beecfe758ce1446e5300230491f3a88ac802992ca95fc4c150f",
        {"users": 22_363, "items": 12_101, "events": 198_502},
    ),
    "amazon-sports": _published(
        "Sports_and_Outdoors",
        3_268_695,
        "a31a27e2f0cd85b50acd002378cf1a23a0b3f2659484defb3225a836118252d4",
        {"users": 35_598, "items": 18_357, "events": 296_337},
    ),
    "amazon-toys": _published(
        "Toys_and_Games",
        2_252_771,
        "e28a342ca89a79036a9a840c0385a3a3342a08d3d3450ea3eaf3d544cd65d3af",
        {"users": 19_412, "items": 11_924, "events": 167_597},
    ),
}
