"""The measures against hand-worked numbers, scipy, and the enumeration oracle."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dpo_kit.callbacks import metrics
from dpo_kit.callbacks.drift import kl_terms
from dpo_kit.model.predicted import Predicted
from dpo_kit.run import intervals, statistics
from tests import oracle, tiny

NAN_FREE = torch.tensor([0.5, -1.0, 2.0, 0.0])


def test_reward_and_margin_agree_with_hand_worked_numbers() -> None:
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, -1.5])
    assert metrics.implicit_reward(chosen, 0.1).tolist() == pytest.approx([0.2, -0.1])
    assert metrics.margin(chosen, rejected).tolist() == [5.0, 0.5]


def test_a_tie_counts_half_in_accuracy() -> None:
    assert metrics.accuracy(NAN_FREE) == pytest.approx((1 + 0 + 1 + 0.5) / 4)
    assert metrics.accuracy(torch.zeros(7)) == 0.5


def test_saturation_is_zero_at_the_start_and_hand_worked_after() -> None:
    assert metrics.saturation_dpo(torch.zeros(3), 0.1) == 0
    # sigma(-0.1 * 10) = 1 / (1 + e)
    assert metrics.saturation_dpo(torch.tensor([10.0]), 0.1) == pytest.approx(1 - 2 / (1 + math.e))
    # IPO's target gap 1 / (2 tau) = 5 is fully reached by 5 nats a token at tau .1
    assert metrics.saturation_ipo(torch.tensor([5.0, 5.0]), 0.1) == pytest.approx(1)


def test_displacement_counts_chosen_down_and_both_down() -> None:
    chosen, rejected = torch.tensor([-1.0, -1.0, 1.0, 1.0]), torch.tensor([-2.0, 2.0, -1.0, 1.0])
    assert metrics.displacement(chosen, rejected) == (0.5, 0.25)


def test_calibration_of_an_undecided_reward_is_log_two_and_a_quarter() -> None:
    assert metrics.log_loss_and_brier(torch.zeros(5)) == pytest.approx((math.log(2), 0.25))


def test_auc_and_class_gap_agree_with_mann_whitney() -> None:
    desirable, undesirable = torch.tensor([3.0, 1.0, 2.0, 2.0]), torch.tensor([2.0, 0.0, -1.0])
    u = stats.mannwhitneyu(desirable, undesirable).statistic
    assert metrics.auc(desirable, undesirable) == pytest.approx(u / 12)
    assert metrics.class_gap(desirable, undesirable) == pytest.approx(2 - 1 / 3)


def test_auc_interval_holds_the_value_and_leaves_out_draws_of_one_class() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 0.0, 2.5, 1.5])
    labels = torch.tensor([True, False, True, False, False, True])
    low, high = metrics.auc_interval(scores, labels, list("abcdef"))
    assert 0 <= low <= metrics.auc(scores[labels], scores[~labels]) <= high <= 1
    assert low < high


def test_class_gap_interval_is_that_of_the_means_of_resampled_prompts() -> None:
    draw = np.random.default_rng(0)
    good, bad = draw.normal(1, 1, 200), draw.normal(0, 1, 100)
    scores, labels = torch.tensor([*good, *bad]), torch.tensor([True] * 200 + [False] * 100)
    low, high = metrics.class_gap_interval(scores, labels, [str(n) for n in range(300)])
    value, spread = good.mean() - bad.mean(), math.sqrt(good.var() / 200 + bad.var() / 100)
    assert (low, high) == pytest.approx((value - 1.96 * spread, value + 1.96 * spread), abs=0.2 * spread)
    assert math.isnan(metrics.class_gap_interval(scores[:2], labels[:2], ["a", "b"])[0])  # of one class


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (5, 10), (97, 100), (300, 300)])
def test_wilson_agrees_with_scipy(hits: int, count: int) -> None:
    expected = stats.binomtest(hits, count).proportion_ci(method="wilson")
    assert intervals.wilson(hits / count, count) == pytest.approx((expected.low, expected.high))


def test_spearman_agrees_with_scipy_on_ties() -> None:
    first, second = torch.tensor([1.0, 2, 2, 5, 4, 0]), torch.tensor([3.0, 1, 4, 4, 9, 2])
    assert metrics.spearman(first, second) == pytest.approx(stats.spearmanr(first, second).statistic)
    assert math.isnan(metrics.spearman(torch.zeros(4), NAN_FREE))


def test_length_correction_takes_out_a_preference_that_is_length_alone() -> None:
    gaps = torch.tensor([-20.0, -10, 10, 20] * 50)
    only_length = gaps.sign()  # the longer always wins, and chosen is as often the shorter
    assert metrics.length_corrected_accuracy(only_length, gaps) == pytest.approx(0.5, abs=0.01)
    mostly_longer = torch.tensor([10.0, 20] * 90 + [-10.0] * 20)
    assert metrics.accuracy(mostly_longer.sign()) == 0.9
    assert metrics.length_corrected_accuracy(mostly_longer.sign(), mostly_longer) < 0.75


def test_length_correction_agrees_with_a_fit_by_scipy() -> None:
    from scipy.optimize import minimize

    rng = random.Random(0)
    gaps = torch.tensor([rng.gauss(0, 30) for _ in range(200)], dtype=torch.float64)
    margins = torch.tensor([1.0 if rng.random() < 0.6 + 0.003 * g else -1.0 for g in gaps], dtype=torch.float64)
    x = torch.tanh(gaps / gaps.std(correction=0)).numpy()
    won = (margins > 0).double().numpy()

    def loss(w):  # type: ignore[no-untyped-def]
        z = torch.tensor(w[0] + w[1] * x)
        return float(torch.nn.functional.softplus(z).sum() - (z.numpy() * won).sum() + 0.005 * (w**2).sum())

    expected = 1 / (1 + math.exp(-minimize(loss, [0.0, 0.0]).x[0]))
    assert metrics.length_corrected_accuracy(margins, gaps) == pytest.approx(expected, abs=1e-5)


def test_longer_wins_is_the_accuracy_of_length_alone() -> None:
    assert metrics.longer_wins(torch.tensor([3, 5, 2]), torch.tensor([1, 5, 4])) == pytest.approx(0.5)


def test_bootstrap_of_single_rows_agrees_with_the_textbook_standard_error() -> None:
    values = torch.linspace(-3, 3, 400, dtype=torch.float64)
    names = [str(index) for index in range(400)]
    assert metrics.bootstrap_se(values, names) == pytest.approx(float(values.std()) / 20, rel=0.05)
    low, high = metrics.bootstrap_interval(values, names)
    assert (low, high) == pytest.approx((-1.96 * float(values.std()) / 20, 1.96 * float(values.std()) / 20), rel=0.1)


def test_clustering_by_prompt_widens_intervals_when_prompts_repeat() -> None:
    rng = random.Random(1)
    margins = torch.tensor([rng.gauss(0.3, 1) for _ in range(50)]).repeat_interleave(4)
    alone = [str(index) for index in range(200)]
    clustered = [str(index // 4) for index in range(200)]
    for interval in (metrics.bootstrap_interval, metrics.accuracy_interval):
        (low, high), (wide_low, wide_high) = interval(margins, alone), interval(margins, clustered)
        assert 1.7 < (wide_high - wide_low) / (high - low) < 2.3  # rows of a prompt are all alike: sqrt(4)


def test_effective_count_is_the_number_of_rows_alone_and_of_prompts_when_rows_agree() -> None:
    values = torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0])
    assert metrics.effective_count(values, list("abcdefgh")) == 8
    assert metrics.effective_count(values, list("aabbccdd")) == pytest.approx(4)
    assert metrics.effective_count(torch.ones(8), list("aabbccdd")) == pytest.approx(4)
    opposed = torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
    assert metrics.effective_count(opposed, list("aabbccdd")) == 8  # never narrower than plain


def test_bootstrap_leaves_the_global_random_state_alone() -> None:
    before = torch.random.get_rng_state()
    metrics.bootstrap_interval(NAN_FREE, list("abcd"))
    metrics.auc_interval(NAN_FREE, torch.tensor([True, False, True, False]), list("abcd"))
    assert torch.equal(before, torch.random.get_rng_state())


def moments(p: Any, q: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Exact mean and variance of each estimator over all samples of p that there are."""
    prompt, sequences = [2, 3], oracle.all_sequences()
    values: dict[str, list[float]] = {"weight": [], "rb": [], "k1": []}
    rows = zip(*(oracle.logp_rows(model, prompt, sequences) for model in (p, q)), strict=True)
    for completion, (logp_rows, logq_rows) in zip(sequences, rows, strict=True):
        values["weight"].append(float(logp_rows[range(len(completion)), completion].sum().exp()))
        for name, each in kl_terms(
            Predicted(logp_rows, None), Predicted(logq_rows, None), torch.tensor(completion)
        ).items():
            values[name].append(float(each.sum()))
    weight = torch.tensor(values["weight"], dtype=torch.float64)
    terms = {name: torch.tensor(values[name], dtype=torch.float64) for name in ("rb", "k1")}
    means = {name: float(weight @ each) for name, each in terms.items()}
    return means, {name: float(weight @ (each - means[name]) ** 2) for name, each in terms.items()}


@pytest.mark.parametrize("scale", [0.05, 0.4, 1.0])
def test_both_kl_estimators_are_unbiased_on_the_enumerated_oracle(scale: float) -> None:
    p, q = (tiny.model(oracle.VOCABULARY, seed=seed, scale=scale).eval() for seed in (0, 1))
    exact = oracle.exact_kl(p, q, [2, 3])
    assert moments(p, q)[0] == pytest.approx({"rb": exact, "k1": exact}, rel=1e-5, abs=1e-9)


def test_rao_blackwell_varies_far_less_than_k1_near_the_reference() -> None:
    p, q = (tiny.model(oracle.VOCABULARY, seed=0).eval() for _ in range(2))
    torch.manual_seed(0)
    for parameter in q.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    _, variances = moments(p, q)
    assert variances["rb"] < variances["k1"] / 5


def test_impossible_tokens_count_nothing_in_a_kl() -> None:
    p, q = torch.tensor([1.0, 0.0]).log(), torch.tensor([0.25, 0.75]).log()
    assert float(metrics.rao_blackwell(p, q)) == pytest.approx(math.log(4))


def test_the_exact_interval_of_a_share_is_scipy_s_and_rejects_one_half_where_the_sign_test_does() -> None:
    for _ in range(40):
        count = random.randint(1, 60)
        successes = random.randint(0, count)
        test = stats.binomtest(successes, count)
        low, high = statistics.clopper_pearson(successes, count)
        assert (low, high) == pytest.approx(tuple(test.proportion_ci(0.95, "exact")), abs=1e-9)
        assert (low <= 0.5 <= high) == (test.pvalue >= 0.05)
    assert statistics.clopper_pearson(0, 0) == (0, 1)
