"""Planted titles: items share words by cluster; and items that nobody meets before their last two events.

A title has some words of its item's cluster, each cluster having a few of its own, and some that any item may have. Who
reads titles can tell the clusters of items that were never met.
"""

from __future__ import annotations

import numpy as np
import polars as pl
import pyarrow as pa

from hstu.data.schema import Feature

TITLE = "title"
_OF_CLUSTER, _OF_ALL = 8, 40  # words to choose from
_CHOSEN = (3, 2)  # of the cluster, and of all


def draw_titles(cluster: np.ndarray, seed: np.random.SeedSequence) -> tuple[Feature, np.ndarray, pa.Array]:
    """Return the feature, the id of each item's title [N], and the distinct titles.

    Args:
        cluster: Of each item, [N].
        seed: Of the words.
    """
    rng = np.random.default_rng(seed)
    own = rng.permuted(np.tile(np.arange(_OF_CLUSTER), (len(cluster), 1)), axis=1)[:, : _CHOSEN[0]]
    common = rng.permuted(np.tile(np.arange(_OF_ALL), (len(cluster), 1)), axis=1)[:, : _CHOSEN[1]]
    titles = pl.Series(
        [
            " ".join([*(f"k{k}w{word}" for word in words), *(f"any{word}" for word in others)])
            for k, words, others in zip(cluster.tolist(), own.tolist(), common.tolist(), strict=True)
        ]
    )
    distinct = titles.unique().sort()
    ids = distinct.search_sorted(titles).to_numpy().astype(np.int64)
    return Feature(name=TITLE, level="item", kind="text", vocab_size=len(distinct)), ids, distinct.to_arrow()


def title_words(num_clusters: int) -> list[str]:
    """Return every word that a title may have, for a tokenizer."""
    of_clusters = [f"k{k}w{word}" for k in range(num_clusters) for word in range(_OF_CLUSTER)]
    return [*of_clusters, *(f"any{word}" for word in range(_OF_ALL))]


def draw_cold(cluster: np.ndarray, share: float, seed: np.random.SeedSequence) -> np.ndarray:
    """Return which items nobody meets before their last two events, [N] bool: ``share`` of each cluster, rounded down.

    One of a cluster at least is not among them.
    """
    rng, cold = np.random.default_rng(seed), np.zeros(len(cluster), bool)
    for k in range(int(cluster.max()) + 1):
        members = rng.permutation(np.flatnonzero(cluster == k))
        cold[members[: min(int(share * len(members)), len(members) - 1)]] = True
    return cold


def in_last_two(lengths: np.ndarray) -> np.ndarray:
    """Return whether each event is one of the last two of its user, [T] int64."""
    ends = np.cumsum(lengths)
    found = np.zeros(int(ends[-1]), np.int64)
    found[ends - 1] = found[ends - 2] = 1
    return found
