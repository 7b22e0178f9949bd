"""Time on the host of one call of the attention, with the GPU's driver replaced: no device is needed.

    python benchmarks/launch_time.py [--calls 2000] [--out benchmarks/results/launch_time.json]

Everything that a call does on the host is timed but the driver's own launch, on a layout that layers have used before;
checks of values are off, as they are on a device. Bias: two launches a call, and six backward, whose few torch
operations (the largest value of a gradient) run here as well.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from null_driver import null_driver
from record import write_record
from torch import Tensor

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, softmax_attention
from hstu.ops.attention import checks

SAMPLES, LENGTH, HEADS, WIDTH = 4, 16, 4, 64


def problems() -> Iterator[tuple[str, list[Tensor], Callable[[], Tensor]]]:
    """Yield names, the tensors that take a gradient, and the attention."""
    total = SAMPLES * LENGTH
    layout = Layout(torch.arange(SAMPLES + 1) * LENGTH, timestamps=torch.arange(total))
    q, k, v = (torch.randn(total, HEADS, WIDTH).bfloat16().requires_grad_() for _ in range(3))
    position, times = (torch.randn(n, requires_grad=True) for n in (2 * LENGTH - 1, 129))
    bias = RelativeBias(position=position, time=times)
    options: dict[str, Any] = {"scaling_seqlen": 128.0, "backend": "triton"}
    yield "hstu", [q, k, v], lambda: hstu_attention(q, k, v, layout, Mask(), **options)
    tables = [q, k, v, position, times]
    yield "hstu, both tables", tables, lambda: hstu_attention(q, k, v, layout, Mask(), bias=bias, **options)
    yield "softmax", [q, k, v], lambda: softmax_attention(q, k, v, layout, Mask(), backend="triton")


def measured(call: Callable[[], Any], number: int) -> dict[str, float]:
    """Median and tenth percentile of the microseconds of a call, which returns when it began and ended."""
    spent = sorted(1e6 * (ended - began) for began, ended in (call() for _ in range(20 + number)))
    return {"median_us": round(statistics.median(spent), 1), "p10_us": round(spent[len(spent) // 10], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = {}
    with null_driver(90), mock.patch.object(checks, "values_readable", lambda tensor: False):
        for name, leaves, attend in problems():

            def forward(attend: Callable[[], Tensor] = attend) -> tuple[float, float]:
                began = time.perf_counter()
                attend()
                return began, time.perf_counter()

            def backward(attend: Callable[[], Tensor] = attend, leaves: list[Tensor] = leaves) -> tuple[float, float]:
                out = attend()
                grad = torch.ones_like(out)
                began = time.perf_counter()
                torch.autograd.grad(out, leaves, grad)
                return began, time.perf_counter()

            for kind, call in ((name, forward), (f"{name}, backward", backward)):
                rows[kind] = measured(call, arguments.calls)
                print(f"{kind:28}", *(f"{what} {value:7.1f} " for what, value in rows[kind].items()))
    if arguments.out:
        write_record(arguments.out, threads=torch.get_num_threads(), triton=triton.__version__, rows=rows)


if __name__ == "__main__":
    main()
