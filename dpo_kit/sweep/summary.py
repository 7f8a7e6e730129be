"""A sweep in a table, two pictures and a choice: a pure function of run directories, whichever launcher made them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import write_json, write_text
from dpo_kit.run.measures import MEASURES
from dpo_kit.run.report.markdown import code, fence, inline, table
from dpo_kit.run.report.numbers import value_text
from dpo_kit.sweep.choice.advice import next_command
from dpo_kit.sweep.choice.rows import Row, summary_rows, terminal_table, to_csv, to_markdown
from dpo_kit.sweep.choice.rule import Choice, choose, read_limits
from dpo_kit.sweep.choice.runs import RunRecord, number, read_runs, sweep_command

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
    command = next_command(runs, choice, sweep_command(Path(sweep_dir)))
    return Summary(Path(sweep_dir), tuple(runs), tuple(summary_rows(runs)), choice, command)


def write_summary(sweep_dir: str | Path, *, ideal: str | Path | None = None, **limits: float | None) -> Summary:
    """Write summary.csv, summary.md, best.json, frontier.png and curves.png into `sweep_dir`; each whole or not at all.

    `ideal` names the data of the best possible frontier (see frontier.py); `limits` are those of `summarize`. May be
    called again after every job: the table is true for what there is.
    """
    from dpo_kit.sweep.pictures.curves import draw_curves
    from dpo_kit.sweep.pictures.frontier import draw_frontier

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
    lines = [f"{_head(summary)} {choice.reason}", *choice.notes]
    lines += [f"{run.path} {run.status}: {_first_line(summary, run)}" for run in summary.runs if run.error]
    lines += [tested] if (tested := _tested(choice)) else []
    lines.append(f"table and pictures: {summary.sweep_dir} (summary.md, frontier.png, curves.png, best.json)")
    if choice.recommended:
        lines.append(f"model: {choice.recommended.root / 'model'}")
    return [*lines, *([f"next: {summary.next}"] if summary.next else [])]


def _measured(values: Mapping[str, Any]) -> str:
    """The measured quantities with their intervals, in one line."""
    shown = ("probe/accuracy", "probe/auc", "gold/reward", "gold/capability")
    measured = [measure for measure in MEASURES if measure.key in shown and number(values.get(measure.key)) is not None]
    return ", ".join(f"{of.label} {value_text(values, of.key, of.form)}" for of in measured)


def _first_line(summary: Summary, run: RunRecord) -> str:
    log = f" (log: {summary.sweep_dir / run.job['log']})" if run.job.get("log") else ""
    return str(run.error).strip().splitlines()[0] + log


def _page(summary: Summary) -> str:
    """summary.md: the sweep on one page, for whoever finds the folder."""
    choice, folder = summary.choice, summary.sweep_dir
    pages = {run.path for run in summary.runs if RunDirectory(run.root).page.exists()}
    parts = [
        f"# Sweep {inline(folder.resolve().name)}",
        _about(summary.runs),
        f"{_head(summary, '**')} {inline(choice.reason)}",
        f"Next:\n\n{fence(summary.next, 'bash')}" if summary.next else "",
        to_markdown(summary.rows, summary.recommended, pages).rstrip(),
        "\n".join(f"- {inline(note)}" for note in choice.notes),
        _means_table(choice),
        _tested(choice),
        f"Rule: {inline(choice.rule)}",
        "![quality against KL](frontier.png)",
        "![curves over steps](curves.png)",
        _repeat(summary),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _about(runs: Sequence[RunRecord]) -> str:
    """What was trained from what on what, in a sentence."""
    done = sum(run.finished for run in runs)
    methods = dict.fromkeys(inline(str(run.method)) for run in runs)
    starts = dict.fromkeys(code(str((run.manifest.get("model") or {}).get("path"))) for run in runs)
    data = dict.fromkeys(code(str(path)) for run in runs if (path := (run.config.get("data") or {}).get("train")))
    on = f" on {', '.join(data)}" if data else ""
    return f"{done} of {len(runs)} runs are done: {', '.join(methods)} of {', '.join(starts)}{on}."


def _head(summary: Summary, bold: str = "") -> str:
    if not summary.recommended:
        return f"{bold}Nothing recommended{bold}."
    provisional = " (provisional)" if summary.choice.quality.provisional else ""
    return f"Recommended: {bold}{summary.recommended}{bold}{provisional}."


def _tested(choice: Choice) -> str:
    test = choice.recommended and choice.recommended.test
    return f"On the test split, which played no part in the choice: {_measured(test)}." if test else ""


def _means_table(choice: Choice) -> str:
    if not choice.means:
        return ""
    headings = list(choice.means[0])
    return table(headings, ([_cell(mean[key]) for key in headings] for mean in choice.means), left=len(headings))


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else inline(str(value))


def _repeat(summary: Summary) -> str:
    """The command of the sweep, and the versions of its first run."""
    command = sweep_command(summary.sweep_dir)
    versions = next((run.manifest["versions"] for run in summary.runs if "versions" in run.manifest), None) or {}
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts = [fence(command, "bash") if command else "", f"Versions: {inline(said)}." if said else ""]
    return "\n\n".join(["## Repeat it", *filter(None, parts)]) if any(parts) else ""
