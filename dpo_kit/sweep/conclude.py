"""The end of a sweep: the recommended run on the test split, the summary on the terminal, the same in the tracker."""

from __future__ import annotations

import logging
from pathlib import Path

from dpo_kit.config.settings import Tracking
from dpo_kit.run import tracking
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.quiet import quiet_imports
from dpo_kit.sweep.summary import Summary, show_summary, summarize

log = logging.getLogger("dpo_kit.sweep")


def conclude(sweep_dir: Path, wanted: Tracking, *, measure: bool) -> None:
    """Sum up the sweep in `sweep_dir`; `measure`: this machine may run the recommended model."""
    if not any(sweep_dir.glob("*/manifest.json")):
        return
    if measure:
        measure_recommended(sweep_dir)
    summary = show_summary(sweep_dir)
    if wanted.reporter == "wandb":
        report(summary, wanted)


def measure_recommended(sweep_dir: str | Path) -> None:
    """Measure the recommended run once on data that played no part in choosing it."""
    chosen = summarize(sweep_dir).choice.recommended
    if chosen is None or chosen.test:
        return
    log.info("measuring %s on the test split", chosen.path)
    quiet_imports()
    try:
        from dpo_kit.trainer.held_out import measure_test_split

        measure_test_split(chosen.root)
    except Exception as error:  # the sweep's own results stand without it
        log.warning("%s could not be measured on the test split (%s: %s)", chosen.path, type(error).__name__, error)


def report(summary: Summary, wanted: Tracking) -> None:
    """One wandb run for the sweep, in the group of its jobs: the table, the pictures, the choice."""
    folder = summary.sweep_dir
    tracker = tracking.start(
        {"rule": summary.choice.rule},
        run_dir=folder,
        run_id=RunDirectory(folder).wandb_id(),
        project=wanted.project,
        entity=wanted.entity,
        group=wanted.group or folder.name,
        tags=wanted.tags,
        name=f"{folder.name} summary",
        job_type="summary",
    )
    tracker.table("sweep", list(summary.rows[0]), [list(row.values()) for row in summary.rows])
    for name in ("frontier", "curves"):
        tracker.image(name, folder / f"{name}.png")
    tracker.summary({"recommended": summary.recommended, "reason": summary.choice.reason})
    tracker.finish()
