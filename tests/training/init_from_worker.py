"""On the ranks of this job: two steps from the run of one rank. ``init_from_worker.py HOME OUT VARIANT...``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from hstu.parallel import Mesh
from hstu.training.init_from import find_source
from tests.training.test_init_from import start


def main() -> None:
    """Run everything in one process group."""
    torch.set_num_threads(1)
    home, out, *variants = sys.argv[1:]
    with Mesh.create() as mesh:
        for variant in variants:
            source, path = Path(home, "runs", variant), Path(out, variant)
            lines = ("TrainerArgs.max_train_iters=2", "TrainerArgs.train_batch_size=16")
            with start(Path(home, "other"), path, variant, source, *lines, mesh=mesh) as run:
                run.start_from(find_source(str(source / "checkpoints" / "latest"), path))
                run.train()


if __name__ == "__main__":
    main()
