"""What is measured while a run trains: preferences and KL drift on held-out rows; loaded where either is asked for."""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

from transformers import TrainerCallback

from dpo_kit.callbacks.callbacks import ImplicitReward, KLDrift, OwnMetrics, PreferenceMargin, forked_random
from dpo_kit.callbacks.probe import PairProbe
from dpo_kit.callbacks.reference import Reference
from dpo_kit.config.extensions import call_metrics
from dpo_kit.config.settings import Settings
from dpo_kit.data.other_rows import distinct_prompts
from dpo_kit.data.prepare import Prepared
from dpo_kit.data.rows import Rows
from dpo_kit.model.chats import answer_text
from dpo_kit.model.sampling import Sample
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import append_row
from dpo_kit.run.processes import is_writer
from dpo_kit.run.redact import redact_text
from dpo_kit.trainer.budget import Budget, wanted_moments
from dpo_kit.trainer.resume.whole_or_absent import save_model


def add_measures(
    trainer: Any, settings: Settings, data: Prepared, run: RunDirectory, reference: Reference, began: float
) -> None:
    """Give `trainer` what measures the held-out rows, after what says how much is measured (`began`: see Budget)."""
    wanted, method, probe, drift = settings.callbacks, settings.method, None, None
    measures: list[TrainerCallback] = []
    if data.kind != "prompts" and wanted.scores_rows:
        beta = settings.beta if method.implicit_reward else None
        rows = data.select[: wanted.at_most("pairs")]
        probe = PairProbe(trainer, rows, beta=beta, saturation=method.saturation, reference=reference, path=run.probe)
        measures += [PreferenceMargin(probe)] if wanted.preference_margin else []
        measures += [ImplicitReward(probe)] if wanted.implicit_reward else []
        measures += [OwnMetrics(probe, wanted.metrics)] if wanted.metrics else []
    if wanted.kl_drift:
        drift, *others = measure_drift(trainer, settings, data.select, run, reference)
        measures += [drift, *others]
    for callback in (Budget(trainer, settings, run, data.train, began, probe, drift), *measures):
        trainer.add_callback(callback)


def measure_drift(
    trainer: Any, settings: Settings, rows: Rows, run: RunDirectory, reference: Reference
) -> list[TrainerCallback]:
    """KL along fresh samples of the prompts of `rows`; they are kept, and judged where the truth is known, also those
    that larger betas would have drawn.
    """
    wanted, gold, figures = settings.callbacks, None, None
    if settings.data.gold:
        from dpo_kit.callbacks.gold import GoldFigures, load_gold

        gold = load_gold(settings.data.gold)
        figures = GoldFigures(gold, trainer)

    def keep_and_judge(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Rows of samples.jsonl: one sample of each prompt, so that runs can be paired by prompt later; and what the
        user's own measures say of them, and the truth.
        """
        prompts, answers = [sample.row["prompt"] for sample in samples], [sample.text for sample in samples]
        if is_writer():
            rewards = gold.gold_rewards(prompts, answers) if gold else repeat(None)
            for sample, reward in zip(samples, rewards, strict=False):
                row = {
                    "step": step,
                    "prompt_id": sample.row["prompt_id"],
                    "prompt": redact_text(answer_text(sample.row["prompt"])),
                    "answer": redact_text(sample.text),
                    "tokens": len(sample.token_ids),
                    "cut": sample.cut,
                }
                append_row(run.samples, row | ({"gold_reward": reward} if gold else {}))
        with forked_random(step):
            values = call_metrics(wanted.sample_metrics, prompts, answers)
        return values | (figures(step, samples) if figures else {})

    def keep_weights(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """The model at this moment of the run, so that it can be chosen and exported."""
        if 0 < step < trainer.state.max_steps:
            save_model(trainer, run.weights(step), last=False)
        return {}

    keeps_weights = wanted.path is not None or wanted_moments(settings) > 2
    trainer.kept_models = wanted_moments(settings) - 1 if keeps_weights else 0
    drift = KLDrift(
        trainer,
        distinct_prompts(rows)[: wanted.at_most("prompts")],
        reference=reference,
        max_new_tokens=wanted.at_most("max_new_tokens"),
        on_samples=[keep_and_judge, *([keep_weights] if keeps_weights else [])],
        shared=getattr(trainer, "folder", None),  # of the reference store
    )
    previews_larger_beta = settings.beta < min(wanted.preview, default=0.0)
    if not (figures and previews_larger_beta and settings.method.implicit_reward):  # else beta is no distance
        return [drift]
    from dpo_kit.callbacks.preview import Preview

    return [drift, Preview(drift.drift, settings.beta, wanted.preview, run.preview, figures.reward)]
