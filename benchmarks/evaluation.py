"""Ranks of targets in a full catalogue, as an evaluation finds them, against one product and torch.topk, in one run.

    python benchmarks/evaluation.py [--items 1000000] [--users 10000] [--k 100] [--threads 2]

Both sides get the same vectors of users and items, and score as many users at once. Ours leaves out what each user has
met (``--history`` items) and finds the exact rank of the target among all items, with the average over ties; the plain
side finds the ``k`` best items and looks for the target there. Where that finds it, ranks must agree. Memory is what a
process of its own needs at its peak beyond the vectors. Prints a table and writes benchmarks/results/evaluation.json.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

# Threads that wait actively would count as work, the more the busier the machine is with something else.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402
from record import growth_of, memory_growth, write_record  # noqa: E402
from torch import Tensor  # noqa: E402

from hstu.metrics.retrieval import target_ranks  # noqa: E402
from hstu.training.evaluate import _SCORE_ELEMENTS  # noqa: E402

WIDTH = 64
Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def make(users: int, items: int, history: int) -> Problem:
    """Vectors of users and items, the target of each user, and items met [users, history]."""
    rng = torch.Generator().manual_seed(0)
    catalogue = torch.nn.functional.normalize(torch.randn(items, WIDTH, generator=rng))
    targets = torch.randint(items, (users,), generator=rng)
    queries = catalogue[targets] + 0.4 * torch.randn(users, WIDTH, generator=rng)
    met = torch.randint(items, (users, history), generator=rng)
    return queries, catalogue, targets, torch.where(met == targets[:, None], (met + 1) % items, met)


def ours(problem: Problem, block: int, _: int) -> Tensor:
    """Ranks as ``hstu.training.evaluate`` finds them, [users] float64."""
    queries, catalogue, targets, met = problem
    found = []
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        scores = queries[rows] @ catalogue.T
        owner = torch.arange(scores.shape[0]).repeat_interleave(met.shape[1])
        found.append(target_ranks(scores, targets[rows], (owner, met[rows].flatten())))
    return torch.cat(found)


def plain(problem: Problem, block: int, k: int) -> Tensor:
    """Ranks among the best k of all items, infinite where the target is none of them, [users] float64."""
    queries, catalogue, targets, _ = problem
    found = []
    for start in range(0, len(queries), block):
        rows = slice(start, start + block)
        hits = (queries[rows] @ catalogue.T).topk(k).indices == targets[rows, None]
        ranks = hits.double().argmax(1) + 1.0
        found.append(ranks.where(hits.any(1), torch.inf))
    return torch.cat(found).double()


def product(problem: Problem, block: int, _: int) -> Tensor:
    """The product alone, which is the floor of both."""
    queries, catalogue, *_rest = problem
    return torch.cat([(queries[s : s + block] @ catalogue.T)[:, 0] for s in range(0, len(queries), block)])


SIDES = {"ours": ours, "plain": plain, "product": product}


def check(problem: Problem, block: int, k: int) -> float:
    """Share of 200 users whose target is among the best k; ranks of these agree, up to rounding of near ties."""
    queries, catalogue, targets, met = problem
    few = queries[:200], catalogue, targets[:200], met[:200, :0]
    a, b = ours(few, block, k), plain(few, block, k)
    near = b.isfinite()
    assert near.any() and ((a - b)[near].abs() <= 1).float().mean() > 0.99 and bool((a[~near] >= k).all())
    return float(near.float().mean())


def extra_memory(name: str, args: argparse.Namespace) -> float:
    """MiB that a process needs at its peak beyond the vectors."""
    flags = {key: getattr(args, key) for key in ("items", "k", "history", "threads")}
    return growth_of(__file__, name, users=4 * args.block, **flags)


def print_peak(name: str, args: argparse.Namespace) -> None:
    problem = make(args.users, args.items, args.history)
    print(memory_growth(lambda: SIDES[name](problem, args.block, args.k)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--users", type=int, default=10_000)
    parser.add_argument("--history", type=int, default=50)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak-of", choices=tuple(SIDES), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "evaluation.json")
    args = parser.parse_args()
    args.block = max(1, _SCORE_ELEMENTS // args.items)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print_peak(args.peak_of, args)
        return
    problem, load = make(args.users, args.items, args.history), os.getloadavg()[0]
    found = check(problem, args.block, args.k)
    times = {name: [0.0, 0.0] for name in SIDES}
    # Some users of each side in turn, so that a busy machine is as busy for all.
    for part in range(0, args.users, 16 * args.block):
        some = tuple(x if x is problem[1] else x[part : part + 16 * args.block] for x in problem)
        for name, side in SIDES.items():
            begin = time.perf_counter(), time.process_time()
            side(some, args.block, args.k)
            times[name][0] += time.perf_counter() - begin[0]
            times[name][1] += time.process_time() - begin[1]
    del problem
    rows = {
        name: {"seconds": round(s, 1), "cpu_seconds": round(c, 1), "extra_mib": round(extra_memory(name, args))}
        for name, (s, c) in times.items()
    }
    print(f"{args.users:,} users, {args.items:,} items, {args.threads} threads, {args.block} users at once")
    for name, row in rows.items():
        print(
            f"{name:8} {row['seconds']:7.1f} s {row['cpu_seconds']:7.1f} s of processor time {row['extra_mib']:6,} MiB"
        )
    ratio = round(rows["plain"]["cpu_seconds"] / rows["ours"]["cpu_seconds"], 2)
    print(f"plain / ours {ratio} of processor time; {found:.0%} of targets among the best {args.k}")
    write_record(
        args.out, threads=args.threads, load_before=round(load, 2), items=args.items, users=args.users, k=args.k,
        history=args.history, width=WIDTH, users_at_once=args.block, ratio=ratio, rows=rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
