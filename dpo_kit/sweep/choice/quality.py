"""What "better" means in a sweep: the best measure of quality that its runs have, and how it is tested.

Fresh samples decide (gold reward, else a judge's win rate). Held-out accuracy alone can prefer the weaker policy
(arXiv:2405.19534), so that a choice by it is provisional.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from dpo_kit.run.statistics import Difference, from_intervals, mcnemar, needed_against_half, paired_bootstrap
from dpo_kit.sweep.choice.runs import RunRecord, number

Interval = tuple[float, float, float]  # value, low, high; 95 %


@dataclass(frozen=True)
class Quality:
    """One measure: how it is called and counted, its value in a run, its test against the reference and between runs.

    `gain` and `compare` give None where a run lacks what they need. `key` is the metric along the way.
    """

    name: str
    key: str
    unit: str
    test: str
    provisional: bool
    read: Callable[[RunRecord], Interval | None]
    gain: Callable[[RunRecord], Difference | None]
    compare: Callable[[RunRecord, RunRecord], Difference | None]


def quality_of(runs: Sequence[RunRecord]) -> Quality:
    """The first of gold reward, win rate, accuracy and AUC that some finished run has; accuracy where none has any."""
    return next((quality for quality in QUALITIES if any(quality.read(run) for run in runs)), QUALITIES[2])


def _final(key: str) -> Callable[[RunRecord], Interval | None]:
    return lambda run: _interval(run.final(key), run.final(f"{key}_low"), run.final(f"{key}_high"))


def _interval(value: float | None, low: float | None, high: float | None) -> Interval | None:
    return None if value is None or low is None or high is None else (value, low, high)


def _win_rate(run: RunRecord) -> Interval | None:
    """None while verdicts are missing: those that are there may be the easy ones."""
    whole = run.finished and (run.judged.get("parts") or {}).get("win_rate", "done") == "done"
    ends: Mapping[str, Any] = run.judged if whole else {}
    return _interval(*(number(ends.get(f"win_rate{end}")) for end in ("", "_low", "_high")))


def _gold_gain(run: RunRecord) -> Difference | None:
    """Final minus start, paired by prompt; by the two intervals where answers are not recorded by prompt."""
    paired = paired_bootstrap(run.gold_by_prompt(), run.gold_by_prompt(at_start=True))
    final, start = _final("gold/reward")(run), start_interval(run, "gold/reward")
    return paired or (from_intervals(final, start) if final and start else None)


def start_interval(run: RunRecord, key: str) -> Interval | None:
    """A measure of the step-0 model with its interval."""
    return _interval(*(run.start(f"{key}{end}") for end in ("", "_low", "_high")))


def _above_half(read: Callable[[RunRecord], Interval | None]) -> Callable[[RunRecord], Difference | None]:
    """Against the untrained policy, which has one half by construction."""

    def gain(run: RunRecord) -> Difference | None:
        found = read(run)
        if found is None:
            return None
        half = from_intervals(found, (0.5, 0.5, 0.5))
        return replace(
            half, low=found[1] - 0.5, high=found[2] - 0.5, needed=needed_against_half(found[0]), basis="its interval"
        )

    return gain


def _by_intervals(read: Callable[[RunRecord], Interval | None]) -> Callable[[RunRecord, RunRecord], Difference | None]:
    def compare(first: RunRecord, second: RunRecord) -> Difference | None:
        left, right = read(first), read(second)
        return from_intervals(left, right) if left and right else None

    return compare


def _compare_gold(first: RunRecord, second: RunRecord) -> Difference | None:
    paired = paired_bootstrap(first.gold_by_prompt(), second.gold_by_prompt())
    return paired or _by_intervals(_final("gold/reward"))(first, second)


def _compare_accuracy(first: RunRecord, second: RunRecord) -> Difference | None:
    return mcnemar(first.pairs, second.pairs) or _by_intervals(_final("probe/accuracy"))(first, second)


def _compare_win_rates(first: RunRecord, second: RunRecord) -> Difference | None:
    """Paired by prompt; None where another judge or another opponent stood behind them: these do not compare."""
    if first.judged_by != second.judged_by:
        return None
    paired = paired_bootstrap(first.points_by_prompt, second.points_by_prompt)
    return paired or _by_intervals(_win_rate)(first, second)


_accuracy, _auc, _gold = (_final(key) for key in ("probe/accuracy", "probe/auc", "gold/reward"))
QUALITIES = (
    Quality("gold reward", "gold/reward", "prompts", "bootstrap", False, _gold, _gold_gain, _compare_gold),
    Quality(
        "win rate", "win_rate", "prompts", "bootstrap", False,
        _win_rate, _above_half(_win_rate), _compare_win_rates,
    ),
    Quality(
        "held-out accuracy", "probe/accuracy", "pairs", "exact McNemar", True,
        _accuracy, _above_half(_accuracy), _compare_accuracy,
    ),
    Quality(
        "held-out AUC", "probe/auc", "answers", "the intervals of the AUC", True,
        _auc, _above_half(_auc), _by_intervals(_auc),
    ),
)  # fmt: skip
