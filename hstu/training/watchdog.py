"""Ends a process that hangs, and leaves the stack of every rank behind."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TextIO

logger = logging.getLogger(__name__)

_KEPT = 5  # earlier stacks of a rank
_armed: tuple[float, TextIO] | None = None


@contextmanager
def watchdog(folder: Path, rank: int, seconds: float) -> Iterator[None]:
    """End the process with exit code 1 if ``beat`` is not called for ``seconds``.

    The stacks of its threads go to ``folder/rank<r>.txt``, without asking the interpreter, which may be what hangs;
    so they do at SIGTERM, by which a launcher ends the other ranks, and so does the traceback of an exception. The
    file is gone after a good end; those of earlier attempts are kept by ``keep_stacks``.

    Args:
        folder: Made if absent.
        rank: Of this process.
        seconds: The longest pause between two beats.
    """
    global _armed
    folder.mkdir(exist_ok=True)
    path = folder / f"rank{rank}.txt"
    with open(path, "w") as file:
        file.write(f"rank {rank} on {socket.gethostname()}; no progress for {seconds:g} s, or ended:\n")
        file.flush()
        faulthandler.register(signal.SIGTERM, file, chain=True)
        _armed = seconds, file
        try:
            beat()
            yield
        except BaseException:
            traceback.print_exc(file=file)
            raise
        finally:
            _armed = None
            faulthandler.cancel_dump_traceback_later()
            faulthandler.unregister(signal.SIGTERM)
    path.unlink(missing_ok=True)


def keep_stacks(folder: Path) -> None:
    """Move the stacks of an earlier attempt aside, from ``rank<r>.txt`` to ``rank<r>.1.txt`` and so on, and log them.

    Of a rank that was killed there are none. To be called by one rank, before the others enter ``watchdog``.
    """
    for path in sorted(folder.glob("rank*.txt")):
        text = path.read_text(errors="replace")
        if path.stem.count(".") or len(text.splitlines()) < 2:
            continue
        places = [path, *(path.with_suffix(f".{number}.txt") for number in range(1, _KEPT + 1))]
        for source, target in reversed(list(pairwise(places))):
            if source.exists():
                os.replace(source, target)
        logger.debug("from an earlier attempt, kept in %s:\n%s", places[1], text)


def beat() -> None:
    """Say that this process is alive: the clock of ``watchdog``, if there is one, starts again."""
    if _armed is not None:
        seconds, file = _armed
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)
