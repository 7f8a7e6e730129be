"""What is measured during a run: the probe's callbacks, the gold reward where it is known, and where the numbers go."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

from dpo_kit.callbacks import ImplicitReward, KLDrift, PreferenceMargin
from dpo_kit.data.prepare import Prepared, Rows
from dpo_kit.data.rows import ANSWERS, Kind
from dpo_kit.gold import GoldFigures, answer_text, load_gold
from dpo_kit.history import append_row
from dpo_kit.model import load_reference
from dpo_kit.probe import PairProbe
from dpo_kit.recorder import Recorder, show_progress
from dpo_kit.run import RunDirectory
from dpo_kit.sampling import Sample
from dpo_kit.scoring import Reference
from dpo_kit.settings import Settings
from dpo_kit.tracking import Tracker

SHOWN_SAMPLES = 8


def add_callbacks(trainer: Any, settings: Settings, data: Prepared, run: RunDirectory, tracker: Tracker) -> None:
    """Give `trainer` everything that measures and records; nothing of it changes training."""
    wanted = settings.callbacks
    trainer.add_callback(Recorder(run.metrics, tracker))
    reference = build_reference(trainer, settings, run)
    rows = probe_rows(data, settings)
    if wanted.preference_margin or wanted.implicit_reward:
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
    if wanted.kl_drift:
        prompts = distinct_prompts(data.select, wanted.prompts)
        hooks = sample_hooks(trainer, settings, run)
        trainer.add_callback(
            KLDrift(trainer, prompts, reference=reference, max_new_tokens=wanted.max_new_tokens, on_samples=hooks)
        )
    show_progress(trainer)


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
        model=load_reference(settings.model).to(trainer.model.device) if other else None,
        reload=lambda: load_reference(settings.model),
        is_start=settings.model.reference is None,
        state_dir=run.probe_state,
    )


def distinct_prompts(rows: Rows, count: int) -> Rows:
    """The first row of each of `count` prompts."""
    return list({row["prompt_id"]: row for row in reversed(rows)}.values())[::-1][:count]


def sample_hooks(
    trainer: Any, settings: Settings, run: RunDirectory
) -> list[Callable[[int, Sequence[Sample]], dict[str, float]]]:
    """What else is done with fresh samples: some are kept, and all are judged where the truth is known."""
    gold = load_gold(settings.data.gold) if settings.data.gold else None

    def keep(step: int, samples: Sequence[Sample]) -> dict[str, float]:
        for sample in samples[:SHOWN_SAMPLES]:
            append_row(run.samples, describe_sample(step, sample, gold))
        return {}

    return [keep, *([GoldFigures(gold, trainer)] if gold else [])]


def describe_sample(step: int, sample: Sample, gold: Any) -> dict[str, Any]:
    prompt = sample.row["prompt"]
    described = {"step": step, "prompt": answer_text(prompt), "answer": sample.text, "cut": sample.cut}
    return described | ({"gold_reward": gold.gold_rewards([prompt], [sample.text])[0]} if gold else {})
