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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}


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


def run(command: list[str], *, timeout: float, cwd: Path | None = None) -> Done:
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


class Entrypoint:
    """Runs training entrypoints in forks of a process that has imported everything, in a second instead of eight."""

    def __init__(self) -> None:
        command = [sys.executable, str(Path(__file__).with_name("fork_server.py"))]
        self.server = subprocess.Popen(
            command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def __call__(
        self,
        task: str,
        *flags: str,
        cwd: Path,
        timeout: float = 60,
        when: str | None = None,
        number: int = signal.SIGKILL,
    ) -> Done:
        """Run the entrypoint of ``task`` in ``cwd``.

        ``when`` is the moment to send signal ``number``: ``"line N"`` of metrics.jsonl in the run directory
        ``run`` below ``cwd``, or ``"save N"``, within the Nth save of this process.
        """
        with tempfile.TemporaryDirectory() as streams:
            request = dict(
                task=task, flags=flags, cwd=str(cwd), streams=streams, timeout=timeout, when=when, number=number
            )
            assert self.server.stdin is not None and self.server.stdout is not None
            self.server.stdin.write(json.dumps(request) + "\n")
            self.server.stdin.flush()
            reply = json.loads(self.server.stdout.readline())
            assert not reply["timed_out"], f"{task} {flags} took longer than {timeout} s"
            out, err = (Path(streams, name).read_text() for name in ("out", "err"))
        return Done(reply["code"], out, err)

    def close(self) -> None:
        """End the server."""
        assert self.server.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.server.stdin.close()
        self.server.wait(timeout=30)


@functools.cache
def entrypoint() -> Entrypoint:
    """Return the one ``Entrypoint`` of this test session."""
    return Entrypoint()
