"""A run at a glance: report.png, its measures over steps. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import last_step, latest, read_metrics, series
from dpo_kit.run.measures import in_rounding, kl_keys
from dpo_kit.run.report import drawing
from dpo_kit.run.report.drawing import BLUE, GREEN, GREY, ORANGE
from dpo_kit.run.report.numbers import number_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Curve:
    """One key over steps, with its interval where it has one."""

    key: str
    label: str = ""
    color: str = BLUE


@dataclass(frozen=True)
class Panel:
    """One quantity with its unit. Of `curves` those are drawn that the run has; `level` is a line to compare with,
    `counted` what the quantity rests on (see `_counts`).
    """

    title: str
    curves: tuple[Curve, ...]
    counted: str = "held out"
    level: float | None = None
    level_name: str = ""
    limits: tuple[float, float] | None = None


PANELS = (
    Panel("Preference margin (nats)", (Curve("probe/margin_nats"),), level=0.0),
    Panel("Class gap of log-ratios (nats)", (Curve("probe/class_gap_nats"),), level=0.0),
    Panel(
        "Implicit reward, β·log-ratio (nats)",
        (Curve("probe/reward_chosen", "chosen"), Curve("probe/reward_rejected", "rejected", ORANGE)),
        level=0.0,
    ),
    Panel(
        "Log-ratio to the reference (nats)",
        (Curve("probe/logratio_chosen_nats", "chosen"), Curve("probe/logratio_rejected_nats", "rejected", ORANGE)),
        level=0.0,
    ),
    Panel("Accuracy on held-out pairs", (Curve("probe/accuracy"),), level=0.5, level_name="chance"),
    Panel("AUC on held-out answers", (Curve("probe/auc"),), level=0.5, level_name="chance"),
    Panel(
        "KL drift (nats per answer)",
        tuple(
            Curve(key, way, color) for way, color in (("forward", BLUE), ("reverse", ORANGE)) for key in kl_keys(way)
        ),
        counted="fresh",
        level=0.0,
    ),
    Panel("Gold reward of fresh samples", (Curve("gold/reward", color=GREEN),), counted="fresh"),
    Panel(
        "Capability (share right)", (Curve("gold/capability", color=GREEN),), counted="capability", limits=(0.0, 1.05)
    ),
)


def draw_report(run_dir: str | Path, *, title: str = "", ceiling: float | None = None) -> Path:
    """Draw `run_dir`/report.png, 1200 pixels wide, from metrics.jsonl, probe.jsonl and samples.jsonl; returns its path.

    A quantity that the run did not measure leaves its panel out. `ceiling` is the accuracy that label noise leaves.
    """
    run = RunDirectory(Path(run_dir))
    rows = read_metrics(run.metrics)
    counts, panels = _counts(run, rows), shown_panels(rows)
    lines = max(1, math.ceil(len(panels) / 2))
    figure = drawing.new_figure(4.1 * lines + 0.9)
    height = figure.get_figheight()
    figure.suptitle(title or run.root.resolve().name, x=0.03, y=1 - 0.16 / height, ha="left", va="top", fontsize=22,
                    fontweight="bold")  # fmt: skip
    note = "bands and bars: 95 % intervals"
    figure.text(0.985, 1 - 0.3 / height, note, ha="right", va="top", fontsize=15, color=GREY)
    place: dict[str, float] = {"left": 0.065, "right": 0.88, "bottom": 0.7 / height, "top": 1 - 1.6 / height}
    grid = figure.add_gridspec(lines, 2, **place, wspace=0.55, hspace=0.62)
    for number, panel in enumerate(panels):
        _draw_panel(figure.add_subplot(grid[number]), panel, rows, counts[panel.counted], ceiling)
    if not panels:
        figure.text(0.5, 0.45, "nothing was measured in this run", ha="center", fontsize=20)
    return drawing.save(figure, run.picture)


def shown_panels(rows: Rows) -> list[Panel]:
    """The panels that these rows can fill; log-ratios only where there is no implicit reward."""
    panels = [panel for panel in PANELS if any(series(rows, curve.key) for curve in panel.curves)]
    either = ("probe/reward_chosen", "probe/logratio_chosen_nats")
    of_sides = [panel for panel in panels if panel.curves[0].key in either]
    return [panel for panel in panels if panel not in of_sides[1:]]


def _counts(run: RunDirectory, rows: Rows) -> dict[str, tuple[int, str]]:
    """How many of what the last values of a run rest on, 0 where it is not recorded."""
    probed, sampled = (last_step(read_metrics(path)) for path in (run.probe, run.samples))
    sides = ("logratio_chosen_nats", "logratio_rejected_nats")
    paired = any(all(row.get(side) is not None for side in sides) for row in probed)
    return {
        "held out": (len(probed), "pairs" if paired else "answers"),
        "fresh": (len(sampled), "answers"),
        "capability": (int(latest(rows).get("gold/capability_prompts", 0)), "questions"),
    }


def _draw_panel(axes: Axes, panel: Panel, rows: Rows, counted: tuple[int, str], ceiling: float | None) -> None:
    drawing.over_steps(axes)
    (count, unit), values, notes = counted, latest(rows), []
    last = max((row.get("step", 0) for row in rows), default=0) or 1
    axes.set_xlim(-0.03 * last, 1.03 * last)  # the same for every panel, with a little air, so that panels compare
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=1, linestyle=drawing.DASHES, zorder=0.5)
        notes += [f"dashed: {panel.level_name}"] if panel.level_name else []
    if ceiling is not None and panel.curves[0].key == "probe/accuracy":
        axes.axhline(ceiling, color=GREY, linewidth=1.5, linestyle=":", zorder=0.5)
        notes.append(f"dotted: label ceiling {ceiling:.2f}")
    notes.append(drawing.draw_floor(axes, panel.curves[0].key, values))
    curves = _measured(panel.curves, rows)
    for curve in curves:
        drawing.draw_course(
            axes,
            series(rows, curve.key),
            drawing.intervals(rows, curve.key),
            curve.color,
            hollow=0 < count < drawing.FEW,
        )
    drawing.head(axes, panel.title, drawing.count_text([count], unit), *notes)
    axes.margins(y=0.12)
    if panel.limits:
        axes.set_ylim(panel.limits)
    _label_ends(axes, curves, values)


def _measured(curves: Sequence[Curve], rows: Rows) -> list[Curve]:
    """One curve per label: the estimator with more points, the first named where they have as many."""
    best: dict[str, Curve] = {}
    for curve in curves:
        rival = best.get(curve.label)
        if len(series(rows, curve.key)) > (len(series(rows, rival.key)) if rival else 0):
            best[curve.label] = curve
    return list(best.values())


def _label_ends(axes: Axes, curves: Sequence[Curve], values: Mapping[str, float]) -> None:
    """Write name and last value (or that it is rounding) beside each curve's end, outside the panel, apart."""
    bottom, top = axes.get_ylim()
    gap = 0.21 * (top - bottom)
    for curve, height in zip(
        curves,
        drawing.spread([values[curve.key] for curve in curves], gap, bottom + gap / 3, top - gap / 3),
        strict=True,
    ):
        value = values[curve.key]
        size = abs(value)
        form = ".1f" if size >= 10 else ".2f" if size >= 0.1 or value == 0 else ".1g"
        shown = "rounding" if in_rounding(curve.key, values) else number_text(value, form)
        axes.text(
            1.03, height, f"{curve.label}\n{shown}".strip(), transform=axes.get_yaxis_transform(), va="center",
            ha="left", fontsize=16, fontweight="bold", color=curve.color, linespacing=1.0,
        )  # fmt: skip
