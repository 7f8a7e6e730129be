"""curves.png: what compares across betas, over steps: four panels per method and one colour per beta.

Log-ratios, not implicit rewards: these are scaled by beta, so that those of two betas say nothing beside each other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from dpo_kit.run.history import last_step, latest
from dpo_kit.run.measures import KLS, LOGRATIOS, MEASURE
from dpo_kit.run.report import drawing
from dpo_kit.run.report.drawing import DASHES, FEW, GREY
from dpo_kit.run.rounding import floor_of
from dpo_kit.sweep.choice.runs import RunRecord, name_lines

LIGHTEST = 0.75  # of viridis: its yellow end is too pale on white
APART = 0.02  # of the steps: between the bars of neighbouring runs, at most


@dataclass(frozen=True)
class Panel:
    """One quantity: its keys by falling preference, what the dashed ones are, and a level to compare with."""

    options: tuple[tuple[str, str | None], ...]  # of the solid and of the dashed curve
    dashed: str = ""
    level: float = 0.0
    level_name: str = ""


PANELS = (
    Panel((("probe/margin_nats", None), ("probe/class_gap_nats", None))),
    Panel(((LOGRATIOS["chosen"], LOGRATIOS["rejected"]),), "rejected"),
    Panel((("probe/accuracy", None), ("probe/auc", None)), "", 0.5, "dashed: chance"),
    Panel(tuple(zip(KLS["forward"], KLS["reverse"], strict=True)), "reverse"),
)


def draw_curves(sweep_dir: str | Path, runs: Sequence[RunRecord]) -> Path:
    """Draw `sweep_dir`/curves.png, 1200 pixels wide, from metrics.jsonl; unfinished runs as far as they got. Betas have
    colours of viridis, dark to light with rising beta, the same for every method.
    """
    names = name_lines(runs)
    measured = [run for run in runs if run.history]
    blocks = list(dict.fromkeys(names[run.path] for run in measured))
    betas = sorted({run.beta for run in runs if run.beta is not None})
    colors: dict[float | None, Any] = {None: GREY}
    colors |= {beta: colormaps["viridis"](LIGHTEST * i / max(1, len(betas) - 1)) for i, beta in enumerate(betas)}
    figure = drawing.new_figure(0.3 + 8.6 * max(1, len(blocks)))
    height = figure.get_figheight()
    for block, name in enumerate(blocks):
        members = [run for run in measured if names[run.path] == name]
        top = 1 - (0.1 + 8.6 * block) / height  # of this method's part of the figure
        figure.text(0.03, top, name, fontsize=22, fontweight="bold", va="top")
        upper, lower = top - 1.35 / height, top - 7.9 / height
        grid = figure.add_gridspec(2, 2, left=0.065, right=0.92, top=upper, bottom=lower, wspace=0.38, hspace=0.6)
        for number, panel in enumerate(PANELS):
            _draw_panel(figure.add_subplot(grid[number]), panel, members, colors)
    note = "bands and bars: 95 % intervals"
    if blocks:
        figure.text(0.985, 1 - 0.15 / height, note, ha="right", va="top", fontsize=15, color=GREY)
    else:
        figure.text(0.5, 0.45, "no run has measured anything yet", ha="center", fontsize=20, color=GREY)
    return drawing.save(figure, Path(sweep_dir) / "curves.png")


def _draw_panel(axes: Axes, panel: Panel, runs: Sequence[RunRecord], colors: Mapping[float | None, Any]) -> None:
    """Each run's curves; each beta once beside the end of its solid one (the mean over its seeds)."""
    drawing.over_steps(axes)
    axes.axhline(panel.level, color=GREY, linewidth=1, linestyle=DASHES, zorder=0.5)
    first = next((solid for solid, _ in panel.options if any(run.series(solid) for run in runs)), panel.options[0][0])
    rounding = drawing.draw_floor(axes, first, max((latest(run.history) for run in runs), key=partial(floor_of, first)))
    of_answers = "/kl_" in first
    counts = [len(last_step(run.answers) if of_answers else run.probed) for run in runs]
    last = max((row.get("step", 0) for run in runs for row in run.history), default=0)
    apart = min(APART, 5 * APART / len(runs)) * last
    ends: dict[float | None, list[float]] = {}  # of the solid curves, by beta
    dashed: list[int] = []  # how many points the dashed curves have
    for place, (run, count) in enumerate(zip(runs, counts, strict=True)):
        keys = next((keys for keys in panel.options if run.series(keys[0])), panel.options[0])
        for key in filter(None, keys):
            if points := run.series(key):
                is_dashed = key != keys[0]
                drawing.draw_course(
                    axes, run.history, key, colors[run.beta], dashed=is_dashed, hollow=0 < count < FEW,
                    shift=apart * (place - (len(runs) - 1) / 2), alpha=0.12,
                )  # fmt: skip
                if is_dashed:
                    dashed.append(len(points))
                else:
                    ends.setdefault(run.beta, []).append(points[max(points)])
    note = f"{'squares' if max(dashed) <= drawing.SCATTERED else '- -'}: {panel.dashed}" if dashed else panel.level_name
    unit = "pairs" if any(run.pairs for run in runs) and not of_answers else "answers"
    drawing.head(axes, MEASURE[first].title, drawing.count_text(counts, unit), note, rounding)
    axes.margins(y=0.08)
    named = {beta: f"β {beta:g}" if beta is not None else "?" for beta in ends}
    drawing.label_ends(axes, [(fmean(ends[beta]), named[beta], colors[beta]) for beta in ends], gap=0.1)
