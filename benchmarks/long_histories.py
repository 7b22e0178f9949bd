"""Scoring users with long histories on a CPU, against training on the same tokens, in one run.

    python benchmarks/long_histories.py [--users 48] [--lengths 200 1000 4000] [--threads 1]

The published ML-1M configuration of HSTU on a generated log whose users all have so many events and 100,000 items are
drawn from. A round trains on every user once and then ranks the target of each among all items, as an evaluation does;
rounds are taken alternately, the first is not counted. Tokens per second of processor time; a user's tokens count in
both, and the ranking of the catalogue counts as scoring. Prints a table and writes
benchmarks/results/long_histories.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from record import write_record
from train_step import write_log

from hstu.config import load_config
from hstu.data import SequenceDataset
from hstu.parallel import Mesh
from hstu.training.run_directory import RunDirectory
from hstu.training.trainer import Trainer

BATCH = 8


def seconds(work: Callable[[], object]) -> float:
    """Processor seconds of ``work``."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(users: int, length: int, rounds: int, mesh: Mesh) -> dict[str, float]:
    """Tokens per second of training and of scoring histories of ``length``."""
    lines = (
        "TrainerArgs.loggers=()", "TrainerArgs.max_epochs=1000", f"TrainerArgs.train_batch_size={BATCH}",
        f"TrainerArgs.eval_batch_size={BATCH}", f"DatasetArgs.max_history_seqlen={length}",
    )  # fmt: skip
    config = load_config("retrieval", ["ml_1m_hstu_retrieval.gin"], lines).config
    with tempfile.TemporaryDirectory() as folder:
        write_log(Path(folder) / "log", torch.full((users,), length + 2))
        trainer = Trainer(config, SequenceDataset.open(Path(folder) / "log"), mesh, RunDirectory(Path(folder) / "run"))
        loader, spent = trainer.loaders["train"], {"training": list[float](), "scoring": list[float]()}

        def train(epoch: int) -> None:
            for batches in trainer.stepper.steps(loader.epoch(epoch), trainer.progress):
                trainer.stepper.take(batches, trainer.progress)

        for number in range(rounds + 1):
            spent["training"].append(seconds(partial(train, number)))
            spent["scoring"].append(seconds(lambda: trainer.assembly.score("valid", 1)))
    tokens = users * length
    return {name: round(tokens / statistics.median(times[1:])) for name, times in spent.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=48)
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 1000, 4000])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "long_histories.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    with Mesh.create() as mesh:
        for length in args.lengths:
            rates = measure(args.users, length, args.rounds, mesh)
            rows.append({"length": length, "tokens_per_second": rates})
            rows[-1]["scoring_of_training"] = round(rates["scoring"] / rates["training"], 2)
            print(f"{length:6,} events: {rows[-1]}", flush=True)
    write_record(args.out, threads=args.threads, users=args.users, batch=BATCH, rounds=args.rounds, rows=rows)


if __name__ == "__main__":
    main()
