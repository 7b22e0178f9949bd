"""How long a save stops training: `Checkpointer.save`, which copies and leaves the writing to a thread.

    python benchmarks/checkpoint.py [--items 1000000] [--rounds 5]

One process, a table of ``items`` rows of width 64 with Adam's moments, and a model of two layers. ``blocked`` is the
time that ``save`` takes, ``written`` the time until the checkpoint is complete, in which training goes on; before
saves went to a thread, training stopped for all of it. Medians. Writes benchmarks/results/checkpoint.json.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import torch

from hstu.config import load_config
from hstu.data.reader import SequenceDataset
from hstu.data.synthetic import SyntheticConfig, generate
from hstu.data.writer import write_dataset
from hstu.parallel import Mesh
from hstu.training.run_directory import RunDirectory
from hstu.training.trainer import Trainer

CONFIG = (
    "DatasetArgs.dataset_name='synthetic'", "DatasetArgs.max_history_seqlen=16",
    "NetworkArgs.num_layers=2", "NetworkArgs.hidden_size=64", "NetworkArgs.num_attention_heads=2",
    "NetworkArgs.kv_channels=32", "OptimizerArgs.optimizer_str='adam'", "OptimizerArgs.learning_rate=1e-3",
    "TrainerArgs.train_batch_size=32", "TrainerArgs.eval_batch_size=32", "RetrievalArgs.num_negatives=16",
    "TrainerArgs.keep_last_checkpoints=1",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Mesh.create() as mesh:
        data, run = Path(folder, "synthetic"), RunDirectory(Path(folder, "run"))
        write_dataset(generate(SyntheticConfig(num_users=100, num_items=args.items), name="synthetic"), data)
        run.create()
        trainer = Trainer(load_config("retrieval", (), CONFIG).config, SequenceDataset.open(data), mesh, run)
        blocked, written = [], []
        for batch in list(trainer.loaders["train"].epoch(0))[:1] * args.rounds:
            trainer.stepper.take([batch], trainer.progress)
            start = time.perf_counter()
            trainer.checkpointer.save(trainer.progress)
            blocked.append(time.perf_counter() - start)
            trainer.checkpointer.wait()
            written.append(time.perf_counter() - start)
        size = sum(path.stat().st_size for path in (run.checkpoints / "latest").resolve().iterdir())
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "rounds": args.rounds,
        "gib": round(size / 2**30, 3),
        "blocked_seconds": round(statistics.median(blocked), 3),
        "written_seconds": round(statistics.median(written), 3),
    }
    print(json.dumps(result, indent=1))
    Path(__file__).with_name("results").joinpath("checkpoint.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
