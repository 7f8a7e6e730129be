"""Which measures can choose the best checkpoint of a run or stop it early. Loaded where one is named.

`trl.metric_for_best_model` must be there at every evaluation: transformers fails with a KeyError in the middle of a
run, or waits in silence, where it is not.
"""

from collections.abc import Iterable, Iterator

from dpo_kit.config.limits import OURS
from dpo_kit.config.settings import Callbacks, Settings
from dpo_kit.errors import did_you_mean

PAIRS = ("accuracy", "accuracy_low", "accuracy_high", "margin_nats", "margin_nats_low", "margin_nats_high")
UNARY = ("auc", "auc_low", "auc_high", "class_gap_nats")
REWARDS = ("reward_margin", "log_loss", "brier")
SIDES = ("logratio_chosen_nats", "logratio_rejected_nats", "displacement")
SIDE_REWARDS = ("reward_chosen", "reward_rejected")
DRIFT = ("kl_forward_k1_nats",)
SCALE = 1_000_000  # of shares of the run, as transformers compares them
LOWER_IS_BETTER = ("log_loss", "brier", *DRIFT)
OF_ONE_CLASS = ("rewards/", "logps/", "logits/")  # TRL's, missing where a batch of unary rows has one class only


def selection_faults(settings: Settings) -> Iterator[str]:
    """Why no checkpoint could be chosen, or no run stopped early, as the config says."""
    trl, patience, method = settings.trl, settings.callbacks.patience, settings.method
    metric = str(trl["metric_for_best_model"] or "").removeprefix("eval_")
    key = f"trl.metric_for_best_model={metric}"
    if patience is not None and not metric:
        yield f"callbacks.patience={patience} needs a measure to wait for: add trl.metric_for_best_model=probe/accuracy"
    if patience is not None and trl["eval_strategy"] == "no":
        yield f"callbacks.patience={patience} counts evaluations, and trl.eval_strategy=no has none"
    if metric and settings.callbacks.eval_loss is False and not metric.startswith(OURS):
        yield f"{key} is measured by TRL's evaluation: leave callbacks.eval_loss=false out"
    if metric.startswith(OURS):
        yield from _probe_faults(metric, settings)
    elif method.rows == "prompts" and (metric or trl["load_best_model_at_end"]):
        why = f"is not measured by method={method.name}, which has no loss on given answers"
        yield f"{key if metric else key + 'loss'} {why}: take probe/accuracy, or probe/kl_forward_k1_nats"
    elif method.rows == "unary" and metric.startswith(OF_ONE_CLASS):
        why = f"is missing where an evaluation batch of method={method.name} has one class only"
        yield f"{key} {why}: take probe/accuracy, or probe/auc where the held-out rows are unary"
    if trl["save_strategy"] == "best":
        if not trl["metric_for_best_model"]:
            yield "trl.save_strategy=best needs a measure to judge by: add trl.metric_for_best_model=probe/accuracy"
        if trl["eval_strategy"] == "no":
            yield "trl.save_strategy=best saves after evaluations, and trl.eval_strategy=no has none"
    elif trl["load_best_model_at_end"]:
        if trl["eval_strategy"] != trl["save_strategy"]:
            rule = f"trl.save_strategy must be best or {trl['eval_strategy']} as trl.eval_strategy is"
            why = "trl.load_best_model_at_end=true needs a checkpoint at every evaluation"
            yield f"{why}: {rule}, got {trl['save_strategy']}"
        steps, every = trl["save_steps"], trl["eval_steps"]
        if trl["eval_strategy"] == "steps" and steps and every and (steps < 1) != (every < 1):
            rule = "must both be numbers of steps or both shares of the run to keep the best model"
            yield f"trl.save_steps and trl.eval_steps {rule}, got {steps:g} and {every:g}"
        elif trl["eval_strategy"] == "steps" and steps and every and steps * SCALE % (every * SCALE):
            yield f"trl.save_steps must be a multiple of trl.eval_steps={every:g} to keep the best model, got {steps:g}"


def _probe_faults(metric: str, settings: Settings) -> Iterator[str]:
    usable = measured_keys(settings.callbacks, rewards=settings.method.implicit_reward)
    key, every = f"trl.metric_for_best_model={metric}", measured_keys(Callbacks.model_construct(), rewards=True)
    own = metric.removeprefix("custom/") in settings.callbacks.sample_metrics
    if metric in usable:
        return
    if metric in every:
        rewards = "" if settings.method.implicit_reward else ", and a method whose beta makes a reward"
        yield f"{key} is not measured in this run: it needs callbacks=default{rewards}"
    elif metric.startswith(("gold/", "probe/kl_reverse", "probe/sample_tokens")) or own:
        yield f"{key} is measured at a few moments only (callbacks.path): take one of {', '.join(every[:4])}, …"
    else:
        meant = did_you_mean(metric, [*every, *usable], f"; there are {', '.join(every)}")
        yield f"{key} is not measured at every evaluation{meant}"


def measured_keys(callbacks: Callbacks, *, rewards: bool) -> list[str]:
    """The probe's keys that are there at every evaluation, whatever the kind of the held-out rows."""
    margins, implicit = (*PAIRS, *UNARY, *(REWARDS if rewards else ())), (*SIDES, *(SIDE_REWARDS if rewards else ()))
    groups = {"preference_margin": margins, "implicit_reward": implicit, "kl_drift": DRIFT}
    probed = [f"probe/{key}" for flag, keys in groups.items() if getattr(callbacks, flag, True) for key in keys]
    return [*probed, *(f"custom/{name}" for name in callbacks.metrics)]


def kind_fault(metric: str | None, kind: str, metrics: Iterable[str] = ()) -> str | None:
    """Why rows of this kind lack the measure `metric`, or are none for the user's own `metrics`; None otherwise."""
    name, given = str(metric or "").removeprefix("eval_"), f"trl.metric_for_best_model={metric}"
    key = name.removeprefix("probe/")
    if kind == "unary" and key in PAIRS + REWARDS:
        return f"{given} needs held-out pairs, and these rows are unary: take probe/auc"
    if kind == "prompts" and (name.startswith("custom/") or key in (*PAIRS, *UNARY, *REWARDS, *SIDES, *SIDE_REWARDS)):
        return f"{given} needs held-out pairs, and these rows are prompts alone"
    if kind == "prompts" and (names := ", ".join(metrics)):
        remedy = "take callbacks.sample_metrics, which measures the policy's own answers, or held-out pairs (data.eval)"
        return f"callbacks.metrics ({names}) measures held-out answers, and these rows are prompts alone: {remedy}"
    if kind == "pairs" and key in UNARY:
        return f"{given} is for unary held-out rows, and these are pairs: take probe/accuracy"
    return None


def greater_is_better(metric: str | None) -> bool | None:
    """False for what should be small; None where transformers' own rule holds (small where the name ends in loss)."""
    return False if str(metric or "").removeprefix("eval_").removeprefix("probe/") in LOWER_IS_BETTER else None
