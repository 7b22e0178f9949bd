"""Attention on a GPU: correctness first, then speed, all in one run.

    python benchmarks/attention.py [--quick] [--widths 64 128 256] [--lengths 256 1024 4096 16384]

Needs torch and triton alone. Every kernel is compared with the float64 reference on odd shapes; only then head
width x length x batch are swept, jagged and full, bias on and off. TFLOP/s count visible pairs only: two products
forward, five backward. Prints a table and writes benchmarks/results/attention.json.

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

from hstu.ops import RelativeBias, hstu_attention, lengths_to_offsets
from hstu.ops.attention.mask import Mask
from hstu.ops.flops import attention_flops, visible_pairs

HEADS, BATCH, BUCKETS = 4, 32, 128
TOKENS = 1 << 19  # of a batch at most, so that 16384 tokens a sequence fit the memory
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
ODD_LENGTHS = [5, 0, 1, 17, 40] if INTERPRETED else [5, 0, 1, 257, 64, 130, 1031]
Options = dict[str, Any]


def odd_problem(width: int, seed: int, *, dtype: torch.dtype, rich: bool) -> tuple[list[Tensor], Options]:
    """Sequences of very unequal lengths with every option on, or none."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(ODD_LENGTHS)
    total, longest = int(lengths.sum()), max(ODD_LENGTHS)
    qkv = [torch.randn(total, 2, width, generator=rng, dtype=torch.float64).to(DEVICE, dtype) for _ in range(3)]
    options: Options = dict(offsets=lengths_to_offsets(lengths).to(DEVICE), max_seqlen=longest, scaling_seqlen=256.0)
    if rich:
        part = max(longest // 10, 4)
        options |= dict(
            num_context=(lengths // 4).clamp(max=5).to(DEVICE),
            num_candidates=(lengths // 3).to(DEVICE),
            candidate_group_size=3,
            max_attn_len=4 * part,
            segments=torch.cat([torch.arange(n) // part for n in ODD_LENGTHS]).int().to(DEVICE),
            is_memory=torch.cat([torch.arange(n) % part == part - 1 for n in ODD_LENGTHS]).to(DEVICE),
            bias=RelativeBias(
                position=torch.randn(2 * longest - 1, generator=rng).to(DEVICE),
                time=torch.randn(BUCKETS + 1, generator=rng).to(DEVICE),
                timestamps=torch.exp(torch.rand(total, generator=rng) * 12).long().cumsum(0).to(DEVICE),
                query_time="next",
            ),
        )
    return qkv, options


def run(qkv: list[Tensor], options: Options, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Output and every gradient, all floating tensors in ``dtype``."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in qkv]
    names = ["q", "k", "v"]
    options = dict(options)
    bias = options.get("bias")
    if bias is not None:
        # The tables stay in float32 with low precision, as parameters do.
        wide = torch.promote_types(dtype, torch.float32)
        tables = [t.detach().to(wide).requires_grad_() for t in (bias.position, bias.time)]
        options["bias"] = RelativeBias(
            position=tables[0], time=tables[1], timestamps=bias.timestamps, query_time=bias.query_time
        )
        leaves, names = leaves + tables, [*names, "position", "time"]
    out = hstu_attention(*leaves[:3], **options, backend=backend)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    out.backward(grad.to(DEVICE, dtype))
    return {"out": out.detach()} | {f"d_{n}": x.grad for n, x in zip(names, leaves, strict=True)}


def comparisons(widths: list[int]) -> list[tuple[int, torch.dtype, bool]]:
    """Head width, type and whether the backward is to be deterministic."""
    low = [torch.float16] if INTERPRETED else [torch.bfloat16, torch.float16]
    some = [width for width in (25, 64, 256) if width in widths]
    return (
        [(width, dtype, False) for width in widths for dtype in low]
        + [(width, torch.float32, False) for width in some]
        + [(width, low[0], True) for width in some]
    )


def check_correctness(widths: list[int]) -> None:
    """|x - ref64| at most twice (forward) or three times (backward) the error of the plain computation."""
    for width, dtype, deterministic in comparisons(widths):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        for rich in (False, True):
            qkv, options = odd_problem(width, width, dtype=dtype, rich=rich)
            exact = run(qkv, options, "reference", torch.float64)
            plain = run(qkv, options, "reference", dtype)
            kernel = run(qkv, options, "triton", dtype)
            for key, truth in exact.items():
                allowed = (2 if key == "out" else 3) * (plain[key].double() - truth).abs().max()
                error = (kernel[key].double() - truth).abs().max()
                if not error <= allowed + 1e-6 * truth.abs().max():
                    sys.exit(f"wrong: width {width} {dtype} rich {rich} {key}: {error:.2e} > {allowed:.2e}")
    torch.use_deterministic_algorithms(False)
    print("correct: every kernel against the float64 reference", flush=True)


def check_no_sync() -> None:
    """A step must not wait for the device."""
    qkv, options = odd_problem(64, 0, dtype=torch.bfloat16, rich=True)
    run(qkv, options, "triton", torch.bfloat16)
    leaves = [x.detach().requires_grad_() for x in qkv]
    torch.cuda.set_sync_debug_mode("error")
    hstu_attention(*leaves, **options, backend="triton").sum().backward()
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


def measure(width: int, longest: int, *, ragged: bool, bias: bool, rounds: int) -> dict[str, Any]:
    """One row of the sweep."""
    batch = max(1, min(BATCH, TOKENS // longest))
    rng = torch.Generator().manual_seed(0)
    lengths = torch.full((batch,), longest)
    if ragged:
        raw = torch.exp(torch.randn(batch, generator=rng) * 0.9)
        lengths = (raw * longest / 4 / raw.mean()).round().long().clamp(1, longest)
    total = int(lengths.sum())
    q, k, v, grad = (torch.randn(total, HEADS, width, dtype=torch.bfloat16, device="cuda") for _ in range(4))
    for x in (q, k, v):
        x.requires_grad_()
    options: Options = dict(offsets=lengths_to_offsets(lengths).cuda(), max_seqlen=longest, scaling_seqlen=longest)
    if bias:
        options["bias"] = RelativeBias(
            position=torch.zeros(2 * longest - 1, device="cuda", requires_grad=True),
            time=torch.zeros(BUCKETS + 1, device="cuda", requires_grad=True),
            timestamps=torch.exp(torch.rand(total, generator=rng) * 12).long().cumsum(0).cuda(),
        )
    work = attention_flops(int(visible_pairs(lengths, Mask()).sum()), HEADS, width, width)
    with torch.no_grad():
        forward = milliseconds(lambda: hstu_attention(q, k, v, **options, backend="triton"), rounds)
    out = hstu_attention(q, k, v, **options, backend="triton")
    tables = [options["bias"].position, options["bias"].time] if bias else []
    # Not Tensor.backward, which would add to the gradients of the step before.
    backward = milliseconds(lambda: torch.autograd.grad(out, [q, k, v, *tables], grad, retain_graph=True), rounds)
    return {
        "width": width,
        "longest": longest,
        "batch": batch,
        "tokens": total,
        "ragged": ragged,
        "bias": bias,
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
    print(f"{'width':>5} {'longest':>7} {'ragged':>6} {'bias':>5} {'fwd':>7} {'bwd':>7} {'both':>7}  TFLOP/s")
    rows = []
    for width in widths:
        for longest in lengths:
            for ragged in (False, True):
                for bias in (False, True):
                    row = measure(width, longest, ragged=ragged, bias=bias, rounds=arguments.rounds)
                    rows.append(row)
                    print(
                        f"{width:5} {longest:7} {ragged!s:>6} {bias!s:>5} {row['forward_tflops']:7.1f} "
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
