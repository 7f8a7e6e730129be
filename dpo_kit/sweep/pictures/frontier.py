"""frontier.png: quality against the square root of the reverse KL, a line per method through its betas.

A method is better where its line lies higher at the same KL (Gao et al. 2023, arXiv:2210.10760; for direct methods
arXiv:2406.02900). Data of the best possible line, where the gold reward is known: {"ideal": [[KL, gold reward], …],
"best_of_n": [[n, KL, gold reward], …]}, KL in nats per answer.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from dpo_kit.errors import DataError
from dpo_kit.run.files import read_json
from dpo_kit.run.statistics import Z95
from dpo_kit.sweep.choice.quality import Interval, Quality, start_interval
from dpo_kit.sweep.choice.rule import Choice
from dpo_kit.sweep.choice.runs import RunRecord, number, swept_keys
from dpo_kit.sweep.pictures.labels import (
    GREY,
    MARKERS,
    PALETTE,
    Box,
    Label,
    new_figure,
    place_labels,
    save,
    series_names,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)
AXIS = {
    "gold reward": "gold reward of fresh samples",
    "win rate": "win rate of fresh samples against the reference",
    "held-out accuracy": "accuracy on held-out pairs",
    "held-out AUC": "AUC on held-out answers",
}
ROW = 0.33  # inches that a further row of the legend takes
RING = 11.0  # pixels that the recommended run's ring takes around its point
TICKS = (
    0,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.5,
    1,
    2,
    3,
    5,
    7,
    10,
    15,
    20,
    30,
    50,
    70,
    100,
    150,
    200,
    300,
    500,
    1000,
    2000,
    5000,
)


@dataclass(frozen=True)
class Point:
    """A finished run on the frontier: reverse KL in nats per answer and quality, each (value, low, high)."""

    run: RunRecord
    kl: Interval
    quality: Interval


@dataclass(frozen=True)
class Line:
    """The runs of one method (and one value of whatever else is swept), in the order of beta."""

    name: str
    color: str
    marker: str
    points: tuple[Point, ...]
    runs: tuple[RunRecord, ...]


def draw_frontier(
    sweep_dir: str | Path, runs: Sequence[RunRecord], choice: Choice, *, ideal: str | Path | None = None
) -> Path:
    """Draw `sweep_dir`/frontier.png, 1200 pixels wide; a panel for each step-0 model, as their KLs never compare."""
    models: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        if run.manifest:
            models.setdefault(run.start_model, []).append(run)
    panels = list(models.values()) if len(models) > 1 else [list(runs)]
    lines = build_lines(runs, choice.quality)
    extra = math.ceil(len(lines) / _legend_columns(lines)) - 1  # rows of the legend beyond the first
    figure = new_figure((7.4 + ROW * extra) * len(panels))
    best = find_ideal(Path(sweep_dir), runs, ideal) if choice.quality.key == "gold/reward" else {}
    for number_, group in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number_ + 1)
        inside = {run.path for run in group}
        shown = [line for line in lines if {run.path for run in line.runs} & inside]
        picked = choice if len(panels) == 1 else choice.within[number_][1] if number_ < len(choice.within) else choice
        _draw_panel(axes, [_only(line, inside) for line in shown], picked, best)
        title = "Quality against drift" + (f", from {group[0].start_name}" if len(panels) > 1 else "")
        axes.set_title(title, loc="left", fontsize=21, fontweight="bold", pad=42 + 24 * extra)
        axes.set_title(
            _note([_only(line, inside) for line in shown]), loc="right", fontsize=14, color=GREY, pad=42 + 24 * extra
        )
    height, top = figure.get_figheight(), 1.02 + ROW * extra
    figure.subplots_adjust(
        left=0.085, right=0.975, bottom=0.85 / height, top=1 - top / height, hspace=0.36 + ROW * extra / 5.5
    )
    return save(figure, Path(sweep_dir) / "frontier.png")


def _note(lines: Sequence[Line]) -> str:
    """How to read the picture, and how many of the runs it has."""
    drawn, runs = sum(len(line.points) for line in lines), sum(len(line.runs) for line in lines)
    return (f"{drawn} of {runs} runs so far · " if drawn < runs else "") + "bars: 95 % intervals · faint: on the way"


def _only(line: Line, paths: set[str]) -> Line:
    points = tuple(point for point in line.points if point.run.path in paths)
    return Line(line.name, line.color, line.marker, points, tuple(run for run in line.runs if run.path in paths))


def build_lines(runs: Sequence[RunRecord], quality: Quality) -> list[Line]:
    """A line per method and further swept value; a run without KL or quality has no point."""
    names = series_names(runs, swept_keys(runs))
    lines = []
    for index, name in enumerate(dict.fromkeys(names.values())):
        members = tuple(run for run in runs if names[run.path] == name)
        points = tuple(point for run in members if (point := _point(run, quality)))
        style = (PALETTE[index % len(PALETTE)], MARKERS[(index + index // len(PALETTE)) % len(MARKERS)])
        lines.append(Line(name, *style, points, members))
    return lines


def _point(run: RunRecord, quality: Quality) -> Point | None:
    found, kl = quality.read(run), run.kl_reverse
    if found is None or kl is None:
        return None
    reach = Z95 * (run.final(f"{run.kl_reverse_key}_se") or 0.0)
    return Point(run, (kl, max(0.0, kl - reach), kl + reach), found)


def find_ideal(sweep_dir: Path, runs: Sequence[RunRecord], given: str | Path | None) -> dict[str, Any]:
    """The best possible frontier: from the file named, else ideal.json in the sweep or beside the gold module; or {}.

    One that names its weights (`model_sha256`) holds for runs that start from these.

    Raises:
        DataError: the file named is not there or not of that form.
    """
    if given:
        return _read_ideal(Path(given))
    module = next((m for run in runs if (m := (run.config.get("data") or {}).get("gold"))), None)
    found = next((path for path in (sweep_dir / "ideal.json", *_beside(module)) if path.exists()), None)
    read = _read_ideal(found) if found else {}
    weights = {(run.manifest.get("model") or {}).get("sha256") for run in runs if run.manifest}
    return read if read.get("model_sha256") is None or weights == {read["model_sha256"]} else {}


def _beside(module: str | None) -> list[Path]:
    try:
        found = importlib.util.find_spec(module) if module else None
    except ImportError:
        return []
    return [Path(found.origin).parent / "ideal.json"] if found and found.origin else []


def _read_ideal(path: Path) -> dict[str, Any]:
    try:
        read = read_json(path)
        curve = [(float(kl), float(gold)) for kl, gold in read.get("ideal") or []]
        best_of = [(float(n), float(kl), float(gold)) for n, kl, gold in read.get("best_of_n") or []]
    except (OSError, json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
        form = '{"ideal": [[kl, gold], …], "best_of_n": [[n, kl, gold], …]}'
        raise DataError(f"ideal={path} must hold {form}: {error}") from error
    return {"ideal": curve, "best_of_n": best_of, "model_sha256": read.get("model_sha256")}


def _draw_panel(axes: Axes, lines: Sequence[Line], choice: Choice, ideal: Mapping[str, Any]) -> None:
    _dress(axes, choice.quality)
    trails = [trail for line in lines for run in line.runs if (trail := _trail(run, choice.quality))]
    if not any(line.points for line in lines):
        text = "no finished run has a quality and a reverse KL yet"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", fontsize=19, color=GREY)
        return
    for line in lines:
        _draw_line(axes, line, choice.quality)
    reference = _reference(lines, choice.quality)
    if reference:
        _error_bar(axes, Point(lines[0].runs[0], (0, 0, 0), reference), GREY, "D")
    predictions = [each for line in lines for each in _draw_predictions(axes, line, choice.quality)]
    widest = _limit_x(axes, lines, trails, predictions, choice.limits.kl_budget_nats)
    labels = [*_point_labels(lines, choice), *predictions]
    labels += [Label(0, reference[0], "reference", GREY, clear=5)] if reference else []
    labels += _draw_ideal(axes, ideal, widest)
    axes.margins(y=0.14)
    axes.autoscale_view(scalex=False)
    _mark_winner(axes, lines, choice)
    _draw_budget(axes, choice.limits.kl_budget_nats, widest)
    place_labels(axes, labels, [*_obstacles(lines, reference), *((p.x, p.y, p.x, p.y) for p in predictions)])
    _draw_legend(axes, lines)


def _dress(axes: Axes, quality: Quality) -> None:
    import numpy as np

    axes.set_xscale("function", functions=(lambda x: np.sign(x) * np.sqrt(np.abs(x)), lambda x: np.sign(x) * x**2))
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=15, colors=GREY)
    axes.set_xlabel("reverse KL to the reference (nats per answer, square-root scale)", fontsize=16, color=GREY)
    axes.set_ylabel(AXIS[quality.name], fontsize=16, color=GREY)
    axes.locator_params(axis="y", nbins=6)
    axes.grid(axis="y", color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)


def _trail(run: RunRecord, quality: Quality) -> list[tuple[float, float]]:
    """(KL, quality) of the checkpoints at which both were measured."""
    kls, values = run.series(run.kl_reverse_key), run.series(quality.key)
    return [(max(0.0, kls[step]), values[step]) for step in kls if step in values]


def _draw_line(axes: Axes, line: Line, quality: Quality) -> None:
    for run in line.runs:
        if trail := _trail(run, quality):
            axes.plot(*zip(*trail, strict=True), color=line.color, alpha=0.3, linewidth=1.2, marker=".", markersize=6)
    for point in line.points:
        _error_bar(axes, point, line.color, line.marker)
    if len(line.points) > 1:
        axes.plot(*zip(*_means(line), strict=True), color=line.color, linewidth=2.6, zorder=3)


def _means(line: Line) -> list[tuple[float, float]]:
    """The line's way through its betas; where a beta has several seeds, through their mean."""
    betas = dict.fromkeys(point.run.beta for point in line.points)
    groups = [[point for point in line.points if point.run.beta == beta] for beta in betas]
    return [(fmean(p.kl[0] for p in group), fmean(p.quality[0] for p in group)) for group in groups]


def _error_bar(axes: Axes, point: Point, color: str, marker: str) -> None:
    (x, left, right), (y, low, high) = point.kl, point.quality
    reach: dict[str, Any] = {"xerr": [[x - left], [right - x]], "yerr": [[max(0.0, y - low)], [max(0.0, high - y)]]}
    axes.errorbar(
        [x], [y], **reach, color=color, ecolor=f"{color}90", elinewidth=1.8, marker=marker, markersize=11,
        markeredgecolor="white", markeredgewidth=1.2, zorder=4,
    )  # fmt: skip


def _reference(lines: Sequence[Line], quality: Quality) -> Interval | None:
    """The step-0 model: as measured for gold reward, one half by construction for the others."""
    if quality.key != "gold/reward":
        return (0.5, 0.5, 0.5)
    starts = [s for line in lines for p in line.points if (s := start_interval(p.run, quality.key))]
    return (fmean(s[0] for s in starts), fmean(s[1] for s in starts), fmean(s[2] for s in starts)) if starts else None


def _draw_predictions(axes: Axes, line: Line, quality: Quality) -> list[Label]:
    """What one run predicts of neighbouring betas (preview.json; DeRa, arXiv:2402.02992), dashed.

    Returns where they lie, with their betas; "predicted" says it of those that were not trained, else of the last.
    """
    labels = []
    trained = {run.beta for run in line.runs}
    for run in line.runs if quality.key == "gold/reward" else ():
        points = read_preview(run)
        if not points:
            continue
        axes.plot(
            [kl for _, kl, _ in points], [gold for _, _, gold in points], color=line.color, linewidth=1.8,
            linestyle=(0, (4, 2.5)), marker=line.marker, markersize=8, markerfacecolor="white", zorder=3.5,
        )  # fmt: skip
        named = {point[0] for point in points} - trained or {points[-1][0]}
        labels += [
            Label(kl, gold, f"β {beta:g} predicted" if beta in named else f"β {beta:g}", line.color, 13)
            for beta, kl, gold in points
        ]
    return labels


def read_preview(run: RunRecord) -> list[tuple[float, float, float]]:
    """(beta, reverse KL in nats, gold reward) of a run's preview.json, in the order of KL; [] where there is none."""
    path = run.root / "preview.json"
    try:
        rows = (read_json(path) if path.exists() else {}).get("points") or []
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        log.warning("%s is left out: %s", path, error)
        return []
    keys = ("beta", "probe/kl_reverse_rb_nats", "gold/reward")
    found = [tuple(number(row.get(key)) for key in keys) for row in rows]
    return sorted(((b, kl, gold) for b, kl, gold in found if None not in (b, kl, gold)), key=lambda p: p[1])  # type: ignore


def _limit_x(
    axes: Axes, lines: Sequence[Line], trails: list[Any], predictions: Sequence[Label], budget: float
) -> float:
    """Set the range of KL, with air on both sides; the budget is shown where it is not far off."""
    seen = [point.kl[2] for line in lines for point in line.points] + [label.x for label in predictions]
    seen += [kl for trail in trails for kl, _ in trail]
    widest = max(max(seen), 1e-3)
    widest = max(widest, budget) if budget <= 1.6 * widest else widest
    axes.set_xlim(-0.0016 * widest, 1.12 * widest)  # signed square: 4 % of the axis
    axes.set_xticks(_ticks(widest))
    axes.set_xticklabels([f"{tick:g}" for tick in _ticks(widest)])
    axes.minorticks_off()
    return widest


def _ticks(widest: float) -> list[float]:
    """Round values at least a twelfth of the axis apart on its square-root scale."""
    kept: list[float] = []
    for tick in TICKS:
        if tick <= widest * 1.1 and (not kept or (tick**0.5 - kept[-1] ** 0.5) > widest**0.5 / 12):
            kept.append(tick)
    return kept


def _point_labels(lines: Sequence[Line], choice: Choice) -> list[Label]:
    """Beta beside each point (once per beta, at the mean over its seeds); the recommended run says so."""
    won = _winner(lines, choice)
    ring = won[1] if won else None
    labels = []
    if ring:
        text = "recommended" + ("\n(provisional)" if choice.quality.provisional else "")
        labels.append(Label(ring.kl[0], ring.quality[0], text, "black", 16, bold=True, clear=RING))
    for line in lines:
        betas = dict.fromkeys(point.run.beta for point in line.points)
        for beta, (x, y) in zip(betas, _means(line), strict=True):
            text = f"β {beta:g}" if beta is not None else "?"
            clear = RING if ring and (x, y) == (ring.kl[0], ring.quality[0]) else 0
            labels.append(Label(x, y, text, line.color, clear=clear))
    return labels


def _winner(lines: Sequence[Line], choice: Choice) -> tuple[Line, Point] | None:
    path = choice.recommended.path if choice.recommended else None
    return next(((line, p) for line in lines for p in line.points if p.run.path == path), None)


def _mark_winner(axes: Axes, lines: Sequence[Line], choice: Choice) -> None:
    if won := _winner(lines, choice):
        axes.plot(
            [won[1].kl[0]], [won[1].quality[0]], marker="o", markersize=24, markerfacecolor="none",
            markeredgecolor="black", markeredgewidth=2.4, zorder=5,
        )  # fmt: skip


def _draw_budget(axes: Axes, budget: float, widest: float) -> None:
    if budget > widest:
        return
    axes.axvline(budget, color=GREY, linewidth=1.4, linestyle=(0, (5, 4)), zorder=1)
    text = f"KL budget {budget:g} "
    axes.text(budget, 0.02, text, transform=axes.get_xaxis_transform(), ha="right", fontsize=14, color=GREY)


def _draw_ideal(axes: Axes, ideal: Mapping[str, Any], widest: float) -> list[Label]:
    """The best possible reward at each KL, π_ref·exp(reward/λ), and best-of-n; as far as the runs go."""
    curve = sorted(point for point in ideal.get("ideal") or [] if point[0] <= 1.1 * widest)
    best_of = sorted(point for point in ideal.get("best_of_n") or [] if point[1] <= 1.1 * widest)
    labels = []
    if curve:
        axes.plot(*zip(*curve, strict=True), color=GREY, linewidth=2, zorder=2)
        x, y = curve[len(curve) * 2 // 3]
        labels.append(Label(x, y, "ideal", GREY, 14))
    if best_of:
        xs, ys = [kl for _, kl, _ in best_of], [gold for _, _, gold in best_of]
        axes.plot(xs, ys, color=GREY, linewidth=1.5, linestyle=":", marker="x", markersize=7, zorder=2)
        labels.append(Label(xs[-1], ys[-1], f"best of {best_of[-1][0]:g}", GREY, 14))
    return labels


def _obstacles(lines: Sequence[Line], reference: Interval | None) -> list[Box]:
    """Points, intervals and lines, as boxes that labels keep clear of."""
    boxes: list[Box] = [(0, reference[1], 0, reference[2])] if reference else []
    for line in lines:
        for point in line.points:
            (x, left, right), (y, low, high) = point.kl, point.quality
            boxes += [(x, low, x, high), (left, y, right, y), (x, y, x, y)]
        way = _means(line) if line.points else []
        for (x0, y0), (x1, y1) in pairwise(way):
            boxes += [_between(x0, y0, x1, y1, part / 8) for part in range(1, 8)]
    return boxes


def _between(x0: float, y0: float, x1: float, y1: float, part: float) -> Box:
    x, y = (x0**0.5 + part * (x1**0.5 - x0**0.5)) ** 2, y0 + part * (y1 - y0)
    return (x, y, x, y)


def _legend_columns(lines: Sequence[Line]) -> int:
    """As many names as fit into a row of about 95 characters."""
    longest = max((len(line.name) for line in lines), default=1)
    return max(1, min(len(lines), 95 // (longest + 6)))


def _draw_legend(axes: Axes, lines: Sequence[Line]) -> None:
    """Lines by name, colour and marker above the axes."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=line.color, marker=line.marker, markersize=11, linewidth=2.6, label=line.name)
        for line in lines
    ]
    place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (-0.01, 1.0), "ncols": _legend_columns(lines)}
    axes.legend(handles=handles, **place, frameon=False, fontsize=15, handlelength=1.6, columnspacing=1.4)
