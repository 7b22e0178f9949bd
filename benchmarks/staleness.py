"""Memory that is old: recall and request time against the whole history and recent events alone, on planted data.

    python benchmarks/staleness.py [--steps 300] [--users 3000] [--threads 2]

A user prefers one of 16 clusters and seldom changes to another (once in ``--drift`` events). Three in ten old events
are of the preferred cluster, the others are noise; the 8 most recent events are noise all, and the next item is of the
cluster: the preference shows in old events alone. Three models of one size are trained on the last 256 events of other
users: on the whole of them, with memory tokens (four blocks of two), and on the 8 recent ones. The memory of a test
user then stands for 248 events that end ``gap`` events before the recent ones; the events in between are looked at by
neither. Request time is that of a user's vector, from the events on, the least of some rounds in which all sides take
turns; the catalogue's scores cost all sides the same.
Writes benchmarks/results/staleness.json and staleness.png.
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
        "MemoryArgs.num_memory_tokens=8",
        "MemoryArgs.insert_method=[[62, 2], [124, 2], [186, 2], [248, 2]]",
        f"MemoryArgs.recent_item_num={RECENT}",
    ),
    "recent": (f"DatasetArgs.max_history_seqlen={RECENT}",),
}


def write_planted(folder: Path, users: int, drift: int) -> SequenceDataset:
    """Write histories of which the last event is of the cluster that was preferred before the recent ones."""
    rng, old = np.random.default_rng(0), HISTORY - RECENT + max(GAPS)
    length = old + RECENT + 1
    changes = rng.random((users, old)) < 1 / drift
    changes[:, 0] = True
    drawn = rng.integers(CLUSTERS, size=(users, old))
    last = np.maximum.accumulate(np.where(changes, np.arange(old), 0), axis=1)
    cluster = np.take_along_axis(drawn, last, axis=1)
    noise = CLUSTERS * OF_CLUSTER + rng.integers(NOISE, size=(users, length))
    preferred = cluster * OF_CLUSTER + rng.integers(OF_CLUSTER, size=(users, old))
    items = noise.copy()
    items[:, :old] = np.where(rng.random((users, old)) < 0.3, preferred, noise[:, :old])
    items[:, -1] = cluster[:, -1] * OF_CLUSTER + rng.integers(OF_CLUSTER, size=users)
    count = CLUSTERS * OF_CLUSTER + NOISE
    lengths = np.full(users, length)
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
            events={"item": items.ravel(), "time": np.tile(np.arange(length) * 60 + 10**9, users)},
            vocabularies={"user": pa.array(np.arange(users)), "item": pa.array(np.arange(count))},
        ),
        folder,
    )
    return SequenceDataset.open(folder)


def train(config: Config, dataset: SequenceDataset, users: np.ndarray, steps: int) -> tuple[RetrievalModel, float]:
    """Return a model trained on ``users``, and the mean loss of its last steps."""
    model, losses, step = build_model(config, dataset.schema), [], 0
    assert isinstance(model, RetrievalModel)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.learning_rate)
    split = Split(name="train", users=users, stop=dataset.lengths[users])
    collate = make_collator(config, dataset.schema)
    loader = BatchLoader(
        dataset=dataset, split=split, collate=collate, batch_size=config.trainer.train_batch_size, shuffle=True
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


def batches(
    model: RetrievalModel, config: Config, dataset: SequenceDataset, users: np.ndarray, longest: int | None = None
) -> Callable[[int], Any]:
    """Return what makes the batch of ``TOGETHER`` users from a place on, as evaluation would."""
    split = Split(name="test", users=users, stop=dataset.lengths[users])
    collate = make_collator(config, dataset.schema)
    collate = collate if longest is None else replace(collate, max_history=longest)

    def make(first: int) -> Any:
        rows = np.arange(first, min(first + TOGETHER, len(users)))
        return collate(dataset, split, rows, rows, 0)

    return make


@torch.no_grad()
def score(model: RetrievalModel, queries: Tensor, targets: np.ndarray) -> float:
    """Return the share of ``targets`` among the items that are put first."""
    vectors = model.item_vectors(model.embeddings.weights[model.item], torch.arange(model.num_items))  # type: ignore[index, union-attr]
    best = model.scores(queries, vectors).topk(TOP).indices
    return float((best == torch.from_numpy(targets)[:, None]).any(1).double().mean())


@dataclass(kw_only=True)
class Side:
    """One way to answer: from what, and what gives the vectors of ``TOGETHER`` users from a place on."""

    row: dict[str, Any]
    model: RetrievalModel
    request: Callable[[int], Tensor]

    @torch.no_grad()
    def answer(self, users: int) -> tuple[Tensor, float]:
        """Return the vectors of all users, and the milliseconds of one of them."""
        begin = time.perf_counter()
        queries = torch.cat([self.request(first) for first in range(0, users, TOGETHER)])
        return queries, (time.perf_counter() - begin) / users * 1e3


def memories(
    model: RetrievalModel, config: Config, dataset: SequenceDataset, users: np.ndarray, gap: int
) -> tuple[list[Any], int]:
    """Return the memory of the events that end ``gap`` before the recent ones, and its bytes a user."""
    stop = dataset.lengths[users] - 1 - RECENT - gap
    split = Split(name="test", users=users, stop=stop, asked=np.zeros_like(stop))
    collate = replace(make_collator(config, dataset.schema), max_history=HISTORY - RECENT)
    found = []
    for first in range(0, len(users), TOGETHER):
        rows = np.arange(first, min(first + TOGETHER, len(users)))
        found.append(compress(model, collate(dataset, split, rows, rows, 0)))
    size = sum(x.numel() * x.element_size() for pair in found[0].layers for x in pair) // found[0].num_samples
    return found, size


def study(args: argparse.Namespace) -> dict[str, Any]:
    """Train the models and return what each recalls, in which time."""
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_planted(Path(folder), args.users + args.asking, args.drift)
        test = np.arange(args.users, args.users + args.asking)
        targets = dataset.gather(test, dataset.lengths[test] - 1, dataset.lengths[test]).items
        sides: list[Side] = []
        losses = {}
        for name, lines in MODELS.items():
            config = load_config("retrieval", [], [*BINDINGS, *lines]).config
            model, losses[name] = train(config, dataset, np.arange(args.users), args.steps)
            sides += sides_of(name, model, config, dataset, test)
        found: list[list[float]] = []
        for _ in range(args.rounds):
            answers = [side.answer(len(test)) for side in sides]
            found.append([spent for _, spent in answers])
    for side, (queries, _), spent in zip(sides, answers, zip(*found, strict=True), strict=True):
        side.row |= {"recall": score(side.model, queries, targets), "ms": min(spent)}
    return {"rows": [side.row for side in sides], "losses": losses}


def sides_of(
    name: str, model: RetrievalModel, config: Config, dataset: SequenceDataset, test: np.ndarray
) -> Iterator[Side]:
    """Yield a pass over everything, and of the model with memory tokens stored memory of each age."""
    whole, recent = (batches(model, config, dataset, test, longest) for longest in (None, RECENT))
    size = 8 * min(HISTORY, config.dataset.max_history_seqlen)
    row = {"answers_from": name, "gap": 0, "bytes_per_user": size}
    yield Side(row=row, model=model, request=lambda first: model.queries(model.scoring_request(whole(first))))
    for gap in GAPS if name == "memory" else ():
        stored, size = memories(model, config, dataset, test, gap)

        def behind(first: int, stored: Any = stored) -> Tensor:
            return model.query_vectors(recall(model, stored[first // TOGETHER], recent(first))[0])

        row = {"answers_from": "stored memory", "gap": gap, "bytes_per_user": size + 8 * RECENT}
        yield Side(row=row, model=model, request=behind)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw recall against the gap."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.6), dpi=150)
    stored = [row for row in rows if row["answers_from"] == "stored memory"]
    places = np.arange(len(stored))
    axes.plot(places, [row["recall"] for row in stored], "o-", color="#2f6fbf", label="stored memory")
    for name, colour in (("full", "#2c8a4f"), ("recent", "#b83246")):
        own = next(row for row in rows if row["answers_from"] == name)
        axes.axhline(own["recall"], color=colour, linestyle="--", label=f"{name}: {own['ms']:.2f} ms a user")
    axes.set_xticks(places, [str(row["gap"]) for row in stored])
    axes.set(xlabel="events between memory and recent events", ylabel=f"recall@{TOP}", ylim=(0, 1))
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"memory: {stored[0]['ms']:.2f} ms and {stored[0]['bytes_per_user']:,} bytes a user", fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=3000, help="who are trained on")
    parser.add_argument("--asking", type=int, default=512, help="who are asked about")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--drift", type=int, default=1500, help="events between changes of preference, on average")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "staleness.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    found = study(args)
    rows = found["rows"]
    full, recent = (next(row for row in rows if row["answers_from"] == name) for name in ("full", "recent"))
    for row in rows:
        row["gain_kept"] = round((row["recall"] - recent["recall"]) / (full["recall"] - recent["recall"]), 3)
        row["time_of_full"] = round(row["ms"] / full["ms"], 3)
        row["recall"], row["ms"] = round(row["recall"], 4), round(row["ms"], 4)
        print(f"{row['answers_from']:14} gap {row['gap']:5}: recall@{TOP} {row['recall']:.3f}, "
              f"{row['gain_kept']:.0%} of the gain, {row['time_of_full']:.3f} of the time, "
              f"{row['bytes_per_user']:,} bytes")  # fmt: skip
    draw(rows, args.out.with_suffix(".png"))
    names = ("users", "asking", "steps", "drift", "rounds")
    options = {name: getattr(args, name) for name in names}
    write_record(args.out, threads=args.threads, load_before=round(load_before, 2), **options, **found)


if __name__ == "__main__":
    main()
