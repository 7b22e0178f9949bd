"""Where the time of a training step of retrieval goes on a CPU, and the least that it could take.

    python benchmarks/retrieval_profile.py [--threads 2] [--data tmp_data/ml-100k]

The published ML-1M configuration of HSTU on MovieLens 100K, as in retrieval_speed.py. ``measured`` is torch.profiler's
own time of operators, by the part of the model they belong to, in proportion to the step's time without the profiler;
what lies between operators (Python, and waiting) is a part of its own. ``floor`` counts products (``hstu.ops.flops``)
at the rate of one large float32 product measured here, and bytes (every operand of a part read once and every result
written once, the backward pass twice that) at the rate of a large copy; the larger of the two. Prints a table and
writes benchmarks/results/retrieval_profile.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from record import write_record
from retrieval_speed import CONFIGS, Ours, load
from torch.profiler import ProfilerActivity, profile

from hstu.config import Config
from hstu.data import SequenceDataset
from hstu.data.batch import Batch
from hstu.ops import Layout, Mask, lengths_to_offsets
from hstu.ops.flops import attention_flops, linear_flops, visible_pairs
from hstu.parallel import Mesh
from hstu.training.run_directory import RunDirectory
from hstu.training.trainer import Trainer

PARTS = {
    "attention": ("CpuAttention",),
    "loss": ("CrossEntropy",),
    "tables": ("_Lookup",),
    "dense optimizer": ("AdamW",),
    "projections": ("aten::mm", "aten::addmm", "aten::linear"),
    "negatives": ("aten::bitwise", "aten::__rshift__", "aten::__and__"),
}
REST, BETWEEN = "norms, gates, dropout, other", "between operators"


def part_of(event: object) -> str:
    """The part that an operator belongs to: that of the outermost ancestor which has one."""
    names = []
    while event is not None:
        names.append(event.name)  # type: ignore[attr-defined]
        event = event.cpu_parent  # type: ignore[attr-defined]
    for name in reversed(names):
        for part, marks in PARTS.items():
            if any(mark in name for mark in marks):
                return part
    return REST


def measured(side: Ours, steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds of a step by part."""
    side.round()
    whole = []
    for _ in range(rounds):
        begin = time.perf_counter()
        side.round()
        whole.append(time.perf_counter() - begin)
    with profile(activities=[ProfilerActivity.CPU]) as record:
        begin = time.perf_counter()
        side.round()
        profiled = time.perf_counter() - begin
    step, scale = statistics.median(whole) / steps * 1e3, statistics.median(whole) / profiled
    times: Counter[str] = Counter()
    for event in record.events():
        times[part_of(event)] += event.self_cpu_time_total / 1e3 / steps * scale
    times[BETWEEN] = step - sum(times.values())
    return {"step": step, **times}


def floors(config: Config, batch: Batch, touched: int) -> dict[str, tuple[float, float]]:
    """Floating-point operations and bytes of each part in a step of ``batch``."""
    network, retrieval = config.network, config.retrieval
    assert retrieval is not None
    lengths, labels = batch.lengths(batch.item), batch.labels.numel()
    tokens, width = int(lengths.sum()), network.hidden_size
    heads, channels = network.num_attention_heads, network.kv_channels
    pairs = int(visible_pairs(Layout(lengths_to_offsets(lengths)), Mask()).sum())
    inner, layers, count = heads * channels, network.num_layers, retrieval.num_negatives
    attention = attention_flops(pairs, heads, channels, channels).total * layers
    products = (linear_flops(tokens, width, 4 * inner) + linear_flops(tokens, inner, width)).total * layers
    number = 4  # bytes of a float32
    return {
        "attention": (attention, 3 * layers * number * tokens * 4 * inner),
        "projections": (products, 3 * layers * number * tokens * (2 * width + 5 * inner)),
        # One product forward, two backward; a column is an int64, a score and its gradient float32.
        "loss": (6 * labels * count * width, labels * count * (8 + 4 * number) + 3 * labels * width * number),
        "tables": (0, number * width * (2 * tokens + 6 * touched)),
        # Norm, gate and dropout read and write [tokens, inner] once each; so do the input's position and dropout.
        REST: (0, 3 * number * tokens * (layers * 6 * inner + 4 * width)),
        "negatives": (0, 8 * labels * count),
    }


def rates() -> tuple[float, float]:
    """Floating-point operations and bytes per second of a large product and of a large copy, the best of some."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source, target = torch.randn(1 << 26), torch.empty(1 << 26)

    def best(action) -> float:  # type: ignore[no-untyped-def]
        times = []
        for _ in range(7):
            begin = time.perf_counter()
            action()
            times.append(time.perf_counter() - begin)
        return min(times)

    return 2 * 1024**3 / best(lambda: a @ b), 2 * source.numel() * 4 / best(lambda: target.copy_(source))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("tmp_data/ml-100k"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "retrieval_profile.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    config = load("small", 200)
    with Mesh.create() as mesh, tempfile.TemporaryDirectory() as run:
        trainer = Trainer(config, SequenceDataset.open(args.data), mesh, RunDirectory(Path(run)))
        batch = next(iter(trainer.loaders["train"].epoch(0)))
        touched = trainer.model.num_items  # the pool of negatives is the catalogue
        times = measured(Ours(trainer, args.steps), args.steps, args.rounds)
    flop_rate, byte_rate = rates()
    rows = []
    for part, (flops, moved) in floors(config, batch, touched).items():
        floor = max(flops / flop_rate, moved / byte_rate) * 1e3
        rows.append({"part": part, "measured_ms": round(times[part], 1), "floor_ms": round(floor, 1),
                     "mflop": round(flops / 1e6), "mbyte": round(moved / 1e6, 1)})  # fmt: skip
    for part in ("dense optimizer", BETWEEN):
        rows.append({"part": part, "measured_ms": round(times[part], 1), "floor_ms": 0.0, "mflop": 0, "mbyte": 0.0})
    floor = round(sum(row["floor_ms"] for row in rows), 1)
    speeds = f"{flop_rate / 1e9:.0f} GFLOP/s, {byte_rate / 1e9:.1f} GB/s"
    print(f"{times['step']:.0f} ms a step, floor {floor:.0f} ms; {speeds}")
    for row in sorted(rows, key=lambda row: -row["measured_ms"]):
        print(
            "{part:30} {measured_ms:7.1f} ms   floor {floor_ms:5.1f} ms  {mflop:6,} MFLOP {mbyte:7.1f} MB".format(**row)
        )
    write_record(
        args.out,
        threads=args.threads,
        load_before=round(load_before, 2),
        config=CONFIGS["small"],
        tokens_of_a_step=int(batch.lengths(batch.item).sum()),
        gflops=round(flop_rate / 1e9, 1),
        gigabytes_per_second=round(byte_rate / 1e9, 1),
        step_ms=round(times["step"], 1),
        floor_ms=floor,
        parts=rows,
    )


if __name__ == "__main__":
    main()
