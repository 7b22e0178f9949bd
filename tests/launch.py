"""Start processes that never outlive a test: several ranks under torchrun, and entrypoints in forks of one process."""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


#: Seconds after which a process hangs; a slow machine needs many of them.
PATIENCE = 600.0


@dataclass(frozen=True)
class Done:
    """What a finished process left: exit code and both streams."""

    code: int
    out: str
    err: str


def torchrun_command(ranks: int, script: Path, *args: str) -> list[str]:
    """Return the command that runs ``script`` on ``ranks`` processes; one rank runs without torchrun."""
    if ranks == 1:
        return [sys.executable, str(script), *args]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [sys.executable, *launcher, str(script), *args]


def run(command: list[str], *, timeout: float = PATIENCE, cwd: Path | None = None) -> Done:
    """Run ``command`` to its end; on a timeout it and its descendants are killed."""
    with started(command, cwd=cwd) as process:
        out, err = process.communicate(timeout=timeout)
        return Done(process.returncode, out, err)


@contextlib.contextmanager
def started(command: list[str], *, cwd: Path | None = None) -> Iterator[subprocess.Popen[str]]:
    """Start ``command``; whatever is left of it at the end is killed, with its descendants."""
    process = subprocess.Popen(
        command, cwd=cwd, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            # torchrun puts each rank into a session of its own: a signal to its group would miss them.
            family = psutil.Process(process.pid)
            for member in [*family.children(recursive=True), family]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
        process.wait(timeout=30)


class ForkServer:
    """Runs scripts in forks of a process that has imported everything: a fraction of a second instead of eight."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        self.server = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def ask(self, **request: object) -> Done:
        """Have a request served: see ``forked``."""
        with tempfile.TemporaryDirectory() as streams:
            assert self.server.stdin is not None and self.server.stdout is not None
            self.server.stdin.write(json.dumps(request | {"streams": streams}) + "\n")
            self.server.stdin.flush()
            reply = json.loads(self.server.stdout.readline())
            out, err = (Path(streams, name).read_text() for name in ("out", "err"))
        assert not reply["timed_out"], f"{request['command']} took longer than {request['timeout']} s: {out} {err}"
        return Done(reply["code"], out, err)

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.server.stdin.close()
        try:
            self.server.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.server.kill()


@functools.cache
def _fork_server() -> ForkServer:
    return ForkServer()


def forked(
    script: Path | str,
    *args: str,
    cwd: Path,
    ranks: int = 1,
    timeout: float = PATIENCE,
    when: str | None = None,
    number: int = signal.SIGKILL,
) -> Done:
    """Run ``script``, a file or the name of a module, in ``cwd`` on so many ranks; its curves are not drawn.

    ``when`` is the moment to send signal ``number``: ``"line N"`` of metrics.jsonl in the run directory
    ``run`` below ``cwd``, or ``"save N"``, within the Nth save of this process.
    """
    command = [str(script), *args]
    return _fork_server().ask(
        command=command, cwd=str(cwd), ranks=ranks, timeout=timeout, when=when, number=int(number)
    )


def entrypoint() -> Callable[..., Done]:
    """Return a function of a task and flags that runs the training entrypoint; its options are those of ``forked``."""
    return lambda task, *flags, **options: forked(ROOT / "examples" / f"pretrain_gr_{task}.py", *flags, **options)
