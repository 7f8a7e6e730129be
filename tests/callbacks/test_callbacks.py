"""The callbacks in plain TRL trainers: what they measure, when, and that they change nothing in training."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from dpo_kit.callbacks.callbacks import ImplicitReward, KLDrift, PreferenceMargin
from dpo_kit.callbacks.drift import Drift
from dpo_kit.callbacks.probe import PairProbe
from dpo_kit.callbacks.reference import Reference
from dpo_kit.callbacks.scores import Scores, preference_metrics, reward_metrics
from dpo_kit.errors import ModelError
from dpo_kit.model.sampling import Sample
from dpo_kit.run import quiet
from dpo_kit.trainer.measuring import ProbeAlone
from tests import tiny

HELD_OUT = tiny.pairs(12, prompts=6, seed=9)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("callbacks"))


@pytest.fixture(scope="module")
def dropping_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.saved_model(tmp_path_factory.mktemp("dropout"), dropout=0.2)


def watch(trainer: Any, rows: list[dict[str, Any]] = HELD_OUT, **options: Any) -> tuple[PairProbe, KLDrift]:
    """All three callbacks on a trainer; `options` go to KLDrift, those named below to the probe and the
    reference.
    """
    reference = Reference(trainer, **{key: options.pop(key) for key in ("reload", "state_dir") if key in options})
    given = {key: options.pop(key) for key in ("beta", "saturation", "path") if key in options}
    probe = PairProbe(trainer, rows, reference=reference, **given)
    drift = KLDrift(trainer, rows, reference=reference, **{"max_new_tokens": 6, **options})
    for callback in (PreferenceMargin(probe), ImplicitReward(probe), drift):
        trainer.add_callback(callback)
    return probe, drift


def logged(trainer: Any, key: str) -> dict[int, float]:
    """Values of a metric by step, the last of each step."""
    return {entry["step"]: entry[key] for entry in trainer.state.log_history if key in entry}


def own_logs(trainer: Any) -> list[dict[str, float]]:
    """What TRL itself logged, without timings."""
    timed = ("runtime", "per_second", "flos")
    kept = [entry for entry in trainer.state.log_history if not any(key.startswith("probe/") for key in entry)]
    return [{key: value for key, value in entry.items() if not any(t in key for t in timed)} for entry in kept]


VARIANTS = [(kind, False) for kind in tiny.TRAINERS] + [("dpo", True), ("orpo", True)]


@pytest.mark.parametrize(("kind", "lora"), VARIANTS)
def test_training_is_the_same_bit_for_bit_with_and_without(
    kind: str, lora: bool, dropping_folder: str, tmp_path: Path
) -> None:
    ends = []
    for watched in (False, True):
        peft_config = tiny.LORA if lora else None
        trainer = tiny.trainer(kind, dropping_folder, tmp_path, disable_dropout=False, peft_config=peft_config)
        if watched:
            watch(trainer, tiny.unary(8) if kind == "kto" else HELD_OUT)
        trainer.train()
        ends.append((own_logs(trainer), [parameter.detach() for parameter in trainer.model.parameters()]))
    assert ends[0][0] == ends[1][0] and len(ends[0][0]) >= 7
    assert all(torch.equal(one, other) for one, other in zip(ends[0][1], ends[1][1], strict=True))
    assert any("probe/kl_forward_rb_nats" in entry for entry in trainer.state.log_history)


def test_dropout_is_on_in_the_test_above(folder: str, dropping_folder: str, tmp_path: Path) -> None:
    losses = []
    for weights in (folder, dropping_folder):  # the same weights, without and with dropout
        trainer = tiny.trainer("dpo", weights, tmp_path, disable_dropout=False)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] != losses[1]


@pytest.mark.parametrize("lora", [False, True])
def test_rewards_and_margins_are_those_that_dpo_logs(lora: bool, folder: str, tmp_path: Path) -> None:
    rows = tiny.pairs(16)
    peft_config = tiny.LORA if lora else None
    trainer = tiny.trainer("dpo", folder, tmp_path, rows=rows, beta=0.3, peft_config=peft_config)
    watch(trainer, rows, beta=0.3, saturation="dpo")
    trainer.train()
    names = {"margins": "reward_margin", "chosen": "reward_chosen", "rejected": "reward_rejected"}
    for theirs, ours in {**names, "accuracies": "accuracy"}.items():
        expected = logged(trainer, f"eval_rewards/{theirs}")
        found = logged(trainer, f"probe/{ours}")
        assert set(found) == {0, 2, 4} and set(expected) == {2, 4}
        assert [found[step] for step in (2, 4)] == pytest.approx([expected[step] for step in (2, 4)], abs=1e-4)
    assert abs(logged(trainer, "probe/reward_margin")[4]) > 1e-2
    assert logged(trainer, "probe/accuracy")[0] == 0.5


def test_class_rewards_are_those_that_kto_logs(folder: str, tmp_path: Path) -> None:
    rows = tiny.unary(16)
    trainer = tiny.trainer("kto", folder, tmp_path, rows=rows, beta=0.2)
    watch(trainer, rows, beta=0.2)
    trainer.train()
    for side in ("chosen", "rejected"):
        expected, found = logged(trainer, f"eval_rewards/{side}"), logged(trainer, f"probe/reward_{side}")
        assert found[4] == pytest.approx(expected[4], abs=1e-4)
    gap = logged(trainer, "probe/logratio_chosen_nats")[4] - logged(trainer, "probe/logratio_rejected_nats")[4]
    assert logged(trainer, "probe/class_gap_nats")[4] == pytest.approx(gap)
    assert (
        logged(trainer, "probe/auc_low")[4] <= logged(trainer, "probe/auc")[4] <= logged(trainer, "probe/auc_high")[4]
    )
    assert not logged(trainer, "probe/accuracy")


@pytest.mark.parametrize("kind", ["orpo", "cpo", "simpo"])
def test_methods_without_a_reference_are_measured_from_their_own_start(kind: str, folder: str, tmp_path: Path) -> None:
    rows = tiny.pairs(16)
    trainer = tiny.trainer(kind, folder, tmp_path, rows=rows)
    start = tiny.LlamaForCausalLM.from_pretrained(folder)
    probe, _ = watch(trainer, rows, reload=lambda: start)
    trainer.train()
    sums = [_plain_mean(trainer.model, start, probe, side) for side in (0, 1)]
    found = [logged(trainer, f"probe/logratio_{side}_nats") for side in ("chosen", "rejected")]
    assert [each[0] for each in found] == [0, 0]
    assert [each[4] for each in found] == pytest.approx(sums, abs=1e-4) and abs(sums[0]) > 1e-2
    assert logged(trainer, "probe/kl_reverse_rb_nats").keys() == {0, 2, 4}
    assert not logged(trainer, "probe/reward_margin")


def _plain_mean(policy: Any, start: Any, probe: PairProbe, side: int) -> float:
    half = len(probe.rows)
    totals = []
    for prompt, completion in probe._sequences[side * half : (side + 1) * half]:
        with torch.no_grad():
            logits = [m.eval()(torch.tensor([prompt + completion])).logits[0] for m in (policy, start)]
        rows = [each.log_softmax(-1) for each in logits]
        at = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        totals.append(float((rows[0] - rows[1])[at, completion].sum()))
    return sum(totals) / half


def test_cadence_is_pairs_and_forward_at_each_evaluation_and_reverse_at_start_half_way_and_end(
    folder: str, tmp_path: Path
) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path, max_steps=6, eval_steps=1)
    watch(trainer)
    trainer.train()
    assert logged(trainer, "probe/margin_nats").keys() == set(range(7))
    assert logged(trainer, "probe/kl_forward_rb_nats").keys() == set(range(7))
    assert logged(trainer, "probe/kl_reverse_rb_nats").keys() == {0, 3, 6}
    margins = [entry["step"] for entry in trainer.state.log_history if "probe/margin_nats" in entry]
    assert margins == list(range(7))  # each step once


@pytest.mark.parametrize(
    ("steps", "every", "moments", "expected"),
    [
        (8, 1, 4, {0, 2, 4, 6, 8}),
        (8, 3, 4, {0, 3, 6, 8}),
        (8, 4, 4, {0, 4, 8}),
        (6, 1, 2, {0, 3, 6}),
        (7, 2, 3, {0, 2, 4, 7}),
    ],
)
def test_the_policy_is_sampled_at_the_evaluations_nearest_to_moments_spread_evenly(
    steps: int, every: int, moments: int, expected: set[int], folder: str, tmp_path: Path
) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path, max_steps=steps, eval_steps=every)
    watch(trainer, moments=moments)
    trainer.train()
    assert logged(trainer, "probe/kl_reverse_rb_nats").keys() == expected


def test_runs_of_one_reference_draw_its_samples_once_and_measure_on_the_same(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    honest = Drift.draw
    monkeypatch.setattr(Drift, "draw", lambda self, model, *a: (drawn.append(1), honest(self, model, *a))[1])
    samples = []
    for beta in (0.1, 0.3):
        trainer = tiny.trainer("dpo", folder, tmp_path, beta=beta)
        _, drift = watch(trainer, shared=tmp_path)
        drift.prepare()
        assert drift._prepared is not None
        samples.append([each.token_ids for each in drift._prepared.samples])
    assert samples[0] == samples[1] and len(drawn) == 1
    _, other = watch(tiny.trainer("dpo", folder, tmp_path), shared=tmp_path, max_new_tokens=5)
    other.prepare()
    assert len(drawn) == 2  # another limit, other samples


def test_without_evaluations_there_are_still_start_and_end(folder: str, tmp_path: Path) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path, eval_strategy="no", max_steps=2)
    watch(trainer)
    trainer.train()
    for key in ("probe/margin_nats", "probe/kl_forward_rb_nats", "probe/kl_reverse_rb_nats"):
        assert logged(trainer, key).keys() == {0, 2}


def test_the_first_and_the_last_measurement_are_announced(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(quiet, "SILENCE", -1.0)
    trainer = tiny.trainer("dpo", folder, tmp_path, eval_strategy="no", max_steps=1)
    watch(trainer)
    with caplog.at_level("INFO", "dpo_kit"):
        trainer.train()
    said = [record.getMessage().rsplit(": ", 1)[0] for record in caplog.records if record.message.endswith(" s")]
    measured = ["held-out rows", "held-out rows", "answers for the KL"]  # margin and reward, of one pass
    assert said == [f"{moment} measurement: {what}" for moment in ("first", "last") for what in measured]


def test_kl_is_zero_at_the_start_and_finite_with_error_and_shares_after(folder: str, tmp_path: Path) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path)
    watch(trainer)
    trainer.train()
    for direction in ("forward", "reverse"):
        name = f"probe/kl_{direction}_rb_nats"
        assert logged(trainer, name)[0] == 0 and logged(trainer, name)[4] > 1e-3
        assert 0 < logged(trainer, f"{name}_se")[4] < math.inf
        assert 0 < logged(trainer, f"{name}_per_token")[4] < logged(trainer, name)[4]
        assert 0 <= logged(trainer, f"{name}_cut_share")[4] <= 1
        assert f"probe/kl_{direction}_k1_nats" in json.dumps(trainer.state.log_history)


def test_at_the_start_both_directions_of_the_kl_are_one_pass(folder: str, tmp_path: Path, monkeypatch: Any) -> None:
    reversed_at, reverse = [], Drift.reverse
    monkeypatch.setattr(
        Drift, "reverse", lambda self, *given: reversed_at.append(trainer.state.global_step) or reverse(self, *given)
    )
    trainer = tiny.trainer("dpo", folder, tmp_path, peft_config=tiny.LORA)
    watch(trainer)
    trainer.train()
    assert reversed_at == [2, 4]
    entries = [entry for entry in trainer.state.log_history if "probe/kl_reverse_rb_nats" in entry]
    assert entries[0]["step"] == 0 and entries[0].keys() == entries[-1].keys()


def test_the_two_pair_callbacks_share_one_forward_pass(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = tiny.trainer("dpo", folder, tmp_path)
    calls: list[str] = []
    original = PairProbe._score

    def counted(self: PairProbe, model: Any) -> Any:
        calls.append("policy" if model is trainer.model else "reference")
        return original(self, model)

    monkeypatch.setattr(PairProbe, "_score", counted)
    probe = PairProbe(trainer, HELD_OUT)
    for callback in (PreferenceMargin(probe), ImplicitReward(probe)):
        trainer.add_callback(callback)
    trainer.train()
    assert calls == ["policy", "reference", "policy", "policy"]  # step 0 with the reference, steps 2 and 4


@pytest.mark.parametrize("alone", [False, True])
def test_one_pass_over_the_held_out_rows_serves_and_a_checkpoint_is_chosen_by_it_as_beside_trl_s_own(
    alone: bool, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "eval_steps": 1, "load_best_model_at_end": True}
    mixins = [ProbeAlone] if alone else []
    trainer = tiny.trainer("dpo", folder, tmp_path, mixins=mixins, metric_for_best_model="probe/margin_nats", **options)
    passes: list[str] = []
    monkeypatch.setattr(trainer, "evaluation_loop", counting(passes, "TRL", trainer.evaluation_loop))
    probe = PairProbe(trainer, HELD_OUT)
    monkeypatch.setattr(probe, "_score", counting(passes, "probe", probe._score))
    trainer.add_callback(PreferenceMargin(probe))
    trainer.train()
    assert passes.count("TRL") == (0 if alone else 4) and passes.count("probe") == 7  # start twice, kept model
    margins = {row["step"]: row["probe/margin_nats"] for row in trainer.state.log_history if "probe/margin_nats" in row}
    assert trainer.state.best_metric == pytest.approx(max(margins[step] for step in range(1, 5)))
    assert any("eval_loss" in row for row in trainer.state.log_history) is not alone
    assert "eval_loss" in trainer.evaluate(trainer.eval_dataset)  # other rows are asked for: TRL's own


def counting(calls: list[str], name: str, function: Any) -> Any:
    return lambda *given, **more: calls.append(name) or function(*given, **more)


def test_evaluation_metrics_choose_the_checkpoint_and_the_kept_model_is_scored_again(
    folder: str, tmp_path: Path
) -> None:
    trainer = tiny.trainer(
        "kto", folder, tmp_path, save_strategy="steps", save_steps=1, eval_steps=1, learning_rate=0.5,
        load_best_model_at_end=True, metric_for_best_model="probe/kl_forward_rb_nats", greater_is_better=False,
    )  # fmt: skip
    path = tmp_path / "probe.jsonl"
    watch(trainer, tiny.unary(8), path=path)
    trainer.train()
    by_step = [(e["step"], e["probe/class_gap_nats"]) for e in trainer.state.log_history if "probe/class_gap_nats" in e]
    best = dict(by_step[:-1])[1]
    assert trainer.state.best_global_step == 1  # KL only grows
    assert by_step[-1] == (4, pytest.approx(best, abs=1e-4)) and len(by_step) == 6
    last = [json.loads(line) for line in path.open()][-8:]
    chosen = [line["logratio_chosen_nats"] for line in last if line["logratio_chosen_nats"] is not None]
    rejected = [line["logratio_rejected_nats"] for line in last if line["logratio_rejected_nats"] is not None]
    assert sum(chosen) / 4 - sum(rejected) / 4 == pytest.approx(best, abs=1e-4)


class Stop(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("kind", ["dpo", "orpo"])
def test_a_resumed_run_measures_against_the_same_start_and_skips_the_identity(
    kind: str, folder: str, tmp_path: Path
) -> None:
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    whole = tiny.trainer(kind, folder, tmp_path / "whole", **options)
    watch(whole)
    whole.train()
    stopped = tiny.trainer(kind, folder, tmp_path / "run", **options)
    watch(stopped, state_dir=tmp_path / "state")
    stopped.add_callback(Stop())
    stopped.train()
    resumed = tiny.trainer(kind, folder, tmp_path / "run", **options)
    watch(resumed, state_dir=tmp_path / "state")
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for key in ("probe/margin_nats", "probe/kl_forward_rb_nats"):
        assert logged(resumed, key)[4] == pytest.approx(logged(whole, key)[4], abs=1e-5)
        assert logged(resumed, key)[4] != 0


def test_a_resumed_run_whose_start_is_gone_is_refused(folder: str, tmp_path: Path) -> None:
    trainer = tiny.trainer("orpo", folder, tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    trainer.train()
    resumed = tiny.trainer("orpo", folder, tmp_path)
    watch(resumed)
    with pytest.raises(ModelError, match=r"begins at step 2.*reload="):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_rows_beyond_the_cache_give_k1_at_evaluations_and_reload_for_the_rest(folder: str, tmp_path: Path) -> None:
    loads: list[int] = []

    def reload() -> Any:
        loads.append(trainer.state.global_step)
        return tiny.LlamaForCausalLM.from_pretrained(folder)

    trainer = tiny.trainer("orpo", folder, tmp_path, max_steps=6, eval_steps=1)
    watch(trainer, reload=reload, cache_bytes=0)
    trainer.train()
    assert logged(trainer, "probe/kl_forward_rb_nats").keys() == {0, 3, 6} == set(loads)
    assert logged(trainer, "probe/kl_reverse_rb_nats").keys() == {0, 3, 6}
    assert logged(trainer, "probe/kl_forward_k1_nats").keys() == set(range(7))
    assert logged(trainer, "probe/kl_forward_k1_nats_per_token").keys() == {1, 2, 4, 5, 6}
    cached = tiny.trainer("orpo", folder, tmp_path, max_steps=6, eval_steps=1)
    watch(cached)
    cached.train()
    for step in range(1, 7):
        expected = logged(cached, "probe/kl_forward_k1_nats")[step]
        assert logged(trainer, "probe/kl_forward_k1_nats")[step] == pytest.approx(expected, abs=1e-4)
    assert logged(cached, "probe/kl_forward_rb_nats").keys() == set(range(7))
    assert logged(cached, "probe/kl_reverse_rb_nats").keys() == {0}  # nothing to measure it against later


def test_a_wrong_reload_is_refused_at_the_start(folder: str, tmp_path: Path) -> None:
    trainer = tiny.trainer("orpo", folder, tmp_path)
    watch(trainer, reload=lambda: tiny.model(seed=5))
    with pytest.raises(ModelError, match="step 0"):
        trainer.train()


def test_a_reference_that_trl_moves_is_not_what_drift_is_measured_from(folder: str, tmp_path: Path) -> None:
    trainer = tiny.trainer(
        "dpo", folder, tmp_path, sync_ref_model=True, ref_model_sync_steps=1, ref_model_mixup_alpha=1.0
    )
    start = tiny.LlamaForCausalLM.from_pretrained(folder)
    probe, _ = watch(trainer)
    trainer.train()
    assert logged(trainer, "probe/kl_reverse_rb_nats").keys() == {0}  # later the start is not there to be run
    expected = _plain_mean(trainer.model, start, probe, 0)
    assert abs(expected) > 1e-2 and logged(trainer, "probe/logratio_chosen_nats")[4] == pytest.approx(
        expected, abs=1e-4
    )


@pytest.mark.parametrize("lora", [False, True])
def test_bf16_autocast_passes_the_identity_and_measures(lora: bool, folder: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bf16": True, "gradient_checkpointing": True}
    trainer = tiny.trainer("dpo", folder, tmp_path, peft_config=tiny.LORA if lora else None, **options)
    watch(trainer, beta=0.1, saturation="dpo")
    trainer.train()
    assert logged(trainer, "probe/kl_reverse_rb_nats").keys() == {0, 2, 4}
    assert logged(trainer, "probe/kl_forward_rb_nats")[0] == pytest.approx(0, abs=1e-3)
    assert 1e-4 < logged(trainer, "probe/kl_forward_rb_nats")[4] < 100
    assert trainer.model.is_gradient_checkpointing


def test_hooks_see_the_fresh_samples_and_what_they_return_is_logged(folder: str, tmp_path: Path) -> None:
    seen: dict[int, list[Sample]] = {}

    def judge(step: int, samples: list[Sample]) -> dict[str, float]:
        seen[step] = samples
        return {"gold/reward": float(len(samples))}

    trainer = tiny.trainer("dpo", folder, tmp_path, learning_rate=0.1)
    watch(trainer, on_samples=[judge], samples_per_prompt=3)
    trainer.train()
    assert seen.keys() == logged(trainer, "gold/reward").keys() == {0, 2, 4}
    assert logged(trainer, "gold/reward")[4] == 18  # six distinct prompts, three samples each
    assert {sample.row["prompt_id"] for sample in seen[4]} == {row["prompt_id"] for row in HELD_OUT}
    assert [each.token_ids for each in seen[0]] != [each.token_ids for each in seen[4]]


def scores(chosen: list[float], rejected: list[float], tokens: tuple[int, int] = (10, 5)) -> Scores:
    prompts = [f"x{index}" for index in range(len(chosen))]
    lengths = [torch.full((len(chosen),), length) for length in tokens]
    first, second = (torch.tensor(each, dtype=torch.float64) for each in (chosen, rejected))
    return Scores(3, True, first, second, lengths[0], lengths[1], prompts, prompts)


def test_metrics_of_pairs_agree_with_hand_worked_numbers() -> None:
    found = scores([10.0, -20.0], [-10.0, -40.0])
    values = preference_metrics(found, 0.1, "dpo") | reward_metrics(found, 0.1)
    expected = {
        "probe/margin_nats": 20.0,
        "probe/reward_margin": 2.0,
        "probe/accuracy": 1.0,
        "probe/logratio_chosen_nats": -5.0,
        "probe/logratio_rejected_nats": -25.0,
        "probe/reward_chosen": -0.5,
        "probe/reward_rejected": -2.5,
        "probe/displacement": 0.5,
        "probe/both_down": 0.5,
        "probe/saturation": 1 - 2 / (1 + math.exp(2)),
        "probe/length_rule_accuracy": 1.0,
    }
    assert {key: values[key] for key in expected} == pytest.approx(expected)
    assert values["probe/accuracy_low"] < 0.5 and values["probe/accuracy_high"] == pytest.approx(1)
    expected = {"logratio_chosen_nats": (-20, -5, 10), "logratio_rejected_nats": (-40, -25, -10)}
    for name, ends in (expected | {"margin_nats": (20, 20, 20)}).items():  # from the one pair to the other
        assert [values[f"probe/{name}{end}"] for end in ("_low", "", "_high")] == pytest.approx(ends), name
    assert [values[f"probe/reward_chosen{end}"] for end in ("_low", "", "_high")] == pytest.approx([-2, -0.5, 1])
    assert [values[f"probe/reward_margin{end}"] for end in ("_low", "", "_high")] == pytest.approx([2, 2, 2])
    assert "probe/floor_nats" not in values
    assert preference_metrics(replace(found, floor_nats=0.3), 0.1, "dpo")["probe/floor_nats"] == 0.3
    assert "probe/accuracy_chosen_shorter" not in values  # no chosen is the shorter
    # per token: (1 - (-2)) and (-2 - (-8)), mean 4.5; 2 tau gap
    assert preference_metrics(found, 0.1, "ipo")["probe/saturation"] == pytest.approx(0.9)


def test_without_a_beta_that_is_a_distance_nothing_is_scaled_by_one() -> None:
    values = preference_metrics(scores([1.0], [0.5]), None, "dpo") | reward_metrics(scores([1.0], [0.5]), None)
    assert not {key for key in values if "reward" in key or "saturation" in key or "brier" in key}
    assert values["probe/margin_nats"] == 0.5
