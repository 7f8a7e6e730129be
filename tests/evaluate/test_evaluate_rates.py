"""The arithmetic of evaluation: rates with intervals, length control, calibration; against scipy and by hand."""

import random

import numpy as np
import pytest
import torch
from scipy import stats

from dpo_kit.callbacks import metrics
from dpo_kit.callbacks.scores import Scores
from dpo_kit.evaluate.preferences import compare_preferences, describe_calibration, describe_preferences
from dpo_kit.evaluate.sequential import ConfidenceSequence
from dpo_kit.evaluate.win_rate import LOOK, Compared, ask, read_verdict, win_rates
from dpo_kit.judge.answers import Answer
from dpo_kit.judge.verdicts import Judge, Verdict
from dpo_kit.run.statistics import needed_against_half

RAW = {
    "win": ("first", "second"),
    "loss": ("second", "first"),
    "tie": ("tie", "tie"),
    "order-dependent": ("first", "first"),
    "unjudged": ("unjudged", "unjudged"),
}


def compared(outcome, prompt="p", draw=0, gap=0):
    texts = ("a" * (50 + max(0, gap)), "b" * (50 + max(0, -gap)))
    answers = [Answer(text, False, "m") for text in texts]
    return Compared(prompt, prompt, draw, *answers, Verdict(*RAW[outcome]))


def rows(outcomes):
    return [compared(outcome, f"p{index}") for index, outcome in enumerate(outcomes)]


def test_a_win_is_one_a_loss_nothing_and_what_depends_on_the_order_half():
    found = win_rates(rows(["win"] * 5 + ["loss"] * 2 + ["tie"] * 2 + ["order-dependent"] * 3 + ["unjudged"]))
    assert found["win_rate"] == pytest.approx((5 + 5 / 2) / 12) and found["prompts"] == 12
    assert found["win_rate_without_ties"] == pytest.approx(5 / 7) and found["decided"] == 7
    assert found["order_inconsistency"] == pytest.approx(3 / 12)
    assert found["first_position_rate"] == pytest.approx((7 + 6) / 20)  # of the 20 that name an answer
    assert (found["ties"], found["order_inconsistent"], found["outcomes"]["unjudged"]) == (2, 3, 1)


def test_a_prompt_of_many_draws_counts_once():
    many = [compared("win", "a", draw) for draw in range(8)] + [compared("loss", "b")]
    found = win_rates(many)
    assert found["win_rate"] == 0.5 and found["prompts"] == 2
    assert (found["win_rate_low"], found["win_rate_high"]) == (0, 1)  # two prompts say next to nothing


def test_without_a_verdict_there_is_no_rate():
    found = win_rates(rows(["unjudged"] * 3))
    assert found["win_rate"] is found["win_rate_low"] is found["win_rate_verdict"] is None
    assert found["win_rate_length_controlled_without_difficulty"] is None and found["prompts"] == 0


def test_better_is_said_only_of_an_interval_above_half():
    assert read_verdict((0.6, 0.51, 0.7), 50) == "better" and read_verdict((0.4, 0.3, 0.49), 50) == "worse"
    assert read_verdict((0.6, 0.5, 0.7), 50) == read_verdict((0.4, 0.3, 0.5), 50) == "not separated"
    few, enough = win_rates(rows(["win"] * 19)), win_rates(rows(["win"] * 20))
    assert few["win_rate_verdict"] == "not separated" and enough["win_rate_verdict"] == "better"
    assert few["win_rate_needed_prompts"] == 20
    found = win_rates(rows(["win"] * 6 + ["loss"] * 4))
    assert found["win_rate_verdict"] == "not separated"
    assert found["win_rate_needed_prompts"] == needed_against_half(0.6) == 194


class Says(Judge):
    """A judge that finds a share `rate` of first answers better, the same in both orders."""

    def __init__(self, rate, seed=0):
        self.rate, self.drawn, self.asked = rate, random.Random(seed), []

    def decide(self, shown):
        self.asked += shown
        wins = [self.drawn.random() < self.rate for _ in shown[::2]]
        return [raw for won in wins for raw in (("first", "second") if won else ("second", "first"))]


def unjudged(count, draws=1):
    return [compared("unjudged", f"p{index}", draw) for index in range(count) for draw in range(draws)]


def test_verdicts_end_once_the_rate_is_settled_and_the_interval_is_that_of_the_looks():
    judge, rows, sequence = Says(0.9), unjudged(200, draws=2), ConfidenceSequence()
    names = ask(judge, rows, sequence, seed=3, within=0.05)
    asked = [row for row in rows if row.prompt_id in names]
    assert len(names) == LOOK and len(judge.asked) == 2 * 2 * LOOK  # two draws, two orders
    assert all(row.verdict.points is not None for row in asked)
    assert all(row.verdict.points is None for row in rows if row.prompt_id not in names)
    assert names != {f"p{index}" for index in range(LOOK)}  # by lot: a file may be in order of difficulty
    found = win_rates(asked, sequence=sequence, within=0.05)
    assert (found["settled"], found["win_rate_verdict"], found["prompts"]) == ("better", "better", LOOK)
    assert (found["win_rate_low"], found["win_rate_high"]) == (sequence.low, sequence.high)
    assert ask(Says(0.9), unjudged(200), ConfidenceSequence(), seed=4, within=0.05) != names


def test_what_is_not_settled_is_judged_to_the_end_with_an_interval_for_all_looks():
    rows, sequence = unjudged(100), ConfidenceSequence()
    assert len(ask(Says(0.5), rows, sequence, seed=0, within=0.05)) == 100
    found, once = win_rates(rows, sequence=sequence, within=0.05), win_rates(rows)
    assert found["settled"] is None and found["win_rate"] == once["win_rate"]
    assert found["win_rate_low"] <= once["win_rate_low"] and found["win_rate_high"] >= once["win_rate_high"]
    judge = Says(0.9)
    assert len(ask(judge, unjudged(100), None, seed=0, within=0.05)) == 100 and len(judge.asked) == 200


def test_a_rate_that_is_surely_near_half_is_settled_too():
    rows = [compared("tie", f"p{index}") for index in range(300)]
    sequence = ConfidenceSequence()
    sequence.add([0.5] * 300)
    found = win_rates(rows, sequence=sequence, within=0.05)
    assert (found["settled"], found["win_rate_verdict"]) == ("within", "within ±0.05")


def test_equal_models_are_seldom_told_apart_however_often_one_looks():
    wrong = 0
    for seed in range(60):
        rows, sequence = unjudged(96), ConfidenceSequence()
        asked = ask(Says(0.5, seed), rows, sequence, seed=0, within=0.05)
        found = win_rates([row for row in rows if row.prompt_id in asked], 200, sequence=sequence, within=0.05)
        wrong += found["win_rate_verdict"] in ("better", "worse")
    assert wrong <= 7  # 3 of 60 are expected at most; 8 have a chance of one in a hundred


def test_people_s_votes_put_the_rate_right_and_the_verdict_reads_it():
    judged = rows(["win"] * 160 + ["loss"] * 40)
    for index, row in enumerate(judged[::2]):
        row.vote = row.verdict.points if index % 2 else 0.5  # every second verdict hides a tie
    found = win_rates(judged)
    assert found["win_rate"] == 0.8 and found["reviewed"] == 100
    assert found["win_rate_corrected"] == pytest.approx(0.65, abs=0.01)
    assert 0.55 < found["win_rate_corrected_low"] < 0.65 < found["win_rate_corrected_high"] < 0.75
    assert found["win_rate_verdict"] == "better"
    for row in judged[::2]:
        row.vote = 0.5
    assert win_rates(judged)["win_rate_corrected"] == 0.5 and win_rates(judged)["win_rate_verdict"] == "not separated"
    for row in judged[::2][19:]:
        row.vote = None
    assert win_rates(judged)["win_rate_corrected"] is None and win_rates(judged)["win_rate_verdict"] == "better"


def test_the_bootstrap_interval_agrees_with_scipy():
    drawn = random.Random(5)
    outcomes = drawn.choices(["win", "loss", "tie"], weights=[5, 3, 2], k=200)
    found = win_rates(rows(outcomes), draws=10_000)
    points = [{"win": 1.0, "loss": 0.0, "tie": 0.5}[each] for each in outcomes]
    there = stats.bootstrap((points,), np.mean, method="percentile", n_resamples=10_000, rng=1).confidence_interval
    assert found["win_rate_low"] == pytest.approx(there.low, abs=0.006)
    assert found["win_rate_high"] == pytest.approx(there.high, abs=0.006)


def test_wilson_s_interval_of_a_group_agrees_with_scipy():
    right, count = 61, 80
    low, high = metrics.accuracy_interval(
        torch.tensor([1.0] * right + [-1.0] * (count - right)), list(map(str, range(count)))
    )
    there = stats.binomtest(right, count).proportion_ci(method="wilson")
    assert (low, high) == pytest.approx((there.low, there.high), abs=1e-9)


def test_the_paired_difference_of_two_policies_is_mcnemar_s():
    ours = {f"pair{n}": (f"p{n}", 1.0 if n < 70 else -1.0) for n in range(100)}
    theirs = {f"pair{n}": (f"p{n}", 1.0 if n < 50 or n >= 94 else -1.0) for n in range(100)}  # 20 won, 6 lost
    found = compare_preferences(ours, theirs)
    assert found["accuracy"]["difference"] == pytest.approx(0.14)
    assert found["accuracy"]["p"] == pytest.approx(stats.binomtest(6, 26).pvalue)
    assert found["margin_nats"]["difference"] == pytest.approx(0.28) and found["margin_nats"]["low"] > 0
    assert compare_preferences(ours, {}) == {}


# --- length control ----------------------------------------------------------------------------------------------


def verdicts_with_a_bias(theta, phi, count, seed):
    """Verdicts of a judge who likes length: P(win) = σ(θ + φ·tanh(gap / sd)), the policy being the longer one."""
    draws = random.Random(seed)
    gaps = [round(draws.gauss(25, 40)) for _ in range(count)]
    sd = float(np.std(gaps))
    chances = [1 / (1 + np.exp(-(theta + phi * np.tanh(gap / sd)))) for gap in gaps]
    return [
        compared("win" if draws.random() < chance else "loss", f"p{n}", gap=gap)
        for n, (gap, chance) in enumerate(zip(gaps, chances, strict=True))
    ]


@pytest.mark.parametrize("theta", [-0.4, 0.0, 0.5])
def test_the_length_controlled_rate_recovers_what_was_planted(theta):
    name = "win_rate_length_controlled_without_difficulty"
    planted, covered, plain = 1 / (1 + np.exp(-theta)), 0, 0
    for seed in range(10):
        found = win_rates(verdicts_with_a_bias(theta, 1.5, 600, seed), draws=500)
        covered += found[f"{name}_low"] <= planted <= found[f"{name}_high"]
        plain += found["win_rate_low"] <= planted <= found["win_rate_high"]
    assert covered >= 8 and plain <= 2  # the plain rate is what length made of it


def test_the_fit_of_length_is_the_maximum_of_its_likelihood():
    found = verdicts_with_a_bias(0.3, -1.0, 400, 3)
    points = torch.tensor([each.verdict.points for each in found])
    gaps = torch.tensor([float(len(each.policy.text) - len(each.opponent.text)) for each in found])
    inputs = np.tanh(gaps.numpy() / gaps.numpy().std())

    def loss(weights):
        logits = weights[0] + weights[1] * inputs
        wins = points.numpy()
        return np.sum(np.logaddexp(0, logits) - wins * logits) + 0.005 * np.sum(np.square(weights))

    from scipy.optimize import minimize

    best = minimize(loss, [0.0, 0.0]).x
    assert metrics.length_controlled(points, gaps) == pytest.approx(1 / (1 + np.exp(-best[0])), abs=1e-5)


def test_answers_of_one_length_leave_nothing_to_control():
    assert win_rates(rows(["win", "loss"] * 5))["win_rate_length_controlled_without_difficulty"] is None


# --- held-out preferences ----------------------------------------------------------------------------------------


def test_calibration_by_hand():
    logit = float(np.log(0.9 / 0.1))
    found = describe_calibration(torch.tensor([logit] * 8 + [-logit] * 2 + [0.1, -0.1]), list(map(str, range(12))))
    low, high = found["reliability"]
    assert (low["pairs"], high["pairs"]) == (2, 10) and (low["accuracy"], high["accuracy"]) == (0.5, 0.8)
    assert high["confidence"] == pytest.approx(0.9) and high["from"] <= 0.9 <= high["to"]
    gap = 1 / (1 + np.exp(-0.1)) - 0.5
    assert found["ece"] == pytest.approx((10 * 0.1 + 2 * gap) / 12)


def scored(margins, tokens=None, prompts=None):
    count = len(margins)
    chosen, rejected = tokens or ([10] * count, [10] * count)
    names = prompts or [f"p{n}" for n in range(count)]
    return Scores(0, True, torch.tensor(margins, dtype=torch.float64), torch.zeros(count, dtype=torch.float64),
                  torch.tensor(chosen), torch.tensor(rejected), names, names)  # fmt: skip


def test_accuracy_is_told_apart_by_length_and_by_score_gap():
    margins = [1.0, 1.0, -1.0, 1.0, -1.0, -1.0, 1.0, 1.0]
    tokens = ([12, 12, 12, 8, 8, 8, 10, 10], [10] * 8)
    ratings = [(1.1, 1.0), (1.1, 1.0), (1.1, 1.0), (5.0, 1.0), (1.2, 1.0), (1.2, 1.0), (6.0, 1.0), (7.0, 1.0)]
    given = [{"score_chosen": a, "score_rejected": b} for a, b in ratings]
    found = describe_preferences(scored(margins, tokens), given, None, None)
    assert {name: (group["pairs"], group["accuracy"]) for name, group in found["by_length"].items()} == {
        "chosen longer": (3, pytest.approx(2 / 3)),
        "chosen shorter": (3, pytest.approx(1 / 3)),
        "equally long": (2, 1.0),
    }
    assert sum(group["pairs"] for group in found["by_score_gap"]) == 8
    assert found["by_score_gap"][0]["accuracy"] < 0.7 and found["by_score_gap"][-1]["accuracy"] == 1
    assert found["calibration"] is None and found["accuracy"] == pytest.approx(5 / 8)
    assert describe_preferences(scored(margins), [{}] * 8, 0.1, "dpo")["by_score_gap"] == []


def test_pairs_of_one_prompt_widen_the_interval():
    margins = [1.0] * 30 + [-1.0] * 10
    alone = describe_preferences(scored(margins), [{}] * 40, None, None)
    together = describe_preferences(scored(margins, prompts=[f"p{n // 10}" for n in range(40)]), [{}] * 40, None, None)
    assert together["accuracy_low"] < alone["accuracy_low"] - 0.1 and together["prompts"] == 4
