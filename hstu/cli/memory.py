"""`python -m hstu.cli.memory`: the old events of all users compressed once, for `predict --memory` to answer from.

The run needs memory tokens (MemoryArgs). --output is a directory of memory-mapped files with the keys and values of
each user's context and memory tokens in every layer; what is there already stays, so that a command that was stopped
goes on, and new users are added. --refresh also makes the memory again of users who have had more events since than
MemoryArgs.recent_item_num. --split says before which events, as in predict: memory for `test` answers
`predict --split test`. Under torchrun each rank does a part of the users.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import Parser, underscore_flags
from hstu.cli.predict import add_run_flags, add_user_flags, request_spec

if TYPE_CHECKING:
    from hstu.parallel import Mesh

logger = logging.getLogger("hstu.cli")


def main(argv: list[str] | None = None) -> int:
    """Write the memory; 2 for a user's mistake."""
    parser = Parser(
        prog="python -m hstu.cli.memory", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser)
    parser.add_argument("--output", required=True, type=Path, help="directory to write or to add to")
    parser.add_argument("--split", choices=("future", "test", "valid"), default="future", help="default: future")
    parser.add_argument("--refresh", action="store_true", help="also make stale memory again")
    add_user_flags(parser)
    args = parser.parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: _compress(args, mesh), "; the same command goes on")


def _compress(args: argparse.Namespace, mesh: Mesh) -> None:
    from hstu.inference.memory import update_memory
    from hstu.inference.memory_files import read_record
    from hstu.inference.opened import open_trained
    from hstu.inference.prediction_requests import make_prediction_requests

    spec = request_spec(args)
    opened = open_trained(args.run_dir, args.checkpoint, args.gin_bindings, mesh)
    counts = update_memory(
        opened, make_prediction_requests(spec, opened), spec.split, args.output, refresh=args.refresh
    )
    size = read_record(args.output).bytes_per_user
    kept = "made again" if args.refresh else "left as they are (--refresh makes them again)"
    logger.info(
        "%s: %d users of %d bytes each; %d are new, %d stale ones %s",
        *(args.output, counts.users, size, counts.missing, counts.stale, kept),
    )


if __name__ == "__main__":
    sys.exit(main())
