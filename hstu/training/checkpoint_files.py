"""Checkpoints as directories: which are there, which of them is meant, and how one comes to be there at once."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from hstu.data.checksums import file_sums, record_sum
from hstu.training.file_errors import naming

logger = logging.getLogger(__name__)

MARKER = "complete.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or of another model."""


@dataclasses.dataclass(kw_only=True)
class Progress:
    """Where a run stands: the step and what the choice of the best checkpoint needs.

    Attributes:
        step: Steps taken, skipped ones too.
        dense_steps: Steps of the dense optimizer.
        table_steps: Steps of the tables' optimizer.
        samples: Samples taken by all ranks; the data position follows from it, whatever their number.
        best_score: Best validation score so far.
        best_step: Its step.
        evaluations_since_best: For early stopping.
        evaluated_step: The last step that was validated.
        stopped_early: Whether early stopping has ended the run.
        records: Lines of ``metrics.jsonl`` that were written, but for the test score's.
        since_last_line: Sums that the next log line goes on from, see ``Meter.state``.
    """

    step: int = 0
    dense_steps: int = 0
    table_steps: int = 0
    samples: int = 0
    best_score: float | None = None
    best_step: int | None = None
    evaluations_since_best: int = 0
    evaluated_step: int = 0
    stopped_early: bool = False
    records: int = 0
    since_last_line: list[float] = dataclasses.field(default_factory=list)


def step_name(step: int) -> str:
    """Return the directory name of a checkpoint."""
    return f"step_{step:09d}"


def is_complete(path: Path) -> bool:
    """Return whether ``path`` is a checkpoint whose writing was finished."""
    return (path / MARKER).is_file()


def complete_checkpoints(directory: Path) -> list[Path]:
    """Return the finished checkpoints below ``directory``, oldest first."""
    return sorted(path for path in directory.glob("step_*") if is_complete(path))


def find_checkpoint(directory: Path, choice: str) -> Path | None:
    """Return the checkpoint that ``choice`` names: latest, best, a step, or a path; None if there is none.

    When the latest is damaged, the one before it is taken, and the log says so.

    Raises:
        CheckpointError: for a step or path that is not there, or if all that there is is damaged.
    """
    if choice == "best":
        return (directory / choice).resolve() if is_complete(directory / choice) else None
    if choice == "latest":
        return _newest_sound(directory)
    path = directory / step_name(int(choice)) if choice.isdigit() else Path(choice)
    if not is_complete(path):
        have = ", ".join(p.name for p in complete_checkpoints(directory)) or "none"
        raise CheckpointError(f"--checkpoint = {choice!r}: no finished checkpoint {path}; in the run directory: {have}")
    return path.resolve()


def no_checkpoint(directory: Path, choice: str) -> str:
    """Return what to say where ``find_checkpoint`` found none: a run may have been stopped before it had a best one."""
    have = complete_checkpoints(directory)
    remedy = f"use --checkpoint latest, which is {have[-1].name}" if have else "train first"
    return f"has no finished checkpoint {choice!r}; {remedy}"


def read_marker(path: Path) -> dict[str, Any]:
    """Return what a checkpoint says of itself.

    Raises:
        CheckpointError: if it is not a finished checkpoint, or one of its files is not what was written.
    """
    try:
        marker: dict[str, Any] = json.loads((path / MARKER).read_text())
        Progress(**marker["progress"])
        marker["model"], marker["ranks"]
        wanted = {name: (sums["bytes"], sums["sha256"]) for name, sums in marker["files"].items()}
        checksum = marker.pop("checksum")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"misses {error}, as of an earlier version" if isinstance(error, KeyError) else first_line(error)
        raise CheckpointError(f"checkpoint {path} has no readable {MARKER}: {reason}") from error
    problem = None if record_sum(marker) == checksum else f"{MARKER} has other contents than were written"
    for name, (size, _) in wanted.items():
        found = (path / name).stat().st_size if (path / name).is_file() else None
        if problem is None and found != size:
            problem = f"{name} " + ("is missing" if found is None else f"has {found} bytes instead of {size}")
    if problem is None:
        files = file_sums(sorted(path.glob("*.safetensors")))
        for name, sums in files.items():
            if problem is None and name not in wanted:
                problem = f"{name} is not of this checkpoint"
            elif problem is None and sums["sha256"] != wanted[name][1]:
                problem = f"{name} has other contents than were written"
    if problem is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: {problem}; choose another with --checkpoint")
    return marker


def write_marker(path: Path, marker: dict[str, Any]) -> None:
    """Write what a checkpoint says of itself, which makes it one."""
    write_atomically(path / MARKER, json.dumps(marker | {"checksum": record_sum(marker)}, indent=1))


def _newest_sound(directory: Path) -> Path | None:
    """Return the checkpoint that ``latest`` points to or, when it is damaged, the newest that is not."""
    candidates = complete_checkpoints(directory)[::-1]
    if is_complete(directory / "latest"):
        candidates.insert(0, (directory / "latest").resolve())
    damage: CheckpointError | None = None
    for path in dict.fromkeys(candidates):
        try:
            read_marker(path)
        except CheckpointError as error:
            logger.warning("%s; an older one is used if there is any", error)
            damage = error
        else:
            return path
    if damage is not None:
        raise damage
    return None


def supersede(directory: Path, progress: Progress, *, after: int) -> bool:
    """Set aside the checkpoints after step ``after``, from where a run goes on that will make others.

    They move to ``superseded``, where a path still finds them.

    Returns:
        Whether ``best`` points to the best that ``progress`` knows of, which may be gone or damaged.
    """
    later = [path for path in complete_checkpoints(directory) if path.name > step_name(after)]
    # The links first: a run killed in between must not go on from a later one.
    for name, step in (("best", progress.best_step), ("latest", after)):
        target = directory / step_name(0 if step is None else step)
        if later and is_complete(target) and target not in later:
            point(directory / name, target.name)
        elif later:
            (directory / name).unlink(missing_ok=True)
    if later:
        aside = directory / "superseded"
        aside.mkdir(exist_ok=True)
        for path in later[::-1]:
            shutil.rmtree(aside / path.name, ignore_errors=True)
            os.replace(path, aside / path.name)
        logger.info("the checkpoints after step %d are superseded: %s", after, aside)
    try:
        return is_complete(directory / "best") and bool(read_marker((directory / "best").resolve()))
    except CheckpointError as error:
        logger.warning("%s; the search for the best one starts anew", error)
        return False


def point(link: Path, target: str) -> None:
    """Make ``link`` a symbolic link to its neighbour ``target``, at once."""
    temporary = link.with_name(f".{link.name}.new")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` so that ``path`` holds all of it or what it held before."""
    temporary = path.with_name(f".{path.name}.new")
    with naming(path), open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def first_line(error: BaseException) -> str:
    """Return what an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
