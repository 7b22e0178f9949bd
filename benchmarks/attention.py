"""Attention on a GPU: correctness first, then speed, all in one run.

    python benchmarks/attention.py [--quick] [--widths 64 128 256] [--lengths 256 1024 4096 16384]

Needs torch and triton alone. Every kernel is compared with the float64 reference on odd shapes, twice, with the same
bits; only then head width x length x batch are swept, ragged and full, HSTU without and with the relative bias, and
softmax attention. TFLOP/s count visible pairs only: two products forward, five backward. Prints a table and writes
benchmarks/results/attention.json.

On a machine without a GPU, TRITON_INTERPRET=1 runs the comparison alone, on short sequences; nothing is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from hstu.ops import Layout, Mask, RelativeBias, hstu_attention, lengths_to_offsets, softmax_attention
from hstu.ops.flops import attention_flops, visible_pairs

HEADS, BATCH, BUCKETS = 4, 32, 128
TOKENS = 1 << 19  # of a batch at most, so that 16384 tokens a sequence fit the memory
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ODD_LENGTHS = [5, 0, 1, 17, 40] if INTERPRETED else [5, 0, 1, 257, 64, 130, 1031]
Options = dict[str, Any]


def odd_problem(width: int, seed: int, *, dtype: torch.dtype, rich: bool) -> tuple[list[Tensor], Options]:
    """q, k, v and both tables for sequences of very unequal lengths with every option on, or none."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(ODD_LENGTHS)
    total, longest = int(lengths.sum()), max(ODD_LENGTHS)
    tensors = [torch.randn(total, 2, width, generator=rng, dtype=torch.float64).to(DEVICE, dtype) for _ in range(3)]
    offsets, part = lengths_to_offsets(lengths).to(DEVICE), max(longest // 10, 4)
    if not rich:
        return tensors, dict(layout=Layout(offsets, max_seqlen=longest), mask=Mask())
    tensors += [torch.randn(n, generator=rng).to(DEVICE) for n in (2 * longest - 1, BUCKETS + 1)]
    layout = Layout(
        offsets,
        max_seqlen=longest,
        num_context=(lengths // 4).clamp(max=5).to(DEVICE),
        num_candidates=(lengths // 3).to(DEVICE),
        segments=torch.cat([torch.arange(n) // part for n in ODD_LENGTHS]).int().to(DEVICE),
        is_memory=torch.cat([torch.arange(n) % part == part - 1 for n in ODD_LENGTHS]).to(DEVICE),
        timestamps=torch.exp(torch.rand(total, generator=rng) * 12).long().cumsum(0).to(DEVICE),
    )
    return tensors, dict(layout=layout, mask=Mask(candidate_group_size=3, max_attn_len=4 * part))


def attend(kind: str, tensors: list[Tensor], options: Options, backend: str) -> Tensor:
    if kind == "softmax":
        return softmax_attention(*tensors[:3], **options, backend=backend)
    bias = RelativeBias(position=tensors[3], time=tensors[4], query_time="next") if len(tensors) > 3 else None
    return hstu_attention(*tensors[:3], **options, bias=bias, scaling_seqlen=256.0, backend=backend)


def run(kind: str, tensors: list[Tensor], options: Options, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and every gradient, all floating tensors in ``dtype``."""
    # The tables stay in float32 with low precision, as parameters do.
    wide = torch.promote_types(dtype, torch.float32)
    leaves = [x.detach().to(dtype if n < 3 else wide).requires_grad_() for n, x in enumerate(tensors)]
    out = attend(kind, leaves, options, backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad.to(DEVICE, dtype))
    names = ("q", "k", "v", "position", "time")
    return {"out": out.detach()} | {f"d_{n}": x.grad for n, x in zip(names, leaves, strict=False) if x.grad is not None}


def check_correctness(widths: list[int]) -> None:
    """|x - ref64| at most twice (forward) or three times (backward) the error of the plain computation."""
    low = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
    wide = [(width, torch.float32) for width in (25, 64, 256) if width in widths]
    compared = 0
    for width, dtype in [(width, dtype) for width in widths for dtype in low] + wide:
        for kind, rich in (("hstu", False), ("hstu", True), ("softmax", False), ("softmax", True)):
            tensors, options = odd_problem(width, width, dtype=dtype, rich=rich)
            exact = run(kind, tensors, options, "reference", torch.float64)
            plain = run(kind, tensors, options, "reference", dtype)
            kernel, again = (run(kind, tensors, options, "triton", dtype) for _ in range(2))
            for key, truth in exact.items():
                allowed = (2 if key == "out" else 3) * (plain[key].double() - truth).abs().max()
                error = (kernel[key].double() - truth).abs().max()
                if not error <= allowed + 1e-6 * truth.abs().max():
                    sys.exit(f"wrong: {kind} width {width} {dtype} rich {rich} {key}: {error:.2e} > {allowed:.2e}")
                if not torch.equal(kernel[key], again[key]):
                    sys.exit(f"not the same twice: {kind} width {width} {dtype} rich {rich} {key}")
                compared += 1
    print(f"correct: {compared} comparisons with the float64 reference, twice the same bits", flush=True)


def check_no_sync() -> None:
    """A step must not wait for the device."""
    for kind in ("hstu", "softmax"):
        tensors, options = odd_problem(64, 0, dtype=torch.bfloat16, rich=True)
        run(kind, tensors, options, "triton", torch.bfloat16)
        leaves = [x.detach().requires_grad_() for x in tensors]
        torch.cuda.set_sync_debug_mode("error")
        attend(kind, leaves, options, "triton").sum().backward()
        torch.cuda.set_sync_debug_mode("default")
    print("no device synchronisation in a forward and backward", flush=True)


def milliseconds(step: Callable[[], Any], rounds: int) -> float:
    """Median time of a step on the device."""
    for _ in range(3):
        step()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(rounds)]
    for begin, end in events:
        begin.record()
        step()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in events)


def measure(width: int, longest: int, *, ragged: bool, kind: str, rounds: int) -> dict[str, Any]:
    """One row of the sweep; ``kind``: hstu, bias or softmax."""
    batch = max(1, min(BATCH, TOKENS // longest))
    rng = torch.Generator().manual_seed(0)
    lengths = torch.full((batch,), longest)
    if ragged:
        raw = torch.exp(torch.randn(batch, generator=rng) * 0.9)
        lengths = (raw * longest / 4 / raw.mean()).round().long().clamp(1, longest)
    total = int(lengths.sum())
    *tensors, grad = (torch.randn(total, HEADS, width, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    if kind == "bias":
        tensors += [torch.zeros(n, device="cuda") for n in (2 * longest - 1, BUCKETS + 1)]
    for x in tensors:
        x.requires_grad_()
    times = torch.exp(torch.rand(total, generator=rng) * 12).long().cumsum(0).cuda()
    layout = Layout(lengths_to_offsets(lengths).cuda(), max_seqlen=longest, timestamps=times)
    options: Options = dict(layout=layout, mask=Mask())
    name = "softmax" if kind == "softmax" else "hstu"
    work = attention_flops(int(visible_pairs(Layout(lengths_to_offsets(lengths)), Mask()).sum()), HEADS, width, width)
    with torch.no_grad():
        forward = milliseconds(lambda: attend(name, tensors, options, "triton"), rounds)
    out = attend(name, tensors, options, "triton")
    # Not Tensor.backward, which would add to the gradients of the step before.
    backward = milliseconds(lambda: torch.autograd.grad(out, tensors, grad, retain_graph=True), rounds)
    return {
        "width": width,
        "longest": longest,
        "batch": batch,
        "tokens": total,
        "ragged": ragged,
        "kind": kind,
        "forward_ms": round(forward, 4),
        "backward_ms": round(backward, 4),
        "forward_tflops": round(work.forward / forward / 1e9, 1),
        "backward_tflops": round(work.backward / backward / 1e9, 1),
        "both_tflops": round(work.total / (forward + backward) / 1e9, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 1024, 4096, 16384])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="two head widths, two lengths")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "attention.json")
    arguments = parser.parse_args()
    if INTERPRETED:
        check_correctness([25])
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/attention.py needs a CUDA device: none found, nothing measured")
    widths, lengths = ([64, 128], [1024, 4096]) if arguments.quick else (arguments.widths, arguments.lengths)
    check_correctness([25, 64] if arguments.quick else [25, 32, 50, 64, 128, 256])
    check_no_sync()
    print(f"{'width':>5} {'longest':>7} {'ragged':>6} {'kind':>7} {'fwd':>7} {'bwd':>7} {'both':>7}  TFLOP/s")
    rows = []
    for width in widths:
        for longest in lengths:
            for ragged in (False, True):
                for kind in ("hstu", "bias", "softmax"):
                    row = measure(width, longest, ragged=ragged, kind=kind, rounds=arguments.rounds)
                    rows.append(row)
                    print(
                        f"{width:5} {longest:7} {ragged!s:>6} {kind:>7} {row['forward_tflops']:7.1f} "
                        f"{row['backward_tflops']:7.1f} {row['both_tflops']:7.1f}",
                        flush=True,
                    )
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "capability": torch.cuda.get_device_capability(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "heads": HEADS,
        "dtype": "bfloat16",
        "rows": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
