"""The regression gate: what a paired comparison on each task allows to be said, and the verdict over all of them.

A task *failed* where the loss is larger than the limit and its 95 % interval lies above 0; it *passed* where the whole
interval of the loss lies within the limit; anything else is *inconclusive*, with the samples that would settle it.
Only a task that failed closes the gate: too few samples are no evidence against a run (and each further task is one
more chance of a false alarm, 2.5 % at most).

A bootstrap knows nothing of what no sample showed, so that a handful of samples settles nothing whatever its interval:
see `LEAST_CHANGED` and `UNSEEN`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from dpo_kit.errors import DataError
from dpo_kit.run.statistics import needed_mean, paired_bootstrap

Outcome = Literal["failed", "inconclusive", "passed"]
LEAST_CHANGED = 6  # samples: with fewer, not even all of them getting worse is beyond chance (2·½⁵ = .0625)
UNSEEN = -math.log(0.025)  # over n: the share of samples that may change for the worse though n of them did not
WORST_FIRST: tuple[Outcome, ...] = ("failed", "inconclusive", "passed")


@dataclass(frozen=True)
class TaskComparison:
    """Policy against reference on the same samples of one task; `low` and `high` are those of `difference`.

    `difference` is policy − reference, so that a loss is negative; where less is better, both scores are turned round
    first. `needed` is how many samples would settle a true difference of this size, where it is not settled.
    """

    task: str
    metric: str
    policy: float
    reference: float
    n: int
    difference: float
    low: float
    high: float
    verdict: Outcome
    needed: int | None = None


def compare_task(
    task: str, metric: str, policy: Mapping[str, float], reference: Mapping[str, float], limit: float
) -> TaskComparison:
    """The comparison of two {sample: score}, more being better. DataError where they are not of the same samples."""
    if policy.keys() != reference.keys() or len(policy) < 2:
        both = len(policy.keys() & reference.keys())
        raise DataError(
            f"{task}: a paired comparison needs the same samples, two at least: the policy has {len(policy)}, the "
            f"reference {len(reference)}, both have {both}. Evaluate them with the same version of the task"
        )
    found = paired_bootstrap(policy, reference)
    assert found is not None
    gaps = [policy[name] - reference[name] for name in policy]
    needed = None
    if found.value < -limit and found.high < 0 and sum(gap != 0 for gap in gaps) >= LEAST_CHANGED:
        verdict: Outcome = "failed"
    elif found.low >= -limit and (found.low > 0 or UNSEEN / found.count <= limit):
        verdict = "passed"
    elif found.value < -limit:
        verdict, needed = "inconclusive", max(needed_mean(gaps) or 0, math.ceil(LEAST_CHANGED / -found.value))
    else:  # how many would show that the loss stays within the limit
        verdict, within = "inconclusive", needed_mean([gap + limit for gap in gaps])
        needed = max(within, math.ceil(UNSEEN / limit)) if within is not None and limit else None
    means = fmean(policy.values()), fmean(reference.values())
    return TaskComparison(task, metric, *means, found.count, found.value, found.low, found.high, verdict, needed)


def decide_gate(tasks: Sequence[TaskComparison], limit: float) -> dict[str, Any]:
    """The gate over all tasks: {passed, verdict, worst_task, difference, low, high, limit, inconclusive, reason}.

    The worst task is the one of the worst verdict, and of those the one with the largest loss.
    """
    worst = min(tasks, key=lambda task: (WORST_FIRST.index(task.verdict), task.difference))
    more = f"about {worst.needed:,} samples would settle it" if worst.needed else "no number of samples settles that"
    reasons: dict[Outcome, str] = {
        "failed": f": a loss beyond chance, and above the limit of {limit:g}",
        "passed": f", the worst task: no loss above {limit:g} is left in any interval",
        "inconclusive": f": neither a loss nor that it stays within {limit:g} is shown; {more}",
    }
    seen = f"{worst.difference:+.3f} [{worst.low:+.3f}, {worst.high:+.3f}] on {worst.n} samples of {worst.task}"
    return {
        "passed": worst.verdict != "failed", "verdict": worst.verdict, "worst_task": worst.task,
        "difference": worst.difference, "low": worst.low, "high": worst.high, "limit": limit,
        "inconclusive": [task.task for task in tasks if task.verdict == "inconclusive"],
        "reason": seen + reasons[worst.verdict],
    }  # fmt: skip
