"""From several answers to a prompt, and a judge, to preference pairs; each prompt ends in exactly one outcome."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
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
    cut: int = 0  # pairs whose chosen answer was cut


def pair_answers(
    judge: Judge, prompts: Sequence[Prompt], answers: Sequence[Sequence[Answer | None]], build: Build, seed: int
) -> Paired:
    """Let `judge` compare the different answers of each prompt, and make pairs as `build` says."""
    paired = Paired([], [], Counter())
    matches: list[list[tuple[Prompt, Answer, Answer]]] = []  # of each prompt
    for prompt, given in zip(prompts, answers, strict=True):
        texts = [answer.text for answer in given if answer is not None and answer.text.strip()]
        if None in given:
            paired.outcomes["failed"] += 1
        elif len(texts) < 2:
            paired.outcomes["empty"] += 1
        elif len(set(texts)) < 2:
            paired.outcomes["identical"] += 1
        else:
            matches.append([(prompt, a, b) for a, b in combinations(different(given), 2)])
    every = [match for group in matches for match in group]
    asked, firsts, seconds = [p for p, _, _ in every], [a.text for _, a, _ in every], [b.text for _, _, b in every]
    verdicts = iter(compare(judge, asked, firsts, seconds))
    for group in matches:
        comparisons = [Comparison(*match, next(verdicts)) for match in group]
        paired.comparisons += comparisons
        if any(compared.verdict.outcome == "unjudged" for compared in comparisons):
            paired.outcomes["failed"] += 1
            continue
        chosen = comparisons
        if build.pairs != "all":  # the answer with most points against the one with fewest; equal points by coin
            points: defaultdict[str, float] = defaultdict(float)
            for compared in comparisons:
                of_a = compared.verdict.points or 0.0  # win 1, undecided ½
                points[compared.a.text] += of_a
                points[compared.b.text] += 1 - of_a
            asked_with = comparisons[0].prompt
            ranked = sorted(points, key=lambda text: (-points[text], key_of(seed, asked_with, text)))
            best, worst = ranked[0], ranked[-1]
            if len(ranked) > 2 and (points[best] == points[ranked[1]] or points[worst] == points[ranked[-2]]):
                paired.coins["equally many wins"] += 1
            between = next(compared for compared in comparisons if {compared.a.text, compared.b.text} == {best, worst})
            chosen = [between if between.a.text == best else between.turned()]
        pairs = [pair for compared in chosen for pair in _pairs(paired, compared, build, seed)]
        paired.pairs += pairs
        undecided = [compared.verdict.outcome for compared in chosen if compared.verdict.outcome in UNDECIDED]
        paired.outcomes["pair" if pairs else undecided[0] if undecided else "intransitive"] += 1
    asked = [prompt_of(pair) for pair in paired.pairs]
    for name in ("chosen", "rejected"):  # where the judge has a scale
        scores = judge.scores(asked, [answer_text(pair[name]) for pair in paired.pairs])
        for pair, score in zip(paired.pairs, scores or [], strict=False):
            pair[f"score_{name}"] = score
    return paired


def different(answers: Sequence[Answer | None]) -> list[Answer]:
    """The answers that have text, each text once."""
    return list({a.text: a for a in reversed(answers) if a is not None and a.text.strip()}.values())[::-1]


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
    paired.cut += compared.a.cut
    yield context | {
        "prompt": prompt,
        "chosen": compared.a.in_form_of(prompt),
        "rejected": compared.b.in_form_of(prompt),
        "verdict": outcome,
        "source_chosen": compared.a.source,
        "source_rejected": compared.b.source,
    }
