"""Reading and collating training batches: tokens per second of one core, and memory against the size of the data.

    python benchmarks/reader.py [--events 8000000] [--seconds 3] [--sizes 1000000 4000000 16000000]

A token is an item or an action, as the model would see them. Data sets are random; each measurement runs in a
process of its own, on one core, without workers. Prints tables and writes benchmarks/results/reader.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from hstu.data import EncodedDataset, Feature, Schema, SequenceDataset, leave_one_out, write_dataset
from hstu.data.collate import Collator
from hstu.data.loader import BatchLoader
from hstu.data.schema import count_statistics

ITEMS = 1_000_000
TOKENS_PER_BATCH = 400_000
MIB = 2**20


def write(folder: Path, events: int, seqlen: int) -> None:
    """Write random sequences of ``seqlen`` events that a training sample shows, and two held out."""
    rng = np.random.default_rng(0)
    lengths = np.full(max(1, events // seqlen), seqlen + 3)  # one more, which the model only predicts
    total = int(lengths.sum())
    features = (
        Feature(name="user", role="user", vocab_size=len(lengths)),
        Feature(name="item", role="item", vocab_size=ITEMS),
        Feature(name="action", role="action", vocab_size=256, action_type="bitmask"),
        Feature(name="time", role="time"),
    )
    clock = np.cumsum(rng.integers(0, 60, (len(lengths), seqlen + 3)), axis=1)
    write_dataset(
        EncodedDataset(
            schema=Schema(name="random", features=features, counts=count_statistics(lengths, ITEMS)),
            lengths=lengths,
            contexts={},
            events={
                "item": rng.integers(ITEMS, size=total),
                "action": rng.integers(256, size=total),
                "time": clock.ravel(),
            },
            vocabularies={"user": pa.array(np.arange(len(lengths)))},
        ),
        folder,
    )


def read(folder: Path, seqlen: int, seconds: float) -> dict[str, float]:
    """Read shuffled epochs for ``seconds`` or longer, at least one; memory is counted above that of the imports."""
    memory = psutil.Process()
    before = memory.memory_info()
    begin = time.perf_counter()
    dataset = SequenceDataset.open(folder)
    opened = time.perf_counter() - begin
    loader = BatchLoader(
        dataset=dataset,
        split=leave_one_out(dataset.lengths)["train"],
        collate=Collator(task="retrieval", max_history=seqlen),
        batch_size=max(1, TOKENS_PER_BATCH // (2 * seqlen)),
        shuffle=True,
    )
    tokens, private, epoch, begin = 0, 0, 0, time.perf_counter()
    while epoch == 0 or time.perf_counter() - begin < seconds:
        for batch in loader.epoch(epoch):
            tokens += batch.ids("item").numel() + batch.ids("action").numel()
            used = memory.memory_info()
            private = max(private, used.rss - used.shared - before.rss + before.shared)
        epoch += 1
    elapsed = time.perf_counter() - begin
    mapped = memory.memory_info().shared - before.shared
    return {
        "open_seconds": round(opened, 3),
        "tokens_per_second": round(tokens / elapsed),
        "private_mib": round(private / MIB, 1),
        "mapped_mib": round(mapped / MIB, 1),
    }


def measure(folder: Path, seqlen: int, seconds: float) -> dict[str, float]:
    """Run ``read`` in a fresh process on one core."""
    command = [sys.executable, __file__, "--read", str(folder), "--seqlen", str(seqlen), "--seconds", str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def compare(arguments: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """Measure speed by length of sequence, and memory by size of the data set."""
    results: dict[str, list[dict[str, float]]] = {"speed": [], "memory": []}
    jobs = [("speed", arguments.events, seqlen) for seqlen in arguments.lengths]
    jobs += [("memory", events, 200) for events in arguments.sizes]
    with tempfile.TemporaryDirectory() as scratch:
        for number, (kind, events, seqlen) in enumerate(jobs):
            folder = Path(scratch, str(number))
            write(folder, events, seqlen)
            first = measure(folder, seqlen, 0)
            row = {"events": events, "seqlen": seqlen, "load": round(os.getloadavg()[0], 1)}
            row |= measure(folder, seqlen, arguments.seconds if kind == "speed" else 0)
            row["first_open_seconds"] = first["open_seconds"]
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
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "reader.json")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seqlen", type=int, default=200, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        print(json.dumps(read(arguments.read, arguments.seqlen, arguments.seconds)))
        return
    results = compare(arguments)
    record = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "tokens_per_batch": TOKENS_PER_BATCH,
        **results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
