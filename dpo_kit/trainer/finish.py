"""The end of a run: the model, what it measured, and `result.json` last of all."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import Trainer

from dpo_kit.config.limits import OURS
from dpo_kit.config.settings import Settings
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json, write_json
from dpo_kit.run.history import read_metrics
from dpo_kit.run.redact import redact_text
from dpo_kit.run.report.card import write_card
from dpo_kit.run.report.findings import Finding
from dpo_kit.run.report.page import refresh_page, write_page
from dpo_kit.run.words import again, longer
from dpo_kit.trainer.resume.safe_trainer import refuse_non_finite
from dpo_kit.trainer.resume.whole_or_absent import save_model

if TYPE_CHECKING:
    from dpo_kit.run.tracking import Tracker

log = logging.getLogger(__name__)
SHOWN_PROMPTS = 8  # of samples.jsonl, in the tracker's table


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended; the same facts as its result.json.

    `start` and `final` hold the measured values by key (nats, shares) at step 0 and at the end; `ceiling` is the
    accuracy that the gold reward itself reaches on the held-out labels, where it is known; `seconds` are wall-clock:
    of training and of the whole `run`, both with what was spent on `measuring`.
    """

    status: str
    run_dir: str
    method: str
    beta: float
    seed: int
    model: str
    tuning: str
    steps: int
    start: dict[str, float]
    final: dict[str, float]
    ceiling: float | None
    seconds: dict[str, float]
    findings: list[dict[str, str]]
    next: str
    judge: dict[str, Any] | None = None  # of fresh answers: comparisons, how many a coin decided and why, cost
    published: dict[str, Any] | None = None  # beside the published run that an experiment repeats: published.py

    @classmethod
    def read(cls, run_dir: str | Path) -> Result:
        """The result of a finished run."""
        return cls(**read_json(RunDirectory(Path(run_dir)).result))


def finish_run(
    trainer: Trainer,
    settings: Settings,
    run: RunDirectory,
    tracker: Tracker | None,
    *,
    seconds: dict[str, float],
    ceiling: float | None,
    judge: dict[str, Any] | None,
    early_findings: Sequence[Finding],
) -> Result:
    """Save the model, draw the report, write the result; `early_findings` are those from before the first step."""
    refuse_non_finite(trainer.model, "after training")
    measuring, whole = seconds["measuring"], seconds["run"]
    log.info(f"measuring took {measuring:.0f} s of {whole:.0f}: {measuring / whole:.2f} of the run")
    save_model(trainer, run.model)
    if not trainer.is_world_process_zero():
        trainer.accelerator.wait_for_everyone()  # until the first process has written the result
        return Result.read(run.root)
    history, manifest, published, findings = read_metrics(run.metrics), read_json(run.manifest), None, early_findings
    final = measured(history)
    if final and not early_findings:  # what would be noticed afterwards follows from an early finding
        from dpo_kit.run.report.diagnosis import diagnose

        findings = diagnose(history, settings.method.model_dump())
    if settings.experiment:
        from dpo_kit.trainer.published import compare_with_published

        published = compare_with_published(manifest, history)
    result = Result(
        status="done",
        run_dir=str(run.root),
        steps=trainer.state.global_step,
        start=measured(history[:1]) | measured([row for row in history if row["step"] == 0]),
        final=final,
        ceiling=ceiling,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        findings=[finding.saved() for finding in findings],
        next=next_command(settings, manifest["command"], history, early_findings),
        judge=judge,
        published=published,
        **identity(settings),
    )
    if final:  # else there is nothing to draw
        from dpo_kit.run.report.picture import draw_report

        title = f"{result.method} · beta {result.beta:g} · seed {result.seed}"
        draw_report(run.root, title=title, ceiling=ceiling)
    values = dataclasses.asdict(result)
    write_card(run.root, values, manifest)
    page = refresh_page(run.root, values)
    if tracker:
        if page:
            tracker.notes(page)
        tracker.summary({f"final/{key}": value for key, value in final.items()} | {"status": result.status})
        if run.picture.exists():
            tracker.image("report", run.picture)
        if run.samples.exists():
            samples = read_metrics(run.samples)
            shown = {row["prompt_id"] for row in samples[:SHOWN_PROMPTS]}
            rows = [list(row.values()) for row in samples if row["prompt_id"] in shown]
            tracker.table("samples", list(samples[0]), rows)
    write_json(run.result, values)
    trainer.accelerator.wait_for_everyone()
    return result


def identity(settings: Settings) -> dict[str, Any]:
    """What tells this run from its neighbours in a sweep."""
    names = {"method": settings.method.name, "beta": settings.beta, "seed": settings.seed}
    return names | {"model": settings.model.path, "tuning": settings.model.tuning}


def measured(history: list[dict[str, Any]]) -> dict[str, float]:
    """The last value of every measured key."""
    return {key: value for row in history for key, value in row.items() if key.startswith(OURS)}


def next_command(
    settings: Settings, command: str | None, history: list[dict[str, Any]], early_findings: Sequence[Finding] = ()
) -> str:
    """A sweep that shows whether this beta was a good choice; twice the training where beta is not felt yet, or nothing
    learned; with other values where early findings name some.
    """
    method = settings.method
    if changed := {key: value for finding in early_findings for key, value in finding.change.items()}:
        return again(command, method.name, **changed)
    if measured(history):
        from dpo_kit.run.report.diagnosis import needs_longer

        if needs_longer(history, method.model_dump()):
            return again(command, method.name, **longer(settings.trl))
    return again(command, method.name, "-m", beta=",".join(f"{value:g}" for value in method.beta.grid))


def write_failure(run: RunDirectory, settings: Settings, error: BaseException) -> None:
    """Say in result.json that and why the run did not end well."""
    told = {
        "status": "interrupted" if isinstance(error, KeyboardInterrupt | SystemExit) else "failed",
        "error": redact_text(f"{type(error).__name__}: {error}"),
        "traceback": redact_text("".join(traceback.format_exception(error))),
    }
    write_json(run.result, identity(settings) | told)
    with contextlib.suppress(Exception):  # a page must not hide what went wrong
        write_page(run.root)
