"""Asking a judge about pairs of answers, always in both orders, and what its verdicts say about it.

A judge sees a question and two answers and names the better one. Which of them stands first sways many judges, so
that only a verdict that both orders give counts as a win or a loss.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal, NamedTuple

from dpo_kit.model.chats import Prompt, conversation_text
from dpo_kit.run.files import texts
from dpo_kit.run.journal import key_of

Raw = Literal["first", "second", "tie", "unparsable", "unjudged"]  # unparsable: cannot be read; unjudged: no answer
Outcome = Literal["win", "loss", "tie", "order-dependent", "unjudged"]
POINTS: dict[Outcome, float] = {"win": 1.0, "loss": 0.0, "tie": 0.5, "order-dependent": 0.5}
OUTCOMES: dict[tuple[Raw, Raw], Outcome] = {
    ("first", "second"): "win",
    ("second", "first"): "loss",
    ("tie", "tie"): "tie",
}
FAKES: dict[str, str] = texts(__file__)
SWAPPED: dict[Raw, Raw] = {"first": "second", "second": "first"}


class Shown(NamedTuple):
    """What a judge sees at a time: a prompt and two answers in one order."""

    prompt: Prompt
    first: str
    second: str

    @property
    def parts(self) -> dict[str, str]:
        """The three texts under their names."""
        return {"message": conversation_text(self.prompt), "answer 1": self.first, "answer 2": self.second}


class Judge:
    """Who decides; made by `dpo_kit.judge.open.open_judge`."""

    name: str

    def decide(self, shown: Sequence[Shown]) -> list[Raw]:
        """The better of both answers, as they are shown."""
        raise NotImplementedError

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float] | None:
        """Each answer on the judge's own scale; None for a judge that has none and only compares."""
        return None

    def spend(self) -> dict[str, Any]:
        """What asking has cost so far; empty where it costs nothing."""
        return {}


@dataclass(frozen=True)
class Verdict:
    """A judge on answer a against b: the raw verdicts where a, and where b, was shown first."""

    a_first: Raw
    b_first: Raw

    @property
    def outcome(self) -> Outcome:
        """For answer a; a tie where one of the raw verdicts cannot be read."""
        both = self.a_first, self.b_first
        if "unjudged" in both:
            return "unjudged"
        return "tie" if "unparsable" in both else OUTCOMES.get(both, "order-dependent")

    @property
    def points(self) -> float | None:
        """1 for a win, 0 for a loss, ½ for a tie or an order-dependent verdict, None where there is no verdict."""
        return POINTS.get(self.outcome)

    def turned(self) -> "Verdict":
        """The same verdict on answer b."""
        return Verdict(self.b_first, self.a_first)


def compare(
    judge: Judge, prompts: Sequence[Prompt], answers_a: Sequence[str], answers_b: Sequence[str]
) -> list[Verdict]:
    """The verdict on answer a against answer b for every prompt, each asked in both orders."""
    rows = zip(prompts, answers_a, answers_b, strict=True)
    # side by side, so that a pass that stops has whole comparisons
    raw = judge.decide([shown for p, a, b in rows for shown in (Shown(p, a, b), Shown(p, b, a))])
    return [Verdict(*both) for both in zip(raw[::2], raw[1::2], strict=True)]


def summarize_verdicts(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """Counts of outcomes, and how far the judge can be trusted; shares are of what was judged, None where nothing was.
    `order_agreement`: both orders said the same. `first_position_rate`: of the raw verdicts for one answer, those for
    the answer shown first (½ where the place plays no part). `unparsable_rate`: of all raw verdicts.
    """
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    judged = [verdict for verdict in verdicts if verdict.points is not None]
    raw = Counter(each for verdict in judged for each in (verdict.a_first, verdict.b_first))
    same = sum(verdict.b_first == SWAPPED.get(verdict.a_first, verdict.a_first) for verdict in judged)
    named = raw["first"] + raw["second"]
    return {
        "comparisons": len(verdicts),
        "outcomes": {name: outcomes[name] for name in (*POINTS, "unjudged")},
        "order_agreement": same / len(judged) if judged else None,
        "first_position_rate": raw["first"] / named if named else None,
        "unparsable": raw["unparsable"],
        "unparsable_rate": raw["unparsable"] / raw.total() if judged else None,
    }


def toss_coin(*what: Any) -> bool:
    """A fair coin that falls the same way whenever it is thrown for `what` (put the seed in)."""
    return int(key_of("coin", *what), 16) % 2 == 0


def run_controls(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[str], again: Sequence[str] | None = None
) -> list[dict[str, Any]]:
    """What a judge worth listening to says of: the same model twice, an answer that asks to be picked, one that fits
    every question, and none at all ("null models" won 86.5 % before a naive judge, arXiv:2410.07137).

    [{name, expected, points, low, high, passed}]: the points that the control's answers got, with a 95 % interval by
    prompt. `again` are second answers of the model that gave `answers` (None: the same ones). The first control passes
    where its interval, exact since a bootstrap of few prompts is too narrow for an honest judge, covers ½; the others
    where theirs, by bootstrap, ends below.
    """
    import torch

    from dpo_kit.callbacks.metrics import bootstrap_interval
    from dpo_kit.run.statistics import clopper_pearson

    tried = {"same model twice": again or answers} | {name: [fake] * len(prompts) for name, fake in FAKES.items()}
    controls = []
    for name, others in tried.items():
        points = [v.points for v in compare(judge, prompts, others, answers) if v.points is not None]
        passed, low, high = False, None, None
        if points and name in FAKES:
            values = torch.tensor(points, dtype=torch.float64)
            low, high = bootstrap_interval(values, [str(index) for index in range(len(points))])
            passed = high < 0.5
        elif points:  # Clopper-Pearson's over the verdicts that decide: it covers ½ where a sign test rejects nothing
            decided = points.count(1.0) + points.count(0.0)
            ends = clopper_pearson(points.count(1.0), decided)
            low, high = ((share * decided + (len(points) - decided) / 2) / len(points) for share in ends)
            passed = low <= 0.5 <= high
        expected = "interval below .5" if name in FAKES else "interval covers .5"
        mean = fmean(points) if points else None
        controls.append(
            {"name": name, "expected": expected, "points": mean, "low": low, "high": high, "passed": passed}
        )
    return controls
