"""Reading and collating training batches: tokens per second of one core, and memory against the size of the data.

    python benchmarks/reader.py [--events 8000000] [--seconds 3] [--sizes 1000000 4000000 16000000]
    python benchmarks/reader.py --only workers
    python benchmarks/reader.py --only read --features

A token is an item or an action, as the model would see them. Data sets are random; each measurement runs in a
process of its own, on one core, without workers; a second is one of that core's work, whatever else it does. With
--features each event has a price, a brand and a set of up to three tags more, which are read as well, in turns with a
data set without them: `of_plain` is the share of its speed.

`workers` asks what a reader beside the training thread costs it: a loop that holds the interpreter, as one that
launches kernels does (small operations, about 20 ms a step), is timed with batches that are there already, with those
of a thread, of two processes and without any worker (DatasetArgs.num_workers 1, 2 and 0).

Prints tables and writes benchmarks/results/reader.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import torch

from hstu.data import EncodedDataset, Feature, Schema, SequenceDataset, Statistics, leave_one_out, write_dataset
from hstu.data.batch import Batch
from hstu.data.collate import Collator
from hstu.data.loader import BatchLoader
from hstu.data.schema import count_statistics
from hstu.data.values import Sets, Values

ITEMS = 1_000_000
TOKENS_PER_BATCH = 400_000
STEP_TOKENS = 51_200  # 128 sequences of 200 events
STEP_OPERATIONS = 10_000
MIB = 2**20


def write(folder: Path, events: int, seqlen: int, features: bool = False) -> None:
    """Write random sequences of ``seqlen`` events that a training sample shows, and two held out."""
    rng = np.random.default_rng(0)
    lengths = np.full(max(1, events // seqlen), seqlen + 3)  # one more, which the model only predicts
    total = int(lengths.sum())
    declared, values = draw_features(rng, total) if features else ((), {})
    columns = (
        Feature(name="user", role="user", vocab_size=len(lengths)),
        Feature(name="item", role="item", vocab_size=ITEMS),
        Feature(name="action", role="action", vocab_size=256, action_type="bitmask"),
        Feature(name="time", role="time"),
        *declared,
    )
    clock = np.cumsum(rng.integers(0, 60, (len(lengths), seqlen + 3)), axis=1)
    write_dataset(
        EncodedDataset(
            schema=Schema(name="random", features=columns, counts=count_statistics(lengths, ITEMS)),
            lengths=lengths,
            contexts={},
            events={
                "item": rng.integers(ITEMS, size=total),
                "action": rng.integers(256, size=total),
                "time": clock.ravel(),
                **values,
            },
            vocabularies={"user": pa.array(np.arange(len(lengths)))},
        ),
        folder,
    )


def draw_features(rng: np.random.Generator, events: int) -> tuple[tuple[Feature, ...], dict[str, Values]]:
    """A price, a brand and a set of tags of each event."""
    price = rng.standard_normal((events, 1)).astype(np.float32)
    offsets = np.append(0, np.cumsum(rng.integers(4, size=events)))
    known = Statistics(mean=0.0, std=1.0, quantiles=tuple(np.linspace(-3, 3, 101).tolist()))
    return (
        Feature(name="price", level="event", kind="numeric", statistics=known),
        Feature(name="brand", level="event", kind="categorical", vocab_size=5000),
        Feature(name="tags", level="event", kind="multi", vocab_size=30, num_ids=int(offsets[-1])),
    ), {
        "price": price,
        "brand": rng.integers(5000, size=events),
        "tags": Sets(offsets, rng.integers(30, size=offsets[-1])),
    }


def make_loader(dataset: SequenceDataset, seqlen: int, tokens: int) -> BatchLoader:
    """Shuffled training batches of about ``tokens``, without workers."""
    return BatchLoader(
        dataset=dataset,
        split=leave_one_out(dataset.lengths)["train"],
        collate=Collator(
            task="retrieval",
            max_history=seqlen,
            event_features=tuple(feature.name for feature in dataset.schema.of("event")),
        ),
        batch_size=max(1, tokens // (2 * seqlen)),
        shuffle=True,
    )


def read(folder: Path, seqlen: int, seconds: float) -> dict[str, float]:
    """Read shuffled epochs for ``seconds`` or longer, at least one; memory is counted above that of the imports."""
    memory = psutil.Process()
    before = memory.memory_info()
    begin = time.perf_counter()
    dataset = SequenceDataset.open(folder)
    opened = time.perf_counter() - begin
    loader = make_loader(dataset, seqlen, TOKENS_PER_BATCH)
    tokens, private, epoch, begin = 0, 0, 0, time.process_time()
    while epoch == 0 or time.process_time() - begin < seconds:
        for batch in loader.epoch(epoch):
            tokens += batch.ids("item").numel() + batch.ids("action").numel()
            used = memory.memory_info()
            private = max(private, used.rss - used.shared - before.rss + before.shared)
        epoch += 1
    elapsed = time.process_time() - begin
    mapped = memory.memory_info().shared - before.shared
    return {
        "open_seconds": round(opened, 3),
        "tokens_per_second": round(tokens / elapsed),
        "private_mib": round(private / MIB, 1),
        "mapped_mib": round(mapped / MIB, 1),
    }


def batches(loader: BatchLoader) -> Iterator[Batch]:
    """Batches without end."""
    return itertools.chain.from_iterable(map(loader.epoch, itertools.count()))


def step_seconds(source: Iterable[Batch], steps: int) -> float:
    """Median time of a step that takes a batch and then holds the interpreter."""
    small, taken, source = torch.ones(8), [], iter(source)
    for step in range(steps + 5):
        begin = time.perf_counter()
        next(source)
        for _ in range(STEP_OPERATIONS):
            small = small * 1.0
        if step >= 5:  # the first ones start the workers
            taken.append(time.perf_counter() - begin)
    return float(np.median(taken))


def beside(folder: Path, seqlen: int, steps: int) -> dict[str, float]:
    """Milliseconds of a step with each kind of reader, the fastest of three rounds."""
    torch.set_num_threads(1)
    loader = make_loader(SequenceDataset.open(folder), seqlen, STEP_TOKENS)
    there = list(itertools.islice(batches(loader), 4))
    sources = {
        "batches that are there": lambda: itertools.cycle(there),
        "one thread": lambda: batches(replace(loader, num_workers=1)),
        "two processes": lambda: batches(replace(loader, num_workers=2)),
        "no worker": lambda: batches(loader),
    }
    rounds = [{name: step_seconds(source(), steps) for name, source in sources.items()} for _ in range(3)]
    return {name: round(1000 * min(one[name] for one in rounds), 3) for name in sources}


def compare_workers(seqlen: int, steps: int) -> dict[str, object]:
    """Measure in this process, on all cores."""
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch), 2_000_000, seqlen)
        row = {"seqlen": seqlen, "tokens_per_batch": STEP_TOKENS, "steps": steps, "load": round(os.getloadavg()[0], 1)}
        row["step_ms"] = beside(Path(scratch), seqlen, steps)
    for name, milliseconds in row["step_ms"].items():
        print(f"workers: {milliseconds:8.2f} ms a step with {name}")
    return row


def measure(folder: Path, seqlen: int, seconds: float) -> dict[str, float]:
    """Run ``read`` in a fresh process on one core."""
    command = [sys.executable, __file__, "--read", str(folder), "--seqlen", str(seqlen), "--seconds", str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def share_of(folder: Path, plain: Path, seqlen: int, seconds: float) -> float:
    """Speed of ``folder`` by that of ``plain``: the median of five rounds that measure both."""
    measure(plain, seqlen, 0)
    rounds = [[measure(path, seqlen, seconds)["tokens_per_second"] for path in (folder, plain)] for _ in range(5)]
    return round(float(np.median([own / other for own, other in rounds])), 2)


def compare(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Measure speed by length of sequence, and memory by size of the data set."""
    results: dict[str, list[dict[str, float]]] = {"speed": [], "memory": []}
    jobs = [("speed", arguments.events, seqlen) for seqlen in arguments.lengths]
    jobs += [("memory", events, 200) for events in arguments.sizes]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (kind, events, seqlen) in enumerate(jobs):
            folder, plain = Path(scratch, str(number)), Path(scratch, f"{number}-plain")
            write(folder, events, seqlen, arguments.features)
            first = measure(folder, seqlen, 0)
            row = {"events": events, "seqlen": seqlen, "load": round(os.getloadavg()[0], 1)}
            row |= measure(folder, seqlen, arguments.seconds if kind == "speed" else 0)
            row["first_open_seconds"] = first["open_seconds"]
            if kind == "speed" and arguments.features:
                write(plain, events, seqlen)
                row["of_plain"] = share_of(folder, plain, seqlen, arguments.seconds)
                print(f"       with three features: {row['of_plain']} of the speed without")
            results[kind].append(row)
            print(
                f"{kind:6} {events:>12,} events of {seqlen:>6,}: {row['tokens_per_second']:>12,} tokens/s, "
                f"private {row['private_mib']:6} MiB, mapped {row['mapped_mib']:7} MiB, opened in "
                f"{row['open_seconds']} s (the first time {row['first_open_seconds']} s), load {row['load']}"
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=8_000_000)
    parser.add_argument("--lengths", type=int, nargs="+", default=[200, 20_000])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 4_000_000, 16_000_000])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--features", action="store_true", help="three features of events as well")
    parser.add_argument("--steps", type=int, default=100, help="of `workers`")
    parser.add_argument("--only", choices=("read", "workers"), help="default: both; the other's results stay")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reader.json")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seqlen", type=int, default=200, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(read(arguments.read, arguments.seqlen, arguments.seconds)))
        return
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": platform.machine()}
    about |= {"cores": os.cpu_count(), "tokens_per_batch": TOKENS_PER_BATCH}
    if arguments.only != "workers" and arguments.features:
        record["with_features"] = about | compare(arguments)
    elif arguments.only != "workers":
        record |= about | compare(arguments)
    if arguments.only != "read":
        record["workers"] = {"date": about["date"]} | compare_workers(200, arguments.steps)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
