"""A data report as a short table and its warnings in full, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpo_kit.data.report.picture import REPEATS, deciding


def show_report(report: dict[str, Any], *, title: str, before: dict[str, Any] | None = None) -> None:
    """Print the figures that one looks at first, beside those from before where there are any, and each warning.

    What the data do not have has no row.
    """
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
    for name in REPEATS:
        if name in report and (name != "benchmark" or report[name]["prompts"]):
            yield f"rows: {name.replace('_', '-')}", f"{report[name]['rows']:,}"
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
