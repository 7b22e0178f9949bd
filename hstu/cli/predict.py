"""`python -m hstu.cli.predict`: recommendations of a retrieval run, or scores of a ranking run, in original ids.

A retrieval run writes user, rank, item, score: the k items that evaluation would rank first (the score is the
similarity, before the temperature; of equal scores the lower item id comes first). A ranking run writes user,
item and the probability of each kind of action, of the pairs in --candidates or of the held-out events.

--split says after which events is asked: `future`, all of them; `test` and `valid`, those before the event that
evaluation held out, which is then in the column `target` (a ranking run: `item`), and its number in `event`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from hstu.cli.command import run_on_mesh
from hstu.cli.flags import Parser, add_import_flag, import_modules, underscore_flags
from hstu.data.cleaning import Missing
from hstu.data.files import FORMATS, FileFormat

if TYPE_CHECKING:
    from hstu.inference.prediction_requests import RequestSpec
    from hstu.parallel import Mesh


def main(argv: list[str] | None = None) -> int:
    """Write the answers; 2 for a user's mistake."""
    args = make_parser().parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: _predict(args, mesh), f"; {args.output} is as it was")


def make_parser() -> argparse.ArgumentParser:
    """Return the flags; hyphens and underscores both work."""
    parser = Parser(
        prog="python -m hstu.cli.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser)
    parser.add_argument("--output", required=True, type=Path, help="parquet file to write")
    parser.add_argument(
        "--windows",
        action="store_true",
        help="of a run over windows of time: the answers of each window, --output being a directory of them",
    )
    parser.add_argument("--split", choices=("future", "test", "valid"), default="future", help="default: future")
    parser.add_argument("--top_k", type=int, default=10, help="items per user of a retrieval run; default: 10")
    parser.add_argument(
        "--approximate",
        type=int,
        metavar="N",
        help="mixture of logits: score only the N items that a cheap dot product puts first; default: all items",
    )
    parser.add_argument(
        "--trained_only", action="store_true", help="leave out items that no training sample of the run shows"
    )
    parser.add_argument("--candidates", type=Path, help="file of user and item: what a ranking run scores")
    parser.add_argument(
        "--memory", type=Path, help="directory of python -m hstu.cli.memory: old events are not run again"
    )
    parser.add_argument("--refresh", action="store_true", help="first make memory that is missing or stale")
    add_user_flags(parser)
    add_format_flags(parser, "candidates")
    return parser


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Define which model answers."""
    parser.add_argument("--run_dir", required=True, help="run directory, as runs/NAME")
    parser.add_argument("--checkpoint", default="best", help="latest, best, a step, or a path; default: best")
    parser.add_argument(
        "--gin_bindings", action="append", default=[], help="TrainerArgs.eval_batch_size=64; repeatable"
    )
    add_import_flag(parser)


def add_user_flags(parser: argparse.ArgumentParser) -> None:
    """Define who asks, and when."""
    parser.add_argument(
        "--users",
        type=Path,
        help="new histories (a file, directory or pattern), or only a column of users of the data set",
    )
    add_format_flags(parser, "users", prefix="")
    parser.add_argument("--time_format", help="pattern of the times, as %%d.%%m.%%Y; default: ISO dates or numbers")
    parser.add_argument(
        "--missing",
        choices=get_args(Missing),
        default="error",
        help="rows that lack an id or a time; keep takes NA, NULL, NaN and None for ids; default: error",
    )
    for role in ("user", "item", "time", "action"):
        parser.add_argument(f"--{role}_column", help="in --users and --candidates; default: the data set's name for it")
    parser.add_argument(
        "--missing_features",
        choices=("error", "allow"),
        default="error",
        help="features the model reads and a table lacks; allow takes them for missing values; default: error",
    )
    parser.add_argument(
        "--set_separator", default="|", help="between the members of sets, within one column; default: |"
    )
    parser.add_argument(
        "--unknown_items",
        choices=("error", "drop"),
        default="error",
        help="items the model does not know; default: error",
    )
    parser.add_argument(
        "--request_time",
        help="when the future is asked about: seconds, an ISO date, or now; default: each user's last event",
    )


def add_format_flags(parser: argparse.ArgumentParser, of: str, prefix: str | None = None) -> None:
    """Define how the file of the flag ``of`` is read; their names begin with ``prefix``, by default that flag's."""
    prefix = f"{of}_" if prefix is None else prefix
    parser.add_argument(f"--{prefix}format", help=f"of --{of}: {', '.join(FORMATS)}; default: by its ending")
    parser.add_argument(f"--{prefix}separator", help=f"between the columns of --{of}, as ';', '::' or tab")
    quoting = f"of --{of}; default: double for csv, none for tsv"
    parser.add_argument(f"--{prefix}quoting", choices=("double", "none"), help=quoting)
    parser.add_argument(f"--{prefix}columns", help=f"a,b,c: columns of --{of} if it has no header")
    parser.add_argument(f"--{prefix}encoding", help=f"of --{of}; default: utf-8, or utf-16 if it looks so")


def request_spec(args: argparse.Namespace) -> RequestSpec:
    """Return what the flags of ``add_user_flags`` ask, and those of ``predict`` if they are there."""
    from hstu.inference.prediction_requests import RequestSpec

    names = {field.name for field in fields(RequestSpec)} & set(vars(args))
    given = {name: getattr(args, name) for name in names}
    given["users_format"] = _file_format(args, "")
    if "candidates" in names:
        given["candidates_format"] = _file_format(args, "candidates_")
    return RequestSpec(**given)


def _file_format(args: argparse.Namespace, prefix: str) -> FileFormat:
    """Return how to read the file whose flags begin with ``prefix``."""
    names = [field.name for field in fields(FileFormat) if field.name != "prefix"]
    return FileFormat(**{name: getattr(args, prefix + name) for name in names}, prefix=prefix)


def _predict(args: argparse.Namespace, mesh: Mesh) -> None:
    from hstu.inference.answers import AnswerOptions, predict
    from hstu.inference.opened import open_trained
    from hstu.training.windows import begun_windows

    names = ("top_k", "approximate", "trained_only", "memory", "refresh")
    options = AnswerOptions(**{name: getattr(args, name) for name in names})
    if args.top_k < 1:
        raise ValueError(f"--top_k = {args.top_k}: must be at least 1")
    import_modules(args.imports)
    spec = request_spec(args)
    runs = {args.output: args.run_dir}
    if args.windows:
        windows = mesh.on_main(lambda: begun_windows(Path(args.run_dir)))
        if not windows:
            raise ValueError(f"--run_dir = {str(args.run_dir)!r}: has no windows; leave --windows out")
        runs = {args.output / f"{window.name}.parquet": window for window in windows}
    for output, run in runs.items():
        predict(open_trained(run, args.checkpoint, args.gin_bindings, mesh), spec, options, output)


if __name__ == "__main__":
    sys.exit(main())
