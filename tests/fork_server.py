"""Forks entrypoints on request: reads one JSON request a line, answers with the exit code. See ``tests.launch``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def child(request: dict[str, Any]) -> None:
    """Become the entrypoint."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(request["streams"], name), os.O_WRONLY), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    sys.argv = [f"pretrain_gr_{request['task']}.py", *request["flags"]]
    from hstu.cli.train import main

    main(request["task"])


class Moment:
    """When to send a signal: at ``"line N"`` of metrics.jsonl, or within ``"save N"``, of this process itself."""

    def __init__(self, text: str, run: Path) -> None:
        kind, count = text.split()
        self.reached = {"line": self._line, "save": self._save}[kind]
        self.count, self.run, self.saves, self.saving = int(count), run, 0, False
        self.before = {*self._inodes("metrics.jsonl"), *self._inodes("checkpoints/.step_*.partial")}

    def _inodes(self, pattern: str) -> list[int]:
        found = []
        for path in self.run.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found.append(path.stat().st_ino)
        return found

    def _line(self) -> bool:
        if self.before.issuperset(self._inodes("metrics.jsonl")):
            return False
        return len((self.run / "metrics.jsonl").read_bytes().splitlines()) >= self.count

    def _save(self) -> bool:
        now = not self.before.issuperset(self._inodes("checkpoints/.step_*.partial"))
        self.saves, self.saving = self.saves + (now and not self.saving), now
        return now and self.saves == self.count


def wait(pid: int, request: dict[str, Any]) -> dict[str, Any]:
    """Wait for the child, and signal it when asked to."""
    start, when = time.monotonic(), request["when"]
    moment = Moment(when, Path(request["cwd"], "run")) if when else None
    while time.monotonic() - start < request["timeout"]:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "timed_out": False}
        if moment is not None and moment.reached():
            os.kill(pid, request["number"])
            moment = None
        time.sleep(0.0005 if moment else 0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return {"code": -9, "timed_out": True}


def main() -> None:
    """Import what entrypoints need, once, and serve until standard input ends."""
    import matplotlib.figure
    import plotext
    import torch.utils.tensorboard

    import hstu.cli.train
    import hstu.training.trainer

    assert all((matplotlib.figure, plotext, torch.utils.tensorboard, hstu.cli.train, hstu.training.trainer))
    for line in sys.stdin:
        request = json.loads(line)
        for name in ("out", "err"):
            Path(request["streams"], name).touch()
        pid = os.fork()
        if pid == 0:
            try:
                child(request)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
        reply = wait(pid, request)
        print(json.dumps(reply), flush=True)


if __name__ == "__main__":
    main()
