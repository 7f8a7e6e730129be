"""data_report.png: what a data set holds and what is wrong with it, at a glance. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.data.report.advice import SHORTCUT
from dpo_kit.run.report.picture import BLUE, GREY, ORANGE, OVER_THE_LINE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHT = "#B5CFE3"
Bar = tuple[str, float, str, str]  # label, value, what is written beside it, colour


def draw_data_report(path: Path, report: dict[str, Any], *, title: str, before: dict[str, Any] | None = None) -> Path:
    """Draw `report` into `path`, 1200 pixels wide; `before` (of the rows before curation) is drawn in grey beside it.

    A panel whose figures the report has not is left out. Orange means: look at this.
    """
    from matplotlib.figure import Figure

    panels = [panel for panel, has in PANELS if has(report)]
    lines = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(12, 3.9 * lines + 1.2), dpi=100)
    height = figure.get_figheight()
    figure.suptitle(title, x=0.03, y=1 - 0.18 / height, ha="left", va="top", fontsize=23, fontweight="bold")
    figure.text(0.03, 1 - 0.95 / height, _headline(report, before), ha="left", fontsize=16, color=GREY)
    grid = figure.add_gridspec(
        lines, 2, left=0.03, right=0.97, bottom=0.55 / height, top=1 - 1.65 / height, wspace=0.14, hspace=0.42
    )
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(grid[number])
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=13, colors=GREY)
        panel(axes, report, before)
    figure.savefig(path)
    return path


def _headline(report: dict[str, Any], before: dict[str, Any] | None) -> str:
    warnings = len(report["warnings"])
    found = f"{warnings} thing{'s' if warnings != 1 else ''} to look at" if warnings else "nothing to look at"
    return f"orange: look at this · {found}" + (" · grey: before curation" if before else "")


def _bars(axes: Axes, title: str, bars: Sequence[Bar]) -> None:
    """Horizontal bars, each with its label above it and its value at its end."""
    axes.set_title(title, loc="left", fontsize=18, fontweight="bold", pad=10)
    axes.set_yticks([])
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    widest = max((value for _, value, _, _ in bars), default=0) or 1
    for line, (label, value, text, color) in enumerate(bars):
        axes.barh(-line, value / widest, height=0.42, color=color)
        axes.text(0, -line + 0.3, label, fontsize=14.5, va="bottom", ha="left")
        axes.text(value / widest + 0.015, -line, text, fontsize=14.5, va="center", ha="left", fontweight="bold")
    axes.set_xlim(0, 1.2)
    axes.set_ylim(-max(4, len(bars)) + 0.6, 0.85)


def _draw_rows(axes: Axes, report: dict[str, Any], before: dict[str, Any] | None) -> None:
    rows = report["rows"]
    bars: list[Bar] = [("before", before["rows"]["train"], f"{before['rows']['train']:,}", GREY)] if before else []
    bars += [(f"{name.replace('_', ' ')}", n, f"{n:,}", BLUE) for name, n in rows.items() if n and name != "dropped"]
    dropped = list(report["dropped_by_reason"].items())
    bars += [(f"dropped: {reason}", n, f"{n:,}", ORANGE) for reason, n in dropped[:3]]
    if rest := sum(n for _, n in dropped[3:]):
        bars.append(("dropped: other reasons", rest, f"{rest:,}", ORANGE))
    _bars(axes, "Rows", bars)


def _draw_repeats(axes: Axes, report: dict[str, Any], before: dict[str, Any] | None) -> None:
    names = {
        "copies": "copies",
        "near_duplicates": "near-duplicates",
        "contradictions": "rows that contradict each other",
        "near_contradictions": "… nearly the same answers",
        "leaks": "prompts shared with held-out rows",
        "benchmark": "prompts shared with the benchmark",
    }
    asked = [name for name in names if name in report and (name != "benchmark" or report[name]["prompts"])]
    counts = [(names[name], report[name]["rows"]) for name in asked]
    shown = [(label, n) for label, n in counts if n or label != names["near_contradictions"]]
    old = {names[name]: f" (before {before[name]['rows']:,})" for name in asked if name in before} if before else {}
    bars = [(label, n, f"{n:,}{old.get(label, '')}", ORANGE if n else BLUE) for label, n in shown]
    _bars(axes, "Repeats and leaks (rows)", bars)


def _draw_shortcuts(axes: Axes, report: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Accuracy of each rule with its interval against chance; orange where it is a shortcut."""
    axes.set_title("Chosen, told by one rule alone", loc="left", fontsize=18, fontweight="bold", pad=10)
    rules = told(report["shortcuts"])
    axes.axvspan(1 - SHORTCUT, SHORTCUT, color=GREY, alpha=0.1, linewidth=0)
    axes.axvline(0.5, color=GREY, linewidth=1.5, linestyle=(0, (4, 3)))
    for line, (name, found) in enumerate(rules.items()):
        color = ORANGE if found["low"] > SHORTCUT or found["high"] < 1 - SHORTCUT else BLUE
        old = (before or {}).get("shortcuts", {}).get(name)
        if old:
            axes.plot(old["accuracy"], -line, marker="o", markersize=11, color="#BBBBBB")
        axes.plot([found["low"], found["high"]], [-line, -line], color=color, linewidth=3)
        axes.plot(found["accuracy"], -line, marker="o", markersize=11, color=color)
        axes.text(0.0, -line + 0.14, name, fontsize=14.5, va="bottom", ha="left")
        axes.text(1, -line, f"{found['accuracy']:.2f}", fontsize=14.5, va="center", ha="right", fontweight="bold")
    axes.set_xlim(0, 1)
    axes.set_ylim(-max(4, len(rules)) + 0.5, 0.9)
    axes.set_yticks([])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "chance", "", "1"])


def _draw_lengths(axes: Axes, report: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Each column's spread: the middle half thick, 5 to 95 % thin, the median a dot; the limit as a line."""
    cut, limit = report["cut_at_max_length"], report["max_length"]
    axes.set_title("Length (tokens)", loc="left", fontsize=18, fontweight="bold", pad=10)
    top = max(found["p95"] for found in report["tokens"].values())
    for line, (name, found) in enumerate(report["tokens"].items()):
        color = {"prompt": GREY, "rejected": LIGHT}.get(name, BLUE)
        axes.plot([found["p5"], found["p95"]], [-line, -line], color=color, linewidth=2.5)
        axes.plot([found["p25"], found["p75"]], [-line, -line], color=color, linewidth=11, solid_capstyle="butt")
        axes.plot(
            found["median"], -line, marker="o", markersize=12, color="white", markeredgecolor=color, markeredgewidth=3
        )
        label = f"{name}: {found['median']:,.0f} (95 % below {found['p95']:,.0f})"
        axes.text(0, -line + 0.24, label, fontsize=14.5, va="bottom", ha="left", bbox=OVER_THE_LINE)
    if limit and limit < 2.5 * top:
        axes.axvline(limit, color=ORANGE if cut else GREY, linewidth=2, linestyle=(0, (4, 3)))
        top = max(top, limit)
    note = f"max_length {limit or 'none'} cuts {cut:,} rows"
    axes.text(0, -len(report["tokens"]) + 0.3, note, fontsize=14.5, color=ORANGE if cut else GREY, bbox=OVER_THE_LINE)
    axes.set_xlim(0, 1.05 * top)
    axes.set_ylim(-len(report["tokens"]) + 0.1, 0.8)
    axes.set_yticks([])


def _draw_agreement(axes: Axes, report: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Rows by the share of raters behind their label; below .7 in orange."""
    found = report["agreement"]
    old = before["agreement"]["mean"] if before and before["agreement"] else None
    title = f"Rater agreement: {found['mean']:.2f}" + (f" (before {old:.2f})" if old else "")
    axes.set_title(title, loc="left", fontsize=18, fontweight="bold", pad=10)
    shown = [(low, n) for low, n in found["histogram"] if low >= 0.5 or n]
    colors = [ORANGE if low < 0.7 else BLUE for low, _ in shown]
    axes.bar([low + 0.05 for low, _ in shown], [n for _, n in shown], width=0.09, color=colors)
    top = max(n for _, n in shown)
    for low, n in shown:
        axes.text(low + 0.05, n + 0.02 * top, f"{n:,}", ha="center", va="bottom", fontsize=14.5, fontweight="bold")
    axes.set_ylim(0, 1.15 * top)
    axes.set_yticks([])
    axes.set_xticks([round(low, 1) for low, _ in shown] + [1.0])
    axes.set_xlabel("share of raters behind the label", fontsize=14, color=GREY)


def _draw_classes(axes: Axes, report: dict[str, Any], before: dict[str, Any] | None) -> None:
    found = report["classes"]
    bars = [("thumbs up", found["desirable"]), ("thumbs down", found["undesirable"])]
    _bars(axes, "Labels", [(label, n, f"{n:,}", BLUE) for label, n in bars])


def _draw_balance(axes: Axes, report: dict[str, Any], before: dict[str, Any] | None) -> None:
    column, found = next(iter(report["balance"].items()))
    top = list(found["largest"].items())[:5]
    _bars(
        axes, f"Rows by {column} ({found['values']:,} in all)", [(str(name)[:40], n, f"{n:,}", BLUE) for name, n in top]
    )


def _draw_diversity(axes: Axes, report: dict[str, Any], before: dict[str, Any] | None) -> None:
    found = report["diversity"]
    names = {
        "prompts": "different prompts",
        "clusters": "of them unlike each other",
        "opening_words": "different openings",
    }
    _bars(axes, "Prompts", [(label, found[name], f"{found[name]:,}", BLUE) for name, label in names.items()])


def told(shortcuts: dict[str, Any]) -> dict[str, Any]:
    """The rules that name an answer in one pair of a hundred or more; length once."""
    return {name: found for name, found in shortcuts.items() if found["decides"] >= 0.01 and "characters" not in name}


Panel = Callable[["Axes", dict[str, Any], dict[str, Any] | None], None]
PANELS: tuple[tuple[Panel, Callable[[dict[str, Any]], Any]], ...] = (
    (_draw_rows, lambda report: True),
    (_draw_repeats, lambda report: True),
    (_draw_shortcuts, lambda report: told(report.get("shortcuts", {}))),
    (_draw_classes, lambda report: report.get("classes")),
    (_draw_lengths, lambda report: True),
    (_draw_agreement, lambda report: report["agreement"]),
    (_draw_balance, lambda report: report["balance"]),
    (_draw_diversity, lambda report: report.get("diversity")),
)
