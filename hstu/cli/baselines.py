"""`python -m hstu.cli.baselines --run-dir RUN`: popularity, repeats and item neighbours beside the score of a run.

They are made of the training split of a retrieval run and scored as its eval.json was, into baselines.json beside it.
A metric on which the model is not above each of them is named.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import Parser, add_import_flag, import_modules, underscore_flags

if TYPE_CHECKING:
    from hstu.parallel import Mesh


def main(argv: list[str] | None = None) -> int:
    """Print the table; 2 for a user's mistake."""
    parser = Parser(
        prog="python -m hstu.cli.baselines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run_dir", required=True, help="run directory, as runs/NAME")
    parser.add_argument("--neighbours", type=int, default=100, help="kept of each item; default: 100")
    parser.add_argument(
        "--gin_bindings", action="append", default=[], help="TrainerArgs.eval_batch_size=64; repeatable"
    )
    add_import_flag(parser)
    args = parser.parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: _compare(args, mesh), "; baselines.json is as it was")


def _compare(args: argparse.Namespace, mesh: Mesh) -> None:
    from hstu.inference.baselines import compare_with_baselines
    from hstu.inference.opened import open_trained

    import_modules(args.imports)
    found = compare_with_baselines(open_trained(args.run_dir, "latest", args.gin_bindings, mesh), args.neighbours)
    if mesh.is_main:
        print(table(found))


def table(found: dict[str, Any]) -> str:
    """One line for the model and each baseline, and what the model does not beat."""
    metrics = list(found["metrics"])
    lines = [" ".join([f"{'':16}", *(f"{metric:>16}" for metric in metrics)])]
    rows = {f"model, step {found['step']}": found["metrics"], **found["baselines"]}
    for name, values in rows.items():
        cells = ("undefined" if values[metric] is None else f"{values[metric]:.4f}" for metric in metrics)
        lines.append(" ".join([f"{name:16}", *(f"{cell:>16}" for cell in cells)]))
    lines += [f"{name} is left out: {reason}" for name, reason in found["left_out"].items()]
    for metric, names in found["not_beaten"].items():
        lines.append(f"THE MODEL DOES NOT BEAT {', '.join(names)} on {metric}")
    if not found["not_beaten"]:
        lines.append("the model beats every baseline")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
