"""Ctrl-C and SIGTERM as a request to stop after the step."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Notes the first signal; a second Ctrl-C acts as usual, but SIGTERM may come from Slurm and torchrun at once."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> StopRequest:
        self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(self, kind: type | None, value: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(number, self._before[signal.SIGINT])
