"""Tests between runs agree with SciPy, with textbook numbers and with simulation."""

import math
import random

import numpy as np
import pytest
from scipy import stats

from dpo_kit.run.statistics import (
    from_intervals,
    holm,
    mcnemar,
    needed_against_half,
    needed_mean,
    needed_pairs,
    paired_bootstrap,
    sign_test,
)


def by_prompt(values: list[float]) -> dict[str, float]:
    return {f"p{number}": float(value) for number, value in enumerate(values)}


@pytest.mark.parametrize("seed", range(3))
def test_the_paired_bootstrap_agrees_with_scipy(seed: int) -> None:
    draw = np.random.default_rng(seed)
    shared = draw.normal(size=120)
    first, second = shared + draw.exponential(1, 120), shared + draw.normal(0.7, 0.5, 120)
    ours = paired_bootstrap(by_prompt(first), by_prompt(second))
    theirs = stats.bootstrap((first - second,), np.mean, method="percentile", n_resamples=20_000, rng=draw)
    assert ours is not None and ours.count == 120
    assert ours.value == pytest.approx(float((first - second).mean()))
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert ours.low == pytest.approx(theirs.confidence_interval.low, abs=0.04 * width)
    assert ours.high == pytest.approx(theirs.confidence_interval.high, abs=0.04 * width)
    assert ours.p == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=0.35, abs=0.004)


def test_pairing_sees_what_the_spread_over_prompts_hides() -> None:
    draw = random.Random(1)
    hard = [draw.gauss(0, 5) for _ in range(80)]
    better = [value + 0.1 + 0.05 * (number % 2) for number, value in enumerate(hard)]
    test = paired_bootstrap(by_prompt(better), by_prompt(hard))
    assert test is not None and test.low > 0 and test.p == pytest.approx(1 / 10_001)  # no draw that far off
    assert stats.ttest_ind(better, hard).pvalue > 0.5


def test_the_bootstrap_rarely_finds_what_is_not_there() -> None:
    draw = np.random.default_rng(5)
    nothing = by_prompt([0.0] * 50)
    for gaps in (lambda: draw.normal(size=50), lambda: draw.choice([-1, 1], 50) * (draw.random(50) < 0.2)):
        tests = [paired_bootstrap(by_prompt(gaps()), nothing) for _ in range(200)]
        found = sum(test is not None and test.p < 0.05 for test in tests)
        assert 2 <= found <= 20  # 10 expected, where most answers are the same in both runs too


def test_few_differing_answers_are_not_called_certain() -> None:
    gaps = [1.0] * 8 + [0.5, 0.2] + [0.0] * 54
    test = paired_bootstrap(by_prompt(gaps), by_prompt([0.0] * 64))
    assert test is not None and test.low > 0
    assert test.p == pytest.approx(stats.ttest_1samp(gaps, 0).pvalue, rel=0.6) and test.p > 1e-3


def test_only_common_prompts_are_compared() -> None:
    test = paired_bootstrap({"a": 1, "b": 2, "c": 9}, {"a": 0, "b": 1, "d": 0})
    assert test is not None and (test.value, test.count, test.low, test.high) == (1.0, 2, 1.0, 1.0)
    assert paired_bootstrap({"a": 1}, {"a": 0}) is None
    assert paired_bootstrap({}, {}) is None


@pytest.mark.parametrize(("won", "lost"), [(0, 0), (1, 0), (9, 1), (30, 12), (7, 7), (400, 330)])
def test_mcnemar_s_p_is_the_exact_binomial_one(won: int, lost: int) -> None:
    expected = stats.binomtest(won, won + lost, 0.5).pvalue if won + lost else 1.0
    assert sign_test(won, lost) == pytest.approx(expected, rel=1e-9)


def pairs(margins: list[float], each: int = 1) -> dict[str, tuple[str, float]]:
    """Pairs of which `each` share a prompt."""
    return {f"pair{number}": (f"p{number // each}", margin) for number, margin in enumerate(margins)}


@pytest.mark.parametrize("seed", range(3))
def test_mcnemar_counts_the_discordant_pairs(seed: int) -> None:
    draw = random.Random(seed)
    first, second = ([draw.gauss(mean, 1) for _ in range(300)] for mean in (0.6, 0.3))
    won = sum(a > 0 >= b for a, b in zip(first, second, strict=True))
    lost = sum(b > 0 >= a for a, b in zip(first, second, strict=True))
    test = mcnemar(pairs(first), pairs(second))
    assert test is not None and test.value == pytest.approx((won - lost) / 300)
    assert test.p == pytest.approx(stats.binomtest(won, won + lost, 0.5).pvalue)
    # The interval: Wald's for paired shares, (b + c − (b − c)²/n) / n² (Agresti, Categorical Data Analysis, 10.1.1)
    se = math.sqrt(won + lost - (won - lost) ** 2 / 300) / 300
    assert (test.high - test.low) / 2 == pytest.approx(1.959964 * se, rel=1e-5)


def test_pairs_of_one_prompt_are_one_witness() -> None:
    first, second = [1.0] * 12, [-1.0] * 12
    alone, together = mcnemar(pairs(first), pairs(second)), mcnemar(pairs(first, each=6), pairs(second, each=6))
    assert alone is not None and alone.p == pytest.approx(2 / 2**12)
    assert together is not None and together.p == pytest.approx(0.5)  # two prompts, both won
    assert together.value == alone.value == 1.0


def test_a_margin_of_zero_is_half_right() -> None:
    test = mcnemar(pairs([0.0, 1.0]), pairs([-1.0, 1.0]))
    assert test is not None and test.value == 0.25


def test_a_majority_of_prompts_against_the_mean_separates_nothing() -> None:
    first = {**pairs([1.0] * 30, each=30), **{f"x{n}": (f"x{n}", -1.0) for n in range(12)}}
    second = {**pairs([-1.0] * 30, each=30), **{f"x{n}": (f"x{n}", 1.0) for n in range(12)}}
    test = mcnemar(first, second)
    assert test is not None and test.value > 0 and test.p == 1.0


def test_intervals_alone_give_the_normal_test_of_independent_values() -> None:
    test = from_intervals((1.0, 0.804, 1.196), (0.7, 0.308, 1.092))  # standard errors .1 and .2
    se = math.hypot(0.1, 0.2)
    assert test.value == pytest.approx(0.3)
    assert test.p == pytest.approx(2 * stats.norm.sf(0.3 / se), rel=1e-4)
    assert (test.low, test.high) == pytest.approx((0.3 - 1.96 * se, 0.3 + 1.96 * se), rel=1e-4)
    assert from_intervals((1, 1, 1), (1, 1, 1)).p == 1.0 and from_intervals((1, 1, 1), (0, 0, 0)).p == 0.0


def test_holm_s_steps_by_hand() -> None:
    # .005·4, .01·3, .03·2, then .04·1 raised to the step before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.6, 0.9]) == [1.0, 1.0]


@pytest.mark.parametrize(("share", "pairs_needed"), [(0.53, 2178), (0.55, 783), (0.60, 194), (0.65, 85)])
def test_pairs_needed_against_one_half_are_the_published_ones(share: float, pairs_needed: int) -> None:
    assert needed_against_half(share) == needed_against_half(1 - share) == pairs_needed
    assert needed_against_half(0.5) is None


def test_pairs_needed_for_mcnemar_are_the_published_ones() -> None:
    assert needed_pairs(0.03, 0.3) == pytest.approx(2600, rel=0.01)
    assert needed_pairs(-0.05, 0.3) == pytest.approx(940, rel=0.01)
    assert needed_pairs(0.0, 0.3) is None


def test_pairs_needed_for_mcnemar_are_fewer_where_most_discordant_pairs_are_won() -> None:
    # ψ − δ² = .21: ((1.959964·√.25 + .841621·√.21) / .2)² = 46.63, and 49.06 without δ²
    assert needed_pairs(0.2, 0.25) == needed_pairs(-0.2, 0.25) == 47
    assert needed_pairs(0.5, 0.5) == 14  # ψ − δ² = .25: ((1.959964·√.5 + .841621·√.25) / .5)² = 13.06


def test_prompts_needed_find_the_effect_in_four_of_five_trials() -> None:
    gaps = [0.5 + (1 if number % 2 else -1) for number in range(1000)]  # mean .5, sd 1
    count = needed_mean(gaps)
    assert count == math.ceil((2.801585 / 0.5) ** 2 * (1000 / 999)) == 32
    draw = np.random.default_rng(0)
    p = stats.ttest_1samp(draw.normal(0.5, 1, (4000, count)), 0, axis=1).pvalue
    assert float((p < 0.05).mean()) == pytest.approx(0.78, abs=0.03)  # t is a little weaker than the normal at 32
    assert (
        needed_mean([3 * gap for gap in gaps]) == needed_mean([-gap for gap in gaps]) == 32
    )  # scale and sign are free
    assert needed_mean([1.0, -1.0]) is None
