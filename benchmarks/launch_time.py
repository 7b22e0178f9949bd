"""Time on the host of one call of the attention, with the GPU's driver replaced: no device is needed.

    python benchmarks/launch_time.py [--calls 2000] [--out benchmarks/results/launch_time.json]

Everything that a call does on the host is timed but the driver's own launch; checks of values are off, as they are on
a device. Bias: two launches a call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
import triton
from null_driver import null_driver

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, softmax_attention
from hstu.ops.attention import checks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    samples, length, heads, width = 4, 128, 4, 64
    total = samples * length
    layout = Layout(torch.arange(samples + 1) * length, timestamps=torch.arange(total))
    q, k, v = (torch.randn(total, heads, width).bfloat16().requires_grad_() for _ in range(3))
    bias = RelativeBias(position=torch.randn(2 * length - 1), time=torch.randn(129))
    calls = {
        "hstu": lambda: hstu_attention(q, k, v, layout, Mask(), scaling_seqlen=128.0, backend="triton"),
        "hstu, both tables": lambda: hstu_attention(
            q, k, v, layout, Mask(), scaling_seqlen=128.0, bias=bias, backend="triton"
        ),
        "softmax": lambda: softmax_attention(q, k, v, layout, Mask(), backend="triton"),
    }
    rows = {}
    with null_driver(90), mock.patch.object(checks, "values_readable", lambda tensor: False):
        for name, call in calls.items():
            for _ in range(20):
                call()
            spent = []
            for _ in range(arguments.calls):
                began = time.perf_counter()
                call()
                spent.append(1e6 * (time.perf_counter() - began))
            ordered = sorted(spent)
            rows[name] = {
                "median_us": round(statistics.median(spent), 1),
                "p10_us": round(ordered[len(spent) // 10], 1),
            }
            print(
                f"{name:20} median {rows[name]['median_us']:7.1f} us, tenth percentile {rows[name]['p10_us']:7.1f} us"
            )
    if arguments.out:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next((line.split(":")[1] for line in lines if line.startswith("model name")), "unknown")
        content = {"triton": triton.__version__, "processor": processor.strip(), "rows": rows}
        arguments.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
