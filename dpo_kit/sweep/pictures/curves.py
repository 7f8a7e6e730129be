"""curves.png: margin, implicit reward and KL over steps, a row per method and one colour per beta."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.sweep.choice.runs import RunRecord, swept_keys
from dpo_kit.sweep.pictures.labels import GREY, new_figure, save, series_names, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHTEST = 0.75  # of viridis: its yellow end is too pale on white
# title, keys by falling preference: (solid, dashed); what solid and dashed are called
PANELS = (
    ("Preference margin (nats)", (("probe/margin_nats", None), ("probe/class_gap_nats", None)), ("", "")),
    (
        "Implicit reward, β·log-ratio (nats)",
        (("probe/reward_chosen", "probe/reward_rejected"),),
        ("chosen", "rejected"),
    ),
    (
        "KL drift (nats per answer)",
        tuple((f"probe/kl_forward_{kind}_nats", f"probe/kl_reverse_{kind}_nats") for kind in ("rb", "k1")),
        ("forward", "reverse"),
    ),
)  # fmt: skip
Keys = tuple[str, str | None]
LOG_RATIOS: Keys = ("probe/logratio_chosen_nats", "probe/logratio_rejected_nats")


def draw_curves(sweep_dir: str | Path, runs: Sequence[RunRecord]) -> Path:
    """Draw `sweep_dir`/curves.png, 1200 pixels wide, from metrics.jsonl; unfinished runs as far as they got."""
    names = series_names(runs, swept_keys(runs))
    with_data = [run for run in runs if run.history]
    rows = list(dict.fromkeys(names[run.path] for run in with_data))
    colors = beta_colors(runs)
    figure = new_figure(0.2 + 4.0 * max(1, len(rows)))
    for number, name in enumerate(rows):
        members = [run for run in with_data if names[run.path] == name]
        for column, panel in enumerate(PANELS):
            axes = figure.add_subplot(len(rows), 3, 3 * number + column + 1)
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


def beta_colors(runs: Sequence[RunRecord]) -> dict[float | None, Any]:
    """One colour of viridis per beta, dark to light with rising beta, the same in every row."""
    from matplotlib import colormaps

    betas = sorted({run.beta for run in runs if run.beta is not None})
    shades = [LIGHTEST * index / max(1, len(betas) - 1) for index in range(len(betas))]
    return {beta: colormaps["viridis"](shade) for beta, shade in zip(betas, shades, strict=True)} | {None: GREY}


def _draw_panel(axes: Axes, panel: Any, runs: Sequence[RunRecord], colors: dict[float | None, Any]) -> None:
    title, options, names = panel
    if title.startswith("Implicit") and not any(run.series(options[0][0]) for run in runs):
        title, options = "Log-ratio to the reference (nats)", (LOG_RATIOS,)
    axes.set_title(title, loc="left", fontsize=14.5, pad=22)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=13, colors=GREY)
    axes.set_xlabel("step", fontsize=13, color=GREY)
    axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=4, integer=True)
    axes.axhline(0, color=GREY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    ends = [end for run in runs for end in _draw_run(axes, run, _keys(run, options), colors[run.beta])]
    axes.margins(y=0.08)
    _label_betas(axes, ends, colors)
    if names[0] and any(dashed for _, _, dashed in ends):
        note = f"—  {names[0]}    - -  {names[1]}"
        axes.text(0.0, 1.02, note, transform=axes.transAxes, fontsize=12.5, color=GREY, va="bottom")


def _keys(run: RunRecord, options: Sequence[Keys]) -> Keys:
    """The first option that the run has measured."""
    return next((keys for keys in options if run.series(keys[0])), options[0])


def _draw_run(axes: Axes, run: RunRecord, keys: Keys, color: Any) -> list[tuple[RunRecord, float, bool]]:
    """A run's solid and dashed curve; returns (run, last value, dashed) of each."""
    ends = []
    for key, dashed in ((keys[0], False), (keys[1], True)):
        if points := run.series(key) if key else {}:
            few = len(points) <= 4
            style: dict[str, Any] = {"linestyle": (0, (3, 2))} if dashed else {}
            axes.plot(
                list(points), list(points.values()), color=color, linewidth=2.2, marker="o" if few else None, **style
            )
            ends.append((run, list(points.values())[-1], dashed))
    return ends


def _label_betas(axes: Axes, ends: Sequence[tuple[RunRecord, float, bool]], colors: dict[float | None, Any]) -> None:
    """Each beta once beside its solid curve's end (the mean over its seeds), pushed apart where they would touch."""
    found: dict[float | None, list[float]] = {}
    for run, value, dashed in ends:
        if not dashed:
            found.setdefault(run.beta, []).append(value)
    bottom, top = axes.get_ylim()
    heights = [sum(values) / len(values) for values in found.values()]
    placed = spread(heights, 0.095 * (top - bottom), bottom, top)
    for beta, height in zip(found, placed, strict=True):
        axes.text(
            1.02, height, f"β {beta:g}" if beta is not None else "?", transform=axes.get_yaxis_transform(),
            color=colors[beta], fontsize=14, fontweight="bold", va="center", ha="left",
        )  # fmt: skip
