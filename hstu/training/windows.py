"""A run over windows of time: one run directory a window, and what is written of all of them."""

from __future__ import annotations

import csv
import io
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hstu.config import DatasetArgs
from hstu.data.reader import SequenceDataset
from hstu.data.splits import window_cuts
from hstu.training.checkpoint_files import write_atomically
from hstu.training.evaluate import TRAINED
from hstu.training.logging import warn_only
from hstu.training.plot import draw_windows
from hstu.training.run_directory import WINDOWS, RunDirectory

Record = dict[str, Any]
_COUNTS = ("step", "num_users", "num_targets")
_MEANS = ("HR", "NDCG", "MRR", "ACCURACY")  # of what every target has, so that windows can be pooled


def window_path(run: Path, window: int) -> Path:
    """Return the run directory of one window of ``run``."""
    return run / WINDOWS / f"{window:04d}"


def last_window(run: Path) -> Path:
    """Return the run directory of the last window of ``run`` that has a checkpoint; ``run`` itself if it has none.

    It is what a run over windows answers with.
    """
    begun = begun_windows(run)
    return begun[-1] if begun else run


def begun_windows(run: Path) -> list[Path]:
    """Return the run directories of the windows of ``run`` that have a checkpoint, in their order."""
    return sorted(path.parents[1] for path in run.glob(f"{WINDOWS}/*/checkpoints/latest/"))


def write_windows(run: RunDirectory, args: DatasetArgs, dataset: SequenceDataset, records: list[Record]) -> None:
    """Write ``windows.csv``, ``metrics.jsonl``, ``eval.json`` and a figure, of the test ``records`` so far."""
    cuts, names = window_cuts(args, dataset), [*records[0]["metrics"]]
    edges = [None, *cuts, None]
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["window", "begins", "ends", *_COUNTS, *names])
    for record in records:
        window = record["window"]
        values = [record["metrics"].get(name) for name in names]
        counts = [record[name] for name in _COUNTS]
        table.writerow([window, _iso(edges[window]), _iso(edges[window + 1]), *counts, *values])
    write_atomically(run.path / "windows.csv", text.getvalue())
    run.write_json("eval.json", summary(records))
    run.replace_records(records)
    with warn_only("no figure of the windows"):
        draw_windows(records, run.figures / "windows.png")


def summary(records: list[Record]) -> Record:
    """Return the record of a run over windows, from the test records of the windows.

    ``metrics`` are means of windows, as is usual; ``pooled`` are over all targets, where a metric is a mean of them.
    """
    names, weights = [*records[0]["metrics"]], [record["num_targets"] for record in records]
    trained = [record["num_targets"] - record.get("untrained_targets", 0) for record in records]
    values = {name: [record["metrics"].get(name) for record in records] for name in names}
    shared = {key: records[-1].get(key) for key in ("kind", "split", "step", "protocol", "tie_rule", "filter_seen")}
    return shared | {
        "windows": [record["window"] for record in records],
        "num_users": sum(record["num_users"] for record in records),
        "num_targets": sum(weights),
        "metrics": {name: _mean(values[name], [1] * len(records)) for name in names},
        "pooled": {
            name: _mean(values[name], trained if name.endswith(TRAINED) else weights)
            for name in names
            if re.split("[@:]", name)[0] in _MEANS
        },
    }


def _mean(values: list[float | None], weights: list[int]) -> float | None:
    """Return the weighted mean of what is defined, rounded once; None if nothing is."""
    known = [(value, weight) for value, weight in zip(values, weights, strict=True) if value is not None and weight]
    total = sum(weight for _, weight in known)
    return math.fsum(value * weight for value, weight in known) / total if total else None


def _iso(seconds: int | None) -> str:
    """Return a time as text, or the number itself where no calendar has it; nothing for an open end."""
    if seconds is None:
        return ""
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError):
        return str(seconds)
