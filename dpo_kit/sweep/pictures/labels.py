"""What the pictures of a sweep share: colours for any colour vision, direct labels that do not touch, whole files."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.sweep.choice.runs import RunRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe-Ito, the well visible ones first; each with a marker of its own, so that colour is never alone
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#595959"
SIDES = ((1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1))
DISTANCES = (7.0, 16.0, 30.0, 50.0, 80.0)  # pixels between a point and its label
FAR = 40.0  # pixels from which on a thin line leads from the label to its point
Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclass(frozen=True)
class Label:
    """A text beside a point, in data units; `clear` pixels around the point are taken by what marks it."""

    x: float
    y: float
    text: str
    color: str
    size: float = 15
    bold: bool = False
    clear: float = 0.0


def new_figure(height: float) -> Figure:
    """An empty figure 1200 pixels wide and `height` inches of 100 pixels high, with its renderer."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write aside, then rename: whoever looks at the picture sees a whole one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(partial)
    partial.replace(path)
    return path


def series_names(runs: Sequence[RunRecord], swept: dict[str, dict[str, Any]]) -> dict[str, str]:
    """{run path: the line it belongs to}: its method, and its values of what is swept beside beta and seed."""
    names = {}
    for run in runs:
        extra = (f"{key.removeprefix('trl.')} {values.get(run.path)}" for key, values in swept.items())
        names[run.path] = ", ".join([run.method or "?", *extra])
    return names


def place_labels(axes: Axes, labels: Iterable[Label], obstacles: Iterable[Box]) -> None:
    """Write each label beside its point where it covers least: of other labels, of `obstacles` (data units)."""
    from matplotlib.patheffects import withStroke

    taken = [_pixels(axes, box) for box in obstacles]
    for label in labels:
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset pixels", color=label.color, fontsize=label.size,
            fontweight="bold" if label.bold else "normal", ha="center", va="center", zorder=6, linespacing=0.95,
            path_effects=[withStroke(linewidth=3.5, foreground="white")],
        )  # fmt: skip
        size = text.get_window_extent(axes.figure.canvas.get_renderer())  # type: ignore[attr-defined]
        x, y = axes.transData.transform((label.x, label.y))
        best = min(_candidates(size.width, size.height, label.clear), key=lambda o: _cost(o, (x, y), size, taken, axes))
        text.set_position(best)
        taken.append(_around(x + best[0], y + best[1], size.width, size.height))
        if max(abs(best[0]) - size.width / 2, abs(best[1]) - size.height / 2) > FAR:
            edge = (_towards_zero(best[0], size.width / 2), _towards_zero(best[1], size.height / 2))
            axes.annotate("", (label.x, label.y), edge, textcoords="offset pixels", arrowprops=_leader(label))


def _towards_zero(middle: float, half: float) -> float:
    """The side of a label, reaching `half` around `middle`, that is nearest to its point at 0."""
    return math.copysign(max(0.0, abs(middle) - half), middle)


def _leader(label: Label) -> dict[str, Any]:
    return {"arrowstyle": "-", "color": label.color, "linewidth": 0.9, "shrinkA": 1, "shrinkB": 5 + label.clear}


def _candidates(width: float, height: float, clear: float) -> list[tuple[float, float]]:
    """Offsets of the label's middle, nearest first."""
    # On the diagonals a corner of the label is nearest to the point, so that it keeps clear of the point's bars
    return [(x * (r + clear + width / 2), y * (r + clear + height / 2)) for r in DISTANCES for x, y in SIDES]


def _cost(offset: tuple[float, float], at: tuple[float, float], size: Any, taken: list[Box], axes: Axes) -> float:
    box = _around(at[0] + offset[0], at[1] + offset[1], size.width, size.height)
    inside = axes.bbox
    outside = size.width * size.height - _overlap(box, (inside.x0, inside.y0, inside.x1, inside.y1))
    return 4 * outside + sum(_overlap(box, other) for other in taken) + 0.6 * math.hypot(*offset)


def _around(x: float, y: float, width: float, height: float) -> Box:
    return (x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _overlap(one: Box, other: Box) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _pixels(axes: Axes, box: Box, air: float = 5) -> Box:
    (left, bottom), (right, top) = axes.transData.transform([(box[0], box[1]), (box[2], box[3])])
    return (left - air, bottom - air, right + air, top + air)


def spread(heights: Sequence[float], gap: float, bottom: float, top: float) -> list[float]:
    """`heights` moved as little as needed to be `gap` apart and, as far as they fit, within [bottom, top]."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    placed = [heights[index] for index in order]
    for _ in range(200):
        placed = [min(max(height, bottom), top) for height in placed]
        for low in range(len(placed) - 1):
            lack = gap - (placed[low + 1] - placed[low])
            if lack > 1e-9:
                placed[low], placed[low + 1] = placed[low] - lack / 2, placed[low + 1] + lack / 2
    result = list(heights)
    for index, height in zip(order, placed, strict=True):
        result[index] = height
    return result
