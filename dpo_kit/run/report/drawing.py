"""What all pictures share: colours, and how a course, an interval, a floor and a small number are drawn."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Mapping, Sequence, Sized
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.run.history import series
from dpo_kit.run.report.numbers import bounds, is_number
from dpo_kit.run.rounding import floor_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito: told apart with any colour vision
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#595959"
OVER_THE_LINE = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # the box of a text that a line crosses
DASHES = (0, (4, 3))
HATCHED: dict[str, Any] = {
    "facecolor": "#F2F2F2", "edgecolor": "#BFBFBF", "hatch": "//", "linewidth": 0, "zorder": 0, "label": "rounding"
}  # fmt: skip  # what is no more than rounding
FEW = 10  # pairs, prompts or answers: what is told of fewer is drawn hollow
SCATTERED = 4  # points: up to so many have bars and dots between them, more of them a band and a line


def new_figure(height: float) -> Figure:
    """An empty figure 1200 pixels wide and `height` inches of 100 pixels high, with its renderer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def sheet(title: str, note: str, panels: int, line: float, **grid: float) -> tuple[Figure, list[Axes]]:
    """A figure under a title and a note, with its `panels`: two beside each other, each line `line` inches high, and
    apart as matplotlib's `grid` specification says.
    """
    lines = max(1, math.ceil(panels / 2))
    figure = new_figure(line * lines + 1.1)
    height = figure.get_figheight()
    figure.suptitle(title, x=0.03, y=1 - 0.18 / height, ha="left", va="top", fontsize=22, fontweight="bold")
    figure.text(0.03, 1 - 0.72 / height, note, va="top", fontsize=15, color=GREY)
    places = figure.add_gridspec(lines, 2, bottom=0.75 / height, top=1 - 1.75 / height, **grid)
    return figure, [figure.add_subplot(places[number]) for number in range(panels)]


def save(figure: Figure, path: Path) -> Path:
    """Write aside, then rename: whoever looks at the picture sees a whole one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(partial)
    partial.replace(path)
    return path


def count_text(counts: Collection[int], unit: str) -> str:
    """How many `unit` (a plural) a figure rests on, from least to most of `counts` (0: not known), or nothing."""
    known = [count for count in counts if count]
    if not known:
        return ""
    least, most = min(known), max(known)
    unit = unit.removesuffix("s") if most == 1 else unit
    return f"{'only ' if least < FEW else ''}{least:,}{f' to {most:,}' if most > least else ''} {unit}"


def head(axes: Axes, title: str, *notes: str) -> None:
    """The title of a panel and below it, small, what a reader must know; nothing of it touches what is drawn."""
    note = " · ".join(filter(None, notes))
    axes.set_title(title, loc="left", fontsize=19, pad=30 if note else 9)
    axes.text(0, 1.03, note, transform=axes.transAxes, fontsize=14, color=GREY, va="bottom")


def over_steps(axes: Axes) -> None:
    """Spines, ticks and labels of a panel over steps."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=15, colors=GREY)
    axes.set_xlabel("step", fontsize=15, color=GREY)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=4, integer=True)


def joined(points: Sized, style: Any = "-") -> Any:
    """The style of the line through `points`: two are no course, so that no line joins them."""
    return style if len(points) > 2 else "none"


def draw_course(
    axes: Axes, rows: Sequence[Mapping[str, Any]], key: str, color: Any, *,
    dashed: bool = False, hollow: bool = False, shift: float = 0.0, alpha: float = 0.2,
) -> None:  # fmt: skip
    """`key` of `rows` over steps: two points are not joined, a few by dots alone, as nothing is known in between;
    squares then stand for `dashed`. The intervals of a few are bars (moved by `shift`, so that those of several courses
    do not hide each other), else a band of `alpha`. `hollow` points rest on few pairs.
    """
    points = series(rows, key)
    measured = (row for row in rows if is_number(row.get(key)))
    ends = {row.get("step", 0): interval for row in measured if (interval := bounds(row, key))}
    scattered = len(points) <= SCATTERED
    steps = [step + shift * scattered for step in points]
    low, high = zip(*(ends.get(step, (value, value)) for step, value in points.items()), strict=True)
    axes.plot(
        steps, list(points.values()), color=color, linewidth=1.5 if scattered else 2.5, zorder=3,
        linestyle=joined(points, ":" if scattered else DASHES if dashed else "-"),
        marker="s" if scattered and dashed else "o", markersize=9 if scattered else 5,
        markerfacecolor="white" if hollow else color,
    )  # fmt: skip
    if ends and scattered:
        axes.vlines(steps, low, high, color=color, linewidth=2)
    elif ends:
        axes.fill_between(steps, low, high, color=color, alpha=alpha, linewidth=0)


def draw_level(axes: Axes, value: float, lines: int, **style: Any) -> None:
    """An upright line at `value` beside the dots of so many `lines` (0, −1, …), with gaps for the labels above them."""
    places = range(lines)
    axes.vlines([value] * lines, [-line - 0.22 for line in places], [0.12 - line for line in places], **style)


def draw_floor(axes: Axes, key: str, values: Mapping[str, Any]) -> str:
    """Hatch the band within which `key` of `values` is no more than rounding; the note that says so, empty without."""
    if not (floor := floor_of(key, values)):
        return ""
    axes.axhspan(0.0 if "/kl_" in key else -floor, floor, **HATCHED)
    return "hatched: rounding"


def label_ends(
    axes: Axes, ends: Sequence[tuple[float, str, Any]], *, gap: float, air: float = 0.0, **style: Any
) -> None:
    """Write each (height, text, color) of `ends` beside the panel, `gap` apart and `air` inside it (shares of it)."""
    bottom, top = axes.get_ylim()
    size, heights = top - bottom, [height for height, _, _ in ends]
    placed = spread(heights, gap * size, bottom + air * size, top - air * size)
    for (_, text, color), height in zip(ends, placed, strict=True):
        axes.text(
            1.03, height, text, transform=axes.get_yaxis_transform(), va="center", ha="left", fontsize=16,
            fontweight="bold", color=color, **style,
        )  # fmt: skip


def spread(heights: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """`heights` moved as little as needed to be `gap` apart and, as far as they fit, within [bottom, top]."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = list(heights)
    for _ in range(200):
        placed = [min(max(height, bottom), top) for height in placed]
        for low, high in pairwise(order):
            lack = gap - (placed[high] - placed[low])
            if lack > 1e-9:
                placed[low], placed[high] = placed[low] - lack / 2, placed[high] + lack / 2
    return placed
