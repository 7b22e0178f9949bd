"""Settings that every test shares: few threads, no screen, GPU tests only where there is a GPU."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator

import pytest

# Before anything imports torch, and inherited by the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# Which a shell's background job ignores, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


# Started first: each is long and one process runs it alone, so that at the end it would leave the other idle.
LONGEST = ("tests/end_to_end/", "tests/parallel/", "tests/training/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(
        key=lambda item: next((k for k, part in enumerate(LONGEST) if item.nodeid.startswith(part)), len(LONGEST))
    )
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="module", autouse=True)
def leave_job() -> Iterator[None]:
    """Leave the job that ``hstu.fit`` and ``hstu.open_run`` join for good, for tests that make one of their own."""
    yield
    if (mesh := sys.modules.get("hstu.parallel.mesh")) is not None:
        mesh.KEPT.close()


@pytest.fixture(autouse=True)
def fresh_log() -> None:
    """Give each test the package's log as an import leaves it, wherever a command of a test or a fixture sent it."""
    log = logging.getLogger("hstu")
    log.handlers, log.propagate = [], True
    log.setLevel(logging.NOTSET)
