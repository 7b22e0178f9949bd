"""An external sort by user: blocks of events go to disk in sorted runs, and come back as parts of whole users."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

EVENTS_PER_RUN = 1 << 22

_INTEGERS = (np.int8, np.int16, np.int32)


@dataclass
class _Run:
    """A file that holds the columns of some events one after the other, ascending by user."""

    path: Path
    source: int
    rows: int
    types: dict[str, np.dtype] = field(default_factory=dict)

    def read(self, column: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        offset = 0
        for name, kind in self.types.items():
            if name == column:
                break
            offset += self.rows * kind.itemsize
        kind = self.types[column]
        count = (self.rows if stop is None else stop) - start
        # Read, not mapped: mapped pages count as memory of the process.
        return np.fromfile(self.path, kind, count, offset=offset + start * kind.itemsize)


class Runs:
    """Events on disk, sorted by user within each run; runs stand in the order of their sources, then of arrival.

    Args:
        folder: An empty directory.
        events_per_run: Events held in memory before they are sorted and written.
    """

    def __init__(self, folder: Path, events_per_run: int = EVENTS_PER_RUN) -> None:
        self._folder = folder
        self._events_per_run = events_per_run
        self._pending: list[dict[str, np.ndarray]] = []
        self._pending_rows = self._source = 0
        self._runs: list[_Run] = []
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        self.rows = 0

    def __len__(self) -> int:
        return len(self._runs)

    def append(self, columns: dict[str, np.ndarray], source: int = 0) -> None:
        """Add events of a source, one array [N] or [N, w] per column; one is "user", integers."""
        if source != self._source and self._pending_rows:
            self._flush()
        self._source = source
        self._pending.append(columns)
        self._pending_rows += len(columns["user"])
        if self._pending_rows >= self._events_per_run:
            self._flush()

    def close(self) -> None:
        """Write what is pending; the runs can be read from then on."""
        if self._pending_rows:
            self._flush()
        if self._writing:
            self._writing.result()
        self._writer.shutdown()
        self._runs.sort(key=lambda run: run.source)

    def remove(self) -> None:
        """Remove the files; nothing can be read any more."""
        for run in self._runs:
            run.path.unlink()

    def _flush(self) -> None:
        if self._writing:
            self._writing.result()
        blocks, self._pending = self._pending, []
        run = _Run(self._folder / f"{len(self._runs):05d}", self._source, self._pending_rows)
        self._runs.append(run)
        self.rows += run.rows
        self._pending_rows = 0
        self._writing = self._writer.submit(_write_run, run, blocks)

    def column(self, run: int, name: str) -> np.ndarray:
        """A column of one run, in the run's order."""
        return self._runs[run].read(name)

    def bounds(self, first: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of each run that hold the users ``first_k`` to ``last_k``: starts and stops, int64 [runs, K]."""
        columns = (self.column(run, "user") for run in range(len(self)))
        found = [(np.searchsorted(users, first), np.searchsorted(users, last, side="right")) for users in columns]
        starts, stops = zip(*found, strict=True)
        return np.stack(starts), np.stack(stops)

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return list(self._runs[0].types)

    def part(self, start: np.ndarray, stop: np.ndarray, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Columns ``names`` of the rows ``[start_r, stop_r)`` of every run, one run after the other."""
        pieces = list(zip(self._runs, start.tolist(), stop.tolist(), strict=True))
        return {name: np.concatenate([run.read(name, *bounds) for run, *bounds in pieces]) for name in names}


def _write_run(run: _Run, blocks: list[dict[str, np.ndarray]]) -> None:
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    blocks.clear()
    users = columns["user"]
    order = None if (users[1:] >= users[:-1]).all() else np.argsort(_smallest(users), kind="stable")
    with run.path.open("wb") as file:
        for name, values in columns.items():
            values = _smallest(values)
            run.types[name] = np.dtype((values.dtype, values.shape[1:]))
            (values if order is None else values[order]).tofile(file)
    if run.path.stat().st_size != sum(kind.itemsize * run.rows for kind in run.types.values()):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # tofile does not notice in its last bytes


def _smallest(values: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest type that holds them all exactly."""
    if np.issubdtype(values.dtype, np.floating):
        short = values.astype(np.float32)
        return short if (short == values).all() else values
    low, high = values.min(), values.max()
    for kind in _INTEGERS:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return values.astype(kind)
    return values.astype(np.int64)
