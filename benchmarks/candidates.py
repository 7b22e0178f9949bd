"""Candidates of a user behind one pass over the history, against a pass over everything for each: pairs and users/s.

    python benchmarks/candidates.py [--threads 2] [--history 200 2000 20000] [--candidates 1000]

A ranking model of three HSTU layers (width 64, four heads, one token an event) scores ``--candidates`` random items of
each of some users, as `predict --candidates` does; the other side runs the history again for each pair, as many pairs
as ``--seconds`` allow, in batches of about 64 thousand tokens. Both score the same pairs first, and must agree to
rounding. Weights are random: time does not depend on them. Rounds alternate; printed are medians.
Writes benchmarks/results/candidates.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from record import write_record
from torch import Tensor

from hstu.config import load_config
from hstu.data import EncodedDataset, Feature, Schema, SequenceDataset, write_dataset
from hstu.data.loader import BatchLoader
from hstu.data.requests import Requests
from hstu.data.schema import count_statistics
from hstu.inference import score_candidates
from hstu.models import RankingModel, build_model, make_collator
from hstu.parallel import Mesh

BINDINGS = (
    "TrainerArgs.train_batch_size=1",
    "TrainerArgs.eval_batch_size=1",
    "DatasetArgs.dataset_name='long'",
    "DatasetArgs.max_num_candidates=1",
    "NetworkArgs.num_layers=3",
    "NetworkArgs.hidden_size=64",
    "NetworkArgs.num_attention_heads=4",
    "NetworkArgs.kv_channels=16",
    "NetworkArgs.token_layout='add'",
    "OptimizerArgs.optimizer_str='adam'",
    "OptimizerArgs.learning_rate=1e-3",
    "RankingArgs.prediction_head_arch=[64, 4]",
)
ITEMS, TOGETHER = 10_000, 65_536  # items; tokens of a batch


def write_long(folder: Path, history: int, users: int) -> SequenceDataset:
    """Write a random log of ``users`` of ``history`` events each."""
    rng, lengths = np.random.default_rng(0), np.full(users, history)
    total = users * history
    features = (
        Feature(name="user", role="user", vocab_size=users),
        Feature(name="item", role="item", vocab_size=ITEMS),
        Feature(name="action", role="action", vocab_size=4, action_type="categorical"),
        Feature(name="time", role="time"),
    )
    clock = np.sort(rng.integers(10**9, 10**9 + 10**7, (users, history)), axis=1).ravel()
    events = {"item": rng.integers(ITEMS, size=total), "action": rng.integers(4, size=total), "time": clock}
    sizes = {"user": users, "item": ITEMS, "action": 4}
    write_dataset(
        EncodedDataset(
            schema=Schema(name="long", features=features, counts=count_statistics(lengths, ITEMS)),
            lengths=lengths,
            contexts={},
            events=events,
            vocabularies={name: pa.array(np.arange(size)) for name, size in sizes.items()},
        ),
        folder,
    )
    return SequenceDataset.open(folder)


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Seconds of ``run``, and what it returns."""
    begin = time.perf_counter()
    found = run()
    return time.perf_counter() - begin, found


def measure(history: int, preset: str, args: argparse.Namespace, mesh: Mesh) -> dict[str, float | int | str]:
    """Return the speeds for one length of the history."""
    users = max(1, min(8, 8000 // history))
    config = load_config(
        "ranking", [], [*BINDINGS, f"DatasetArgs.max_history_seqlen={history}", f"NetworkArgs.preset='{preset}'"]
    ).config
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_long(Path(folder), history, users)
        model, collate = build_model(config, dataset.schema).eval(), make_collator(config, dataset.schema)
        assert isinstance(model, RankingModel)
        who = np.repeat(np.arange(users), args.candidates)
        items = np.random.default_rng(1).integers(ITEMS, size=who.size)

        def together() -> Tensor:
            asked = Requests(dataset, who, items)
            batch = max(1, TOGETHER // history)
            loader = BatchLoader(dataset=asked, split=asked.split, collate=collate, batch_size=batch)
            return torch.cat([scores for _, scores in score_candidates(model, loader, mesh)])

        @torch.no_grad()
        def alone(pairs: int) -> Tensor:
            asked = Requests(dataset, who[:pairs], items[:pairs])
            loader = BatchLoader(
                dataset=asked, split=asked.split, collate=collate, batch_size=max(1, TOGETHER // history)
            )
            return torch.cat([model.predictions(model.scoring_request(batch)) for batch in loader.epoch(0)])

        few = max(1, min(who.size, TOGETHER // history))
        first, expected = timed(lambda: alone(few))
        found = together()
        error = float((found[:few] - expected).abs().max())
        assert error < 1e-5, f"the two sides differ by {error:.1e}"
        pairs = int(min(who.size, max(few, few * args.seconds / first)))
        cached, full = [], []
        for _ in range(args.rounds):
            cached.append(timed(together)[0])
            full.append(timed(lambda: alone(pairs))[0])
    behind, whole = who.size / statistics.median(cached), pairs / statistics.median(full)
    ratios = [who.size / a / (pairs / b) for a, b in zip(cached, full, strict=True)]
    return {
        "preset": preset,
        "history": history,
        "users": users,
        "candidates": args.candidates,
        "largest_difference": error,
        "pairs_per_second": round(behind, 1),
        "users_per_second": round(behind / args.candidates, 3),
        "full_pairs_measured": pairs,
        "full_pairs_per_second": round(whole, 2),
        "full_users_per_second": round(whole / args.candidates, 5),
        "ratio": round(statistics.median(ratios), 1),
        "least_ratio": round(min(ratios), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--history", type=int, nargs="+", default=[200, 2000, 20000])
    parser.add_argument("--presets", nargs="+", default=["production", "research"])
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a round of passes over everything, at the most")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "candidates.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before, rows = os.getloadavg()[0], []
    with Mesh.create() as mesh:
        for preset in args.presets:
            for history in args.history:
                rows.append(row := measure(history, preset, args, mesh))
                print(
                    f"{preset:10} {history:6,} events: {row['users_per_second']:8.3f} users/s, "
                    f"{row['pairs_per_second']:10,.1f} pairs/s; "
                    f"one pass each: {row['full_pairs_per_second']:8,.2f} pairs/s; ratio {row['ratio']:,}",
                    flush=True,
                )
    write_record(args.out, threads=args.threads, load_before=round(load_before, 2), rounds=args.rounds, rows=rows)


if __name__ == "__main__":
    main()
