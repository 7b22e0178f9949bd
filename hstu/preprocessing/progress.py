"""Say how far a run is: a bar on a terminal, a line now and then elsewhere, a note beside the data set."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

from hstu.data.atomic_directory import note_state

logger = logging.getLogger("hstu.preprocessing")

_LINE_SECONDS = 10.0
_NOTE_SECONDS = 1.0


class Progress:
    """Called with what is being done, the events so far and the share of the whole, as often as one likes.

    Args:
        name: Name of the data set.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state = "starting"
        self.work: Path | None = None
        self._what = ""
        self._bar: tqdm | None = None
        self._started = self._line = self._note = time.monotonic()
        self._begin = (self._started, 0, 0.0)

    def __call__(self, what: str, events: int, share: float) -> None:
        """Report."""
        now = time.monotonic()
        if what != self._what:
            self.close()
            self._what, self._begin = what, (now, events, share)
        self.state = f"{what} (event {events:,})"
        if self.work and now - self._note > _NOTE_SECONDS:
            self._note = now
            note_state(self.work, self.state)
        text = self._text(now, events, share)
        if sys.stderr.isatty():
            self._bar = self._bar or tqdm(
                total=1.0, desc=f"{self.name}: {what}", bar_format="{desc} {percentage:3.0f}%|{bar}|{postfix}"
            )
            self._bar.n = min(1.0, share)
            self._bar.set_postfix_str(text)
        elif now - self._line > _LINE_SECONDS:
            self._line = now
            logger.info("%s: %s %.0f%%, %s", self.name, what, 100 * share, text)

    def _text(self, now: float, events: int, share: float) -> str:
        elapsed, done, part = now - self._begin[0], events - self._begin[1], share - self._begin[2]
        text = f"{events:,} events"
        if elapsed > 0 and done > 0 and part > 0:
            left = int(elapsed * (1 - share) / part)
            text += f", {done / elapsed:,.0f}/s, {left // 60}:{left % 60:02d} left"
        return text

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def finish(self, events: int) -> None:
        """Say how long it took."""
        self.close()
        elapsed = time.monotonic() - self._started
        logger.info("%s: %s events in %.1f s (%s/s)", self.name, f"{events:,}", elapsed, f"{events / elapsed:,.0f}")
