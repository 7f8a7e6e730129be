"""Each clause of the rule by which a sweep recommends a run, on run directories written for it."""

import random
from pathlib import Path
from typing import Any

import pytest

from dpo_kit.run.files import read_json, write_json, write_jsonl
from dpo_kit.run.intervals import wilson
from dpo_kit.sweep.summary import Summary, summarize
from tests.sweeps import MODEL, rewards, write_evaluation, write_jobs, write_run

START = rewards(0.2)


def gold_run(sweep: Path, name: str, mean: float, kl: float, *, start: list[float] | None = None, **more: Any) -> None:
    """A run with gold rewards whose noise differs from run to run."""
    start = START if start is None else start
    noise = sum(map(ord, name))
    write_run(sweep, name, gold=rewards(mean, len(start), seed=noise), gold_start=start, kl=kl, **more)


def accuracy_run(
    sweep: Path, name: str, right: int, kl: float, *, pairs: int = 400, seed: int = 0, **more: Any
) -> None:
    """A run that ranks `right` of the pairs as labelled; which ones is drawn."""
    margins = [1.0] * right + [-1.0] * (pairs - right)
    random.Random(seed).shuffle(margins)
    write_run(sweep, name, margins=margins, kl=kl, **more)


def evidence(summary: Summary, name: str) -> dict[str, Any]:
    return next(row for row in summary.choice.to_json()["evidence"] if row["run"] == name)


def test_a_truly_better_run_wins_despite_more_drift(tmp_path: Path) -> None:
    gold_run(tmp_path, "far", 1.6, 7.0)
    gold_run(tmp_path, "near", 1.0, 2.0)
    found = summarize(tmp_path)
    assert found.recommended == "far" and "beats the other 1 eligible" in found.choice.reason
    assert evidence(found, "near")["below_best"]["p"] < 0.05
    assert found.choice.to_json()["provisional"] is False and found.choice.needed is None


def test_runs_that_cannot_be_told_apart_tie_and_the_nearest_wins(tmp_path: Path) -> None:
    gold_run(tmp_path, "a-best", 1.61, 7.0)
    gold_run(tmp_path, "b-nearest", 1.60, 2.0)
    gold_run(tmp_path, "c-worse", 1.2, 1.0)
    found = summarize(tmp_path)
    assert found.recommended == "b-nearest"
    assert [evidence(found, name)["tied_with_best"] for name in ("a-best", "b-nearest", "c-worse")] == [
        True,
        True,
        False,
    ]
    assert found.choice.needed is not None and found.choice.needed > 200  # more prompts than there were
    assert f"{found.choice.needed:,} prompts" in found.choice.reason


def test_drift_over_the_budget_is_rejected_and_the_budget_can_be_changed(tmp_path: Path) -> None:
    gold_run(tmp_path, "over", 2.0, 10.1)
    gold_run(tmp_path, "within", 1.0, 10.0)
    assert summarize(tmp_path).recommended == "within"
    assert "10.1 nats is over the budget of 10" in evidence(summarize(tmp_path), "over")["why_not"][0]
    assert summarize(tmp_path, kl_budget_nats=12).recommended == "over"
    assert "at most 12 nats" in summarize(tmp_path, kl_budget_nats=12).choice.rule


def test_a_lost_capability_is_rejected_however_good_the_rest(tmp_path: Path) -> None:
    gold_run(tmp_path, "damaged", 2.0, 3.0, capability=0.86)  # started at .90
    gold_run(tmp_path, "whole", 1.0, 3.0, capability=0.87)  # .03 lost: just allowed
    found = summarize(tmp_path)
    assert found.recommended == "whole"
    assert evidence(found, "damaged")["why_not"] == ["capability fell by 0.040, more than 0.03"]
    assert summarize(tmp_path, max_regression=0.05).recommended == "damaged"
    assert summarize(tmp_path, max_regression=0.02).recommended is None


def test_a_loss_of_capability_that_chance_explains_is_said_and_rejects_nothing(tmp_path: Path) -> None:
    for prompts, recommended in ((16, "a"), (400, None)):
        gold_run(tmp_path, "a", 2.0, 3.0, capability=0.775)  # started at .90
        result = read_json(tmp_path / "a" / "result.json")
        for moment in ("start", "final"):
            ends = wilson(result[moment]["gold/capability"], prompts)
            result[moment] |= dict(zip(("gold/capability_low", "gold/capability_high"), ends, strict=True))
            result[moment]["gold/capability_prompts"] = prompts
        write_json(tmp_path / "a" / "result.json", result)
        found = summarize(tmp_path)
        assert found.recommended == recommended
        assert any("chance explains on 16 prompts: a 0.125" in note for note in found.choice.notes) == (prompts == 16)


def test_the_most_accurate_run_loses_to_the_better_samples(tmp_path: Path) -> None:
    margins = {"accurate": [1.0] * 390 + [-1.0] * 10, "good": [1.0] * 280 + [-1.0] * 120}
    for name, mean in (("accurate", 0.6), ("good", 1.6)):
        gold_run(tmp_path, name, mean, 3.0, margins=margins[name])
    found = summarize(tmp_path)
    assert found.recommended == "good" and found.choice.quality.name == "gold reward"


def test_limits_come_from_the_run_started_last_unless_given(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 1.0, 6.0, choose={"kl_budget_nats": 5.0, "max_regression": 0.1}, started="2026-01-02")
    gold_run(tmp_path, "b", 0.9, 6.0, choose={"kl_budget_nats": 8.0, "max_regression": 0.2}, started="2026-01-01")
    assert summarize(tmp_path).choice.limits.model_dump() == {"kl_budget_nats": 5.0, "max_regression": 0.1}
    assert summarize(tmp_path).recommended is None
    assert summarize(tmp_path, kl_budget_nats=7).choice.limits.max_regression == 0.1
    assert summarize(tmp_path, kl_budget_nats=7).recommended == "a"


def test_nothing_is_recommended_where_nothing_beats_the_reference(tmp_path: Path) -> None:
    start = rewards(0.2, 40)
    gold_run(tmp_path, "a", 0.23, 1.0, start=start)
    gold_run(tmp_path, "b", 0.10, 1.0, start=start)
    found = summarize(tmp_path)
    assert found.recommended is None and found.choice.to_json()["recommended"] is None
    assert "No run is eligible" in found.choice.reason and "does not beat the reference" in found.choice.reason
    # The one that is ahead at all: ((1.96 + .84)·sd / mean)² of its gaps by prompt
    gains = [row["gain"]["value"] for row in found.choice.to_json()["evidence"]]
    assert gains == pytest.approx([0.03, -0.10]) and found.choice.needed is not None and found.choice.needed > 40
    assert f"that of a (+0.030) would take about {found.choice.needed:,} prompts" in found.choice.reason
    assert found.next is not None and "trl.num_train_epochs=2" in found.next


def test_only_worse_runs_need_no_number(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 0.1, 1.0)
    found = summarize(tmp_path)
    assert found.recommended is None and found.choice.needed is None


def test_the_gain_is_paired_by_prompt_so_that_hard_prompts_do_not_hide_it(tmp_path: Path) -> None:
    start = rewards(0.0, 60, spread=5.0)
    final = [value + 0.2 + 0.1 * (number % 2) for number, value in enumerate(start)]
    write_run(tmp_path, "a", gold=final, gold_start=start)
    assert summarize(tmp_path).recommended == "a"
    write_run(tmp_path / "other", "a", gold=final, gold_start=start, by_prompt=False)
    found = summarize(tmp_path / "other")  # the intervals overlap by far
    assert found.recommended is None and evidence(found, "a")["gain"]["basis"] == "their intervals alone"
    assert any("compared by their intervals alone" in note for note in found.choice.notes)


def test_accuracy_alone_is_provisional_and_tested_pair_by_pair(tmp_path: Path) -> None:
    accuracy_run(tmp_path, "best", 320, 8.0)
    accuracy_run(tmp_path, "close", 316, 3.0, seed=1)
    accuracy_run(tmp_path, "worse", 240, 1.0, seed=2)
    found = summarize(tmp_path)
    assert found.recommended == "close"
    assert found.choice.to_json()["provisional"] is True and any("Provisional" in note for note in found.choice.notes)
    assert evidence(found, "worse")["below_best"]["basis"] == "exact McNemar by prompt"
    assert found.choice.needed is not None and f"{found.choice.needed:,} pairs" in found.choice.reason


def test_accuracy_must_beat_one_half_beyond_its_interval(tmp_path: Path) -> None:
    accuracy_run(tmp_path, "a", 52, 1.0, pairs=100)
    found = summarize(tmp_path)
    assert found.recommended is None
    assert found.choice.needed == 4904  # ((.98 + .8416·√(.52·.48)) / .02)²


def test_holm_keeps_many_comparisons_from_separating_by_chance(tmp_path: Path) -> None:
    """A lone rival of p = .03 is separated; among ten others as good it is not."""
    count = 400
    rights = {"best": [True] * 300 + [False] * 100}
    rights["rival"] = [number >= 17 for number in range(300)] + [number < 5 for number in range(100)]  # 17 lost, 5 won
    for sweep, others in (("two", 0), ("many", 10)):
        for number, (name, right) in enumerate([*rights.items(), *((f"o{n}", rights["best"]) for n in range(others))]):
            kl = 5.0 if name != "rival" else 1.0
            margins = [1.0 if each else -1.0 for each in right]
            write_run(tmp_path / sweep, name, margins=margins, kl=kl + 0.01 * number)
    assert len(rights["rival"]) == count
    alone, crowd = summarize(tmp_path / "two"), summarize(tmp_path / "many")
    assert evidence(alone, "rival")["below_best"]["p"] == pytest.approx(0.0169, abs=1e-3)  # binomial, 17 of 22
    assert alone.recommended == "best"
    assert evidence(crowd, "rival")["below_best"]["p"] == pytest.approx(11 * 0.0169, abs=0.01)
    assert crowd.recommended == "rival"


def test_a_judge_s_win_rate_stands_before_accuracy(tmp_path: Path) -> None:
    for name, right, rate in (("accurate", 380, 0.52), ("liked", 260, 0.66)):
        accuracy_run(tmp_path, name, right, 2.0)
        judged = {"win_rate": rate, "win_rate_low": rate - 0.05, "win_rate_high": rate + 0.05}
        write_json(tmp_path / name / "evaluation" / "result.json", judged)
    accuracy_run(tmp_path, "unjudged", 399, 1.0)
    found = summarize(tmp_path)
    assert found.recommended == "liked" and not found.choice.quality.provisional
    assert "does not beat the reference" in evidence(found, "accurate")["why_not"][0]
    assert evidence(found, "unjudged")["why_not"] == ["the win rate was not measured"]


JUDGE = {"name": "llm j", "kind": "llm", "rubric": "r", "controls_failed": []}


def judged_run(sweep: Path, name: str, points: list[float], kl: float, **more: Any) -> None:
    """A run whose answers were judged prompt by prompt: result.json and verdicts.jsonl as an evaluation leaves them."""
    accuracy_run(sweep, name, 300, kl)
    rate = sum(points) / len(points)
    half = 1.96 * (sum((each - rate) ** 2 for each in points) / len(points) ** 2) ** 0.5
    result = {"status": "done", "split": "select", "opponent": "its reference", "judge": JUDGE, "win_rate": rate}
    result |= {"win_rate_low": rate - half, "win_rate_high": rate + half} | more
    write_json(sweep / name / "evaluation" / "result.json", result)
    rows = [{"prompt_id": f"p{number}", "draw": 0, "points": each} for number, each in enumerate(points)]
    write_jsonl(sweep / name / "evaluation" / "verdicts.jsonl", rows)


def close_points() -> tuple[list[float], list[float]]:
    """Two runs' points on 300 prompts: .70 and .64, the worse one losing 18 of the prompts that the better one wins."""
    return [1.0] * 210 + [0.0] * 90, [1.0] * 192 + [0.0] * 108


def test_win_rates_are_paired_by_prompt(tmp_path: Path) -> None:
    better, worse = close_points()
    judged_run(tmp_path, "better", better, 5.0)
    judged_run(tmp_path, "worse", worse, 1.0)
    found = summarize(tmp_path)
    assert found.recommended == "better"  # by their intervals alone (.65 to .75 and .59 to .69) they would tie
    below = evidence(found, "worse")["below_best"]
    assert below["basis"] == "paired bootstrap by prompt" and below["value"] == pytest.approx(0.06)
    assert below["p"] < 0.001 and below["count"] == 300
    for name in ("better", "worse"):
        (tmp_path / name / "evaluation" / "verdicts.jsonl").unlink()
    found = summarize(tmp_path)
    assert found.recommended == "worse"  # nearest to the reference of two that tie
    assert evidence(found, "worse")["below_best"]["basis"] == "their intervals alone"


def test_best_json_cites_the_evaluation_that_it_rests_on(tmp_path: Path) -> None:
    judged_run(tmp_path, "a", close_points()[0], 5.0)
    cited = evidence(summarize(tmp_path), "a")["evaluation"]
    assert cited["file"] == "a/evaluation/result.json" and cited["judge"]["name"] == "llm j"
    assert (cited["win_rate"], cited["split"]) == (0.7, "select")
    accuracy_run(tmp_path, "plain", 300, 1.0)
    assert "evaluation" not in evidence(summarize(tmp_path), "plain")


def test_win_rates_of_different_judges_are_not_compared(tmp_path: Path) -> None:
    better, worse = close_points()
    judged_run(tmp_path, "better", better, 5.0)
    judged_run(tmp_path, "worse", worse, 1.0, judge=JUDGE | {"name": "llm other"})
    found = summarize(tmp_path)
    assert evidence(found, "worse")["below_best"] is None and found.recommended == "worse"
    assert any("different judges or opponents" in note for note in found.choice.notes)


def test_a_rate_that_people_put_right_is_the_one_that_is_chosen_by(tmp_path: Path) -> None:
    better, worse = close_points()
    judged_run(tmp_path, "flattered", better, 1.0, **right(0.55, 0.08))
    judged_run(tmp_path, "honest", worse, 5.0, **right(0.68, 0.04))
    found = summarize(tmp_path)
    assert found.recommended == "honest"
    assert "does not beat the reference" in evidence(found, "flattered")["why_not"][0]
    judged_run(tmp_path, "flattered", better, 1.0, **right(0.6, 0.05))
    found = summarize(tmp_path)
    below = evidence(found, "flattered")["below_best"]
    assert below["basis"] == "their intervals alone" and below["value"] == pytest.approx(0.08)
    assert evidence(found, "honest")["evaluation"]["win_rate_corrected"] == 0.68
    assert not any("put right" in note for note in found.choice.notes)
    judged_run(tmp_path, "flattered", better, 1.0)
    found = summarize(tmp_path)
    assert evidence(found, "flattered" if found.recommended == "honest" else "honest")["below_best"] is None
    assert any("People put right the win rates of some runs only" in note for note in found.choice.notes)


def right(rate: float, half: float) -> dict[str, Any]:
    ends = {"": rate, "_low": rate - half, "_high": rate + half}
    return {f"win_rate_corrected{end}": value for end, value in ends.items()} | {"reviewed": 100}


def test_a_partial_evaluation_is_no_evidence(tmp_path: Path) -> None:
    judged_run(tmp_path, "whole", close_points()[1], 5.0)
    judged_run(tmp_path, "partial", close_points()[0], 1.0, parts={"win_rate": "partial"})
    found = summarize(tmp_path)
    assert found.recommended == "whole"
    assert evidence(found, "partial")["why_not"] == ["the win rate was not measured"]


def test_failed_controls_and_a_spent_test_split_are_said(tmp_path: Path) -> None:
    failed = JUDGE | {"controls_failed": ["pick me", "empty"]}
    judged_run(tmp_path, "a", close_points()[0], 5.0, judge=failed, split="test")
    notes = " ".join(summarize(tmp_path).choice.notes)
    assert "failed its own controls (empty, pick me): do not trust" in notes and "no untouched data left" in notes


GATE = {"worst_task": "gsm8k", "difference": -0.081, "low": -0.12, "high": -0.042, "limit": 0.03}


@pytest.mark.parametrize("passed", [True, False])
def test_a_failed_gate_rejects_a_run_even_where_it_is_the_best(tmp_path: Path, passed: bool) -> None:
    accuracy_run(tmp_path, "best", 390, 1.0)
    accuracy_run(tmp_path, "good", 300, 2.0)
    write_json(tmp_path / "best" / "evaluation" / "result.json", {"status": "done", "gate": GATE | {"passed": passed}})
    found = summarize(tmp_path)
    assert found.recommended == ("best" if passed else "good")
    why = evidence(found, "best")["why_not"]
    assert why == ([] if passed else [
        "the regression gate failed on gsm8k: difference to the reference -0.081 [-0.120, -0.042], where at most 0.03 "
        "may be lost"
    ])  # fmt: skip
    assert evidence(found, "best")["evaluation"]["gate"]["passed"] is passed
    assert "no regression gate failed" in found.choice.rule


def test_lost_capability_rejects_the_run_of_the_highest_win_rate(tmp_path: Path) -> None:
    judged_run(tmp_path, "overtuned", close_points()[0], 1.0)
    judged_run(tmp_path, "sane", close_points()[1], 2.0)
    result = read_json(tmp_path / "overtuned" / "result.json")
    result["start"]["gold/capability"], result["final"]["gold/capability"] = 0.9, 0.4
    write_json(tmp_path / "overtuned" / "result.json", result)
    found = summarize(tmp_path)
    assert found.recommended == "sane"
    assert evidence(found, "overtuned")["why_not"] == ["capability fell by 0.500, more than 0.03"]


def test_without_a_measured_drift_no_run_is_eligible(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 1.0, 1.0)
    write_run(tmp_path, "b", gold=rewards(2.0), gold_start=START, kl=None)
    found = summarize(tmp_path)
    assert found.recommended == "a" and "callbacks.kl_drift=true" in evidence(found, "b")["why_not"][0]


@pytest.mark.parametrize(
    "other",
    [
        {"model": MODEL | {"sha256": "b" * 64}},
        {"model": {"path": "org/model", "revision": "main", "sha256": None}},
        {"reference": "org/other"},
    ],
    ids=["weights", "hub", "reference"],
)
def test_runs_of_two_step_0_models_are_never_chosen_between(tmp_path: Path, other: dict[str, Any]) -> None:
    gold_run(tmp_path, "a", 1.0, 2.0)
    gold_run(tmp_path, "b", 1.5, 1.0, **other)
    found = summarize(tmp_path)
    assert found.recommended is None and "different models" in found.choice.reason
    assert sorted(each["recommended"] for each in found.choice.to_json()["within"].values()) == ["a", "b"]


def test_one_model_under_two_paths_is_one_model(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 1.0, 2.0)
    gold_run(tmp_path, "b", 1.5, 1.0, model=MODEL | {"path": "/elsewhere/model"})
    assert summarize(tmp_path).recommended == "b"


def test_one_seed_ranks_runs_not_betas_and_several_are_averaged(tmp_path: Path) -> None:
    for beta, seed, mean, kl in ((0.1, 0, 1.0, 4.0), (0.5, 0, 1.2, 2.0)):
        gold_run(tmp_path, f"{beta}-{seed}", mean, kl, beta=beta, seed=seed)
    found = summarize(tmp_path)
    assert any("ranks runs, not betas" in note for note in found.choice.notes) and found.choice.means == ()
    assert found.next == "python -m dpo_kit -m method=dpo beta=0.5 seed=0,1,2"
    for beta, seed, mean, kl in ((0.1, 1, 1.4, 5.0), (0.5, 1, 1.0, 3.0)):
        gold_run(tmp_path, f"{beta}-{seed}", mean, kl, beta=beta, seed=seed)
    found = summarize(tmp_path)
    assert not any("ranks runs" in note for note in found.choice.notes)
    low, high = found.choice.means
    assert (low["beta"], low["seeds"]) == (0.1, 2) and (low["quality"], low["kl_reverse_nats"]) == pytest.approx(
        (1.2, 4.5)
    )
    assert low["quality_sd_over_seeds"] == pytest.approx(0.2 * 2**0.5)
    assert high["quality"] == pytest.approx(1.1)


def test_a_beta_that_is_not_felt_is_said_so(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 1.0, 2.0, saturation=0.09, beta=0.1)
    gold_run(tmp_path, "b", 1.0, 2.1, saturation=0.05, beta=0.2)
    found = summarize(tmp_path)
    assert any("Under-trained: beta not identified" in note for note in found.choice.notes)
    assert found.next == "python -m dpo_kit -m method=dpo seed=0 beta=0.1,0.2 trl.num_train_epochs=2"
    gold_run(tmp_path, "c", 1.0, 2.2, saturation=0.1)
    assert not any("Under-trained" in note for note in summarize(tmp_path).choice.notes)


def test_the_winner_s_test_values_are_reported_once(tmp_path: Path) -> None:
    for name, mean in (("a", 1.0), ("b", 1.5)):
        gold_run(tmp_path, name, mean, 2.0, test={"probe/accuracy": 0.7 + mean / 100})
    found = summarize(tmp_path)
    assert evidence(found, "b")["test"] == {"probe/accuracy": 0.715} and "test" not in evidence(found, "a")


def test_a_partial_sweep_is_judged_by_what_has_finished(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 1.0, 2.0)
    gold_run(tmp_path, "b", 9.0, 2.0, status=None)  # its metrics.jsonl says how good it is; it has not ended
    write_jobs(
        tmp_path,
        {"dir": "a", "state": "done"},
        {"dir": "b", "state": "running"},
        {"dir": "c", "state": "waiting"},
    )
    found = summarize(tmp_path)
    assert found.recommended == "a"
    assert "1 of 3 runs count here (1 running, 1 waiting)." in found.choice.notes


def test_different_held_out_data_are_pointed_out(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 1.0, 2.0)
    gold_run(tmp_path, "b", 1.2, 2.0)
    assert not any("different held-out data" in note for note in summarize(tmp_path).choice.notes)
    manifest = read_json(tmp_path / "a" / "manifest.json") | {"data": {"select": {"rows": 9, "sha256": "c"}}}
    write_json(tmp_path / "a" / "manifest.json", manifest)
    assert any("different held-out data" in note for note in summarize(tmp_path).choice.notes)


def test_no_finished_run_no_choice(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 1.0, 2.0, status="failed", error="ValueError: no")
    found = summarize(tmp_path)
    assert found.recommended is None and found.choice.reason == "No run has ended well so far."


def test_a_lower_bound_of_the_drift_is_called_one(tmp_path: Path) -> None:
    gold_run(tmp_path, "a", 1.0, 2.0)
    result = tmp_path / "a" / "result.json"
    result.write_text(
        result.read_text().replace('"gold/reward":', '"probe/kl_reverse_rb_nats_cut_share": 0.2, "gold/reward":')
    )
    assert any("lower bound" in note for note in summarize(tmp_path).choice.notes)


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_obeys_its_rule_on_random_sweeps(tmp_path: Path, seed: int) -> None:
    """Against the rule written out again over the evidence: eligibility, tie, lowest drift."""
    draw = random.Random(seed)
    for number in range(6):
        gold_run(
            tmp_path, f"r{number}", draw.uniform(0.1, 1.5), draw.uniform(0.5, 14), capability=draw.uniform(0.84, 0.92)
        )
    found = summarize(tmp_path)
    rows = found.choice.to_json()["evidence"]
    ok = [r for r in rows if r["gain"]["low"] > 0 and r["kl_reverse_nats"] <= 10 and r["capability_loss"] <= 0.03]
    assert [r["run"] for r in rows if r["eligible"]] == [r["run"] for r in ok]
    best = max(ok, key=lambda r: r["quality"], default=None)
    tied = [r for r in ok if r is best or r["below_best"]["p"] >= 0.05]
    expected = min(tied, key=lambda r: r["kl_reverse_nats"])["run"] if tied else None
    assert found.recommended == expected


ROUNDED = {
    "probe/logratio_chosen_nats": 0.04,
    "probe/logratio_rejected_nats": -0.01,
    "probe/floor_nats": 0.6,
    "probe/kl_floor_nats": 0.06,
}


def test_what_rounding_alone_explains_is_neither_a_gain_nor_none_and_no_number_would_settle_it(tmp_path: Path) -> None:
    for name, floors in (("rounded", ROUNDED), ("exact", {key: v for key, v in ROUNDED.items() if "floor" not in key})):
        accuracy_run(tmp_path / name, "a", 12, 0.04, pairs=21, measured=floors, saturation=0.01)
    rounded, exact = summarize(tmp_path / "rounded"), summarize(tmp_path / "exact")
    (why,) = evidence(rounded, "a")["why_not"]
    assert why.startswith("the held-out accuracy is rounding (held-out answers have moved by 0.04 nats")
    assert rounded.choice.needed is None and "too few" not in rounded.choice.reason
    assert "does not beat the reference" in evidence(exact, "a")["why_not"][0] and exact.choice.needed is not None
    notes = {name: " ".join(found.choice.notes) for name, found in (("rounded", rounded), ("exact", exact))}
    assert "Under-trained" in notes["exact"] and "Under-trained" not in notes["rounded"]
    assert "model.dtype=float32" in notes["rounded"] and "model.dtype=float32" not in notes["exact"]
    assert evidence(rounded, "a")["rounding"] == [
        "probe/kl_reverse_rb_nats", "probe/saturation", "probe/kl_forward_rb_nats", "probe/accuracy",
        "probe/margin_nats", "probe/logratio_chosen_nats", "probe/logratio_rejected_nats",
    ]  # fmt: skip
    assert rounded.next is not None and "trl.num_train_epochs=2" in rounded.next


def test_a_margin_that_many_pairs_make_sure_is_a_gain_below_the_floor_of_one_answer(tmp_path: Path) -> None:
    accuracy_run(tmp_path, "a", 300, 0.05, measured=ROUNDED)
    assert summarize(tmp_path).recommended == "a"
    assert "a reverse KL below the 0.06 nats that rounding alone makes" in summarize(tmp_path).choice.reason


def test_drifts_below_the_floor_rank_nobody(tmp_path: Path) -> None:
    for sweep, floor in (("fine", {}), ("coarse", {"probe/kl_floor_nats": 0.06})):
        gold_run(tmp_path / sweep, "a-best", 1.61, 0.05, measured=floor)
        gold_run(tmp_path / sweep, "b-nearest", 1.60, 0.02, measured=floor)
        gold_run(tmp_path / sweep, "c-far", 1.60, 0.07, measured=floor)
    assert summarize(tmp_path / "fine").recommended == "b-nearest"
    coarse = summarize(tmp_path / "coarse")
    assert coarse.recommended == "a-best"
    assert any("The reverse KL of a-best, b-nearest lies below" in note for note in coarse.choice.notes)


def margins_of(right: int, count: int) -> list[float]:
    return [1.0] * right + [-1.0] * (count - right)


@pytest.mark.parametrize(
    ("evaluated", "more", "chosen"),
    [
        (margins_of(320, 400), {}, "evaluated"),
        (margins_of(80, 100), {}, "evaluated"),  # as many as the probe
        (margins_of(72, 90), {}, "probed"),  # fewer
        (margins_of(320, 400), {"split": "test"}, "probed"),  # rows that a choice must not see
        (margins_of(320, 400), {"parts": {"preferences": "partial"}}, "probed"),
    ],
    ids=["more rows", "as many", "fewer", "test split", "partial"],
)
def test_what_evaluate_measured_stands_before_the_probe(
    tmp_path: Path, evaluated: list[float], more: dict[str, Any], chosen: str
) -> None:
    accuracy_run(tmp_path, "evaluated", 55, 2.0, pairs=100)  # [.45, .65] by the probe
    write_evaluation(tmp_path / "evaluated", evaluated, **more)
    accuracy_run(tmp_path, "probed", 70, 1.0, pairs=100)
    found = summarize(tmp_path)
    row = evidence(found, "evaluated")
    assert row["quality"] == pytest.approx(0.8 if chosen == "evaluated" else 0.55)
    assert row["eligible"] is (chosen == "evaluated")
    assert any("what evaluate found" in note for note in found.choice.notes) is (chosen == "evaluated")


def test_runs_that_were_evaluated_are_paired_by_what_evaluate_wrote(tmp_path: Path) -> None:
    for name, right, kl in (("better", 330, 2.0), ("worse", 300, 1.0)):
        accuracy_run(tmp_path, name, 70, kl, pairs=100)
        write_evaluation(tmp_path / name, margins_of(right, 400))
    found = summarize(tmp_path)
    assert found.recommended == "better"
    below = evidence(found, "worse")["below_best"]
    assert (below["basis"], below["count"]) == ("exact McNemar by prompt", 400)
    assert below["value"] == pytest.approx(0.075)
    for name in ("better", "worse"):
        (tmp_path / name / "evaluation" / "preferences.jsonl").unlink()
    assert evidence(summarize(tmp_path), "worse")["below_best"]["basis"] == "their intervals alone"


def test_an_evaluation_on_the_rows_of_choices_stands_before_one_on_the_test_split(tmp_path: Path) -> None:
    accuracy_run(tmp_path, "a", 55, 2.0, pairs=100)
    write_evaluation(tmp_path / "a", margins_of(390, 400), split="test")
    write_evaluation(tmp_path / "a", margins_of(300, 400), beside="select")
    found = summarize(tmp_path)
    assert evidence(found, "a")["quality"] == 0.75
    assert evidence(found, "a")["evaluation"]["file"] == "a/evaluation/select/result.json"
