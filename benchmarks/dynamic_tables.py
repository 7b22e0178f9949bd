"""Time of a training lookup of a dynamic table, by its rows: `python benchmarks/dynamic_tables.py [--output FILE]`.

The map runs in compiled loops where numba is installed. Beside it run, in the same process and turn by turn, the map in
torch's operators (``torch``) and what it replaced (``before``): TorchRec's managed collision, one module for each of 16
parts, which ranks all rows of a part anew in each lookup.

Three kinds of lookups of 25,600 ids: all of them known; a tenth of them new; all of them new. Tables are full.
Milliseconds of processor time on one thread, which what else runs on the machine hardly changes: median and best over
the lookups, after two that do not count. After each lookup of the map it is checked that ids own the rows they got.
``parts`` says what goes where: the probes, the scores, the ids that are new, the sketch, who gets a row, and, for
comparison, the gather of as many embeddings of width 64 from a table of so many rows (at most a million here).
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import write_record
from torch import Tensor
from torchrec.modules.mc_modules import LRU_EvictionPolicy, MCHManagedCollisionModule
from torchrec.sparse.jagged_tensor import JaggedTensor

from hstu.config import DynamicEmbeddingArgs
from hstu.ops import loops
from hstu.ops.row_sets import PARTS
from hstu.parallel.compiled_row_map import row_map
from hstu.parallel.row_map import part_of

IDS = 25_600
ROWS = (100_000, 1_000_000, 8_000_000)
SHARE_NEW = {"known": 0.0, "tenth new": 0.1, "all new": 1.0}
METHODS = {
    "_find": "probe",
    "_after": "probe again",
    "_score": "scores",
    "_distinct": "new ids",
    "_estimated": "sketch",
    "_admit": "admission",
}
WIDTH, MOST_ROWS = 64, 1_000_000
STRATEGIES = {
    "lru": DynamicEmbeddingArgs(),
    "lfu": DynamicEmbeddingArgs(evict_strategy="lfu"),
    "lru, min_count 2": DynamicEmbeddingArgs(min_count=2),
}


class RankAll:
    """The map before: one of TorchRec's modules for each part, which evicts in every lookup."""

    def __init__(self, rows: int) -> None:
        ends = [rows * part // PARTS for part in range(PARTS + 1)]
        self.parts = [
            MCHManagedCollisionModule(
                zch_size=stop - start,
                device=torch.device("cpu"),
                eviction_policy=LRU_EvictionPolicy(),
                eviction_interval=1,
                output_global_offset=start,
            )
            for start, stop in zip(ends, ends[1:], strict=False)
        ]

    @torch.no_grad()
    def __call__(self, ids: Tensor) -> Tensor:
        asked, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
        part, rows = part_of(asked), torch.empty_like(asked)
        for number, module in enumerate(self.parts):
            mine = part == number
            module._current_iter_tensor += 1
            module._current_iter = int(module._current_iter_tensor)
            times = {"last_access_iter": torch.full_like(asked[mine], module._current_iter)}
            module._update_and_evict(asked[mine], counts[mine], times)
            module.evict()
            own = JaggedTensor(values=asked[mine], lengths=torch.tensor([int(mine.sum())]))
            rows[mine] = module.remap({"": own})[""].values()
        return rows[inverse]


class Map:
    """The map now."""

    def __init__(self, rows: int, args: DynamicEmbeddingArgs) -> None:
        self.map = row_map(rows, args, range(PARTS), torch.device("cpu"), waits=True)
        self.parts: dict[str, float] = dict.fromkeys(METHODS.values(), 0.0)
        for name, part in METHODS.items():
            setattr(self.map, name, self._timed(getattr(self.map, name), part))

    def _timed(self, method: Callable[..., Any], part: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            found = method(*args, **options)
            self.parts[part] += (time.process_time() - start) * 1e3
            return found

        return call

    def __call__(self, ids: Tensor) -> Tensor:
        return self.map.look_up(ids, torch.ones_like(ids, dtype=torch.bool)).rows

    def check(self, ids: Tensor, rows: Tensor) -> None:
        """Raise unless each row is that of its id, and nearly every id has one where each is to have one."""
        own = rows < self.map.usable
        owners, there = self.map.holders(rows[own])
        assert torch.equal(owners, ids[own]) and bool(there.all())
        assert own.float().mean() > 0.9 or self.map.args != DynamicEmbeddingArgs()


def lookups(rows: int, share_new: float, count: int, first_new: int) -> list[Tensor]:
    """Return ``count`` batches of ids, of which a share is beyond ``first_new`` and the rest among the last known."""
    generator = torch.Generator().manual_seed(0)
    new = int(IDS * share_new)
    known = torch.randint(max(0, first_new - rows // 2), first_new, (count, IDS - new), generator=generator)
    fresh = first_new + torch.arange(count * new).view(count, new)
    return [scattered(batch) for batch in torch.cat([known, fresh], 1)]


def scattered(ids: Tensor) -> Tensor:
    """Return numbers that look like hashes for ``ids``, each its own."""
    return (ids * 0x2545F4914F6CDD1D) & (2**62 - 1)


def timed(run: Map | RankAll, batch: Tensor) -> float:
    """Return the milliseconds of a lookup."""
    start = time.process_time()
    rows = run(batch)
    took = (time.process_time() - start) * 1e3
    if isinstance(run, Map):
        run.check(batch, rows)
    return took


def gather(rows: int, batches: list[Tensor]) -> float:
    """Return the milliseconds in which embeddings are read, the best of some batches."""
    table, times = torch.zeros(min(rows, MOST_ROWS), WIDTH), []
    for batch in batches:
        start = time.process_time()
        torch.embedding(table, batch % len(table))
        times.append((time.process_time() - start) * 1e3)
    return min(times)


def measure(rows: int, repeats: int, *, before: bool) -> dict[str, Any]:
    """Return milliseconds a lookup, by what is looked up and by which map."""
    maps: dict[str, Map | RankAll] = {name: Map(rows, args) for name, args in STRATEGIES.items()}
    with loops.torch_only():
        maps["torch, lru"] = Map(rows, STRATEGIES["lru"])
    if before:
        maps["before, lru"] = RankAll(rows)
    known = rows
    for batch in torch.arange(rows).split(max(IDS, rows // 8)):
        for name, run in maps.items():
            for _ in range(2 if "min_count" in name else 1):
                run(scattered(batch))
    found: dict[str, Any] = {}
    for kind, share in SHARE_NEW.items():
        batches = lookups(rows, share, repeats + 2, known)
        known += int(IDS * share) * len(batches)
        times: dict[str, list[float]] = {name: [] for name in maps}
        own = {name: run for name, run in maps.items() if isinstance(run, Map)}
        for number, batch in enumerate(batches):
            if number == 2:
                for run in own.values():
                    run.parts = dict.fromkeys(run.parts, 0.0)
            for name, run in maps.items():
                times[name].append(timed(run, batch))
        found[kind] = {name: round(statistics.median(values[2:]), 2) for name, values in times.items()}
        found[kind] |= {f"{name}, best": round(min(values[2:]), 2) for name, values in times.items()}
        found[kind]["parts"] = {
            name: {part: round(ms / repeats, 2) for part, ms in run.parts.items()} for name, run in own.items()
        }
        found[kind]["gather of embeddings"] = round(gather(rows, batches), 2)
    return found


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "dynamic_tables.json")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--no-before", action="store_true", help="leave out what was there before")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for rows in args.rows:
        found[str(rows)] = measure(rows, args.repeats, before=not args.no_before)
        for kind, times in found[str(rows)].items():
            shown = "  ".join(f"{n} {ms} ms" for n, ms in times.items() if n != "parts")
            print(f"{rows:>9,} rows, {kind:<10} {shown}\n{'':>26} {times['parts']}", flush=True)
    write_record(args.output, threads=1, ids=IDS, milliseconds_by_rows=found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
