"""What a trained model is asked: who, after which events, about which items; and its answers in original ids."""

from __future__ import annotations

import logging
import operator
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl
import pyarrow as pa
from torch import Tensor

from hstu.data.cleaning import Missing, clean_ids, require_columns
from hstu.data.files import FileFormat
from hstu.data.reader import Histories, SequenceDataset, Sequences
from hstu.data.request_features import MissingFeatures
from hstu.data.request_files import HistoryColumns, features_of, find_users, read_frame, read_histories
from hstu.data.requests import Requests
from hstu.data.schema import Level
from hstu.data.splits import Split
from hstu.data.values import Values, arrow_of
from hstu.data.vocabulary import Index
from hstu.inference.opened import Opened
from hstu.metrics.topk import TopK
from hstu.models import RankingModel
from hstu.models.binding import label_features

logger = logging.getLogger(__name__)


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
        label_features: Features of events that a ranking predicts, beside actions.
        controls: Control columns of the data set: of its users, its items, and of the held-out events.
    """

    dataset: Histories
    split: Split
    users: pa.Array
    vocabulary: pa.Array
    held_out: bool
    pairs: np.ndarray | None
    score_names: tuple[str, ...]
    label_features: tuple[str, ...]
    controls: Controls

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
            columns["target"] = self.vocabulary.take(pa.array(self._targets(samples).items[row]))
            columns["event"] = pa.array(self.split.stop[samples[row]] - 1)
        return self._with_controls(columns, samples[row], items[row, place])

    def scores(self, rows: Tensor, scores: Tensor) -> dict[str, pa.Array]:
        """Return the columns of ``scores`` [Q, K] for samples ``rows``."""
        samples, values = rows.cpu().numpy(), scores.cpu().numpy()
        targets = self._targets(samples)
        items = targets.items if self.pairs is None else self.pairs[samples]
        columns = {"user": self.users.take(pa.array(samples)), "item": self.vocabulary.take(pa.array(items))}
        columns |= {name: pa.array(values[:, index]) for index, name in enumerate(self.score_names)}
        if self.held_out:
            if targets.actions is not None:
                columns["action_id"] = pa.array(targets.actions)
            for name, true in targets.of_events.items():
                assert isinstance(true, np.ndarray)
                columns[name if true.ndim == 2 else f"{name}_id"] = arrow_of(true)
            columns["event"] = pa.array(self.split.stop[samples] - 1)
        return self._with_controls(columns, samples, items)

    def _with_controls(
        self, columns: dict[str, pa.Array], samples: np.ndarray, items: np.ndarray
    ) -> dict[str, pa.Array]:
        """Add what the control columns hold for rows of ``samples`` and ``items``, [n] each."""
        chosen, place = np.unique(samples, return_inverse=True)
        stop, names = self.split.stop[chosen], tuple(self.controls.of_samples)
        if names:
            found = self.dataset.gather(self.split.users[chosen], stop - 1, stop, names)
            for name, ids in (found.of_users | found.of_events).items():
                assert isinstance(ids, np.ndarray)
                columns.setdefault(name, self.controls.of_samples[name].take(pa.array(ids[place])))
        for name, (originals, of_items) in self.controls.of_items.items():
            columns.setdefault(name, originals.take(pa.array(of_items[items])))
        return columns

    def _targets(self, samples: np.ndarray) -> Sequences:
        stop = self.split.stop[samples]
        return self.dataset.gather(self.split.users[samples], stop - 1, stop, self.label_features)


@dataclass(frozen=True)
class Controls:
    """Control columns that come out with predictions; a column of predictions of the same name stands in front.

    Attributes:
        of_samples: Those of users and of held-out events -> original values, and none for the id after the last.
        of_items: Those of items -> likewise, and the id of each item.
    """

    of_samples: dict[str, pa.Array]
    of_items: dict[str, tuple[pa.Array, np.ndarray]]

    @classmethod
    def read(cls, known: SequenceDataset, levels: tuple[Level, ...]) -> Controls:
        """Read those of the data set, of users and events only those of ``levels``."""

        def originals(name: str) -> pa.Array:
            values = known.vocabularies.originals(name)
            return pa.concat_arrays([values, pa.nulls(1, values.type)])

        stored = {
            level: [f.name for f in known.schema.stored(level) if f.role == "control"] for level in get_args(Level)
        }
        return cls(
            {name: originals(name) for level in levels for name in stored[level]},
            {name: (originals(name), known.category_ids(name)) for name in stored["item"]},
        )


@dataclass(frozen=True, kw_only=True)
class RequestSpec:
    """Who asks, after which events, about which items, and how their tables are read.

    Attributes:
        users: New histories, one row per event, or users of the data set, in a column alone; None: all of these.
        candidates: Pairs of user and item that are to be scored.
        split: "future", after all events; "test" or "valid", before the event that evaluation holds out.
        request_time: When the future is asked about: seconds, an ISO date, a datetime or "now"; None: at the last
            event of each user.
        unknown_items: What to do with events of items that the model does not know: "error", or "drop".
        user_column: In these tables; None: that of the log, if on record, or of the data set; likewise the others.
        time_format: Pattern of times, see ``InteractionSpec``, likewise ``missing`` and ``set_separator``.
        missing_features: What to do where a table lacks a feature that the model reads: "error", or "allow".
        users_format: How a file of users is read.
        candidates_format: How a file of candidates is read.
    """

    users: Path | pl.DataFrame | None = None
    candidates: Path | pl.DataFrame | None = None
    split: Literal["future", "test", "valid"] = "future"
    request_time: str | int | datetime | None = None
    unknown_items: Literal["error", "drop"] = "error"
    user_column: str | None = None
    item_column: str | None = None
    time_column: str | None = None
    action_column: str | None = None
    time_format: str | None = None
    missing: Missing = "error"
    missing_features: MissingFeatures = "error"
    set_separator: str = "|"
    users_format: FileFormat = field(default_factory=FileFormat)
    candidates_format: FileFormat = field(default_factory=FileFormat)


def make_prediction_requests(spec: RequestSpec, opened: Opened) -> PredictionRequests:
    """Return the requests of ``spec`` to the model ``opened``.

    Raises:
        ValueError: for fields that exclude each other, and malformed tables.
    """
    known = opened.dataset
    columns = history_columns(spec, opened)
    histories, chosen = known, None
    named = known.index(known.schema.user.name)
    if spec.users is not None:
        name = _name(spec.users, "users")
        frame = read_frame(spec.users, columns, spec.users_format, name=name)
        if columns.item in frame.columns:
            if spec.split != "future":
                raise ValueError(f"--split = {spec.split!r}: a file of histories has no held-out events; use future")
            histories, users = read_histories(name, frame, known, columns, spec.unknown_items)
            named = Index(users.to_arrow())
        else:
            chosen = find_users(name, frame, known, columns)
    if spec.split == "future":
        items = None
        features: dict[str, Values] = {}
        rows = np.arange(histories.num_users) if chosen is None else chosen
        if spec.candidates is not None:
            rows, items, features = read_candidates(spec.candidates, columns, named, known, spec.candidates_format)
        asked = Requests(histories, rows, items, parse_time(spec.request_time), features)
        dataset: Histories = asked
        split, users_of = asked.split, rows
    else:
        for flag in ("candidates", "request_time"):
            if getattr(spec, flag) is not None:
                raise ValueError(f"--{flag}: asks about the future; leave it out with --split {spec.split}")
        dataset, split, items = known, opened.assembly.loaders[spec.split].split, None
        if chosen is not None:
            mine = np.isin(split.users, chosen)
            split = Split(name=split.name, users=split.users[mine], stop=split.stop[mine])
        users_of = split.users
    _tell_unknown(histories, np.unique(users_of), opened)
    return PredictionRequests(
        dataset=dataset,
        split=split,
        users=named.originals.take(pa.array(users_of)),
        vocabulary=known.index(known.schema.item.name).originals,
        held_out=spec.split != "future",
        pairs=items,
        score_names=score_names(opened),
        label_features=label_features(opened.config, known.schema),
        controls=Controls.read(known, _levels(spec, histories is known)),
    )


def _levels(spec: RequestSpec, of_data_set: bool) -> tuple[Level, ...]:
    """Return of whom the data set has control columns: its users, and the events that it holds out."""
    if not of_data_set:
        return ()
    return ("user",) if spec.split == "future" else ("user", "event")


def _name(table: Path | pl.DataFrame, role: str) -> str:
    """Return what messages call a table."""
    return role if isinstance(table, pl.DataFrame) else str(table)


def _tell_unknown(histories: SequenceDataset, users: np.ndarray, opened: Opened) -> None:
    """Say how many of ``users`` have a value of a context that training never met."""
    contexts = histories.gather(users, np.zeros_like(users), np.zeros_like(users)).contexts
    counts = {name: int((~met[contexts[name]]).sum()) for name, met in opened.loader.collate.met.items()}
    if told := ", ".join(f"{name} of {count:,} users" for name, count in counts.items() if count):
        logger.info(
            "values that training never met are read as unknown: %s, of %s users in all", told, f"{len(users):,}"
        )


def history_columns(spec: RequestSpec, opened: Opened) -> HistoryColumns:
    """Return where a table keeps what the model reads; by default as the log had it, or the data set's features."""
    known = opened.columns
    schema, collate = opened.dataset.schema, opened.loader.collate
    return HistoryColumns(
        user=spec.user_column or known.get("user") or schema.user.name,
        item=spec.item_column or known.get("item") or schema.item.name,
        time=spec.time_column or known.get("time") or (schema.time.name if schema.time else ""),
        action=spec.action_column or known.get("action") or (schema.action.name if schema.action else ""),
        contexts=collate.contexts,
        use_actions=collate.use_actions and schema.action is not None,
        time_format=spec.time_format,
        missing=spec.missing,
        has_unknown=collate.unknown_rate > 0,
        features=(*collate.user_features, *collate.event_features),
        missing_features=spec.missing_features,
        set_separator=spec.set_separator,
    )


def read_candidates(
    table: Path | pl.DataFrame, columns: HistoryColumns, users: Index, known: SequenceDataset, fmt: FileFormat
) -> tuple[np.ndarray, np.ndarray, dict[str, Values]]:
    """Return the user row and the item id of each pair, int64 [S] both, and the features that are known of them.

    Raises:
        ValueError: for a user without history or an item that the model does not know.
    """
    file = _name(table, "candidates")
    frame = read_frame(table, columns, fmt, ("user", "item"), name=file)
    require_columns(frame, [columns.user, columns.item], file)
    user, item = (clean_ids(frame[name], file, missing=columns.missing) for name in (columns.user, columns.item))
    rows, items = users.places(user), known.index(known.schema.item.name).places(item)
    for name, ids, lack in ((columns.user, rows, "has no history"), (columns.item, items, "is not in the catalogue")):
        if ids.null_count():
            row = int(ids.is_null().arg_max() or 0)
            raise ValueError(f"{file}: column {name!r}, row {row + 1}: {frame[name][row]!r} {lack}; remove the row")
    asked = tuple(f for f in known.schema.of("event") if f.name in columns.features and f.known_at_request)
    return rows.to_numpy(), items.to_numpy(), features_of(frame, asked, known, columns, file)


def score_names(opened: Opened) -> tuple[str, ...]:
    """Return the columns of scores: ``score``; of a ranking run one for each output, and behind it what it is of.

    Of a binary task or of regression that is the task's name, of a softmax the class, with the task's name before it
    if there are several tasks.
    """
    if not isinstance(opened.model, RankingModel):
        return ("score",)
    tasks, names = opened.model.tasks, []
    if len(tasks) == 1 and tasks[0].outputs == 1:
        return ("score",)
    for task in tasks:
        behind = [task.name]
        if task.kind == "multiclass":
            classes = opened.dataset.vocabulary(task.feature).tolist()
            classes += [f"unused_{n}" for n in range(len(classes), task.outputs)]
            behind = [f"{task.name}_{name}" if len(tasks) > 1 else str(name) for name in classes]
        names += [f"score_{name}" for name in behind]
    return tuple(names)


def parse_time(given: str | int | datetime | None) -> int | None:
    """Return seconds of a number, an ISO date or a datetime (UTC unless it names a zone) or ``now``; None of None.

    Raises:
        ValueError: for anything else.
    """
    if given is None:
        return None
    if given == "now":
        return int(time.time())
    try:
        moment = given
        if isinstance(given, str):
            moment = int(given) if given.lstrip("-").isdigit() else datetime.fromisoformat(given)
        if isinstance(moment, datetime):
            return int((moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
        return operator.index(moment)  # type: ignore[arg-type]
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"--request_time = {given!r}: is no time; use seconds, an ISO date, or now") from None
