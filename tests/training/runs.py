"""Runs in this process: a trainer on one rank, its records, and what differs between two of them."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from hstu.config import load_config
from hstu.data.reader import SequenceDataset
from hstu.parallel import Mesh
from hstu.parallel.mesh import parallel_state
from hstu.training.run_directory import RunDirectory
from hstu.training.trainer import Trainer
from tests.tiny import BINDINGS

CLOCK = ("data_wait_share", "memory_gib")
#: Dropout is on, and every step is a line of metrics.jsonl.
EVERY_STEP = ("NetworkArgs.hidden_dropout=0.2", "TrainerArgs.log_interval=1", "TrainerArgs.eval_interval=10")


@contextlib.contextmanager
def trainer(
    data: Path, run: Path, task: str = "ranking", *bindings: str, mesh: Mesh | None = None, picture: bool = False
) -> Iterator[Trainer]:
    """Make a trainer in ``run``; without a ``mesh`` it gets one of one rank.

    Without ``picture`` no curves are drawn, which takes longer than training does.
    """
    config = load_config(task, [], [*BINDINGS[task], *EVERY_STEP, *bindings]).config  # type: ignore[arg-type]
    with contextlib.ExitStack() as stack:
        if not picture:
            stack.enter_context(mock.patch("hstu.training.trainer.draw_curves"))
        mesh = mesh or stack.enter_context(Mesh.create())
        directory = RunDirectory(run)
        mesh.on_main(directory.create)
        yield Trainer(config, SequenceDataset.open(data), mesh, directory)


def state_of(run: Trainer) -> list[torch.Tensor]:
    """Return copies of every weight and moment."""
    tensors = []
    for name, value in run.checkpointer._tensors().items():
        if not name.startswith("rng/"):
            shards = [s.tensor for s in value.local_shards()] if hasattr(value, "local_shards") else [value]
            tensors += [shard.detach().clone() for shard in shards]
    return tensors


@contextlib.contextmanager
def grid(context: int, tensor: int) -> Iterator[None]:
    """Make this process the first of 16 that are not there."""
    dist.init_process_group("fake", rank=0, world_size=16, store=FakeStore())
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor, context_parallel_size=context, create_gloo_process_groups=False
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def records(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Return the records of one kind in the order of ``metrics.jsonl``, without what depends on the clock."""
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in r.items() if not k.endswith("_per_second") and k not in CLOCK}
        for r in found
        if r["kind"] == kind
    ]


def losses(run: Path) -> dict[int, float]:
    """Return the loss of each step; a step that is there twice is an error."""
    found = records(run)
    steps = [record["step"] for record in found]
    assert steps == sorted(set(steps)), "steps out of order or twice"
    return {record["step"]: record["loss"] for record in found}


def worst(found: dict[int, float], wanted: dict[int, float]) -> float:
    """Return the largest relative difference of the losses."""
    assert found.keys() == wanted.keys() and wanted
    return max(abs(found[step] - wanted[step]) / wanted[step] for step in wanted)
