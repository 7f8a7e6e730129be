"""A sweep in a table, two pictures and a choice: a pure function of run directories, whichever launcher made them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.report import TABLE, interval_text
from dpo_kit.run import write_json, write_text
from dpo_kit.sweep.advice import next_command
from dpo_kit.sweep.choice import Choice, choose, read_limits
from dpo_kit.sweep.rows import Row, summary_rows, terminal_table, to_csv, to_markdown
from dpo_kit.sweep.runs import RunRecord, number, read_runs, read_sweep

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Summary:
    """What a sweep says: its runs, a row of the table for each, the choice, and what to type next."""

    sweep_dir: Path
    runs: tuple[RunRecord, ...]
    rows: tuple[Row, ...]
    choice: Choice
    next: str | None

    @property
    def recommended(self) -> str | None:
        """The recommended run's path, relative to the sweep directory."""
        return self.choice.recommended.path if self.choice.recommended else None


def summarize(
    sweep_dir: str | Path, *, kl_budget_nats: float | None = None, max_regression: float | None = None
) -> Summary:
    """Read the runs under `sweep_dir` and apply the rule of choice; writes nothing.

    The limits (nats per answer; a share) are those of the runs' own config unless given. Raises DataError where there
    is no run.
    """
    runs = read_runs(sweep_dir)
    limits = read_limits(runs, kl_budget_nats=kl_budget_nats, max_regression=max_regression)
    choice = choose(runs, limits)
    command = next_command(runs, choice, read_sweep(Path(sweep_dir)))
    return Summary(Path(sweep_dir), tuple(runs), tuple(summary_rows(runs)), choice, command)


def write_summary(sweep_dir: str | Path, *, ideal: str | Path | None = None, **limits: float | None) -> Summary:
    """Write summary.csv, summary.md, best.json, frontier.png and curves.png into `sweep_dir`; each whole or not at all.

    `ideal` names the data of the best possible frontier (see frontier.py); `limits` are those of `summarize`. May be
    called again after every job: the table is true for what there is.
    """
    from dpo_kit.sweep.curves import draw_curves
    from dpo_kit.sweep.frontier import draw_frontier

    summary = summarize(sweep_dir, **limits)
    write_text(summary.sweep_dir / "summary.csv", to_csv(summary.rows))
    write_text(summary.sweep_dir / "summary.md", _page(summary))
    write_json(summary.sweep_dir / "best.json", summary.choice.to_json())
    draw_frontier(summary.sweep_dir, summary.runs, summary.choice, ideal=ideal)
    draw_curves(summary.sweep_dir, summary.runs)
    return summary


def refresh(sweep_dir: str | Path) -> None:
    """`write_summary` after a job of a sweep that goes on: a failure here is logged and never ends the sweep."""
    try:
        write_summary(sweep_dir)
    except Exception:
        log.warning("the summary of %s could not be written", sweep_dir, exc_info=True)


def show_summary(
    sweep_dir: str | Path, *, ideal: str | Path | None = None, console: Console | None = None, **limits: float | None
) -> Summary:
    """Write the summary and show it: a short table, the choice in plain sentences, the next command."""
    from rich.console import Console

    summary = write_summary(sweep_dir, ideal=ideal, **limits)
    console = console or Console()
    console.print(terminal_table(summary.rows, summary.recommended, f"sweep {summary.sweep_dir.resolve().name}"))
    plain: dict[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}
    for line in describe(summary):
        console.print(line, **plain)
    return summary


def describe(summary: Summary) -> list[str]:
    """The choice in plain sentences, errors of failed runs, where the files are, the next command."""
    choice = summary.choice
    head = f"Recommended: {summary.recommended}" if summary.recommended else "Nothing recommended"
    provisional = " (provisional)" if choice.quality.provisional and summary.recommended else ""
    lines = [f"{head}{provisional}. {choice.reason}", *choice.notes]
    lines += [f"{run.path} {run.status}: {_first_line(summary, run)}" for run in summary.runs if run.error]
    if test := choice.recommended and choice.recommended.test:
        lines.append(f"On the test split, which played no part in the choice: {_measured(test)}.")
    lines.append(f"table and pictures: {summary.sweep_dir} (summary.md, frontier.png, curves.png, best.json)")
    if choice.recommended:
        lines.append(f"model: {choice.recommended.root / 'model'}")
    return [*lines, *([f"next: {summary.next}"] if summary.next else [])]


def _measured(values: Mapping[str, Any]) -> str:
    """The measured quantities with their intervals, in one line."""
    shown = ("probe/accuracy", "probe/auc", "gold/reward", "gold/capability")
    rows = [(label, key, form) for key, label, form in TABLE if key in shown and number(values.get(key)) is not None]
    return ", ".join(
        f"{label} {values[key]:{form}} {interval_text(values, key, form)}".rstrip() for label, key, form in rows
    )


def _first_line(summary: Summary, run: RunRecord) -> str:
    log = f" (log: {summary.sweep_dir / run.job['log']})" if run.job.get("log") else ""
    return str(run.error).strip().splitlines()[0] + log


def _page(summary: Summary) -> str:
    choice = summary.choice
    head = f"Recommended: **{summary.recommended}**" if summary.recommended else "Nothing is recommended"
    provisional = " (provisional)" if choice.quality.provisional and summary.recommended else ""
    parts = [
        f"# Sweep {summary.sweep_dir.resolve().name}\n",
        to_markdown(summary.rows, summary.recommended),
        f"{head}{provisional}. {choice.reason}\n",
        "".join(f"- {note}\n" for note in choice.notes),
        _means_table(choice),
        f"Rule: {choice.rule}\n",
        "![quality against KL](frontier.png)\n",
        "![curves over steps](curves.png)\n",
        f"Next: `{summary.next}`\n" if summary.next else "",
    ]
    return "\n".join(part for part in parts if part)


def _means_table(choice: Choice) -> str:
    if not choice.means:
        return ""
    headings = list(choice.means[0])
    lines = [headings, ["---"] * len(headings), *([_cell(mean[key]) for key in headings] for mean in choice.means)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
