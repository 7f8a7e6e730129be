"""Each finding appears on a history made to trigger it, and is silent on its nearest healthy neighbour."""

import random
from typing import Any

import pytest

from dpo_kit.run.report.diagnosis import diagnose
from dpo_kit.run.report.findings import Finding

CLOSER = {
    "beta": {"higher": "closer", "grid": [0.05, 0.1, 0.2, 0.5]},
    "learning_rate": {"full": 5e-7, "lora": 5e-6},
}
STRONGER = CLOSER | {"beta": {"higher": "stronger", "grid": [2, 2.5, 5, 10]}}


def healthy(**changes: Any) -> list[dict[str, Any]]:
    """A run that went well: 100 steps, ten losses and a scoring every 20; `changes` replace a key's five values."""
    noise = random.Random(0)
    rows: list[dict[str, Any]] = [
        {"step": step, "loss": 0.69 - 0.003 * step + noise.gauss(0, 0.01)} for step in range(5, 101, 5)
    ]
    curves = {
        "probe/margin_nats": [0, 1.5, 2.5, 3.0, 3.3, 3.5],
        "probe/margin_nats_low": [0, 1.2, 2.1, 2.6, 2.9, 3.0],
        "probe/margin_nats_high": [0, 1.8, 2.9, 3.4, 3.7, 4.0],
        "probe/accuracy": [0.5, 0.6, 0.66, 0.7, 0.72, 0.73],
        "probe/logratio_chosen_nats": [0, -0.6, -0.9, -1.1, -1.2, -1.25],
        "probe/logratio_rejected_nats": [0, -2.1, -3.4, -4.1, -4.5, -4.75],
        "probe/kl_forward_rb_nats": [0, 1.0, 2.0, 2.8, 3.2, 3.5],
        "probe/kl_forward_rb_nats_per_token": [0, 0.05, 0.1, 0.14, 0.16, 0.18],
        "probe/saturation": [0, 0.1, 0.2, 0.3, 0.35, 0.4],
        "gold/reward": [0.2, 0.7, 1.1, 1.4, 1.5, 1.55],
        "gold/reward_low": [0.1, 0.6, 1.0, 1.3, 1.4, 1.45],
        "gold/reward_high": [0.3, 0.8, 1.2, 1.5, 1.6, 1.65],
    }
    curves |= {key.replace("__", "/"): values for key, values in changes.items()}
    for index, step in enumerate(range(0, 101, 20)):
        rows.append({"step": step} | {key: values[index] for key, values in curves.items() if values})
    return rows


def standing_still(**changes: Any) -> list[dict[str, Any]]:
    noise = random.Random(1)
    still = {"probe__margin_nats_low": [0, -0.1, -0.1, -0.1, -0.1, -0.1], "probe__saturation": [0, 0, 0, 0, 0, 0.01]}
    rows = healthy(**(still | changes))
    return [row | {"loss": 0.69 + noise.gauss(0, 0.01)} if "loss" in row else row for row in rows]


def only(history: list[dict[str, Any]], method: dict[str, Any] = CLOSER) -> Finding:
    (finding,) = diagnose(history, method)
    return finding


def test_what_rounding_alone_explains_is_no_movement() -> None:
    tiny = {
        "probe__logratio_chosen_nats": [0, 0.01, 0.02, 0.03, 0.03, 0.04],
        "probe__logratio_rejected_nats": [0, -0.01, -0.02, -0.04, -0.04, -0.05],
        "probe__margin_nats_low": [0, -0.1, -0.1, -0.1, -0.1, -0.1],
    }
    found = only(healthy(probe__floor_nats=[0.6] * 6, **tiny))
    assert "moved by 0.05 nats, less than the 0.6" in found.symptom and "model.dtype=float32" in found.remedy
    assert diagnose(healthy(probe__floor_nats=[0.6] * 6), CLOSER) == []  # 4.75 nats are more
    assert diagnose(healthy(probe__floor_nats=[0.049] * 6, **tiny), CLOSER) == []
    assert diagnose(healthy(**tiny), CLOSER) == []  # in fp32 there is no floor
    sure = tiny | {"probe__margin_nats_low": [0, 0.01, 0.02, 0.03, 0.04, 0.05]}  # over many pairs
    assert diagnose(healthy(probe__floor_nats=[0.6] * 6, **sure), CLOSER) == []
    right = tiny | {"probe__accuracy_low": [0.4, 0.45, 0.48, 0.51, 0.53, 0.55]}  # is sure
    assert diagnose(healthy(probe__floor_nats=[0.6] * 6, **right), CLOSER) == []
    alone = {"probe__logratio_chosen_nats": None, "probe__logratio_rejected_nats": None}
    margin = {"probe__margin_nats": [0, 0.01, 0.02, 0.03, 0.03, 0.04], "probe__margin_nats_low": [0] + [-1] * 5}
    assert "moved by 0.04 nats" in only(healthy(probe__floor_nats=[0.6] * 6, **alone, **margin)).symptom


def test_nothing_below_the_floor_is_called_drift_or_a_fall_or_an_effect_of_beta() -> None:
    drift = {"probe__kl_forward_rb_nats": [0, 1, 3, 6, 30, 90]}
    assert "KL drift explodes" in only(healthy(**drift)).symptom
    assert diagnose(healthy(**drift, probe__kl_floor_nats=[100] * 6), CLOSER) == []
    falling = {
        "probe__logratio_chosen_nats": [0, -1, -3, -6, -10, -15],
        "probe__logratio_rejected_nats": [0, -3, -6, -10, -15, -21],
    }
    assert "still falling" in only(healthy(**falling)).symptom
    assert diagnose(healthy(**falling, probe__floor_nats=[16] * 6), CLOSER) == []


@pytest.mark.parametrize("method", [CLOSER, STRONGER])
def test_a_good_run_has_no_finding_though_its_chosen_answers_lose_likelihood(method: dict[str, Any]) -> None:
    assert healthy()[-1]["probe/logratio_chosen_nats"] < 0
    assert diagnose(healthy(), method) == []


@pytest.mark.parametrize("history", [[], [{"step": 1, "loss": 0.5}], [{"step": 0, "probe/accuracy": 0.5}]])
def test_a_short_or_empty_record_has_no_finding(history: list[dict[str, Any]]) -> None:
    assert diagnose(history, CLOSER) == []


def test_a_flat_loss_with_nothing_learned_is_the_one_finding_and_names_the_methods_own_rates() -> None:
    finding = only(standing_still())
    assert "loss is flat" in finding.symptom
    assert "5e-07" in finding.remedy and "5e-06" in finding.remedy and "1e-3" not in finding.remedy


def test_a_flat_loss_is_no_finding_when_the_held_out_margin_has_moved() -> None:
    assert diagnose(standing_still(probe__margin_nats_low=None, probe__saturation=None), CLOSER) == []  # not measured
    moved = standing_still(probe__margin_nats_low=[0, 0.1, 0.2, 0.3, 0.4, 0.5], probe__saturation=[0.4] * 6)
    assert diagnose(moved, CLOSER) == []


def test_a_falling_loss_is_not_flat_even_where_held_out_rows_do_not_follow() -> None:
    history = healthy(probe__margin_nats_low=[0, -0.1, -0.1, -0.1, -0.1, -0.1])
    assert diagnose(history, CLOSER) == []


def test_for_unary_rows_the_auc_tells_whether_anything_was_learned() -> None:
    unary = {"probe__margin_nats_low": None, "probe__auc": [0.5] * 6, "probe__auc_low": [0.47] * 6}
    assert "loss is flat" in only(standing_still(**unary)).symptom
    learned = unary | {"probe__auc_low": [0.47, 0.5, 0.53, 0.55, 0.56, 0.57], "probe__saturation": None}
    assert diagnose(standing_still(**learned), CLOSER) == []


def test_both_answers_falling_further_is_named_as_a_trend() -> None:
    falling = {"probe__logratio_chosen_nats": [0, -1, -3, -6, -10, -15]}
    history = healthy(**falling, probe__logratio_rejected_nats=[0, -3, -6, -10, -15, -21])
    finding = only(history)
    assert "still falling" in finding.symptom and "good runs" in finding.meaning
    assert "raise beta" in finding.remedy
    assert "lower beta" in only(history, STRONGER).remedy


def test_a_fall_that_has_come_to_rest_or_a_rejected_side_that_rises_is_no_finding() -> None:
    rested = healthy(
        probe__logratio_chosen_nats=[0, -8, -12, -13, -13.5, -13.6],
        probe__logratio_rejected_nats=[0, -12, -17, -19, -20, -20],
    )
    assert diagnose(rested, CLOSER) == []
    risen = healthy(
        probe__logratio_chosen_nats=[0, -1, -3, -6, -10, -15], probe__logratio_rejected_nats=[0, 1, 1, 1, 1, 1]
    )
    assert diagnose(risen, CLOSER) == []
    slight = healthy(
        probe__logratio_chosen_nats=[0, -0.2, -0.5, -0.9, -1.4, -2],
        probe__logratio_rejected_nats=[0, -1, -2, -3.5, -5, -7],
    )
    assert diagnose(slight, CLOSER) == []


def test_accuracy_of_one_at_once_is_suspicious_and_the_length_is_named_where_it_explains_it() -> None:
    at_once = {"probe__accuracy": [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]}
    finding = only(healthy(**at_once))
    assert "1.000 at step 20" in finding.symptom and "longer" not in finding.symptom
    assert "longer answer is right in 96%" in only(healthy(**at_once, probe__length_rule_accuracy=[0.96] * 6)).symptom


def test_accuracy_that_gets_there_late_is_not_suspicious() -> None:
    assert diagnose(healthy(probe__accuracy=[0.5, 0.7, 0.8, 0.9, 0.97, 1.0]), CLOSER) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"probe__kl_forward_rb_nats": [0, 1, 3, 6, 30, 90]},
        {"probe__kl_forward_rb_nats": [0, 20, 25, 28, 32, 33], "probe__kl_forward_rb_nats_per_token": [1.0] * 6},
        {"probe__kl_forward_rb_nats": None, "probe__kl_forward_k1_nats": [0, 1, 3, 6, 30, 90]},
        {"probe__kl_reverse_rb_nats": [0, 1, 3, 6, 30, 90]},
    ],
    ids=["growing", "large per token", "k1", "reverse"],
)
def test_an_exploding_kl_is_found_and_beta_is_turned_the_right_way(changes: dict[str, Any]) -> None:
    finding = only(healthy(**changes))
    assert "KL drift explodes" in finding.symptom
    assert "raise beta" in finding.remedy and "0.05, 0.1, 0.2, 0.5" in finding.remedy
    other = only(healthy(**changes), STRONGER).remedy
    assert "lower beta" in other and "2, 2.5, 5, 10" in other


def test_a_kl_that_is_large_for_long_answers_but_steady_is_no_finding() -> None:
    history = healthy(probe__kl_forward_rb_nats=[0, 20, 28, 33, 36, 38])  # .18 nats a token
    assert diagnose(history, CLOSER) == []


def test_a_gold_reward_that_falls_while_the_margin_rises_is_over_optimisation() -> None:
    fell = {"gold__reward": [0.2, 0.9, 1.5, 1.2, 1.0, 0.9], "gold__reward_low": [0.1, 0.8, 1.4, 1.1, 0.9, 0.8]}
    finding = only(healthy(**fell, gold__reward_high=[0.3, 1.0, 1.6, 1.3, 1.1, 1.0]))
    assert "from 1.50 at step 40 to 0.90" in finding.symptom
    within = {"gold__reward": [0.2, 0.9, 1.5, 1.5, 1.45, 1.4], "gold__reward_low": [0.1, 0.8, 1.4, 1.4, 1.35, 1.3]}
    assert diagnose(healthy(**within, gold__reward_high=[0.3, 1, 1.6, 1.6, 1.55, 1.5]), CLOSER) == []


def test_when_nothing_saturates_beta_is_not_yet_felt() -> None:
    finding = only(healthy(probe__saturation=[0, 0.01, 0.02, 0.03, 0.04, 0.05]))
    assert "beta is not felt" in finding.symptom
    assert diagnose(healthy(probe__saturation=[0, 0, 0.05, 0.08, 0.1, 0.12]), CLOSER) == []
    assert diagnose(healthy(probe__saturation=None), CLOSER) == []  # a method without such a measure


def test_no_remedy_asks_for_a_learning_rate_out_of_any_methods_range() -> None:
    bad = healthy(
        probe__accuracy=[0.5, 1, 1, 1, 1, 1],
        probe__kl_forward_rb_nats=[0, 1, 3, 6, 30, 90],
        probe__saturation=[0] * 6,
        probe__logratio_chosen_nats=[0, -1, -3, -6, -10, -15],
        probe__logratio_rejected_nats=[0, -3, -6, -10, -15, -21],
    )
    findings = diagnose(bad, CLOSER)
    assert len(findings) == 4
    assert not any("raise trl.learning_rate" in finding.remedy or "1e-3" in finding.remedy for finding in findings)
