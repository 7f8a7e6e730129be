"""What is measured during a run: the probe's callbacks, the gold reward where it is known, and where the numbers go."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, repeat
from typing import Any

from hydra.utils import instantiate

from dpo_kit.callbacks.callbacks import ImplicitReward, KLDrift, OwnMetrics, Patience, PreferenceMargin
from dpo_kit.callbacks.gold import GoldFigures, load_gold
from dpo_kit.callbacks.preview import Preview
from dpo_kit.callbacks.probe import PairProbe
from dpo_kit.config.extensions import call_metrics
from dpo_kit.config.settings import Settings
from dpo_kit.data.fresh import distinct_prompts
from dpo_kit.data.prepare import Prepared, Rows
from dpo_kit.data.rows import ANSWERS, Kind
from dpo_kit.model.chats import answer_text
from dpo_kit.model.load import load_reference
from dpo_kit.model.random_state import forked_random
from dpo_kit.model.sampling import Sample
from dpo_kit.model.scoring import Reference
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import append_row
from dpo_kit.run.processes import is_writer
from dpo_kit.run.redact import redact_text
from dpo_kit.run.tracking import Tracker
from dpo_kit.trainer.prefix import share_prefixes, shares_prefixes
from dpo_kit.trainer.recorder import Recorder, show_progress
from dpo_kit.trainer.reference_store import StoredReference
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


def with_probe_alone(trainer: type) -> type:
    """The class `trainer` without TRL's own evaluation during training."""
    return type(trainer.__name__, (ProbeAlone, trainer), {})


def add_callbacks(trainer: Any, settings: Settings, data: Prepared, run: RunDirectory, tracker: Tracker) -> None:
    """Give `trainer` everything that measures and records; nothing of it changes training."""
    wanted = settings.callbacks
    trainer.add_callback(Recorder(run.metrics, tracker))
    reference = build_reference(trainer, settings, run)
    trainer.add_callback(StartCheck(trainer, reference))
    rows = probe_rows(data, settings)
    if data.kind == "prompts":
        log.info("the held-out rows have no answers: KL drift is measured, preferences are not")
    elif wanted.preference_margin or wanted.implicit_reward or wanted.metrics:
        probe = PairProbe(
            trainer,
            rows,
            beta=settings.beta if settings.method.implicit_reward else None,
            saturation=settings.method.saturation,
            reference=reference,
            path=run.probe,
        )
        if wanted.preference_margin:
            trainer.add_callback(PreferenceMargin(probe))
        if wanted.implicit_reward:
            trainer.add_callback(ImplicitReward(probe))
        if wanted.metrics:
            trainer.add_callback(OwnMetrics(probe, wanted.metrics))
    if wanted.kl_drift:
        prompts = distinct_prompts(data.select)[: wanted.prompts]
        hooks = sample_hooks(trainer, settings, run)
        drift = KLDrift(
            trainer,
            prompts,
            reference=reference,
            max_new_tokens=wanted.max_new_tokens,
            on_samples=hooks,
            shared=trainer.folder if isinstance(trainer, StoredReference) else None,
        )
        trainer.add_callback(drift)
        if predicts(settings):
            judge = GoldFigures(load_gold(str(settings.data.gold)), trainer).reward
            trainer.add_callback(Preview(drift.drift, settings.beta, wanted.preview, run.preview, judge))
    for own in wanted.extra:
        trainer.add_callback(instantiate(own))
    if wanted.patience is not None:
        trainer.add_callback(Patience(early_stopping_patience=wanted.patience))  # after what it waits for
    show_progress(trainer)


def predicts(settings: Settings) -> bool:
    """Whether this run predicts those of `callbacks.preview`: the one of least beta, where beta is a distance to the
    reference and the truth about samples is known."""
    below = settings.beta < min(settings.callbacks.preview, default=0.0)
    return below and settings.method.implicit_reward and settings.data.gold is not None


def probe_rows(data: Prepared, settings: Settings) -> Rows:
    """The held-out rows that an evaluation takes: `callbacks.pairs`, or as many as `callbacks.max_tokens` allows."""
    rows = data.select[: settings.callbacks.pairs]
    totals = accumulate(_tokens(row["tokens"], data.kind, settings.trl["max_length"]) for row in rows)
    return rows[: max(1, sum(total <= settings.callbacks.max_tokens for total in totals))]


def _tokens(lengths: dict[str, int], kind: Kind, max_length: int | None) -> int:
    return sum(min(lengths["prompt"] + lengths[name], max_length or sys.maxsize) for name in ANSWERS[kind])


def build_reference(trainer: Any, settings: Settings, run: RunDirectory) -> Reference:
    """The step-0 model as the run's reference, or the other one that `model.reference` names."""
    other = settings.model.reference is not None and getattr(trainer, "ref_model", None) is None
    return Reference(
        trainer,
        model=_load_reference(trainer, settings).to(trainer.model.device) if other else None,
        reload=lambda: _load_reference(trainer, settings),
        is_start=settings.model.reference is None,
        state_dir=run.probe_state,
    )


def _load_reference(trainer: Any, settings: Settings) -> Any:
    """The reference from its folder, computing as the policy does: else its values differ in the last bits."""
    reference = load_reference(settings.model)
    if shares_prefixes(trainer.model):
        share_prefixes(reference)
    return reference


def sample_hooks(
    trainer: Any, settings: Settings, run: RunDirectory
) -> list[Callable[[int, Sequence[Sample]], dict[str, float]]]:
    """What else is done with fresh samples: they are kept, and judged where the truth is known."""
    gold = load_gold(settings.data.gold) if settings.data.gold else None

    def keep(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        for row in describe_samples(step, samples, gold) if is_writer() else ():
            append_row(run.samples, row)
        return {}

    def own(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        prompts, answers = [each.row["prompt"] for each in samples], [each.text for each in samples]
        with forked_random(step):
            return call_metrics(settings.callbacks.sample_metrics, prompts, answers)

    return [keep, own, *([GoldFigures(gold, trainer)] if gold else [])]


def describe_samples(step: int, samples: Sequence[Sample], gold: Any) -> Iterator[dict[str, Any]]:
    """Rows of samples.jsonl: one sample of each prompt, so that runs can be paired by prompt later."""
    prompts, answers = [each.row["prompt"] for each in samples], [each.text for each in samples]
    rewards = [{"gold_reward": reward} for reward in gold.gold_rewards(prompts, answers)] if gold else repeat({})
    for sample, reward in zip(samples, rewards, strict=False):
        prompt = redact_text(answer_text(sample.row["prompt"]))
        row = {"step": step, "prompt_id": sample.row["prompt_id"], "prompt": prompt}
        yield row | {"answer": redact_text(sample.text), "tokens": len(sample.token_ids), "cut": sample.cut} | reward
