"""What verdicts on two models' answers say: win rate, with ties dropped, at equal lengths; each with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dpo_kit.judge.answers import Answer
from dpo_kit.judge.verdicts import Prompt, Verdict, summarize_verdicts
from dpo_kit.run.statistics import needed_against_half

LEAST = 20  # prompts; a bootstrap over fewer of them is too narrow to call a winner by
CUT = 0.05  # share of cut answers from which a reader must know


@dataclass(frozen=True)
class Compared:
    """One answer of the policy beside one of its opponent, and the verdict on the policy's; None: no answer came."""

    prompt_id: str
    prompt: Prompt
    draw: int
    policy: Answer | None
    opponent: Answer | None
    verdict: Verdict

    @property
    def length_gap(self) -> int:
        """Characters that the policy's answer is longer."""
        return len(self.policy.text if self.policy else "") - len(self.opponent.text if self.opponent else "")


def win_rates(compared: Sequence[Compared], draws: int = 2000, seed: int = 0) -> dict[str, Any]:
    """Win rates of the policy (shares; 95 % intervals by bootstrap over prompts), and what they rest on.

    A prompt of several answers counts once, by its mean. `win_rate`: win 1, loss 0, tie or order-dependent ½.
    `win_rate_without_ties`: of the verdicts that both orders give. `win_rate_length_controlled_without_difficulty`:
    expected at answers of equal length, as in AlpacaEval 2 (arXiv:2404.04475) but without its instruction difficulty,
    which exists for its own prompts only. All None where nothing is judged.
    """
    judged = [each for each in compared if each.verdict.points is not None]
    decided = [each for each in judged if each.verdict.outcome in ("win", "loss")]
    rate, prompts = _by_prompt(judged, draws, seed), len({each.prompt_id for each in judged})
    needed = None if rate is None else needed_against_half(rate[0])
    found = {
        "prompts": prompts,
        **_named("win_rate", rate),
        "win_rate_verdict": read_verdict(rate, prompts),
        "win_rate_needed_prompts": None if needed is None else max(LEAST, needed),
        **_named("win_rate_without_ties", _by_prompt(decided, draws, seed)),
        "decided": len(decided),
        **_named("win_rate_length_controlled_without_difficulty", _length_controlled(judged, draws, seed)),
        "ties": sum(each.verdict.outcome == "tie" for each in judged),
        "order_inconsistent": sum(each.verdict.outcome == "order-dependent" for each in judged),
        **summarize_verdicts([each.verdict for each in compared]),
    }
    agreement = found.pop("order_agreement")
    return found | {"order_inconsistency": None if agreement is None else 1 - agreement} | _lengths(judged)


Rate = tuple[float, float, float] | None  # value, low, high


def read_verdict(rate: Rate, prompts: int) -> Literal["better", "worse", "not separated"] | None:
    """What an interval against ½ over so many prompts allows to say."""
    if rate is None:
        return None
    if prompts < LEAST:
        return "not separated"
    return "better" if rate[1] > 0.5 else "worse" if rate[2] < 0.5 else "not separated"


def points_by_prompt(compared: Sequence[Compared]) -> dict[str, float]:
    """The mean points of each prompt that is judged."""
    points: dict[str, list[float]] = {}
    for each in compared:
        if (value := each.verdict.points) is not None:
            points.setdefault(each.prompt_id, []).append(value)
    return {name: sum(values) / len(values) for name, values in points.items()}


def _by_prompt(judged: Sequence[Compared], draws: int, seed: int) -> Rate:
    import torch

    from dpo_kit.callbacks.metrics import bootstrap_interval

    points = points_by_prompt(judged)
    if not points:
        return None
    values = torch.tensor(list(points.values()), dtype=torch.float64)
    return (float(values.mean()), *bootstrap_interval(values, list(points), draws, seed))


def _length_controlled(judged: Sequence[Compared], draws: int, seed: int) -> Rate:
    """None where there is nothing to tell length from quality by: no verdict, or all answers equally long."""
    import torch

    from dpo_kit.callbacks.metrics import length_controlled, length_controlled_interval

    gaps = torch.tensor([float(each.length_gap) for each in judged])
    if len(set(gaps.tolist())) < 2:
        return None
    points = torch.tensor([each.verdict.points for each in judged], dtype=torch.float64)
    low, high = length_controlled_interval(points, gaps, [each.prompt_id for each in judged], draws, seed)
    return None if math.isnan(low) else (length_controlled(points, gaps), low, high)


def _named(name: str, rate: Rate) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), rate or (None, None, None), strict=True))


def _lengths(judged: Sequence[Compared]) -> dict[str, Any]:
    """Mean characters and share of cut answers of each side."""
    sides = {
        "policy_answers": [each.policy for each in judged],
        "opponent_answers": [each.opponent for each in judged],
    }
    there = {name: [answer for answer in answers if answer is not None] for name, answers in sides.items()}
    return {
        name: {
            "answers": len(answers),
            "mean_characters": sum(len(answer.text) for answer in answers) / len(answers) if answers else None,
            "cut_share": sum(answer.cut for answer in answers) / len(answers) if answers else None,
        }
        for name, answers in there.items()
    }
