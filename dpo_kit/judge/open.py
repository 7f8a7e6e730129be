"""Judges of answers as config options: a gold function, a reward model, a language model, people.

Data building and evaluation both open one here and ask it through `verdicts.compare`, which shows every pair in both
orders.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from dpo_kit.config.extensions import find_gold
from dpo_kit.config.settings import COST_ONLY, GoldJudge, LLMJudge, RewardModelJudge
from dpo_kit.config.settings import Judge as JudgeSettings
from dpo_kit.errors import DataError
from dpo_kit.judge.llm import LanguageModelJudge, read_rubric
from dpo_kit.judge.review import HumanJudge, ReviewSheet
from dpo_kit.judge.verdicts import Judge, Raw, Shown
from dpo_kit.model.chats import Prompt
from dpo_kit.run.files import hash_weights
from dpo_kit.run.journal import Journal, key_of

Score = Callable[[Sequence[Prompt], Sequence[str]], list[float]]


@contextmanager
def open_judge(settings: JudgeSettings, folder: Path, seed: int = 0) -> Iterator[Judge]:
    """The judge that `settings` (the group `judge`) describes; what it says is kept in `folder` and never paid twice.

    `seed` places the answers on a review sheet. Raises ConfigError, ModelError.
    """
    with Journal(folder / "judgements.jsonl") as journal:
        if isinstance(settings, GoldJudge):
            yield ScoringJudge(f"gold {settings.module}", _gold(settings.module), settings.tie_margin)
        elif isinstance(settings, RewardModelJudge):
            yield ScoringJudge(f"reward model {settings.path}", _rewards(settings, journal), settings.tie_margin)
        elif isinstance(settings, LLMJudge):
            yield LanguageModelJudge(settings, journal)
        else:
            yield HumanJudge(ReviewSheet(folder / "review.csv", settings.sheets, seed))


class ScoringJudge(Judge):
    """A judge that gives each answer a number; two answers within `tie_margin` are a tie, in whatever order."""

    def __init__(self, name: str, score: Score, tie_margin: float) -> None:
        self.name, self.score, self.tie_margin = name, score, tie_margin

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        answers = {key_of(s.prompt, answer): (s.prompt, answer) for s in shown for answer in (s.first, s.second)}
        scores = self.score([prompt for prompt, _ in answers.values()], [answer for _, answer in answers.values()])
        values = dict(zip(answers, scores, strict=True))
        gaps = [values[key_of(s.prompt, s.first)] - values[key_of(s.prompt, s.second)] for s in shown]
        return ["tie" if abs(gap) <= self.tie_margin else "first" if gap > 0 else "second" for gap in gaps]

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        return self.score(prompts, answers)


def judge_identity(settings: JudgeSettings) -> dict[str, Any]:
    """What a judge's verdicts depend on: other settings under the same identity change speed and cost only."""
    values = settings.model_dump(exclude=set(COST_ONLY))
    if isinstance(settings, LLMJudge):
        values["rubric"] = key_of(read_rubric(settings.rubric))
    if isinstance(settings, RewardModelJudge):
        values["path"] = hash_weights(settings.path) or settings.path
    return values


def _gold(name: str) -> Score:
    """The `gold_rewards` of the module `name`."""
    module = find_gold(name, "judge.module", ["gold_rewards"])

    def score(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        try:
            return module.gold_rewards(prompts, answers)
        except ValueError as error:
            raise DataError(f"judge.module={name} cannot judge these prompts: {error}") from error

    return score


def _rewards(settings: RewardModelJudge, journal: Journal) -> Score:
    """The scores of a reward model, which is loaded once something is to be scored."""
    weights = hash_weights(settings.path) or f"{settings.path}@{settings.revision}"

    @cache
    def model() -> Any:
        from dpo_kit.judge.reward_model import RewardModel

        return RewardModel(settings)

    def score(prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        rows = list(zip(prompts, answers, strict=True))
        keys = [key_of("reward", weights, settings.max_length, *row) for row in rows]
        missing = {key: row for key, row in zip(keys, rows, strict=True) if key not in journal.rows}
        for start in range(0, len(missing), settings.batch_size):
            part = dict(list(missing.items())[start : start + settings.batch_size])
            values = model().score(*map(list, zip(*part.values(), strict=True)))
            journal.add_all({key: {"score": value} for key, value in zip(part, values, strict=True)})
        return [journal.rows[key]["score"] for key in keys]

    return score
