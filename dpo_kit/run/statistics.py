"""How far two sets of numbers differ beyond chance: paired and exact tests, Holm's correction, numbers needed."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

from dpo_kit.run.intervals import Z95

Z_POWER = NormalDist().inv_cdf(0.8)  # 80 % of true effects of that size are found
DRAWS = 10_000  # p-values down to 2e-4, so that Holm over a large sweep can still reject
MANY = 10**7  # a number of pairs or prompts beyond this says nothing to anyone


@dataclass(frozen=True)
class Difference:
    """A difference with its 95 % interval and two-sided p-value, in the unit of the values; `count` prompts or pairs.
    `basis` says in words what it rests on; `needed` how many prompts or pairs would settle a true difference of this
    size (80 % power, two-sided .05), None where it is 0.
    """

    value: float
    low: float
    high: float
    p: float
    count: int
    basis: str
    needed: int | None


def means_by_name(values: Iterable[tuple[str, float]]) -> dict[str, float]:
    """The mean of the values of each name, in the order in which the names come first."""
    by_name: dict[str, list[float]] = {}
    for name, value in values:
        by_name.setdefault(name, []).append(value)
    return {name: fmean(of_name) for name, of_name in by_name.items()}


def paired_bootstrap(first: Mapping[str, float], second: Mapping[str, float]) -> Difference | None:
    """Mean of first − second over the prompts that both have, prompts resampled (10,000 percentile draws).

    p is the share of draws as far from the mean as the mean is from 0, the observed one counted in (the null imposed
    by centring: Davison and Hinkley 1997, section 4.4), so never 0: shares of draws beyond 0 would call ten prompts
    that differ out of 64 certain. None below two common prompts.
    """
    import numpy as np

    common = sorted(first.keys() & second.keys())
    if len(common) < 2:
        return None
    gaps = np.array([first[name] - second[name] for name in common], dtype=float)
    generator, count, mean = np.random.default_rng(0), len(gaps), float(gaps.mean())
    size = max(1, 2_000_000 // count)  # draws held at once: 16 MB of indices
    blocks = [min(size, DRAWS - start) for start in range(0, DRAWS, size)]
    means = np.concatenate([gaps[generator.integers(count, size=(draws, count))].mean(1) for draws in blocks])
    low, high = map(float, np.quantile(means, [0.025, 0.975]))
    p = (int((np.abs(means - mean) >= abs(mean) - 1e-12).sum()) + 1) / (DRAWS + 1)
    return Difference(mean, low, high, p, count, "paired bootstrap by prompt", needed_mean(gaps.tolist()))


def needed_mean(gaps: Sequence[float]) -> int | None:
    """Prompts for a mean as large as seen to be found: ((z.975 + z.8)·sd / mean)², paired; None where the mean is 0."""
    mean = fmean(gaps)
    return _count(((Z95 + Z_POWER) * stdev(gaps) / mean) ** 2) if mean else None


def mcnemar(first: Mapping[str, tuple[str, float]], second: Mapping[str, tuple[str, float]]) -> Difference | None:
    """Difference of two accuracies on the same pairs, {pair_id: (prompt_id, margin)}: McNemar's exact test.

    Prompts of several pairs count once, by the sign of their sum, since pairs of one prompt are not independent (with
    one pair to a prompt that is McNemar's test itself). The interval is the normal one of the paired difference by
    prompt. None below two common pairs.
    """
    common = sorted(first.keys() & second.keys())
    if len(common) < 2:
        return None
    sums: dict[str, float] = {}
    for pair in common:
        prompt = first[pair][0]
        sums[prompt] = sums.get(prompt, 0.0) + right(first[pair][1]) - right(second[pair][1])
    won, lost = (sum(sign * gap > 0 for gap in sums.values()) for sign in (1, -1))
    value = sum(sums.values()) / len(common)
    spread = math.sqrt(sum((gap - value * len(common) / len(sums)) ** 2 for gap in sums.values())) / len(common)
    agree = (won - lost) * value > 0 or won == lost  # a majority of prompts against the mean separates nothing
    low, high, p = value - Z95 * spread, value + Z95 * spread, sign_test(won, lost) if agree else 1.0
    needed = needed_pairs(value, (won + lost) / len(sums))
    return Difference(value, low, high, p, len(common), "exact McNemar by prompt", needed)


def right(margin: float) -> float:
    """1 where the pair is ranked as labelled, ½ on a tie, else 0 (as metrics.correct)."""
    return 0.5 * ((margin > 0) + (margin >= 0))


def sign_test(won: int, lost: int) -> float:
    """Two-sided exact p of McNemar's test: 2·P(X ≤ min) for X ~ Binomial(won + lost, ½), at most 1."""
    from scipy.stats import binomtest

    return float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def clopper_pearson(successes: int, count: int) -> tuple[float, float]:
    """Clopper and Pearson's exact 95 % interval: it leaves ½ out just where the exact sign test rejects it at .05."""
    if not count:
        return 0.0, 1.0
    from scipy.stats import binomtest

    low, high = binomtest(successes, count).proportion_ci(0.95, "exact")
    return float(low), float(high)


def from_intervals(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Difference of two (value, low, high) by their 95 % intervals alone: the cautious side on the same prompts."""
    spread = math.hypot(*((high - low) / (2 * Z95) for _, low, high in (first, second)))
    value = first[0] - second[0]
    p = math.erfc(abs(value) / spread / math.sqrt(2)) if spread else float(value == 0)
    return Difference(value, value - Z95 * spread, value + Z95 * spread, p, 0, "their intervals alone", None)


def needed_against_half(share: float) -> int | None:
    """Pairs for a share as large as seen to be told from ½: ((z.975·½ + z.8·√(p(1−p))) / (p−½))²; None at ½ itself."""
    if share == 0.5:
        return None
    return _count(((Z95 / 2 + Z_POWER * math.sqrt(share * (1 - share))) / (share - 0.5)) ** 2)


def needed_pairs(difference: float, discordant: float) -> int | None:
    """Pairs for McNemar's test (Connor 1987): ((z.975·√ψ + z.8·√(ψ−δ²)) / δ)², δ difference, ψ discordant share."""
    if not difference:
        return None
    rest = math.sqrt(max(0.0, discordant - difference**2))
    return _count(((Z95 * math.sqrt(discordant) + Z_POWER * rest) / difference) ** 2)


def _count(exact: float) -> int | None:
    return math.ceil(exact) if exact < MANY else None


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values, in the order given: rejected at .05 where below it."""
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted
