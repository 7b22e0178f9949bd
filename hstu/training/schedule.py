"""Learning rates over steps."""

from __future__ import annotations

import math

from hstu.config import OptimizerArgs


def schedule_factor(args: OptimizerArgs, step: int, total_steps: int, *, sparse: bool = False) -> float:
    """Return the factor on the peak learning rate at ``step`` (from 0): linear warm-up, then the schedule.

    The schedule runs from the end of the warm-up to ``total_steps`` and ends at ``min_learning_rate``. ``sparse``
    asks for the schedule of the tables.
    """
    warmup, kind, floor = args.warmup_steps, args.lr_schedule, args.min_learning_rate / args.learning_rate
    if sparse:
        warmup, kind = args.sparse_warmup_steps, args.sparse_lr_schedule
        floor = args.sparse_min_learning_rate / args.sparse_learning_rate
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    shape = 1 - progress if kind == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return floor + (1 - floor) * shape
