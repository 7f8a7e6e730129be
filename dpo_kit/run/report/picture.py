"""A run at a glance: report.png, its measures over steps. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import last_step, latest, read_metrics, series
from dpo_kit.run.measures import KLS, LOGRATIOS, MEASURE
from dpo_kit.run.report import drawing
from dpo_kit.run.report.drawing import BLUE, GREEN, GREY, ORANGE
from dpo_kit.run.report.numbers import number_text
from dpo_kit.run.rounding import in_rounding

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Panel:
    """One quantity, under the title of its first key: of `curves`, {key: name}, those are drawn that the run has, and
    of one name that with more points. `level` is a line to compare with, `counted` what the quantity rests on.
    """

    curves: Mapping[str, str]
    counted: str = "held out"
    level: float | None = None
    level_name: str = ""
    limits: tuple[float, float] | None = None

    @property
    def key(self) -> str:
        return next(iter(self.curves))

    @property
    def title(self) -> str:
        return MEASURE[self.key].title


PANELS = (
    Panel({"probe/margin_nats": ""}, level=0.0),
    Panel({"probe/class_gap_nats": ""}, level=0.0),
    Panel({"probe/reward_chosen": "chosen", "probe/reward_rejected": "rejected"}, level=0.0),
    Panel({key: side for side, key in LOGRATIOS.items()}, level=0.0),
    Panel({"probe/accuracy": ""}, level=0.5, level_name="chance"),
    Panel({"probe/auc": ""}, level=0.5, level_name="chance"),
    Panel({key: way for way, keys in KLS.items() for key in keys}, "fresh", level=0.0),
    Panel({"gold/reward": ""}, "fresh"),
    Panel({"gold/capability": ""}, "capability", limits=(0.0, 1.05)),
)


def draw_report(run_dir: str | Path, *, title: str = "", ceiling: float | None = None) -> Path:
    """Draw `run_dir`/report.png, 1200 pixels wide, a panel for each quantity that the run measured; returns its path.
    `ceiling` is the accuracy that label noise leaves.
    """
    run = RunDirectory(Path(run_dir))
    rows = read_metrics(run.metrics)
    probed, sampled = (last_step(read_metrics(path)) for path in (run.probe, run.samples))
    paired = any(None not in (row.get(key.partition("/")[2]) for key in LOGRATIOS.values()) for row in probed)
    counts = {  # how many of what the last values rest on, 0 where it is not recorded
        "held out": (len(probed), "pairs" if paired else "answers"),
        "fresh": (len(sampled), "answers"),
        "capability": (int(latest(rows).get("gold/capability_prompts", 0)), "questions"),
    }
    panels = shown_panels(rows)
    title, note = title or run.root.resolve().name, "bands and bars: 95 % intervals"
    grid = {"left": 0.065, "right": 0.88, "wspace": 0.55, "hspace": 0.62}
    figure, places = drawing.sheet(title, note, len(panels), 4.1, **grid)
    for axes, panel in zip(places, panels, strict=True):
        _draw_panel(axes, panel, rows, counts[panel.counted], ceiling)
    if not panels:
        figure.text(0.5, 0.45, "nothing was measured in this run", ha="center", fontsize=20)
    return drawing.save(figure, run.picture)


def shown_panels(rows: Rows) -> list[Panel]:
    """The panels that these rows can fill; log-ratios only where there is no implicit reward."""
    panels = [panel for panel in PANELS if any(series(rows, key) for key in panel.curves)]
    of_sides = [panel for panel in panels if "chosen" in panel.curves.values()]
    return [panel for panel in panels if panel not in of_sides[1:]]


def _draw_panel(axes: Axes, panel: Panel, rows: Rows, counted: tuple[int, str], ceiling: float | None) -> None:
    """The curves over steps; beside the end of each its name and last value, or that it is rounding, apart."""
    drawing.over_steps(axes)
    (count, unit), values, notes = counted, latest(rows), []
    last = max((row.get("step", 0) for row in rows), default=0) or 1
    axes.set_xlim(-0.03 * last, 1.03 * last)  # the same for every panel, with a little air, so that panels compare
    if panel.level is not None:
        axes.axhline(panel.level, color=GREY, linewidth=1, linestyle=drawing.DASHES, zorder=0.5)
        notes += [f"dashed: {panel.level_name}"] if panel.level_name else []
    if ceiling is not None and panel.key == "probe/accuracy":
        axes.axhline(ceiling, color=GREY, linewidth=1.5, linestyle=":", zorder=0.5)
        notes.append(f"dotted: label ceiling {ceiling:.2f}")
    notes.append(drawing.draw_floor(axes, panel.key, values))
    points = {key: series(rows, key) for key in panel.curves}
    best: dict[str, str] = {}  # by name: the key with more points, the first one where several have as many
    for key, name in panel.curves.items():
        if points[key] and (name not in best or len(points[key]) > len(points[best[name]])):
            best[name] = key
    first = GREEN if panel.key.startswith("gold/") else BLUE
    colors = {name: ORANGE if name in ("rejected", "reverse") else first for name in best}
    for name, key in best.items():
        drawing.draw_course(axes, rows, key, colors[name], hollow=0 < count < drawing.FEW)
    drawing.head(axes, panel.title, drawing.count_text([count], unit), *notes)
    axes.margins(y=0.12)
    if panel.limits:
        axes.set_ylim(panel.limits)
    labels = []
    for name, key in best.items():
        size = abs(values[key])
        form = ".1f" if size >= 10 else ".2f" if size >= 0.1 or size == 0 else ".1g"
        shown = "rounding" if in_rounding(key, values) else number_text(values[key], form)
        labels.append((values[key], f"{name}\n{shown}".strip(), colors[name]))
    drawing.label_ends(axes, labels, gap=0.21, air=0.07, linespacing=1.0)
