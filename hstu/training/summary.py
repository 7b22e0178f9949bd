"""What a run says before its first step: data, weights, memory."""

from __future__ import annotations

from typing import Any

import numpy as np

from hstu.config import Config
from hstu.data.loader import BatchLoader
from hstu.data.reader import SequenceDataset
from hstu.models.embedding import table_named
from hstu.parallel import Mesh, Parallelized
from hstu.training.optimizer import Optimizer

_ROW = "  {:<28} {:>16} {:>14} {:>12} {:>12}"


def describe_data(dataset: SequenceDataset, config: Config) -> str:
    """Return the counts of the data set, in one line."""
    counts = dataset.schema.counts
    return (
        f"{config.task} on {dataset.schema.name}: {counts['users']:,} users, {counts['items']:,} items, "
        f"{counts['events']:,} events"
    )


def describe_plan(mesh: Mesh, train: BatchLoader, total_steps: int) -> str:
    """Return ranks and steps, in one line."""
    return (
        f"{mesh.world_size} rank(s) on {mesh.device.type}; {total_steps:,} steps of {train.global_batch_size} "
        f"sequences, {train.steps_per_epoch} an epoch"
    )


def describe_unmet(met: dict[str, np.ndarray]) -> list[str]:
    """Return a line that counts the values that training does not meet, of each table, if there are some."""
    unmet = [f"{int((~row[:-1]).sum()):,} of {name}" for name, row in met.items() if not row[:-1].all()]
    return [f"values that no training sample has, which are read as unknown: {', '.join(unmet)}"] if unmet else []


def memory_table(parallel: Parallelized, optimizer: Optimizer) -> str:
    """Return a table of the weights, and of the memory that this rank holds for them and for their optimizers."""
    rows = memory_rows(parallel, optimizer)
    total = ("all", "", "", sum(row[3] for row in rows), sum(row[4] for row in rows))
    lines = [_ROW.format("on this rank", "shape", "layout", "weights MiB", "moments MiB")]
    for name, shape, layout, weights, moments in [*rows, total]:
        lines.append(_ROW.format(name, shape, layout, f"{weights / 2**20:,.2f}", f"{moments / 2**20:,.2f}"))
    return "\n".join(lines)


def memory_rows(parallel: Parallelized, optimizer: Optimizer) -> list[tuple[str, str, str, int, int]]:
    """Return name, shape, layout, bytes of weights and bytes of moments on this rank, of the dense weights and tables.

    Megatron-Core keeps a gradient beside each dense weight, which counts as weights.
    """
    dense = sum(p.numel() for p in parallel.dense.ddp.module.parameters())
    rows = [("dense, with gradients", f"{dense:,}", "", 8 * dense, sum(v.nbytes for _, _, v in optimizer.moments()))]
    for collection in parallel.tables.collections.values():
        moments = collection.fused_optimizer.state_dict()["state"]
        for name, weight in collection.state_dict().items():
            state = sum(_held(value) for value in moments.get(name, {}).values())
            shape, table = " x ".join(f"{size:,}" for size in weight.size()), table_named(name)
            rows.append((f"table {table}", shape, parallel.tables.layout[table], _held(weight), state))
    return rows


def _held(value: Any) -> int:
    """Return the bytes of the shards that this rank holds."""
    return sum(shard.tensor.nbytes for shard in value.local_shards()) if hasattr(value, "local_shards") else 0
