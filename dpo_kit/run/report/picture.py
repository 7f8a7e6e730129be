"""A run at a glance: report.png, its measures over steps. Reads metrics.jsonl, needs no torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.run.history import read_metrics, series
from dpo_kit.run.measures import kl_keys
from dpo_kit.run.report.numbers import number_text
from dpo_kit.run.statistics import Z95

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe-Ito: told apart with any colour vision
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#666666"
OVER_THE_LINE = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}  # the box of a text that a line crosses


@dataclass(frozen=True)
class Curve:
    """One key over steps; its interval is that of `_low` and `_high`, or 1.96 of `_se`."""

    key: str
    label: str = ""
    color: str = BLUE


@dataclass(frozen=True)
class Panel:
    """One quantity with its unit. Of `curves` those are drawn that the run has; `level` is a line to compare with."""

    title: str
    curves: tuple[Curve, ...]
    level: float | None = None
    level_name: str = ""
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("Preference margin (nats)", (Curve("probe/margin_nats"),), 0.0),
    Panel("Class gap of log-ratios (nats)", (Curve("probe/class_gap_nats"),), 0.0),
    Panel(
        "Implicit reward, β·log-ratio (nats)",
        (Curve("probe/reward_chosen", "chosen"), Curve("probe/reward_rejected", "rejected", ORANGE)),
        0.0,
    ),
    Panel(
        "Log-ratio to the reference (nats)",
        (Curve("probe/logratio_chosen_nats", "chosen"), Curve("probe/logratio_rejected_nats", "rejected", ORANGE)),
        0.0,
    ),
    Panel("Accuracy on held-out pairs", (Curve("probe/accuracy"),), 0.5, "chance"),
    Panel("AUC on held-out answers", (Curve("probe/auc"),), 0.5, "chance"),
    Panel(
        "KL drift (nats per answer)",
        tuple(
            Curve(key, way, color) for way, color in (("forward", BLUE), ("reverse", ORANGE)) for key in kl_keys(way)
        ),
        0.0,
    ),
    Panel("Gold reward of fresh samples", (Curve("gold/reward", color=GREEN),)),
    Panel("Capability (share right)", (Curve("gold/capability", color=GREEN),), limits=(0.0, 1.05)),
)


def draw_report(run_dir: str | Path, *, title: str = "", ceiling: float | None = None) -> Path:
    """Draw `run_dir`/report.png, 1200 pixels wide, from `run_dir`/metrics.jsonl alone; returns its path.

    A quantity that the run did not measure leaves its panel out. `ceiling` is the accuracy that label noise leaves.
    """
    from matplotlib.figure import Figure

    rows = read_metrics(Path(run_dir) / "metrics.jsonl")
    panels = shown_panels(rows)
    columns = 3 if len(panels) > 4 else 2
    lines = max(1, math.ceil(len(panels) / columns))
    figure = Figure(figsize=(12, 3.6 * lines + 0.7), dpi=100)
    figure.suptitle(title or Path(run_dir).resolve().name, x=0.04, y=0.98, ha="left", fontsize=18, fontweight="bold")
    figure.text(0.985, 0.965, "bands and bars: 95 % intervals", ha="right", fontsize=12, color=GREY)
    top = 1 - 1.05 / figure.get_figheight()
    bottom = 0.6 / figure.get_figheight()
    grid = figure.add_gridspec(lines, columns, left=0.045, right=0.91, bottom=bottom, top=top, wspace=0.56, hspace=0.42)
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[number]), panel, rows, ceiling)
    if not panels:
        figure.text(0.5, 0.45, "nothing was measured in this run", ha="center", fontsize=17)
    path = Path(run_dir) / "report.png"
    figure.savefig(path)
    return path


def shown_panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The panels that these rows can fill; log-ratios only where there is no implicit reward."""
    found = [panel for panel in PANELS if any(series(rows, curve.key) for curve in panel.curves)]
    rewards = [panel for panel in found if panel.curves[0].key in ("probe/reward_chosen", "probe/logratio_chosen_nats")]
    return [panel for panel in found if panel not in rewards[1:]]


def _draw_panel(axes: "Axes", panel: Panel, rows: Sequence[Mapping[str, Any]], ceiling: float | None) -> None:
    axes.set_title(panel.title, loc="left", fontsize=15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=12, colors=GREY)
    axes.set_xlabel("step", fontsize=12, color=GREY)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=4, integer=True)
    last = max((row.get("step", 0) for row in rows), default=0) or 1
    axes.set_xlim(-0.03 * last, 1.03 * last)  # the same for every panel, with a little air, so that panels compare
    if panel.level is not None:
        _draw_level(axes, panel.level, panel.level_name)
    if ceiling is not None and panel.curves[0].key == "probe/accuracy":
        _draw_level(axes, ceiling, f"ceiling of the labels {ceiling:.2f}", "bottom")
    ends = [_draw_curve(axes, curve, rows) for curve in _measured(panel.curves, rows)]
    axes.margins(y=0.12)
    if panel.limits:
        axes.set_ylim(panel.limits)
    _label_ends(axes, ends)


def _measured(curves: Sequence[Curve], rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """One curve per label: the estimator with more points, the first named where they have as many."""
    best: dict[str, Curve] = {}
    for curve in curves:
        rival = best.get(curve.label)
        if len(series(rows, curve.key)) > (len(series(rows, rival.key)) if rival else 0):
            best[curve.label] = curve
    return list(best.values())


def _draw_level(axes: "Axes", value: float, name: str, side: str = "top") -> None:
    """A dashed line over the whole width, its name at the right above (`bottom` on the line) or under it."""
    axes.axhline(value, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=0)
    place = axes.get_yaxis_transform()
    axes.text(0.99, value, name, transform=place, va=side, ha="right", fontsize=12, color=GREY)


def _draw_curve(axes: "Axes", curve: Curve, rows: Sequence[Mapping[str, Any]]) -> tuple[int, float, Curve]:
    """Draw one curve with its interval (a band; bars where points are few) and return where it ends."""
    points = series(rows, curve.key)
    steps, values, few = list(points), list(points.values()), len(points) <= 4
    axes.plot(steps, values, color=curve.color, linewidth=2.5, marker="o", markersize=8 if few else 5)
    lows, highs, errors = (series(rows, f"{curve.key}_{end}") for end in ("low", "high", "se"))
    if lows or errors:  # a point without an interval stands for itself
        reach = {step: Z95 * errors.get(step, 0.0) for step in points}
        low = [min(value, lows.get(step, value - reach[step])) for step, value in points.items()]
        high = [max(value, highs.get(step, value + reach[step])) for step, value in points.items()]
        if few:
            below = [value - end for value, end in zip(values, low, strict=True)]
            above = [end - value for value, end in zip(values, high, strict=True)]
            axes.errorbar(steps, values, yerr=[below, above], color=curve.color, linewidth=0, elinewidth=2, capsize=5)
        else:
            axes.fill_between(steps, low, high, color=curve.color, alpha=0.2, linewidth=0)
    return steps[-1], values[-1], curve


def _label_ends(axes: "Axes", ends: Sequence[tuple[int, float, Curve]]) -> None:
    """Write name and last value beside each curve's end, pushed apart where two would touch, and below the title."""
    bottom, top = axes.get_ylim()
    gap = 0.19 * (top - bottom)
    ends = sorted(ends, key=lambda end: end[1])
    heights: list[float] = []
    for _, value, _ in ends:
        heights.append(max(value, heights[-1] + gap) if heights else value)
    above = max(0.0, heights[-1] - (top - gap / 2)) if len(heights) > 1 else 0.0
    for (step, value, curve), height in zip(ends, heights, strict=True):
        size = abs(value)
        form = ".1f" if size >= 10 else ".2f" if size >= 0.1 or value == 0 else ".1g"
        text = f"{curve.label}\n{number_text(value, form)}".strip()
        axes.annotate(
            text, (step, value), (1.03, height - above), textcoords=axes.get_yaxis_transform(), va="center", ha="left",
            fontsize=13.5, fontweight="bold", color=curve.color, annotation_clip=False,
        )  # fmt: skip
