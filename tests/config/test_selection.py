"""Best checkpoint and early stopping by held-out measures, for every method alike; what cannot work is refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from dpo_kit import compose, train
from dpo_kit.callbacks.callbacks import Patience
from dpo_kit.callbacks.scores import Scores, preference_metrics, reward_metrics
from dpo_kit.config.best_metric import greater_is_better, kind_fault, measured_keys
from dpo_kit.config.compose import check
from dpo_kit.config.limits import needs_trl_evaluation
from dpo_kit.config.settings import Callbacks
from dpo_kit.data.other_rows import unpair
from dpo_kit.data.read import read_source
from dpo_kit.errors import ConfigError
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import read_metrics
from dpo_kit.trainer import rows as trainer_rows
from dpo_kit.trainer.arguments import decide
from tests.small import few_pairs, write_pairs

BEST = ["trl.load_best_model_at_end=true", "trl.metric_for_best_model=probe/accuracy"]


def scores(paired):
    values, lengths = torch.tensor([1.0, -2.0, 0.5]).double(), torch.tensor([4, 6, 5])
    names = ["a", "b", "c"]
    return Scores(1, paired, values, values.flip(0), lengths, lengths.flip(0), names, names)


def test_the_keys_that_may_choose_are_those_that_every_evaluation_has():
    known = set(measured_keys(Callbacks.model_construct(), rewards=True))
    there = {
        key
        for paired in (True, False)
        for key in (preference_metrics(scores(paired), 0.1, None) | reward_metrics(scores(paired), 0.1))
    }
    assert known - there == {"probe/kl_forward_k1_nats"}
    of_pairs = preference_metrics(scores(True), None, None)
    assert set(measured_keys(Callbacks.model_construct(implicit_reward=False, kl_drift=False), rewards=False)) <= {
        *of_pairs, *preference_metrics(scores(False), None, None)
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*BEST, "callbacks=none"], "probe/accuracy is not measured in this run: it needs callbacks=default"),
        (["trl.metric_for_best_model=gold/reward"], "measured at a few moments only"),
        (["trl.metric_for_best_model=probe/kl_reverse_rb_nats"], r"moments only .*: take one of probe/accuracy"),
        (
            ["trl.metric_for_best_model=probe/acuracy"],
            r"not measured at every evaluation; did you mean probe/accuracy\?",
        ),
        (["method=kto", "trl.metric_for_best_model=rewards/margins"], "has one class only: take probe/accuracy"),
        (["method=kto", "trl.metric_for_best_model=eval_rewards/margins"], "has one class only"),
        (["method=simpo", "trl.metric_for_best_model=probe/reward_margin"], "a method whose beta makes a reward"),
        (["callbacks.eval_loss=false", "trl.metric_for_best_model=loss"], "leave callbacks.eval_loss=false out"),
        (["callbacks.patience=2"], r"needs a measure to wait for: add trl\.metric_for_best_model=probe/accuracy"),
        (["callbacks.patience=2", BEST[1], "trl.eval_strategy=no"], "trl.eval_strategy=no has none"),
        (
            [*BEST, "trl.save_strategy=epoch"],
            "trl.save_strategy must be best or steps as trl.eval_strategy is, got epoch",
        ),
        ([*BEST, "trl.save_steps=25", "trl.eval_steps=10"], "must be a multiple of trl.eval_steps=10"),
    ],
)
def test_what_cannot_choose_a_checkpoint_is_refused(words, said):
    with pytest.raises(ConfigError, match=said):
        compose(words)


@pytest.mark.parametrize(
    "words",
    [
        BEST,
        [*BEST, "method=kto"],
        [*BEST, "trl.save_strategy=best", "callbacks.patience=1"],
        ["trl.metric_for_best_model=rewards/margins"],
        ["trl.metric_for_best_model=loss"],
    ],
)
def test_what_can_is_not(words):
    compose(words)


def test_measures_of_the_other_kind_of_rows_are_refused_once_the_rows_are_read(tmp_path):
    assert kind_fault("eval_probe/auc", "pairs") and kind_fault("probe/margin_nats", "unary")
    assert (
        kind_fault("probe/auc", "unary") is kind_fault("probe/accuracy", "pairs") is kind_fault(None, "unary") is None
    )
    words = [word if "probe" not in word else "trl.metric_for_best_model=probe/auc" for word in BEST]
    with pytest.raises(ConfigError, match="is for unary held-out rows, and these are pairs: take probe/accuracy"):
        train(compose([*few_pairs(tmp_path / "pairs.jsonl"), *words]), tmp_path / "run")


def test_what_prompts_alone_cannot_measure_is_refused_on_every_process(tmp_path, monkeypatch):
    assert kind_fault("eval_custom/own", "prompts") and kind_fault("custom/own", "pairs", ["own"]) is None
    assert "callbacks.metrics (one, two) measures held-out answers" in kind_fault(None, "prompts", ["one", "two"])
    monkeypatch.setattr(trainer_rows, "read_data", lambda *_: SimpleNamespace(kind="prompts"))
    given = SimpleNamespace(
        trl={"metric_for_best_model": "custom/own"}, callbacks=SimpleNamespace(metrics={"own": "a.b"})
    )
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ConfigError, match="best_model=custom/own needs held-out pairs"):
            trainer_rows.prepare_data(given, None)


def test_a_kl_and_a_loss_are_better_when_small():
    assert greater_is_better("probe/kl_forward_k1_nats") is greater_is_better("eval_probe/brier") is False
    assert greater_is_better("probe/accuracy") is greater_is_better(None) is None
    given = check(compose(["trl.metric_for_best_model=probe/log_loss"])).trl
    assert decide(given, [], 64)["greater_is_better"] is False
    assert "greater_is_better" not in decide(given | {"greater_is_better": True}, [], 64)


def evaluate_in_turn(callback, values, state):
    args = SimpleNamespace(metric_for_best_model="probe/accuracy", greater_is_better=True)
    for value in values:
        control = SimpleNamespace(should_training_stop=False)
        callback.on_evaluate(args, state, control, {"eval_probe/accuracy": value})
        state.best_metric = value if state.best_metric is None else max(state.best_metric, value)
    return control.should_training_stop


def test_a_resumed_run_goes_on_waiting():
    stopped = Patience(early_stopping_patience=2)
    state = SimpleNamespace(best_metric=None)
    assert not evaluate_in_turn(stopped, [0.6, 0.7, 0.7], state)
    resumed, forgetful = Patience(early_stopping_patience=2), Patience(early_stopping_patience=2)
    resumed.pick_up(stopped.carry())
    assert evaluate_in_turn(resumed, [0.65], state) and not evaluate_in_turn(forgetful, [0.65], state)


def unary_pairs(folder):
    """Unary rows of the first embedded pairs."""
    rows = [row.values for row in read_source(str(write_pairs(folder / "pairs.jsonl", 80)), "train")]
    lines = [{key: row[key] for key in ("prompt", "completion", "label")} for row in unpair(rows)]
    (folder / "unary.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [f"data.train={folder / 'unary.jsonl'}", "callbacks.pairs=64"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dpo", "kto", "orpo", "simpo", "kto unary"])
def test_every_method_keeps_its_best_checkpoint_and_stops_when_nothing_improves(method, tmp_path):
    name, _, unary = method.partition(" ")
    measure = "probe/auc" if unary else "probe/accuracy"
    words = [
        *few_pairs(
            tmp_path / "pairs.jsonl",
        ),
        f"method={name}",
        "trl.eval_steps=1",
        "trl.max_steps=40",
    ]
    words += [BEST[0], f"trl.metric_for_best_model={measure}", "callbacks.patience=2", "allow_learning_rate=true"]
    words += ["trl.learning_rate=3e-3", *(unary_pairs(tmp_path) if unary else [])]
    result = train(compose(words), tmp_path / "run")
    rows = [row for row in read_metrics(RunDirectory(tmp_path / "run").metrics) if measure in row and row["step"] > 0]
    by_step = {row["step"]: row[measure] for row in reversed(rows)}
    best = max(by_step.values())
    first = min(step for step, value in by_step.items() if value == best)
    assert result.steps == first + 2 < 40  # two evaluations without a better one
    assert math.isclose(result.final[measure], best, abs_tol=1e-9)  # of the kept model, scored again


@pytest.mark.parametrize(
    ("words", "runs"),
    [
        ([], False),
        (["callbacks.eval_loss=true"], True),
        (["trl.metric_for_best_model=probe/accuracy", "trl.load_best_model_at_end=true"], False),
        (["trl.metric_for_best_model=rewards/margins"], True),
        (["trl.load_best_model_at_end=true"], True),
        (["trl.lr_scheduler_type=reduce_lr_on_plateau"], True),
        (["callbacks=none"], True),
    ],
)
def test_trl_s_own_evaluation_runs_where_it_alone_gives_what_is_asked_for(words, runs):
    assert needs_trl_evaluation(check(compose(words))) is runs
