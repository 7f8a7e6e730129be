"""The regression gate's verdicts, on samples whose differences a hand can work out."""

import math
import random

import pytest

from dpo_kit.errors import DataError
from dpo_kit.evaluate.benchmarks.gate import TaskComparison, compare_task, decide_gate


def scores(right: int, count: int, offset: int = 0) -> dict[str, float]:
    """`count` samples, of which `right` from `offset` on are right."""
    return {f"t/{index}": float(offset <= index < offset + right) for index in range(count)}


def test_a_large_loss_beyond_chance_fails():
    """1000 samples, 700 right before and 600 of these after: difference −.1, standard error √(.1·.9/1000) = .0095."""
    found = compare_task("t", "acc", scores(600, 1000), scores(700, 1000), 0.03)
    assert (found.policy, found.reference, found.n) == (0.6, 0.7, 1000)
    assert math.isclose(found.difference, -0.1, abs_tol=1e-12)
    assert math.isclose(found.low, -0.1 - 1.96 * 0.0095, abs_tol=0.002)
    assert math.isclose(found.high, -0.1 + 1.96 * 0.0095, abs_tol=0.002)
    assert found.verdict == "failed" and found.needed is None


def test_a_small_loss_beyond_chance_stays_within_the_limit():
    """−.01 with a standard error of √(.01·.99/1000) = .0031: certainly a loss, certainly less than .03."""
    found = compare_task("t", "acc", scores(690, 1000), scores(700, 1000), 0.03)
    assert found.high < 0 and found.low > -0.03 and found.verdict == "passed"


def test_what_no_sample_showed_may_still_be_there():
    """Nothing changed on n samples: 1 − .025^(1/n) ≈ 3.69/n may: within .03 from 123 samples on, never within 0."""
    few, enough = (compare_task("t", "acc", scores(3, n), scores(3, n), 0.03) for n in (122, 123))
    assert (few.verdict, few.needed, enough.verdict) == ("inconclusive", 123, "passed")
    assert 1 - 0.025 ** (1 / 123) < 0.03 < 3.69 / 122
    none = compare_task("t", "acc", scores(3, 6), scores(3, 6), 0.0)
    assert (none.verdict, none.needed) == ("inconclusive", None)


def test_a_handful_of_samples_fails_nobody():
    """Five samples that all got worse have a sign test's p of .0625, six .031."""
    five, six = (compare_task("t", "acc", scores(0, n), scores(n, n), 0.03) for n in (5, 6))
    assert (five.verdict, five.needed, five.high) == ("inconclusive", 6, -1.0)
    assert six.verdict == "failed"


def test_too_few_samples_are_inconclusive_and_say_how_many_would_do():
    """8 samples, one of which was lost: −.125, sd .354: ((1.960 + .842)·.354/.125)² = 62.8 show that it is none."""
    found = compare_task("t", "acc", scores(4, 8), scores(5, 8), 0.03)
    assert (found.verdict, found.needed) == ("inconclusive", 63)


def test_a_loss_within_the_limit_needs_what_tells_it_from_the_limit():
    """100 samples, 2 lost: −.02, sd .1407; .01 from the limit: ((1.960 + .842)·.1407/.01)² = 1554."""
    found = compare_task("t", "acc", scores(48, 100), scores(50, 100), 0.03)
    assert found.verdict == "inconclusive" and abs(found.needed - 1554) <= 1


def test_pairing_counts_and_not_only_the_means():
    """The same two means: samples of one kind only fell, or half the samples changed sides: another interval."""
    same = compare_task("t", "acc", scores(480, 1000), scores(500, 1000), 0.03)
    swapped = compare_task("t", "acc", scores(480, 1000, 500), scores(500, 1000), 0.03)
    assert same.difference == pytest.approx(swapped.difference) == -0.02
    assert same.high - same.low < 0.3 * (swapped.high - swapped.low)


def test_other_samples_are_refused():
    for other in (scores(1, 3), {"t/0": 1.0, "x": 0.0}):
        with pytest.raises(DataError, match="t: a paired comparison needs the same samples"):
            compare_task("t", "acc", scores(1, 2), other, 0.03)


def one(task, difference, verdict, needed=None):
    return TaskComparison(task, "acc", 0.5, 0.5 - difference, 100, difference, difference - 0.1, difference + 0.1,
                          verdict, needed)  # fmt: skip


def test_only_a_task_that_failed_closes_the_gate():
    tasks = [one("a", -0.2, "inconclusive", 50), one("b", 0.1, "passed"), one("c", -0.1, "failed")]
    gate = decide_gate(tasks, 0.03)
    assert (gate["passed"], gate["verdict"], gate["worst_task"]) == (False, "failed", "c")
    assert (gate["difference"], gate["limit"], gate["inconclusive"]) == (-0.1, 0.03, ["a"])
    assert "c: a loss beyond chance, and above the limit of 0.03" in gate["reason"]
    gate = decide_gate(tasks[:2], 0.03)
    assert (gate["passed"], gate["verdict"], gate["worst_task"]) == (True, "inconclusive", "a")
    assert "about 50 samples would settle it" in gate["reason"]
    gate = decide_gate([one("b", 0.1, "passed"), one("d", 0.05, "passed")], 0.03)
    assert (gate["passed"], gate["worst_task"], gate["inconclusive"]) == (True, "d", [])


def test_without_any_loss_the_gate_is_closed_seldom():
    """150 tasks of 200 samples on which nothing changed but chance: at most 2.5 % fail, so here no more than 9."""
    rng = random.Random(11)
    failed = 0
    for _ in range(150):
        both = [{str(index): float(rng.random() < 0.6) for index in range(200)} for _ in range(2)]
        failed += compare_task("t", "acc", *both, 0.03).verdict == "failed"
    assert failed <= 9
