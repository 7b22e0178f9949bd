"""Facts to a page: sections, tables, charts, and the style of all."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from hstu.data.overview import Overview
from hstu.inference.report.facts import Example, Facts
from hstu.inference.report.svg import Line, bar_chart, line_chart

_STYLE = """
:root{color-scheme:light dark;--ink:#1d2430;--dim:#5b6472;--page:#fff;--box:#f4f6f9;--rule:#d5dae2;--hit:#d8f3dc;
--c0:#2563eb;--c1:#d9480f;--c2:#2b8a3e;--c3:#9c36b5;--c4:#0b7285;--c5:#a61e4d;--c6:#5f6b00;--c7:#495057}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--dim:#a3acba;--page:#12161d;--box:#1c222c;--rule:#333c49;
--hit:#1f4d2b;--c0:#7aa7ff;--c1:#ff9a62;--c2:#69d089;--c3:#dd9cf0;--c4:#5fd0e6;--c5:#ff8fb3;--c6:#d3d94f;--c7:#c1c8d1}}
*{box-sizing:border-box}body{margin:0 auto;max-width:1100px;padding:1rem;font:16px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--page)}h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}
nav a{display:inline-block;margin-right:1rem;padding:.25rem 0}a{color:var(--c0)}
:focus-visible{outline:3px solid var(--c1);outline-offset:2px}
.wide{overflow-x:auto}.wide td{white-space:nowrap}.wide td.text{white-space:normal}
table{border-collapse:collapse;font-size:.9rem}caption{text-align:left;color:var(--dim)}
th,td{padding:.3rem .7rem;border-bottom:1px solid var(--rule);text-align:right;vertical-align:top;
font-variant-numeric:tabular-nums}th:first-child,td:first-child,td.text{text-align:left}td.text{word-break:break-word}
thead th{color:var(--dim);font-weight:600}.grid-of{display:grid;gap:1rem;
grid-template-columns:repeat(auto-fit,minmax(min(100%,320px),1fr))}
figure,details{margin:0;padding:.7rem;background:var(--box);border-radius:.5rem}figcaption{font-weight:600}
svg{width:100%;height:auto;display:block}svg text{fill:var(--dim);font-size:12px}.grid{stroke:var(--rule)}
.level{stroke:var(--dim);stroke-dasharray:6 4;stroke-width:1.5}polyline{fill:none;stroke-width:2}
img{max-width:100%;height:auto}.pixels{width:100%;image-rendering:pixelated}
details figcaption{font-weight:400;font-size:.85rem}summary{cursor:pointer;padding:.2rem}.hit{background:var(--hit)}
.key{display:inline-block;width:.8em;height:.8em;border-radius:50%;margin-right:.4em}.dim{color:var(--dim)}
ol,ul{margin:.3rem 0;padding-left:1.4rem}
""" + "".join(
    f"polyline.c{n}{{stroke:var(--c{n})}}circle.c{n},rect.c{n}{{fill:var(--c{n})}}.key.c{n}{{background:var(--c{n})}}"
    for n in range(8)
)


def make_page(
    runs: Sequence[Facts],
    data: dict[str, Overview],
    examples: dict[str, list[Example]],
    names: dict[str, dict[str, str]],
    notes: Sequence[str],
) -> str:
    """Return the whole page.

    Args:
        runs: In the order of their colours.
        data: Name of a data set -> what it is like.
        examples: Name of a run -> test events.
        names: Name of a run -> item -> what it is called.
        notes: Why something is not there.
    """
    sections = [
        ("scores", "Scores", _scores(runs)),
        ("curves", "Curves", _curves(runs)),
        ("data", "Data", "".join(_data(name, found) for name, found in data.items())),
        ("examples", "Example users", "".join(_examples(run, found, names[run]) for run, found in examples.items())),
        ("attention", "Attention", _pictures(runs)),
        ("settings", "Settings", _settings(runs)),
        ("speed", "Speed and memory", _speed(runs)),
    ]
    sections = [section for section in sections if section[2]]
    links = "".join(f'<a href="#{place}">{title}</a>' for place, title, _ in sections)
    body = "".join(f'<section id="{place}"><h2>{title}</h2>{html}</section>' for place, title, html in sections)
    said = "".join(f"<p class=dim>{escape(note)}</p>" for note in notes)
    title = escape(", ".join(run.name for run in runs))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, '
        f'initial-scale=1"><link rel="icon" href="data:,"><title>{title}</title><style>{_STYLE}</style></head><body>'
        f'<header><h1>{title}</h1><nav aria-label="Sections">{links}</nav></header><main>{said}{body}</main></body>'
        "</html>\n"
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], caption: str, text: Sequence[int] = ()) -> str:
    """Return a table that scrolls sideways where it is too wide; cells are HTML."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = []
    for row in rows:
        cells = "".join(f"<td{' class=text' if n in text else ''}>{cell}</td>" for n, cell in enumerate(row[1:], 1))
        lines.append(f'<tr><th scope="row">{row[0]}</th>{cells}</tr>')
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(caption)}"><table><caption>{escape(caption)}'
        f"</caption><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4f}"


def _key(number: int, name: str) -> str:
    return f'<span class="key c{number % 8}"></span>{escape(name)}'


def _scores(runs: Sequence[Facts]) -> str:
    metrics = list(dict.fromkeys(name for run in runs for name in run.test.get("metrics", {})))
    rows = []
    for number, run in enumerate(runs):
        errors = run.test.get("standard_errors") or {}
        values = run.test.get("metrics", {})
        cells = [_number(values.get(m)) + (f" ± {errors[m]:.4f}" if errors.get(m) else "") for m in metrics]
        rows.append([_key(number, run.name), f"{run.test['step']:,}" if run.test else "not tested yet", *cells])
        best = run.test.get("best_possible") or {}
        others = {**run.baselines, **({"best possible": best} if any(best.values()) else {})}
        for name, known in others.items():
            rows.append([f'<span class="dim">{escape(name)}</span>', "", *(_number(known.get(m)) for m in metrics)])
    about = "Test scores of the checkpoint that validation chose, ± one standard error over users"
    return _table(["run", "step", *metrics], rows, about)


def _curves(runs: Sequence[Facts]) -> str:
    losses, metrics = [], dict[str, list[Line]]()
    for number, run in enumerate(runs):
        train = [record for record in run.records if record["kind"] == "train"]
        steps = [record["step"] for record in train]
        losses.append(Line(name=run.name, x=steps, y=[record["loss"] for record in train], color=number))
        valid = [r for r in run.records if r["kind"] == "eval" and r.get("split") == "valid"]
        for name in dict.fromkeys(name for record in valid for name in record["metrics"]):
            points = [(r["step"], r["metrics"][name]) for r in valid if r["metrics"].get(name) is not None]
            metrics.setdefault(name, []).append(
                Line(name=run.name, x=[x for x, _ in points], y=[y for _, y in points], color=number)
            )
    for name, lines in metrics.items():
        known = {run.test["best_possible"].get(name) for run in runs if run.test.get("best_possible")} - {None}
        lines += [Line(name="best possible on test", x=[], y=[level], level=True) for level in known]
    legend = "".join(f"<li>{_key(number, run.name)}</li>" for number, run in enumerate(runs))
    charts = [line_chart("training loss", losses)]
    charts += [line_chart(f"validation {name}", lines) for name, lines in metrics.items()]
    return f'<ul aria-label="Colours">{legend}</ul><div class="grid-of">{"".join(charts)}</div>'


def _data(name: str, found: Overview) -> str:
    events, users, items = int(found.lengths.sum()), len(found.lengths), len(found.popularity)
    share = found.seen_again / max(1, events)
    facts = [f"{users:,} users, {items:,} items, {events:,} events.",
             f"{share:.1%} of the events are of an item that their user met before.", *found.warnings]  # fmt: skip
    heights, labels = _histogram(found.lengths)
    most = np.sort(found.popularity)[::-1]
    parts = np.array_split(most, min(50, max(1, len(most))))
    places = np.cumsum([0, *map(len, parts)])
    ranks = [f"items {low + 1:,} to {high:,} by popularity" for low, high in zip(places[:-1], places[1:], strict=True)]
    return (
        f"<h3>{escape(name)}</h3><ul>{''.join(f'<li>{escape(fact)}</li>' for fact in facts)}</ul><div class='grid-of'>"
        + bar_chart("users by events", heights, labels)
        + bar_chart("events by popularity of the item", [float(part.sum()) for part in parts], ranks)
        + "</div>"
    )


def _histogram(lengths: np.ndarray) -> tuple[list[float], list[str]]:
    low, high = (int(lengths.min()), int(lengths.max())) if lengths.size else (0, 0)
    width = -(-(high - low + 1) // 25)
    edges = np.arange(low, high + width + 1, width)  # as wide each, unless a few are much longer than the rest
    if high > 20 * max(low, 10):
        edges = np.unique(np.geomspace(low + 1, high + 2, 20).round().astype(np.int64)) - 1
    counts, _ = np.histogram(lengths, edges)
    names = [f"{a:,}{f' to {b - 1:,}' if b - a > 1 else ''} events" for a, b in zip(edges[:-1], edges[1:], strict=True)]
    return counts.astype(float).tolist(), names


def _examples(run: str, found: Sequence[Example], names: dict[str, str]) -> str:
    def called(item: str) -> str:
        return escape(f"{names[item]} ({item})" if item in names else item)

    cards = []
    for example in found:
        history = "".join(f"<li>{called(item)}</li>" for item in example.history)
        if example.action is not None:
            answers = "".join(f"<li>{escape(name)}: {value:.3f}</li>" for name, value in example.answers)
            asked = f"<p>Shown: {called(example.target)}. What happened: {escape(example.action)}.</p>"
        else:
            answers = "".join(
                f"<li{' class=hit' if item == example.target else ''}>{called(item)} "
                f'<span class="dim">{value:.3f}</span></li>' for item, value in example.answers
            )  # fmt: skip
            place = [item for item, _ in example.answers].index(example.target) + 1 if any(
                item == example.target for item, _ in example.answers) else None  # fmt: skip
            where = f"recommended at rank {place}" if place else f"not among the {len(example.answers)} recommended"
            asked = f"<p>Then: <strong>{called(example.target)}</strong>, {where}.</p>"
        older = example.length - len(example.history)
        cards.append(
            f"<details open><summary>user {escape(example.user)}, {example.length:,} events</summary>"
            + (f"<p class=dim>{older:,} older events, then</p>" if older else "")
            + f"<ul>{history}</ul>{asked}<ol>{answers or '<li>no answer</li>'}</ol>{_attention(example)}</details>"
        )
    return f'<h3>{escape(run)}</h3><div class="grid-of">{"".join(cards)}</div>' if cards else ""


def _attention(example: Example) -> str:
    if example.attention is None:
        return ""
    about = "Attention by layer, mean over heads, oldest first: the token of a row attends to bright columns"
    return f'<figure><figcaption class="dim">{about}</figcaption>{_image(example.attention, about, "pixels")}</figure>'


def _image(png: bytes, about: str, kind: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img class="{kind}" alt="{about}" src="data:image/png;base64,{data}">'


def _pictures(runs: Sequence[Facts]) -> str:
    figures = []
    for run in runs:
        for path in run.pictures:
            about = escape(f"{run.name}: {path.stem}")
            image = _image(path.read_bytes(), about, "drawn")
            figures.append(f"<figure><figcaption>{about}</figcaption>{image}</figure>")
    return f'<div class="grid-of">{"".join(figures)}</div>' if figures else ""


def _settings(runs: Sequence[Facts]) -> str:
    fields = list(dict.fromkeys(name for run in runs for name in run.settings))
    absent = "<span class='dim'>-</span>"

    def rows(chosen: Sequence[str]) -> list[list[str]]:
        return [[escape(name), *(escape(run.settings[name]) if name in run.settings else absent for run in runs)]
                for name in chosen]  # fmt: skip

    differ = [name for name in fields if len({run.settings.get(name) for run in runs}) > 1]
    header, text = ["field", *(run.name for run in runs)], range(1, len(runs) + 1)
    parts = []
    if len(runs) > 1:
        parts.append(_table(header, rows(differ), "Fields in which the runs differ", text))
    every = _table(header, rows(fields), "Every field with the value that applied", text)
    return "".join(parts) + f"<details><summary>all {len(fields)} fields</summary>{every}</details>"


def _speed(runs: Sequence[Facts]) -> str:
    columns = list(dict.fromkeys(name for run in runs for name in run.speed))
    rows = [[_key(n, run.name), *(escape(run.speed.get(name, "-")) for name in columns)] for n, run in enumerate(runs)]
    return _table(["run", *columns], rows, "Medians over the lines of training") if columns else ""
