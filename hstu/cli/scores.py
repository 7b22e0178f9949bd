"""`python -m hstu.cli.scores RUN_DIR...`: final test scores, beside the best possible ones where known.

Runs of the protocol `windows` get the mean over their windows below.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from hstu.cli.flags import Parser


def read(run_dir: Path) -> dict[str, Any]:
    """The final test record of a run.

    Raises:
        ValueError: the run has no `eval.json`, or it is not one that a run writes.
    """
    path = run_dir / "eval.json"
    if not path.is_file():
        raise ValueError(f"{path}: not found; a run writes it when training or --mode eval has finished")
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run --mode eval again") from None
    if not isinstance(record, dict) or not isinstance(record.get("metrics"), dict):
        raise ValueError(f"{path}: has no 'metrics'; run --mode eval again")
    return record


def table(runs: dict[str, dict[str, Any]]) -> str:
    """One line per run and metric: score, best possible score, and their ratio."""
    lines = [f"{'run':28} {'test metric':12} {'score':>8} {'best possible':>14} {'ratio':>7}"]
    for name, record in runs.items():
        best = record.get("best_possible") or {}
        # Where the best score is known for some metrics, the others would only distract.
        for metric, value in record["metrics"].items():
            if value is None or (best and not best.get(metric)):
                continue
            line = f"{name:28} {metric:12} {value:8.4f}"
            if best.get(metric):
                line += f" {best[metric]:14.4f} {value / best[metric]:7.1%}"
            lines.append(line)
    windows = [record for record in runs.values() if record.get("protocol") == "windows"]
    for metric in windows[0]["metrics"] if len(windows) > 1 else ():
        scores = [record["metrics"].get(metric) for record in windows]
        if None not in scores:
            lines.append(f"{f'mean of {len(scores)} runs':28} {metric:12} {sum(scores) / len(scores):8.4f}")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Print the table; 2 if a run has no scores."""
    parser = Parser(prog="python -m hstu.cli.scores", description=__doc__)
    parser.add_argument("run_dir", nargs="+", type=Path, help="run directory, as runs/NAME")
    try:
        print(table({str(path): read(path) for path in parser.parse_args(argv).run_dir}))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
