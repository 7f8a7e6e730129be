"""data_report.png and the table on the terminal: what a data set holds and what is wrong with it. Needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.data.report.inspect import SHORTCUT
from dpo_kit.run.report.drawing import BLUE, FEW, GREY, ORANGE, OVER_THE_LINE, count_text, draw_level, save, sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LIGHT, BEFORE, TEXT = "#B5CFE3", "#BBBBBB", 16
Report = dict[str, Any]
Bar = tuple[str, float, str, str]  # label, value, what is written beside it, colour
Draw = Callable[["Axes", Report, Report | None], None]
REPEATS = {
    "copies": "copies",
    "near_duplicates": "near-duplicates",
    "contradictions": "rows that contradict each other",
    "near_contradictions": "… nearly the same answers",
    "leaks": "prompts shared with held-out rows",
    "benchmark": "prompts shared with the benchmark",
}
DIVERSITY = (
    ("prompts", "different prompts"),
    ("clusters", "of them unlike each other"),
    ("opening_words", "different openings"),
)


def draw_data_report(path: Path, report: Report, *, title: str, before: Report | None = None) -> Path:
    """Draw `report` into `path`, 1200 pixels wide; `before` (of the rows before curation) is drawn in grey beside it.

    A panel whose figures the report has not is left out. Orange means: look at this; hollow: rests on fewer than ten.
    """
    panels = list(_panels(report, before))
    warnings = len(report["warnings"])
    told = f"{warnings} thing{'s' if warnings != 1 else ''} to look at" if warnings else "nothing to look at"
    told = f"orange: look at this · {told}" + (" · grey: before curation" if before else "")
    figure, places = sheet(title, told, len(panels), 4.2, left=0.03, right=0.97, wspace=0.14, hspace=0.42)
    for axes, (name, content) in zip(places, panels, strict=True):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(labelsize=15, colors=GREY)
        axes.set_title(name, loc="left", fontsize=19, fontweight="bold", pad=10)
        axes.set_yticks([])
        if callable(content):
            content(axes, report, before)
            continue
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        widest = max((value for _, value, _, _ in content), default=0) or 1
        for line, (label, value, text, color) in enumerate(content):  # the label above each bar, the value at its end
            axes.barh(-line, value / widest, height=0.42, color=color)
            axes.text(0, -line + 0.3, label, fontsize=TEXT, va="bottom", ha="left")
            axes.text(value / widest + 0.015, -line, text, fontsize=TEXT, va="center", ha="left", fontweight="bold")
        axes.set_xlim(0, 1.2)
        axes.set_ylim(-max(4, len(content)) + 0.6, 0.85)
    return save(figure, path)


def _panels(report: Report, before: Report | None) -> Iterator[tuple[str, list[Bar] | Draw]]:
    """The title of each panel, and its bars or what draws it."""
    bars: list[Bar] = [("before", before["rows"]["train"], f"{before['rows']['train']:,}", GREY)] if before else []
    bars += [_bar(name.replace("_", " "), n) for name, n in report["rows"].items() if n and name != "dropped"]
    dropped = list(report["dropped_by_reason"].items())
    bars += [_bar(f"dropped: {reason}", n, ORANGE) for reason, n in dropped[:3]]
    if rest := sum(n for _, n in dropped[3:]):
        bars.append(_bar("dropped: other reasons", rest, ORANGE))
    yield "Rows", bars
    bars = []
    for name, label, rows in _repeats(report):
        if rows or name != "near_contradictions":
            old = f" (before {before[name]['rows']:,})" if before and name in before else ""
            bars.append((label, rows, f"{rows:,}{old}", ORANGE if rows else BLUE))
    yield "Repeats and leaks (rows)", bars
    if deciding(report.get("shortcuts", {})):
        yield f"Chosen, told by one rule ({count_text([_pairs(report)], 'pairs')})", _draw_shortcuts
    if classes := report.get("classes"):
        yield "Labels", [_bar("thumbs up", classes["desirable"]), _bar("thumbs down", classes["undesirable"])]
    yield f"Tokens ({count_text([_pairs(report)], 'rows')})", _draw_lengths
    if agreement := report["agreement"]:
        was = before and before["agreement"] and before["agreement"]["mean"]
        yield f"Rater agreement: {agreement['mean']:.2f}{f' (before {was:.2f})' if was else ''}", _draw_agreement
    if report["balance"]:
        column, values = next(iter(report["balance"].items()))
        largest = list(values["largest"].items())[:5]
        yield f"Rows by {column} ({values['values']:,} in all)", [_bar(str(name)[:40], n) for name, n in largest]
    if diversity := report.get("diversity"):
        yield "Prompts", [_bar(label, diversity[name]) for name, label in DIVERSITY]


def _repeats(report: Report) -> Iterator[tuple[str, str, int]]:
    """Key, label and number of rows of all that was looked for."""
    for name, label in REPEATS.items():
        if name in report and (name != "benchmark" or report[name]["prompts"]):
            yield name, label, report[name]["rows"]


def _bar(label: str, count: int, color: str = BLUE) -> Bar:
    return label, count, f"{count:,}", color


def _draw_shortcuts(axes: Axes, report: Report, before: Report | None) -> None:
    """Accuracy of each rule with its interval against chance; orange: a shortcut. And in how many pairs it decides."""
    rules = deciding(report["shortcuts"])
    axes.axvspan(1 - SHORTCUT, SHORTCUT, color=GREY, alpha=0.1, linewidth=0)
    draw_level(axes, 0.5, len(rules), color=GREY, linewidth=1.5, linestyle=(0, (4, 3)))
    for line, (name, rule) in enumerate(rules.items()):
        color = ORANGE if rule["low"] > SHORTCUT or rule["high"] < 1 - SHORTCUT else BLUE
        decided = round(rule["decides"] * _pairs(report))
        old = (before or {}).get("shortcuts", {}).get(name)
        for shown, shade in ((old, BEFORE), (rule, color)):
            if shown:
                face = "white" if decided < FEW else shade
                axes.hlines(-line, shown["low"], shown["high"], color=shade, linewidth=3)
                axes.plot(shown["accuracy"], -line, marker="o", markersize=11, color=shade, markerfacecolor=face)
        label = f"{name} (decides {count_text([decided], 'pairs')})"
        axes.text(0.0, -line + 0.16, label, fontsize=TEXT, va="bottom", ha="left")
        axes.text(1, -line, f"{rule['accuracy']:.2f}", fontsize=TEXT, va="center", ha="right", fontweight="bold")
    axes.set_xlim(0, 1)
    axes.set_ylim(-max(4, len(rules)) + 0.5, 0.9)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "", "chance", "", "1"])


def _draw_lengths(axes: Axes, report: Report, before: Report | None) -> None:
    """Each column's spread: the middle half thick, 5 to 95 % thin, the median a dot; the limit as a line."""
    cut, limit = report["cut_at_max_length"], report["max_length"]
    top = max(spread["p95"] for spread in report["tokens"].values())
    for line, (name, spread) in enumerate(report["tokens"].items()):
        color = {"prompt": GREY, "rejected": LIGHT}.get(name, BLUE)
        axes.plot([spread["p5"], spread["p95"]], [-line, -line], color=color, linewidth=2.5)
        axes.plot([spread["p25"], spread["p75"]], [-line, -line], color=color, linewidth=11, solid_capstyle="butt")
        axes.plot(
            spread["median"], -line, marker="o", markersize=12, color="white", markeredgecolor=color, markeredgewidth=3
        )
        label = f"{name}: {spread['median']:,.0f} (95 % below {spread['p95']:,.0f})"
        axes.text(0, -line + 0.24, label, fontsize=TEXT, va="bottom", ha="left", bbox=OVER_THE_LINE)
    if limit and limit < 2.5 * top:
        axes.axvline(limit, color=ORANGE if cut else GREY, linewidth=2, linestyle=(0, (4, 3)))
        top = max(top, limit)
    note = f"max_length {limit or 'none'} cuts {cut:,} rows"
    axes.text(0, -len(report["tokens"]) + 0.3, note, fontsize=TEXT, color=ORANGE if cut else GREY, bbox=OVER_THE_LINE)
    axes.set_xlim(0, 1.05 * top)
    axes.set_ylim(-len(report["tokens"]) + 0.1, 0.8)


def _draw_agreement(axes: Axes, report: Report, before: Report | None) -> None:
    """Rows by the share of raters behind their label; below .7 in orange."""
    shown = [(low, n) for low, n in report["agreement"]["histogram"] if low >= 0.5 or n]
    top = max(n for _, n in shown)
    for low, n in shown:
        axes.bar(low + 0.05, n, width=0.09, color=ORANGE if low < 0.7 else BLUE)
        axes.text(low + 0.05, n + 0.02 * top, f"{n:,}", ha="center", va="bottom", fontsize=TEXT, fontweight="bold")
    axes.set_ylim(0, 1.15 * top)
    axes.set_xticks([round(low, 1) for low, _ in shown] + [1.0])
    rated = count_text([report["agreement"]["rows"]], "rows")
    axes.set_xlabel(f"share of raters behind the label, {rated}", fontsize=15, color=GREY)


def _pairs(report: Report) -> int:
    """How many rows the shares and lengths of a report are of."""
    return report["rows"]["train"] + report["rows"]["held_out"]


def deciding(shortcuts: dict[str, Any]) -> dict[str, Any]:
    """The rules that name an answer in one pair of a hundred or more; length once."""
    return {name: rule for name, rule in shortcuts.items() if rule["decides"] >= 0.01 and "characters" not in name}


# --- the same on the terminal --------------------------------------------------------------------------------------


def show_report(report: dict[str, Any], *, title: str, before: dict[str, Any] | None = None) -> None:
    """Print what one looks at first, beside what was before, and each warning; what there is not has no row."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("data")
    columns = [dict(_rows(figures)) for figures in (before, report) if figures is not None]
    for name in ("before", "after") if before else ("",):
        table.add_column(name, justify="right")
    for label in dict.fromkeys(label for column in columns for label in column):
        table.add_row(label, *(column.get(label, "–") for column in columns))
    console = Console()
    console.print(table)
    for warning in report["warnings"]:
        console.print(f"[bold]{escape(warning['what'])}[/bold]", highlight=False)
        console.print(f"{warning['why']}\n→ {warning['do']}\n", highlight=False, markup=False)


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Label and text of each row."""
    yield from ((f"{path}, read as", form) for path, form in report["forms"].items())
    yield "rows read", f"{report['rows_read']:,}"
    for name, count in report["rows"].items():
        if name != "dropped" and count:
            yield f"rows, {name.replace('_', ' ')}", f"{count:,}"
    for reason, count in report["dropped_by_reason"].items():
        yield f"  dropped: {reason}", f"{count:,}"
    for name, tokens in report["tokens"].items():
        yield f"tokens of {name}, median (95 %)", f"{tokens['median']:,.0f} ({tokens['p95']:,.0f})"
    yield f"rows cut at max_length {report['max_length']}", f"{report['cut_at_max_length']:,}"
    for name, _, count in _repeats(report):
        yield f"rows: {name.replace('_', '-')}", f"{count:,}"
    for name, rule in deciding(report.get("shortcuts", {})).items():
        yield f"accuracy of: {name}", f"{rule['accuracy']:.3f} [{rule['low']:.3f}, {rule['high']:.3f}]"
    if raters := report["agreement"]:
        yield "rater agreement, mean (below .7)", f"{raters['mean']:.3f} ({raters['below_0.7']:.1%})"
    if scores := report["scores"]:
        shares = f"({scores['ties']:.1%}, {scores['reversed']:.1%})"
        yield "rating gap, median (ties, reversed)", f"{scores['gap']['median']:g} {shares}"
    if classes := report.get("classes"):
        yield "thumbs up, down", f"{classes['desirable']:,}, {classes['undesirable']:,}"
    if reference := report.get("reference"):
        interval = f"[{reference['accuracy_low']:.3f}, {reference['accuracy_high']:.3f}]"
        yield "the reference prefers chosen", f"{reference['accuracy']:.3f} {interval}"
        yield "the same by token", f"{reference['accuracy_per_token']:.3f}"
    if diversity := report.get("diversity"):
        yield "prompts (clusters of alike ones)", f"{diversity['prompts']:,} ({diversity['clusters']:,})"
        difficulty = report["difficulty"]
        yield "pairs with nearly the same answers", f"{difficulty['nearly_alike']:.1%}" if difficulty else "–"
    yield "edge cases", f"{report['edge_cases']['share']:.1%}"
