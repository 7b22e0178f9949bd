"""`python -m hstu.cli.inspect PATH [--output FILE.png]`: what a preprocessed data set holds, and what looks wrong."""

from __future__ import annotations

import logging
import signal
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from hstu.cli.flags import Parser
from hstu.data.files import printable
from hstu.data.overview import Overview, examples, overview, size_of
from hstu.data.overview_plot import draw_overview, sketch_overview
from hstu.data.reader import SequenceDataset
from hstu.data.schema import Feature
from hstu.quiet import warn_only


def report(dataset: SequenceDataset, found: Overview) -> str:
    """The text that the command prints."""
    schema, lengths = dataset.schema, found.lengths
    lines = [f"{schema.name}  ({dataset.path})", ""]
    lines += [f"  {'users':16} {dataset.num_users:>14,}", f"  {'events':16} {dataset.num_events:>14,}"]
    lines.append(f"  {'events a user':16} {_spread(lengths)}")
    lines.append(f"  {'events an item':16} {_spread(found.popularity)}")
    share = found.seen_again / max(1, dataset.num_events)
    lines.append(
        f"  {'repeats':16} {found.seen_again:>14,}, {share:.1%} of the events, of an item that their user met before"
    )
    if schema.time is not None:
        first, last = (_date(second) for second in dataset.time_range())
        lines.append(f"  {'time':16} {first} to {last}")
    lines += ["", "features"]
    lines += [_described(feature, found.missing.get(feature.name, 0.0)) for feature in schema.features]
    with warn_only("no sketch of lengths and popularity"):
        lines += ["", sketch_overview(found)]
    lines += ["", "examples, with the newest events last"]
    lines += [_example(user) for user in examples(dataset)]
    lines += ["", "warnings", *(f"  {warning}" for warning in found.warnings or ["none"])]
    return "\n".join(lines)


def _described(feature: Feature, missing: float) -> str:
    whose, about = str(feature.role), [*(feature.bits or [feature.action_type or ""])]
    if feature.role in ("feature", "control"):
        whose, about = str(feature.level), ["kept, no input" if feature.role == "control" else str(feature.kind)]
        about += [] if feature.known_at_request else ["known after the request"]
        about += [] if feature.table in (None, feature.name) else [f"table {feature.table}"]
    if (known := feature.statistics) is not None:
        about.append(f"mean {known.mean:.4g}, deviation {known.std:.4g}, median {known.quantiles[50]:.4g}")
    if missing:
        about.append(f"{missing:.1%} missing")
    return f"  {feature.name:24} {whose:8} {size_of(feature):>16}  {', '.join(about)}".rstrip()


def _spread(counts: np.ndarray) -> str:
    low, middle, high = np.quantile(counts, [0, 0.5, 1], method="nearest")
    return f"{low:,} to {high:,}, median {middle:,}, mean {counts.mean():,.1f}"


def _date(second: int) -> str:
    try:
        return f"{datetime.fromtimestamp(int(second), UTC):%Y-%m-%d %H:%M:%S}"
    except (ValueError, OverflowError, OSError):  # before year 1 or after 9999: no calendar time
        return str(second)


def _example(user: dict[str, Any]) -> str:
    contexts = "".join(f" {name}={printable(value)}" for name, value in user["contexts"].items())
    lines = [f"  user {printable(user['user'])}: {user['length']:,} events{contexts}"]
    for item, action, time, features in user["events"]:
        shown = "" if action is None else f"  action {printable(action)}"
        shown += "".join(
            f"  {name} {printable(_short(value))}" for name, value in features.items() if value is not None
        )
        lines.append(f"      {'' if time is None else _date(time):20} item {printable(item)}{shown}")
    return "\n".join(lines)


def _short(value: Any) -> Any:
    """A number of four digits, of a list the first values."""
    if isinstance(value, list):
        shown = ", ".join(str(_short(one)) for one in value[:4])
        return f"[{shown}{', ...' if len(value) > 4 else ''}]"
    return f"{value:.4g}" if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> int:
    """Print the report; 2 if there is no data set or the picture cannot be written."""
    parser = Parser(prog="python -m hstu.cli.inspect", description=__doc__)
    parser.add_argument("path", type=Path, help="directory of a data set, as tmp_data/ml-1m")
    parser.add_argument("--output", type=Path, metavar="FILE.png", help="where to draw the distributions")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        dataset = SequenceDataset.open(arguments.path, check="all")
        found = overview(dataset)
        print(report(dataset, found))
        if arguments.output is not None:
            _draw(found, dataset.schema.name, arguments.output)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _draw(found: Overview, name: str, output: Path) -> None:
    try:
        draw_overview(found, name, output)
    except OSError as error:
        raise ValueError(f"--output = {str(output)!r}: cannot be written ({error.strerror})") from None
    print(f"\npicture: {output}")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # piped into head, it ends without a traceback
    sys.exit(main())
