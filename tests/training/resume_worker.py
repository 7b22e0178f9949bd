"""On the ranks of this job: whole and broken runs of every variant. ``resume_worker.py DATA OUT``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hstu.parallel import Mesh
from hstu.training.checkpoint_files import find_checkpoint
from tests.training.runs import trainer
from tests.training.test_resume import STEPS, TWO_RANKS, VARIANTS, train_until


def main() -> None:
    """Run everything in one process group."""
    torch.set_num_threads(1)
    data, out = Path(sys.argv[1]), Path(sys.argv[2])
    with Mesh.create() as mesh:
        for variant in TWO_RANKS:
            task, *bindings = VARIANTS[variant]
            limits = (*bindings, f"TrainerArgs.max_train_iters={STEPS}", "TrainerArgs.train_batch_size=16")
            for name in ("whole", "broken", *(["forgetful"] if variant == "dynamic" else [])):
                path = out / variant / name
                with trainer(data, path, task, *limits, mesh=mesh) as first:
                    if name == "whole":
                        first.train()
                        continue
                    train_until(first, 5)
                with trainer(data, path, task, *limits, mesh=mesh) as second:
                    second.resume(mesh.world.broadcast(find_checkpoint(path / "checkpoints", "latest")))
                    if name == "forgetful" and mesh.rank == 1:
                        torch.manual_seed(0)
                    second.train()


if __name__ == "__main__":
    main()
