"""`python -m hstu.cli.export`: what other systems need of a run, as plain files in a new directory.

items.parquet (item, vector), users.parquet (user, vector after the whole history), both in original ids: the dot
product of two vectors is the score that evaluation ranks by (with a mixture of logits, the vectors are what the
similarity module combines: its vectors and its gate, side by side). dense.safetensors: every weight but the sharded
tables. items.faiss, with --faiss: an exact inner-product index, whose position i is row i of items.parquet.
export.json: what all this is. A ranking run has no vectors, only dense weights.

With --since STEP, of a run with dynamic tables: in place of vectors tables/<table>.parquet (original id, its number,
the last step in which it was trained, the weights of its row) for the rows that were trained after STEP, and
tables/<table>.evicted.parquet for the ids that lost their rows after STEP and have none.

With --format torch-export, in place of all this: the model as programs of torch.export (dense.pt2, similarity.pt2),
tables.safetensors, vocabularies, and reader.py, which answers as predict does and needs torch and numpy alone; with
--compile also the programs as machine code, which needs a C++ compiler. (Any other --format is that of --users.)
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import Parser, import_modules, underscore_flags
from hstu.cli.predict import add_run_flags, add_user_flags, request_spec

if TYPE_CHECKING:
    from hstu.parallel import Mesh


def main(argv: list[str] | None = None) -> int:
    """Write the files; 2 for a user's mistake."""
    parser = Parser(
        prog="python -m hstu.cli.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser)
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must not exist")
    parser.add_argument("--faiss", action="store_true", help="also write items.faiss; needs faiss-cpu")
    parser.add_argument("--since", type=int, metavar="STEP", help="only what changed after STEP; see above")
    parser.add_argument("--compile", action="store_true", help="of --format torch-export: also compile; see above")
    add_user_flags(parser)
    args = parser.parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: _export(args, mesh), f"; {args.output} is not written")


def _export(args: argparse.Namespace, mesh: Mesh) -> None:
    from hstu.inference.export import ExportOptions, Format, export
    from hstu.inference.opened import open_trained

    chosen = {}
    if args.format in get_args(Format):
        chosen["format"], args.format = args.format, None
    options = ExportOptions(
        users=request_spec(args), faiss=args.faiss, since=args.since, compiled=args.compile, **chosen
    )
    options.check()  # before anything is opened
    import_modules(args.imports)
    export(open_trained(args.run_dir, args.checkpoint, args.gin_bindings, mesh), args.output, options)


if __name__ == "__main__":
    sys.exit(main())
