"""Memory that is old: recall and request time against the whole history and recent events alone, on planted data.

    python benchmarks/staleness.py [--seeds 0 1 2] [--steps 600] [--users 3000] [--threads 1]

A user prefers one of 16 clusters. Three in ten old events are of it, the others are noise; the 8 most recent events are
noise all, and the next item is of the cluster: the preference shows in old events alone. Those who are trained on
change to another now and then (once in ``--drift`` events); of those who are asked about, half do too and half never.
Three models of one size are trained on the last 256 events: on the whole of them, with memory tokens, and on the 8
recent ones. The memory of a test user then stands for 248 events that end ``gap`` events before the recent ones; the
events in between are looked at by neither. The model of whole histories answers from the same events too: what it
loses with the gap is lost with the events, not by compression.
Request time is that of a user's vector, from the events on, the least of some rounds in which all sides take turns; the
catalogue's scores cost all sides the same. Each seed is other data, other weights and another order.
Writes benchmarks/results/staleness.json and figs/staleness.png.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from record import write_record
from torch import Tensor

from hstu.config import Config, load_config
from hstu.data import EncodedDataset, Feature, Schema, SequenceDataset, write_dataset
from hstu.data.loader import BatchLoader
from hstu.data.schema import count_statistics
from hstu.data.splits import Split
from hstu.models import RetrievalModel, build_model, make_collator
from hstu.models.caching import compress, recall

CLUSTERS, OF_CLUSTER, NOISE = 16, 8, 128
HISTORY, RECENT = 256, 8
OLD = HISTORY - RECENT
GAPS = (0, 16, 64, 256, 1024)
TOP, TOGETHER = 10, 256  # items returned; users asked for at once
BINDINGS = (
    "TrainerArgs.train_batch_size=32",
    "TrainerArgs.eval_batch_size=64",
    "DatasetArgs.dataset_name='planted'",
    "NetworkArgs.num_layers=2",
    "NetworkArgs.hidden_size=32",
    "NetworkArgs.num_attention_heads=2",
    "NetworkArgs.kv_channels=16",
    "NetworkArgs.hidden_dropout=0.0",
    "OptimizerArgs.optimizer_str='adam'",
    "OptimizerArgs.learning_rate=3e-3",
    "RetrievalArgs.loss='full_softmax'",
)
MODELS = {
    "full": (f"DatasetArgs.max_history_seqlen={HISTORY}",),
    "memory": (
        f"DatasetArgs.max_history_seqlen={HISTORY}",
        "MemoryArgs.num_memory_tokens=16",
        "MemoryArgs.insert_method=[[62, 4], [124, 4], [186, 4], [248, 4]]",
        f"MemoryArgs.recent_item_num={RECENT}",
    ),
    "recent": (f"DatasetArgs.max_history_seqlen={RECENT}",),
}


def plant(rng: np.random.Generator, users: int, old: int, drift: int | None) -> np.ndarray:
    """Return items [users, old + RECENT + 1] of which the last is of the cluster preferred before the recent ones."""
    changes = np.zeros((users, old), dtype=bool) if drift is None else rng.random((users, old)) < 1 / drift
    changes[:, 0] = True
    last = np.maximum.accumulate(np.where(changes, np.arange(old), 0), axis=1)
    cluster = np.take_along_axis(rng.integers(CLUSTERS, size=(users, old)), last, axis=1)
    items = CLUSTERS * OF_CLUSTER + rng.integers(NOISE, size=(users, old + RECENT + 1))
    preferred = cluster * OF_CLUSTER + rng.integers(OF_CLUSTER, size=(users, old))
    items[:, :old] = np.where(rng.random((users, old)) < 0.3, preferred, items[:, :old])
    items[:, -1] = cluster[:, -1] * OF_CLUSTER + rng.integers(OF_CLUSTER, size=users)
    return items


def write_planted(folder: Path, items: np.ndarray, gap: int = 0) -> SequenceDataset:
    """Write the last HISTORY + 1 of ``items`` without the ``gap`` events before the recent ones."""
    users, there = items.shape
    kept = np.r_[there - RECENT - 1 - gap - OLD : there - RECENT - 1 - gap, there - RECENT - 1 : there]
    count, lengths = CLUSTERS * OF_CLUSTER + NOISE, np.full(users, HISTORY + 1)
    features = (
        Feature(name="user", role="user", vocab_size=users),
        Feature(name="item", role="item", vocab_size=count),
        Feature(name="time", role="time"),
    )
    write_dataset(
        EncodedDataset(
            schema=Schema(name="planted", features=features, counts=count_statistics(lengths, count)),
            lengths=lengths,
            contexts={},
            events={"item": items[:, kept].ravel(), "time": np.tile(kept * 60 + 10**9, users)},
            vocabularies={"user": pa.array(np.arange(users)), "item": pa.array(np.arange(count))},
        ),
        folder,
    )
    return SequenceDataset.open(folder)


def train(config: Config, dataset: SequenceDataset, steps: int) -> tuple[RetrievalModel, float]:
    """Return a trained model, and the mean loss of its last steps."""
    model, losses, step = build_model(config, dataset.schema), [], 0
    assert isinstance(model, RetrievalModel)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.learning_rate)
    loader = BatchLoader(
        dataset=dataset,
        split=Split(name="train", users=np.arange(dataset.num_users), stop=dataset.lengths),
        collate=make_collator(config, dataset.schema),
        batch_size=config.trainer.train_batch_size,
        seed=config.trainer.seed,
        shuffle=True,
    )
    while step < steps:
        for batch in loader.epoch(step // loader.steps_per_epoch):
            optimizer.zero_grad()
            loss = model(batch)
            (loss.total / loss.count).backward()
            optimizer.step()
            losses.append(float(loss.total.detach()) / loss.count)
            step += 1
            if step == steps:
                break
    return model.eval(), statistics.mean(losses[-20:])


def batches(config: Config, dataset: SequenceDataset, longest: int, *, recent_too: bool = True) -> Callable[[int], Any]:
    """Return what makes the batch of ``TOGETHER`` users from a place on: their last ``longest`` events."""
    stop = dataset.lengths if recent_too else dataset.lengths - 1 - RECENT
    asked = None if recent_too else np.zeros_like(stop)
    split = Split(name="test", users=np.arange(dataset.num_users), stop=stop, asked=asked)
    collate = replace(make_collator(config, dataset.schema), max_history=longest)

    def make(first: int) -> Any:
        rows = np.arange(first, min(first + TOGETHER, dataset.num_users))
        return collate(dataset, split, rows, rows, 0)

    return make


@dataclass(kw_only=True)
class Side:
    """One way to answer: from what, and what gives the vectors of ``TOGETHER`` users from a place on."""

    row: dict[str, Any]
    model: RetrievalModel
    dataset: SequenceDataset
    request: Callable[[int], Tensor]

    @torch.no_grad()
    def recall(self) -> float:
        """Return the share of users whose next item is among those put first."""
        model, users = self.model, np.arange(self.dataset.num_users)
        queries = torch.cat([self.request(first) for first in range(0, len(users), TOGETHER)])
        vectors = model.item_vectors(model.embeddings.weights[model.item], torch.arange(model.num_items))  # type: ignore[index, union-attr]
        stop = self.dataset.lengths
        targets = torch.from_numpy(self.dataset.gather(users, stop - 1, stop).items)
        best = model.scores(queries, vectors).topk(TOP).indices
        return float((best == targets[:, None]).any(1).double().mean())

    @torch.no_grad()
    def time(self) -> float:
        """Return the milliseconds of one user."""
        begin = time.perf_counter()
        self.request(0)
        return (time.perf_counter() - begin) / TOGETHER * 1e3


def sides_of(name: str, model: RetrievalModel, config: Config, dataset: SequenceDataset) -> Iterator[Side]:
    """Yield a pass over everything, and of the model with memory tokens its stored memory too."""
    longest = config.dataset.max_history_seqlen
    whole, recent = (batches(config, dataset, size) for size in (longest, RECENT))

    def side(name: str, size: int, request: Callable[[int], Tensor]) -> Side:
        return Side(row={"answers_from": name, "bytes_per_user": size}, model=model, dataset=dataset, request=request)

    yield side(name, 8 * longest, lambda first: model.queries(model.scoring_request(whole(first))))
    if name == "memory":
        old = batches(config, dataset, OLD, recent_too=False)
        stored = [compress(model, old(first)) for first in range(0, dataset.num_users, TOGETHER)]
        size = sum(x.numel() * x.element_size() for pair in stored[0].layers for x in pair) // TOGETHER
        yield side(
            "stored memory",
            size + 8 * RECENT,
            lambda first: model.query_vectors(recall(model, stored[first // TOGETHER], recent(first))[0]),
        )


def study(seed: int, args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Train the models of a seed and return what each answers of old events, in which time; and their losses."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory() as folder:
        train_set = write_planted(Path(folder, "train"), plant(rng, args.users, OLD, args.drift))
        asking = {}
        for preference, drift in (("changes", args.drift), ("stays", None)):
            items = plant(rng, args.asking, OLD + max(GAPS), drift)
            asking |= {(preference, gap): write_planted(Path(folder, f"{preference}{gap}"), items, gap) for gap in GAPS}
        sides: list[Side] = []
        losses = {}
        for name, lines in MODELS.items():
            config = load_config("retrieval", [], [f"TrainerArgs.seed={seed}", *BINDINGS, *lines]).config
            model, losses[name] = train(config, train_set, args.steps)
            for (preference, gap), dataset in asking.items():
                if name == "recent" and gap:
                    continue  # it never looks further back
                for side in sides_of(name, model, config, dataset):
                    side.row |= {"seed": seed, "preference": preference, "gap": gap, "recall": side.recall()}
                    sides.append(side)
        times = [[side.time() for side in sides] for _ in range(args.rounds)]
        for side, *spent in zip(sides, *times, strict=True):
            side.row["ms"] = min(spent)
    return [side.row for side in sides], losses


def compare(rows: list[dict[str, Any]]) -> None:
    """Say of each row what it keeps of the gain of whole histories, now and as old as it, and of their time."""
    named = {tuple(row[key] for key in ("seed", "preference", "gap", "answers_from")): row for row in rows}
    for (seed, preference, gap, _), row in named.items():
        full, as_old = (named[seed, preference, age, "full"] for age in (0, gap))
        recent = named[seed, preference, 0, "recent"]["recall"]
        row["gain_kept"] = (row["recall"] - recent) / (full["recall"] - recent)
        row["gain_kept_of_same_events"] = (row["recall"] - recent) / (as_old["recall"] - recent)
        row["time_of_full"] = row["ms"] / full["ms"]


def summed_up(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for all seeds of each preference, gap and way to answer: means, and the least gains."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["preference"], row["answers_from"], row["gap"]), []).append(row)
    means = []
    for (preference, side, gap), same in found.items():
        about = {
            "preference": preference,
            "answers_from": side,
            "gap": gap,
            "bytes_per_user": same[0]["bytes_per_user"],
        }
        for name in ("recall", "ms", "gain_kept", "gain_kept_of_same_events", "time_of_full"):
            about[name] = round(statistics.mean(row[name] for row in same), 4)
        for name in ("gain_kept", "gain_kept_of_same_events"):
            about[f"least_{name}"] = round(min(row[name] for row in same), 4)
        means.append(about)
    return means


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw recall against the gap, users who change and users who do not side by side."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, places = plt.subplots(1, 2, figsize=(9, 3.6), dpi=130, sharey=True)
    styles = {
        "full": ("#2c8a4f", "s--", "whole history, as old"),
        "stored memory": ("#2f6fbf", "o-", "stored memory"),
        "recent": ("#b83246", ":", "recent events alone"),
    }
    for axes, preference in zip(places, ("changes", "stays"), strict=True):
        for name, (colour, style, label) in styles.items():
            own = [row for row in rows if (row["preference"], row["answers_from"]) == (preference, name)]
            recalls = [row["recall"] for row in own] * (len(GAPS) if name == "recent" else 1)
            axes.plot(recalls, style, color=colour, label=f"{label}: {own[0]['ms']:.2f} ms a user")
        axes.set_xticks(range(len(GAPS)), [str(gap) for gap in GAPS])
        axes.set(xlabel="events between memory and recent events", ylim=(0, 1), title=f"a preference that {preference}")
    places[0].set_ylabel(f"recall@{TOP}")
    places[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--users", type=int, default=3000, help="who are trained on")
    parser.add_argument("--asking", type=int, default=1024, help="who are asked about, of either kind")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--drift", type=int, default=1500, help="events between changes of preference, on average")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "staleness.json")
    parser.add_argument("--figure", type=Path, default=Path(__file__).parents[1] / "figs" / "staleness.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    rows, losses, began = [], {}, time.process_time()
    for seed in args.seeds:
        found, losses[seed] = study(seed, args)
        rows += found
        print(f"seed {seed}: losses {losses[seed]}, {time.process_time() - began:.0f} s so far", flush=True)
    compare(rows)
    means = summed_up(rows)
    for row in means:
        print(f"preference {row['preference']:7} {row['answers_from']:13} gap {row['gap']:4}: recall@{TOP} "
              f"{row['recall']:.3f}, {row['gain_kept']:.1%} of the gain of the whole history (least "
              f"{row['least_gain_kept']:.1%}), {row['gain_kept_of_same_events']:.1%} of the same events "
              f"({row['least_gain_kept_of_same_events']:.1%}), {row['time_of_full']:.3f} of the time, "
              f"{row['bytes_per_user']:,} bytes")  # fmt: skip
    draw(means, args.figure)
    options = {name: getattr(args, name) for name in ("seeds", "users", "asking", "steps", "drift", "rounds")}
    write_record(args.out, threads=args.threads, load_before=round(load_before, 2), **options,
                 losses=losses, means=means, rows=rows)  # fmt: skip


if __name__ == "__main__":
    main()
