"""`python -m hstu.cli.attention`: who attends to whom for a few users, in a new directory.

attention.safetensors: "<user>/layer<l>", [heads, n, n], the weights that the layer used, rows attend to columns;
attention.json: users in original ids and the names of their tokens; attention.png: means over heads.
For the backbones hstu, sasrec, llama and bert.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import Parser, import_modules, underscore_flags
from hstu.cli.predict import add_run_flags, add_user_flags, request_spec

if TYPE_CHECKING:
    from hstu.parallel import Mesh


def main(argv: list[str] | None = None) -> int:
    """Write the files; 2 for a user's mistake."""
    parser = Parser(
        prog="python -m hstu.cli.attention", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser)
    parser.add_argument("--output", required=True, type=Path, help="directory to write; must not exist")
    parser.add_argument("--num_users", type=int, default=3, help="the first ones; default: 3")
    parser.add_argument("--split", choices=("future", "test", "valid"), default="test", help="default: test")
    add_user_flags(parser)
    args = parser.parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: _write(args, mesh), f"; {args.output} is not written")


def _write(args: argparse.Namespace, mesh: Mesh) -> None:
    from hstu.inference.attention import WHOLE_LAYERS, write_attention
    from hstu.inference.opened import open_trained

    import_modules(args.imports)
    opened = open_trained(args.run_dir, args.checkpoint, [*WHOLE_LAYERS, *args.gin_bindings], mesh)
    write_attention(opened, request_spec(args), args.output, args.num_users)


if __name__ == "__main__":
    sys.exit(main())
