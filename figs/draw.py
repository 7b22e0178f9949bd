"""Draw the figures of the documents: `make figs`, or `python figs/draw.py [OUTPUT_DIR]`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

# One palette for all figures: (fill, edge).
CONTEXT = ("#e8defa", "#7c5cc4")
ITEM = ("#d6e6fb", "#2f6fbf")
ACTION = ("#fde3c8", "#c9721a")
CANDIDATE = ("#d5f0dd", "#2c8a4f")
BLOCK = ("#f3f5f8", "#5b6675")
LOSS = ("#fbd9dc", "#b83246")
PLAIN = ("#ffffff", "#9aa5b1")
INK, MUTED = "#1d2733", "#5b6675"

plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 11, "text.color": INK})


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty drawing whose units are tenths of an inch."""
    figure = plt.figure(figsize=(width / 10, height / 10), dpi=150, facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str = "",
    colour: tuple[str, str] = BLOCK,
    *,
    size: float = 11,
) -> None:
    """A rounded box with its lower left corner at (x, y) and its text in the middle."""
    style = "round,pad=0,rounding_size=0.8"
    fill, edge = colour
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, fc=fill, ec=edge, lw=1.3))
    axes.text(
        x + width / 2,
        y + height / 2,
        text,
        ha="center",
        va="center",
        fontsize=size,
        linespacing=1.35,
        color=INK,
    )


def note(axes: Axes, x: float, y: float, text: str, *, size: float = 9.5, align: str = "left", **style: object) -> None:
    """Small text, grey unless `style` says otherwise."""
    axes.text(x, y, text, fontsize=size, ha=align, **{"color": MUTED, "va": "center", "linespacing": 1.4} | style)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], **style: object) -> None:
    """An arrow from start to end."""
    style = {
        "arrowstyle": "-|>",
        "mutation_scale": 13,
        "lw": 1.4,
        "color": MUTED,
        "shrinkA": 0,
        "shrinkB": 0,
    } | style
    axes.add_patch(FancyArrowPatch(start, end, **style))


def ranking_model() -> Figure:
    """From the token stream of one sample to the loss."""
    figure, axes = canvas(103, 103)
    left, width = 3, 62
    middle = left + width / 2

    def stage(y: float, title: str, comment: str, colour: tuple[str, str] = BLOCK) -> None:
        box(axes, left, y, width, 7, "", colour)
        axes.text(left + width + 3, y + 6, title, fontsize=11.5, weight="bold", ha="left", va="center")
        note(axes, left + width + 3, y + 2.2, comment)

    def label(y: float, text: str) -> None:
        axes.text(middle, y + 3.4, text, fontsize=12, ha="center", va="center")

    # The token stream, in the order in which the model reads it.
    tokens = [("$c_1$", CONTEXT), ("$c_2$", CONTEXT)]
    for t in (1, 2, 3):
        tokens += [(f"$i_{t}$", ITEM), (f"$a_{t}$", ACTION)]
    tokens += [("$i_4$", CANDIDATE), ("$i_5$", CANDIDATE)]
    step = width / len(tokens)
    token_stream(axes, tokens, left, step)
    axes.text(left + width + 3, 12, "tokens", fontsize=11.5, weight="bold", ha="left", va="center")
    note(axes, left + width + 3, 8.2, "one sample of the batch; every\nsample has its own length")

    stage(
        15.7,
        "embedding tables",
        "sizes come from the schema; candidates\nare looked up in the item table",
        PLAIN,
    )
    third = (width - 4) / 3
    for index, (name, colour) in enumerate(
        (("context tables", CONTEXT), ("item table", ITEM), ("action table", ACTION))
    ):
        box(axes, left + 1 + index * (third + 1), 16.7, third, 5, name, colour)
    arrow(axes, (middle, 22.7), (middle, 25.7))
    stage(25.7, "preprocess", "to one width and one sequence: nothing\nis padded")
    label(25.7, "project to width $D$, interleave, add positions and times")
    hstu_block(axes, left, width, 35.7)
    arrow(axes, (middle, 32.7), (middle, 38.9))

    stage(72.7, "postprocess", "keep the candidate rows (without\ncandidates: the item rows), normalise")
    for index, (_, (fill, edge)) in enumerate(tokens):
        kept = index >= 8
        patch = Rectangle((left + (index + 0.5) * step - 1.5, 74.7), 3, 3, fc=fill, ec=edge, lw=1.2)
        patch.set_alpha(1.0 if kept else 0.3)
        axes.add_patch(patch)
    arrow(axes, (middle, 79.7), (middle, 82.7))
    stage(82.7, "multi-task head", "one logit for each binary task,\nor one softmax")
    label(82.7, "MLP")
    arrow(axes, (middle, 89.7), (middle, 92.7))
    stage(92.7, "loss", "mean over the label tokens of all ranks;\nthe labels are the candidates' actions", LOSS)
    label(92.7, "cross-entropy")
    return figure


def token_stream(axes: Axes, tokens: list[tuple[str, tuple[str, str]]], left: float, step: float) -> None:
    """The tokens of one sample in the order in which the model reads them, `step` apart."""
    y = 7
    for index, (name, colour) in enumerate(tokens):
        centre = left + (index + 0.5) * step
        box(axes, centre - step / 2 + 0.4, y, step - 0.8, 5.4, name, colour, size=13)
        arrow(axes, (centre, y + 5.4), (centre, y + 8.6), mutation_scale=8)
    for first, last, name, colour in (
        (0, 2, "context", CONTEXT),
        (2, 8, "history: items and actions, interleaved", ITEM),
        (8, 10, "candidates", CANDIDATE),
    ):
        x0, x1 = left + first * step + 0.6, left + last * step - 0.6
        axes.plot([x0, x0, x1, x1], [y - 0.7, y - 1.6, y - 1.6, y - 0.7], color=colour[1], lw=1.2)
        note(axes, (x0 + x1) / 2, y - 3.5, name, align="center", color=colour[1], size=10)


def hstu_block(axes: Axes, left: float, width: float, bottom: float) -> None:
    """One HSTU block, opened, 34 units high, with the arrow that leaves it."""
    middle, top = left + width / 2, bottom + 34
    box(axes, left, bottom, width, 34, "", ("#fafbfc", BLOCK[1]))
    axes.text(left + 2, top - 2.8, "HSTU block", fontsize=12, weight="bold", ha="left", va="center")
    axes.text(left + width - 2, top - 2.8, "$\\times\\ L$", fontsize=14, ha="right", va="center")
    inner, inner_width = left + 10, width - 20
    box(axes, inner, bottom + 3.2, inner_width, 5, "norm, one linear, SiLU  →  $u, v, q, k$")
    arrow(axes, (middle, bottom + 8.2), (middle, bottom + 10.8))
    attention = "$o_i=\\dfrac{1}{S}\\sum_j M_{ij}\\ \\mathrm{SiLU}(\\alpha\\,q_i\\cdot k_j+r_{ij})\\,v_j$"
    box(axes, inner, bottom + 10.8, inner_width, 7.4, attention, ("#eaf1fb", ITEM[1]), size=13)
    arrow(axes, (middle, bottom + 18.2), (middle, bottom + 20.8))
    box(axes, inner, bottom + 20.8, inner_width, 5, "$\\mathrm{norm}(o)\\odot u$, linear")
    # The residual goes round the three boxes.
    side, sum_at = left + 4.5, bottom + 28.6
    axes.plot([middle, side, side], [bottom + 1.2, bottom + 1.2, sum_at], color=MUTED, lw=1.4)
    arrow(axes, (side, sum_at), (middle - 1.5, sum_at))
    axes.plot([middle, middle], [bottom + 25.8, sum_at - 1.5], color=MUTED, lw=1.4)
    axes.add_patch(plt.Circle((middle, sum_at), 1.5, fc="white", ec=MUTED, lw=1.4))
    axes.text(middle, sum_at - 0.1, "+", ha="center", va="center", fontsize=13, color=MUTED)
    arrow(axes, (middle, sum_at + 1.5), (middle, top + 3))
    for y, title, text in (
        (
            25,
            "mask $M$",
            "causal, and only the candidate itself sees\na candidate: they do not affect each other",
        ),
        (16.5, "scale $S$", "a constant of the model"),
        (10, "bias $r$", "relative position and time, shared by the\nheads (research preset)"),
    ):
        axes.text(left + width + 3, bottom + y, title, fontsize=11.5, weight="bold", ha="left", va="center")
        note(axes, left + width + 3, bottom + y - 1.6, text, va="top")


def parallelism() -> Figure:
    """Which part of the model lies where on four ranks."""
    figure, axes = canvas(122, 79)
    ranks, left, step, width = 4, 20, 19.5, 17
    tables = (("items", ITEM, "row-wise"), ("users", CONTEXT, "row-wise"), ("actions", ACTION, "one rank"))
    right = left + (ranks - 1) * step + width

    for rank in range(ranks):
        x = left + rank * step
        box(axes, x, 12, width, 64, "", ("#fafbfc", "#c3cad3"))
        axes.text(x + width / 2, 73, f"rank {rank}", ha="center", va="center", fontsize=12, weight="bold")

        # Sequences of different length: the batch of this rank.
        for row, length in enumerate(((9, 5, 12), (12, 7, 4), (6, 11, 8), (8, 8, 10))[rank]):
            axes.add_patch(Rectangle((x + 2, 66.8 - row * 2), length, 1.3, fc=ITEM[0], ec=ITEM[1], lw=0.9))

        # Tables: a quarter of each row-wise table, the small table on one rank.
        for row, (name, colour, _) in enumerate(tables):
            y = 50.6 - row * 5
            if name == "actions" and rank != 1:
                continue
            text = name if name == "actions" else f"{name} {rank + 1}/{ranks}"
            box(axes, x + 2, y, width - 4, 4, text, colour, size=10)

        box(axes, x + 2, 22.5, width - 4, 9.5, "dense weights\n(full copy)", BLOCK, size=10)
        box(axes, x + 2, 14.5, width - 4, 5, f"optimizer {rank + 1}/{ranks}", BLOCK, size=10)

    # What crosses the ranks.
    def collective(y: float, text: str, colour: str) -> None:
        arrow(axes, (left + 1, y), (right - 1, y), arrowstyle="<|-|>", color=colour, lw=1.6)
        axes.text(
            (left + right) / 2, y, text, ha="center", va="center", fontsize=10, color=colour,
            bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": colour, "lw": 1},
        )  # fmt: skip

    collective(58.8, "all-to-all: ids to the tables, embeddings back", ITEM[1])
    collective(36.0, "all-reduce, or reduce-scatter and all-gather: dense gradients", MUTED)

    def part(y: float, title: str, text: str) -> None:
        axes.text(2, y, title, fontsize=12, weight="bold", ha="left", va="center")
        note(axes, 2, y - 1.8, text, va="top")

    part(67, "batch", "jagged; dealt from\none global batch")
    part(53, "tables", "sharded over all\nranks by TorchRec;\nupdated after\neach batch")
    part(30, "dense part", "data-parallel under\nMegatron-Core, with\nits distributed\noptimizer")

    mesh(axes, right + 3.5)
    note(
        axes, left, 6,
        "loss of a rank = its sum × number of ranks / label tokens of all ranks:\n"
        "1, 2 or 4 ranks on one global batch give the same loss curve, to rounding.",
        size=10.5,
    )  # fmt: skip
    return figure


def mesh(axes: Axes, x: float) -> None:
    """The axes along which ranks divide the work."""
    axes.text(x, 73, "mesh", fontsize=12, weight="bold", ha="left", va="center")

    def axis(y: float, title: str, text: str) -> None:
        box(axes, x, y, 18.5, 12, "", CANDIDATE)
        axes.text(x + 9.25, y + 9.2, title, fontsize=11, weight="bold", ha="center", va="center", color=INK)
        note(axes, x + 9.25, y + 4.4, text, align="center", color=INK)

    axis(57.4, "data", "each rank has its\nown samples")
    axis(42.4, "context", "each rank has a part\nof every sequence")
    axis(27.4, "tensor", "each rank has a part\nof heads and weights")
    note(axes, x, 21, "ranks = data × context\n× tensor")


def main(folder: Path) -> None:
    """Write every figure as a PNG file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("ranking_model", ranking_model), ("parallelism", parallelism)):
        figure = draw()
        # Without the version of matplotlib in the metadata, equal drawings are equal files.
        figure.savefig(folder / f"{name}.png", metadata={"Software": None})
        plt.close(figure)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
