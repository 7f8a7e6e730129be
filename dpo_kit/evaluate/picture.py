"""evaluation.png: win rates, verdicts, accuracy, calibration, gate and failures at a glance. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.run.report.picture import BLUE, GREY, ORANGE, OVER_THE_LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Found = Mapping[str, Any]
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 18, "fontweight": "bold", "pad": 12}
TEXT = 14.5
DASHED: dict[str, Any] = {"linewidth": 1.5, "linestyle": (0, (4, 3))}
SCORING = ("gold", "reward_model")  # judges that give each answer a number, whatever the order
DOUBTS = {
    "order_inconsistency": "orders disagree",
    "first_position_rate": "first place preferred",
    "unparsable_rate": "verdicts unparsable",
}
LIGHT, MIDDLE = "#D9D9D9", "#A6A6A6"


def draw_evaluation(path: Path, parts: Mapping[str, Found], *, title: str) -> None:
    """Draw what `parts` (findings by part) have into `path`, 1200 pixels wide; a panel without figures is left out."""
    from matplotlib.figure import Figure

    panels = [(draw, parts[name]) for name, has, draw in PANELS if name in parts and has(parts[name])]
    lines = max(1, math.ceil(len(panels) / 2))
    figure = Figure(figsize=(12, 4.3 * lines + 1.0), dpi=100)
    height = figure.get_figheight()
    title = _short(title, 78)
    figure.suptitle(title, x=0.03, y=1 - 0.18 / height, ha="left", va="top", fontsize=21, fontweight="bold")
    place: dict[str, float] = {"left": 0.03, "right": 0.97, "bottom": 0.75 / height, "top": 1 - 1.35 / height}
    grid = figure.add_gridspec(lines, 2, **place, wspace=0.14, hspace=0.5)
    for number, (draw, found) in enumerate(panels):
        axes = figure.add_subplot(grid[number])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=13, colors=GREY)
        draw(axes, found)
    if not panels:
        figure.text(0.5, 0.45, "nothing to draw was measured", ha="center", fontsize=17)
    figure.savefig(path)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _interval(found: Found, key: str) -> tuple[float, float, float]:
    return found[key], found[f"{key}_low"], found[f"{key}_high"]


def _draw_interval(
    axes: Axes, line: int, label: str, interval: tuple[float, float, float], color: str, label_color: str = "black"
) -> None:
    """On line `line` from above a dot with its interval (value, low, high), and the label above them."""
    value, *ends = interval
    axes.plot(ends, [-line, -line], color=color, linewidth=3)
    axes.plot(value, -line, marker="o", markersize=10, color=color)
    place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "bottom", "bbox": OVER_THE_LINE}
    axes.text(0.0, -line + 0.16, label, fontsize=TEXT, color=label_color, **place)


def _set_lines(axes: Axes, count: int) -> None:
    axes.set_ylim(-max(4, count) + 0.5, 0.95)
    axes.set_yticks([])


def _draw_rates(axes: Axes, title: str, rates: Mapping[str, tuple[float, float, float]], level_name: str) -> None:
    """A dot with its interval for each rate, against ½; blue where the interval lies above, orange below, else grey."""
    axes.set_title(title, **TITLE)
    axes.axvline(0.5, color=GREY, **DASHED)
    for line, (label, (value, low, high)) in enumerate(rates.items()):
        color = BLUE if low > 0.5 else ORANGE if high < 0.5 else GREY
        _draw_interval(axes, line, label, (value, low, high), color)
        axes.text(1.03, -line, f"{value:.2f}", fontsize=TEXT, va="center", ha="left", fontweight="bold", color=color)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", level_name, "", "1"])
    _set_lines(axes, len(rates))


def _draw_win_rates(axes: Axes, found: Found) -> None:
    names = {
        "win_rate": "win rate",
        "win_rate_without_ties": "with ties dropped",
        "win_rate_length_controlled_without_difficulty": "at equal length, no instruction difficulty",
    }
    rates = {label: _interval(found, key) for key, label in names.items() if found.get(key) is not None}
    _draw_rates(axes, f"Win rate, {found['prompts']:,} prompts: {found['win_rate_verdict']}", rates, "0.5")


def _draw_verdicts(axes: Axes, found: Found) -> None:
    """One bar of all comparisons, and below it what tells how far the judge can be trusted."""
    axes.set_title(f"Verdicts on {found['comparisons']:,} comparisons", **TITLE)
    axes.spines["bottom"].set_visible(False)
    total, left, line = sum(found["outcomes"].values()) or 1, 0.0, 0
    colors = {"win": BLUE, "tie": LIGHT, "order-dependent": MIDDLE, "loss": ORANGE, "unjudged": "white"}
    for name, color in colors.items():
        share, edge = found["outcomes"][name] / total, GREY if color == "white" else color
        axes.barh(0, share, left=left, height=0.5, color=color, edgecolor=edge)
        left += share
        if share:
            y = -0.62 - 0.36 * line
            axes.plot(0.015, y, marker="s", markersize=13, color=color, markeredgecolor=edge)
            axes.text(0.045, y, f"{name}: {share:.0%}", fontsize=TEXT, va="center")
            line += 1
    trust = [f"judge: {_short(found['judge']['name'], 26)}"]
    if found["judge"]["kind"] not in SCORING:
        trust += [f"{label}: {found[key]:.0%}" for key, label in DOUBTS.items() if found[key] is not None]
    trust += [f"CONTROL FAILED: {control['name']}" for control in found["controls"] if not control["passed"]]
    for line, text in enumerate(trust):
        color = ORANGE if "FAILED" in text else "black"
        axes.text(0.52, -0.62 - 0.36 * line, text, fontsize=TEXT, va="center", color=color)
    axes.set_xlim(0, 1)
    axes.set_ylim(-2.6, 0.45)
    axes.set_xticks([])
    axes.set_yticks([])


def _draw_groups(axes: Axes, found: Found) -> None:
    """Accuracy over all pairs, by which answer is the longer, and from close to clear calls."""
    groups, gaps = dict(found["by_length"]), found["by_score_gap"]
    if len(gaps) > 1:  # the ends tell whether it fails on close calls only
        groups |= {
            f"score gap up to {gaps[0]['to']:.2g}": gaps[0],
            f"score gap from {gaps[-1]['from']:.2g}": gaps[-1],
        }
    rates = {"all pairs": _interval(found, "accuracy")}
    for name, group in groups.items():
        if group["pairs"]:
            rates[f"{name} ({group['pairs']:,})"] = group["accuracy"], group["low"], group["high"]
    _draw_rates(axes, f"Accuracy on {found['pairs']:,} held-out pairs", rates, "chance")


def _draw_calibration(axes: Axes, found: Found) -> None:
    """Accuracy against confidence; on the diagonal where the implicit reward is as sure as it is right."""
    calibration = found["calibration"]
    axes.set_title(f"Calibration (ECE {calibration['ece']:.2f})", **TITLE)
    axes.spines["left"].set_visible(True)
    axes.plot([0.5, 1], [0.5, 1], color=GREY, **DASHED)
    rows = calibration["reliability"]
    most = max(row["pairs"] for row in rows)
    for row in rows:
        axes.plot([row["confidence"]] * 2, [row["low"], row["high"]], color=BLUE, linewidth=2, alpha=0.6)
        axes.plot(row["confidence"], row["accuracy"], marker="o", color=BLUE, markersize=6 + 9 * row["pairs"] / most)
    axes.set_xlabel("confidence, σ(β · margin); larger dot: more pairs", fontsize=TEXT, color=GREY)
    axes.set_ylabel("accuracy", fontsize=TEXT, color=GREY)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(min(0.5, *(row["low"] for row in rows)) - 0.02, 1.02)
    place = axes.get_position()
    axes.set_position((place.x0 + 0.05, place.y0, place.width - 0.05, place.height))


def _draw_gate(axes: Axes, found: Found) -> None:
    """The change of each task with its interval, the worst first; the dashed line is the largest loss allowed."""
    limit, shown = found["gate"]["limit"], sorted(found["tasks"], key=lambda task: task["difference"])[:6]
    axes.set_title(f"Regression gate: {found['gate']['verdict']}", **TITLE)
    axes.axvline(0, color=GREY, linewidth=1.5)
    axes.axvline(-limit, color=ORANGE, **DASHED)
    for line, task in enumerate(shown):
        color = {"failed": ORANGE, "passed": BLUE, "inconclusive": GREY}[task["verdict"]]
        label = f"{_short(task['task'], 24)} ({task['n']:,}): {task['difference']:+.3f}, {task['verdict']}"
        interval = task["difference"], task["low"], task["high"]
        _draw_interval(axes, line, label.replace("-", "−"), interval, color, label_color=color)
    low, high = min(task["low"] for task in shown), max(task["high"] for task in shown)
    axes.set_xlim(min(low, -2 * limit, -0.02) * 1.1, max(high, limit, 0.02) * 1.1)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("policy − reference; dashed: the largest loss allowed", fontsize=TEXT, color=GREY)
    _set_lines(axes, len(shown))


def _draw_failures(axes: Axes, found: Found) -> None:
    """How frequent each group of losses is among the losses and among the wins; bold where that is beyond chance."""
    losses, wins = (found["outcomes"].get(name, 0) for name in ("loss", "win"))
    shown = [group for group in found["groups"] if group["losses"]][:5]
    axes.set_title(f"Where it loses: {losses:,} losses, {wins:,} wins", **TITLE)
    for line, group in enumerate(shown):
        ends = group["losses"] / losses, group["wins"] / wins if wins else 0.0
        axes.plot(ends, [-line, -line], color=LIGHT, linewidth=3, zorder=1)
        for share, color in zip(ends, (ORANGE, BLUE), strict=True):
            axes.plot(share, -line, marker="o", markersize=10, color=color)
        weight = "bold" if group["telling"] else "normal"
        axes.text(0.0, -line + 0.16, group["name"], fontsize=TEXT, va="bottom", fontweight=weight)
    for place, name, color in ((0.5, "of the losses", ORANGE), (0.82, "of the wins", BLUE)):
        axes.text(place, 0.62, name, fontsize=TEXT, va="bottom", ha="left", color=color)
    axes.set_xlim(-0.02, 1.15)
    axes.set_xticks([0, 0.5, 1], ["0", "half", "all"])
    _set_lines(axes, len(shown))


PANELS: tuple[tuple[str, Callable[[Found], bool], Callable[[Axes, Found], None]], ...] = (
    ("win_rate", lambda found: found["win_rate"] is not None, _draw_win_rates),
    ("win_rate", lambda found: bool(found["comparisons"]), _draw_verdicts),
    ("preferences", lambda found: found["kind"] == "pairs", _draw_groups),
    ("preferences", lambda found: bool(found.get("calibration")), _draw_calibration),
    ("gate", lambda found: bool(found["tasks"]), _draw_gate),
    ("failures", lambda found: bool(found["outcomes"].get("loss")), _draw_failures),
)
