"""The dense step on a GPU: layers of HSTU forward and backward, without tables, optimizer or trainer.

    python benchmarks/train_step.py [--sizes 1024x4x256 1024x8x128] [--ragged] [--out report.json]

Prints tokens/s, model FLOP/s utilisation (visible pairs and products counted, against the device's dense bfloat16
peak) and what kinds of kernels the time goes to. Needs torch and triton alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from hstu.layers.hstu import HSTUConfig, HSTUStack
from hstu.layers.tokens import Tokens
from hstu.ops import Layout, Mask, lengths_to_offsets
from hstu.ops.flops import layer_flops, visible_pairs

PEAK = {"H100": 989e12, "H200": 989e12, "B200": 2250e12, "A100": 312e12}  # dense bfloat16, FLOP/s
KINDS = {
    "attention": ("attention_", "plan_blocks", "write_bias", "reduce_bias"),
    "products": ("gemm", "cutlass", "nvjet", "sm90_xmma", "matmul"),
    "norm and gate": ("norm_", "gate_", "silu_backward"),
}


def measure(
    layers: int, width: int, heads: int, head: int, samples: int, length: int, *, ragged: bool, bias: bool
) -> dict[str, Any]:
    """Time of a forward and backward of ``layers`` layers."""
    torch.manual_seed(0)
    lengths = torch.full((samples,), length)
    if ragged:
        raw = torch.exp(torch.randn(samples) * 0.9)
        lengths = (raw * length / 4 / raw.mean()).round().long().clamp(1, length)
    config = HSTUConfig(
        hidden_size=width, num_heads=heads, qk_channels=head, value_channels=head, max_tokens=length,
        scaling_seqlen=float(length), position_bias=bias, time_bias_buckets=128 if bias else 0,
    )  # fmt: skip
    stack, total = HSTUStack(config, layers).cuda(), int(lengths.sum())
    x = torch.randn(total, width, device="cuda").mul_(0.5).requires_grad_()
    times = torch.randint(1, 1000, (total,)).cumsum(0).cuda()
    rows = torch.arange(total, device="cuda")

    def step() -> None:
        layout = Layout(lengths_to_offsets(lengths).cuda(), max_seqlen=length, timestamps=times)
        tokens = Tokens(values=x, layout=layout, event_rows=rows, tokens_per_event=1)
        with torch.autocast("cuda", torch.bfloat16):
            out = stack(tokens)
        out.float().square().mean().backward()
        stack.zero_grad(set_to_none=True)
        x.grad = None

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    spent = []
    for _ in range(7):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        spent.append(time.perf_counter() - began)
    median = sorted(spent)[3]
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    shares: Counter[str] = Counter()
    for event in profiled.key_averages():
        name = next((k for k, parts in KINDS.items() if any(p in event.key for p in parts)), "elementwise")
        shares[name] += event.self_device_time_total
    pairs = int(visible_pairs(Layout(lengths_to_offsets(lengths)), Mask()).sum())
    work = layers * layer_flops(total, pairs, width, heads, head, head).total
    name = torch.cuda.get_device_name()
    peak = next((value for key, value in PEAK.items() if key in name), float("nan"))
    everything = sum(shares.values())
    return {
        "layers": layers, "size": f"{width}x{heads}x{head}", "tokens": total, "ragged": ragged, "bias": bias,
        "ms": round(1e3 * median, 1), "tokens_per_second": round(total / median),
        "mfu": round(work / median / peak, 3), "busy": round(everything / 1e6 / median, 3),
        "shares": {key: round(value / everything, 3) for key, value in shares.most_common()},
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1024x4x256", "1024x8x128"], help="width x heads x head width")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=4099)
    parser.add_argument("--ragged", action="store_true", help="mean a quarter of the longest")
    parser.add_argument("--bias", action="store_true", help="with both tables of the relative bias")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/train_step.py needs a CUDA device: none found, nothing measured")
    rows = []
    for size in arguments.sizes:
        width, heads, head = map(int, size.split("x"))
        rows.append(
            measure(
                arguments.layers,
                width,
                heads,
                head,
                arguments.samples,
                arguments.length,
                ragged=arguments.ragged,
                bias=arguments.bias,
            )  # fmt: skip
        )
        print(json.dumps(rows[-1]), flush=True)
    if arguments.out:
        note = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": triton.__version__,
        }
        arguments.out.write_text(json.dumps(note | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
