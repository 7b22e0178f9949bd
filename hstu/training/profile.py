"""A window of steps under torch.profiler."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from hstu.config import TrainerArgs

logger = logging.getLogger(__name__)


def profiler(args: TrainerArgs, run: Path, first_step: int, rank: int) -> AbstractContextManager[Any]:
    """Return a profiler whose ``step()`` is called after each step.

    It records steps [profile_step_start, profile_step_end) and writes a Chrome trace to
    ``profile/rank<r>.json``; without ``TrainerArgs.profile`` it does nothing.
    """
    wait = args.profile_step_start - first_step
    if args.profile and wait < 0:
        logger.warning("no profile: TrainerArgs.profile_step_start = %d is past, the run goes on from step %d",
                       args.profile_step_start, first_step)  # fmt: skip
    if not args.profile or wait < 0:
        return nullcontext(SimpleNamespace(step=lambda: None))
    target = run / "profile" / f"rank{rank}.json"

    def write(finished: Any) -> None:
        target.parent.mkdir(exist_ok=True)
        finished.export_chrome_trace(str(target))
        logger.info("profile from step %d on: %s", args.profile_step_start, target)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    active = args.profile_step_end - args.profile_step_start
    warmup = min(1, wait)  # the first recorded step would also show the start of the profiler
    return profile(
        activities=activities,
        schedule=schedule(wait=wait - warmup, warmup=warmup, active=active, repeat=1),
        on_trace_ready=write,
    )
