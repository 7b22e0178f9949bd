"""Memory of a rank against the number of context ranks: forward and backward pass of a stack of HSTU layers.

    python benchmarks/context_parallel.py [--samples 12] [--length 1000] [--layers 6] [--write]

Measured is what the resident memory of a rank grows by, at its peak, over that of the process with its weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from statistics import median

import torch

RESULTS = Path(__file__).parent / "results" / "context_parallel.json"


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Return tokens and peak memory of this rank."""
    from hstu.layers.hstu import HSTUConfig, HSTUStack, hstu_preset
    from hstu.layers.tokens import Stream, Tokens
    from hstu.ops import Layout, lengths_to_offsets
    from hstu.parallel import Mesh
    from hstu.parallel.context import ContextParallel, attend_across_ranks

    torch.set_num_threads(1)
    width = 256
    config = HSTUConfig(hidden_size=width, num_heads=4, qk_channels=64, value_channels=64, max_tokens=args.length,
                        scaling_seqlen=float(args.length), **hstu_preset("production"))  # fmt: skip
    with Mesh.create() as mesh:
        context = ContextParallel(mesh.with_degrees(mesh.world_size, 1).context)
        stack = HSTUStack(config, args.layers)
        attend_across_ranks(stack, context)

        def run(length: int) -> int:
            total = args.samples * length
            none = torch.zeros(args.samples, dtype=torch.int64)
            stream = context.shard(
                Stream(
                    layout=Layout(lengths_to_offsets(none + length), timestamps=torch.zeros(total, dtype=torch.int64)),
                    event_rows=torch.arange(total),
                    tokens_per_event=1,
                )
            )
            values = torch.zeros(stream.num_local, width, requires_grad=True)
            stack(Tokens(**vars(stream), values=values)).sum().backward()
            return stream.num_local

        run(8)  # gradients of the weights, communication buffers, libraries
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        tokens = run(args.length)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        rows = mesh.tokens.gather(torch.tensor([[tokens, grown / 1024]], dtype=torch.float64))
    return {"tokens": float(rows[:, 0].max()), "peak_mib": float(rows[:, 1].max())}


def launch(ranks: int, arguments: list[str]) -> dict[str, float]:
    """Return the figures of the rank that needs most."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "result.json")
        command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        subprocess.run([sys.executable, *command, __file__, *arguments, "--rank-result", str(path)], check=True)
        found: dict[str, float] = json.loads(path.read_text())
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--length", type=int, default=1000)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--rank-result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank_result:
        found = measure(args)
        args.rank_result.write_text(json.dumps(found))
        return
    rows = []
    print(f"{args.samples} sequences of {args.length} tokens, {args.layers} layers, width 256, 4 heads, float32")
    print(f"{'context ranks':>14} {'tokens a rank':>14} {'peak MiB a rank':>16} {'of one rank':>12}")
    for ranks in (1, 2, 4):
        rounds = [launch(ranks, [a for a in sys.argv[1:] if a != "--write"]) for _ in range(args.rounds)]
        row = {"context_ranks": ranks, "tokens": rounds[0]["tokens"], "peak_mib": median(r["peak_mib"] for r in rounds)}
        rows.append(row | {"of_one": row["peak_mib"] / (rows[0]["peak_mib"] if rows else row["peak_mib"])})
        print(f"{ranks:>14} {row['tokens']:>14.0f} {row['peak_mib']:>16.0f} {rows[-1]['of_one']:>12.2f}", flush=True)
    if args.write:
        shape = {name: getattr(args, name) for name in ("samples", "length", "layers", "rounds")}
        record = {"date": date.today().isoformat(), "torch": torch.__version__, "device": "cpu", **shape, "rows": rows}
        RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
