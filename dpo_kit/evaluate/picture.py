"""evaluation.png: win rates, verdicts, accuracy, calibration, gate and failures at a glance; hacking.png. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.run.history import latest
from dpo_kit.run.measures import MEASURE, WIN_RATES, as_measured
from dpo_kit.run.report import drawing
from dpo_kit.run.report.drawing import BLUE, FEW, GREY, ORANGE, count_text, draw_level, new_figure, save
from dpo_kit.run.rounding import in_rounding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from dpo_kit.evaluate.behaviour import Style

Found = Mapping[str, Any]
Rate = tuple[float, float, float, int]  # value, low, high, and how many pairs or prompts it rests on
TITLE: dict[str, Any] = {"loc": "left", "fontsize": 19, "fontweight": "bold", "pad": 12}
TEXT = 16
DOT: dict[str, Any] = {"marker": "o", "markersize": 11, "markeredgewidth": 2}
DASHED: dict[str, Any] = {"linewidth": 1.5, "linestyle": (0, (4, 3))}
SCORING = ("gold", "reward_model")  # judges that give each answer a number, whatever the order
DOUBTS = {
    "order_inconsistency": "orders disagree",
    "first_position_rate": "first place preferred",
    "unparsable_rate": "verdicts unparsable",
}
LIGHT, MIDDLE = "#D9D9D9", "#A6A6A6"


def draw_evaluation(path: Path, parts: Mapping[str, Found], *, title: str) -> None:
    """Draw what `parts` (findings by part) have into `path`, 1200 pixels wide; a panel without figures is left out.
    Bars are 95 % intervals. What rests on fewer than ten pairs or prompts is hollow and grey.
    """
    panels = [(draw, parts[name]) for name, has, draw in PANELS if name in parts and has(parts[name])]
    note = f"bars: 95 % intervals · hollow: fewer than {FEW} pairs or prompts"
    grid = {"left": 0.03, "right": 0.97, "wspace": 0.14, "hspace": 0.42}
    figure, places = drawing.sheet(_short(title, 70), note, len(panels), 5.2, **grid)
    for axes, (draw, found) in zip(places, panels, strict=True):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=15, colors=GREY)
        draw(axes, found)
    if not panels:
        figure.text(0.5, 0.45, "nothing to draw was measured", ha="center", fontsize=20)
    save(figure, path)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"…{text[1 - width :]}"


def _rate(found: Found, key: str, count: int) -> Rate:
    return found[key], found[f"{key}_low"], found[f"{key}_high"], count


def _draw_interval(
    axes: Axes, line: int, label: str, rate: Rate, color: str, label_color: str = "black", size: int = TEXT
) -> None:
    """On line `line` from above a dot with its interval, and the label above them; hollow where it rests on few."""
    value, low, high, count = rate
    axes.hlines(-line, low, high, color=color, linewidth=3)
    face = "white" if count < FEW else color
    axes.plot(value, -line, color=color, markerfacecolor=face, **DOT)
    place = axes.get_yaxis_transform()
    axes.text(0.0, -line + 0.17, label, fontsize=size, color=label_color, transform=place, va="bottom")


def _set_lines(axes: Axes, count: int) -> None:
    axes.set_ylim(-max(4, count) + 0.5, 0.95)
    axes.set_yticks([])


def _draw_rates(axes: Axes, title: str, rates: Mapping[str, Rate], level_name: str, *, rounding: bool = False) -> None:
    """A dot with its interval for each rate against ½: blue above, orange below, else (or of few, or rounding) grey."""
    axes.set_title(title, **TITLE)
    draw_level(axes, 0.5, len(rates), color=GREY, **DASHED)
    for line, (label, rate) in enumerate(rates.items()):
        value, low, high, count = rate
        color = GREY if rounding or count < FEW or low <= 0.5 <= high else BLUE if low > 0.5 else ORANGE
        _draw_interval(axes, line, label, rate, color)
        axes.text(1.06, -line, f"{value:.2f}", fontsize=TEXT, va="center", ha="left", fontweight="bold", color=color)
    axes.set_xlim(-0.01, 1.2)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", level_name, "", "1"])
    _set_lines(axes, len(rates))


def _draw_win_rates(axes: Axes, found: Found) -> None:
    prompts, decided = (found["prompts"], "prompts"), (found["decided"], "comparisons")
    reviewed = (found.get("reviewed"), "reviewed prompts")
    rates = {
        f"{MEASURE[key].title} ({count_text([count], unit)})": _rate(found, key, count)
        for key, (count, unit) in zip(WIN_RATES, (prompts, decided, prompts, reviewed), strict=True)
        if found.get(key) is not None
    }
    _draw_rates(axes, f"Win rate: {found['win_rate_verdict']}", rates, "0.5")


def _draw_verdicts(axes: Axes, found: Found) -> None:
    """One bar of all comparisons, and below it what tells how far the judge can be trusted."""
    axes.set_title(f"Verdicts on {count_text([found['comparisons']], 'comparisons')}", **TITLE)
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
        groups[f"score gap up to {gaps[0]['to']:.2g}"] = gaps[0]
        groups[f"score gap from {gaps[-1]['from']:.2g}"] = gaps[-1]
    rates = {f"all ({count_text([found['pairs']], 'pairs')})": _rate(found, "accuracy", found["pairs"])}
    for name, group in groups.items():
        if count := group["pairs"]:
            label = f"{name} ({count_text([count], 'pairs')})"
            rates[label] = group["accuracy"], group["low"], group["high"], count
    rounding = in_rounding("probe/accuracy", as_measured(found))
    title = MEASURE["probe/accuracy"].title + (": rounding" if rounding else "")
    _draw_rates(axes, title, rates, "chance", rounding=rounding)


def _draw_calibration(axes: Axes, found: Found) -> None:
    """Accuracy against confidence; on the diagonal where the implicit reward is as sure as it is right."""
    calibration = found["calibration"]
    axes.set_title(f"Calibration, {count_text([found['pairs']], 'pairs')}: ECE {calibration['ece']:.2f}", **TITLE)
    axes.spines["left"].set_visible(True)
    axes.plot([0.5, 1], [0.5, 1], color=GREY, **DASHED)
    rows = calibration["reliability"]
    most = max(row["pairs"] for row in rows)
    for row in rows:
        color, face = (GREY, "white") if row["pairs"] < FEW else (BLUE, BLUE)
        axes.vlines(row["confidence"], row["low"], row["high"], color=color, linewidth=2, alpha=0.6)
        axes.plot(
            row["confidence"], row["accuracy"], marker="o", color=color, markersize=7 + 9 * row["pairs"] / most,
            markerfacecolor=face, markeredgewidth=2, clip_on=False, zorder=3,
        )  # fmt: skip
    axes.set_xlabel("confidence σ(β·margin); larger dot: more pairs", fontsize=14, color=GREY)
    axes.set_ylabel("accuracy", fontsize=TEXT, color=GREY)
    axes.set_xlim(0.49, 1.01)
    axes.set_ylim(min(0.5, *(row["low"] for row in rows)) - 0.02, 1.02)
    place = axes.get_position()
    axes.set_position((place.x0 + 0.05, place.y0, place.width - 0.05, place.height))


def _draw_gate(axes: Axes, found: Found) -> None:
    """The change of each task with its interval, the worst first; the dashed line is the largest loss allowed."""
    limit, shown = found["gate"]["limit"], sorted(found["tasks"], key=lambda task: task["difference"])[:6]
    axes.set_title(f"Regression gate: {found['gate']['verdict']}", **TITLE)
    draw_level(axes, 0.0, len(shown), color=GREY, linewidth=1.5)
    draw_level(axes, -limit, len(shown), color=ORANGE, **DASHED)
    for line, task in enumerate(shown):
        color = {"failed": ORANGE, "passed": BLUE, "inconclusive": GREY}[task["verdict"]]
        count = count_text([task["n"]], "").strip()
        label = f"{_short(task['task'], 18)} ({count}): {task['verdict']}"
        change = f"{task['difference']:+.3f}".replace("-", "−")
        rate = task["difference"], task["low"], task["high"], task["n"]
        _draw_interval(axes, line, label, rate, color, label_color=color)
        place: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "bottom"}
        axes.text(1.0, -line + 0.17, change, fontsize=TEXT, fontweight="bold", color=color, **place)
    low, high = min(task["low"] for task in shown), max(task["high"] for task in shown)
    axes.set_xlim(min(low, -2 * limit, -0.02) * 1.1, max(high, limit, 0.02) * 1.1)
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("policy − reference (samples); dashed: largest loss allowed", fontsize=14, color=GREY)
    _set_lines(axes, len(shown))


def _draw_failures(axes: Axes, found: Found) -> None:
    """How frequent each group is among losses and among wins, and the ratio with its interval; bold: beyond chance."""
    losses, wins = (found["outcomes"].get(name, 0) for name in ("loss", "win"))
    shown = [group for group in found["groups"] if group["losses"]][:5]
    axes.set_title(f"Where it loses: {losses:,} lost, {wins:,} won", **TITLE)
    for line, group in enumerate(shown):
        for among, of, color in ((group["losses"], losses, ORANGE), (group["wins"], wins, BLUE)):
            if of:
                face = "white" if of < FEW else color
                axes.plot(among / of, -line, color=color, markerfacecolor=face, **DOT)
        times = f"{group['ratio']:.1f} times [{group['low']:.1f}, {group['high']:.1f}]"
        label = f"{group['name']}: {group['losses']:,} and {group['wins']:,}, {times}"
        weight = "bold" if group["telling"] else "normal"
        axes.text(0.0, -line + 0.17, label, fontsize=TEXT, va="bottom", fontweight=weight)
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


def draw_hacking(
    history: Sequence[Mapping[str, Any]], styles: Sequence[Style], rewards: Mapping[str, Any], path: Path
) -> None:
    """Gold reward and reward margin over steps, one above the other, beside the shifts of style; 1200 pixels wide."""
    figure = new_figure(6.4)
    known = rewards["verdict"] != "unknown"
    title = {"hacked": "Reward hacking", "tracking": "The gold reward keeps up", "unknown": "Style of the answers"}
    figure.suptitle(title[rewards["verdict"]], x=0.04, y=0.97, ha="left", fontsize=22, fontweight="bold")
    figure.text(0.98, 0.945, "bands and bars: 95 % intervals · hatched: rounding", ha="right", fontsize=14, color=GREY)
    grid = figure.add_gridspec(2, 2, left=0.07, right=0.98, bottom=0.12, top=0.82, wspace=0.28, hspace=0.5)
    if known:
        curves = (
            ("gold/reward", "Gold reward: what is meant", drawing.GREEN),
            (rewards["proxy"], "Margin on held-out pairs: what is trained", BLUE),
        )
        for number, (key, name, color) in enumerate(curves):
            axes = figure.add_subplot(grid[number, 0])
            drawing.over_steps(axes)
            axes.set_xlabel("")
            drawing.draw_course(axes, history, key, color)
            drawing.draw_floor(axes, key, latest(history))
            axes.axvline(rewards["peak_step"], color=GREY, linewidth=1, linestyle=drawing.DASHES, zorder=0)
            axes.set_title(name, loc="left", fontsize=16, color=color)
        axes.set_xlabel("step (dashed: gold reward highest)", fontsize=14, color=GREY)
    axes = figure.add_subplot(grid[:, 1] if known else grid[:, :])
    # a row per measure: its shift in standard deviations of the reference; −1 to 1 at least
    counts = count_text([style.n for style in styles], "prompts")
    counted = f" ({counts})" if counts else ""
    axes.set_title(f"Style of the answers{counted}", loc="left", fontsize=16)
    draw_level(axes, 0.0, len(styles), color=GREY, linewidth=1, linestyle=drawing.DASHES, zorder=0)
    for number, style in enumerate(styles):
        color = ORANGE if style.changed else GREY
        scale = style.shift / style.difference if style.shift and style.difference else 1.0
        value, low, high = (end * scale for end in (style.difference, style.low, style.high))
        _draw_interval(axes, number, style.label, (value, low, high, style.n), color, color, size=14)
    _set_lines(axes, len(styles))
    axes.margins(x=0.1)
    left, right = axes.get_xlim()
    axes.set_xlim(min(left, -1.0), max(right, 1.0))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=15, colors=GREY)
    axes.set_xlabel("shift in standard deviations of the reference", fontsize=14, color=GREY)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(figure, path)
