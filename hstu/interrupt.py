"""Ctrl-C and SIGTERM: the first one is obeyed soon, the second one at once, whatever the process is doing."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType

logger = logging.getLogger(__name__)

GRACE = 8.0  # seconds from a signal to the end, for a process that is stuck in something long
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_ECHO = 1.0  # within so many seconds a second SIGTERM is the first one, sent by Slurm and passed on by torchrun
_AFTER_SAVE = 1.0  # for the orderly end, when a save has taken longer than the grace

_active: StopRequest | None = None


class Stopped(KeyboardInterrupt):
    """A signal asked this process to end.

    Attributes:
        exit_code: 130 for Ctrl-C, 143 for SIGTERM.
        told: Whether the user knows.
    """

    def __init__(self, number: int, *, told: bool = False) -> None:
        super().__init__()
        self.exit_code, self.told = 128 + number, told


class StopRequest:
    """Obeys Ctrl-C and SIGTERM inside a ``with``; a signal that this process was started to ignore stays ignored.

    The first signal raises ``Stopped`` in the main thread or, inside ``patience``, is only noted in ``requested``.
    A thread ends the process when nobody has ended it ``grace`` seconds later, for a long operation of a library asks
    nobody, and at once at the second signal.

    Args:
        words: What to say when the thread ends the process.
        grace: Seconds.
    """

    def __init__(self, words: Callable[[], str] = lambda: "interrupted", grace: float = GRACE) -> None:
        self.words, self.grace, self.patient = words, grace, False
        self.busy: Callable[[], bool] = lambda: False  # with a save, which is waited for
        self.requested: int | None = None
        self._noted = False

    def __enter__(self) -> StopRequest:
        global _active
        assert _active is None, "one at a time"
        _active = self
        read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._thread = threading.Thread(target=self._watch, args=(read,), name="signals", daemon=True)
        self._thread.start()
        ours = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._note) for number in ours}
        # Told to the thread by the interpreter's C handler, also while the main thread is in a library.
        self._fd_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        global _active
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._write, b"\0")
        self._thread.join()
        os.close(self._write)
        _active = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        first, self._noted = not self._noted, True  # of the others the thread decides
        self.requested = self.requested or number
        if first and not (self.patient or self.grace == 0):
            raise Stopped(number)

    def _watch(self, read: int) -> None:
        """Wait for signals, and for the end of the grace."""
        first, deadline, saves = 0.0, float("inf"), False
        poll = select.poll()
        poll.register(read, select.POLLIN)
        while True:
            wait = None if deadline == float("inf") else 1000 * max(0.0, deadline - time.monotonic())
            if not poll.poll(wait):
                was_busy, saves = saves, self.busy()
                if not (saves or was_busy):
                    self._end(self.words())
                deadline = time.monotonic() + _AFTER_SAVE
                continue
            for number in os.read(read, 1 << 10):
                if number == 0:
                    os.close(read)
                    return
                if number not in _SIGNALS:
                    continue
                if deadline == float("inf"):
                    self.requested, first = self.requested or number, time.monotonic()
                    deadline = first + self.grace
                elif number != signal.SIGTERM or time.monotonic() - first > _ECHO:
                    self._end("interrupted")

    def _end(self, words: str) -> None:
        assert self.requested is not None
        if int(os.environ.get("RANK", 0)) == 0:
            os.write(2, f"{words}\n".encode())
            logger.debug("%s", words)
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(128 + self.requested)


class PoliteStop(StopRequest):
    """Obeys Ctrl-C inside a ``with`` without ever ending the process: a notebook has more to lose than one cell.

    The first one raises ``Stopped`` or, inside ``patience``, is only noted; the second one raises it. A thread other
    than the main one, which no signal reaches, goes on as it is.
    """

    def __enter__(self) -> PoliteStop:
        global _active
        if _active is not None:
            raise ValueError("another training is under way in this process; wait for it, or use another process")
        _active = self
        main = threading.current_thread() is threading.main_thread()
        self._before = {signal.SIGINT: signal.signal(signal.SIGINT, self._note)} if main else {}
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        global _active
        for number, handler in self._before.items():
            signal.signal(number, handler)
        _active = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested is not None, number
        if again or not self.patient:
            raise Stopped(number)


@contextlib.contextmanager
def patience(words: Callable[[], str], busy: Callable[[], bool]) -> Iterator[None]:
    """Only note the first signal inside; who is inside asks ``requested`` and ends in order, within the grace.

    Args:
        words: What to say when the process has to be ended in the middle of something.
        busy: Whether a save is under way, which is waited for.
    """
    with contextlib.ExitStack() as stack:
        stop = _active or stack.enter_context(StopRequest())
        before = stop.patient, stop.words, stop.busy
        stop.patient, stop.words, stop.busy = True, words, busy
        try:
            yield
        finally:
            stop.patient, stop.words, stop.busy = before


def requested() -> int | None:
    """Return the signal that asked this process to end and has not ended it yet."""
    return None if _active is None else _active.requested


def _forget_in_child() -> None:
    """Keep the signals of a forked process from its parent's thread."""
    with contextlib.suppress(ValueError):
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)
