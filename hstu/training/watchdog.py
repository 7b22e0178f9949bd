"""Ends a process that hangs, and leaves the stack of every rank behind."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import pairwise
from pathlib import Path

from hstu.training.file_errors import naming

logger = logging.getLogger(__name__)

_KEPT = 5  # earlier stacks of a rank
_SPEAKS = 0.98  # of the seconds: before the process is gone
_armed: tuple[float, FileIO] | None = None
_last_beat = 0.0


@contextmanager
def watchdog(folder: Path, rank: int, seconds: float) -> Iterator[None]:
    """End the process with exit code 1 if ``beat`` is not called for ``seconds``.

    The stacks of its threads go to ``folder/rank<r>.txt``, without asking the interpreter, which may be what hangs;
    so they do at SIGTERM, by which a launcher ends the other ranks, and so does the traceback of an exception. The
    file is gone after a good end; those of earlier attempts are kept by ``keep_stacks``. The log, if the interpreter
    can still write it, has the stack of the hanging thread too.

    Args:
        folder: Made if absent.
        rank: Of this process.
        seconds: The longest pause between two beats.
    """
    global _armed
    folder.mkdir(exist_ok=True)
    path = folder / f"rank{rank}.txt"
    with open(path, "wb", buffering=0) as file:  # a full disk refuses a write, and no close
        with naming(path):
            file.write(f"rank {rank} on {socket.gethostname()}; no progress for {seconds:g} s, or ended:\n".encode())
        faulthandler.register(signal.SIGTERM, file, chain=True)
        _armed = seconds, file
        ended = threading.Event()
        speaker = threading.Thread(target=_speak, args=(path, rank, threading.get_ident(), ended), daemon=True)
        try:
            beat()
            speaker.start()
            yield
        except BaseException:
            with suppress(OSError):
                file.write(traceback.format_exc().encode())
            raise
        finally:
            _armed = None
            ended.set()
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
    global _last_beat
    if _armed is not None:
        seconds, file = _armed
        _last_beat = time.monotonic()
        faulthandler.dump_traceback_later(seconds, exit=True, file=file)


def _speak(path: Path, rank: int, thread: int, ended: threading.Event) -> None:
    """Log the stack of ``thread`` just before the process ends."""
    armed = _armed
    assert armed is not None
    while not ended.wait(max(0.01, _last_beat + _SPEAKS * armed[0] - time.monotonic())):
        frame = sys._current_frames().get(thread)
        if frame is not None and time.monotonic() - _last_beat >= _SPEAKS * armed[0]:
            stack = "".join(traceback.format_stack(frame))
            logger.error(
                "rank %d ends the job: no progress for %g s; all of %s\n%s", rank, armed[0], path.parent, stack
            )
            return
