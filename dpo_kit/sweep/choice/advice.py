"""What to type next after a sweep; read from the runs' own commands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dpo_kit.run.report.diagnosis import UNFELT
from dpo_kit.run.words import again, longer
from dpo_kit.sweep.choice.rule import Choice
from dpo_kit.sweep.choice.runs import RunRecord

SEEDS = "0,1,2"


def next_command(runs: Sequence[RunRecord], choice: Choice, command: str | None) -> str | None:
    """One command that would make the answer better, None where there is none to name.

    Unfinished runs: the sweep's own `command` again. Nothing beats the reference, or beta is
    not felt: twice as long. A choice from one seed: the betas that tie, over three seeds.
    """
    finished = [run for run in runs if run.finished]
    if len(finished) < len(runs):
        return command
    if len({run.start_model for run in finished}) > 1:
        return None
    if _short(finished) or all(verdict.gain and verdict.gain.low <= 0 for verdict in choice.verdicts):
        twice = longer(finished[0].config.get("trl") or {})
        if command is not None:
            return again(command, None, "-m", **twice)
        return _again(finished[0], beta=_listed(run.beta for run in finished), **twice)
    if choice.recommended and len({run.seed for run in finished}) == 1:
        run = choice.recommended
        rivals = [v.run.beta for v in choice.verdicts if v.tied and v.run.method == run.method]
        return _again(run, beta=_listed(rivals), seed=SEEDS)
    return None


def _short(finished: Sequence[RunRecord]) -> bool:
    felt = [value for run in finished if (value := run.final("probe/saturation")) is not None]
    return bool(felt) and max(felt) < UNFELT


def _listed(values: Any) -> str:
    return ",".join(f"{value:g}" for value in sorted({value for value in values if value is not None}))


def _again(run: RunRecord, **changed: str) -> str:
    return again(run.manifest.get("command"), run.method, "-m", **changed)
