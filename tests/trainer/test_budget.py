"""How much is measured: chosen once from measured times, kept over a resume, the same in all runs of a sweep."""

import contextlib
import dataclasses
import random

import pytest
import torch
from safetensors.torch import load_file

from dpo_kit import ConfigError, compose, train
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.files import read_json
from dpo_kit.run.history import read_metrics
from dpo_kit.trainer import budget
from dpo_kit.trainer.budget import LEAST, Amount, Costs, choose_amount
from tests.small import few_pairs

MOST = Amount(evaluations=10, pairs=256, prompts=64, max_new_tokens=128)
QUICK = Costs(step=1.0, row=1e-6, token=1e-8, prompt=1e-6, draw=1e-6, draw_more=1e-7)
SLOW = Costs(step=1.0, row=1.0, token=0.01, prompt=1.0, draw=0.1, draw_more=0.1)


def test_the_seconds_of_measuring_are_those_of_its_passes():
    costs = Costs(step=0.0, row=1.0, token=0.5, prompt=2.0, draw=10.0, draw_more=1.0)
    assert costs.measuring(Amount(3, 5, 0, 7)) == 5 * 5  # two models at the start, three evaluations
    read, drawn = 2 * (2 + 0.5 * 4), 2 * 2 + 4 * (10 + 2)
    # forward: recorded once, compared at the start and at three evaluations; reverse: drawn thrice, read twice by two
    assert costs.measuring(Amount(3, 0, 2, 4)) == 5 * read + 3 * drawn + 4 * read
    with_truth = dataclasses.replace(costs, capability=2.5)  # at start, half-way and end
    assert with_truth.measuring(Amount(3, 0, 2, 4)) == costs.measuring(Amount(3, 0, 2, 4)) + 7.5


def test_all_is_measured_where_it_is_cheap_and_the_least_where_nothing_fits():
    assert choose_amount(MOST, QUICK, allowed=1.0) == MOST
    assert choose_amount(MOST, SLOW, allowed=1.0) == LEAST[-1]
    often = dataclasses.replace(MOST, moments=4)
    assert choose_amount(often, QUICK, allowed=1.0) == often and choose_amount(often, SLOW, allowed=1.0) == LEAST[-1]
    few = Amount(evaluations=1, pairs=2, prompts=1, max_new_tokens=7)  # there is no more than that
    assert choose_amount(few, SLOW, allowed=1.0) == few


def test_what_is_chosen_fits_and_uses_what_is_allowed():
    draw = random.Random()
    for _ in range(500):
        costs = Costs(*(10 ** draw.uniform(-6, 0) for _ in range(6)))
        allowed = 10 ** draw.uniform(-2, 3)
        amount = choose_amount(MOST, costs, allowed)
        assert all(
            low <= value <= high
            for low, value, high in zip(*(vars(a).values() for a in (LEAST[-1], amount, MOST)), strict=True)
        )
        assert costs.measuring(amount) <= allowed or amount == LEAST[-1]
        if amount != MOST and costs.measuring(amount) <= allowed:  # one halving less would have been too much
            assert 3 * costs.measuring(amount) > allowed


def test_answers_that_are_judged_stay_whole_and_are_enough_to_tell_something():
    judged = choose_amount(MOST, SLOW, allowed=1.0, judged=True)
    assert judged == dataclasses.replace(LEAST[0], max_new_tokens=MOST.max_new_tokens)
    few = Amount(evaluations=2, pairs=4, prompts=3, max_new_tokens=9)
    assert choose_amount(few, SLOW, allowed=1.0, judged=True) == few


def test_what_was_typed_stays():
    typed = choose_amount(MOST, SLOW, allowed=1.0, typed={"pairs", "evaluations"})
    assert (typed.pairs, typed.evaluations) == (256, 10) and typed.prompts == LEAST[-1].prompts


@pytest.fixture
def settings(tmp_path):
    """A run of 12 steps in which nothing that can be chosen is typed."""
    typed = ("trl.eval_steps", "callbacks.pairs", "callbacks.prompts", "trl.max_steps")
    words = [word for word in few_pairs(tmp_path / "pairs.jsonl") if not word.startswith(typed)]
    return [
        *words,
        "trl.max_steps=12",
        "callbacks.pairs=null",
        "callbacks.prompts=null",
        "callbacks.budget=0.1",
        "data.gold=null",
    ]


@contextlib.contextmanager
def costing(monkeypatch, costs):
    with monkeypatch.context() as patch:
        patch.setattr(budget, "ALWAYS", 0.5)
        patch.setattr(budget, "measure_costs", lambda *_: costs)
        yield


def measured(folder):
    run = RunDirectory(folder)
    steps = [row["step"] for row in read_metrics(run.metrics) if "probe/accuracy" in row]
    pairs = {row["pair_id"] for row in read_metrics(run.probe)}
    samples = [row for row in read_metrics(run.samples) if row["step"] == 0]
    return steps, len(pairs), len(samples)


def test_a_run_measures_what_was_chosen_and_says_what_it_took(settings, tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO", "dpo_kit")
    slow = Costs(step=0.1, row=0.01, token=0.01, prompt=0.01, draw=0.01, draw_more=0.01)
    with costing(monkeypatch, slow):
        result = train(compose(settings), tmp_path / "run")
    chosen = read_json(tmp_path / "run" / "manifest.json")["measuring"]
    assert chosen == {"evaluations": 2, "pairs": 2, "prompts": 2, "max_new_tokens": 8, "moments": 2}
    assert measured(tmp_path / "run") == ([0, 6, 12], 2, 2)
    assert max(row["tokens"] for row in read_metrics(RunDirectory(tmp_path / "run").samples)) <= 8
    assert read_json(tmp_path / "run" / "trl_config.json")["eval_steps"] == 6
    assert 0 < result.seconds["measuring"] < result.seconds["train"] <= result.seconds["run"]
    assert "measured at the start, every 6 steps and at the end: on 2 held-out rows; KL on 2 prompts" in caplog.text
    assert "of the run" in caplog.text


def test_a_judged_run_of_a_sweep_is_sampled_four_times_on_its_way_and_its_weights_are_kept(
    settings, tmp_path, monkeypatch
):
    words = [*settings, "data.gold=dpo_kit.toy", "trl.max_steps=8", "trl.save_steps=1", "trl.save_total_limit=8"]
    words += ["trl.eval_steps=1", "callbacks.pairs=2", "callbacks.prompts=4", "callbacks.max_new_tokens=8"]
    monkeypatch.setattr(budget, "sweep_folder", lambda: tmp_path)
    with costing(monkeypatch, QUICK):
        train(compose(words), tmp_path / "quick")
    run = RunDirectory(tmp_path / "quick")
    assert sorted({row["step"] for row in read_metrics(run.samples)}) == [0, 2, 4, 6, 8]
    assert sorted(path.name for path in run.path.iterdir()) == ["step-2", "step-4", "step-6"]
    for step in (2, 4, 6):
        kept, saved = (
            load_file(of / "model.safetensors") for of in (run.weights(step), run.checkpoints / f"checkpoint-{step}")
        )
        assert all(torch.equal(kept[name], saved[name]) for name in saved)
    monkeypatch.setattr(budget, "sweep_folder", lambda: None)
    with costing(monkeypatch, QUICK):
        train(compose(words), tmp_path / "alone")
    assert not RunDirectory(tmp_path / "alone").path.exists()


def test_nothing_is_drawn_to_time_it_where_reading_alone_is_too_much(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "ALWAYS", 0.0)
    monkeypatch.setattr(budget, "seconds_per_token", lambda *_: 1.0)
    monkeypatch.setattr(budget, "time_drawing", lambda *_: pytest.fail("answers were drawn"))
    train(compose([*settings, "callbacks.budget=0.01"]), tmp_path)
    assert read_json(tmp_path / "manifest.json")["measuring"] == vars(LEAST[-1])


def test_typed_keys_win_and_without_a_budget_all_is_measured(settings, tmp_path, monkeypatch):
    with costing(monkeypatch, SLOW):
        train(compose([*settings, "callbacks.pairs=6", "trl.eval_steps=3"]), tmp_path / "typed")
        assert measured(tmp_path / "typed") == ([0, 3, 6, 9, 12], 6, 2)
        train(compose([*settings, "callbacks.budget=null", "trl.max_steps=4"]), tmp_path / "all")
        assert measured(tmp_path / "all") == ([0, 1, 2, 3, 4], 8, 8)


def test_a_budget_is_a_share(settings):
    for value in ("0", "1", "1.5", "-0.1", "much"):
        with pytest.raises(ConfigError, match=r"callbacks\.budget"):
            compose([*settings, f"callbacks.budget={value}"])


def test_a_resumed_run_and_the_runs_of_a_sweep_measure_the_same(settings, tmp_path, monkeypatch):
    from dpo_kit.trainer.recorder import Recorder

    def stop(self, args, state, control, **_):
        if state.global_step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(budget, "sweep_folder", lambda: tmp_path)
    slow = Costs(step=0.1, row=0.01, token=0.01, prompt=0.01, draw=0.01, draw_more=0.01)
    with costing(monkeypatch, slow), monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Recorder, "on_step_end", stop, raising=False)
        train(compose([*settings, "trl.save_steps=2"]), tmp_path / "one")
    train(compose([*settings, "trl.save_steps=2"]), tmp_path / "one")  # all is cheap now, and yet
    train(compose([*settings, "beta=0.2"]), tmp_path / "two")
    assert measured(tmp_path / "one") == measured(tmp_path / "two") == ([0, 6, 12], 2, 2)
    assert read_json(tmp_path / "measuring.json") == read_json(tmp_path / "two" / "manifest.json")["measuring"]


def test_a_run_that_measures_nothing_chooses_nothing_not_even_for_the_runs_of_its_sweep(
    settings, tmp_path, monkeypatch
):
    monkeypatch.setattr(budget, "sweep_folder", lambda: tmp_path)
    train(compose([*settings, "callbacks=none"]), tmp_path / "plain")
    assert read_json(tmp_path / "plain" / "manifest.json")["measuring"] is None
    assert not (tmp_path / "measuring.json").exists()


def test_a_run_of_a_sweep_that_measures_more_than_the_first_one_chooses_anew(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "sweep_folder", lambda: tmp_path)
    slow = Costs(step=0.1, row=0.01, token=0.01, prompt=0.01, draw=0.01, draw_more=0.01)
    with costing(monkeypatch, slow):
        train(compose([*settings, "callbacks.kl_drift=false"]), tmp_path / "first")
        assert read_json(tmp_path / "measuring.json")["prompts"] == 0
        train(compose(settings), tmp_path / "second")
    assert measured(tmp_path / "second") == ([0, 6, 12], 2, 2)


def test_a_cadence_stays_where_all_fits_or_the_best_of_typed_checkpoints_is_kept(settings, tmp_path, monkeypatch):
    best = ["trl.load_best_model_at_end=true", "trl.metric_for_best_model=probe/accuracy"]
    with costing(monkeypatch, SLOW):
        train(compose([*settings, "trl.save_steps=4", *best]), tmp_path / "best")
    assert 4 in (kept := measured(tmp_path / "best")[0]) and len(kept) > 3
    with costing(monkeypatch, QUICK):
        train(compose([*settings, "trl.max_steps=27"]), tmp_path / "all")
    assert measured(tmp_path / "all")[0][:3] == [0, 2, 4]
