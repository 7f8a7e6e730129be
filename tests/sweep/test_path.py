"""The choice ranges over what was kept on the way of each run: peaks before the end, nearer checkpoints."""

import json
from pathlib import Path

from dpo_kit.run.history import append_row
from dpo_kit.sweep.summary import describe, summarize, write_summary
from tests.sweeps import interval, rewards, write_run


def keep(run: Path, step: int, gold: list[float], kl: float) -> None:
    """Weights kept after `step` steps, with what was measured there."""
    mean, key = sum(gold) / len(gold), "probe/kl_reverse_rb_nats"
    spread = (sum((value - mean) ** 2 for value in gold) / (len(gold) - 1) / len(gold)) ** 0.5
    append_row(
        run / "metrics.jsonl", {"step": step, key: kl, f"{key}_se": 0.1, **interval("gold/reward", mean, spread)}
    )
    for number, reward in enumerate(gold):
        row = {
            "step": step,
            "prompt_id": f"p{number}",
            "prompt": f"p{number}",
            "answer": "a",
            "tokens": 15,
            "cut": False,
        }
        append_row(run / "samples.jsonl", row | {"gold_reward": reward})
    (run / "path" / f"step-{step}").mkdir(parents=True)


def overtuned(sweep: Path) -> Path:
    """A run that peaks at step 60 and ends lower."""
    run = write_run(sweep, "low", beta=0.05, gold=rewards(1.4), gold_start=rewards(1.0, seed=1), kl=9.0)
    keep(run, 30, rewards(1.5, seed=2), 2.0)
    keep(run, 60, rewards(2.0, seed=3), 4.0)
    return run


def test_a_checkpoint_is_recommended_where_the_run_was_better_than_at_its_end(tmp_path: Path) -> None:
    overtuned(tmp_path)
    write_run(tmp_path, "high", beta=0.5, gold=rewards(1.6, seed=4), gold_start=rewards(1.0, seed=1), kl=2.0)
    summary = write_summary(tmp_path)
    chosen = summary.choice.recommended
    assert chosen is not None and (chosen.path, chosen.step) == ("low", 60)
    assert chosen.weights == tmp_path / "low" / "path" / "step-60"
    assert summary.choice.reason.startswith(
        "low at step 60 beats the other 3 eligible beyond chance: gold reward 2.000"
    )
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["recommended"], best["step"]) == ("low", 60)
    assert [(row["run"], row["step"]) for row in best["evidence"]] == [
        ("low", 30),
        ("low", 60),
        ("low", None),
        ("high", None),
    ]
    said = describe(summary)
    assert f"model: {chosen.weights}" in said
    assert f"export it: python -m dpo_kit export run={tmp_path / 'low'} step=60" in said
    (fall,) = [note for note in summary.choice.notes if "falls" in note]
    assert fall.startswith("The gold reward of low falls after step 60: at its end it is lower by 0.600 [0.5")
    assert "Recommended: **low at step 60**." in (tmp_path / "summary.md").read_text()


def test_of_checkpoints_that_cannot_be_told_apart_the_nearest_to_the_reference_wins(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", gold=rewards(2.0), gold_start=rewards(1.0, seed=1), kl=6.0)
    keep(run, 25, rewards(1.3, seed=2), 1.0)
    keep(run, 75, rewards(1.99, seed=3), 3.0)
    found = summarize(tmp_path).choice
    assert found.recommended is not None and found.recommended.step == 75
    assert not any("falls" in note for note in found.notes)
    assert [verdict.tied for verdict in found.verdicts] == [False, True, True]


def test_only_what_was_kept_can_be_chosen(tmp_path: Path) -> None:
    run = overtuned(tmp_path)
    for step in (30, 60):
        (run / "path" / f"step-{step}").rmdir()
    found = summarize(tmp_path).choice
    assert found.recommended is not None and found.recommended.step is None and len(found.verdicts) == 1


def test_an_early_checkpoint_beyond_the_budget_or_without_gain_is_not_eligible(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", gold=rewards(1.5), gold_start=rewards(1.0, seed=1), kl=3.0)
    keep(run, 25, rewards(1.0, seed=2), 0.5)
    keep(run, 75, rewards(2.5, seed=3), 11.0)
    first, second, _ = summarize(tmp_path).choice.verdicts
    assert "does not beat the reference" in first.why_not[0] and "over the budget of 10" in second.why_not[0]


def test_where_a_run_was_gated_a_checkpoint_without_a_gate_of_its_own_is_not_eligible(tmp_path: Path) -> None:
    run = overtuned(tmp_path)
    for folder in (run / "evaluation", run / "evaluation" / "step-60"):
        folder.mkdir(parents=True)
        (folder / "result.json").write_text(json.dumps({"status": "done", "gate": {"passed": True}}))
    ungated, gated, end = summarize(tmp_path).choice.verdicts
    assert ungated.why_not == ("no regression gate was run on it",) and not gated.why_not and not end.why_not


def test_what_was_kept_at_the_last_step_is_the_run_s_end_and_no_further_one(tmp_path: Path) -> None:
    run = overtuned(tmp_path)  # as where patience ended it at step 60
    (run / "result.json").write_text(json.dumps(json.loads((run / "result.json").read_text()) | {"steps": 60}))
    assert [verdict.run.step for verdict in summarize(tmp_path).choice.verdicts] == [30, None]


def test_a_run_that_chance_alone_may_have_made_fall_is_not_said_to_fall(tmp_path: Path) -> None:
    run = write_run(tmp_path, "a", gold=rewards(2.0), gold_start=rewards(1.0, seed=1), kl=6.0)
    for step, mean in ((25, 1.99), (50, 2.068), (75, 2.0)):
        keep(run, step, rewards(mean, seed=step), 3.0)
    choice = summarize(tmp_path).choice
    fall = choice.quality.compare(choice.verdicts[1].run, choice.verdicts[3].run)
    assert fall is not None and fall.low > 0 and fall.p < 0.05 < 3 * fall.p  # the highest of three
    assert not any("falls" in note for note in choice.notes)


def test_what_the_winner_measured_on_the_test_split_is_that_of_its_own_weights(tmp_path: Path) -> None:
    run = overtuned(tmp_path)
    for folder, reward in ((run, 1.11), (run / "path" / "step-60", 2.22)):
        (folder / "test.json").write_text(json.dumps({"gold/reward": reward}))
    (line,) = [line for line in describe(summarize(tmp_path)) if "test split" in line]
    assert "2.22" in line and "1.11" not in line
