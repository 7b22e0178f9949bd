"""Exact top-k of a large catalogue: in chunks against one matrix product and torch.topk, in one run.

    python benchmarks/topk.py [--items 1000000] [--users 1000] [--k 100] [--threads 2] [--rounds 5]

Both sides get the same vectors and must find the same items. Elapsed and processor time are medians of rounds
taken alternately; ``ratio`` is plain over chunked. Memory is what a process of its own needs beyond the vectors, for
several sizes. Prints tables and writes benchmarks/results/topk.json.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

# Threads that wait actively would count as work, the more the busier the machine is with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from record import growth_of, memory_growth, write_record  # noqa: E402
from torch import Tensor  # noqa: E402

from hstu.metrics.topk import top_k  # noqa: E402

WIDTH, CHUNK = 64, 1 << 16


def vectors(users: int, items: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    return torch.randn(users, WIDTH, generator=rng), torch.randn(items, WIDTH, generator=rng)


def plain(queries: Tensor, catalogue: Tensor, k: int) -> Tensor:
    return (queries @ catalogue.T).topk(k).indices


def chunked(queries: Tensor, catalogue: Tensor, k: int) -> Tensor:
    chunks = ((start, catalogue[start : start + CHUNK]) for start in range(0, catalogue.shape[0], CHUNK))
    return top_k(queries, chunks, k).items


SIDES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"plain": plain, "chunked": chunked}


def check(queries: Tensor, catalogue: Tensor, k: int) -> None:
    """Both sides find the same items, up to those whose scores differ by rounding."""
    ours, theirs = (side(queries[:100], catalogue, k) for side in (chunked, plain))
    found = [(queries[:100, None] * catalogue[items]).sum(2).sort(1).values for items in (ours, theirs)]
    assert (ours == theirs).float().mean() > 0.999 and torch.allclose(*found, atol=1e-4), "the two sides differ"


def seconds_each(queries: Tensor, catalogue: Tensor, k: int, rounds: int) -> dict[str, dict[str, float]]:
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in SIDES}
    for number in range(rounds + 1):
        for name, side in SIDES.items():
            begin = time.perf_counter(), time.process_time()
            side(queries, catalogue, k)
            if number:
                times[name].append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    medians = {name: [statistics.median(kind) for kind in zip(*record, strict=True)] for name, record in times.items()}
    return {name: {"seconds": round(s, 3), "cpu_seconds": round(c, 3)} for name, (s, c) in medians.items()}


def print_peak(name: str, users: int, items: int, k: int) -> None:
    queries, catalogue = vectors(users, items)
    SIDES[name](queries[:1], catalogue[:CHUNK], k)  # what libraries set up once
    print(memory_growth(lambda: SIDES[name](queries, catalogue, k)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=1_000)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peak-of", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "topk.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(args.peak_of, args.users, args.items, args.k)
        return
    queries, catalogue = vectors(args.users, args.items)
    check(queries, catalogue, args.k)
    load = os.getloadavg()[0]
    times = seconds_each(queries, catalogue, args.k, args.rounds)
    del queries, catalogue
    ratio = {kind: round(times["plain"][kind] / times["chunked"][kind], 2) for kind in times["plain"]}
    print(f"{args.items:,} items, {args.users:,} users, k = {args.k}, {args.threads} threads")
    for name, record in times.items():
        print(f"{name:8} {record['seconds']:8.2f} s {record['cpu_seconds']:8.2f} s of processor time")
    print(f"ratio    {ratio['seconds']:8.2f}   {ratio['cpu_seconds']:8.2f}")
    sizes = [(args.users, args.items // 4), (args.users // 4, args.items), (args.users, args.items)]
    memory = []
    for users, items in sizes:
        needs = {f"{n}_mib": round(growth_of(__file__, n, users=users, items=items, k=args.k)) for n in SIDES}
        memory.append({"users": users, "items": items} | needs)
    for row in memory:
        print(f"{row['users']:6,} users x {row['items']:9,} items: plain {row['plain_mib']:6,} MiB, "
              f"chunked {row['chunked_mib']:4,} MiB")  # fmt: skip
    write_record(
        args.out,
        threads=args.threads,
        load_before=round(load, 2),
        items=args.items,
        users=args.users,
        k=args.k,
        width=WIDTH,
        rounds=args.rounds,
        times=times,
        ratio=ratio,
        extra_memory=memory,
    )


if __name__ == "__main__":
    main()
