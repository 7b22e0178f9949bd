"""`python -m hstu.cli.plan`: memory and speed of a run on GPUs that are not here, and which degrees to choose.

    python -m hstu.cli.plan --gin-config-file F --nodes N --gpus-per-node G --gpu h100|h200|b200

The data set has to be here, for the sizes of tables and the lengths of sequences. Exit code 1 if nothing fits.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from hstu.cli.flags import Parser, add_import_flag, import_modules, underscore_flags
from hstu.config import Config, ConfigError, load_config, task_of

if TYPE_CHECKING:
    from hstu.data.batch import Batch
    from hstu.data.reader import SequenceDataset
    from hstu.training.hardware import Gpu

_SHOWN = 8


def main(argv: list[str] | None = None) -> int:
    """Print the plans; 2 for a user's mistake."""
    parser = Parser(
        prog="python -m hstu.cli.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gin_config_file", required=True, help="a path, or the name of one in configs/")
    parser.add_argument("--gin_bindings", action="append", default=[], help='"Class.field=value"; repeatable')
    add_import_flag(parser)
    parser.add_argument("--task", choices=["ranking", "retrieval"], help="default: the one whose Args are set")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--gpu", choices=["h100", "h200", "b200"], default="h100")
    parser.add_argument("--longest", action="store_true", help="how long a sequence fits, by NetworkArgs.recompute")
    parser.add_argument("--efficiency", type=float, default=0.4, help="share of the peak that arithmetic reaches")
    args = parser.parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    try:
        return plan(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(args: argparse.Namespace) -> int:
    """Print the plans of ``args``.

    Raises:
        ValueError: for a config that cannot be used, or a data set that is not here.
    """
    from hstu.data.loader import BatchLoader
    from hstu.data.reader import SequenceDataset
    from hstu.data.splits import make_splits
    from hstu.models import make_collator
    from hstu.training.hardware import GPUS
    from hstu.training.plan import fits, make_plans, measure_demand
    from hstu.training.run_data import find_dataset, sized
    from hstu.training.run_directory import RunDirectory

    if args.nodes < 1 or args.gpus_per_node < 1 or not 0 < args.efficiency <= 1:
        raise ConfigError("--nodes, --gpus-per-node", "must be above zero, and --efficiency at most 1")
    import_modules(args.imports)
    task = args.task or task_of([args.gin_config_file], args.gin_bindings)
    loaded = load_config(task, [args.gin_config_file], args.gin_bindings)
    path = find_dataset(loaded.config.dataset, RunDirectory(Path("runs")))
    config, dataset = sized(loaded, path, args.nodes * args.gpus_per_node).config, SequenceDataset.open(path)
    split, size = make_splits(config.dataset, dataset, config.recent_targets)["train"], config.trainer.train_batch_size
    collate = make_collator(config, dataset.schema)
    loader = BatchLoader(dataset=dataset, split=split, collate=collate, batch_size=size, shuffle=True)
    batch, gpu = next(loader.epoch(0)), GPUS[args.gpu]
    if args.longest:
        few = next(replace(loader, batch_size=max(1, size // 4)).epoch(0))
        print(longest_table(config, dataset, (few, batch), gpu, args))
        return 0
    demand = measure_demand(config, dataset, batch)
    plans = make_plans(config, demand, gpu, args.nodes, args.gpus_per_node, args.efficiency)
    rows = sum(table.rows for table in demand.tables)
    print(
        f"{task} on {dataset.schema.name}, {args.nodes} x {args.gpus_per_node} {args.gpu}: {demand.dense:,} dense "
        f"weights, {rows:,} rows of sharded tables\na data rank's batch: {size} sequences, {demand.tokens:,} tokens, "
        f"{demand.flops / 1e9:,.1f} GFLOP; {config.trainer.gradient_accumulation_steps} of them a step\n"
        f"arithmetic at {args.efficiency:.0%} of the peak, kernel launches not counted"
    )
    print("data ctx tp | memory GB: dense  tables  activ.    all | ms: step   arith traffic  tables   grads     ctx"
          "      tp |    tokens/s    MFU")  # fmt: skip
    for p in plans[:_SHOWN]:
        memory = (p.dense_memory, p.table_memory, p.activation_memory, p.memory)
        times = (p.step, p.arithmetic, p.traffic, p.table_time, p.gradient_time, p.context_time, p.tensor_time)
        print(
            f"{p.data:4} {p.context:3} {p.tensor:2} | {'':10}" + "".join(f"{size / 1e9:8.2f}" for size in memory)
            + " |" + "".join(f"{1e3 * time:8.2f}" if n else f"{1e3 * time:9.2f}" for n, time in enumerate(times))
            + f" | {p.tokens_per_second:11,.0f} {p.mfu:6.1%}" + ("" if fits(p, gpu) else "  does not fit")
        )  # fmt: skip
    best = plans[0]
    if not fits(best, gpu):
        print(f"nothing fits into {gpu.memory / 1e9:.0f} GB: take more GPUs, or lower TrainerArgs.train_batch_size")
        return 1
    print(
        f"choose ContextParallelArgs.context_parallel_size={best.context} "
        f"TensorModelParallelArgs.tensor_model_parallel_size={best.tensor} "
        f"TensorModelParallelArgs.sequence_parallel={best.tensor > 1}, which leaves {best.data} data rank(s)"
    )
    return 0


def longest_table(
    config: Config, dataset: SequenceDataset, batches: tuple[Batch, Batch], gpu: Gpu, args: argparse.Namespace
) -> str:
    """Return the longest sequence of a data rank by what is computed again, and by context ranks.

    Raises:
        ConfigError: if the ``batches``, a small one and a larger one, have as many tokens.
    """
    from hstu.training.plan import longest_sequence, measure_demand

    lines = [f"tokens of one sequence that fit into {args.gpu} GPUs ({gpu.memory / 1e9:.0f} GB), thousands"]
    for recompute in ("none", "selective", "full"):
        try:
            chosen = replace(config, network=replace(config.network, recompute=recompute))
            few, many = (measure_demand(chosen, dataset, batch) for batch in batches)
        except ConfigError as error:
            lines.append(f"{recompute:10} {error}")
            continue
        if few.tokens >= many.tokens:
            raise ConfigError("--longest", "compares batches of two sizes: TrainerArgs.train_batch_size must be larger")
        each, found = longest_sequence(chosen, few, many, gpu, args.nodes, args.gpus_per_node)
        if len(lines) == 1:
            lines.append("recompute  bytes a token |" + "".join(f" ctx {context:<5}" for context in found))
        lines.append(f"{recompute:10} {each:13,.0f} |" + "".join(f" {tokens / 1e3:9,.0f}" for tokens in found.values()))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
