"""A data report as a short table and its warnings in full, for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dpo_kit.data.report.picture import told

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def show_report(console: Console, report: dict[str, Any], *, title: str, before: dict[str, Any] | None = None) -> None:
    """Print the table (two columns of values where there is a report from before) and then each warning."""
    from rich.markup import escape

    console.print(report_table(report, title=title, before=before))
    for warning in report["warnings"]:
        console.print(f"[bold]{escape(warning['what'])}[/bold]", highlight=False)
        console.print(f"{warning['why']}\n→ {warning['do']}\n", highlight=False, markup=False)


def report_table(report: dict[str, Any], *, title: str, before: dict[str, Any] | None = None) -> Table:
    """The figures that one looks at first; what the data do not have has no row."""
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("data")
    rows, old = dict(_rows(report)), dict(_rows(before)) if before else {}
    for name in ("before", "after") if before else ("",):
        table.add_column(name, justify="right")
    for label in dict.fromkeys([*old, *rows]):
        values = [old.get(label, "–")] if before else []
        table.add_row(label, *values, rows.get(label, "–"))
    return table


def _rows(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield from ((f"{path}, read as", form) for path, form in report["forms"].items())
    yield "rows read", f"{report['rows_read']:,}"
    for name, count in report["rows"].items():
        if name != "dropped" and count:
            yield f"rows, {name.replace('_', ' ')}", f"{count:,}"
    for reason, count in report["dropped_by_reason"].items():
        yield f"  dropped: {reason}", f"{count:,}"
    for name, found in report["tokens"].items():
        yield f"tokens of {name}, median (95 %)", f"{found['median']:,.0f} ({found['p95']:,.0f})"
    yield f"rows cut at max_length {report['max_length']}", f"{report['cut_at_max_length']:,}"
    yield from _repeats(report)
    yield from _labels(report)
    if "diversity" in report:
        found = report["diversity"]
        yield "prompts (clusters of alike ones)", f"{found['prompts']:,} ({found['clusters']:,})"
        yield "pairs with nearly the same answers", _share(report["difficulty"], "nearly_alike")
    yield "edge cases", f"{report['edge_cases']['share']:.1%}"


def _share(found: dict[str, Any] | None, name: str) -> str:
    return "–" if found is None else f"{found[name]:.1%}"


def _repeats(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    names = ("copies", "near_duplicates", "contradictions", "near_contradictions", "leaks")
    for name in (*names, *(("benchmark",) if report["benchmark"]["prompts"] else ())):
        if name in report:
            yield f"rows: {name.replace('_', '-')}", f"{report[name]['rows']:,}"


def _labels(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for name, found in told(report.get("shortcuts", {})).items():
        yield f"accuracy of: {name}", f"{found['accuracy']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"
    if report["agreement"]:
        found = report["agreement"]
        yield "rater agreement, mean (below .7)", f"{found['mean']:.3f} ({found['below_0.7']:.1%})"
    if report["scores"]:
        found = report["scores"]
        yield (
            "rating gap, median (ties, reversed)",
            f"{found['gap']['median']:g} ({found['ties']:.1%}, {found['reversed']:.1%})",
        )
    if found := report.get("classes"):
        yield "thumbs up, down", f"{found['desirable']:,}, {found['undesirable']:,}"
    if found := report.get("reference"):
        text = f"{found['accuracy']:.3f} [{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]"
        yield "the reference prefers chosen", text
        yield "the same by token", f"{found['accuracy_per_token']:.3f}"
