"""From several answers to a prompt, and a judge, to preference pairs; each prompt ends in exactly one outcome."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, islice
from math import comb
from typing import Any

from dpo_kit.config.settings import Build
from dpo_kit.judge.answers import Answer
from dpo_kit.judge.verdicts import Judge, Prompt, Verdict, compare, toss_coin
from dpo_kit.model.chats import answer_text, prompt_of, split_context
from dpo_kit.run.journal import key_of

OUTCOMES = ("pair", "tie", "order-dependent", "intransitive", "identical", "empty", "failed")
"""What becomes of a prompt. intransitive: the answer with most wins loses to the one with fewest; empty: fewer than two
answers have text; failed: an answer or a verdict is missing, so that the same command may still bring it."""


UNDECIDED = ("tie", "order-dependent")


@dataclass(frozen=True)
class Comparison:
    """Two answers to a prompt and the verdict on the first (`a`)."""

    prompt: Prompt
    a: Answer
    b: Answer
    verdict: Verdict

    def turned(self) -> Comparison:
        """The same with both answers in each other's place."""
        return Comparison(self.prompt, self.b, self.a, self.verdict.turned())


@dataclass
class Paired:
    """All comparisons, the pairs, and the number of prompts by outcome."""

    comparisons: list[Comparison]
    pairs: list[dict[str, Any]]
    outcomes: Counter[str]
    coins: Counter[str] = field(default_factory=Counter)


def pair_answers(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer | None]], build: Build, seed: int
) -> Paired:
    """Let `judge` compare the different answers of each prompt, and make pairs as `build` says."""
    faults = [_cannot_pair(each) for each in answers]
    rows = zip(prompts, answers, faults, strict=True)
    groups = [(prompt, different(given)) for prompt, given, fault in rows if not fault]
    matches = [(prompt, a, b) for prompt, group in groups for a, b in combinations(group, 2)]
    asked = [prompt for prompt, _, _ in matches]
    verdicts = compare(judge, asked, [a.text for _, a, _ in matches], [b.text for _, _, b in matches])
    compared = iter(Comparison(*match, verdict) for match, verdict in zip(matches, verdicts, strict=True))
    paired = Paired([], [], Counter(fault for fault in faults if fault))
    for _, group in groups:
        own = list(islice(compared, comb(len(group), 2)))
        paired.comparisons += own
        _settle(paired, own, build, seed)
    _add_scores(judge, paired.pairs)
    return paired


def different(answers: Sequence[Answer | None]) -> list[Answer]:
    """The answers that have text, each text once."""
    return list({a.text: a for a in reversed(answers) if a is not None and a.text.strip()}.values())[::-1]


def _cannot_pair(answers: Sequence[Answer | None]) -> str | None:
    if None in answers:
        return "failed"
    if sum(bool(a.text.strip()) for a in answers if a is not None) < 2:
        return "empty"
    return "identical" if len(different(answers)) < 2 else None


def _settle(paired: Paired, comparisons: list[Comparison], build: Build, seed: int) -> None:
    """Turn the comparisons of one prompt into its pairs and its outcome."""
    if any(each.verdict.outcome == "unjudged" for each in comparisons):
        paired.outcomes["failed"] += 1
        return
    chosen = comparisons if build.pairs == "all" else [_best_and_worst(paired, comparisons, seed)]
    made = [pair for each in chosen for pair in _pairs(paired, each, build, seed)]
    paired.pairs += made
    undecided = [each.verdict.outcome for each in chosen if each.verdict.outcome in UNDECIDED]
    paired.outcomes["pair" if made else undecided[0] if undecided else "intransitive"] += 1


def _best_and_worst(paired: Paired, comparisons: list[Comparison], seed: int) -> Comparison:
    """The answer with most points (win 1, undecided ½) as `a`, against the one with fewest; equal points by coin."""
    points: defaultdict[str, float] = defaultdict(float)
    for each in comparisons:
        of_a = each.verdict.points
        assert of_a is not None  # a prompt with an unjudged comparison has failed before
        points[each.a.text] += of_a
        points[each.b.text] += 1 - of_a
    prompt = comparisons[0].prompt
    best, *_, worst = ranked = sorted(points, key=lambda text: (-points[text], key_of(seed, prompt, text)))
    if len(ranked) > 2 and (points[best] == points[ranked[1]] or points[worst] == points[ranked[-2]]):
        paired.coins["equally many wins"] += 1
    found = next(each for each in comparisons if {each.a.text, each.b.text} == {best, worst})
    return found if found.a.text == best else found.turned()


def _pairs(paired: Paired, compared: Comparison, build: Build, seed: int) -> Iterator[dict[str, Any]]:
    """The pair that a comparison gives, if it gives one."""
    outcome = compared.verdict.outcome
    if outcome == "loss" and build.pairs == "all":
        compared, outcome = compared.turned(), "win"
    if outcome in UNDECIDED and build.undecided == "coin":
        paired.coins[outcome] += 1
        if toss_coin(seed, compared.prompt, *sorted((compared.a.text, compared.b.text))):
            compared = compared.turned()
    elif outcome != "win":
        return
    prompt, context = split_context(compared.prompt)
    yield context | {
        "prompt": prompt,
        "chosen": compared.a.in_form_of(prompt),
        "rejected": compared.b.in_form_of(prompt),
        "verdict": outcome,
        "source_chosen": compared.a.source,
        "source_rejected": compared.b.source,
    }


def _add_scores(judge: Judge, pairs: list[dict[str, Any]]) -> None:
    """`score_chosen` and `score_rejected` where the judge has a scale."""
    prompts = [prompt_of(pair) for pair in pairs]
    for name in ("chosen", "rejected"):
        scores = judge.scores(prompts, [answer_text(pair[name]) for pair in pairs])
        for pair, score in zip(pairs, scores or [], strict=False):
            pair[f"score_{name}"] = score
