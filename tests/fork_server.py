"""Forks scripts on request: reads one JSON request a line, answers with the exit code. See ``tests.launch``."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
import traceback
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn


def child(request: dict[str, Any], rank: int, port: int) -> NoReturn:
    """Become one rank of the script, and end without the seconds that an interpreter takes to clean up."""
    code = 1
    try:
        for number, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(Path(request["streams"], name), os.O_WRONLY | os.O_APPEND), number)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        if request["ranks"] > 1:
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": request["ranks"], "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
        script, *arguments = request["command"]
        sys.argv = [script, *arguments]
        if script.endswith(".py"):
            sys.path.insert(0, os.path.dirname(os.path.abspath(script)))  # as where Python starts a file
            runpy.run_path(script, run_name="__main__")
        else:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


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


def wait(running: set[int], request: dict[str, Any]) -> dict[str, Any]:
    """Wait for the ranks, and signal them when asked to; one that fails takes the others with it, as under torchrun."""
    start, when, code = time.monotonic(), request["when"], 0
    moment = Moment(when, Path(request["cwd"], "run")) if when else None
    while running and time.monotonic() - start < request["timeout"]:
        for pid in tuple(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                running.remove(pid)
                code = code or os.waitstatus_to_exitcode(status)
        if code and running:
            kill(running)
        if moment is not None and moment.reached():
            for pid in running:
                os.kill(pid, request["number"])
            moment = None
        time.sleep(0.0005 if moment else 0.01)
    late = bool(running)
    kill(running)
    return {"code": code, "timed_out": late}


def kill(running: set[int]) -> None:
    """Kill the processes and wait for them."""
    for pid in tuple(running):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        running.remove(pid)


def free_port() -> int:
    """A port that nobody listens at, of those that the system gives to no connection by itself meanwhile."""
    while True:
        port = random.randrange(10_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as found:
            found.bind(("127.0.0.1", port))
            return port


def main() -> None:
    """Import what scripts need, once, and serve until standard input ends."""
    import plotext
    import torch.utils.tensorboard

    import hstu.cli.train
    import hstu.inference.report
    import hstu.training.trainer

    if find_spec("numba"):  # compiled, or read from where they are kept, once for all forks
        import hstu.ops.attention.cpu.numba_hstu
        import hstu.ops.softmax.numba_sampled
    assert all((plotext, torch.utils.tensorboard, hstu.cli.train))
    # Drawing takes longer than a tiny training; tests that look at the picture start the script itself.
    hstu.training.trainer.draw_curves = lambda *_: None
    hstu.inference.report.report_at_end = lambda *_: None
    for line in sys.stdin:
        request = json.loads(line)
        for name in ("out", "err"):
            Path(request["streams"], name).touch()
        port, running = free_port() if request["ranks"] > 1 else 0, set[int]()
        for rank in range(request["ranks"]):
            if (pid := os.fork()) == 0:
                child(request, rank, port)
            running.add(pid)
        print(json.dumps(wait(running, request)), flush=True)


if __name__ == "__main__":
    main()
