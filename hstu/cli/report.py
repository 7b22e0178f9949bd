"""`python -m hstu.cli.report RUN [RUN ...] --output report.html`: one page about runs, which needs no network.

Curves of all runs together, test scores with standard errors beside baselines (of python -m hstu.cli.baselines) and
best possible, the data set, fields in which the configs differ, speed and memory, and ten test users each: history,
what came then, what was recommended, and who attends to whom. --items names items by a column of a file. Under torchrun
the ranks ask the models together.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import Parser, underscore_flags

if TYPE_CHECKING:
    from hstu.parallel import Mesh


def main(argv: list[str] | None = None) -> int:
    """Write the page; 2 for a user's mistake."""
    parser = Parser(
        prog="python -m hstu.cli.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", nargs="+", type=Path, help="run directory, as runs/NAME")
    parser.add_argument("--output", required=True, type=Path, help="HTML file to write")
    parser.add_argument("--items", type=Path, help="file of items, one row each")
    parser.add_argument("--item_column", help="its column of items")
    parser.add_argument("--name_column", help="its column of names")
    args = parser.parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: _report(args, mesh), f"; {args.output} is as it was")


def _report(args: argparse.Namespace, mesh: Mesh) -> None:
    from hstu.data.files import read_table
    from hstu.inference.report import write_report

    given = [args.items, args.item_column, args.name_column]
    if any(given) and not all(given):
        raise ValueError("--items, --item_column and --name_column: give all three, or none of them")
    names = None
    if args.items is not None:
        table = read_table(args.items, [args.item_column, args.name_column])
        columns = (table[column].cast(str).to_list() for column in (args.item_column, args.name_column))
        names = {item: name for item, name in zip(*columns, strict=True) if item is not None and name is not None}
    write_report(args.run, args.output, mesh, names=names)
    print(f"report: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
