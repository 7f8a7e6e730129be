"""A judge's win rate, put right by what people said of a part of its comparisons."""

from collections.abc import Sequence
from statistics import covariance, fmean, variance
from typing import NamedTuple

from dpo_kit.run.intervals import wilson
from dpo_kit.run.statistics import means_by_name

LEAST = 20  # prompts that people have looked at; from fewer the judge's errors cannot be told


class Corrected(NamedTuple):
    """A win rate (share, 95 % interval), the prompts that people judged, and the weight that the judge had in it."""

    value: float
    low: float
    high: float
    prompts: int
    weight: float


def correct(points: Sequence[float], votes: Sequence[float | None], prompts: Sequence[str]) -> Corrected | None:
    """The win rate that people would give to all comparisons, from the judge's `points` on all of them and people's
    `votes` (both 0 to 1) on some that were drawn by lot, else None; `prompts` are the names of their prompts, each of
    which counts once. None below 20 prompts with votes.

    mean(votes) + w · (mean(points of all) − mean(points where there are votes)), with the weight w of least variance,
    cov(votes, points) / var(points): the regression estimator of two-phase sampling (Cochran 1977, section 12.6), which
    is prediction-powered inference with its best weight (arXiv:2311.01453, 2601.05420). Nothing is assumed of the
    judge's errors; a judge that knows nothing gets no weight. The interval is Wilson's at the number of trials that
    has the estimate's variance, with Student's quantile.
    """
    from scipy.stats import t

    judge = means_by_name(zip(prompts, points, strict=True))
    voted = [
        (prompt, vote, point) for prompt, vote, point in zip(prompts, votes, points, strict=True) if vote is not None
    ]
    people = means_by_name((prompt, vote) for prompt, vote, _ in voted)
    seen = means_by_name((prompt, point) for prompt, _, point in voted)  # the judge on what people saw
    count = len(people)
    if count < LEAST:
        return None
    given, said = list(people.values()), list(seen.values())
    cov, judge_var = covariance(given, said), variance(said)
    weight = cov / judge_var if judge_var else 0.0
    value = min(1.0, max(0.0, fmean(given) + weight * (fmean(judge.values()) - fmean(said))))
    explained = weight * cov
    spread = (variance(given) - explained) * (count - 1) / (count - 2) / count + explained / len(judge)
    trials = value * (1 - value) / spread if spread and 0 < value < 1 else count
    return Corrected(value, *wilson(value, trials, float(t.ppf(0.975, count - 2))), count, weight)


def could_be(rate: float, accuracy: float) -> tuple[float, float, float]:
    """What a win rate may be in truth, given by a judge that is right in a share `accuracy` (over ½) of its verdicts:
    where it errs alike on both sides, at least, and at most (where all its errors favour one side).
    """
    errors = 1 - accuracy
    alike = 0.5 + (rate - 0.5) / (1 - 2 * errors)
    return min(1.0, max(0.0, alike)), max(0.0, rate - errors), min(1.0, rate + errors)
