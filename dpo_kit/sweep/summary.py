"""A sweep in a table, two pictures and a choice: a function of run directories, whichever launcher made them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_kit.config.settings import Tracking
from dpo_kit.run import tracking
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import write_json, write_text
from dpo_kit.run.measures import MEASURE
from dpo_kit.run.quiet import quiet_imports
from dpo_kit.run.report.markdown import code, fence, inline, table
from dpo_kit.run.report.numbers import value_text
from dpo_kit.run.words import again, command, longer, override
from dpo_kit.sweep.choice.best_of import (
    BestOf,
    as_good_as,
    find_ideal,
    gold_of_best_of,
    measure_best_of,
    win_rates_of_best_of,
)
from dpo_kit.sweep.choice.rows import Row, cell, summary_rows, terminal_table, to_csv, to_markdown
from dpo_kit.sweep.choice.rule import Choice, choose, unfelt_saturation
from dpo_kit.sweep.choice.runs import RunRecord, number, read_runs, sweep_command

if TYPE_CHECKING:
    from rich.console import Console

log = logging.getLogger("dpo_kit.sweep")


@dataclass(frozen=True)
class Summary:
    """What a sweep says: its runs, a row of the table for each, the choice, and what to type next."""

    sweep_dir: Path
    runs: tuple[RunRecord, ...]
    rows: tuple[Row, ...]
    choice: Choice
    next: str | None
    best_of: tuple[BestOf, ...] = ()  # what best-of-n of the reference gives by the same measure

    @property
    def recommended(self) -> str | None:
        """The recommended run's path, relative to the sweep directory."""
        return self.choice.recommended.path if self.choice.recommended else None


def summarize(
    sweep_dir: str | Path,
    *,
    kl_budget_nats: float | None = None,
    max_regression: float | None = None,
    ideal: str | Path | None = None,
) -> Summary:
    """Read the runs under `sweep_dir` and apply the rule of choice, with the limits (nats per answer; a share) of their
    own config unless given; `ideal`: see `write_summary`. Writes nothing. DataError where there is no run.
    """
    runs = read_runs(sweep_dir)
    choice = choose(runs, kl_budget_nats=kl_budget_nats, max_regression=max_regression)
    following = next_command(runs, choice, sweep_command(Path(sweep_dir)))
    best_of: list[BestOf] = []
    if not choice.within and choice.quality.key == "win_rate":
        best_of = win_rates_of_best_of()
    elif not choice.within and choice.quality.key == "gold/reward":
        best_of = gold_of_best_of(Path(sweep_dir), find_ideal(Path(sweep_dir), runs, ideal))
    return Summary(Path(sweep_dir), tuple(runs), tuple(summary_rows(runs)), choice, following, tuple(best_of))


def next_command(runs: Sequence[RunRecord], choice: Choice, command: str | None) -> str | None:
    """One command that would make the answer better, or None. Unfinished runs: the sweep's own `command` again. Nothing
    beats the reference, or beta is not felt: twice as long. A choice from one seed: the betas that tie, over three.
    """
    finished = [run for run in runs if run.finished]
    if len(finished) < len(runs):
        return command
    if len({run.start_model for run in finished}) > 1:
        return None
    no_gain = all(verdict.gain and verdict.gain.low <= 0 for verdict in choice.verdicts)
    if no_gain or unfelt_saturation(finished) is not None:
        run, rivals, changed = finished[0], finished, longer(finished[0].config.get("trl") or {})
        if command is not None:
            return again(command, None, "-m", **changed)
    elif choice.recommended and len({run.seed for run in finished}) == 1:
        run, changed = choice.recommended, {"seed": "0,1,2"}
        rivals = [v.run for v in choice.verdicts if v.tied and v.run.method == run.method]
    else:
        return None
    betas = sorted({rival.beta for rival in rivals if rival.beta is not None})
    changed = {"beta": ",".join(f"{beta:g}" for beta in betas)} | changed
    return again(run.manifest.get("command"), run.method, "-m", **changed)


def write_summary(sweep_dir: str | Path, *, ideal: str | Path | None = None, **limits: float | None) -> Summary:
    """Write summary.csv, summary.md, best.json, frontier.png and curves.png into `sweep_dir`, each whole or not at all,
    true for what there is. `ideal`: the file of the best frontier (choice/best_of.py); `limits`: those of `summarize`.
    """
    from dpo_kit.sweep.pictures.curves import draw_curves
    from dpo_kit.sweep.pictures.frontier import draw_frontier

    summary = summarize(sweep_dir, ideal=ideal, **limits)
    write_text(summary.sweep_dir / "summary.csv", to_csv(summary.rows))
    write_text(summary.sweep_dir / "summary.md", _page(summary))
    best_of = [vars(point) for point in summary.best_of]
    write_json(summary.sweep_dir / "best.json", summary.choice.to_json() | {"best_of_n_of_the_reference": best_of})
    drawn = () if summary.choice.quality.key == "win_rate" else summary.best_of  # that of a win rate is without ties
    draw_frontier(summary.sweep_dir, summary.runs, summary.choice, ideal=ideal, best_of=drawn)
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
    for line in describe(summary):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return summary


def describe(summary: Summary) -> list[str]:
    """The choice in plain sentences, errors of failed runs, where the files are, the next command."""
    choice, folder = summary.choice, summary.sweep_dir
    lines = [f"{_head(summary)} {choice.reason}", *choice.notes]
    for run in summary.runs:
        if run.error:
            logged = f" (log: {folder / run.job['log']})" if run.job.get("log") else ""
            lines.append(f"{run.path} {run.status}: {str(run.error).strip().splitlines()[0]}{logged}")
    lines += [*_beside_best_of(summary), *_tested(choice)]
    lines += [f"table and pictures: {folder} (summary.md, frontier.png, curves.png, best.json)"]
    if chosen := choice.recommended:
        lines.append(f"model: {chosen.weights}")
        if chosen.step is not None:
            words = override("run", chosen.root), f"step={chosen.step}"
            lines.append(f"export it: {command(*words, tool='export')}")
    return [*lines, *([f"next: {summary.next}"] if summary.next else [])]


def _page(summary: Summary) -> str:
    """summary.md: the sweep on one page, for whoever finds the folder."""
    choice, folder, runs = summary.choice, summary.sweep_dir, summary.runs
    methods = dict.fromkeys(inline(str(run.method)) for run in runs)
    starts = dict.fromkeys(code(str((run.manifest.get("model") or {}).get("path"))) for run in runs)
    data = dict.fromkeys(code(str(path)) for run in runs if (path := (run.config.get("data") or {}).get("train")))
    pages = {run.path for run in runs if run.directory.page.exists()}
    trained = ", ".join(methods) + " of " + ", ".join(starts) + (f" on {', '.join(data)}" if data else "")
    parts = [
        f"# Sweep {inline(folder.resolve().name)}",
        f"{sum(run.finished for run in runs)} of {len(runs)} runs are done: {trained}.",
        f"{_head(summary, '**')} {inline(choice.reason)}",
        f"Next:\n\n{fence(summary.next, 'bash')}" if summary.next else "",
        to_markdown(summary.rows, summary.recommended, pages).rstrip(),
        "\n".join(f"- {inline(note)}" for note in choice.notes),
    ]
    if choice.means:
        keys = list(choice.means[0])
        means = [[inline(cell(mean[key], ".4g")) for key in keys] for mean in choice.means]
        parts.append(table(keys, means, left=len(keys)))
    parts += [*_beside_best_of(summary), *_tested(choice)]
    parts += [f"Rule: {inline(choice.rule)}", "![quality against KL](frontier.png)", "![curves over steps](curves.png)"]
    command = sweep_command(folder)
    versions = next((run.manifest["versions"] for run in runs if "versions" in run.manifest), None) or {}
    used = ", ".join(f"{name} {version}" for name, version in versions.items())
    parts += ["## Repeat it"] if command or used else []
    parts += [fence(command, "bash") if command else "", f"Versions: {inline(used)}." if used else ""]
    return "\n\n".join(filter(None, parts)) + "\n"


def _head(summary: Summary, bold: str = "") -> str:
    if not summary.recommended:
        return f"{bold}Nothing recommended{bold}."
    provisional = " (provisional)" if summary.choice.quality.provisional else ""
    assert summary.choice.recommended
    return f"Recommended: {bold}{summary.choice.recommended.name}{bold}{provisional}."


def _beside_best_of(summary: Summary) -> list[str]:
    """What the recommended run is beside best-of-n of its reference, in a sentence; [] where that is not known."""
    run, points, quality = summary.choice.recommended, summary.best_of, summary.choice.quality
    if run is None or not points or points[-1].n < 2:
        return []
    name, value = quality.name, (quality.read(run) or (None,))[0]
    if quality.key == "win_rate":  # where ties count half a rate says less
        key = "win_rate_without_ties"
        name, value = MEASURE[key].label, number(run.judged.get(key))
    if value is None:
        return []
    how, point = as_good_as(value, points)
    drift = "" if run.kl_reverse is None else f" at {run.kl_reverse:.2f}"
    advice = " Look at the data before anything else." if how == "not better than" else ""
    return [
        f"{run.name} is {how} best of {point.n} of its reference: {name} {point.value:.3f} at "
        f"{point.kl:.2f} nats or less, where its own is {value:.3f}{drift}.{advice}"
    ]


def _tested(choice: Choice) -> list[str]:
    """What the recommended run measured on the test split, in a sentence; [] where it was not measured."""
    if not (test := choice.recommended and choice.recommended.test):
        return []
    shown = [MEASURE[key] for key in ("probe/accuracy", "probe/auc", "gold/reward", "gold/capability")]
    values = [f"{m.row} {value_text(test, m.key, m.form)}" for m in shown if number(test.get(m.key)) is not None]
    return [f"On the test split, which played no part in the choice: {', '.join(values)}."]


def conclude(sweep_dir: Path, wanted: Tracking, *, measure: bool) -> None:
    """Sum up the sweep in `sweep_dir` that has ended; `measure`: here the recommended model may be measured first."""
    if not any(sweep_dir.glob("*/manifest.json")):
        return
    if measure:
        measure_recommended(sweep_dir)
        sample_reference(sweep_dir)
    summary = show_summary(sweep_dir)
    if wanted.reporter == "wandb":
        report(summary, wanted)


def measure_recommended(sweep_dir: str | Path, **limits: Any) -> None:
    """Measure the recommended run once on data that played no part in choosing it; `limits`: those of `summarize`."""
    chosen = summarize(sweep_dir, **limits).choice.recommended
    if chosen is None or chosen.test:
        return
    log.info("measuring %s on the test split", chosen.name)
    quiet_imports()
    try:
        from dpo_kit.trainer.held_out import measure_test_split

        measure_test_split(chosen.root, chosen.step)
    except Exception as error:  # the sweep's own results stand without it
        log.warning("%s could not be measured on the test split (%s: %s)", chosen.name, type(error).__name__, error)


def sample_reference(sweep_dir: str | Path) -> None:
    """Measure once what best-of-n of the reference gives, where answers have a known reward and nothing says it yet."""
    summary = summarize(sweep_dir)
    run = summary.choice.recommended or next((run for run in summary.runs if run.finished), None)
    if summary.choice.quality.key != "gold/reward" or summary.choice.within or summary.best_of or run is None:
        return
    log.info("drawing answers of the reference, for best of n")
    try:
        measure_best_of(Path(sweep_dir), run.root, sum(run.seconds or 0.0 for run in summary.runs))
    except Exception as error:  # the sweep's own results stand without it
        log.warning("best of n could not be measured (%s: %s)", type(error).__name__, error)


def report(summary: Summary, wanted: Tracking) -> None:
    """One wandb run for the sweep, in the group of its jobs: the table, the pictures, the choice."""
    folder = summary.sweep_dir
    options = wanted.model_dump(include={"project", "entity", "tags"}) | {"group": wanted.group or folder.name}
    options |= {"run_dir": folder, "run_id": RunDirectory(folder).wandb_id(), "name": f"{folder.name} summary"}
    tracker = tracking.start({"rule": summary.choice.rule}, job_type="summary", **options)
    tracker.table("sweep", list(summary.rows[0]), [list(row.values()) for row in summary.rows])
    for name in ("frontier", "curves"):
        tracker.image(name, folder / f"{name}.png")
    step = summary.choice.recommended and summary.choice.recommended.step
    tracker.summary({"recommended": summary.recommended, "step": step, "reason": summary.choice.reason})
    tracker.finish()
