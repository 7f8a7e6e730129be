"""What verdicts on two models' answers say: win rate, with ties dropped, at equal lengths; each with its interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
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


Rate = tuple[float, float, float] | None  # value, low, high


def win_rates(compared: Sequence[Compared], draws: int = 2000) -> dict[str, Any]:
    """Win rates of the policy (shares; 95 % intervals by bootstrap over prompts), and what they rest on.

    A prompt of several answers counts once, by its mean. `win_rate`: win 1, loss 0, tie or order-dependent ½.
    `win_rate_without_ties`: of the verdicts that both orders give. `win_rate_length_controlled_without_difficulty`:
    expected at answers of equal length, as in AlpacaEval 2 (arXiv:2404.04475) but without its instruction difficulty,
    which exists for its own prompts only. All None where nothing is judged.
    """
    judged = [row for row in compared if row.verdict.points is not None]
    decided = [row for row in judged if row.verdict.outcome in ("win", "loss")]
    rate, prompts = _by_prompt(judged, draws), len({row.prompt_id for row in judged})
    needed = None if rate is None else needed_against_half(rate[0])
    found = {
        "prompts": prompts,
        **_named("win_rate", rate),
        "win_rate_verdict": read_verdict(rate, prompts),
        "win_rate_needed_prompts": None if needed is None else max(LEAST, needed),
        **_named("win_rate_without_ties", _by_prompt(decided, draws)),
        "decided": len(decided),
        **_named("win_rate_length_controlled_without_difficulty", _length_controlled(judged, draws)),
        "ties": sum(row.verdict.outcome == "tie" for row in judged),
        "order_inconsistent": sum(row.verdict.outcome == "order-dependent" for row in judged),
        **summarize_verdicts([row.verdict for row in compared]),
    }
    agreement = found.pop("order_agreement")
    found["order_inconsistency"] = None if agreement is None else 1 - agreement
    for side, given in (("policy", [row.policy for row in judged]), ("opponent", [row.opponent for row in judged])):
        answers = [answer for answer in given if answer is not None]
        found[f"{side}_answers"] = {
            "answers": len(answers),
            "mean_characters": fmean(len(answer.text) for answer in answers) if answers else None,
            "cut_share": fmean(answer.cut for answer in answers) if answers else None,
        }
    return found


def read_verdict(rate: Rate, prompts: int) -> Literal["better", "worse", "not separated"] | None:
    """What an interval against ½ over so many prompts allows to say."""
    if rate is None:
        return None
    if prompts < LEAST:
        return "not separated"
    return "better" if rate[1] > 0.5 else "worse" if rate[2] < 0.5 else "not separated"


def _by_prompt(judged: Sequence[Compared], draws: int) -> Rate:
    import torch

    from dpo_kit.callbacks.metrics import bootstrap_interval

    points: dict[str, list[float]] = {}
    for row in judged:
        points.setdefault(row.prompt_id, []).append(row.verdict.points or 0.0)
    if not points:
        return None
    values = torch.tensor([fmean(each) for each in points.values()], dtype=torch.float64)
    return (float(values.mean()), *bootstrap_interval(values, list(points), draws))


def _length_controlled(judged: Sequence[Compared], draws: int) -> Rate:
    """None where there is nothing to tell length from quality by: no verdict, or all answers equally long."""
    import torch

    from dpo_kit.callbacks.metrics import length_controlled, length_controlled_interval

    gaps = torch.tensor([float(row.length_gap) for row in judged])
    if len(set(gaps.tolist())) < 2:
        return None
    points = torch.tensor([row.verdict.points for row in judged], dtype=torch.float64)
    low, high = length_controlled_interval(points, gaps, [row.prompt_id for row in judged], draws)
    return None if math.isnan(low) else (length_controlled(points, gaps), low, high)


def _named(name: str, rate: Rate) -> dict[str, float | None]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), rate or (None, None, None), strict=True))
