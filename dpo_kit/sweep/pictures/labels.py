"""What the pictures of a sweep share: a colour for each line, direct labels that do not touch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patheffects import withStroke

# Okabe-Ito, the well visible ones first; each with a marker of its own, so that colour is never alone
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIDES = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)])
DISTANCES = (7.0, 16.0, 30.0, 50.0, 80.0)  # pixels between a point and its label
FAR = 40.0  # pixels from which on a thin line leads from the label to its point
AIR = 5.0 * np.array([-1, -1, 1, 1])  # pixels kept around an obstacle
SPACING = 8.0  # pixels along a line


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


def place_labels(axes: Axes, labels: Iterable[Label]) -> None:
    """Write each label beside its point where it covers least: of other labels, and of all that is drawn."""
    taken = _boxes(axes)
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
            leader = {"arrowstyle": "-", "color": label.color, "linewidth": 0.9, "shrinkA": 1}
            leader["shrinkB"] = 5 + label.clear
            edge = np.copysign(gap.clip(0), offsets[best])
            axes.annotate("", (label.x, label.y), edge, textcoords="offset pixels", arrowprops=leader)


def _boxes(axes: Axes) -> Any:
    """Points, intervals and lines of a panel as boxes that labels keep clear of, (n, 4) pixels."""
    paths = [(line.get_transform().transform(line.get_xydata()), line.get_linestyle() != "None") for line in axes.lines]
    for bars in axes.collections:
        paths += [(axes.transData.transform(path.vertices), True) for path in bars.get_paths()]
    points = [np.empty((0, 2))]
    for corners, is_joined in paths:
        points.append(corners)
        for start, end in pairwise(corners) if is_joined else ():
            steps = int(np.hypot(*(end - start)) // SPACING)
            points.append(start + np.linspace(0, 1, steps + 2)[1:-1, None] * (end - start))
    return np.tile(np.vstack(points), 2) + AIR


def _overlap(boxes: Any, others: Any) -> Any:
    """Square pixels that each of `boxes`, (n, 4), shares with each of `others`, (m, 4): (n, m)."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    return (high - low).clip(0).prod(-1)
