"""Time tile sizes of the attention kernels on this GPU, and write the table that the package reads.

    python benchmarks/tune_attention.py [--write] [--out report.json] [--seconds 240]

Candidates are compiled in parallel processes first, then timed one at a time on full sequences (32 x 4096 tokens, 4
heads, bf16); the fastest of each kernel, head width and kind of bias is kept if it gives the right result on a small
ragged batch. ``--write`` puts them into ``hstu/ops/attention/triton/tiles.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention
from hstu.ops.attention.triton import hstu, launch
from hstu.ops.attention.triton.config import TABLE, TileConfig

HEADS, SAMPLES, LENGTH = 4, 32, 4096
PRODUCTS = {"forward": 2, "columns": 4, "rows": 3}
#: (rows, columns, warps, stages, whether dk and dv are split) by kernel, kind of bias and head width.
CANDIDATES: dict[str, dict[str, dict[int, list[tuple[int, ...]]]]] = {
    "forward": {
        "plain": {
            64: [(128, 64, 4, 4), (128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 32, 4, 4)],
            128: [(64, 64, 4, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 32, 4, 4), (64, 64, 4, 4)],
            256: [(128, 32, 8, 3), (128, 64, 8, 2), (128, 32, 8, 4), (64, 32, 4, 3)],
        },
        "bias": {
            64: [(128, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 4), (128, 64, 8, 3), (64, 64, 4, 2)],
            128: [(64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3)],
            256: [(128, 32, 8, 3), (128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 3)],
        },
    },
    "columns": {
        "plain": {
            64: [(64, 64, 4, 3), (64, 64, 4, 4), (64, 64, 4, 2), (128, 64, 4, 2), (32, 64, 4, 3)],
            128: [(64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (64, 64, 4, 3)],
            256: [(64, 64, 8, 2), (32, 128, 8, 3, 1), (32, 128, 8, 2, 1), (64, 128, 8, 2, 1), (64, 64, 4, 2, 1)],
        },
        "bias": {
            64: [(64, 64, 4, 3), (64, 64, 4, 2), (32, 64, 4, 3), (64, 128, 8, 2)],
            128: [(64, 64, 4, 2), (64, 128, 8, 2), (32, 64, 4, 3), (32, 64, 4, 2)],
            256: [(64, 64, 8, 2), (32, 128, 8, 3, 1), (32, 128, 8, 2, 1), (64, 128, 8, 2, 1)],
        },
    },
    "rows": {
        "plain": {
            64: [(64, 64, 4, 3), (128, 64, 8, 3), (64, 64, 4, 4), (64, 128, 4, 2)],
            128: [(64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 3), (64, 32, 4, 3)],
            256: [(128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3)],
        },
        "bias": {
            64: [(64, 64, 4, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3)],
            128: [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3), (128, 64, 8, 2)],
            256: [(128, 32, 8, 2), (128, 32, 8, 3), (64, 32, 4, 3)],
        },
    },
}


def jobs(chosen: list[str]) -> Iterator[tuple[str, str, int, TileConfig]]:
    for kernel, kinds in CANDIDATES.items():
        for kind, widths in kinds.items():
            for width, tiles in widths.items():
                if not chosen or f"{kernel}/{kind}/{width}" in chosen or kind in chosen or kernel in chosen:
                    yield from ((kernel, kind, width, TileConfig(*tile)) for tile in tiles)


class Problem:
    """Operands, and a kernel alone."""

    def __init__(self, width: int, kind: str, lengths: torch.Tensor, dtype: torch.dtype = torch.bfloat16) -> None:
        torch.manual_seed(0)
        total, longest = int(lengths.sum()), int(lengths.max())
        gaps = torch.exp(torch.rand(total) * 12).long()
        times = torch.cat([own.cumsum(0) for own in gaps.split(lengths.tolist())])
        self.layout = Layout(
            torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).cuda(),
            max_seqlen=longest,
            timestamps=times.cuda(),
        )
        self.q, self.k, self.v, self.do = (torch.randn(total, HEADS, width, device="cuda").to(dtype) for _ in range(4))
        tables = [torch.randn(n, device="cuda") * 0.5 for n in (2 * longest - 1, 129)]
        names = {"bias": (0, 1), "position": (0,), "time": (1,)}.get(kind, ())
        self.tables = tuple(tables[n] if n in names else None for n in (0, 1))
        self.bias = RelativeBias(position=self.tables[0], time=self.tables[1])
        self.pairs = float((lengths.double() * (lengths + 1) / 2).sum())
        self.scale = 1.0 / longest
        self.into = tuple(torch.full_like(self.q, float("nan")) for _ in range(3))
        self.d_tables: list[torch.Tensor | None] = []
        self.out: torch.Tensor | None = None
        self.tile: TileConfig | None = None

    def launch(self, kernel: str, tile: TileConfig) -> None:
        """Run one kernel, with the passes over its bias if there is one."""
        attention = hstu.TritonAttention(
            self.layout, Mask(), scaling_seqlen=1 / self.scale, alpha=self.q.shape[2] ** -0.5, bias=self.bias,
            keys=self.layout,
        )  # fmt: skip
        inputs, needs = (self.q, self.k, self.v), tuple(t is not None for t in self.tables)
        if self.tile != tile:
            self.tile = tile
            self.layout._kept.clear()  # launches are made once a batch
        with mock.patch.object(launch, "tile_config", lambda *place, **options: tile):
            if kernel == "forward":
                self.out = attention.forward(*inputs, *self.tables)
            elif kernel == "columns":
                attention.columns(self.do, inputs, self.tables, self.into[1:])
            else:
                self.d_tables = list(attention.rows(self.do, inputs, self.tables, self.into[0], needs))


def compile_part(part: int, parts: int, chosen: list[str]) -> None:
    """Compile every ``parts``-th job by running it once on a small problem; a line for each."""
    for place, (kernel, kind, width, tile) in enumerate(jobs(chosen)):
        if place % parts == part:
            began = time.perf_counter()
            try:
                Problem(width, kind, torch.tensor([LENGTH, 256])).launch(kernel, tile)
                torch.cuda.synchronize()
                result = "ok"
            except Exception as error:  # a candidate that cannot be built is no candidate
                result = f"{type(error).__name__}: {str(error)[:200]}"
            print(json.dumps([place, result, round(time.perf_counter() - began, 1)]), flush=True)


def milliseconds(run: Any, rounds: int = 7) -> float:
    for _ in range(2):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for start, stop in events:
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return sorted(start.elapsed_time(stop) for start, stop in events)[rounds // 2]


def errors(kernel: str, kind: str, width: int, tile: TileConfig) -> float:
    """Largest error of a kernel's results against float64, over the largest value."""
    problem = Problem(width, kind, torch.tensor([257, 0, 1, 64, 130, 1031]))
    problem.launch(kernel, tile)
    own = {"forward": [problem.out], "columns": [*problem.into[1:]], "rows": [problem.into[0], *problem.d_tables]}[
        kernel
    ]
    own = [x for x in own if x is not None]
    leaves = [x.double().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    tables = [None if t is None else t.double().requires_grad_() for t in problem.tables]
    bias = RelativeBias(position=tables[0], time=tables[1])
    out = hstu_attention(*leaves, problem.layout, scaling_seqlen=1 / problem.scale, bias=bias, backend="reference")
    out.backward(problem.do.double())
    right = {
        "forward": [out.detach()],
        "columns": [leaves[1].grad, leaves[2].grad],
        "rows": [leaves[0].grad, *(t.grad for t in tables if t is not None)],
    }[kernel]
    return max(float((a.double() - b).abs().max() / b.abs().max()) for a, b in zip(own, right, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", type=int, nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", default=[], help="kernel/kind/width, a kernel or a kind")
    parser.add_argument("--seconds", type=float, default=240, help="to spend on compiling, and as much on timing")
    parser.add_argument("--write", action="store_true", help="put the fastest into tiles.json")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_part(*arguments.compile, arguments.only)
        return
    began, parts = time.perf_counter(), max(1, (os.cpu_count() or 2) - 1)
    command = [sys.executable, __file__, "--only", *arguments.only, "--compile"]
    workers = [
        subprocess.Popen([*command, str(i), str(parts)], stdout=subprocess.PIPE, text=True) for i in range(parts)
    ]
    built: dict[int, tuple[str, float]] = {}
    for worker in workers:
        try:
            text, _ = worker.communicate(timeout=max(1.0, began + arguments.seconds - time.perf_counter()))
        except subprocess.TimeoutExpired as late:
            worker.kill()
            text = (late.stdout or b"").decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        built |= {place: (result, spent) for place, result, spent in map(json.loads, text.splitlines())}
    print(f"compiled {sum(r == 'ok' for r, _ in built.values())} in {time.perf_counter() - began:.0f} s", flush=True)
    rows: list[dict[str, Any]] = []
    problems: dict[tuple[int, str], Problem] = {}
    for place, (kernel, kind, width, tile) in sorted(enumerate(jobs(arguments.only)), key=lambda j: (j[1][2], j[1][1])):
        result, _ = built.get(place, ("not compiled in time", 0.0))
        if result != "ok":
            print(f"{kernel:8} {kind:8} {width:4} {tile}: {result}", flush=True)
            continue
        if (width, kind) not in problems:
            problems.clear()
            problems[width, kind] = Problem(width, kind, torch.full((SAMPLES,), LENGTH))
        problem = problems[width, kind]
        spent = milliseconds(lambda: problem.launch(kernel, tile))  # noqa: B023 - called at once
        speed = PRODUCTS[kernel] * 2 * HEADS * problem.pairs * width / spent / 1e9
        rows.append(dict(kernel=kernel, kind=kind, width=width, ms=round(spent, 3), tflops=round(speed, 1),
                         tile=[tile.rows, tile.columns, tile.warps, tile.stages, *[1] * tile.split]))  # fmt: skip
    rows.sort(key=lambda r: (r["width"], r["kind"], r["kernel"], r["ms"]))
    best: dict[str, Any] = {}
    for row in rows:
        print(
            f"{row['width']:4} {row['kind']:8} {row['kernel']:8} {row['ms']:8.3f} ms {row['tflops']:6.1f} {row['tile']}"
        )
        place = best.setdefault(row["kernel"], {}).setdefault(row["kind"], {})
        if str(row["width"]) not in place:
            wrong = errors(row["kernel"], row["kind"], row["width"], TileConfig(*row["tile"]))
            print(f"     error {wrong:.1e}", flush=True)
            if wrong < 0.02:
                place[str(row["width"])] = row["tile"]
    device = torch.cuda.get_device_name()
    note = {"device": device, "date": datetime.now(UTC).date().isoformat(), "triton": triton.__version__}
    if arguments.out:
        arguments.out.write_text(json.dumps(note | {"rows": rows}, indent=1) + "\n")
    if arguments.write:
        table = json.loads(TABLE.read_text())
        table["measured"] = note
        for kernel, kinds in best.items():
            for kind, widths in kinds.items():
                if kind in ("plain", "bias"):
                    table["tiles"]["sm90"][kernel].setdefault(kind, {}).update(widths)
        TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
