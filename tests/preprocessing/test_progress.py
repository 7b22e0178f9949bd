from __future__ import annotations

import sys
from pathlib import Path

import pytest

from hstu.preprocessing import progress as module
from hstu.preprocessing.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_line_now_and_then(clock: list[float], caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    progress = Progress("toy")
    progress.work = tmp_path
    with caplog.at_level("INFO"):
        for second in range(25):
            clock[0] = 100.0 + second
            progress("reading a.csv", 1000 * second, second / 100)
        progress.finish(24_000)
    # Every second 1000 events and a hundredth of the whole.
    assert caplog.messages == [
        "toy: reading a.csv 11%, 11,000 events, 1,000/s, 1:29 left",
        "toy: reading a.csv 22%, 22,000 events, 1,000/s, 1:18 left",
        "toy: 24,000 events in 24.0 s (1,000/s)",
    ]
    assert progress.state == "reading a.csv (event 24,000)"
    assert (tmp_path / "state").read_text() == progress.state


def test_a_bar_on_a_terminal(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    progress = Progress("toy")
    for second in range(4):
        clock[0] = 100.0 + second
        progress("writing", 500 * second, second / 4)
    progress.close()
    bar = capsys.readouterr().err
    assert "toy: writing  75%|" in bar and "1,500 events, 500/s, 0:01 left" in bar
