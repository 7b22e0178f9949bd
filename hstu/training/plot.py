"""Curves of a run from its records: a PNG, and a sketch for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def _series(records: Records, metric: str) -> tuple[list[int], list[float]]:
    points = [
        (r["step"], r["metrics"][metric])
        for r in records
        if r["kind"] == "eval" and r["split"] == "valid" and r["metrics"].get(metric) is not None
    ]
    return [step for step, _ in points], [value for _, value in points]


def _losses(records: Records) -> tuple[list[int], list[float]]:
    train = [r for r in records if r["kind"] == "train"]
    return [r["step"] for r in train], [r["loss"] for r in train]


def draw_curves(records: Records, metrics: tuple[str, ...], final: dict[str, Any] | None, path: Path) -> None:
    """Draw the training loss and each validation metric over steps to ``path``.

    Args:
        records: Of ``metrics.jsonl``.
        metrics: Names of the validation metrics.
        final: The test record, drawn as a point, with ``best_possible`` as a line where it is known.
        path: A PNG file.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * (1 + len(metrics)), 3.4), layout="constrained")
    axes = figure.subplots(1, 1 + len(metrics), squeeze=False)[0]
    axes[0].plot(*_losses(records), color="#1f77b4", linewidth=1.2)
    axes[0].set(title="training loss", xlabel="step")
    for axis, name in zip(axes[1:], metrics, strict=True):
        axis.plot(*_series(records, name), color="#2ca02c", marker="o", markersize=3, label="validation")
        if final is not None and final["metrics"][name] is not None:
            axis.plot(final["step"], final["metrics"][name], "*", color="#d62728", markersize=10, label="test")
            best = (final.get("best_possible") or {}).get(name)
            if best is not None:
                axis.axhline(best, color="#7f7f7f", linestyle="--", linewidth=1, label="best possible")
        axis.set(title=name, xlabel="step")
        axis.legend(frameon=False, fontsize=8)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def draw_windows(records: Records, path: Path) -> None:
    """Draw each metric of the test ``records`` of windows over their numbers to ``path``, a PNG file."""
    from matplotlib.figure import Figure

    names = [*records[0]["metrics"]]
    figure = Figure(figsize=(4.2 * len(names), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        known = [(r["window"], r["metrics"][name]) for r in records if r["metrics"].get(name) is not None]
        axis.plot(*zip(*known, strict=True) if known else ([], []), color="#d62728", marker="o", markersize=3)
        axis.set(title=f"test {name}", xlabel="trained up to window")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def sketch_curves(records: Records, metric: str, best_possible: float | None = None, width: int = 72) -> str:
    """Return the training loss and validation ``metric`` over steps, drawn with characters."""
    import plotext

    panels = [
        ("training loss", *_losses(records), None),
        (f"validation {metric}", *_series(records, metric), best_possible),
    ]
    texts = []
    for title, steps, values, line in panels:
        if len(steps) < 2:
            continue
        plotext.clear_figure()
        plotext.theme("clear")
        plotext.plot_size(width, 12)
        plotext.plot(steps, values, marker="braille")
        if line is not None:
            plotext.hline(line)
        plotext.title(title if line is None else f"{title} (line: best possible, {line:.3f})")
        texts.append(plotext.uncolorize(plotext.build()))
    return "\n".join(texts)
