"""Small charts as SVG that takes its colours from the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 520, 240, 56, 30, 10, 12


@dataclass(frozen=True, kw_only=True)
class Line:
    """A curve.

    Attributes:
        name: What it is.
        x: Ascending.
        y: As many.
        color: Number of its colour, which is that of a run on the whole page.
        level: Whether it is a level to compare with, drawn dashed from side to side.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    color: int = 0
    level: bool = False


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """Return curves over steps as a figure; of no points, a sentence."""
    points = [(x, y) for line in lines if not line.level for x, y in zip(line.x, line.y, strict=True)]
    if not points:
        return f"<figure><figcaption>{escape(title)}</figcaption><p>No points were logged.</p></figure>"
    xs, ys = [x for x, _ in points], [y for line in lines for y in line.y]
    (x0, x1), (y0, y1) = _range(xs, 0.0), _range(ys, 0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _BOTTOM - _TOP)

    parts = _axes(x0, x1, y0, y1)
    for line in lines:
        hint = f"<title>{escape(line.name)}</title>"
        if line.level:
            _, down = place(x0, line.y[0])
            parts.append(f'<line class="level" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}">'
                         f"{hint}</line>")  # fmt: skip
            continue
        spots = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in spots)
        parts.append(f'<polyline class="c{line.color % 8}" points="{path}">{hint}</polyline>')
        if len(spots) <= 60:
            parts += [
                f'<circle class="c{line.color % 8}" cx="{x:.1f}" cy="{y:.1f}" r="2.5">'
                f"<title>{escape(line.name)}: step {step:g}, {value:.4g}</title></circle>"
                for (x, y), step, value in zip(spots, line.x, line.y, strict=True)
            ]
    return _figure(title, parts)


def bar_chart(title: str, heights: Sequence[float], labels: Sequence[str]) -> str:
    """Return bars of counts as a figure, each with its label where the pointer is."""
    top = max([*heights, 1])
    width = (_WIDTH - _LEFT - _RIGHT) / max(1, len(heights))
    parts = _axes(None, None, 0, top)
    for number, (height, label) in enumerate(zip(heights, labels, strict=True)):
        tall = height / top * (_HEIGHT - _BOTTOM - _TOP)
        parts.append(f'<rect class="c0" x="{_LEFT + number * width + 1:.1f}" width="{max(1.0, width - 2):.1f}" '
                     f'y="{_HEIGHT - _BOTTOM - tall:.1f}" height="{tall:.1f}"><title>{escape(label)}: {height:,.0f}'
                     f"</title></rect>")  # fmt: skip
    if labels:
        ends = ((labels[0], "start", _LEFT), (labels[-1], "end", _WIDTH - _RIGHT))
        parts += [
            f'<text x="{x}" y="{_HEIGHT - 8}" text-anchor="{side}">{escape(text)}</text>' for text, side, x in ends
        ]
    return _figure(title, parts)


def _figure(title: str, parts: list[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    spare = (high - low) * margin or (abs(high) * 0.05 or 1.0) * (high == low)
    return low - spare, high + spare


def _axes(x0: float | None, x1: float | None, y0: float, y1: float) -> list[str]:
    parts = []
    for share in (0.0, 0.5, 1.0):
        down = _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{down:.1f}" y2="{down:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{down + 4:.1f}" text-anchor="end">{y0 + share * (y1 - y0):.3g}</text>')
        if x0 is not None and x1 is not None:
            across = _LEFT + share * (_WIDTH - _LEFT - _RIGHT)
            side = {0.0: "start", 0.5: "middle", 1.0: "end"}[share]
            text = f"{x0 + share * (x1 - x0):,.0f}"
            parts.append(f'<text x="{across:.1f}" y="{_HEIGHT - 8}" text-anchor="{side}">{text}</text>')
    return parts
