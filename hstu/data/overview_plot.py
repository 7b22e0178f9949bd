"""Lengths of the users and popularity of the items of a data set: a PNG, and a sketch for the terminal."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hstu.data.overview import Overview

_BINS, _POINTS = 30, 400


def draw_overview(found: Overview, name: str, path: Path) -> None:
    """Draw ``found`` of the data set ``name`` to ``path``, a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges, users = _length_histogram(found.lengths)
    left.stairs(users, edges, fill=True, color="#1f77b4", alpha=0.8)
    left.set(title=f"{name}: users by length", xlabel="events", ylabel="users", xscale="log")
    right.plot(*_popularity_curve(found.popularity), color="#2ca02c", linewidth=1.4)
    right.set(
        title=f"{name}: items by popularity", xlabel="rank of the item", ylabel="events", xscale="log", yscale="log"
    )
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def sketch_overview(found: Overview, width: int = 72) -> str:
    """Return the same two pictures drawn with characters."""
    import plotext

    texts = []
    for kind in ("lengths", "popularity"):
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plot_size(width, 12)
        if kind == "lengths":
            edges, users = _length_histogram(found.lengths)
            plotext.bar([f"{edge:,.0f}" for edge in edges[:-1]], users.tolist(), marker="sd")
            plotext.xfrequency(6)
            plotext.title("users by number of events (logarithmic)")
        else:
            ranks, events = _popularity_curve(found.popularity)
            plotext.plot(ranks.tolist(), events.tolist(), marker="braille")
            plotext.xscale("log")
            plotext.yscale("log")
            plotext.title("events of an item by rank of popularity (logarithmic)")
        texts.append(plotext.uncolorize(plotext.build()))
    return "\n".join(texts)


def _length_histogram(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges of bins that grow by a factor, on whole numbers, and the users in each."""
    longest = int(lengths.max(initial=1))
    edges = np.unique(np.geomspace(1, longest + 1, _BINS + 1).round())
    return edges, np.histogram(lengths, edges)[0]


def _popularity_curve(popularity: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ranks from 1 and the events of the item of each rank, thinned evenly in the logarithm."""
    ordered = np.sort(popularity[popularity > 0])[::-1]
    if not ordered.size:
        return np.ones(1, np.int64), np.ones(1, np.int64)
    ranks = np.unique(np.geomspace(1, ordered.size, _POINTS).round().astype(np.int64))
    return ranks, ordered[ranks - 1]
