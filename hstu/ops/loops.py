"""Whether loops compiled by numba stand in for torch's operators on a CPU, and their threads."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

SHARE_WORK = 1 << 15  # of whatever a share counts, worth a call
MOST_SHARES = 64
_torch_only = False


def compiled_loops_for(*tensors: Tensor | None) -> bool:
    """Whether compiled loops take these: float32 on a CPU, and numba is installed."""
    fit = all(x is None or (x.dtype == torch.float32 and x.device.type == "cpu") for x in tensors)
    return fit and not _torch_only and _installed()


@contextlib.contextmanager
def torch_only() -> Iterator[None]:
    """Leave the compiled loops aside within this context, as where numba is not installed: for comparisons."""
    global _torch_only
    before, _torch_only = _torch_only, True
    try:
        yield
    finally:
        _torch_only = before


def shares_of(work: int) -> int:
    """Number of shares of some work: whatever the threads, so that sums by share do not depend on them."""
    return min(MOST_SHARES, max(1, work // SHARE_WORK))


def run_shares(shares: int, run: Callable[[int], None]) -> None:
    """Call ``run`` with each share, in as many threads as torch uses; it releases the GIL and shares write apart."""
    threads = min(torch.get_num_threads(), shares)
    pending = iter(range(shares))

    def work() -> None:
        for share in pending:
            run(share)

    helpers = [_pool(os.getpid()).submit(work) for _ in range(threads - 1)]
    try:
        work()
    finally:
        for helper in helpers:
            if not helper.cancel():
                helper.result()


@cache
def _installed() -> bool:
    if find_spec("numba") is None:
        logger.info("CPU loops: torch's operators (numba is not installed: pip install 'hstu[fast]')")
        return False
    logger.info("CPU loops: numba %s; compiled at their first use, which takes seconds, and kept", version("numba"))
    return True


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    """Threads of this process: those of a parent do not survive a fork."""
    return ThreadPoolExecutor(max_workers=os.cpu_count(), thread_name_prefix="hstu-loops")
