"""Learning rate over steps."""

from __future__ import annotations

import math

from hstu.config import OptimizerArgs


def schedule_factor(args: OptimizerArgs, step: int, total_steps: int) -> float:
    """Return the factor on the peak learning rate at ``step`` (from 0): linear warm-up, then the schedule.

    The schedule runs from the end of the warm-up to ``total_steps`` and ends at ``min_learning_rate``.
    """
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    if args.lr_schedule == "constant":
        return 1.0
    progress = min(1.0, (step - args.warmup_steps) / max(1, total_steps - args.warmup_steps))
    shape = 1 - progress if args.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    floor = args.min_learning_rate / args.learning_rate
    return floor + (1 - floor) * shape
