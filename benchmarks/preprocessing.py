"""Rows per second and peak memory of the preprocessing command on generated files in the published layouts.

    python benchmarks/preprocessing.py --layout ml-20m --rows 20000000
    python benchmarks/preprocessing.py --layout kuairand-27k --rows 25000000 50000000 100000000
    python benchmarks/preprocessing.py --layout custom --rows 10000000 20000000
    python benchmarks/preprocessing.py --layout custom-features --rows 10000000

The files hold random events: MovieLens grouped by user as published, KuaiRand in the order of time, with all users
mixed, which is the harder case for a sort by user, and a shop's own log (custom) likewise, with ids that are strings
and a column that is not read; custom-features has a price, a brand and a set of tags more, which are declared.
KuaiRand's 322,278,385 rows have the published numbers of users and items and lengths of sequences, which the command
then checks; with fewer rows, sequences are shorter in proportion.

Each command runs in a process of its own; its peak is the sum of the resident set sizes of its process tree, looked at
every 20 ms, or the kernel's own high-water mark if that is more.
Results are added to benchmarks/results/preprocessing.json. Generated files are removed unless --keep is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)  # in place of this directory, where "preprocessing" is this file

from hstu.preprocessing import kuairand  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "preprocessing.json"
BLOCK = 2_000_000
KUAIRAND_USERS, KUAIRAND_ITEMS, KUAIRAND_ROWS = 27_285, 32_038_725, 322_278_385
KUAIRAND_SHORTEST, KUAIRAND_LONGEST = 100, 228_000
STRIDE = 197_371_813  # a prime, so that its multiples mix what stands side by side
MOVIELENS_USERS, MOVIELENS_ITEMS, MOVIELENS_ROWS = 138_493, 26_744, 20_000_263


def movielens(rows: int, folder: Path) -> None:
    """ratings.csv, grouped by user."""
    users = max(1, rows * MOVIELENS_USERS // MOVIELENS_ROWS)
    with (folder / "ratings.csv").open("wb") as file:
        file.write(b"userId,movieId,rating,timestamp\n")
        for rng, start, stop in blocks(rows):
            number = stop - start
            pl.DataFrame(
                {
                    "userId": np.arange(start, stop) * users // rows + 1,
                    "movieId": (MOVIELENS_ITEMS * rng.random(number) ** 2).astype(np.int64) * 5 + 1,
                    "rating": rng.integers(1, 11, number) / 2,
                    "timestamp": rng.integers(789_652_009, 1_427_784_002, number),
                }
            ).write_csv(file, include_header=False)


def kuairand_27k(rows: int, folder: Path) -> None:
    """The four parts of the log in the order of time, and the file of users."""
    names = kuairand.DATASETS["kuairand-27k"].logs
    files = [(folder / name).open("wb") for name in names]
    for file in files:
        file.write(",".join(kuairand.LOG_FIELDS).encode() + b"\n")
    ends = np.cumsum(kuairand_lengths(rows))
    first, last = 1_649_347_200_000, 1_652_025_600_000
    for rng, start, stop in blocks(rows):
        number = stop - start
        columns = {name: np.zeros(number, np.int64) for name in kuairand.LOG_FIELDS}
        columns |= {name: (rng.random(number) < 0.2).astype(np.int64) for name in kuairand.EVENTS}
        place = np.arange(start, stop)
        columns["user_id"] = np.searchsorted(ends, place * STRIDE % rows, side="right")
        video = (KUAIRAND_ITEMS * rng.random(number) ** 1.5).astype(np.int64)
        columns["video_id"] = np.where(place % 10 == 0, place // 10 * STRIDE % KUAIRAND_ITEMS, video)  # each, in time
        columns["date"] = np.full(number, 20_220_408)
        columns["hourmin"] = rng.integers(0, 24, number) * 100
        step = (last - first) // rows
        columns["time_ms"] = first + place * step + rng.integers(-60_000, 60_000, number)
        columns["play_time_ms"] = rng.integers(0, 60_000, number)
        columns["duration_ms"] = rng.integers(5_000, 200_000, number)
        pl.DataFrame(columns).write_csv(files[start * len(files) // rows], include_header=False)
    for file in files:
        file.close()
    values = dict.fromkeys(kuairand.USER_FIELDS, "1") | {"follow_user_num_range": '"(0,10]"'}
    lines = [",".join((values | {"user_id": str(user)}).values()) for user in range(KUAIRAND_USERS)]
    (folder / "user_features_27k.csv").write_text("\n".join([",".join(kuairand.USER_FIELDS), *lines]) + "\n")


def kuairand_lengths(rows: int) -> np.ndarray:
    """Events of each user, log-normal between the published extremes; their sum is ``rows``."""
    low, high = (max(1, n * rows // KUAIRAND_ROWS) for n in (KUAIRAND_SHORTEST, KUAIRAND_LONGEST))
    shape = np.random.default_rng(0).lognormal(sigma=1.2, size=KUAIRAND_USERS)
    factors = [0.0, float(rows)]
    for _ in range(100):
        middle = sum(factors) / 2
        factors[int(np.floor(np.clip(shape * middle, low, high)).sum() > rows)] = middle
    lengths = np.clip(shape * factors[0], low, high).astype(np.int64)
    inner = np.flatnonzero((lengths > low) & (lengths < high))
    lengths[inner[: rows - lengths.sum()]] += 1
    assert lengths.sum() == rows
    return lengths


def custom(rows: int, folder: Path, *, features: bool = False) -> None:
    """One csv with a header, ids that are strings, quoted fields and a column without a role; or with features."""
    with (folder / "log.csv").open("wb") as file:
        file.write(b"customer,product,when,bought,note" + b",price,brand,tags" * features + b"\n")
        for rng, start, stop in blocks(rows):
            number = stop - start
            table = pl.DataFrame(
                {
                    "customer": (max(1, rows // 50) * rng.random(number) ** 1.5).astype(np.int64),
                    "product": (500_000 * rng.random(number) ** 1.5).astype(np.int64),
                    "when": 1_600_000_000 + np.arange(start, stop),
                    "bought": rng.integers(0, 2, number),
                }
            )
            ids = pl.format("c-{}", "customer"), pl.format("shoe {}, blue", "product")
            table = table.select(
                ids[0].alias("customer"), ids[1].alias("product"), "when", "bought", note=pl.lit("none")
            )
            if features:
                tags = pl.format("t{}|t{}|t{}", *(pl.Series(rng.integers(0, 30, number)) for _ in range(3)))
                brand = pl.format("brand {}", pl.Series(rng.integers(0, 5_000, number)))
                table = table.with_columns(
                    price=pl.Series(rng.lognormal(3, 1, number)).round(2), brand=brand, tags=tags
                )
            table.write_csv(file, include_header=False)


LAYOUTS = {
    "ml-20m": movielens,
    "kuairand-27k": kuairand_27k,
    "custom": custom,
    "custom-features": partial(custom, features=True),
}
FEATURES = "event_features=price:numeric,brand:categorical,tags:multi"
CUSTOM = ("user_column=customer", "item_column=product", "time_column=when", "action_column=bought", "name=custom")


def blocks(rows: int) -> Iterator[tuple[np.random.Generator, int, int]]:
    """A generator of its own for each block of rows."""
    for start in range(0, rows, BLOCK):
        yield np.random.default_rng(start), start, min(rows, start + BLOCK)


def run(layout: str, folder: Path, rows: int) -> tuple[float, float, int]:
    """Seconds, seconds of processor time and peak bytes of one run of the command."""
    command = [
        sys.executable,
        str(ROOT / "preprocessing" / "preprocessor.py"),
        f"--dataset_name={layout.removesuffix('-features')}",
        f"--data_dir={folder / 'out'}",
    ]
    if layout.startswith("custom"):
        command += [f"--interactions={folder / 'log.csv'}", *(f"--{flag}" for flag in CUSTOM)]
        command += [f"--{FEATURES}"] if layout == "custom-features" else []
    else:
        whole = layout == "kuairand-27k" and rows == KUAIRAND_ROWS
        command += [f"--raw_dir={folder}", f"--check_counts={str(whole).lower()}"]
    started, used = time.perf_counter(), cpu_seconds()
    process = subprocess.Popen(command)
    tree, peak = psutil.Process(process.pid), 0
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess, FileNotFoundError):
            peak = max(peak, sum(one.memory_info().rss for one in (tree, *tree.children(recursive=True))), mark(tree))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}")
    return seconds, cpu_seconds() - used, peak


def cpu_seconds() -> float:
    """Processor time of all commands so far."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def mark(process: psutil.Process) -> int:
    """The kernel's high-water mark of one process, in bytes."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def check(layout: str, rows: int, folder: Path) -> None:
    """Every event is in the data set, and times never fall within a user."""
    found = 0
    for path in sorted((folder / "out" / layout.removesuffix("-features") / "data").iterdir()):
        times = pq.read_table(path, columns=["timestamp"])["timestamp"].combine_chunks()
        values, offsets = times.flatten().to_numpy(), times.offsets.to_numpy()
        falls = np.flatnonzero(np.diff(values) < 0) + 1
        assert np.isin(falls, offsets).all(), path
        found += len(values)
    assert found == rows, (found, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layout", choices=LAYOUTS, required=True)
    parser.add_argument("--rows", type=int, nargs="+", required=True)
    parser.add_argument("--repeat", type=int, default=1, help="runs of each size; the fastest is reported")
    parser.add_argument("--dir", type=Path, default=Path("tmp_data") / "benchmark", help="for the generated files")
    parser.add_argument("--keep", action="store_true", help="keep the generated files, and use those that are there")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    for rows in args.rows:
        folder = args.dir / f"{args.layout}-{rows}"
        if not folder.exists():
            folder.mkdir(parents=True)
            LAYOUTS[args.layout](rows, folder)
        load = os.getloadavg()[0]
        runs = [run(args.layout, folder, rows) for _ in range(args.repeat)]
        check(args.layout, rows, folder)
        seconds, cpu, _ = min(runs)
        record = {
            "layout": args.layout,
            "rows": rows,
            "csv_bytes": sum(path.stat().st_size for path in folder.glob("*.csv")),
            "seconds": round(seconds, 2),
            "rows_per_second": round(rows / seconds),
            "cpu_seconds": round(cpu, 2),
            "peak_mib": round(max(peak for *_, peak in runs) / 2**20),
            "all_seconds": [round(one, 2) for one, *_ in runs],
            "load_before": round(load, 2),
            "cpus": os.cpu_count(),
            "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "python": platform.python_version(),
            "polars": pl.__version__,
        }
        print(json.dumps(record))
        save(args.output, record)
        if not args.keep:
            shutil.rmtree(folder)


def save(path: Path, record: dict) -> None:
    """Add a record, replacing one of the same layout and size."""
    known = json.loads(path.read_text()) if path.exists() else []
    same = ("layout", "rows")
    records = [one for one in known if any(one[key] != record[key] for key in same)] + [record]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(sorted(records, key=lambda one: (one["layout"], one["rows"])), indent=2) + "\n")


if __name__ == "__main__":
    main()
