"""What to type next after a sweep; read from the runs' own commands."""

from __future__ import annotations

from collections.abc import Sequence

from dpo_kit.run.words import again, longer
from dpo_kit.sweep.choice.rule import Choice, unfelt_saturation
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
    run, changed = finished[0], {}
    no_gain = all(verdict.gain and verdict.gain.low <= 0 for verdict in choice.verdicts)
    if no_gain or unfelt_saturation(finished) is not None:
        changed = longer(run.config.get("trl") or {})
        if command is not None:
            return again(command, None, "-m", **changed)
        rivals = finished
    elif choice.recommended and len({run.seed for run in finished}) == 1:
        run, changed = choice.recommended, {"seed": SEEDS}
        rivals = [v.run for v in choice.verdicts if v.tied and v.run.method == run.method]
    else:
        return None
    betas = sorted({rival.beta for rival in rivals if rival.beta is not None})
    changed = {"beta": ",".join(f"{beta:g}" for beta in betas)} | changed
    return again(run.manifest.get("command"), run.method, "-m", **changed)
