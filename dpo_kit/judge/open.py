"""Judges of answers as config options: a gold function, a reward model, a language model, people.

Data building and evaluation both open one here and ask it through `compare`, which shows every pair in both orders.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpo_kit.config.settings import COST_ONLY, GoldJudge, LLMJudge, RewardModelJudge
from dpo_kit.config.settings import HumanJudge as HumanSettings
from dpo_kit.config.settings import Judge as JudgeSettings
from dpo_kit.errors import ConfigError, DataError
from dpo_kit.judge.llm import LanguageModelJudge, read_rubric
from dpo_kit.judge.review import HumanJudge, ReviewSheet
from dpo_kit.judge.verdicts import (
    Control,
    Judge,
    Prompt,
    Raw,
    Shown,
    Verdict,
    compare,
    describe_controls,
    run_controls,
    summarize_verdicts,
    toss_coin,
)
from dpo_kit.run.files import hash_weights
from dpo_kit.run.journal import Journal, key_of

__all__ = ["Control", "Judge", "Prompt", "Raw", "ReviewSheet", "ScoringJudge", "Shown", "Verdict", "compare",
           "describe_controls", "judge_identity", "open_judge", "run_controls", "summarize_verdicts",
           "toss_coin"]  # fmt: skip

Score = Callable[[Sequence[Prompt], Sequence[str]], list[float]]


@contextmanager
def open_judge(settings: JudgeSettings, folder: Path, seed: int = 0) -> Iterator[Judge]:
    """The judge that `settings` (the group `judge`) describes; what it says is kept in `folder` and never paid twice.

    `seed` places the answers on a review sheet. Raises ConfigError, ModelError.
    """
    with Journal(folder / "judgements.jsonl") as journal:
        yield _OPEN[settings.kind](settings, journal, folder, seed)


class ScoringJudge:
    """A judge that gives each answer a number; two answers within `tie_margin` are a tie, in whatever order."""

    def __init__(self, name: str, score: Score, tie_margin: float) -> None:
        self.name, self.score, self.tie_margin = name, score, tie_margin

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        answers = {key_of(s.prompt, answer): (s.prompt, answer) for s in shown for answer in (s.first, s.second)}
        values = dict(zip(answers, self.score(*_columns(answers.values())), strict=True))
        gaps = [values[key_of(s.prompt, s.first)] - values[key_of(s.prompt, s.second)] for s in shown]
        return ["tie" if abs(gap) <= self.tie_margin else "first" if gap > 0 else "second" for gap in gaps]

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return self.score(prompts, answers)

    def spend(self) -> dict[str, Any]:
        return {}


def judge_identity(settings: JudgeSettings) -> dict[str, Any]:
    """What a judge's verdicts depend on: other settings under the same identity change speed and cost only."""
    values = settings.model_dump(exclude=set(COST_ONLY))
    if isinstance(settings, LLMJudge):
        values["rubric"] = key_of(read_rubric(settings.rubric))
    if isinstance(settings, RewardModelJudge):
        values["path"] = hash_weights(settings.path) or settings.path
    return values


def _open_gold(settings: GoldJudge, journal: Journal, folder: Path, seed: int) -> Judge:
    def score(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        try:
            return module.gold_rewards(prompts, answers)
        except ValueError as error:
            raise DataError(f"judge.module={settings.module} cannot judge these prompts: {error}") from error

    try:
        module = importlib.import_module(settings.module)
    except ImportError as error:
        raise ConfigError(
            f"judge.module={settings.module} cannot be imported: {error}; name a module on the Python path, as "
            "dpo_kit.toy is"
        ) from error
    if not hasattr(module, "gold_rewards"):
        raise ConfigError(f"judge.module={settings.module} lacks gold_rewards(prompts, answers): define it there")
    return ScoringJudge(f"gold {settings.module}", score, settings.tie_margin)


def _open_reward_model(settings: RewardModelJudge, journal: Journal, folder: Path, seed: int) -> Judge:
    weights = hash_weights(settings.path) or f"{settings.path}@{settings.revision}"
    loaded: list[Any] = []  # once something is to be scored

    def score(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        rows = list(zip(prompts, answers, strict=True))
        keys = [key_of("reward", weights, settings.max_length, *row) for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in journal.rows}
        if missing and not loaded:
            from dpo_kit.judge.reward_model import RewardModel

            loaded.append(RewardModel(settings))
        for part in _parts(list(missing), settings.batch_size):
            found = loaded[0].score(*_columns(missing[key] for key in part))
            journal.add_all({key: {"score": value} for key, value in zip(part, found, strict=True)})
        return [journal.rows[key]["score"] for key in keys]

    return ScoringJudge(f"reward model {settings.path}", score, settings.tie_margin)


def _columns(rows: Iterable[tuple[Prompt, str]]) -> tuple[list[Prompt], list[str]]:
    pairs = list(rows)
    return [prompt for prompt, _ in pairs], [answer for _, answer in pairs]


def _parts(keys: list[str], size: int) -> Iterator[list[str]]:
    return (keys[start : start + size] for start in range(0, len(keys), size))


def _open_llm(settings: LLMJudge, journal: Journal, folder: Path, seed: int) -> Judge:
    return LanguageModelJudge(settings, journal)


def _open_human(settings: HumanSettings, journal: Journal, folder: Path, seed: int) -> Judge:
    return HumanJudge(ReviewSheet(folder / "review.csv", settings.sheets, seed))


_OPEN: dict[str, Callable[..., Judge]] = {
    "gold": _open_gold,
    "reward_model": _open_reward_model,
    "llm": _open_llm,
    "human": _open_human,
}
