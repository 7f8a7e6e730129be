"""What "better" means in a sweep: the best measure of quality that its runs have, and how it is tested.

Fresh samples decide (gold reward, else a judge's win rate). Held-out accuracy alone can prefer the weaker policy
(arXiv:2405.19534), so that a choice by it is provisional. A further measure is a subclass of `Quality` in `QUALITIES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_kit.run.measures import MEASURE, win_rate_key
from dpo_kit.run.statistics import Difference, from_intervals, mcnemar, needed_against_half, paired_bootstrap
from dpo_kit.sweep.choice.runs import RunRecord, number

Interval = tuple[float, float, float]  # value, low, high; 95 %
HALF: Interval = (0.5, 0.5, 0.5)


class Quality:
    """One measure and its tests, None where a run lacks what they need; a share, ½ for the untrained policy."""

    key: str  # the metric along the way
    name: str
    axis: str  # its name in a picture
    unit = "prompts"  # what `Difference.needed` counts
    test = "bootstrap"
    provisional = False

    def read(self, run: RunRecord) -> Interval | None:
        """The measure at the end of `run`."""
        return read_interval(run.measured, self.key)

    def count(self, run: RunRecord) -> int:
        """How many prompts, pairs or answers it rests on; 0 where that is not known."""
        return run.held_out_rows

    def start(self, run: RunRecord) -> Interval | None:
        """The measure of the step-0 model."""
        return HALF

    def gain(self, run: RunRecord) -> Difference | None:
        """Final minus start: the interval of the final value, less one half."""
        if (final := self.read(run)) is None:
            return None
        low, high, needed = final[1] - 0.5, final[2] - 0.5, needed_against_half(final[0])
        return replace(from_intervals(final, HALF), low=low, high=high, needed=needed, basis="its interval")

    def compare(self, first: RunRecord, second: RunRecord) -> Difference | None:
        """`first` minus `second`: paired where that is possible, else by the two intervals."""
        left, right = self.read(first), self.read(second)
        return self.pair(first, second) or (from_intervals(left, right) if left and right else None)

    def pair(self, first: RunRecord, second: RunRecord) -> Difference | None:
        """The paired test; None where the runs do not hold what it needs."""
        return None


class GoldReward(Quality):
    """Mean gold reward of fresh answers."""

    key = "gold/reward"
    name, axis = MEASURE[key].short, MEASURE[key].label

    def count(self, run: RunRecord) -> int:
        return len(run.gold_by_prompt())

    def start(self, run: RunRecord) -> Interval | None:
        return read_interval(run.at_start, self.key)

    def gain(self, run: RunRecord) -> Difference | None:
        """Final minus start, paired by prompt; by the two intervals where answers are not recorded by prompt."""
        paired = paired_bootstrap(run.gold_by_prompt(), run.gold_by_prompt(at_start=True))
        final, start = self.read(run), self.start(run)
        return paired or (from_intervals(final, start) if final and start else None)

    def pair(self, first: RunRecord, second: RunRecord) -> Difference | None:
        return paired_bootstrap(first.gold_by_prompt(), second.gold_by_prompt())


class WinRate(Quality):
    """How often a judge prefers fresh answers to those of the opponent, put right by people where they checked it."""

    key = "win_rate"
    name, axis = MEASURE[key].short, "win rate of fresh samples against the reference"

    def read(self, run: RunRecord) -> Interval | None:
        """None while verdicts are missing: those that are there may be the easy ones."""
        whole = run.finished and (run.judged.get("parts") or {}).get("win_rate", "done") == "done"
        return read_interval(run.judged, win_rate_key(run.judged)) if whole else None

    def count(self, run: RunRecord) -> int:
        return int(number(run.judged.get("win_rate_prompts")) or 0)

    def compare(self, first: RunRecord, second: RunRecord) -> Difference | None:
        """None where another judge or another opponent stood behind them: these do not compare."""
        alike = first.judged_by == second.judged_by and win_rate_key(first.judged) == win_rate_key(second.judged)
        return super().compare(first, second) if alike else None

    def pair(self, first: RunRecord, second: RunRecord) -> Difference | None:
        """None where people put the rates right, which they did as a whole."""
        judged_alone = all(win_rate_key(run.judged) == self.key for run in (first, second))
        return paired_bootstrap(first.points_by_prompt, second.points_by_prompt) if judged_alone else None


class Accuracy(Quality):
    """Share of held-out pairs ranked as labelled: by `evaluate`, where it took as many as the probe, else the probe."""

    key = "probe/accuracy"
    name, axis = MEASURE[key].label, MEASURE[key].title.lower()
    unit, test, provisional = "pairs", "exact McNemar", True

    def pair(self, first: RunRecord, second: RunRecord) -> Difference | None:
        return mcnemar(first.pairs, second.pairs)


class AUC(Quality):
    """Share of (desirable, undesirable) held-out answers in the right order, for rows that are no pairs."""

    key = "probe/auc"
    name, axis = MEASURE[key].label, MEASURE[key].title
    unit, test, provisional = "answers", "the intervals of the AUC", True


QUALITIES = (GoldReward(), WinRate(), Accuracy(), AUC())


def quality_of(runs: Sequence[RunRecord]) -> Quality:
    """The first of `QUALITIES` that some finished run has; accuracy where none has any."""
    return next((quality for quality in QUALITIES if any(map(quality.read, runs))), QUALITIES[2])


def read_interval(values: Mapping[str, Any], key: str) -> Interval | None:
    value, low, high = (number(values.get(f"{key}{end}")) for end in ("", "_low", "_high"))
    return None if value is None or low is None or high is None else (value, low, high)
