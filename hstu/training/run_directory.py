"""The directory of a run: configs, environment, logs, metrics, checkpoints, figures."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from hstu.config import LoadedConfig
from hstu.training.checkpoint_files import Progress, write_atomically
from hstu.training.file_errors import naming

logger = logging.getLogger(__name__)

WINDOWS = "windows"
"""Where a run over windows of time keeps that of each."""


class RunDirectory:
    """Paths and files of one run. Rank 0 alone writes.

    Args:
        path: The directory; created if absent.

    Raises:
        ValueError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: The directory of the whole run, of which this may be a window.
        self.whole = path.parents[1] if path.parent.name == WINDOWS else path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.figures = path / "figures"
        self.num_records = 0  # in metrics.jsonl, but for the test score's; of rank 0
        self._lock: TextIO | None = None

    def create(self) -> None:
        """Make the directory and see that it can be written."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.figures.mkdir(exist_ok=True)
            write_atomically(self.path / ".writable", "")
            (self.path / ".writable").unlink()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> ValueError:
        return ValueError(f"--run-dir = {str(self.path)!r}: cannot be written ({error.strerror}); choose another")

    def lock(self) -> bool:
        """Keep other processes from training here until ``unlock``; nothing to do before there is a directory.

        Returns:
            Whether the run before this one did not get as far as ``unlock``.

        Raises:
            ValueError: if another one does, or the directory cannot be written.
        """
        if self._lock is not None or not self.path.is_dir():
            return False
        try:
            file = open(self.path / ".lock", "a+")  # noqa: SIM115 (the system gives up the lock with the process)
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ValueError(
                f"--run-dir = {str(self.path)!r}: {file.read().strip() or 'another process'} trains there; wait for "
                "it to end, or choose another directory"
            ) from None
        except OSError as error:
            raise ValueError(
                f"--run-dir = {str(self.path)!r}: its file system locks no files ({error.strerror}), so that two runs "
                "could write there; choose a directory on another one"
            ) from None
        file.seek(0)
        killed = bool(file.read())
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file
        return killed

    def unlock(self) -> None:
        """Let others train here, and know that this run was not killed."""
        if self._lock is not None:
            self._lock.truncate(0)
            self._lock.close()
            self._lock = None

    def describe(self, loaded: LoadedConfig, environment: dict[str, Any]) -> None:
        """Write ``config.gin`` (as given), ``operative.gin`` (every value that applies) and ``environment.json``."""
        write_atomically(self.path / "config.gin", loaded.given)
        write_atomically(self.path / "operative.gin", loaded.operative)
        write_atomically(self.path / "environment.json", json.dumps(environment, indent=1, default=str))

    def records(self, up_to: int | None = None) -> list[dict[str, Any]]:
        """Return the records of ``metrics.jsonl`` up to step ``up_to``; lines that are none are left out, and told."""
        if not self.metrics.is_file():
            return []
        found, lines = [], self.metrics.read_bytes().splitlines()
        for number, line in enumerate(lines, 1):
            record = _parsed(line)
            if record is None and number < len(lines):  # a killed process may leave half of a line at the end
                logger.warning("%s: line %d is no record of a run and is left out", self.metrics, number)
            if record is not None and (up_to is None or record["step"] <= up_to):
                found.append(record)
        return found

    def started_from(self) -> dict[str, Any] | None:
        """Return what the run took over from another one when it began, if it did."""
        found = (record for record in self.records(0) if record["kind"] == "init")
        return next(found, None)

    def rewind(self, progress: Progress, *, evaluated: bool) -> None:
        """Drop the records that a run resumed at ``progress`` will write again: later ones, and the test score.

        Args:
            progress: Where it goes on.
            evaluated: Whether it does so after the evaluation of that step, if there is one.
        """
        step = progress.step
        records = [record for record in self.records(step) if record.get("split") != "test"] if step else []
        if not evaluated:
            records = [record for record in records if (record["kind"], record["step"]) != ("eval", step)]
        self.num_records = len(records)
        if self.num_records < progress.records:
            logger.warning(
                "%s holds %d of the %d records up to step %d: the others are lost, and its curves have gaps",
                self.metrics, self.num_records, progress.records, step,
            )  # fmt: skip
        if self.metrics.is_file():
            self.replace_records(records)

    def replace_records(self, records: list[dict[str, Any]]) -> None:
        """Write ``metrics.jsonl`` anew."""
        write_atomically(self.metrics, "".join(json.dumps(record) + "\n" for record in records))

    def append(self, record: dict[str, Any]) -> None:
        """Add one record to ``metrics.jsonl``."""
        self.num_records += record.get("split") != "test"
        with naming(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps(record) + "\n")

    def write_json(self, name: str, value: Any) -> None:
        """Write a JSON file, whole or not at all."""
        write_atomically(self.path / name, json.dumps(value, indent=1) + "\n")

    def begin(self) -> None:
        """Note that this torchrun job has obeyed its flags here; a restart of it goes on from where it was."""
        job = _job()
        if job is not None:
            write_atomically(self.path / ".job", job)

    def has_begun(self) -> bool:
        """Return whether this process belongs to a job that has begun here, and was restarted."""
        note = self.path / ".job"
        return note.is_file() and note.read_text() == _job()

    def kept(self) -> str:
        """Return what a run that ends now goes on from, and how."""
        latest = self.checkpoints / "latest"
        kept = f"{latest.resolve().name} is the last checkpoint" if latest.exists() else "there is no checkpoint yet"
        return f"{kept}; go on with --run-dir {self.whole}"

    def has_run(self) -> bool:
        """Return whether a run has been here."""
        return self.metrics.is_file() or any(self.path.glob("checkpoints/step_*")) or (self.path / WINDOWS).is_dir()


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return the record in ``line``, if it is one."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int) and isinstance(record.get("kind"), str)
    return record if whole else None


def _job() -> str | None:
    """Return what is the same for all attempts of a torchrun job, whose launcher starts each rank 0; else None."""
    name = os.environ.get("TORCHELASTIC_RUN_ID")
    return None if name is None else f"{name} {socket.gethostname()} {os.getppid()}"


class _TerminalHandler(logging.StreamHandler):
    """Prints above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # a terminal that is gone ends no training; train.log has the line
            tqdm.write(self.format(record), file=sys.stdout)
            sys.stdout.flush()


class _FileHandler(logging.FileHandler):
    """Says once that its file takes no more, instead of a traceback for each record."""

    told = False

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
        elif not self.told:
            self.told = True
            tqdm.write(f"{self.baseFilename}: cannot be written ({error.strerror}); the log has gaps", file=sys.stderr)

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what could not be written before cannot be now
            super().close()


@contextlib.contextmanager
def kept_logging() -> Iterator[None]:
    """Put the log back at the end as it was: a library's caller has an opinion of its own on where it goes."""
    root = logging.getLogger("hstu")
    handlers, propagate, level = root.handlers[:], root.propagate, root.level
    root.handlers = []
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        root.handlers, root.propagate = handlers, propagate
        root.setLevel(level)


def configure_logging(log_file: Path | None, *, is_main: bool, quiet: bool = False) -> None:
    """Send the log to the terminal and, with tracebacks, to ``log_file``; ranks other than 0 report errors only.

    Args:
        log_file: None: the terminal alone.
        is_main: Whether this is rank 0.
        quiet: Whether the terminal gets warnings alone.
    """
    root = logging.getLogger("hstu")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.propagate = False
    root.setLevel(logging.DEBUG)
    terminal = _TerminalHandler()
    terminal.setLevel((logging.WARNING if quiet else logging.INFO) if is_main else logging.ERROR)
    terminal.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(terminal)
    if log_file is not None and is_main:
        file = _FileHandler(log_file)
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)
