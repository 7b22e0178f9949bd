"""Make a data set of a log that does not fit in memory: spill its events sorted by user, then encode part by part.

The memory needed grows with the numbers of users and items (some 50 bytes each), not with the number of events; one
user's events must fit. The spilled events take 15 to 30 bytes each on disk, beside the data set.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from hstu.data.external_sort import EVENTS_PER_RUN, Runs
from hstu.data.feature_codes import FeatureColumn, Summary, make_vocabularies, summarize
from hstu.data.feature_tables import TableFeatures
from hstu.data.interactions import ITEM, TIME, USER, InteractionSpec, most_recent, to_arrow
from hstu.data.numbering import Numbering
from hstu.data.repeats import count_repeats
from hstu.data.schema import Feature, Schema, count_statistics
from hstu.data.sessions import cut_at_gaps, order_of
from hstu.data.spill import FEATURE, ROW_HASH, Log, Progress, find_repeats, first_of_equals
from hstu.data.splits import MIN_EVENTS
from hstu.data.values import Values, take
from hstu.data.writer import EVENTS_PER_PART, DatasetWriter, part_bounds

logger = logging.getLogger(__name__)

_THREADS = 2


@dataclass(frozen=True, kw_only=True)
class EncodingOptions:
    """What encoding a log needs beside its ``InteractionSpec``.

    Args:
        ticks_per_second: Unit of the times: 1 for seconds, 1000 for milliseconds.
        action_bits: Bits of an action that is a mask.
        bit_names: Their names, the lowest first; None: they have none.
        filter_once: Count events for the minimum counts once, over the whole log, instead of repeating until
            all have enough; users that are left with fewer are dropped, items that are left stay.
        absent_context: Value of categories for users without a row in the users table; None refuses them.
        judge: Whether categories of nearly as many values as rows are refused.
        absent_items: Whether items may be without a row in the items table; they have no features then.
        events_per_run: Events sorted in memory at once.
        events_per_part: Most events of a part with more than one user.
    """

    ticks_per_second: int = 1
    action_bits: int = 1
    bit_names: tuple[str, ...] | None = None
    filter_once: bool = False
    absent_context: str | None = None
    absent_items: bool = False
    judge: bool = True
    events_per_run: int = EVENTS_PER_RUN
    events_per_part: int = EVENTS_PER_PART


@dataclass(frozen=True)
class _Kept:
    """Codes of the users and items of the data set in the order of their ids, and the users' events."""

    users: np.ndarray
    lengths: np.ndarray
    items: np.ndarray
    filtered: bool


def encode_log(
    blocks: Iterable[tuple[int, pl.DataFrame]],
    spec: InteractionSpec,
    options: EncodingOptions,
    writer: DatasetWriter,
    *,
    users: Callable[[], pl.DataFrame | None],
    items: Callable[[], pl.DataFrame | None] = lambda: None,
    progress: Progress,
    check_counts: Callable[[dict[str, int]], None] = lambda counts: None,
    on_repeats: Callable[[np.ndarray], None] = lambda hashes: None,
) -> Schema:
    """Encode a log that comes in blocks and write it; the schema is returned and still to be written.

    Ids are ranks of the original numbers; strings are numbered in the order of their first appearance. Action values
    that no event is left with keep their place. A user's events are sorted by time, stably: ties stay in the order of
    the log.

    Args:
        blocks: Position of a file in the order of the log, and a table of events of it, with the columns "user"
            and "item" (integers or strings) and, as the spec says, "action" (numbers or strings) and "time"
            (numbers), without nulls; with FEATURE + its name for each declared one; with ROW_HASH (uint64), of the
            rows of a user that are equal there the first is kept. Files may come in any order, the events of one in
            theirs.
        spec: Names and filters.
        options: The rest.
        writer: Where the parts and vocabularies go.
        users: Gives the users table, if there is one, after the last block.
        items: Gives the items table likewise.
        progress: Told how far it is.
        check_counts: Given users, items and events of the whole log before the filters; may raise ValueError.
        on_repeats: Given the hashes of rows that repeat an earlier one; may raise ValueError.

    Raises:
        ValueError: If the log is empty, nothing passes the filters, or the users or items table is wrong.
    """
    log = _spill(blocks, spec, options, writer)
    if spec.session_gap:
        runs = Runs(_folder(writer, "sessions"), options.events_per_run)
        log = cut_at_gaps(log, spec, options.ticks_per_second, options.events_per_part, runs, progress)
    user_counts, item_counts = log.users.counts(), log.items.counts()
    check_counts({"users": len(user_counts[0]), "items": len(item_counts[0]), "events": log.runs.rows})
    repeats = find_repeats(log.runs, user_counts, item_counts, options.events_per_part, progress)
    if len(repeats):
        on_repeats(repeats)
    kept = _filter(log.runs, user_counts, item_counts, spec, options, progress)
    features, contexts, action_ids = _describe(log, kept, spec, options, (users(), items()), writer)
    encoder = _PartEncoder(log, kept, spec, options, action_ids, drop_repeats=len(repeats) > 0)
    lengths, seen_again = _write_parts(encoder, contexts, writer, progress)
    counts = count_statistics(lengths, len(kept.items), seen_again)
    features += [column.feature() for column in log.features.values()]
    return Schema(name=spec.name, features=tuple(features), counts=counts)


def _spill(
    blocks: Iterable[tuple[int, pl.DataFrame]], spec: InteractionSpec, options: EncodingOptions, writer: DatasetWriter
) -> Log:
    features = {told.name: FeatureColumn(told, spec.file, judge=options.judge) for told in spec.declared("event")}
    log = Log(Runs(_folder(writer, "runs"), options.events_per_run), features=features)
    try:
        for source, block in blocks:
            log.spill(source, block)
    finally:
        log.runs.close()
    if not log.runs.rows:
        raise ValueError(f"{spec.file}: has no rows; give a file with at least one")
    return log


def _folder(writer: DatasetWriter, name: str) -> Path:
    folder = writer.work / name
    folder.mkdir()
    return folder


def _describe(
    log: Log,
    kept: _Kept,
    spec: InteractionSpec,
    options: EncodingOptions,
    tables: tuple[pl.DataFrame | None, pl.DataFrame | None],
    writer: DatasetWriter,
) -> tuple[list[Feature], dict[str, Values], Callable[[np.ndarray], np.ndarray] | None]:
    """Write the vocabularies; returns features, values of those of users, and what makes ids of actions' codes."""
    vocabularies = {USER: log.users.originals(kept.users), ITEM: log.items.originals(kept.items)}
    absent_items, judge = "" if options.absent_items else None, options.judge
    owners = log.users.owners(kept.users)
    of_users = TableFeatures.read("user", tables[0], owners, spec, options.absent_context, judge=judge)
    of_items = TableFeatures.read("item", tables[1], vocabularies[ITEM], spec, absent_items, judge=judge)
    for table in (of_users, of_items):
        vocabularies |= {name: vocabulary for name, (_, vocabulary) in table.undeclared.items()}
    vocabularies |= make_vocabularies([*log.features.values(), *of_users.columns.values(), *of_items.columns.values()])
    (user_features, contexts), (item_features, categories) = of_users.encode(), of_items.encode()
    features = [Feature(name=USER, role="user", vocab_size=len(kept.users)), *user_features]
    features += [Feature(name=ITEM, role="item", vocab_size=len(kept.items)), *item_features]
    action_ids = None
    if spec.action_column:
        size = 2**options.action_bits
        if spec.action_type == "categorical":
            vocabularies[spec.action_name], action_ids = log.actions.vocabulary()
            size = len(vocabularies[spec.action_name])
        kind, bits = spec.action_type, options.bit_names
        features.append(Feature(name=spec.action_name, role="action", vocab_size=size, action_type=kind, bits=bits))
    if spec.time_column:
        features.append(Feature(name=TIME, role="time"))
    for name, values in vocabularies.items():
        writer.vocabulary(name, to_arrow(values), categories if name == ITEM else None)
    return features, contexts, action_ids


def _filter(
    runs: Runs,
    user_counts: tuple[np.ndarray, np.ndarray],
    item_counts: tuple[np.ndarray, np.ndarray],
    spec: InteractionSpec,
    options: EncodingOptions,
    progress: Progress,
) -> _Kept:
    """Drop users and items with too few events."""
    kept = _Kept(user_counts[0], user_counts[1], item_counts[0], filtered=False)
    if user_counts[1].min() < spec.min_user_events or item_counts[1].min() < spec.min_item_events:
        kept = _recount(runs, user_counts, item_counts, spec, options, progress)
        events = int(user_counts[1].sum())
        logger.info("%s: the filters dropped %d of %d events", spec.file, events - int(kept.lengths.sum()), events)
    short = int((kept.lengths < MIN_EVENTS).sum())
    if short:
        logger.info(
            "%s: %d of %d users have fewer than %d events: they can train a model, but not validate or test it; "
            "--min_user_events %d drops them",
            *(spec.file, short, len(kept.users), MIN_EVENTS, MIN_EVENTS),
        )
    return kept


def _recount(
    runs: Runs,
    user_counts: tuple[np.ndarray, np.ndarray],
    item_counts: tuple[np.ndarray, np.ndarray],
    spec: InteractionSpec,
    options: EncodingOptions,
    progress: Progress,
) -> _Kept:
    """Count the events of those who stay, again and again until all have enough, or once."""
    (users, of_users), (items, of_items) = user_counts, item_counts
    user_number, item_number = Numbering(users), Numbering(items)
    least_user, least_item = max(1, spec.min_user_events), max(1, spec.min_item_events)
    user_stays, item_stays = of_users >= least_user, of_items >= least_item
    settled, rounds = False, 0
    while not settled:
        rounds += 1
        of_users, of_items = np.zeros(len(users), np.int64), np.zeros(len(items), np.int64)
        for run in range(len(runs)):
            progress(f"filtering, round {rounds}", runs.rows * run // len(runs), run / len(runs))
            user, item = user_number(runs.column(run, "user")), item_number(runs.column(run, "item"))
            both = user_stays[user] & item_stays[item]
            of_users += np.bincount(user[both], minlength=len(users))
            of_items += np.bincount(item[both], minlength=len(items))
        enough = of_users >= least_user, of_items >= (1 if options.filter_once else least_item)
        settled = options.filter_once or bool((enough[0] == user_stays).all() and (enough[1] == item_stays).all())
        user_stays, item_stays = enough
    if not user_stays.any():
        raise ValueError(
            f"{spec.file}: no event passes --min_user_events {spec.min_user_events} "
            f"--min_item_events {spec.min_item_events}; lower them"
        )
    return _Kept(users[user_stays], of_users[user_stays], items[item_stays], filtered=True)


class _PartEncoder:
    """Encodes ranges of users."""

    def __init__(
        self,
        log: Log,
        kept: _Kept,
        spec: InteractionSpec,
        options: EncodingOptions,
        action_ids: Callable[[np.ndarray], np.ndarray] | None,
        drop_repeats: bool,
    ) -> None:
        self._runs = runs = log.runs
        self.features = log.features
        self._kept = kept
        self._spec = spec
        self._ticks = options.ticks_per_second
        self._action_ids = action_ids
        self._drop_repeats = drop_repeats
        self._columns = [name for name in runs.columns if name != ROW_HASH or drop_repeats]
        self._user_number, self._item_number = Numbering(kept.users), Numbering(kept.items)
        offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(kept.lengths)])
        self.parts = list(part_bounds(offsets, options.events_per_part))
        first, stop = np.array(self.parts).T
        self._starts, self._stops = runs.bounds(kept.users[first], kept.users[stop - 1])

    def encode(self, part: int) -> tuple[np.ndarray, dict[str, Values]]:
        """Number of events of each user of a part, [B], and the features of the events, T values of each."""
        first, stop = self.parts[part]
        columns = self._runs.part(self._starts[:, part], self._stops[:, part], self._columns)
        if self._drop_repeats:
            firsts = first_of_equals(columns.pop(ROW_HASH))
            columns = {name: values[firsts] for name, values in columns.items()}
        user, item = self._user_number(columns.pop("user")), self._item_number(columns.pop("item"))
        if self._kept.filtered:
            stays = (user >= 0) & (item >= 0)
            user, item = user[stays], item[stays]
            columns = {name: values[stays] for name, values in columns.items()}
        user -= first
        lengths = np.bincount(user, minlength=stop - first)
        order = order_of(user, columns.get("time"))
        if self._spec.consecutive_repeats == "drop":
            again = (np.diff(item[order], prepend=-1) == 0) & (np.diff(user[order], prepend=-1) == 0)
            order = order[~again]
            lengths = np.bincount(user[order], minlength=stop - first)
        if self._spec.max_user_events:
            recent, lengths = most_recent(lengths, self._spec.max_user_events)
            order = order[recent]
        events: dict[str, Values] = {ITEM: item[order]}
        if "action" in columns:
            actions = columns["action"][order]
            events[self._spec.action_name] = self._action_ids(actions) if self._action_ids else actions.astype(np.int64)
        if "time" in columns:
            events[TIME] = (columns["time"][order] // self._ticks).astype(np.int64)
        for name, column in self.features.items():
            events[name] = column.values(columns[FEATURE + name][order])
        return lengths, events


def _write_parts(
    encoder: _PartEncoder, contexts: dict[str, Values], writer: DatasetWriter, progress: Progress
) -> tuple[np.ndarray, int]:
    """Write all parts; returns the number of events of each user, [U], and how many are of an item met before.

    The features of events are told what is in the parts.
    """

    def write(part: int) -> tuple[np.ndarray, int, dict[str, Summary]]:
        start, stop = encoder.parts[part]
        lengths, events = encoder.encode(part)
        chosen = {name: take(values, np.arange(start, stop)) for name, values in contexts.items()}
        writer.part(part, users=(USER, start), lengths=lengths, contexts=chosen, events=events)
        items = events[ITEM]
        assert isinstance(items, np.ndarray)
        return lengths, count_repeats(lengths, items), {n: summarize(events[n], seed=part) for n in encoder.features}

    pool = ThreadPoolExecutor(_THREADS)
    try:
        lengths, done, repeats = [], 0, 0
        for number, (part, again, summaries) in enumerate(pool.map(write, range(len(encoder.parts)))):
            lengths.append(part)
            done, repeats = done + int(part.sum()), repeats + again
            for name, summary in summaries.items():
                encoder.features[name].add(summary)
            progress("writing", done, (number + 1) / len(encoder.parts))
        return np.concatenate(lengths), repeats
    finally:
        pool.shutdown(cancel_futures=True)
