"""Replace a data set by a new one, so that a run that is stopped anywhere leaves the old one or the new one.

A run works in ``.<name>.partial`` beside the data set. When the new entries are complete, ``new`` is renamed to
``ready``: from then on, whoever comes next (a run or a reader) finishes the replacement if the run was killed.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

logger = logging.getLogger(__name__)

SCHEMA_FILE = "schema.json"
DATA_DIR = "data"
VOCABULARY_DIR = "vocabulary"
# The schema comes last: a directory without it is no data set.
_ENTRIES = (VOCABULARY_DIR, DATA_DIR, SCHEMA_FILE)
_STATE_FILE = "state"


def work_directory(target: Path) -> Path:
    """Where a run prepares the data set ``target``."""
    target = target.resolve()  # beside the directory itself, not a link to it: renames stay within one file system
    return target.parent / f".{target.name}.partial"


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield the work directory; the entries put into its ``new`` replace those of ``target`` on success.

    Raises:
        ValueError: If the directory cannot be written, another run is writing it, or it holds a foreign
            "data" or "vocabulary" entry.
    """
    work = work_directory(target)
    try:
        work.mkdir(parents=True, exist_ok=True)
        with _lock(work, target):
            replaced = False
            try:
                _take_over(work, target)
                _refuse_foreign(target)
                (work / "new").mkdir()
                yield work
                (work / "new").rename(work / "ready")
                _swap(target, work)
                replaced = True
            finally:
                try:
                    shutil.rmtree(work, ignore_errors=True)
                except KeyboardInterrupt:
                    if not replaced:
                        raise
                    shutil.rmtree(work, ignore_errors=True)  # too late to stop: the new data set is there
    except OSError as error:
        raise unwritable(target, error) from error


def note_state(work: Path, state: str) -> None:
    """Leave a note of how far the run is, for the case that it is killed."""
    (work / _STATE_FILE).write_text(state)


def repair(target: Path) -> None:
    """Finish a replacement that was killed between its renames, if there is one and nobody is at it."""
    work = work_directory(target)
    if (work / "ready").is_dir():
        with suppress(OSError, ValueError), _lock(work, target):
            _take_over(work, target)
            shutil.rmtree(work, ignore_errors=True)


def _take_over(work: Path, target: Path) -> None:
    """Finish what a killed run had ready, or clear away what it had not."""
    if (work / "ready").is_dir():
        _swap(target, work)
        logger.info("%s: finished the replacement that an earlier run was stopped in", target)
    elif (work / _STATE_FILE).is_file():
        logger.info("%s: an earlier run was stopped while %s; starting again", target, (work / _STATE_FILE).read_text())
    for entry in work.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


@contextmanager
def _lock(work: Path, target: Path) -> Iterator[None]:
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ValueError(f"{target}: another run is writing this data set; wait for it or stop it") from error
    finally:
        os.close(descriptor)


def _refuse_foreign(target: Path) -> None:
    for entry in (DATA_DIR, VOCABULARY_DIR):
        if (target / entry).exists() and not (target / SCHEMA_FILE).is_file():
            raise ValueError(
                f"{target / entry}: exists, but {target} is no data set; move it or choose another --data_dir"
            )


def _swap(target: Path, work: Path) -> None:
    """Move the entries of ``target`` away and those of ``ready`` to ``target``, or change nothing.

    What has been moved already stays: the same call finishes what a killed one began.
    """
    ready, old = work / "ready", work / "old"
    old.mkdir(exist_ok=True)
    created = not target.exists()
    target.mkdir(exist_ok=True)
    try:
        for entry in reversed(_ENTRIES):
            if (ready / entry).exists() and (target / entry).exists():
                (target / entry).rename(old / entry)
        for entry in _ENTRIES:
            if (ready / entry).exists():
                (ready / entry).rename(target / entry)
    except BaseException:
        for entry in _ENTRIES:
            if not (ready / entry).exists() and (target / entry).exists():
                (target / entry).rename(ready / entry)
            if (old / entry).exists():
                (old / entry).rename(target / entry)
        if created:
            with suppress(OSError):
                target.rmdir()
        raise


def unwritable(target: Path, error: OSError) -> ValueError:
    """The error for a directory that cannot be written."""
    return ValueError(f"{target}: cannot be written ({error.strerror or error}); choose another --data_dir")


def require_writable(directory: str | Path) -> None:
    """Raise ValueError unless ``directory`` can be created and written, as far as permissions tell."""
    path = Path(directory).absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if not existing.is_dir():
        raise unwritable(path, NotADirectoryError(0, f"{existing} is a file"))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise unwritable(path, PermissionError(0, f"no permission in {existing}"))
