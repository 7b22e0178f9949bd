"""Forks entrypoints on request: reads one JSON request a line, answers with the exit code. See ``tests.launch``."""

from __future__ import annotations

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
        os.dup2(os.open(Path(request["streams"], name), os.O_WRONLY | os.O_CREAT), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(request["cwd"])
    sys.argv = [f"pretrain_gr_{request['task']}.py", *request["flags"]]
    from hstu.cli.train import main

    main(request["task"])


def wait(pid: int, request: dict[str, Any]) -> dict[str, Any]:
    """Wait for the child, killing it when asked to."""
    start, moment = time.monotonic(), request["kill_at"]
    checkpoints = Path(request["cwd"], "run", "checkpoints")
    saves, saving = 0, False
    while time.monotonic() - start < request["timeout"]:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return {"code": os.waitstatus_to_exitcode(status), "timed_out": False}
        now = moment is not None and any(checkpoints.glob(".step_*.partial"))
        saves, saving = saves + (now and not saving), now
        in_save = moment is not None and moment.startswith("save ") and saving and saves == int(moment[5:])
        if in_save or (
            moment is not None and not moment.startswith("save ") and time.monotonic() - start > float(moment)
        ):
            os.kill(pid, signal.SIGKILL)
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
