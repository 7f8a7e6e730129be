"""Preferences and KL drift, measured while a run trains; loaded where either is asked for."""

from collections.abc import Sequence
from itertools import repeat
from typing import Any

from dpo_kit.callbacks.callbacks import ImplicitReward, KLDrift, OwnMetrics, PreferenceMargin
from dpo_kit.callbacks.probe import PairProbe
from dpo_kit.config.extensions import call_metrics
from dpo_kit.config.settings import Settings
from dpo_kit.data.prepare import Rows, distinct_prompts
from dpo_kit.model.batches import forked_random
from dpo_kit.model.chats import answer_text
from dpo_kit.model.sampling import Sample
from dpo_kit.model.scoring import Reference
from dpo_kit.run.directory import RunDirectory
from dpo_kit.run.history import append_row
from dpo_kit.run.processes import is_writer
from dpo_kit.run.redact import redact_text


def add_probe(trainer: Any, settings: Settings, rows: Rows, run: RunDirectory, reference: Reference) -> Any:
    """Measures of the held-out `rows`: margin, implicit reward, and those of the user's own; the probe."""
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
    """KL along fresh samples of the prompts of `rows`; they are kept, and judged where the truth is known."""
    wanted, gold, figures = settings.callbacks, None, None
    if settings.data.gold:
        from dpo_kit.callbacks.gold import GoldFigures, load_gold

        gold = load_gold(settings.data.gold)
        figures = GoldFigures(gold, trainer)

    def keep(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        """Rows of samples.jsonl: one sample of each prompt, so that runs can be paired by prompt later."""
        if is_writer():
            prompts, answers = [sample.row["prompt"] for sample in samples], [sample.text for sample in samples]
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
        on_samples=[keep, call_own, *([figures] if figures else [])],
        shared=getattr(trainer, "folder", None),  # of the reference store
    )
    trainer.add_callback(drift)
    previews_larger_beta = settings.beta < min(wanted.preview, default=0.0)
    if figures and previews_larger_beta and settings.method.implicit_reward:  # else beta is no distance
        from dpo_kit.callbacks.preview import Preview

        trainer.add_callback(Preview(drift.drift, settings.beta, wanted.preview, run.preview, figures.reward))
    return drift
