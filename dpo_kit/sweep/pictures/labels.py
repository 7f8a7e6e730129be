"""What the pictures of a sweep share: colours for any colour vision, direct labels that do not touch, whole files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke

from dpo_kit.sweep.choice.runs import RunRecord, swept_keys

# Okabe-Ito, the well visible ones first; each with a marker of its own, so that colour is never alone
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#595959"
SIDES = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)])
DISTANCES = (7.0, 16.0, 30.0, 50.0, 80.0)  # pixels between a point and its label
FAR = 40.0  # pixels from which on a thin line leads from the label to its point
AIR = 5.0 * np.array([-1, -1, 1, 1])  # pixels kept around an obstacle
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
    figure = Figure(figsize=(12, height), dpi=100)
    FigureCanvasAgg(figure)
    return figure


def save(figure: Figure, path: Path) -> Path:
    """Write aside, then rename: whoever looks at the picture sees a whole one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.png")
    figure.savefig(partial)
    partial.replace(path)
    return path


def name_lines(runs: Sequence[RunRecord]) -> dict[str, str]:
    """{run path: the line it belongs to}: its method, and its values of what is swept beside beta and seed."""
    names, swept = {}, swept_keys(runs)
    for run in runs:
        extra = (f"{key.removeprefix('trl.')} {values.get(run.path)}" for key, values in swept.items())
        names[run.path] = ", ".join([run.method or "?", *extra])
    return names


def place_labels(axes: Axes, labels: Iterable[Label], obstacles: Sequence[Box]) -> None:
    """Write each label beside its point where it covers least: of other labels, of `obstacles` (data units)."""
    taken = axes.transData.transform(np.reshape(obstacles, (-1, 2))).reshape(-1, 4) + AIR
    for label in labels:
        text = axes.annotate(
            label.text, (label.x, label.y), (0, 0), textcoords="offset pixels", color=label.color, fontsize=label.size,
            fontweight="bold" if label.bold else "normal", ha="center", va="center", zorder=6, linespacing=0.95,
            path_effects=[withStroke(linewidth=3.5, foreground="white")],
        )  # fmt: skip
        size = text.get_window_extent(axes.figure.canvas.get_renderer())  # type: ignore[attr-defined]
        half, point = np.array([size.width, size.height]) / 2, axes.transData.transform((label.x, label.y))
        # On the diagonals a corner of the label is nearest to the point, so that it keeps clear of the point's bars
        offsets = np.array([side * (distance + label.clear + half) for distance in DISTANCES for side in SIDES])
        boxes = np.hstack([point + offsets - half, point + offsets + half])
        outside = size.width * size.height - _overlap(boxes, np.array([axes.bbox.extents]))[:, 0]
        cost = 4 * outside + _overlap(boxes, taken).sum(1) + 0.6 * np.hypot(*offsets.T)
        best = int(cost.argmin())
        text.set_position(offsets[best])
        taken = np.vstack([taken, boxes[best]])
        gap = np.abs(offsets[best]) - half  # between the point and the label's nearest side
        if gap.max() > FAR:
            leader = {
                "arrowstyle": "-",
                "color": label.color,
                "linewidth": 0.9,
                "shrinkA": 1,
                "shrinkB": 5 + label.clear,
            }
            edge = np.copysign(gap.clip(0), offsets[best])
            axes.annotate("", (label.x, label.y), edge, textcoords="offset pixels", arrowprops=leader)


def _overlap(boxes: Any, others: Any) -> Any:
    """Square pixels that each of `boxes`, (n, 4), shares with each of `others`, (m, 4): (n, m)."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    return (high - low).clip(0).prod(-1)


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
