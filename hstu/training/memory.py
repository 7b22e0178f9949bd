"""What a run needs in memory at the very least, told before anything is allocated."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import torch

from hstu.config import Config, ConfigError
from hstu.data.loader import BatchLoader
from hstu.data.schema import Schema
from hstu.models import build_model
from hstu.models.tables import make_tables
from hstu.parallel import Mesh
from hstu.training.plan import dense_bytes, shard_bytes

# Limits of a container: the file, and the line of memory.stat beside it that counts what cannot be given back.
_CGROUPS = (
    (Path("/sys/fs/cgroup/memory.max"), "anon"),
    (Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"), "total_rss"),
)


class Need(NamedTuple):
    """Memory of one rank: for what, bytes, and the fields that decide, the first of which an error names."""

    what: str
    size: float
    fields: dict[str, object]


def require_memory(config: Config, schema: Schema, mesh: Mesh, train: BatchLoader) -> None:
    """Raise ``ConfigError`` if this rank needs more memory than it has, naming what needs most.

    Counted is what has to be there in any case: an error is right, and its absence no promise
    (``python -m hstu.cli.plan`` measures).
    """
    needs = least_needs(config, schema, mesh, train)
    total, there = sum(need.size for need in needs), free_bytes(mesh.device)
    if total > there:
        most = max(needs, key=lambda need: need.size)
        (field, value), *others = most.fields.items()
        also = "".join(f" or {name}" for name, _ in others)
        raise ConfigError(
            field,
            f"= {value}: a rank needs at least {_gib(total)} and has {_gib(there)}, and {most.what} take "
            f"{_gib(most.size)}: lower it{also}",
        )


def least_needs(config: Config, schema: Schema, mesh: Mesh, train: BatchLoader) -> list[Need]:
    """Return the least that a rank needs."""
    network, retrieval, embedding = config.network, config.retrieval, config.embedding
    with torch.device("meta"):
        model = build_model(config, schema, allocate_tables=False)
    dense = sum(p.numel() for p in model.parameters()) // mesh.tensor.size
    optimizer, on_host = config.optimizer.sparse_optimizer_str, mesh.device.type == "cpu"
    held = [t for t in make_tables(config, schema) if on_host or t.name not in embedding.uvm_caching_tables]
    tables = sum(sum(shard_bytes(table.rows, table.width, optimizer)) for table in held) / mesh.world_size
    events = np.minimum(train.split.stop, train.collate.max_events).mean() if len(train.split) else 0.0
    events *= min(train.batch_size, len(train.split) / mesh.data.size) / mesh.context.size
    # Each layer keeps its input and as much again for the backward pass, at the least.
    tokens, element = (
        events * (2 if network.token_layout == "interleave" else 1),
        2 if network.dtype_str == "bfloat16" else 4,
    )
    kept = tokens * network.num_layers * 2 * network.hidden_size * element
    size: dict[str, object] = {"NetworkArgs.hidden_size": network.hidden_size}
    batch: dict[str, object] = {"TrainerArgs.train_batch_size": train.batch_size}
    needs = [
        Need(
            "dense weights with gradients and moments",
            sum(dense_bytes(config, dense, mesh.tokens.size)),
            size | {"NetworkArgs.num_layers": network.num_layers},
        ),
        Need("tables with moments", tables, size | {"NetworkArgs.item_embedding_dim": network.item_embedding_dim}),
        Need(
            "the activations of a batch",
            kept / mesh.tensor.size,
            batch | {"DatasetArgs.max_history_seqlen": config.dataset.max_history_seqlen},
        ),
    ]
    if retrieval is not None and retrieval.negatives in ("uniform", "log_uniform"):
        ids = events * retrieval.num_negatives * 8
        needs.append(
            Need("negatives of a batch", ids, {"RetrievalArgs.num_negatives": retrieval.num_negatives} | batch)
        )
    return needs


def free_bytes(device: torch.device) -> float:
    """Return the memory that this rank may still take: its GPU's, or its share of the machine's or the container's."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    free = psutil.virtual_memory().available
    for path, line in _CGROUPS:
        with suppress(OSError, ValueError, KeyError):  # there is no such limit
            used = dict(row.split() for row in path.with_name("memory.stat").read_text().splitlines())[line]
            free = min(free, int(path.read_text()) - int(used))
    return free / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"
