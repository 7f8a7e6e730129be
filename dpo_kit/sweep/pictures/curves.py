"""curves.png: margin, implicit reward and KL over steps, a row per method and one colour per beta."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes

from dpo_kit.sweep.choice.runs import RunRecord
from dpo_kit.sweep.pictures.labels import GREY, name_lines, new_figure, save, spread

LIGHTEST = 0.75  # of viridis: its yellow end is too pale on white
Keys = tuple[str, str | None]  # of the solid and of the dashed curve
PANELS: tuple[tuple[str, tuple[Keys, ...], str], ...] = (  # title, keys by falling preference, a note on the dashes
    ("Preference margin (nats)", (("probe/margin_nats", None), ("probe/class_gap_nats", None)), ""),
    (
        "Implicit reward, β·log-ratio (nats)",
        (("probe/reward_chosen", "probe/reward_rejected"),),
        "—  chosen    - -  rejected",
    ),
    (
        "KL drift (nats per answer)",
        tuple((f"probe/kl_forward_{kind}_nats", f"probe/kl_reverse_{kind}_nats") for kind in ("rb", "k1")),
        "—  forward    - -  reverse",
    ),
)
LOG_RATIOS: Keys = ("probe/logratio_chosen_nats", "probe/logratio_rejected_nats")


def draw_curves(sweep_dir: str | Path, runs: Sequence[RunRecord]) -> Path:
    """Draw `sweep_dir`/curves.png, 1200 pixels wide, from metrics.jsonl; unfinished runs as far as they got.

    Betas have colours of viridis, dark to light with rising beta, the same in every row.
    """
    names = name_lines(runs)
    measured = [run for run in runs if run.history]
    rows = list(dict.fromkeys(names[run.path] for run in measured))
    betas = sorted({run.beta for run in runs if run.beta is not None})
    colors: dict[float | None, Any] = {None: GREY}
    colors |= {beta: colormaps["viridis"](LIGHTEST * i / max(1, len(betas) - 1)) for i, beta in enumerate(betas)}
    figure = new_figure(0.2 + 4.0 * max(1, len(rows)))
    for row, name in enumerate(rows):
        members = [run for run in measured if names[run.path] == name]
        for column, panel in enumerate(PANELS):
            axes = figure.add_subplot(len(rows), 3, 3 * row + column + 1)
            _draw_panel(axes, panel, members, colors)
            if column == 0:
                axes.annotate(
                    name, (-0.13, 1.28), xycoords="axes fraction", fontsize=18, fontweight="bold", annotation_clip=False
                )
    if not rows:
        figure.text(0.5, 0.45, "no run has measured anything yet", ha="center", fontsize=18, color=GREY)
    height = figure.get_figheight()
    figure.subplots_adjust(
        left=0.05, right=0.925, bottom=0.65 / height, top=1 - 1.05 / height, wspace=0.48, hspace=0.66
    )
    return save(figure, Path(sweep_dir) / "curves.png")


def _draw_panel(
    axes: Axes, panel: tuple[str, Sequence[Keys], str], runs: Sequence[RunRecord], colors: dict[float | None, Any]
) -> None:
    """Each run's curves; each beta once beside the end of its solid one (the mean over its seeds)."""
    title, options, note = panel
    if title.startswith("Implicit") and not any(run.series(options[0][0]) for run in runs):
        title, options = "Log-ratio to the reference (nats)", (LOG_RATIOS,)
    axes.set_title(title, loc="left", fontsize=14.5, pad=22)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=13, colors=GREY)
    axes.set_xlabel("step", fontsize=13, color=GREY)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    ends: dict[float | None, list[float]] = {}  # of the solid curves, by beta
    has_dashes = False
    for run in runs:
        solid, dashed = next((keys for keys in options if run.series(keys[0])), options[0])
        for key, style in ((solid, "-"), (dashed, (0, (3, 2)))):
            if points := run.series(key) if key else {}:
                values = list(points.values())
                marker = "o" if len(points) <= 4 else None
                axes.plot(list(points), values, color=colors[run.beta], linewidth=2.2, marker=marker, linestyle=style)
                if key == solid:
                    ends.setdefault(run.beta, []).append(values[-1])
                else:
                    has_dashes = True
    axes.margins(y=0.08)
    bottom, top = axes.get_ylim()
    heights = spread([fmean(values) for values in ends.values()], 0.095 * (top - bottom), bottom, top)
    for beta, height in zip(ends, heights, strict=True):
        axes.text(
            1.02, height, f"β {beta:g}" if beta is not None else "?", transform=axes.get_yaxis_transform(),
            color=colors[beta], fontsize=14, fontweight="bold", va="center", ha="left",
        )  # fmt: skip
    if note and has_dashes:
        axes.text(0.0, 1.02, note, transform=axes.transAxes, fontsize=12.5, color=GREY, va="bottom")
