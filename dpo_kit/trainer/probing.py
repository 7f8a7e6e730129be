"""Preferences and KL drift, measured while a run trains; loaded where either is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from dpo_kit.callbacks.callbacks import ImplicitReward, KLDrift, OwnMetrics, PreferenceMargin
from dpo_kit.callbacks.probe import PairProbe
from dpo_kit.config.extensions import call_metrics
from dpo_kit.config.settings import Settings
from dpo_kit.data.fresh import distinct_prompts
from dpo_kit.data.prepare import Rows
from dpo_kit.model.chats import answer_text
from dpo_kit.model.random_state import forked_random
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
    """KL along fresh samples of the prompts of `rows`; samples are kept, and judged where the truth is known.
    Returns the callback.
    """
    wanted, gold, gold_figures = settings.callbacks, None, None
    if settings.data.gold:
        from dpo_kit.callbacks.gold import GoldFigures, load_gold

        gold = load_gold(settings.data.gold)
        gold_figures = GoldFigures(gold, trainer)

    def call_own(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        prompts, answers = [sample.row["prompt"] for sample in samples], [sample.text for sample in samples]
        with forked_random(step):
            return call_metrics(wanted.sample_metrics, prompts, answers)

    hooks: list[Any] = [SampleWriter(run.samples, gold), call_own, gold_figures]
    drift = KLDrift(
        trainer,
        distinct_prompts(rows)[: wanted.at_most("prompts")],
        reference=reference,
        max_new_tokens=wanted.at_most("max_new_tokens"),
        on_samples=[hook for hook in hooks if hook],
        shared=getattr(trainer, "folder", None),  # of the reference store
    )
    trainer.add_callback(drift)
    previews_larger_beta = settings.beta < min(wanted.preview, default=0.0)
    if gold_figures and previews_larger_beta and settings.method.implicit_reward:  # else beta is no distance
        from dpo_kit.callbacks.preview import Preview

        trainer.add_callback(Preview(drift.drift, settings.beta, wanted.preview, run.preview, gold_figures.reward))
    return drift


class SampleWriter:
    """A hook of KLDrift that keeps its samples in `path`, with their reward where `gold` knows it."""

    def __init__(self, path: Path, gold: Any) -> None:
        self.path, self.gold = path, gold

    def __call__(self, step: int, samples: Sequence[Sample]) -> dict[str, float]:
        for row in self.rows(step, samples) if is_writer() else ():
            append_row(self.path, row)
        return {}

    def rows(self, step: int, samples: Sequence[Sample]) -> Iterator[dict[str, Any]]:
        """Rows of samples.jsonl: one sample of each prompt, so that runs can be paired by prompt later."""
        prompts, answers = [sample.row["prompt"] for sample in samples], [sample.text for sample in samples]
        rewards = [{"gold_reward": r} for r in self.gold.gold_rewards(prompts, answers)] if self.gold else repeat({})
        for sample, reward in zip(samples, rewards, strict=False):
            prompt = redact_text(answer_text(sample.row["prompt"]))
            row = {"step": step, "prompt_id": sample.row["prompt_id"], "prompt": prompt}
            yield (
                row | {"answer": redact_text(sample.text), "tokens": len(sample.token_ids), "cut": sample.cut} | reward
            )
