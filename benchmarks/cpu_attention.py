"""Attention on a CPU, forward + backward: the jagged path against a padded dense implementation, one run.

    python benchmarks/cpu_attention.py [--threads 2] [--rounds 9]

Both sides get the same tokens, the same position and time bias and the same output gradients. Correctness is
asserted first. Prints a table and writes benchmarks/results/cpu_attention.json. ``ratio`` compares elapsed time,
``cpu`` processor time, which neighbours on a shared machine disturb less; ``peak`` is the memory that the first
step of a fresh process adds, jagged and dense.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from record import write_record
from torch import Tensor

from hstu.ops import Layout, RelativeBias, hstu_attention, lengths_to_offsets
from hstu.ops.attention.bias import BUCKET_LOG_WIDTH

BATCH, LONGEST, HEADS, WIDTH, BUCKETS = 32, 200, 2, 32, 128
STEPS_IN_A_ROW = 4


def lognormal_lengths(batch: int, longest: int, seed: int) -> Tensor:
    """Lengths with a mean near a quarter of the maximum, as ragged as logs of real users."""
    rng = torch.Generator().manual_seed(seed)
    raw = torch.exp(torch.randn(batch, generator=rng) * 0.9)
    lengths = (raw * longest / 4 / raw.mean()).round().long().clamp(1, longest)
    lengths[0] = longest
    return lengths


class Problem:
    """Inputs of one comparison, jagged and padded."""

    def __init__(self, lengths: Tensor, dtype: torch.dtype, seed: int = 0) -> None:
        rng = torch.Generator().manual_seed(seed)
        total = int(lengths.sum())
        self.longest = int(lengths.max())
        self.qkv = [torch.randn(total, HEADS, WIDTH, generator=rng).to(dtype) for _ in range(3)]
        self.grad = torch.randn(total, HEADS, WIDTH, generator=rng).to(dtype)
        self.position = torch.randn(2 * LONGEST - 1, generator=rng).mul(0.1).to(dtype)
        self.time = torch.randn(BUCKETS + 1, generator=rng).mul(0.1).to(dtype)
        gaps = torch.exp(torch.rand(total, generator=rng) * 12).long()
        self.layout = Layout(lengths_to_offsets(lengths), timestamps=gaps.cumsum(0))
        place = torch.arange(self.longest)
        self.valid = place < lengths[:, None]
        self.padded_times = self.pad(gaps.cumsum(0))

    def pad(self, values: Tensor) -> Tensor:
        dense = values.new_zeros(*self.valid.shape, *values.shape[1:])
        dense[self.valid] = values
        return dense

    def leaves(self) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (*self.qkv, self.position, self.time)]

    def jagged(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
        bias = RelativeBias(position=position, time=time)
        layout = replace(self.layout)  # of a new batch each time: what a model's layers share is paid in full
        return hstu_attention(q, k, v, layout, scaling_seqlen=LONGEST, alpha=1.0, bias=bias)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, time: Tensor) -> Tensor:
        """The usual padded layer: [B, N, N] bias, [B, H, N, N] scores, one multiplication by the mask."""
        n = self.longest
        place = torch.arange(n)
        seconds = (self.padded_times[:, :, None] - self.padded_times[:, None, :]).abs().clamp(min=1)
        bucket = (seconds.float().log() / BUCKET_LOG_WIDTH).long().clamp(max=BUCKETS)
        bias = position[place[None, :] - place[:, None] + LONGEST - 1] + time[bucket]
        scores = torch.einsum("bihd,bjhd->bhij", q, k) + bias[:, None]
        weights = torch.nn.functional.silu(scores) / LONGEST
        weights = weights * torch.ones(n, n, dtype=q.dtype).tril()
        return torch.einsum("bhij,bjhd->bihd", weights, v)

    def check(self) -> None:
        """Outputs and gradients of both sides agree."""
        jagged, dense = self.leaves(), self.leaves()
        out = self.jagged(*jagged)
        out.backward(self.grad)
        padded = [self.pad(x) for x in dense[:3]]
        expected = self.dense(*padded, *dense[3:])[self.valid]
        expected.backward(self.grad)
        pairs = [(out, expected), *((a.grad, b.grad) for a, b in zip(jagged, dense, strict=True))]
        for ours, theirs in pairs:
            error = (ours - theirs).abs().max() / theirs.abs().max()
            assert error < 1e-4, f"the two sides differ by {error:.1e}"


def seconds_each(problem: Problem, rounds: int) -> list[tuple[float, float]]:
    """Median elapsed and processor seconds of a step, jagged and dense, taken alternately, a few steps each.

    The first of these steps finds the caches full of the other side's data and is not counted.
    """
    jagged, dense = problem.leaves(), problem.leaves()
    padded = [problem.pad(x.detach()).requires_grad_() for x in dense[:3]]
    padded_grad = problem.pad(problem.grad)
    steps: list[Callable[[], None]] = [
        lambda: problem.jagged(*jagged).backward(problem.grad),
        lambda: problem.dense(*padded, *dense[3:]).backward(padded_grad),
    ]
    times: list[list[tuple[float, float]]] = [[], []]
    for _ in range(rounds):
        for step, record in zip(steps, times, strict=True):
            step()
            for _ in range(STEPS_IN_A_ROW):
                begin = time.perf_counter(), time.process_time()
                step()
                record.append((time.perf_counter() - begin[0], time.process_time() - begin[1]))
    return [tuple(statistics.median(kind) for kind in zip(*record, strict=True)) for record in times]


def peak_megabytes(lengths: Tensor, dtype: torch.dtype, side: str) -> float:
    """Resident memory that the first step adds at its peak, in a process of its own."""
    receiver, sender = multiprocessing.get_context("spawn").Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_send_peak, args=(sender, lengths, dtype, side))
    process.start()
    peak: float = receiver.recv()
    process.join()
    return peak


def _send_peak(sender: Connection, lengths: Tensor, dtype: torch.dtype, side: str) -> None:
    def resident(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return int(found[1])

    def step(problem: Problem) -> None:
        leaves = problem.leaves()
        if side == "dense":
            leaves[:3] = [problem.pad(x.detach()).requires_grad_() for x in leaves[:3]]
        getattr(problem, side)(*leaves).sum().backward()

    torch.set_num_threads(1)
    step(Problem(torch.tensor([LONGEST]), dtype))  # loads the libraries
    problem = Problem(lengths, dtype)
    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to what is resident now
    before = resident("VmRSS")
    step(problem)
    sender.send((resident("VmHWM") - before) / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "cpu_attention.json")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shapes = {
        "equal": torch.full((BATCH,), LONGEST),
        "ragged": lognormal_lengths(BATCH, LONGEST, seed=0),
    }
    rows = []
    print(
        f"{'lengths':8} {'dtype':9} {'tokens':>6} {'jagged tok/s':>13} {'dense tok/s':>12} {'ratio':>6} {'cpu':>6} "
        f"{'peak MB':>13}"
    )
    for name, lengths in shapes.items():
        Problem(lengths, torch.float32).check()
        for dtype in (torch.float32, torch.bfloat16):
            problem = Problem(lengths, dtype)
            (jagged, jagged_cpu), (dense, dense_cpu) = seconds_each(problem, arguments.rounds)
            peaks = [peak_megabytes(lengths, dtype, side) for side in ("jagged", "dense")]
            tokens = int(lengths.sum())
            row = {
                "lengths": name,
                "dtype": str(dtype).removeprefix("torch."),
                "tokens": tokens,
                "jagged_tokens_per_second": round(tokens / jagged),
                "dense_tokens_per_second": round(tokens / dense),
                "ratio": round(dense / jagged, 2),
                "cpu_ratio": round(dense_cpu / jagged_cpu, 2),
                "jagged_peak_megabytes": round(peaks[0], 1),
                "dense_peak_megabytes": round(peaks[1], 1),
            }
            rows.append(row)
            print(
                f"{name:8} {row['dtype']:9} {tokens:6} {row['jagged_tokens_per_second']:13,} "
                f"{row['dense_tokens_per_second']:12,} {row['ratio']:6.2f} {row['cpu_ratio']:6.2f} "
                f"{peaks[0]:6.1f} {peaks[1]:6.1f}"
            )
    write_record(
        arguments.out,
        threads=arguments.threads,
        batch=BATCH,
        longest=LONGEST,
        heads=HEADS,
        head_width=WIDTH,
        rows=rows,
    )


if __name__ == "__main__":
    main()
