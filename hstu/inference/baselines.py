"""What needs no model: popularity, repeats and item neighbours, scored as the run was and set beside its score."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

from hstu.data.batch import Batch
from hstu.data.loader import BatchLoader
from hstu.inference.opened import Opened
from hstu.models.negatives import count_items
from hstu.ops import lengths_to_offsets, sequence_ids

logger = logging.getLogger(__name__)

FILE = "baselines.json"
_PAIRS = 1 << 24  # pairs of items held at once
_SAMPLES = 1 << 16  # read at once
_SAME = ("protocol", "window", "split", "filter_seen", "num_candidates", "num_users", "num_targets")


def compare_with_baselines(opened: Opened, neighbours: int = 100) -> dict[str, Any]:
    """Score the baselines on the test split as ``eval.json`` was made, and write ``baselines.json`` beside it.

    - ``popularity``: how often an item is predicted in training.
    - ``last_item``: the items of the history, the last one first; left out where seen items are.
    - ``item_knn``: the sum of an item's similarities to the items of the history, and ``item_knn_last`` that to the
      last one. Similarity is the cosine of the sets of training users that have two items, kept for the
      ``neighbours`` nearest of each (https://doi.org/10.1145/963770.963776).

    A history is what the model reads of it. Ties count half, as they do for the model.

    Args:
        opened: A retrieval run that has its test score.
        neighbours: Of each item.

    Returns:
        What the file holds: metrics of the model and of each baseline, and ``not_beaten``: for each metric the
        baselines that score at least as high as the model.

    Raises:
        ValueError: for a ranking run, one without a test score, and a score that was made otherwise.
    """
    if opened.config.task != "retrieval":
        raise ValueError(f"--run_dir = {str(opened.run.path)!r}: ranks given candidates; baselines are of retrieval")
    if neighbours < 1:
        raise ValueError(f"--neighbours = {neighbours}: must be at least 1")
    assembly, model = opened.assembly, opened.assembly.mesh.on_main(lambda: _test_record(opened))
    left_out, found = {}, {}
    if assembly.config.retrieval is not None and assembly.config.retrieval.filter_seen:
        left_out["last_item"] = "RetrievalArgs.filter_seen = True leaves out what it would repeat"
    for name, scorer in make_baselines(assembly.loaders["train"], neighbours, assembly.mesh.device).items():
        if name not in left_out:
            record = assembly.score("test", model["step"], scorer)
            _require_same(opened, model, record)
            found[name] = {metric: record["metrics"].get(metric) for metric in model["metrics"]}
            logger.info("%s: done", name)
    result = {key: model[key] for key in ("step", *_SAME) if key in model} | {
        "neighbours": neighbours,
        "metrics": model["metrics"],
        "baselines": found,
        "left_out": left_out,
        "not_beaten": _not_beaten(model["metrics"], found),
    }
    assembly.mesh.on_main(lambda: opened.run.write_json(FILE, result))
    return result


class Baseline:
    """Scores all items from the ids of a history.

    Args:
        num_items: Size of the catalogue.
        score: From (row, item) of Q histories, in time order, both [E] int64, and Q, to scores [Q, items].
    """

    def __init__(self, num_items: int, score: Callable[[Tensor, Tensor, int], Tensor]) -> None:
        self.num_items, self._score = num_items, score

    def scored(self, batch: Batch) -> tuple[Batch, Callable[[slice], Tensor]]:
        """Return ``batch``, and the scores of some of its labels."""
        items, offsets = batch.ids(batch.item), lengths_to_offsets(batch.lengths(batch.item))
        first = offsets[sequence_ids(offsets, batch.num_events)[batch.label_events]]

        def score(rows: slice) -> Tensor:
            start, stop = first[rows], batch.label_events[rows] + 1  # up to the event before the target
            lengths = stop - start
            row = torch.repeat_interleave(lengths)
            place = torch.arange(row.numel(), device=row.device) - (lengths.cumsum(0) - lengths)[row]
            return self._score(row, items[start[row] + place], lengths.numel())

        return batch, score


def make_baselines(train: BatchLoader, neighbours: int, device: torch.device) -> dict[str, Baseline]:
    """Return the baselines by name, made of the samples of ``train``."""
    number = train.dataset.schema.item.vocab_size or 0
    counts = count_items(train.dataset, train.split).double().to(device)
    near = ItemNeighbours(*training_pairs(train), number, neighbours, device)

    def popularity(row: Tensor, items: Tensor, rows: int) -> Tensor:
        return counts.expand(rows, -1).clone()

    def last_item(row: Tensor, items: Tensor, rows: int) -> Tensor:
        place = torch.arange(1.0, row.numel() + 1, dtype=torch.float64, device=row.device)
        scores = place.new_zeros(rows * number)
        return scores.scatter_reduce(0, row * number + items, place, "amax").view(rows, number)

    def last_alone(row: Tensor, items: Tensor, rows: int) -> Tensor:
        is_last = torch.cat([row[1:] != row[:-1], row.new_ones(min(1, row.numel()), dtype=torch.bool)])
        return near.scores(row[is_last], items[is_last], rows)

    scores = {
        "popularity": popularity,
        "last_item": last_item,
        "item_knn": near.scores,
        "item_knn_last": last_alone,
    }
    return {name: Baseline(number, score) for name, score in scores.items()}


def training_pairs(train: BatchLoader) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct (user, item) that training samples show, [P] int64 each, in order."""
    number, found = train.dataset.schema.item.vocab_size or 0, []
    for rows in np.array_split(np.arange(len(train.split)), len(train.split) // _SAMPLES + 1):
        events = train.collate.visible(train.dataset, train.split, rows)[0]
        owner = np.repeat(train.split.users[rows], events.lengths)
        found.append(np.unique(owner * number + events.items))
    keys = np.unique(np.concatenate(found))
    return keys // number, keys % number


class ItemNeighbours:
    """The nearest items of each item, by the cosine of the sets of users that have them.

    Args:
        users: [P] int64, of distinct (user, item).
        items: [P] int64.
        num_items: Size of the catalogue.
        neighbours: Kept of each item; of equal ones those with the smaller id.
        device: Of the scores.
    """

    def __init__(
        self, users: np.ndarray, items: np.ndarray, num_items: int, neighbours: int, device: torch.device
    ) -> None:
        self.num_items = num_items
        pairs = pl.DataFrame({"user": users, "item": items})
        counts = np.bincount(items, minlength=num_items)
        work = np.zeros(num_items, np.int64)  # pairs that each item is in
        np.add.at(work, items, np.bincount(users)[users] if len(users) else users)
        chunk = np.cumsum(work) // _PAIRS
        parts = [self._nearest(pairs, counts, np.flatnonzero(chunk == c), neighbours) for c in np.unique(chunk)]
        near = pl.concat(parts)
        self.starts = torch.from_numpy(np.searchsorted(near["item"].to_numpy(), np.arange(num_items + 1))).to(device)
        self.items = torch.from_numpy(near["other"].to_numpy().copy()).to(device)
        self.similarity = torch.from_numpy(near["similarity"].to_numpy().copy()).to(device)

    def scores(self, row: Tensor, items: Tensor, rows: int) -> Tensor:
        """Return the sums of the similarities to ``items`` [E], each once in its ``row`` [E]: [rows, items] float64."""
        keys = (row * self.num_items + items).unique()
        row, items = keys // self.num_items, keys % self.num_items
        first, lengths = self.starts[items], self.starts[items + 1] - self.starts[items]
        owner = torch.repeat_interleave(lengths)
        place = torch.arange(owner.numel(), device=row.device) - (lengths.cumsum(0) - lengths)[owner]
        at = first[owner] + place
        scores = self.similarity.new_zeros(rows * self.num_items)
        scores = scores.index_add(0, row[owner] * self.num_items + self.items[at], self.similarity[at])
        return scores.view(rows, self.num_items)

    def _nearest(self, pairs: pl.DataFrame, counts: np.ndarray, items: np.ndarray, neighbours: int) -> pl.DataFrame:
        """Return item, other and similarity of ``items``, in the order of items."""
        own = pairs.filter(pl.col("item").is_between(int(items[0]), int(items[-1])))
        others = pairs.rename({"item": "other"})
        both = own.join(others, on="user").filter(pl.col("item") != pl.col("other"))
        both = both.group_by("item", "other").agg(pl.len().cast(pl.Float64).alias("similarity"))
        lengths = np.sqrt(counts[both["item"].to_numpy()] * counts[both["other"].to_numpy()].astype(np.float64))
        both = both.with_columns(pl.col("similarity") / pl.Series(lengths))
        both = both.sort(["item", "similarity", "other"], descending=[False, True, False])
        return both.group_by("item", maintain_order=True).head(neighbours).sort("item", maintain_order=True)


def _test_record(opened: Opened) -> dict[str, Any]:
    path = opened.run.path / "eval.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; let training finish, or score the run with --mode eval")
    try:
        record = json.loads(path.read_text())
        record = {**record, "metrics": dict(record["metrics"]), "step": record["step"]}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: is no record of a score; score the run again with --mode eval") from None
    if "windows" in record:
        raise ValueError(
            f"{path}: is the mean of several windows; baselines are of a run of one, see DatasetArgs.window"
        )
    return record


def _require_same(opened: Opened, model: dict[str, Any], record: dict[str, Any]) -> None:
    for key in _SAME:
        if model.get(key) != record.get(key):
            raise ValueError(f"{opened.run.path / 'eval.json'}: {key} = {model.get(key)!r}, and the baselines have "
                             f"{record.get(key)!r}; score the run again with --mode eval")  # fmt: skip


def _not_beaten(model: dict[str, float | None], baselines: dict[str, dict[str, float | None]]) -> dict[str, list[str]]:
    """Return for each metric the baselines that score at least as high as the model."""
    found: dict[str, list[str]] = {}
    for metric, score in model.items():
        scores = {name: values[metric] for name, values in baselines.items()}
        names = [n for n, other in scores.items() if other is not None and (score is None or other >= score)]
        if names:
            found[metric] = sorted(names, key=lambda name: -(scores[name] or 0.0))
    return found
