"""frontier.png: quality against the square root of the reverse KL, a line per method through its betas, three or more.

A method is better where its line lies higher at the same KL (Gao et al. 2023, arXiv:2210.10760; for direct methods
arXiv:2406.02900). Data of the best possible line, where the gold reward is known: {"ideal": [[KL, gold reward], …],
"best_of_n": [[n, KL, gold reward], …]}, KL in nats per answer.
"""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from dpo_kit.run.files import read_json
from dpo_kit.run.intervals import Z95
from dpo_kit.run.measures import KLS
from dpo_kit.run.report.drawing import FEW, GREY, HATCHED, count_text, joined, new_figure, save
from dpo_kit.sweep.choice.best_of import BestOf, find_ideal
from dpo_kit.sweep.choice.quality import Interval, Quality
from dpo_kit.sweep.choice.rule import Choice, by_model
from dpo_kit.sweep.choice.runs import RunRecord, name_lines, number

log = logging.getLogger(__name__)
# Okabe-Ito, the well visible ones first; each with a marker of its own, so that colour is never alone
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
SIDES = np.array([(1, 1), (-1, 1), (1, -1), (-1, -1), (1, 0), (-1, 0), (0, 1), (0, -1)])
DISTANCES = (7.0, 16.0, 30.0, 50.0, 80.0)  # pixels between a point and its label
FAR = 40.0  # pixels from which on a thin line leads from the label to its point
AIR = 5.0 * np.array([-1, -1, 1, 1])  # pixels kept around an obstacle
SPACING = 8.0  # pixels along a line
ROW = 0.33  # inches that a further row of the legend takes
RING = 11.0  # pixels that the recommended run's ring takes around its point
TICKS = (
    0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30, 50, 70, 100, 150, 200, 300, 500, 1000, 2000, 5000
)  # fmt: skip


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


class Point(NamedTuple):
    """A finished run on the frontier: reverse KL in nats per answer and quality, each (value, low, high)."""

    run: RunRecord
    kl: Interval
    quality: Interval


class Line:
    """The runs of one method (and one value of what else is swept), by beta; points: those with KL and quality."""

    def __init__(self, name: str, style: tuple[str, str], runs: Sequence[RunRecord], quality: Quality) -> None:
        self.name, (self.color, self.marker), self.runs = name, style, runs
        self.points: list[Point] = []
        self.means: dict[float | None, tuple[float, float]] = {}  # (KL, quality) over the seeds of a beta
        for run in runs:
            value, kl = quality.read(run), run.kl_reverse
            if value is not None and kl is not None:
                reach = Z95 * run.measured.get(f"{run.kl_reverse_key}_se", 0.0)
                self.points.append(Point(run, (kl, max(0.0, kl - reach), kl + reach), value))
        for beta in dict.fromkeys(point.run.beta for point in self.points):
            group = [point for point in self.points if point.run.beta == beta]
            self.means[beta] = fmean(point.kl[0] for point in group), fmean(point.quality[0] for point in group)


def draw_frontier(
    sweep_dir: str | Path,
    runs: Sequence[RunRecord],
    choice: Choice,
    *,
    ideal: str | Path | None = None,
    best_of: Sequence[BestOf] = (),
) -> Path:
    """Draw `sweep_dir`/frontier.png, 1200 pixels wide; a panel for each step-0 model, as their KLs never compare."""
    models = by_model(run for run in runs if run.manifest)
    panels = models if len(models) > 1 else [list(runs)]
    names = name_lines(runs)
    styles = {
        name: (PALETTE[index % len(PALETTE)], MARKERS[(index + index // len(PALETTE)) % len(MARKERS)])
        for index, name in enumerate(dict.fromkeys(names.values()))
    }
    extra = math.ceil(len(styles) / _legend_columns(styles)) - 1  # rows of the legend beyond the first
    figure = new_figure((7.9 + ROW * extra) * len(panels))
    height, top = figure.get_figheight(), 1.5 + ROW * extra
    figure.subplots_adjust(  # before the labels find their places
        left=0.085, right=0.975, bottom=0.85 / height, top=1 - top / height, hspace=0.36 + ROW * extra / 5.5
    )
    best = find_ideal(Path(sweep_dir), runs, ideal) if choice.quality.key == "gold/reward" else {}
    if best_of:
        some = [point for point in best_of if point.n.bit_count() == 1 or point is best_of[-1]]  # 1, 2, 4, …
        best["best_of_n"] = [(point.n, point.kl, point.value) for point in some]
    for place, group in enumerate(panels):
        members = {name: tuple(run for run in group if names[run.path] == name) for name in styles}
        lines = [Line(name, styles[name], runs, choice.quality) for name, runs in members.items() if runs]
        within = (inner for _, inner in choice.within if inner.verdicts[0].run.path in {run.path for run in group})
        axes = figure.add_subplot(len(panels), 1, place + 1)
        inner = next(within, choice) if len(panels) > 1 else choice
        _draw_panel(axes, lines, inner, best)
        title = "Quality against drift" + (f", from {group[0].start_name}" if len(panels) > 1 else "")
        axes.set_title(title, loc="left", fontsize=23, fontweight="bold", pad=76 + 24 * extra)
        drawn = sum(len(line.points) for line in lines)
        notes = ["nothing recommended"] if inner.verdicts and not inner.recommended and not inner.within else []
        notes += [f"{drawn} of {len(group)} runs so far"] if drawn < len(group) else []
        notes += ["bars: 95 % intervals", "faint: on the way"] if drawn else []
        notes += ["hatched: rounding"] if any(run.kl_floor for run in group) else []
        axes.annotate(
            " · ".join(notes), (0, 1), (0, 49 + 24 * extra), xycoords="axes fraction", textcoords="offset points",
            fontsize=15, color=GREY, va="bottom",
        )  # fmt: skip
    return save(figure, Path(sweep_dir) / "frontier.png")


def _legend_columns(names: Collection[str]) -> int:
    """As many names as fit into a row of about 95 characters."""
    return max(1, min(len(names), 95 // (max(map(len, names), default=1) + 6)))


def _draw_panel(axes: Axes, lines: Sequence[Line], choice: Choice, ideal: Mapping[str, Any]) -> None:
    quality, budget = choice.quality, choice.limits.kl_budget_nats
    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=16, colors=GREY)
    axes.set_xlabel("reverse KL to the reference (nats per answer, square-root scale)", fontsize=17, color=GREY)
    axes.locator_params(axis="y", nbins=6)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    points = [point for line in lines for point in line.points]
    if not points:
        text = "no finished run has a quality and a reverse KL yet"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", fontsize=19, color=GREY)
        return
    counted = count_text([quality.count(point.run) for point in points], quality.unit)
    axes.set_ylabel(f"{quality.axis} ({counted})" if counted else quality.axis, fontsize=17, color=GREY)
    floor = max(point.run.kl_floor for point in points)
    if floor:
        axes.axvspan(0.0, floor, **HATCHED)
    seen = [floor, *(point.kl[2] for point in points)]  # KLs that the axis must reach
    for line in lines:
        seen += _draw_line(axes, line, quality)
    starts = [start for point in points if (start := quality.start(point.run))]
    reference = tuple(map(fmean, zip(*starts, strict=True)))
    if reference:
        _error_bar(axes, (0, 0, 0), reference, GREY, "D")
    predictions = [label for line in lines for label in _draw_predictions(axes, line, quality)]
    widest = _limit_x(axes, [*seen, *(label.x for label in predictions)], budget)
    labels, ring, chosen = [], None, choice.recommended
    if chosen and (value := quality.read(chosen)) and chosen.kl_reverse is not None:
        ring = chosen.kl_reverse, value[0]
        text = "recommended" + (f"\n(step {chosen.step})" if chosen.step is not None else "")
        text += "\n(provisional)" if quality.provisional else ""
        labels.append(Label(*ring, text, "black", 16, bold=True, clear=RING))
    for line in lines:  # beta beside each point, once, at the mean over its seeds
        lost = {point.run.beta for point in line.points if point.run.in_rounding(quality.key)}
        for beta, mean in line.means.items():
            text = (f"β {beta:g}" if beta is not None else "?") + (" (rounding)" if beta in lost else "")
            labels.append(Label(*mean, text, line.color, clear=RING if mean == ring else 0))
    labels += predictions
    labels += [Label(0, reference[0], "reference", GREY, clear=5)] if reference else []
    labels += _draw_ideal(axes, ideal, widest)
    axes.margins(y=0.14)
    axes.autoscale_view(scalex=False)
    if ring:
        axes.plot(
            [ring[0]], [ring[1]], marker="o", markersize=24, markerfacecolor="none", markeredgecolor="black",
            markeredgewidth=2.4, zorder=5,
        )  # fmt: skip
    if budget <= widest:
        axes.axvline(budget, color=GREY, linewidth=1.4, linestyle=(0, (5, 4)), zorder=1)
        text = f"KL budget {budget:g} "
        axes.text(budget, 0.02, text, transform=axes.get_xaxis_transform(), ha="right", fontsize=15, color=GREY)
    place_labels(axes, labels)
    handles = [
        Line2D(
            [], [], color=line.color, marker=line.marker, label=line.name, linestyle=joined(line.means), markersize=11,
            linewidth=2.6,
        )
        for line in lines
    ]  # fmt: skip
    axes.legend(
        handles=handles, ncols=_legend_columns([line.name for line in lines]), loc="lower left", frameon=False,
        bbox_to_anchor=(-0.01, 1.0), fontsize=17, handlelength=1.6, columnspacing=1.4,
    )  # fmt: skip


def _draw_line(axes: Axes, line: Line, quality: Quality) -> list[float]:
    """Points with their intervals, the way through their means and, faint, each run's own way; the KLs of these."""
    seen = []
    for run in line.runs:
        kls, values = run.series(run.kl_reverse_key), run.series(quality.key)
        if trail := [(max(0.0, kls[step]), values[step]) for step in kls if step in values]:
            axes.plot(
                *zip(*trail, strict=True), color=line.color, alpha=0.45, linewidth=1.2, linestyle=joined(trail, ":"),
                marker=".", markersize=8,
            )  # fmt: skip
            seen += [kl for kl, _ in trail]
    for run, kl, value in line.points:
        hollow = 0 < quality.count(run) < FEW or run.in_rounding(quality.key)  # few prompts or pairs, or rounding
        _error_bar(axes, kl, value, line.color, line.marker, hollow=hollow)
    if means := list(line.means.values()):
        axes.plot(*zip(*means, strict=True), color=line.color, linewidth=2.6, linestyle=joined(means), zorder=3)
    return seen


def _error_bar(
    axes: Axes, kl: Interval, quality: Sequence[float], color: str, marker: str, *, hollow: bool = False
) -> None:
    """A point with its two intervals."""
    (x, left, right), (y, low, high) = kl, quality
    reach: dict[str, Any] = {"xerr": [[x - left], [right - x]], "yerr": [[max(0.0, y - low)], [max(0.0, high - y)]]}
    axes.errorbar(
        [x], [y], **reach, color=color, ecolor=f"{color}90", elinewidth=1.8, marker=marker, markersize=11,
        markerfacecolor="white" if hollow else color, markeredgecolor=color if hollow else "white",
        markeredgewidth=2.2 if hollow else 1.2, zorder=4,
    )  # fmt: skip


def _draw_predictions(axes: Axes, line: Line, quality: Quality) -> list[Label]:
    """What one run predicts of neighbouring betas (preview.json; DeRa, arXiv:2402.02992), in the order of KL, dashed;
    returns their labels, with "predicted" at those that were not trained, else at the last.
    """
    labels, keys = [], ("beta", KLS["reverse"][0], "gold/reward")
    for run in line.runs if quality.key == "gold/reward" else ():
        path = run.directory.preview
        try:
            rows = (read_json(path) if path.exists() else {}).get("points") or []
        except (OSError, ValueError, AttributeError) as error:
            log.warning("%s is left out: %s", path, error)
            continue
        known: Any = (tuple(number(row.get(key)) for key in keys) for row in rows)
        points = sorted((point for point in known if None not in point), key=lambda point: point[1])
        if not points:
            continue
        betas, kls, golds = zip(*points, strict=True)
        axes.plot(
            kls, golds, color=line.color, linewidth=1.8, linestyle=joined(kls, (0, (4, 2.5))), marker=line.marker,
            markersize=8, markerfacecolor="white", zorder=3.5,
        )  # fmt: skip
        predicted = set(betas) - {run.beta for run in line.runs} or {betas[-1]}
        for beta, kl, gold in points:
            labels.append(Label(kl, gold, f"β {beta:g}" + " predicted" * (beta in predicted), line.color, 13))
    return labels


def _limit_x(axes: Axes, seen: Sequence[float], budget: float) -> float:
    """Let the axis hold every KL of `seen`, and the budget where it is not far off, with ticks at round values at least
    a twelfth of it apart. Returns the widest KL.
    """
    widest = max(*seen, 1e-3)
    widest = max(widest, budget) if budget <= 1.6 * widest else widest
    ticks: list[float] = []
    for tick in TICKS:
        if tick <= widest * 1.1 and (not ticks or (tick**0.5 - ticks[-1] ** 0.5) > widest**0.5 / 12):
            ticks.append(tick)
    axes.set_xlim(-0.0016 * widest, 1.12 * widest)  # signed square: 4 % of the axis
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    return widest


def _draw_ideal(axes: Axes, ideal: Mapping[str, Any], widest: float) -> list[Label]:
    """The best possible reward at each KL, π_ref·exp(reward/λ), and best-of-n; as far as the runs go."""
    curve = sorted(point for point in ideal.get("ideal", ()) if point[0] <= 1.1 * widest)
    best_of = sorted(point for point in ideal.get("best_of_n", ()) if point[1] <= 1.1 * widest)
    labels = []
    if curve:
        axes.plot(*zip(*curve, strict=True), color=GREY, linewidth=2, zorder=2)
        kl, gold = curve[len(curve) * 2 // 3]
        labels.append(Label(kl, gold, "ideal", GREY, 14))
    if best_of:
        counts, kls, golds = zip(*best_of, strict=True)
        axes.plot(kls, golds, color=GREY, linewidth=1.5, linestyle=joined(kls, ":"), marker="x", markersize=7, zorder=2)
        labels.append(Label(kls[-1], golds[-1], f"best of {counts[-1]:g}", GREY, 14))
    return labels


def place_labels(axes: Axes, labels: Sequence[Label]) -> None:
    """Write each label beside its point where it covers least: of other labels, and of all that is drawn."""
    paths = [(line.get_transform().transform(line.get_xydata()), line.get_linestyle() != "None") for line in axes.lines]
    for bars in axes.collections:
        paths += [(axes.transData.transform(path.vertices), True) for path in bars.get_paths()]
    points: list[Any] = [np.empty((0, 2))]
    for corners, is_joined in paths:
        points.append(corners)
        for start, end in pairwise(corners) if is_joined else ():
            steps = int(np.hypot(*(end - start)) // SPACING)
            points.append(start + np.linspace(0, 1, steps + 2)[1:-1, None] * (end - start))
    taken = np.tile(np.vstack(points), 2) + AIR  # boxes of points, intervals and lines, (n, 4) pixels
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


def _overlap(boxes: Any, others: Any) -> Any:
    """Square pixels that each of `boxes`, (n, 4), shares with each of `others`, (m, 4): (n, m)."""
    low, high = np.maximum(boxes[:, None, :2], others[:, :2]), np.minimum(boxes[:, None, 2:], others[:, 2:])
    return (high - low).clip(0).prod(-1)
