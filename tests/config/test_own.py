"""Measures and callbacks from a user's own module: what they are given, where they land, what is refused."""

import dataclasses
import os
import random
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dpo_kit import TrainingError, compose, train
from dpo_kit.callbacks.callbacks import forked_random
from dpo_kit.config.extensions import call_metrics, own_faults
from dpo_kit.config.settings import Callbacks
from dpo_kit.errors import ConfigError
from dpo_kit.export.script import write_reproduction
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import read_metrics, series
from dpo_kit.run.report.results import result_rows
from tests.conftest import ROOT
from tests.small import few_pairs, hash_model

MODULE = """
import random

from transformers import TrainerCallback


def margin(rows, scores):
    assert len(rows) == len(scores.logratio_chosen)
    return (scores.logratio_chosen - scores.logratio_rejected).mean()


def drawn(rows, scores):
    return random.random()


def words(prompts, answers):
    assert prompts[0][-1]["role"] == "user"
    return sum(len(answer.split()) for answer in answers) / len(answers)


def text(prompts, answers):
    return "many"


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step >= self.step


NUMBER = 3
"""


@pytest.fixture
def named(tmp_path, monkeypatch):
    """The name of a module of one's own, a new one for each test, in a folder of PYTHONPATH."""
    name = f"mine_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))
    return name


@pytest.mark.slow
def test_own_measures_and_callbacks_are_in_the_record_and_change_no_training(named, tmp_path):
    few = few_pairs(tmp_path / "pairs.jsonl")
    own = [
        f"callbacks.metrics={{margin: {named}.margin, drawn: {named}.drawn}}",
        f"callbacks.sample_metrics={{words: {named}.words}}",
    ]
    plain = train(compose(few), tmp_path / "plain")
    result = train(compose([*few, *own]), tmp_path / "own")
    rows = read_metrics(RunDirectory(tmp_path / "own").metrics)
    assert series(rows, "custom/margin") == pytest.approx(series(rows, "probe/margin_nats"))
    assert list(series(rows, "custom/margin")) == [0, 2, 4] and list(series(rows, "custom/words")) == [0, 2, 4]
    samples = read_metrics(RunDirectory(tmp_path / "own").samples)
    last = statistics.fmean(len(row["answer"].split()) for row in samples if row["step"] == 4)
    assert result.final["custom/words"] == pytest.approx(last)
    assert {key for key in result.final if not key.startswith("custom/")} == set(plain.final)
    assert hash_model(tmp_path / "plain") == hash_model(tmp_path / "own")
    shown = dict(row[:1] + row[2:3] for row in result_rows(dataclasses.asdict(result)))
    assert shown["words"] == f"{last:.3f}" and list(shown)[-1] == "words"


@pytest.mark.slow
def test_an_own_callback_can_stop_a_run_and_its_script_says_that_it_has_none(named, tmp_path, caplog):
    extra = f"callbacks.extra=[{{_target_: {named}.StopAt, step: 3}}]"
    result = train(compose([*few_pairs(tmp_path / "pairs.jsonl"), extra, "callbacks=none"]), tmp_path / "run")
    assert result.steps == 3 and result.status == "done"
    write_reproduction(RunDirectory(tmp_path / "run"), tmp_path / "script")
    assert f"own callbacks are not in the script ({named}.StopAt)" in caplog.text


def test_what_an_own_measure_draws_is_the_same_each_time_and_takes_nothing_from_training(named):
    def drawn():
        return random.random(), float(np.random.random()), float(torch.rand(()))

    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected, then = drawn(), drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    with forked_random(7):
        first = (call_metrics({"a": f"{named}.drawn"}, [], None), drawn())
    assert drawn() == expected
    with forked_random(7):
        assert (call_metrics({"a": f"{named}.drawn"}, [], None), drawn()) == first
    assert drawn() == then


def test_a_measure_that_gives_no_number_is_named(named):
    with pytest.raises(TrainingError, match=rf"custom/w: {named}\.text must return a number, got 'many'"):
        call_metrics({"w": f"{named}.text"}, [], [])


def faults(**given):
    return list(own_faults(Callbacks.model_construct(kl_drift=True, **given)))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("NAME.margn", "metrics.a=NAME.margn: NAME has no function or class margn; did you mean margin?"),
        ("NAMEs.margin", "no module NAMEs in the folder of the command or in PYTHONPATH; did you mean NAME?"),
        ("margin", "callbacks.metrics.a must be module.name, got margin"),
        ("NAME.NUMBER", "has no function or class NUMBER"),
        ("NAME.StopAt", "callbacks.metrics.a=NAME.StopAt must be a function of rows and scores"),
    ],
)
def test_a_measure_that_cannot_be_called_is_refused_with_the_near_miss(named, path, said):
    (fault,) = faults(metrics={"a": path.replace("NAME", named)})
    assert said.replace("NAME", named) in fault


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"step": 3}, "callbacks.extra[0] needs _target_"),
        ({"_target_": "NAME.margin"}, "must be a subclass of transformers.TrainerCallback"),
        (
            {"_target_": "NAME.StopAt", "steps": 3},
            "NAME.StopAt(step) does not fit: missing a required argument: 'step'",
        ),
        ({"_target_": "NAME.StopIt", "steps": 3}, "did you mean StopAt?"),
        ({"_target_": "subprocess.Popen", "args": "true"}, "must be a subclass of transformers.TrainerCallback"),
    ],
)
def test_a_callback_that_cannot_be_made_is_refused(named, given, said):
    given = {key: value.replace("NAME", named) if isinstance(value, str) else value for key, value in given.items()}
    (fault,) = faults(extra=[given])
    assert said.replace("NAME", named) in fault


def test_a_module_that_breaks_while_it_is_imported_is_named(named, tmp_path):
    (tmp_path / f"{named}_broken.py").write_text("1 / 0\n")
    (fault,) = faults(metrics={"a": f"{named}_broken.f"})
    assert "cannot be imported (ZeroDivisionError: division by zero)" in fault


def test_two_measures_of_one_name_and_samples_that_nobody_draws_are_refused(named):
    both = {"metrics": {"a": f"{named}.margin"}, "sample_metrics": {"a": f"{named}.words"}}
    assert "would share one key" in faults(**both)[0]
    undrawn = Callbacks.model_construct(kl_drift=False, sample_metrics=both["sample_metrics"])
    assert "callbacks.kl_drift=true draws, and it is false" in next(own_faults(undrawn))


@pytest.mark.slow
def test_an_own_measure_of_the_held_out_rows_may_choose_the_checkpoint_and_one_of_samples_may_not(named):
    best = ["trl.load_best_model_at_end=true", "trl.metric_for_best_model=custom/a"]
    compose([*best, f"callbacks.metrics={{a: {named}.margin}}"])
    with pytest.raises(ConfigError, match="at a few moments only"):
        compose([*best, f"callbacks.sample_metrics={{a: {named}.words}}"])
    with pytest.raises(ConfigError, match=r"did you mean custom/ab\?"):
        compose([*best, f"callbacks.metrics={{ab: {named}.margin}}"])
    with pytest.raises(ConfigError, match=rf"{named} has no function or class margn; did you mean margin\?"):
        compose([f"callbacks.metrics={{a: {named}.margn}}"])


@pytest.mark.slow
@pytest.mark.parametrize("program", [["-m", "dpo_kit"], [str(Path(sys.executable).parent / "dpo-kit")]], ids=str)
def test_a_module_is_found_in_the_folder_of_the_command_however_it_is_typed(program, named, tmp_path):
    words = [f"callbacks.metrics={{a: {named}.margin}}", "--cfg", "job"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *program, *words], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and f"a: {named}.margin" in done.stdout, done.stderr
