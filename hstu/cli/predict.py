"""`python -m hstu.cli.predict`: recommendations of a retrieval run, or scores of a ranking run, in original ids.

A retrieval run writes user, rank, item, score: the k items that evaluation would rank first (the score is the
similarity, before the temperature; of equal scores the lower item id comes first). A ranking run writes user,
item and the probability of each kind of action, of the pairs in --candidates or of the held-out events.

--split says after which events is asked: `future`, all of them; `test` and `valid`, those before the event that
evaluation held out, which is then in the column `target` (a ranking run: `item`), and its number in `event`.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from hstu.cli.command import open_trained, run_on_mesh
from hstu.cli.flags import Parser, underscore_flags
from hstu.data.cleaning import Missing
from hstu.data.files import FORMATS

logger = logging.getLogger("hstu.cli")

if TYPE_CHECKING:
    import pyarrow as pa

    from hstu.config import Config
    from hstu.inference.prediction_requests import PredictionRequests
    from hstu.parallel import Mesh


def main(argv: list[str] | None = None) -> int:
    """Write the answers; 2 for a user's mistake."""
    args = make_parser().parse_args(underscore_flags(sys.argv[1:] if argv is None else argv))
    return run_on_mesh(lambda mesh: predict(args, mesh), f"; {args.output} is as it was")


def make_parser() -> argparse.ArgumentParser:
    """Return the flags; hyphens and underscores both work."""
    parser = Parser(
        prog="python -m hstu.cli.predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_run_flags(parser)
    parser.add_argument("--output", required=True, type=Path, help="parquet file to write")
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
    parser.add_argument(f"--{prefix}format", choices=FORMATS, help=f"of --{of}; default: by its ending")
    parser.add_argument(f"--{prefix}separator", help=f"between the fields of --{of}, as ';', '::' or tab")
    quoting = f"of --{of}; default: double for csv, none for tsv"
    parser.add_argument(f"--{prefix}quoting", choices=("double", "none"), help=quoting)
    parser.add_argument(f"--{prefix}columns", help=f"a,b,c: columns of --{of} if it has no header")
    parser.add_argument(f"--{prefix}encoding", help=f"of --{of}; default: utf-8, or utf-16 if it looks so")


def predict(args: argparse.Namespace, mesh: Mesh) -> None:
    """Answer ``args`` on all ranks; rank 0 writes the file.

    Raises:
        ValueError: for flags that do not fit the run, and for malformed files.
    """
    from hstu.inference.output import ParquetOutput
    from hstu.inference.prediction_requests import make_prediction_requests

    if args.top_k < 1:
        raise ValueError(f"--top_k = {args.top_k}: must be at least 1")
    trainer, step = open_trained(args.run_dir, args.checkpoint, args.gin_bindings, mesh)
    requests = make_prediction_requests(args, trainer)
    if trainer.config.task == "retrieval" and args.candidates is not None:
        raise ValueError("--candidates: a retrieval run ranks the whole catalogue; leave it out, or give a ranking run")
    if trainer.config.task == "ranking" and args.trained_only:
        raise ValueError("--trained_only: is for retrieval runs; a ranking run scores the pairs that it is given")
    if args.approximate is not None:
        _check_approximate(args, trainer.config)
    if trainer.config.task == "ranking" and args.candidates is None and args.split == "future":
        raise ValueError(
            "--candidates: is required to predict with a ranking run, which scores given (user, item) pairs"
        )
    about = {"run": Path(args.run_dir).name, "task": trainer.config.task, "step": step, "split": args.split}
    about |= {"protocol": trainer.config.dataset.protocol}
    if trainer.config.retrieval is not None:
        about |= {
            "top_k": args.top_k,
            "filter_seen": trainer.config.retrieval.filter_seen,
            "approximate": args.approximate,
            "trained_only": args.trained_only,
            "ties": "lower item id first",
        }
    with ParquetOutput(args.output, mesh, about) as output:
        for columns in _answers(args, trainer, requests, mesh, about):
            output.write(columns)
    logger.info("%d rows: %s", output.rows, args.output)


def _check_approximate(args: argparse.Namespace, config: Config) -> None:
    given = f"--approximate = {args.approximate}"
    if config.retrieval is None or config.retrieval.similarity != "mol":
        raise ValueError(f"{given}: is for RetrievalArgs.similarity = 'mol'; other scores are exact at that price")
    if args.approximate < args.top_k:
        raise ValueError(f"{given}: must be at least --top_k = {args.top_k}")


def _answers(
    args: argparse.Namespace, trainer: Any, requests: PredictionRequests, mesh: Mesh, about: dict[str, Any]
) -> Iterator[dict[str, pa.Array]]:
    """Yield the columns of the file, batch by batch; at the end ``about`` has the number of requests answered."""
    from hstu.inference import recommend, score_candidates

    loader = replace(trainer.loaders["test"], dataset=requests.dataset, split=requests.split)
    if trainer.config.retrieval is None:
        for rows, scores in score_candidates(trainer.model, loader, mesh):
            yield requests.scores(rows, scores)
        return
    filter_seen = trainer.config.retrieval.filter_seen
    options: dict[str, Any] = dict(filter_seen=filter_seen, num_candidates=args.approximate)
    if args.trained_only:
        options["keep"] = keep = trainer.trained_items.to(mesh.device)
        logger.info("--trained_only: %d of %d items are left out", int((~keep).sum()), keep.numel())
    answered = fewer = without = 0
    for rows, best in recommend(trainer.model, loader, mesh, args.top_k, **options):
        found = (best.items >= 0).sum(1)
        answered += rows.numel()
        fewer += int((found < args.top_k).sum())
        without += int((found == 0).sum())
        yield requests.recommendations(rows, best)
    about |= {"num_requests": answered, "fewer_than_top_k": fewer, "without_items": without}
    who = "held-out events" if requests.held_out else "users"
    if silent := len(requests.split) - answered:
        logger.info("%d of %d %s have no history to go by and get no answer", silent, len(requests.split), who)
    if fewer:
        reason = "they have seen the rest (RetrievalArgs.filter_seen = True)" if filter_seen else "there are no more"
        reason += ", untrained ones left out" if args.trained_only else ""
        logger.info("%d of %d %s get fewer than %d items, %d of them none: %s",
                    fewer, answered, who, args.top_k, without, reason)  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
