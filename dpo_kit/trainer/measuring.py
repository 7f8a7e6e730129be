"""What is measured during a run: the probe's callbacks, the gold reward where it is known, and where the numbers go."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

from hydra.utils import instantiate

from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import Prepared, Rows
from dpo_kit.model.load import load_reference
from dpo_kit.model.scoring import Reference
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.processes import is_writer
from dpo_kit.run.tracking import Tracker
from dpo_kit.trainer.budget import Budget
from dpo_kit.trainer.prefix import share_prefixes, shares_prefixes
from dpo_kit.trainer.recorder import Recorder, show_progress
from dpo_kit.trainer.rows import probe_rows
from dpo_kit.trainer.start_check import StartCheck

log = logging.getLogger(__name__)


class ProbeAlone:
    """Mixin before a TRL trainer: an evaluation during training is what its callbacks measure, in one pass over the
    held-out rows where TRL's own loop would make a second one."""

    def evaluate(self, eval_dataset: Any = None, **given: Any) -> dict[str, float]:
        """What the callbacks add to an evaluation's metrics; TRL's evaluation where it is asked for other rows."""
        trainer: Any = self
        if eval_dataset is not None:
            return super().evaluate(eval_dataset, **given)  # type: ignore[misc]
        metrics: dict[str, float] = {}
        trainer.control = trainer.callback_handler.on_evaluate(trainer.args, trainer.state, trainer.control, metrics)
        return metrics


def add_callbacks(
    trainer: Any, settings: Settings, data: Prepared, run: RunDirectory, tracker: Tracker, began: float
) -> None:
    """Give `trainer` everything that measures and records; nothing of it changes training. `began`: see Budget."""
    wanted = settings.callbacks
    trainer.add_callback(Recorder(run.metrics, tracker))
    reference = build_reference(trainer, settings, run)
    trainer.add_callback(StartCheck(trainer, reference))
    budget = Budget(trainer, settings, run, data.train, began)
    trainer.add_callback(budget)  # it decides how much is measured, so before those that do
    if data.kind == "prompts":
        log.info("the held-out rows have no answers: KL drift is measured, preferences are not")
    elif wanted.preference_margin or wanted.implicit_reward or wanted.metrics:
        budget.probe = add_probe(trainer, settings, probe_rows(data, settings), run, reference)
    if wanted.kl_drift:
        budget.drift = add_drift(trainer, settings, data.select, run, reference)
    for extra in wanted.extra:
        trainer.add_callback(instantiate(extra))
    if wanted.patience is not None:
        from dpo_kit.callbacks.callbacks import Patience

        trainer.add_callback(Patience(early_stopping_patience=wanted.patience))  # after what it waits for
    show_progress(trainer)


def add_probe(trainer: Any, settings: Settings, rows: Rows, run: RunDirectory, reference: Reference) -> Any:
    """Measures of the held-out `rows`: margin, implicit reward, and those of the user's own."""
    from dpo_kit.callbacks.callbacks import ImplicitReward, OwnMetrics, PreferenceMargin
    from dpo_kit.callbacks.probe import PairProbe

    wanted, method = settings.callbacks, settings.method
    beta = settings.beta if method.implicit_reward else None
    probe = PairProbe(trainer, rows, beta=beta, saturation=method.saturation, reference=reference, path=run.probe)
    if wanted.preference_margin:
        trainer.add_callback(PreferenceMargin(probe))
    if wanted.implicit_reward:
        trainer.add_callback(ImplicitReward(probe))
    if wanted.metrics:
        trainer.add_callback(OwnMetrics(probe, wanted.metrics))
    return probe


def add_drift(trainer: Any, settings: Settings, rows: Rows, run: RunDirectory, reference: Reference) -> Any:
    """KL along fresh samples of the prompts of `rows`; samples are kept, and judged where the truth is known."""
    from dpo_kit.callbacks.callbacks import KLDrift
    from dpo_kit.config.extensions import call_metrics
    from dpo_kit.data.fresh import distinct_prompts
    from dpo_kit.model.random_state import forked_random
    from dpo_kit.model.sampling import Sample
    from dpo_kit.run.history import append_row

    wanted, gold, hooks = settings.callbacks, None, []
    if settings.data.gold:
        from dpo_kit.callbacks.gold import GoldFigures, load_gold

        gold = load_gold(settings.data.gold)
        hooks.append(GoldFigures(gold, trainer))

    def keep(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        for row in describe_samples(step, samples, gold) if is_writer() else ():
            append_row(run.samples, row)
        return {}

    def call_own(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        prompts, answers = [sample.row["prompt"] for sample in samples], [sample.text for sample in samples]
        with forked_random(step):
            return call_metrics(wanted.sample_metrics, prompts, answers)

    drift = KLDrift(
        trainer,
        distinct_prompts(rows)[: wanted.at_most("prompts")],
        reference=reference,
        max_new_tokens=wanted.at_most("max_new_tokens"),
        on_samples=[keep, call_own, *hooks],
        shared=getattr(trainer, "folder", None),  # of the reference store
    )
    trainer.add_callback(drift)
    least = settings.beta < min(wanted.preview, default=0.0)
    if least and settings.method.implicit_reward and gold:  # where beta is a distance to the reference
        from dpo_kit.callbacks.preview import Preview

        trainer.add_callback(Preview(drift.drift, settings.beta, wanted.preview, run.preview, hooks[0].reward))
    return drift


def build_reference(trainer: Any, settings: Settings, run: RunDirectory) -> Reference:
    """The step-0 model as the run's reference, or the other one that `model.reference` names."""

    def load() -> Any:
        """From its folder, computing as the policy does: else its values differ in the last bits."""
        loaded = load_reference(settings.model)
        if shares_prefixes(trainer.model):
            share_prefixes(loaded)
        return loaded

    other = settings.model.reference is not None and getattr(trainer, "ref_model", None) is None
    return Reference(
        trainer,
        model=load().to(trainer.model.device) if other else None,
        reload=load,
        is_start=settings.model.reference is None,
        state_dir=run.probe_state,
    )


def describe_samples(step: int, samples: Sequence[Any], gold: Any) -> Iterator[dict[str, Any]]:
    """Rows of samples.jsonl: one sample of each prompt, so that runs can be paired by prompt later."""
    from dpo_kit.model.chats import answer_text
    from dpo_kit.run.redact import redact_text

    prompts, answers = [sample.row["prompt"] for sample in samples], [sample.text for sample in samples]
    rewards = [{"gold_reward": reward} for reward in gold.gold_rewards(prompts, answers)] if gold else repeat({})
    for sample, reward in zip(samples, rewards, strict=False):
        prompt = redact_text(answer_text(sample.row["prompt"]))
        row = {"step": step, "prompt_id": sample.row["prompt_id"], "prompt": prompt}
        yield row | {"answer": redact_text(sample.text), "tokens": len(sample.token_ids), "cut": sample.cut} | reward
