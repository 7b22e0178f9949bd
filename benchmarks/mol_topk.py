"""Top-k of a mixture of logits: candidates by one dot product and their exact scores, against scoring everything.

    python benchmarks/mol_topk.py [--items 5000] [--users 3000] [--steps 150] [--k 100] [--threads 2]

Trains a small model on planted data first, for recall means nothing of random weights: the share of the exact k best
items that are found. Seconds are those of all users' answers, users' vectors included; exact and approximate
alternate. Prints a table and writes benchmarks/results/mol_topk.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from record import write_record
from torch import Tensor

from hstu.config import load_config
from hstu.data import SequenceDataset
from hstu.data.loader import BatchLoader
from hstu.data.requests import Requests
from hstu.data.synthetic import SyntheticConfig, write_synthetic
from hstu.inference import recommend
from hstu.models import RetrievalModel
from hstu.parallel import Mesh
from hstu.training.run_directory import RunDirectory
from hstu.training.trainer import Trainer

MODEL = ("RetrievalArgs.similarity='mol'", "TrainerArgs.loggers=()", "TrainerArgs.max_epochs=1000000")


def trained(folder: Path, mesh: Mesh, args: argparse.Namespace) -> tuple[Trainer, float]:
    """A model after some steps, and the loss of the last ones."""
    write_synthetic(SyntheticConfig(num_users=args.users, num_items=args.items), folder / "synthetic")
    config = load_config("retrieval", ["synthetic_retrieval.gin"], MODEL).config
    trainer = Trainer(config, SequenceDataset.open(folder / "synthetic"), mesh, RunDirectory(folder / "run"))
    epoch = 0
    while trainer.progress.step < args.steps:
        for batch in trainer.loaders["train"].epoch(epoch):
            trainer.stepper.take([batch], trainer.progress)
            if trainer.progress.step == args.steps - 20:
                trainer.meter.read(trainer.progress.step)
            if trainer.progress.step == args.steps:
                break
        epoch += 1
    return trainer, trainer.meter.read(args.steps)["loss"]


def answers(trainer: Trainer, loader: BatchLoader, k: int, candidates: int | None) -> tuple[Tensor, float]:
    """Items [users, k], and the seconds that they took."""
    assert isinstance(trainer.model, RetrievalModel)
    begin = time.perf_counter()
    found = recommend(trainer.model, loader, trainer.mesh, k, filter_seen=True, num_candidates=candidates)
    items = torch.cat([best.items for _, best in found])
    return items, time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=5000)
    parser.add_argument("--users", type=int, default=3000)
    parser.add_argument("--asking", type=int, default=256, help="users who are answered")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 150, 200, 500, 1000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "mol_topk.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    with Mesh.create() as mesh, tempfile.TemporaryDirectory() as folder:
        trainer, loss = trained(Path(folder), mesh, args)
        asked = Requests(trainer.dataset, np.arange(args.asking))
        collate = trainer.loaders["test"].collate
        loader = BatchLoader(dataset=asked, split=asked.split, collate=collate, batch_size=args.asking)
        seconds: dict[int | None, list[float]] = {count: [] for count in (None, *args.candidates)}
        items: dict[int | None, Tensor] = {}
        for _ in range(args.rounds):
            for count, times in seconds.items():
                items[count], spent = answers(trainer, loader, args.k, count)
                times.append(spent)
    rows = []
    for count, times in seconds.items():
        found = (items[count][:, :, None] == items[None][:, None, :]).any(1).double().mean()
        rows.append({"candidates": count or args.items, "recall": round(float(found), 4),
                     "seconds": round(statistics.median(times), 3)})  # fmt: skip
    print(f"{args.items:,} items, {args.asking} users, k = {args.k}, training loss {loss:.3f}")
    for row in rows:
        print(f"{row['candidates']:6,} scored   recall {row['recall']:.3f}   {row['seconds']:.3f} s")
    write_record(
        args.out,
        threads=args.threads,
        load_before=round(load_before, 2),
        items=args.items,
        users=args.asking,
        k=args.k,
        training_steps=args.steps,
        training_loss=round(loss, 4),
        rows=rows,
    )


if __name__ == "__main__":
    main()
