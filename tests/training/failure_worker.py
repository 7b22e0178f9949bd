"""A rank that fails on its own: ``failure_worker.py MODE DATA OUT``, on the ranks of this job."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hstu.cli.command import run_on_mesh
from hstu.config import ConfigError
from hstu.data.batch import Batch
from hstu.models.losses import LossSum
from hstu.parallel import Mesh
from hstu.training import evaluate as evaluation
from hstu.training.step import Stepper
from tests.training.runs import trainer

SKIP = ("TrainerArgs.nonfinite_loss='skip'", "TrainerArgs.max_train_iters=6", "TrainerArgs.train_batch_size=16")


def infinite(loss: LossSum) -> LossSum:
    return dataclasses.replace(loss, total=loss.total / 0)


def spoil(on_rank: int, at_step: int) -> None:
    """Make the loss of one rank infinite at one step."""
    take = Stepper.take

    def breaking(self: Stepper, batches, progress) -> float:  # type: ignore[no-untyped-def]
        loss = self.model.loss
        if self.mesh.rank == on_rank and progress.step + 1 == at_step:
            self.model.loss = lambda *args: infinite(loss(*args))
        try:
            return take(self, batches, progress)
        finally:
            self.model.loss = loss

    Stepper.take = breaking  # type: ignore[method-assign]


def skip(mesh: Mesh, data: Path, out: Path) -> None:
    """Skip a step that is bad on rank 1 alone; then make a mistake there alone, for which rank 0 waits."""
    spoil(on_rank=1, at_step=3)
    with trainer(data, out / "run", "ranking", *SKIP, mesh=mesh) as run:
        run.train()
        rank1 = next(run.loaders["train"].epoch(0, 64)).users
        (out / f"progress{mesh.rank}.json").write_text(json.dumps([dataclasses.asdict(run.progress), rank1.tolist()]))
    if mesh.rank == 1:
        raise ConfigError("TrainerArgs.seed", "= 7: only here")
    mesh.barrier()


def everywhere(mesh: Mesh, data: Path, out: Path) -> None:
    """Fail on every rank alike."""
    raise ConfigError("TrainerArgs.seed", "= 8: everywhere")


def hang(mesh: Mesh, data: Path, out: Path) -> None:
    """Rank 1 sleeps in its third step."""
    take = Stepper.take

    def sleeping(self: Stepper, batches, progress) -> float:  # type: ignore[no-untyped-def]
        if self.mesh.rank == 1 and progress.step == 2:
            time.sleep(1000)
        return take(self, batches, progress)

    Stepper.take = sleeping  # type: ignore[method-assign]
    with trainer(
        data, out / "run", "ranking", "TrainerArgs.hang_timeout_seconds=8", "TrainerArgs.max_epochs=9", mesh=mesh
    ) as run:
        run.train()


def evaluate(mesh: Mesh, data: Path, out: Path) -> None:
    """Validate for ever after three steps."""
    batches = evaluation._batches

    def endless(*args: Any) -> Iterator[Batch]:
        for batch in itertools.chain.from_iterable(batches(*args) for _ in itertools.count()):
            (out / f"evaluating{mesh.rank}").touch()
            yield batch

    evaluation._batches = endless  # type: ignore[assignment]
    limits = ("TrainerArgs.eval_interval=3", "TrainerArgs.train_batch_size=16")
    with trainer(data, out / "run", "ranking", *limits, mesh=mesh) as run:
        run.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, data, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    action = {"skip": skip, "everywhere": everywhere, "hang": hang, "evaluate": evaluate}[mode]
    sys.exit(run_on_mesh(lambda mesh: action(mesh, data, out)))
