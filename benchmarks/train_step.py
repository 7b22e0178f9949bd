"""The step on a GPU: layers of HSTU forward and backward, and beside them whole steps of the trainer.

    python benchmarks/train_step.py [--sizes 1024x4x256 1024x8x128] [--ragged] [--whole] [--out report.json]

Prints tokens/s, model FLOP/s utilisation (visible pairs and products counted, against the device's dense bfloat16
peak) and what kinds of kernels the time goes to; what is none of them is elementwise, and ``busy`` is the share of the
time in which any runs. The dense step is without tables, optimizer and trainer and needs torch and triton alone.
``--whole`` takes as many tokens through the trainer: batches read from a generated log, tables of 100,000 items and
their Adam, 128 sampled negatives, AdamW; ``of_dense`` is its rate as a share of the dense step's.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
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
    "tables": ("split_embedding", "embedding_codegen", "lxu_cache", "linearize", "cub::", "radix"),
    "communication": ("nccl",),
}
ITEMS = 100_000
WARM, TIMED = 3, 7  # steps


def measure(
    layers: int, width: int, heads: int, head: int, samples: int, length: int, *, ragged: bool, bias: bool
) -> dict[str, Any]:
    """Time of a forward and backward of ``layers`` layers."""
    torch.manual_seed(0)
    lengths = draw_lengths(samples, length, ragged=ragged)
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

    median, shares = timed(step)
    pairs = int(visible_pairs(Layout(lengths_to_offsets(lengths)), Mask()).sum())
    work = layers * layer_flops(total, pairs, width, heads, head, head).total
    about = {"step": "dense", "layers": layers, "size": f"{width}x{heads}x{head}", "ragged": ragged, "bias": bias}
    return about | described(median, shares, total, work)


def measure_whole(
    layers: int, width: int, heads: int, head: int, samples: int, length: int, *, ragged: bool, bias: bool
) -> dict[str, Any]:
    """Time of a step of the trainer over as many tokens: lookups, forward, backward, both optimizers."""
    from hstu.config import load_config
    from hstu.data import SequenceDataset
    from hstu.parallel import Mesh
    from hstu.training.batch_flops import batch_flops
    from hstu.training.run_directory import RunDirectory
    from hstu.training.trainer import Trainer

    torch.manual_seed(0)
    steps = WARM + TIMED + 1
    lines = (
        "TrainerArgs.loggers=()", "TrainerArgs.max_epochs=1", f"TrainerArgs.train_batch_size={samples}",
        "TrainerArgs.enable_balanced_shuffler=False",
        f"DatasetArgs.max_history_seqlen={length - 1}",
        f"NetworkArgs.num_layers={layers}", f"NetworkArgs.hidden_size={width}",
        "NetworkArgs.dtype_str='bfloat16'",
        f"NetworkArgs.num_attention_heads={heads}", f"NetworkArgs.kv_channels={head}",
        "NetworkArgs.preset='production'",
        f"NetworkArgs.relative_time_bias={bias}", f"NetworkArgs.relative_position_bias={bias}",
    )  # fmt: skip
    config = load_config("retrieval", ["ml_1m_hstu_retrieval.gin"], lines).config
    with tempfile.TemporaryDirectory() as folder, Mesh.create() as mesh:
        # The last two events of a user are targets of validation and test.
        write_log(Path(folder) / "log", torch.cat([draw_lengths(samples, length, ragged=ragged) + 2] * steps))
        trainer = Trainer(config, SequenceDataset.open(Path(folder) / "log"), mesh, RunDirectory(Path(folder) / "run"))
        batches = trainer.stepper.steps(trainer.loaders["train"].epoch(0), trainer.progress)
        counted: list[tuple[int, float]] = []

        def step() -> None:
            (batch,) = next(batches)
            trainer.stepper.take((batch,), trainer.progress)
            counted.append((trainer.model.num_tokens(batch), batch_flops(trainer.model, config, batch)))

        median, shares = timed(step)
    tokens, work = (sum(values) / len(values) for values in zip(*counted[WARM:-1], strict=True))
    about = {"step": "whole", "layers": layers, "size": f"{width}x{heads}x{head}", "ragged": ragged, "bias": bias}
    return about | described(median, shares, round(tokens), work)


def draw_lengths(samples: int, length: int, *, ragged: bool) -> torch.Tensor:
    """Tokens of each sequence: all of them ``length``, or log-normal ones with a mean of a quarter of it."""
    if not ragged:
        return torch.full((samples,), length)
    raw = torch.exp(torch.randn(samples) * 0.9)
    return (raw * length / 4 / raw.mean()).round().long().clamp(1, length)


def write_log(folder: Path, lengths: torch.Tensor) -> None:
    """Write a log with a user for each of ``lengths``, of items with equal probability."""
    import numpy as np
    import pyarrow as pa

    from hstu.data import EncodedDataset, Feature, Schema, write_dataset
    from hstu.data.schema import count_statistics

    rng, sizes = np.random.default_rng(0), lengths.numpy()
    features = (
        Feature(name="user", role="user", vocab_size=len(sizes)),
        Feature(name="item", role="item", vocab_size=ITEMS),
        Feature(name="time", role="time"),
    )
    write_dataset(
        EncodedDataset(
            schema=Schema(name="log", features=features, counts=count_statistics(sizes, ITEMS)),
            lengths=sizes,
            contexts={},
            events={"item": rng.integers(ITEMS, size=sizes.sum()), "time": rng.integers(1, 1000, sizes.sum()).cumsum()},
            vocabularies={"user": pa.array(np.arange(len(sizes))), "item": pa.array(np.arange(ITEMS))},
        ),
        folder,
    )


def timed(step: Callable[[], None]) -> tuple[float, Counter[str]]:
    """Return the median seconds of ``step`` and microseconds of its kernels by kind."""
    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(WARM):
        step()
    synchronize()
    spent = []
    for _ in range(TIMED):
        began = time.perf_counter()
        step()
        synchronize()
        spent.append(time.perf_counter() - began)
    kind = ProfilerActivity.CUDA if torch.cuda.is_available() else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiled:
        step()
        synchronize()
    shares: Counter[str] = Counter()
    for event in profiled.key_averages():
        name = next((k for k, parts in KINDS.items() if any(p in event.key for p in parts)), "elementwise")
        shares[name] += event.self_device_time_total
    return sorted(spent)[TIMED // 2], shares


def described(median: float, shares: Counter[str], tokens: int, work: float) -> dict[str, Any]:
    """Return what is reported of a step."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((value for key, value in PEAK.items() if key in name), float("nan"))
    everything = sum(shares.values())
    return {
        "tokens": tokens, "ms": round(1e3 * median, 1), "tokens_per_second": round(tokens / median),
        "mfu": round(work / median / peak, 3), "busy": round(everything / 1e6 / median, 3),
        "shares": {key: round(value / everything, 3) for key, value in shares.most_common() if value},
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 1) if name else None,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=["1024x4x256", "1024x8x128"], help="width x heads x head width")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=4099)
    parser.add_argument("--ragged", action="store_true", help="mean a quarter of the longest")
    parser.add_argument("--bias", action="store_true", help="with both tables of the relative bias")
    parser.add_argument("--whole", action="store_true", help="steps of the trainer too")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/train_step.py needs a CUDA device: none found, nothing measured")
    rows = []
    for size in arguments.sizes:
        width, heads, head = map(int, size.split("x"))
        for side in (measure, measure_whole) if arguments.whole else (measure,):
            torch.cuda.reset_peak_memory_stats()
            sizes = arguments.layers, width, heads, head, arguments.samples, arguments.length
            rows.append(side(*sizes, ragged=arguments.ragged, bias=arguments.bias))
            if side is measure_whole:
                rows[-1]["of_dense"] = round(rows[-1]["tokens_per_second"] / rows[-2]["tokens_per_second"], 3)
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
