"""What a trained model is asked: who, after which events, about which items; and its answers in original ids."""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
from torch import Tensor

from hstu.data.cleaning import clean_ids, require_columns
from hstu.data.files import FileFormat
from hstu.data.reader import Histories, SequenceDataset
from hstu.data.request_files import HistoryColumns, find_ids, find_users, read_frame, read_histories
from hstu.data.requests import Requests
from hstu.data.splits import Split
from hstu.metrics.topk import TopK
from hstu.models import RankingModel
from hstu.training.trainer import Trainer

logger = logging.getLogger("hstu.cli")


@dataclass(frozen=True, kw_only=True)
class PredictionRequests:
    """Samples of a data set, and what their ids stand for.

    Attributes:
        dataset: What the samples are read from.
        split: The samples, unshuffled.
        users: Original id of the user of each sample.
        vocabulary: Original ids of the items.
        held_out: Whether the event asked for is known.
        pairs: Item id of each sample, for a ranking run.
        score_names: Columns of a ranking run's scores.
    """

    dataset: Histories
    split: Split
    users: pa.Array
    vocabulary: pa.Array
    held_out: bool
    pairs: np.ndarray | None
    score_names: tuple[str, ...]

    def recommendations(self, rows: Tensor, best: TopK) -> dict[str, pa.Array]:
        """Return the columns of the items ``best`` for samples ``rows``; places that no item fills are left out."""
        items, scores, samples = best.items.cpu().numpy(), best.scores.cpu().numpy(), rows.cpu().numpy()
        row, place = np.nonzero(items >= 0)
        columns = {
            "user": self.users.take(pa.array(samples[row])),
            "rank": pa.array((place + 1).astype(np.int32)),
            "item": self.vocabulary.take(pa.array(items[row, place])),
            "score": pa.array(scores[row, place]),
        }
        if self.held_out:
            targets, _ = self._targets(samples)
            columns["target"] = self.vocabulary.take(pa.array(targets[row]))
            columns["event"] = pa.array(self.split.stop[samples[row]] - 1)
        return columns

    def scores(self, rows: Tensor, scores: Tensor) -> dict[str, pa.Array]:
        """Return the columns of ``scores`` [Q, K] for samples ``rows``."""
        samples, values = rows.cpu().numpy(), scores.cpu().numpy()
        items, actions = self._targets(samples) if self.pairs is None else (self.pairs[samples], None)
        columns = {"user": self.users.take(pa.array(samples)), "item": self.vocabulary.take(pa.array(items))}
        columns |= {name: pa.array(values[:, index]) for index, name in enumerate(self.score_names)}
        if self.held_out:
            columns |= {"action_id": pa.array(actions), "event": pa.array(self.split.stop[samples] - 1)}
        return columns

    def _targets(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        stop = self.split.stop[samples]
        events = self.dataset.gather(self.split.users[samples], stop - 1, stop)
        return events.items, events.actions


def make_prediction_requests(args: argparse.Namespace, trainer: Trainer) -> PredictionRequests:
    """Return the requests of the flags ``users``, ``candidates``, ``split`` and ``request_time``.

    Raises:
        ValueError: for flags that exclude each other, and malformed files.
    """
    known = trainer.dataset
    columns = history_columns(args, trainer)
    histories, chosen = known, None
    originals = _array(known.vocabulary(known.schema.user.name))
    if args.users is not None:
        frame = read_frame(args.users, columns, file_format(args, ""))
        if columns.item in frame.columns:
            if args.split != "future":
                raise ValueError(f"--split = {args.split!r}: a file of histories has no held-out events; use future")
            histories, users = read_histories(args.users, frame, known, columns, args.unknown_items)
            originals = users.to_arrow(compat_level=pl.CompatLevel.oldest())
        else:
            chosen = find_users(args.users, frame, known, columns)
    if args.split == "future":
        items = None
        rows = np.arange(histories.num_users) if chosen is None else chosen
        if args.candidates is not None:
            rows, items = read_candidates(args.candidates, columns, originals, known, file_format(args, "candidates_"))
        asked = Requests(histories, rows, items, parse_time(args.request_time))
        dataset: Histories = asked
        split, users_of = asked.split, rows
    else:
        for flag in ("candidates", "request_time"):
            if getattr(args, flag) is not None:
                raise ValueError(f"--{flag}: asks about the future; leave it out with --split {args.split}")
        dataset, split, items = known, trainer.loaders[args.split].split, None
        if chosen is not None:
            mine = np.isin(split.users, chosen)
            split = Split(name=split.name, users=split.users[mine], stop=split.stop[mine])
        users_of = split.users
    _tell_unknown(histories, np.unique(users_of), trainer)
    return PredictionRequests(
        dataset=dataset,
        split=split,
        users=originals.take(pa.array(users_of)),
        vocabulary=_array(known.vocabulary(known.schema.item.name)),
        held_out=args.split != "future",
        pairs=items,
        score_names=score_names(trainer),
    )


def _tell_unknown(histories: SequenceDataset, users: np.ndarray, trainer: Trainer) -> None:
    """Say how many of ``users`` have a value of a context that training never met."""
    contexts = histories.gather(users, np.zeros_like(users), np.zeros_like(users)).contexts
    counts = {name: int((~met[contexts[name]]).sum()) for name, met in trainer.loaders["test"].collate.met.items()}
    if told := ", ".join(f"{name} of {count:,} users" for name, count in counts.items() if count):
        logger.info(
            "values that training never met are read as unknown: %s, of %s users in all", told, f"{len(users):,}"
        )


def history_columns(args: argparse.Namespace, trainer: Trainer) -> HistoryColumns:
    """Return where a file keeps what the model reads; names default to those of the data set's features."""
    schema, collate = trainer.dataset.schema, trainer.loaders["test"].collate
    return HistoryColumns(
        user=args.user_column or schema.user.name,
        item=args.item_column or schema.item.name,
        time=args.time_column or (schema.time.name if schema.time else ""),
        action=args.action_column or (schema.action.name if schema.action else ""),
        contexts=collate.contexts,
        use_actions=collate.use_actions and schema.action is not None,
        time_format=args.time_format,
        missing=args.missing,
        has_unknown=collate.unknown_rate > 0,
    )


def file_format(args: argparse.Namespace, prefix: str) -> FileFormat:
    """Return how to read the file whose flags begin with ``prefix``."""
    names = [field.name for field in fields(FileFormat) if field.name != "prefix"]
    return FileFormat(**{name: getattr(args, prefix + name) for name in names}, prefix=prefix)


def read_candidates(
    path: Path, columns: HistoryColumns, users: pa.Array, known: SequenceDataset, fmt: FileFormat
) -> tuple[np.ndarray, np.ndarray]:
    """Return the user row and the item id of each pair in a file, int64 [S] both.

    Raises:
        ValueError: for a user without history or an item that the model does not know.
    """
    frame, file = read_frame(path, columns, fmt, ("user", "item")), str(path)
    require_columns(frame, [columns.user, columns.item], file)
    user, item = (clean_ids(frame[name], file, missing=columns.missing) for name in (columns.user, columns.item))
    rows = find_ids(user, pl.Series(users.to_pylist()))
    items = find_ids(item, known.vocabulary(known.schema.item.name))
    for name, ids, lack in ((columns.user, rows, "has no history"), (columns.item, items, "is not in the catalogue")):
        if ids.null_count():
            row = int(ids.is_null().arg_max() or 0)
            raise ValueError(f"{file}: column {name!r}, row {row + 1}: {frame[name][row]!r} {lack}; remove the row")
    return rows.to_numpy(), items.to_numpy()


def score_names(trainer: Trainer) -> tuple[str, ...]:
    """Return the columns of a ranking run, one for each output: ``score``, and behind it what it is of.

    Of a binary task or of regression that is the task's name, of a softmax the class, with the task's name before it
    if there are several tasks.
    """
    if not isinstance(trainer.model, RankingModel):
        return ()
    tasks, names = trainer.model.tasks, []
    if len(tasks) == 1 and tasks[0].outputs == 1:
        return ("score",)
    for task in tasks:
        behind = [task.name]
        if task.kind == "multiclass":
            classes = trainer.dataset.vocabulary(task.feature).tolist()
            classes += [f"unused_{n}" for n in range(len(classes), task.outputs)]
            behind = [f"{task.name}_{name}" if len(tasks) > 1 else str(name) for name in classes]
        names += [f"score_{name}" for name in behind]
    return tuple(names)


def parse_time(text: str | None) -> int | None:
    """Return seconds of a number, an ISO date (UTC unless it names a zone) or ``now``; None of None.

    Raises:
        ValueError: for anything else.
    """
    if text is None:
        return None
    if text == "now":
        return int(time.time())
    try:
        if text.lstrip("-").isdigit():
            return int(text)
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"--request_time = {text!r}: is no time; use seconds, an ISO date, or now") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())


def _array(originals: np.ndarray) -> pa.Array:
    return pa.array(originals.tolist())
